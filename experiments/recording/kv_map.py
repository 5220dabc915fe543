"""Records who owns each block over time, for the report's KV map (kv_map.parquet; schema: docs/files.md).

How long a run lasts is not known before: every k-th step is kept, and when there are too many snapshots every second
one is dropped and k doubled. So memory is bounded, and the snapshots are even over the steps.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from engine.core import StepOutput
from engine.plan import KVAllocator
from engine.request import Request

MAX_SNAPSHOTS = 400
MAX_CELLS = 4096
SHARED, CACHED, FREE = -3, -2, -1  # owners that are no request


class _Snapshot(NamedTuple):
    """One step's map; see docs/files.md."""

    step: int
    time: float
    owner: np.ndarray
    filled: np.ndarray


class KVMapRecorder:
    """Looks at the allocator in some steps; changes nothing.

    Args:
        allocator: whose blocks.
        row_of: a live request's row in requests.parquet.
        max_snapshots: more are never kept.
        max_cells: of a snapshot; in larger pools every few blocks one is looked at.
    """

    def __init__(
        self,
        allocator: KVAllocator,
        row_of: Callable[[Request], int],
        max_snapshots: int = MAX_SNAPSHOTS,
        max_cells: int = MAX_CELLS,
    ) -> None:
        self._allocator = allocator
        self._row_of = row_of
        self._max_snapshots = max_snapshots
        self._stride = -(-allocator.num_virtual_blocks // max_cells)
        self._every = 1
        self._snapshots: list[_Snapshot] = []
        self._live: dict[Request, int] = {}  # requests that may own blocks, and their rows

    def on_launch(self, step: StepOutput) -> None:
        """Take a step in, while its slots are allocated."""
        # Who decodes has been seen before.
        for req, _, _ in step.plan.scheduled[step.plan.num_decodes :]:
            if req not in self._live:
                self._live[req] = self._row_of(req)
        if step.index % self._every:
            return
        if len(self._snapshots) == self._max_snapshots:
            self._snapshots = self._snapshots[::2]
            self._every *= 2
            if step.index % self._every:
                return
        self._snapshots.append(self._look(step))

    def _look(self, step: StepOutput) -> _Snapshot:
        block_size = self._allocator.block_size
        # A pool may have more blocks than memory has room for: only those that are looked at have a cell.
        num_cells = -(-self._allocator.num_virtual_blocks // self._stride)
        owner = np.full(num_cells, FREE, dtype=np.int32)
        filled = np.zeros(num_cells, dtype=np.int16)
        cached, _ = self._cells(np.fromiter(self._allocator.cached_blocks(), dtype=np.int64))
        owner[cached] = CACHED
        filled[cached] = block_size
        # A static batch holds the blocks of requests that have ended.
        for req in [req for req in self._live if req.is_finished and not req.num_slots]:
            del self._live[req]
        for req, row in self._live.items():
            if not req.num_slots:  # preempted
                continue
            blocks = np.asarray(self._allocator.block_table(req), dtype=np.int64)
            cells, seen = self._cells(blocks)
            tokens = np.clip(req.num_computed_tokens - block_size * np.arange(len(blocks)), 0, block_size)[seen]
            is_owned = (owner[cells] != FREE) & (owner[cells] != CACHED)
            owner[cells] = np.where(is_owned, SHARED, row)
            filled[cells] = np.maximum(filled[cells], tokens)
        return _Snapshot(step.index, step.start_time, owner, filled)

    def _cells(self, blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The cells of those blocks that are looked at, and which of the blocks these are; block 0 is nobody's."""
        seen = (blocks > 0) & ((blocks - 1) % self._stride == 0)
        return (blocks[seen] - 1) // self._stride, seen

    def write(self, path: Path) -> None:
        """Write kv_map.parquet."""
        # Imported late: a machine that only measures need not have pyarrow.
        import pyarrow as pa
        import pyarrow.parquet as pq

        schema = pa.schema(
            [
                ("step", pa.int32()),
                ("time", pa.float64()),
                ("owner", pa.list_(pa.int32())),
                ("filled", pa.list_(pa.int16())),
                ("stride", pa.int64()),
            ]
        )
        columns: dict[str, list] = {name: [] for name in schema.names}
        for snapshot in self._snapshots:
            for name, value in zip(schema.names, (*snapshot, self._stride), strict=True):
                columns[name].append(value)
        pq.write_table(pa.table(columns, schema=schema), path, compression="zstd")
