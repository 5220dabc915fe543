"""Records who owns each block over time, for the report's KV map (kv_map.parquet; schema: docs/files.md).

A run must not be slower for its picture. A snapshot keeps three numbers for each running request; of its block table
only what is new since the last snapshot is copied, and nothing at all where slots, copies and commits say that nothing
is new. Which block is whose is worked out from that after the run.

    request A   blocks  3 7 4 9 2 ...      one list, which grows       snapshot 1: its first 3, snapshot 2: its first 5

Snapshots are even over the run's time, whose end is not known before: they are taken as often as their cost allows,
and when there are too many of them, those too near to the one before are dropped.
"""

from __future__ import annotations

import math
import time
from array import array
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from kvarena.engine.contract import KVAllocator
from kvarena.engine.core import StepOutput
from kvarena.engine.request import Request
from kvarena.reports.reading.columns import names_of, schema_of
from kvarena.reports.reading.names import KV_MAP_FILE

MAX_SNAPSHOTS = 400
MAX_CELLS = 4096
MEASURED_SHARE = 0.003  # of a measured run's time that snapshots may take
EXTERNAL, SHARED, CACHED, FREE = -4, -3, -2, -1  # owners that are no request


class _Residency:
    """A request's stay in the pool: its row, and its slots and blocks as last seen. A list of blocks only grows."""

    __slots__ = ("blocks", "num_slots", "row")

    def __init__(self, row: int) -> None:
        self.row = row
        self.num_slots = 0
        self.blocks: list[int] = []

    def see(self, num_slots: int, table: Sequence[int]) -> None:
        """Take the present table in."""
        self.num_slots = num_slots
        known = self.blocks
        if table == known:
            return
        blocks = list(table)
        if blocks[: len(known)] == known:
            known += blocks[len(known) :]
        else:  # copied, merged or slid out: earlier snapshots keep the old list
            self.blocks = blocks


class _Snapshot(NamedTuple):
    """One step, as noted while it ran.

    Attributes:
        step, time: its number, its start.
        rows: of the requests that own slots.
        tables: their blocks, of which each one's first `lengths` count.
        lengths: blocks of their tables.
        computed: their computed tokens.
        cached: cells of cached blocks.
        num_cached: cached blocks, with a cell or without.
    """

    step: int
    time: float
    rows: list[int]
    tables: list[list[int]]
    lengths: array[int]
    computed: array[int]
    cached: np.ndarray
    num_cached: int


class _Drawing(NamedTuple):
    """A snapshot's columns in the file: two per cell, and three over all blocks of the pool."""

    owner: np.ndarray
    filled: np.ndarray
    owned_blocks: int
    filled_slots: int
    cached_blocks: int


