"""Do two versions of this code decide, compute and report the same? Twenty cells, recorded and compared.

    kvarena check same_results record OLD --root CHECKOUT  # of another version
    kvarena check same_results record NEW
    kvarena check same_results compare OLD NEW

Every allocator and every scheduler is in some cell: simulated ones (their clock and so every number is the same again),
one of a million requests, ones that compute tokens (all requests arrive at once: decisions do not hang on the machine's
speed), and one that is served over HTTP. Compared are the decision hash and the ledger of every step, the tokens of
every request, and of simulated cells every number of the summary: equal to 1e-7 of its size. Cells that are finished
are kept, so a recording can go on. Exit code 1 when anything differs.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from kvarena.experiments.serving.child import Child
from kvarena.experiments.tools import tool_parser

TOLERANCE = 1e-7
# Of a summary: where and when it was made, and what the host's own clock said.
OF_THE_RUN = (
    "command", "created", "git", "machine", "versions", "processor_seconds", "recording", "peak_rss_bytes", "headline",
    "notices",
)  # fmt: skip
STEP_COLUMNS = (
    "decision_hash", "num_running", "num_waiting", "num_new_tokens", "num_preempted", "num_copies", "token_states",
    "reservation", "internal", "external", "shortage", "cached", "free", "shared_saved", "held",
)  # fmt: skip
ROW_COLUMNS = ("request_id", "num_output_tokens", "finish_reason", "num_cached_tokens", "num_preemptions")
STRATEGIES = (
    "allocator=contiguous scheduler=static",
    "allocator=contiguous scheduler=continuous",
    "allocator=orca_max scheduler=continuous",
    "allocator=orca_pow2 scheduler=chunked",
    "allocator=orca_oracle scheduler=sjf",
    "allocator=paged scheduler=continuous",
    "allocator=paged scheduler=fair",
    "allocator=paged scheduler=priority",
    "allocator=paged scheduler=chunked scheduler.preemption=swap allocator.swap_gib=1",
    "allocator=paged_prefix scheduler=chunked",
    "allocator=radix scheduler=priority",
    "allocator=virtual scheduler=continuous",
)
SIMULATED = (
    "runner=simulated runner.profile=h200 model=qwen3-0.6b-shape engine.dtype=bfloat16 kv_cache.num_slots=8192 "
    "engine.max_model_len=2048 workload=shared_prefix workload.num_requests=400 arrival=poisson arrival.rate=300 "
)
COMPUTED = "kv_cache.num_slots=1024 workload.num_requests=16 arrival=all_at_once "
COMPUTED_STRATEGIES = (
    "allocator=contiguous scheduler=static",
    "allocator=paged scheduler=continuous sampling.temperature=0.7",
    "allocator=paged scheduler=chunked sampling.n=3",
    "allocator=paged_prefix scheduler=chunked workload=shared_prefix engine.overlap=true",
    "allocator=radix scheduler=sjf workload=multi_turn",
    "allocator=virtual scheduler=fair",
)
MILLION = (
    "runner=simulated runner.profile=h200 model=qwen3-0.6b-shape engine.dtype=bfloat16 kv_cache.num_slots=1048576 "
    "engine.max_model_len=2048 allocator=paged scheduler=continuous workload=lognormal workload.num_requests=1000000 "
    "workload.output_len.mean=8 workload.prompt_len.mean=64 arrival=poisson arrival.rate=2000 driver.record=summary"
)
SERVED = "workload.num_requests=24 arrival=all_at_once"


def cells() -> Iterator[tuple[str, str]]:
    """(name, overrides) of each; the last one is served."""
    for number, strategy in enumerate(STRATEGIES):
        yield f"simulated-{number}", f"{SIMULATED} {strategy}"
    for number, strategy in enumerate(COMPUTED_STRATEGIES):
        yield f"computed-{number}", f"{COMPUTED} {strategy}"
    yield "simulated-million", MILLION
    yield "served", SERVED


def record(folder: Path, root: Path) -> None:
    """Run every cell that `folder` lacks, by the run.py of `root`."""
    for name, overrides in cells():
        cell = folder.resolve() / name
        if (cell / "cell.json").exists():
            continue
        start = time.monotonic()
        if name == "served":
            _record_served(cell, root, overrides.split())
        else:
            _run(cell, root, overrides.split())
        print(json.dumps({"cell": name, "seconds": round(time.monotonic() - start, 1)}), flush=True)


def _run(cell: Path, root: Path, overrides: Sequence[str]) -> None:
    command = [sys.executable, "run.py", *overrides, f"hydra.run.dir={cell}", "report.pages=false"]
    done = subprocess.run([*command, "report.progress=false"], cwd=root, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{cell.name}: {done.stderr.strip()[-2000:]}")


def _record_served(cell: Path, root: Path, overrides: Sequence[str]) -> None:
    server = Child(["run.py", "mode=serve", "server.port=0", f"hydra.run.dir={cell}.server"], root)
    try:
        _run(cell, root, [f"target={server.url}", *overrides])
    finally:
        server.stop()


def differences(old: Path, new: Path) -> list[str]:
    """What differs between two recordings of one cell."""
    found = []
    simulated, served = old.name.startswith("simulated"), old.name == "served"
    rows = [_rows(folder / "requests.parquet", exact=not served) for folder in (old, new)]
    if rows[0] != rows[1]:
        found.append("requests.parquet")
    if not served:
        names = [name for name in STEP_COLUMNS if name in pq.read_schema(new / "steps.parquet").names]
        steps = [pq.read_table(folder / "steps.parquet", columns=names) for folder in (old, new)]
        found += [f"steps.parquet: {name}" for name in names if not steps[0][name].equals(steps[1][name])]
    if simulated:
        summaries = [json.loads((folder / "summary.json").read_text()) for folder in (old, new)]
        found += [
            f"summary.json: {line}"
            for line in _unequal(summaries[0], summaries[1], "")
            if line.split()[0].split(".")[1] not in OF_THE_RUN
        ]
    return found


def _rows(path: Path, *, exact: bool) -> list[tuple[Any, ...]]:
    """Each request's outcome and tokens. `exact`: what depends on the moment of a step counts too."""
    names = [*(ROW_COLUMNS if exact else ROW_COLUMNS[:3]), "output_token_ids"]
    rows = pq.read_table(path, columns=names).to_pylist()
    return sorted(tuple(str(row[name]) for name in names) for row in rows)


