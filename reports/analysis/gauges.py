"""A target's own gauges over the run (gauges.parquet): how full it was, and how many ran and waited."""

from __future__ import annotations

from typing import Any

import numpy as np

from kvarena.reports.drawing.document import Picture, Section, Table
from kvarena.reports.drawing.format import count, percent, rate
from kvarena.reports.reading.columns import names_of
from kvarena.reports.reading.files import RunFiles, read_table
from kvarena.reports.reading.names import GAUGES_FILE


def read_gauges(run: RunFiles) -> dict[str, np.ndarray] | None:
    """The columns of gauges.parquet, NaN where the server had no such gauge; None without the file."""
    path = run.path / GAUGES_FILE
    if not path.exists():
        return None
    table = read_table(path, names_of(GAUGES_FILE))
    return {name: table.column(name).to_numpy().astype(float) for name in table.column_names}


def summarize_gauges(gauges: dict[str, np.ndarray] | None) -> dict[str, Any] | None:
    """Means and peaks over the readings; counters as what they grew by between the first and the last."""
    if gauges is None:
        return None
    queries, hits = _growth(gauges["prefix_queries"]), _growth(gauges["prefix_hits"])
    return {
        "num_readings": len(gauges["time"]),
        "kv_usage": _mean_and_peak(gauges["kv_usage"]),
        "num_running": _mean_and_peak(gauges["num_running"]),
        "num_waiting": _mean_and_peak(gauges["num_waiting"]),
        "num_preemptions": _growth(gauges["num_preemptions"]),
        "prefix_hit_rate": hits / queries if hits is not None and queries else None,
    }


def _mean_and_peak(values: np.ndarray) -> dict[str, float] | None:
    known = values[~np.isnan(values)]
    return {"mean": float(known.mean()), "max": float(known.max())} if len(known) else None


def _growth(values: np.ndarray) -> float | None:
    known = values[~np.isnan(values)]
    return float(known[-1] - known[0]) if len(known) else None


def gauges_section(summary: dict[str, Any], svg: dict[str, str]) -> Section:
    """What the target said of itself."""
    gauges, facts = summary["gauges"], (summary["target"] or {}).get("gauges") or {}
    rows = [
        [label, rate_of(entry["mean"]), rate_of(entry["max"])]
        for label, key, rate_of in (
            ("KV pool in use", "kv_usage", percent),
            ("requests running", "num_running", rate),
            ("requests waiting", "num_waiting", rate),
        )
        if (entry := gauges[key])
    ]
    text = [
        f"The server's own gauges, {count(gauges['num_readings'])} readings of {facts.get('url', 'its metrics')}"
        + (
            f"; {count(facts['num_failed'])} more brought nothing ({facts.get('error')})"
            if facts.get("num_failed")
            else ""
        )
        + "."
    ]
    if gauges["num_preemptions"] is not None:
        text.append(f"It preempted {count(round(gauges['num_preemptions']))} requests between the first and the last.")
    if gauges["prefix_hit_rate"] is not None:
        text.append(f"Its prefix cache answered {percent(gauges['prefix_hit_rate'])} of the prompt tokens asked for.")
    picture = Picture(
        "gauges",
        svg["gauges"],
        "The server's gauges over the run.",
        "KV pool in use and requests of the server over time",
    )
    return Section("The server", [" ".join(text)], [picture], [Table(["", "mean of the readings", "peak"], rows)])
