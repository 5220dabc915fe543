"""Do a run's KV map and its memory ledger tell the same story?

    python -m experiments.correctness.map_check RUN_OR_SWEEP_DIR [...]

For every snapshot of kv_map.parquet, cells counted by owner are compared with the ledger of the same step in
steps.parquet. Where every block has a cell (`stride` 1) they must be equal; where only every k-th block is looked at,
the map must not show more than the ledger has. Prints one JSON line per run and one for all; exit code 1 when a
snapshot differs.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq

from engine.errors import ConfigError, KvarenaError
from experiments.recording.files import KV_MAP_FILE, MANIFEST_FILE, STEPS_FILE
from experiments.recording.kv_map import CACHED, FREE
from reports.errors import ReportError
from reports.files import read_run

OWNED = ("token_states", "reservation", "internal")
UNOWNED = ("external", "shortage", "free")


class Snapshot(NamedTuple):
    """One step's map: per cell the owner's row (or SHARED, CACHED, FREE) and the filled slots of its block."""

    step: int
    owner: np.ndarray
    filled: np.ndarray


def difference(snapshot: Snapshot, ledger: Mapping[str, int], block_size: int, *, mapped: bool) -> str:
    """What a map of all blocks and the ledger of its step disagree on; empty when they agree.

    Args:
        snapshot: with a cell for every block.
        ledger: the step's classes, in slots.
        block_size: slots of a cell.
        mapped: cells are addresses of virtual regions: a request's last block may be its own in part, and free cells
            are no memory.
    """
    owned = snapshot.owner != FREE
    cached = snapshot.owner == CACHED
    owned &= ~cached
    slots = sum(ledger[name] for name in OWNED)
    counts = {
        "token_states": (int(snapshot.filled[owned].sum()), ledger["token_states"]),
        "cached": (int(cached.sum()) * block_size, ledger["cached"]),
    }
    cells = int(owned.sum()) * block_size
    if mapped:
        num_owners = len(np.unique(snapshot.owner[owned]))
        if not cells - num_owners * (block_size - 1) <= slots <= cells:
            return f"step {snapshot.step}: the map has {cells} owned slots of {num_owners} requests, the ledger {slots}"
    else:
        counts["owned"] = cells, slots
        counts["not owned"] = int((snapshot.owner == FREE).sum()) * block_size, sum(ledger[name] for name in UNOWNED)
    wrong = [f"{name} {ours} and {theirs}" for name, (ours, theirs) in counts.items() if ours != theirs]
    return f"step {snapshot.step}: map and ledger have {', '.join(wrong)}" if wrong else ""


def excess(snapshot: Snapshot, ledger: Mapping[str, int], block_size: int) -> str:
    """What a map of every k-th block shows beyond the ledger of its step; empty when nothing."""
    owned = (snapshot.owner != FREE) & (snapshot.owner != CACHED)
    filled, cells = int(snapshot.filled[owned].sum()), int(owned.sum())
    num_owners = len(np.unique(snapshot.owner[owned]))
    slots = sum(ledger[name] for name in OWNED)
    if filled > ledger["token_states"] or cells * block_size > slots + num_owners * (block_size - 1):
        return f"step {snapshot.step}: the map shows {filled} filled slots in {cells} owned blocks, the ledger has less"
    return ""


def read_snapshots(path: Path) -> tuple[int, list[Snapshot]]:
    """Stride and snapshots of a kv_map.parquet."""
    table = pq.read_table(path, columns=["step", "owner", "filled", "stride"])
    rows = zip(*(table.column(name).to_pylist() for name in ("step", "owner", "filled")), strict=True)
    strides = set(table.column("stride").to_pylist())
    if len(strides) > 1:
        raise ConfigError(f"{path}: snapshots of several strides {sorted(strides)}; record the run again")
    return max(strides, default=1), [Snapshot(step, np.array(owner), np.array(filled)) for step, owner, filled in rows]


def check_run(run_dir: Path) -> dict[str, Any]:
    """Compare the map of one run with its ledger.

    Raises:
        ConfigError: the run has no map, or a snapshot of a step that it has not.
        ReportError: a file is missing or broken.
    """
    run = read_run(run_dir)
    path = run_dir / KV_MAP_FILE
    if not path.exists():
        raise ConfigError(f"{run_dir} has no {KV_MAP_FILE}; run it with report.kv_map=true")
    stride, snapshots = read_snapshots(path)
    row_of = {int(step): row for row, step in enumerate(run.steps["step"])}
    pool = run.manifest["pool"]
    differing = []
    for snapshot in snapshots:
        if snapshot.step not in row_of:
            raise ConfigError(f"{path}: a snapshot of step {snapshot.step}, which {STEPS_FILE} has not")
        ledger = {name: int(run.steps[name][row_of[snapshot.step]]) for name in (*OWNED, *UNOWNED, "cached")}
        if stride > 1:
            wrong = excess(snapshot, ledger, pool["block_size"])
        else:
            wrong = difference(snapshot, ledger, pool["block_size"], mapped="pages" in pool)
        differing += [wrong] if wrong else []
    return {
        "run": str(run_dir),
        "name": run.manifest["name"],
        "stride": stride,
        "snapshots": len(snapshots),
        "differing": len(differing),
        "first": differing[0] if differing else None,
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Check and print; see the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m experiments.correctness.map_check", description="map and ledger")
    parser.add_argument("folders", nargs="+", type=Path, help="runs, or folders of runs")
    args = parser.parse_args(argv)
    try:
        runs = sorted({path.parent for folder in args.folders for path in folder.rglob(MANIFEST_FILE)})
        if not runs:
            raise ConfigError(f"no run in {', '.join(map(str, args.folders))}: no {MANIFEST_FILE}")
        found = []
        for run_dir in runs:
            found.append(check_run(run_dir))
            print(json.dumps(found[-1]), flush=True)
    except (KvarenaError, ReportError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    differing = sum(run["differing"] for run in found)
    exact = sum(run["stride"] == 1 for run in found)
    total = {"runs": len(found), "exact": exact, "snapshots": sum(run["snapshots"] for run in found)}
    print(json.dumps(total | {"differing": differing}))
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())