class KVMapRecorder:
    """Looks at the allocator in some steps; changes nothing.

    Args:
        allocator: whose blocks. A running request's table changes only with its `num_slots`, with `plan.copies`, or
            in `commit`.
        row_of: a live request's row in requests.parquet.
        max_snapshots: more are never kept.
        max_cells: of a snapshot; in larger pools every few blocks one is looked at.
        max_share: share of the time since the first step that snapshots may take, or None for as many as fit.
        interval: least seconds between snapshots on the engine's clock, before there are too many.
    """

    def __init__(
        self,
        allocator: KVAllocator,
        row_of: Callable[[Request], int],
        max_snapshots: int = MAX_SNAPSHOTS,
        max_cells: int = MAX_CELLS,
        max_share: float | None = None,
        interval: float = 0.0,
    ) -> None:
        self._allocator = allocator
        self._row_of = row_of
        self._max_snapshots = max_snapshots
        self._max_share = max_share
        self._stride = -(-allocator.num_virtual_blocks // max_cells)
        # A pool may have more blocks than memory has room for: only those that are looked at have a cell.
        self._num_cells = -(-allocator.num_virtual_blocks // self._stride)
        self._snapshots: list[_Snapshot] = []
        self._last_taken = -math.inf  # time of the last snapshot that `take` handed out
        self._interval = interval
        self._begin: float | None = None
        self._spent = 0.0
        self._live: dict[Request, _Residency] = {}
        self._has_moved = False  # tables may have changed without a change of slots

    def on_launch(self, step: StepOutput) -> None:
        """Take a step in, while its slots are allocated."""
        plan, live = step.plan, self._live
        for req in plan.preempted:
            live.pop(req, None)
        for req in plan.admitted:
            live.pop(req, None)  # an earlier stay that nobody told of
            live[req] = _Residency(self._row_of(req))
        self._has_moved = self._has_moved or bool(plan.copies)
        last = self._snapshots[-1].time if self._snapshots else self._last_taken
        if step.start_time < last + self._interval:
            return
        now = time.perf_counter()
        if self._begin is None:
            self._begin = now
        if self._max_share is not None and self._spent > self._max_share * (now - self._begin):
            return
        if len(self._snapshots) == self._max_snapshots:
            self._thin(step.start_time)
            if step.start_time < self._snapshots[-1].time + self._interval:
                return
        self._snapshots.append(self._look(step))
        self._spent += time.perf_counter() - now

    def _thin(self, now: float) -> None:
        """Keep half of the snapshots at most, even over the time until `now`."""
        kept = self._snapshots[:1]
        if now <= kept[0].time:  # a clock that stands still
            self._snapshots = self._snapshots[::2]
            return
        # A little less than two steps of equal length, or rounding would keep every third of them.
        self._interval = 0.99 * (now - kept[0].time) * 2 / self._max_snapshots
        for snapshot in self._snapshots[1:]:
            if snapshot.time >= kept[-1].time + self._interval:
                kept.append(snapshot)
        self._snapshots = kept

    def _look(self, step: StepOutput) -> _Snapshot:
        allocator, live = self._allocator, self._live
        slots = [req.num_slots for req in live]
        if 0 in slots:  # ended; a static batch holds the blocks of requests that have ended
            for req in [req for req, count in zip(live, slots, strict=True) if not count]:
                del live[req]
            slots = [count for count in slots if count]
        look_at_all = self._has_moved or allocator.commits
        if look_at_all or slots != [residency.num_slots for residency in live.values()]:
            for (req, residency), count in zip(live.items(), slots, strict=True):
                if look_at_all or count != residency.num_slots:
                    residency.see(count, allocator.block_table(req))
        self._has_moved = False
        tables = [residency.blocks for residency in live.values()]
        cached = np.fromiter(allocator.cached_blocks(), dtype=np.int64)
        return _Snapshot(
            step.index,
            step.start_time,
            [residency.row for residency in live.values()],
            tables,
            array("q", list(map(len, tables))),
            array("q", [req.num_computed_tokens for req in live]),
            self._cells(cached)[0],
            len(cached),
        )

    def _cells(self, blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The cells of those blocks that are looked at, and which of the blocks these are; block 0 is nobody's."""
        seen = (blocks > 0) & ((blocks - 1) % self._stride == 0)
        return (blocks[seen] - 1) // self._stride, seen

    def _draw(self, snapshot: _Snapshot) -> _Drawing:
        """Owner and filled slots of every cell, and how much of the pool is owned, filled and cached."""
        block_size = self._allocator.block_size
        owner = np.full(self._num_cells, FREE, dtype=np.int32)
        filled = np.zeros(self._num_cells, dtype=np.int16)
        owner[self._cells(self._rounded_up(snapshot))[0]] = EXTERNAL
        owner[snapshot.cached] = CACHED
        filled[snapshot.cached] = block_size
        lengths = np.asarray(snapshot.lengths)
        tables = (table[:length] for table, length in zip(snapshot.tables, snapshot.lengths, strict=True))
        blocks = np.fromiter(chain.from_iterable(tables), dtype=np.int64, count=int(lengths.sum()))
        index = np.arange(len(blocks)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        computed = np.repeat(np.asarray(snapshot.computed), lengths)
        slots = np.clip(computed - block_size * index, 0, block_size).astype(np.int16)
        cells, seen = self._cells(blocks)
        owner[cells] = np.repeat(np.array(snapshot.rows, dtype=np.int32), lengths)[seen]
        owner[np.bincount(cells, minlength=self._num_cells) > 1] = SHARED
        np.maximum.at(filled, cells, slots[seen])
        # A block of several tables counts once; block 0 is nobody's.
        blocks, position = np.unique(blocks, return_inverse=True)
        fullest = np.zeros(len(blocks), dtype=np.int64)
        np.maximum.at(fullest, position, slots)
        own = blocks > 0
        return _Drawing(owner, filled, int(own.sum()), int(fullest[own].sum()), snapshot.num_cached)

    def _rounded_up(self, snapshot: _Snapshot) -> np.ndarray:
        """Blocks behind the requests' own that their regions take beside them."""
        extent = self._allocator.region_extent
        behind = (
            range(table[0] + length, table[0] + extent(length))
            for table, length in zip(snapshot.tables, snapshot.lengths, strict=True)
            if length and extent(length) > length
        )
        return np.fromiter(chain.from_iterable(behind), dtype=np.int64)

    def residents(self) -> list[int]:
        """Rows of the requests that own slots now; a static batch holds those of requests that have ended."""
        return [residency.row for req, residency in self._live.items() if req.num_slots]

    def take(self) -> list[dict[str, Any]]:
        """The snapshots since the last call, as rows of kv_map.parquet. What drawing them takes counts as theirs."""
        start = time.perf_counter()
        names = names_of(KV_MAP_FILE)
        rows = []
        for taken in self._snapshots:
            owner, filled, *counts = self._draw(taken)
            rows.append(dict(zip(names, (taken.step, taken.time, owner, filled, self._stride, *counts), strict=True)))
            self._last_taken = taken.time
        self._snapshots = []
        self._spent += time.perf_counter() - start
        return rows

    def write(self, path: Path, num_steps: int | None = None) -> None:
        """Write kv_map.parquet; of an interrupted run the snapshots of the first `num_steps` steps, which ended."""
        # Imported late: a machine that only measures need not have pyarrow.
        import pyarrow as pa
        import pyarrow.parquet as pq

        schema = schema_of(KV_MAP_FILE)
        columns: dict[str, list[Any]] = {name: [] for name in schema.names}
        for snapshot in (taken for taken in self._snapshots if num_steps is None or taken.step < num_steps):
            owner, filled, *counts = self._draw(snapshot)
            values = (snapshot.step, snapshot.time, owner, filled, self._stride, *counts)
            for name, value in zip(schema.names, values, strict=True):
                columns[name].append(value)
        pq.write_table(pa.table(columns, schema=schema), path, compression="zstd")