def _unequal(old: Any, new: Any, path: str) -> Iterator[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in old.keys() | new.keys():
            yield from _unequal(old.get(key), new.get(key), f"{path}.{key}")
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for number, pair in enumerate(zip(old, new, strict=True)):
            yield from _unequal(pair[0], pair[1], f"{path}.{number}")
    elif isinstance(old, float) and isinstance(new, float):
        if not math.isclose(old, new, rel_tol=TOLERANCE, abs_tol=1e-12):
            yield f"{path} {old} {new}"
    elif old != new:
        yield f"{path} {old!r} {new!r}"


def main(argv: Sequence[str]) -> int:
    """Record or compare; see the module's docstring."""
    parser = tool_parser(__name__, __doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    recording = commands.add_parser("record", help="run the cells")
    recording.add_argument("folder", type=Path, help="where the recording goes")
    recording.add_argument("--root", type=Path, default=Path.cwd(), help="the checkout whose run.py is run")
    comparing = commands.add_parser("compare", help="compare two recordings")
    comparing.add_argument("old", type=Path, help="a recording")
    comparing.add_argument("new", type=Path, help="another one")
    options = parser.parse_args(argv)
    if options.command == "record":
        record(options.folder, options.root)
        return 0
    bad = 0
    for name, _ in cells():
        found = differences(options.old / name, options.new / name)
        bad += bool(found)
        print(json.dumps({"cell": name, "differs": found}))
    print(json.dumps({"cells": len(list(cells())), "differ": bad}))
    return 1 if bad else 0
