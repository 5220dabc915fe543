"""What a policy remembers of blocks that are not cached any more: a number each, of the last so many."""

from __future__ import annotations

from sys import getsizeof

KEY_BYTES = 36  # a digest, which is an integer of 64 bits; the numbers are small ones, which Python shares


class Ghosts:
    """Numbers by digest, of the last `size` / 2 to `size` blocks that went: about 100 bytes an entry, at most 200.

    Two generations: when the younger one is full, the older one is forgotten at once. That takes half the memory of an
    order entry by entry.

    Args:
        size: most entries; 0 remembers nothing.
    """

    __slots__ = ("_most", "_old", "_young")

    def __init__(self, size: int) -> None:
        self._most = size // 2
        self._young: dict[int, int] = {}
        self._old: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self._young) + len(self._old)

    def remember(self, digest: int, number: int) -> None:
        """Keep `number` of a block that went, as the latest."""
        young = self._young
        if len(young) >= self._most:
            if not self._most:
                return
            self._old, self._young = young, {}
            young = self._young
        young[digest] = number

    def recall(self, digest: int) -> int:
        """What was kept of a block that comes again, 0 if nothing; it is no ghost any more."""
        return self._young.pop(digest, 0) or self._old.pop(digest, 0)

    @property
    def num_bytes(self) -> int:
        """Host memory."""
        return getsizeof(self._young) + getsizeof(self._old) + KEY_BYTES * len(self)
