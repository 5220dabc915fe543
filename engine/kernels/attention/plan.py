"""How a step's attention is cut into work items: planned on the host, once per step, for all layers.

    buffer (int32)   | decode: row | begin | end | chunk | chunks of the row | starts | prefill: its fields |
                       each as long as the capacity says

`starts` is there for programs that stay (`stream_decode.py`): the first item of each, and the end of the last one's.
The prefill items are those of `prefill_plan.py`.
The capacities fix the grids, so a plan of fixed capacity can be captured in a CUDA graph and refilled before each
replay; items beyond the step's own have row -1.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from kvarena.engine.errors import EngineError
from kvarena.engine.kernels.attention.config import DecodeConfig
from kvarena.engine.kernels.attention.prefill_plan import PREFILL_FIELDS, Programs, prefill_items, running

DECODE_FIELDS = 5


class Capacity(NamedTuple):
    """Room for decode and prefill items, and for the starts of programs that stay (0: none do)."""

    decode: int
    prefill: int
    starts: int = 0

    @property
    def num_words(self) -> int:
        """Length of the buffer."""
        return DECODE_FIELDS * self.decode + self.starts + PREFILL_FIELDS * self.prefill


class Shape(NamedTuple):
    """What the cutting depends on, beside the batch.

    Attributes:
        decode: the decode kernel's configuration.
        queries: queries per prefill item.
        slots_per_head: programs that the device should get per KV head; contexts are split until it does.
        stays: these programs stay and do equal shares of the tiles, see `even_items`.
        prefill: programs that share the prefill items; None: each has its own.
    """

    decode: DecodeConfig
    queries: int
    slots_per_head: int
    stays: bool = False
    prefill: Programs | None = None

    def decode_capacity(self, num_rows: int) -> int:
        """Enough decode items for any `num_rows` rows of any length."""
        return num_rows + self.slots_per_head if num_rows else 0

    def prefill_capacity(self, num_rows: int, num_tokens: int) -> int:
        """Enough prefill items for any `num_tokens` new tokens of `num_rows` rows."""
        items = num_tokens // self.queries + num_rows
        return items if self.prefill is None else items + self.prefill.most_parts


def chunk_tokens(seq_lens: np.ndarray, shape: Shape) -> int:
    """Most context tokens of a decode item: few enough to fill the device, and no fewer.

    Whole tiles, at least `min_chunk`. With total tokens N and S slots a chunk is at least N / S, so that n rows make
    at most n + S items. Rows that fill three quarters of the slots or more are cut only beyond 2 N / S: to cut all of
    them in two gives the device no shorter time than whole rows do, and twice the items to start and to merge.
    """
    tile, slots = shape.decode.tile, shape.slots_per_head
    share = -(-int(seq_lens.sum()) // slots)
    if shape.decode.programs_per_sm > 1 and _almost_fill(len(seq_lens), slots):
        share *= 2
    return -(-max(share, shape.decode.min_chunk) // tile) * tile


def _almost_fill(num_rows: int, slots: int) -> bool:
    """Whether whole rows leave at most a quarter of the programs without work."""
    return 3 * slots <= 4 * num_rows <= 4 * slots


def decode_items(rows: np.ndarray, seq_lens: np.ndarray, shape: Shape) -> np.ndarray:
    """Columns of the decode items, int64 [DECODE_FIELDS, items]: a row's items are consecutive, long rows come first.

    A row's chunks are equal, up to whole tiles: the largest one decides when the row is done.
    """
    tile, most = shape.decode.tile, chunk_tokens(seq_lens, shape)
    num_chunks = np.maximum(-(-seq_lens // most), 1)
    length = -(-seq_lens // (num_chunks * tile)) * tile
    num_chunks = -(-seq_lens // length)
    order = np.argsort(-seq_lens, kind="stable")
    index, chunk = _expand(np.arange(len(rows)), num_chunks, order)
    begin = chunk * length[index]
    end = np.minimum(begin + length[index], seq_lens[index])
    return np.stack([rows[index], begin, end, chunk, num_chunks[index]])


def even_items(seq_lens: np.ndarray, shape: Shape) -> tuple[np.ndarray, np.ndarray]:
    """Items of programs that stay: each gets the same number of tiles, one after the other through all rows.

    Rows that fill three quarters of the programs or more, and none of which is a third above its share, stay whole: a
    row in two parts takes two starts and a merge.

    Args:
        seq_lens: int [n], at least one.
        shape: how to cut.

    Returns:
        Columns of the items as in `decode_items`, with indices into `seq_lens` as rows; and int64
        [slots_per_head + 1], the first item of each program, and the end of the last one's.
    """
    tile, slots = shape.decode.tile, shape.slots_per_head
    tiles = -(-seq_lens // tile)
    ends = np.cumsum(tiles)
    firsts, total = ends - tiles, int(ends[-1])
    bounds = np.arange(slots + 1) * total // slots
    num_rows = len(seq_lens)
    if _almost_fill(num_rows, slots) and 3 * slots * int(tiles.max()) <= 4 * total:
        bounds = np.append(firsts, np.full(slots + 1 - num_rows, total))
    cuts = np.union1d(firsts, bounds[:-1][bounds[:-1] < total])
    index = np.searchsorted(ends, cuts, side="right")
    num_chunks = np.bincount(index, minlength=num_rows)
    chunk = np.arange(len(cuts)) - (np.cumsum(num_chunks) - num_chunks)[index]
    begin = (cuts - firsts[index]) * tile
    end = np.minimum((np.append(cuts[1:], total) - firsts[index]) * tile, seq_lens[index])
    return np.stack([index, begin, end, chunk, num_chunks[index]]), np.searchsorted(cuts, bounds)


def _expand(rows: np.ndarray, counts: np.ndarray, order: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each row, in `order`, as often as its count says; and the running number within the row."""
    return np.repeat(rows[order], counts[order]), running(counts[order])


