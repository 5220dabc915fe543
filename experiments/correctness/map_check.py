"""Do a run's KV map and its memory ledger tell the same story?

    kvarena check map_check RUN_OR_SWEEP_DIR [...]

Every snapshot of kv_map.parquet is compared with the ledger of the same step in steps.parquet, exactly:

    all blocks    owned and cached blocks and filled slots, which the recorder counted in the block tables of the step
    cells         where every block has one (`stride` 1): owned, cached, rounded up and free cells and filled slots

Where only every k-th block has a cell, the cells must not show more than all blocks have. A map that was recorded
before blocks were counted has cells alone. Prints one JSON line per run, with what was compared, and one for all; exit
code 1 when a snapshot differs.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from kvarena.engine.classes import OWNED
from kvarena.engine.errors import ConfigError
from kvarena.experiments.recording.kv_map import CACHED, EXTERNAL, FREE, SHARED
from kvarena.experiments.tools import tool_parser
from kvarena.reports.reading.files import read_run
from kvarena.reports.reading.names import KV_MAP_FILE, MANIFEST_FILE, STEPS_FILE

UNOWNED = ("external", "shortage", "free")
COUNTS = ("owned_blocks", "filled_slots", "cached_blocks")


class Snapshot(NamedTuple):
    """One step's map.

    Attributes:
        step: its number.
        owner: per cell, the owner's row, or EXTERNAL, SHARED, CACHED, FREE.
        filled: per cell, the filled slots of its block.
        counts: over all blocks, by name (`COUNTS`); None in a map of before.
    """

    step: int
    owner: np.ndarray
    filled: np.ndarray
    counts: Mapping[str, int] | None = None

    def cells(self) -> dict[str, int]:
        """The same counts over the cells."""
        owned = (self.owner >= 0) | (self.owner == SHARED)
        values = np.count_nonzero(owned), self.filled[owned].sum(), np.count_nonzero(self.owner == CACHED)
        return dict(zip(COUNTS, map(int, values), strict=True))


def difference(snapshot: Snapshot, ledger: Mapping[str, int], pool: Mapping[str, Any], stride: int = 1) -> str:
    """What a map and the ledger of its step disagree on; empty when they agree.

    Args:
        snapshot: as recorded.
        ledger: the step's classes, in slots.
        pool: of manifest.json. With `pages`, blocks are addresses of virtual regions: those that nobody owns are no
            memory.
        stride: every so many blocks one has a cell.
    """
    cells, counts = snapshot.cells(), snapshot.counts
    wrong = []
    if stride == 1:
        wrong += _unequal("cells", cells, ledger, pool)
        if "pages" not in pool:
            wrong += _unequal_unowned(snapshot, ledger, pool["block_size"])
    if counts is not None:
        wrong += _unequal("blocks", counts, ledger, pool)
    elif stride > 1:
        size = pool["block_size"]
        most = sum(ledger[name] for name in OWNED) // size + cells["owned_blocks"]  # last blocks owned in part
        counts = {
            "owned_blocks": most,
            "filled_slots": ledger["token_states"],
            "cached_blocks": ledger["cached"] // size,
        }
    if counts is not None:
        wrong += [
            f"{name} of cells {cells[name]}, of all {counts[name]}" for name in COUNTS if cells[name] > counts[name]
        ]
    return f"step {snapshot.step}: {'; '.join(wrong)}" if wrong else ""


def _unequal(what: str, counts: Mapping[str, int], ledger: Mapping[str, int], pool: Mapping[str, Any]) -> list[str]:
    """The counts of a map of all blocks against the ledger."""
    size, slots = pool["block_size"], sum(ledger[name] for name in OWNED)
    owned = counts["owned_blocks"] * size
    pairs = {
        "token_states": (counts["filled_slots"], ledger["token_states"]),
        "cached": (counts["cached_blocks"] * size, ledger["cached"]),
        "owned": (owned, slots),
    }
    if not has_whole_blocks(pool) and counts["owned_blocks"] <= slots <= owned:
        del pairs["owned"]
    return [
        f"{name} of {what} {ours}, of the ledger {theirs}" for name, (ours, theirs) in pairs.items() if ours != theirs
    ]


def _unequal_unowned(snapshot: Snapshot, ledger: Mapping[str, int], size: int) -> list[str]:
    """What nobody owns: rounded up regions are external fragmentation, and all free blocks are of one class."""
    lost, free = (int(np.count_nonzero(snapshot.owner == code)) * size for code in (EXTERNAL, FREE))
    classes = {name: ledger[name] for name in UNOWNED}
    if snapshot.counts is None:  # drawn before regions that are rounded up were
        agrees = sum(classes.values()) == lost + free
    else:
        rest = sorted([classes["external"] - lost, classes["shortage"], classes["free"]])
        agrees = rest == [0, 0, free]
    return [] if agrees else [f"cells rounded up {lost} and free {free}, of the ledger {classes}"]


def has_whole_blocks(pool: Mapping[str, Any]) -> bool:
    """Whether a request owns whole blocks: a page of a virtual region may end inside one."""
    pages = pool.get("pages")
    if pages is None:
        return True
    tokens, page_bytes = pages["page_tokens"], pages["page_bytes"]
    whole = page_bytes is None or page_bytes * pages["kv_tensors"] * pool["num_slots"] == tokens * pool["bytes"]
    return whole and tokens % pool["block_size"] == 0


def read_snapshots(path: Path) -> tuple[int, list[Snapshot]]:
    """Stride and snapshots of a kv_map.parquet."""
    table = pq.read_table(path)
    strides = set(table.column("stride").to_pylist())
    if len(strides) > 1:
        raise ConfigError(f"{path}: snapshots of several strides {sorted(strides)}; record the run again")
    columns = [_lists(table.column(name)) for name in ("owner", "filled")]
    has_counts = all(name in table.column_names for name in COUNTS)
    counts = table.select(COUNTS).to_pylist() if has_counts else [None] * len(table)
    rows = zip(table.column("step").to_pylist(), *columns, counts, strict=True)
    return max(strides, default=1), [Snapshot(*row) for row in rows]


def _lists(column: pa.ChunkedArray) -> Iterator[np.ndarray]:
    """The lists of a column, as arrays."""
    for chunk in column.chunks:
        for i in range(len(chunk)):
            yield chunk[i].values.to_numpy()


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
        wrong = difference(snapshot, ledger, pool, stride)
        differing += [wrong] if wrong else []
    compared = ["cells"] if stride == 1 else []
    compared += ["blocks"] if snapshots and snapshots[0].counts is not None else []
    return {
        "run": str(run_dir),
        "name": run.manifest["name"],
        "stride": stride,
        "compared": compared,
        "exact": bool(compared) and has_whole_blocks(pool),
        "snapshots": len(snapshots),
        "differing": len(differing),
        "first": differing[0] if differing else None,
    }


def main(argv: Sequence[str]) -> int:
    """Check and print; see the module's docstring."""
    parser = tool_parser(__name__, __doc__)
    parser.add_argument("folders", nargs="+", type=Path, help="runs, or folders of runs")
    args = parser.parse_args(argv)
    runs = sorted({path.parent for folder in args.folders for path in folder.rglob(MANIFEST_FILE)})
    if not runs:
        raise ConfigError(f"no run in {', '.join(map(str, args.folders))}: no {MANIFEST_FILE}")
    found = []
    for run_dir in runs:
        found.append(check_run(run_dir))
        print(json.dumps(found[-1]), flush=True)
    differing = sum(run["differing"] for run in found)
    exact = sum(run["exact"] for run in found)
    total = {"runs": len(found), "exact": exact, "snapshots": sum(run["snapshots"] for run in found)}
    print(json.dumps(total | {"differing": differing}))
    return 1 if differing else 0
