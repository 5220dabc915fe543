"""How a step's prompts are cut into items, for the kernels of `prefill.py` and `wide_prefill.py`.

    item    a block of one request's queries, for each KV head         int32 columns: row | block | part | parts | cell
    parts   of few items behind long contexts: several programs read one item's context, and the last to end merges
            what the parts have in their cells

Items come longest row first, and of a row the block that reads the most: blocks that run at the same time then read
the same keys, from the L2 cache, and the last to start are short.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

PREFILL_FIELDS = 5
# Tokens of a tile, fewest tiles of a part, and most parts of an item.
_TILE, _LEAST_TILES, _MOST_PARTS = 128, 4, 16
# In tiles: what an item costs beside its own, and what a part does beside that, whose sums are stored and read back.
# Estimates: a tile is 1.9 us at 580 TFLOP/s, the queries' way in and the results' way out 3 us, 64 KiB twice 3 us.
_ITEM_TILES, _PART_TILES = 1.5, 1.5
# More items than so many for each program fill the device by themselves.
_MOST_ROUNDS = 4
CELLS_PER_PROGRAM = 3


class Programs(NamedTuple):
    """Programs that stay and take items as long as there are any.

    Attributes:
        number: how many.
        num_kv_heads: programs that one item is work for.
    """

    number: int
    num_kv_heads: int

    @property
    def most_parts(self) -> int:
        """Of all items of a step that are cut."""
        return CELLS_PER_PROGRAM * self.number // self.num_kv_heads


def prefill_items(
    rows: np.ndarray, query_lens: np.ndarray, seq_lens: np.ndarray, queries: int, programs: Programs | None = None
) -> np.ndarray:
    """Columns of the prefill items, int64 [PREFILL_FIELDS, items].

    Args:
        rows: int [n], rows of the batch with several new tokens.
        query_lens, seq_lens: int64 [n], their new tokens, and their contexts with those.
        queries: of an item.
        programs: what shares the items; None: a program each, and none is cut.
    """
    if not len(rows):  # most steps
        return np.zeros((PREFILL_FIELDS, 0), dtype=np.int64)
    order = np.argsort(-seq_lens, kind="stable")
    counts = -(-query_lens // queries)[order]
    index = np.repeat(order, counts)
    blocks = np.repeat(counts, counts) - 1 - running(counts)
    ends = np.minimum(seq_lens[index] - query_lens[index] + (blocks + 1) * queries, seq_lens[index])
    parts = np.ones(len(index), dtype=np.int64) if programs is None else num_parts(ends, programs)
    at = np.repeat(np.arange(len(index)), parts)
    is_cut = parts[at] > 1
    cells = np.where(is_cut, np.cumsum(is_cut) - 1, 0)
    return np.stack([rows[index][at], blocks[at], running(parts), parts[at], cells])


def num_parts(ends: np.ndarray, programs: Programs) -> np.ndarray:
    """In how many parts the context of each item is read: what is estimated to end first.

    Args:
        ends: int64 [n], tokens that an item reads, the longest first within a row.
        programs: what shares the items.

    Returns:
        int64 [n], at most `programs.most_parts` in those above 1 together.
    """
    tiles, whole = -(-ends // _TILE), np.ones(len(ends), dtype=np.int64)
    most = np.clip(tiles // _LEAST_TILES, 1, _MOST_PARTS)
    if len(ends) * programs.num_kv_heads > _MOST_ROUNDS * programs.number or most.max(initial=1) < 4:
        return whole
    # All of them, those behind the last full round, or as much at a time as is left for each program.
    full = len(ends) * programs.num_kv_heads // programs.number * programs.number // programs.num_kv_heads
    is_rest = np.arange(len(ends)) >= full
    left = np.cumsum(tiles[::-1])[::-1] * programs.num_kv_heads / programs.number
    ways = [whole, -(-tiles // np.maximum(2 * _LEAST_TILES, 1.5 * left)).astype(np.int64)]
    ways += [np.full(len(ends), number) for number in (2, 3, 4, 6, 8, 12, 16)]
    ways += [np.where(is_rest, number, 1) for number in (2, 4, 8, 16) if full]
    ways = [np.minimum(way, most) for way in ways]
    return min(
        (way for way in ways if way[way > 1].sum() <= programs.most_parts),
        key=lambda way: _estimate(tiles, way, programs),
    )


def _estimate(tiles: np.ndarray, parts: np.ndarray, programs: Programs) -> float:
    """When the last program ends, in tiles: each round takes as long as its longest part."""
    lengths = tiles / parts + _ITEM_TILES + np.where(parts > 1, _PART_TILES, 0.0)
    by_program = np.sort(np.repeat(lengths, parts * programs.num_kv_heads))[::-1]
    return float(by_program[:: programs.number].sum())


def running(counts: np.ndarray) -> np.ndarray:
    """0 to count - 1 of each count, one after the other."""
    starts = np.cumsum(counts) - counts
    return np.arange(int(counts.sum())) - np.repeat(starts, counts)