def plan_step(
    query_start_loc: np.ndarray,
    seq_lens: np.ndarray,
    shape: Shape,
    capacity: Capacity | None = None,
    *,
    decodes: bool = True,
) -> tuple[np.ndarray, Capacity]:
    """Fill a plan's buffer.

    Args:
        query_start_loc: int [B + 1].
        seq_lens: int [B]; rows without new tokens are left out.
        shape: how to cut.
        capacity: of the buffer; None makes it just large enough.
        decodes: whether rows with one new token get items here.

    Returns:
        The buffer, int32, and its capacity.

    Raises:
        EngineError: the capacity does not hold the step.
    """
    query_lens = np.diff(query_start_loc).astype(np.int64)
    lens = seq_lens.astype(np.int64)
    decode_rows, prefill_rows = np.flatnonzero(query_lens == 1), np.flatnonzero(query_lens > 1)
    if not decodes:
        decode_rows = decode_rows[:0]
    starts = np.zeros(0, dtype=np.int64)
    if shape.stays and len(decode_rows):
        decode, starts = even_items(lens[decode_rows], shape)
        decode[0] = decode_rows[decode[0]]
    else:
        decode = decode_items(decode_rows, lens[decode_rows], shape)
    prefill = prefill_items(prefill_rows, query_lens[prefill_rows], lens[prefill_rows], shape.queries, shape.prefill)
    needed = Capacity(decode.shape[1], prefill.shape[1], len(starts))
    capacity = capacity or needed
    if needed.starts not in (0, capacity.starts):
        raise EngineError(
            f"a plan with {needed.starts} starts does not fit into buffers with room for {capacity.starts}"
        )
    if needed.decode > capacity.decode or needed.prefill > capacity.prefill:
        raise EngineError(
            f"attention needs {needed.decode} decode and {needed.prefill} prefill items, and this step's buffers hold "
            f"{capacity.decode} and {capacity.prefill}; it has more rows or tokens than were reserved"
        )
    buffer = np.full(capacity.num_words, -1, dtype=np.int32)
    at = 0
    parts = ((capacity.decode, decode), (capacity.starts, (starts,)), (capacity.prefill, prefill))
    for size, part in parts:
        for column in part:
            buffer[at : at + len(column)] = column
            at += size
    return buffer, capacity
