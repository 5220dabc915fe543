"""How a step's attention is cut into work items: planned on the host, once per step, for all layers.

    buffer (int32)   | decode: row | begin | end | chunk | chunks of the row | prefill: row | block |
                       each as long as the capacity says

The capacities fix the grids, so a plan of fixed capacity can be captured in a CUDA graph and refilled before each
replay; items beyond the step's own have row -1.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from engine.errors import EngineError
from engine.kernels.config import DecodeConfig

DECODE_FIELDS, PREFILL_FIELDS = 5, 2


class Capacity(NamedTuple):
    """Room for decode and prefill items."""

    decode: int
    prefill: int

    @property
    def num_words(self) -> int:
        """Length of the buffer."""
        return DECODE_FIELDS * self.decode + PREFILL_FIELDS * self.prefill


class Shape(NamedTuple):
    """What the cutting depends on, beside the batch.

    Attributes:
        decode: the decode kernel's configuration.
        queries: queries per prefill item.
        slots_per_head: programs that the device should get per KV head; contexts are split until it does.
    """

    decode: DecodeConfig
    queries: int
    slots_per_head: int

    def decode_capacity(self, num_rows: int) -> int:
        """Enough decode items for any `num_rows` rows of any length."""
        return num_rows + self.slots_per_head if num_rows else 0

    def prefill_capacity(self, num_rows: int, num_tokens: int) -> int:
        """Enough prefill items for any `num_tokens` new tokens of `num_rows` rows."""
        return num_tokens // self.queries + num_rows


def chunk_tokens(seq_lens: np.ndarray, shape: Shape) -> int:
    """Most context tokens of a decode item: few enough to fill the device, and no fewer.

    Whole tiles, at least `min_chunk`. With total tokens N and S slots a chunk is at least N / S, so that n rows make
    at most n + S items. Rows that fill three quarters of the slots or more are cut only beyond 2 N / S: to cut all of
    them in two gives the device no shorter time than whole rows do, and twice the items to start and to merge.
    """
    tile, slots = shape.decode.tile, shape.slots_per_head
    share = -(-int(seq_lens.sum()) // slots)
    if shape.decode.programs_per_sm > 1 and 3 * slots <= 4 * len(seq_lens) <= 4 * slots:
        share *= 2
    return -(-max(share, shape.decode.min_chunk) // tile) * tile


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


def prefill_items(
    rows: np.ndarray, query_lens: np.ndarray, seq_lens: np.ndarray, queries: int
) -> tuple[np.ndarray, np.ndarray]:
    """Rows and query blocks of the prefill items: the longest row first, and of a row the block that reads the most.

    Blocks that run at the same time then read the same keys, from the L2 cache, and the last to start are short.
    """
    order = np.argsort(-seq_lens, kind="stable")
    item_rows, blocks = _expand(np.arange(len(rows)), -(-query_lens // queries), order)
    last = -(-query_lens // queries) - 1
    return rows[item_rows], last[item_rows] - blocks


def _expand(rows: np.ndarray, counts: np.ndarray, order: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each row, in `order`, as often as its count says; and the running number within the row."""
    counts = counts[order]
    starts = np.cumsum(counts) - counts
    numbers = np.arange(int(counts.sum())) - np.repeat(starts, counts)
    return np.repeat(rows[order], counts), numbers


def plan_step(
    query_start_loc: np.ndarray, seq_lens: np.ndarray, shape: Shape, capacity: Capacity | None = None
) -> tuple[np.ndarray, Capacity]:
    """Fill a plan's buffer.

    Args:
        query_start_loc: int [B + 1].
        seq_lens: int [B]; rows without new tokens are left out.
        shape: how to cut.
        capacity: of the buffer; None makes it just large enough.

    Returns:
        The buffer, int32, and its capacity.

    Raises:
        EngineError: the capacity does not hold the step.
    """
    query_lens = np.diff(query_start_loc).astype(np.int64)
    lens = seq_lens.astype(np.int64)
    decode_rows, prefill_rows = np.flatnonzero(query_lens == 1), np.flatnonzero(query_lens > 1)
    decode = decode_items(decode_rows, lens[decode_rows], shape)
    prefill = prefill_items(prefill_rows, query_lens[prefill_rows], lens[prefill_rows], shape.queries)
    needed = Capacity(decode.shape[1], len(prefill[0]))
    capacity = capacity or needed
    if needed.decode > capacity.decode or needed.prefill > capacity.prefill:
        raise EngineError(
            f"attention needs {needed.decode} decode and {needed.prefill} prefill items, and this step's buffers hold "
            f"{capacity.decode} and {capacity.prefill}; it has more rows or tokens than were reserved"
        )
    buffer = np.full(capacity.num_words, -1, dtype=np.int32)
    at = 0
    for size, part in ((capacity.decode, decode), (capacity.prefill, prefill)):
        for column in part:
            buffer[at : at + len(column)] = column
            at += size
    return buffer, capacity
