"""Where a contiguous region goes: first fit, best fit, or a buddy system.

A placement manages blocks 1..num_blocks. `take(n)` answers the first block of a region of `n`, or None; `give` takes
that region back. Nothing here costs more in a larger pool: what counts is the number of holes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_left


class Placement(ABC):
    """Base of the placements.

    Args:
        num_blocks: blocks of the pool; ids are 1..num_blocks.

    Attributes:
        num_free: blocks in no region.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.num_free = num_blocks

    @property
    def largest(self) -> int:
        """Blocks of the largest region in an empty pool."""
        return self.num_blocks

    def extent(self, num_blocks: int) -> int:
        """Blocks that a region of `num_blocks` takes from the pool: more where sizes are rounded up."""
        return num_blocks

    @abstractmethod
    def take(self, num_blocks: int) -> int | None:
        """First block of a new region of `num_blocks`; None when no hole is large enough."""

    @abstractmethod
    def give(self, start: int, num_blocks: int) -> None:
        """Take back the region of `num_blocks` at `start`."""

    @abstractmethod
    def fits(self, num_blocks: int) -> bool:
        """Whether a hole is large enough for a region of `num_blocks`. Changes nothing."""


class Holes(Placement):
    """Exact regions between holes. A region that comes back merges with the holes on both sides.

        | region | hole | region | region | hole ........ |
                 ^start

    Subclasses decide which hole is cut.
    """

    def __init__(self, num_blocks: int) -> None:
        super().__init__(num_blocks)
        self._starts = [1]  # of the holes, sorted
        self._size_at = {1: num_blocks}  # start of a hole -> its blocks

    @abstractmethod
    def _find(self, num_blocks: int) -> int | None:
        """Start of the hole to cut a region of `num_blocks` from; None: no hole is large enough."""

    def take(self, num_blocks: int) -> int | None:
        """Cut the region from the front of the chosen hole."""
        start = self._find(num_blocks)
        if start is None:
            return None
        i = bisect_left(self._starts, start)
        size = self._size_at.pop(start)
        if size > num_blocks:
            self._starts[i] = start + num_blocks
            self._size_at[start + num_blocks] = size - num_blocks
        else:
            del self._starts[i]
        self.num_free -= num_blocks
        return start

    def give(self, start: int, num_blocks: int) -> None:
        """Turn the region into a hole, one with its neighbours."""
        self.num_free += num_blocks
        i, end = bisect_left(self._starts, start), start + num_blocks
        if end in self._size_at:
            num_blocks += self._size_at.pop(end)
            del self._starts[i]
        left = self._starts[i - 1] if i else None
        if left is not None and left + self._size_at[left] == start:
            self._size_at[left] += num_blocks
        else:
            self._starts.insert(i, start)
            self._size_at[start] = num_blocks

    def fits(self, num_blocks: int) -> bool:
        """Whether `take` would find a hole."""
        return self._find(num_blocks) is not None


class FirstFit(Holes):
    """The lowest hole that is large enough: the holes from below, one after the other."""

    def _find(self, num_blocks: int) -> int | None:
        size_at = self._size_at
        for start in self._starts:
            if size_at[start] >= num_blocks:
                return start
        return None


class BestFit(Holes):
    """The smallest hole that is large enough; the lowest of several."""

    def _find(self, num_blocks: int) -> int | None:
        fitting = [(size, start) for start, size in self._size_at.items() if size >= num_blocks]
        return min(fitting)[1] if fitting else None


class Buddy(Placement):
    """Knuth's buddy system, as PagedAttention's Orca baselines use it (Kwon et al., SOSP'23, section 6.1).

    Regions are powers of two, aligned to their size (in offsets from block 1). A region that comes back merges with
    its buddy, `offset ^ size`, for as long as that is free. A pool that is no power of two starts as the aligned
    powers of two of its binary digits: 13 blocks are 8 + 4 + 1.

        |               8               |       4       | 1 |
        |       4       |   2   | 1 | 1 |       4       | 1 |     after take(1)
    """

    def __init__(self, num_blocks: int) -> None:
        super().__init__(num_blocks)
        # Free offsets by size. A dict is a set with O(1) removal and a last item.
        self._free: dict[int, dict[int, None]] = {1 << bit: {} for bit in range(num_blocks.bit_length())}
        offset = 0
        for bit in reversed(range(num_blocks.bit_length())):
            if num_blocks >> bit & 1:
                self._free[1 << bit][offset] = None
                offset += 1 << bit

    @property
    def largest(self) -> int:
        """The largest power of two in the pool."""
        return 1 << (self.num_blocks.bit_length() - 1)

    def extent(self, num_blocks: int) -> int:
        """The next power of two."""
        return 1 << (num_blocks - 1).bit_length()

    def take(self, num_blocks: int) -> int | None:
        """Halve the smallest free region that is large enough until it fits."""
        extent = self.extent(num_blocks)
        size = extent
        while not self._free.get(size):
            if size > self.num_blocks:
                return None
            size *= 2
        offset, _ = self._free[size].popitem()
        while size > extent:
            size //= 2
            self._free[size][offset + size] = None
        self.num_free -= extent
        return 1 + offset

    def give(self, start: int, num_blocks: int) -> None:
        """Merge upwards while the buddy is free."""
        offset, size = start - 1, self.extent(num_blocks)
        self.num_free += size
        while (buddy := offset ^ size) in self._free.get(size, ()):
            del self._free[size][buddy]
            offset, size = min(offset, buddy), size * 2
        self._free[size][offset] = None

    def fits(self, num_blocks: int) -> bool:
        """Whether a free region has at least the rounded-up size."""
        extent = self.extent(num_blocks)
        return any(offsets for size, offsets in self._free.items() if size >= extent)


PLACEMENTS: dict[str, type[Placement]] = {"first_fit": FirstFit, "best_fit": BestFit, "buddy": Buddy}
