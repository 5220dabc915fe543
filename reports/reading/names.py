"""Names: of a cell, and of the files in a run folder and a sweep folder; docs/files.md says what they hold."""

from __future__ import annotations

MANIFEST_FILE = "manifest.json"
REQUESTS_FILE = "requests.parquet"
STEPS_FILE = "steps.parquet"
GAUGES_FILE = "gauges.parquet"
SCORES_FILE = "scores.parquet"
KV_MAP_FILE = "kv_map.parquet"
ROUTING_FILE = "routing.parquet"
PREFIXES_FILE = "prefixes.parquet"
REUSE_FILE = "reuse.parquet"
ERROR_FILE = "error.json"
CELL_FILE = "cell.json"
CLAIM_FILE = ".cell"
LOCK_FILE = ".lock"
STUDY_FILE = "study.json"
SWEEP_FILE = "sweep.json"
DATA_FILES = (
    REQUESTS_FILE, STEPS_FILE, GAUGES_FILE, SCORES_FILE, KV_MAP_FILE, ROUTING_FILE, PREFIXES_FILE, REUSE_FILE,
)  # fmt: skip
REPORT_FILES = ("report.html", "report.md", "summary.json", "requests.csv", "figures")


def cell_name(allocator: str, scheduler: str, router: str | None = None, *, sign: str = "x") -> str:
    """How a strategy is called: `paged x continuous`, with a router `... x least_kv`; with the sign × in reports."""
    return f" {sign} ".join([allocator, scheduler, *([router] if router else [])])
