"""Where a contiguous region goes: first fit, best fit, or a buddy system.

A placement manages blocks 1..num_blocks. `take(n)` answers the first block of a region of `n`, or None; `give` takes
that region back. Nothing here costs more in a larger pool: what counts is the number of holes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_left, insort


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
                 ^start ^end

    Subclasses decide which hole is cut; they see every hole come (`_insert`) and go (`_remove`).
    """

    def __init__(self, num_blocks: int) -> None:
        super().__init__(num_blocks)
        self._size_at: dict[int, int] = {}  # start of a hole -> its blocks
        self._start_by_end: dict[int, int] = {}  # block after a hole -> start of the hole
        self._open(1, num_blocks)

    def take(self, num_blocks: int) -> int | None:
        """Cut the region from the front of the chosen hole."""
        start = self._find(num_blocks)
        if start is None:
            return None
        size = self._close(start)
        if size > num_blocks:
            self._open(start + num_blocks, size - num_blocks)
        self.num_free -= num_blocks
        return start

    def give(self, start: int, num_blocks: int) -> None:
        """Turn the region into a hole, one with its neighbours."""
        self.num_free += num_blocks
        size = num_blocks
        if start + num_blocks in self._size_at:
            size += self._close(start + num_blocks)
        left = self._start_by_end.get(start)
        if left is not None:
            size += self._close(left)
            start = left
        self._open(start, size)

    def fits(self, num_blocks: int) -> bool:
        """Whether `take` would find a hole."""
        return self._find(num_blocks) is not None

    def _open(self, start: int, size: int) -> None:
        self._size_at[start] = size
        self._start_by_end[start + size] = start
        self._insert(start, size)

    def _close(self, start: int) -> int:
        size = self._size_at.pop(start)
        del self._start_by_end[start + size]
        self._remove(start, size)
        return size

    @abstractmethod
    def _find(self, num_blocks: int) -> int | None:
        """Start of the hole to cut a region of `num_blocks` from; None: no hole is large enough."""

    @abstractmethod
    def _insert(self, start: int, size: int) -> None:
        """A hole came."""

    @abstractmethod
    def _remove(self, start: int, size: int) -> None:
        """A hole went."""


class FirstFit(Holes):
    """The lowest hole that is large enough: the holes from below, one after the other."""

    def __init__(self, num_blocks: int) -> None:
        self._starts: list[int] = []  # sorted
        super().__init__(num_blocks)

    def _find(self, num_blocks: int) -> int | None:
        size_at = self._size_at
        for start in self._starts:
            if size_at[start] >= num_blocks:
                return start
        return None

    def _insert(self, start: int, size: int) -> None:  # noqa: ARG002
        insort(self._starts, start)

    def _remove(self, start: int, size: int) -> None:  # noqa: ARG002
        del self._starts[bisect_left(self._starts, start)]


class BestFit(Holes):
    """The smallest hole that is large enough; the lowest of several."""

    def __init__(self, num_blocks: int) -> None:
        self._by_size: list[tuple[int, int]] = []  # (size, start), sorted
        super().__init__(num_blocks)

    def _find(self, num_blocks: int) -> int | None:
        i = bisect_left(self._by_size, (num_blocks, 0))
        return self._by_size[i][1] if i < len(self._by_size) else None

    def _insert(self, start: int, size: int) -> None:
        insort(self._by_size, (size, start))

    def _remove(self, start: int, size: int) -> None:
        del self._by_size[bisect_left(self._by_size, (size, start))]


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
        while (buddy := self._buddy(offset, size)) in self._free.get(size, ()):
            del self._free[size][buddy]
            offset, size = min(offset, buddy), size * 2
        self._free[size][offset] = None

    def fits(self, num_blocks: int) -> bool:
        """Whether a free region has at least the rounded-up size."""
        extent = self.extent(num_blocks)
        return any(offsets for size, offsets in self._free.items() if size >= extent)

    @staticmethod
    def _buddy(offset: int, size: int) -> int:
        return offset ^ size


PLACEMENTS: dict[str, type[Placement]] = {"first_fit": FirstFit, "best_fit": BestFit, "buddy": Buddy}
