"""Block tables by row, for a host array and for the device's, each of which is sent what has changed.

    read from the allocator  row 0 | 7 8 9 |        row 1 | 3 |
                                  |                                          changed since then
        host array   [rows, columns that grow]       take(rows)  <---------  row 0 from column 2
        device       [rows, width]                   take_changes()  <-----  row 0 from column 1, row 1 from 0

A table is compared with what was read last time (most are unchanged, and comparing lists of the same ints is much
cheaper than converting them), so an allocator may change any entry at any time.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


class BlockTables:
    """Block tables of requests; who has which row is the caller's to know. Free of torch.

    Args:
        num_rows: rows to begin with.
        width: columns of the device's tables, of which longer tables are cut; 0: the device has none.

    Attributes:
        read: each row's table as the allocator last gave it.
    """

    def __init__(self, num_rows: int, width: int = 0) -> None:
        self._width = width
        self._host = np.zeros((num_rows, 16), dtype=np.int32)
        self.read: list[Sequence[int]] = [()] * num_rows
        # Of each row that changed, the first column that the host array and the device do not have.
        self._host_changes: dict[int, int] = {}
        self._device_changes: dict[int, int] = {}
        self._changes = [self._host_changes, self._device_changes] if width else [self._host_changes]

    def add_rows(self, count: int) -> None:
        """Make room for more rows."""
        self._host = np.pad(self._host, ((0, count), (0, 0)))
        self.read += [()] * count

    def update(self, row: int, table: Sequence[int]) -> None:
        """Note how the allocator's table is now; it may have changed in any way."""
        read = self.read[row]
        if read == table:
            return
        # The common change is a block more.
        kept = len(read)
        if kept and isinstance(table, list) and isinstance(read, list) and table[:kept] == read:
            read += table[kept:]
        else:
            kept = 0
            self.read[row] = list(table) if isinstance(table, list) else table
        for changes in self._changes:
            if not kept or row not in changes:
                changes[row] = kept

    def forget(self, row: int) -> None:
        """The row's request is gone."""
        self.read[row] = ()
        for changes in self._changes:
            changes.pop(row, None)

    def note_changes(self) -> dict[int, int]:
        """A record of each row that changes from now on, with the first column that did; the caller clears it."""
        self._changes.append({})
        return self._changes[-1]

    def take(self, rows: np.ndarray, width: int) -> np.ndarray:
        """Block tables int32 [len(rows), width] as a new array; entries beyond a table's end are undefined."""
        longest = max([width, *(len(self.read[row]) for row in self._host_changes)])
        if longest > self._host.shape[1]:
            self._host = np.pad(self._host, ((0, 0), (0, max(longest, 2 * self._host.shape[1]) - self._host.shape[1])))
        for row, first in self._host_changes.items():
            part = self.read[row][first:]
            self._host[row, first : first + len(part)] = part
        self._host_changes.clear()
        return self._host[rows, :width]

    def take_changes(self) -> tuple[list[int], list[int]]:
        """Flat indices into the device's tables and the values to write there, each index once; forgets them."""
        indices: list[int] = []
        values: list[int] = []
        for row, first in self._device_changes.items():
            part = self.read[row][first : self._width]
            start = row * self._width + first
            indices.extend(range(start, start + len(part)))
            values.extend(part)
        self._device_changes.clear()
        return indices, values
