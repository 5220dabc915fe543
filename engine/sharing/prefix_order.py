r"""Block tables in an order in which those that begin alike are neighbours: the tree of their common prefixes.

    row 4 | 1 2 3 7    |
          |            | common: 3 blocks       1 2 - 3 - 7           equal ids are equal KV, so the tree of common
    row 0 | 1 2 3 8 9  |                          \     \ 8 9         beginnings says what several requests read
          |            | common: 2                 6
    row 2 | 1 2 6      |
          |            | common: 0
    row 1 | 5          |                        5

Sorted tables and what each has in common with the one before say the same as the tree: two rows have in common the
least of what lies between them. A table mostly grows by a block of its own, which moves nothing: then a change is one
comparison of two numbers. Free of torch.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from kvarena.engine.contract import NULL_BLOCK

IntArray = NDArray[np.int64]


class CommonPrefixes(NamedTuple):
    """Some requests, n of them, in the order of their block tables.

    Attributes:
        order: int64 [n], their places in the step.
        common: int64 [n - 1], leading blocks that each has in common with the next.
    """

    order: IntArray
    common: IntArray


def num_common(a: Sequence[int], b: Sequence[int]) -> int:
    """Leading entries that are equal; none where these are the null block, whose KV is nobody's."""
    most = min(len(a), len(b))
    if not most or a[0] != b[0] or a[0] == NULL_BLOCK:
        return 0
    if a[:most] == b[:most]:
        return most
    equal, differ = 1, most
    while differ - equal > 1:
        middle = (equal + differ) // 2
        if a[equal:middle] == b[equal:middle]:
            equal = middle
        else:
            differ = middle
    return equal


class PrefixOrder:
    """Keeps the block tables of requests in order.

    Args:
        tables: by row, as they are now; a table that is no list has blocks of its own alone.
        changes: rows whose table changed since the last look, with the first column that did; emptied here. A row that
            was given up leaves an empty table.
    """

    def __init__(self, tables: Sequence[Sequence[int]], changes: dict[int, int]) -> None:
        self._tables = tables
        self._changes = changes
        self._rows: list[int] = []
        # What each has in common with the row before it; of the first, nothing.
        self._common: list[int] = []
        # The most that a row has in common with any other: behind it its table may grow and stay where it is.
        self._depth: dict[int, int] = {}
        self._shares = False
        self._arrays: tuple[IntArray, IntArray] | None = None
        self._last: tuple[IntArray, CommonPrefixes | None] | None = None

    def of(self, rows: IntArray) -> CommonPrefixes | None:
        """What the tables of `rows`, int64 [n], have in common; None: no two begin with the same block.

        Rows are different but for those without a table, which have nothing in common. The same object as the time
        before where nothing has changed.
        """
        if self._changes:
            self._take_changes()
        if not self._shares:
            return None
        if self._last is None or not np.array_equal(self._last[0], rows):
            self._last = (rows, self._select(rows))
        return self._last[1]

    def _take_changes(self) -> None:
        depth, changes = self._depth, self._changes
        # Of an unknown row any change is one.
        moved = [row for row, first in changes.items() if first <= depth.get(row, first)]
        changes.clear()
        if not moved:
            return
        tables, gone = self._tables, set(moved)
        for row in [row for row in self._rows if row in gone or not tables[row]]:
            self._remove(row)
        for row in moved:
            if isinstance(tables[row], list) and tables[row]:
                self._insert(row)
        self._shares = any(self._common)
        self._arrays = self._last = None

    def _insert(self, row: int) -> None:
        tables, rows, common = self._tables, self._rows, self._common
        table = tables[row]
        # All that are here are lists of integers.
        at = bisect_left(rows, list(table), key=cast(Callable[[int], list[int]], tables.__getitem__))
        rows.insert(at, row)
        common.insert(at, num_common(tables[rows[at - 1]], table) if at else 0)
        if at + 1 < len(rows):
            common[at + 1] = num_common(table, tables[rows[at + 1]])
        self._note_depth(at - 1, at + 2)

    def _remove(self, row: int) -> None:
        at, common = self._rows.index(row), self._common
        before = common.pop(at)
        del self._rows[at], self._depth[row]
        if at < len(common):
            common[at] = min(before, common[at])
        self._note_depth(at - 1, at + 1)

    def _note_depth(self, begin: int, end: int) -> None:
        rows, common = self._rows, self._common
        for at in range(max(begin, 0), min(end, len(rows))):
            self._depth[rows[at]] = max(common[at], common[at + 1] if at + 1 < len(rows) else 0)

    def _select(self, rows: IntArray) -> CommonPrefixes | None:
        if self._arrays is None:
            self._arrays = np.array(self._rows, dtype=np.int64), np.array(self._common, dtype=np.int64)
        known, common = self._arrays
        place = np.full(len(self._tables), -1, dtype=np.int64)
        place[rows] = np.arange(len(rows))
        at = place[known]
        kept = np.flatnonzero(at >= 0)
        if len(kept) < 2:
            return None
        between = np.minimum.reduceat(common[: kept[-1] + 1], kept[:-1] + 1)
        if not between.any():
            return None
        order = at[kept]
        if len(kept) < len(rows):
            others = np.ones(len(rows), dtype=np.bool_)
            others[order] = False
            order = np.append(order, np.flatnonzero(others))
            between = np.append(between, np.zeros(len(rows) - len(kept), dtype=np.int64))
        return CommonPrefixes(order, between)
