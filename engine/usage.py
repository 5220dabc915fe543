"""What a pool, the levels below it and a prefix cache say of themselves. Free of torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from kvarena.engine.request import Request


class KVUsage(NamedTuple):
    """The ledger's raw counts, in slots. `owned + external + shortage + cached + free == total`.

    What nobody owns is of one class per step, by the head of the queue: `shortage` if it needs more than all free and
    cached slots together, `external` if they would do and no hole is large enough, `free` otherwise and with no head.

    Attributes:
        total: slots of the pool, the null block left out.
        computed: slots that hold KV of computed tokens, each once however many requests share it.
        owned: slots that requests own, `computed` among them.
        external: free and enough in all for the head of the queue, but in no hole that is large enough; and what no
            request can ever own: buddy remainders, memory beyond the last page.
        shortage: free, but the head of the queue needs more than all free and cached slots together.
        cached: slots of prefix-cache blocks that no request uses: evictable.
        free: the rest.
        shared_saved: slots that sharing saved (the sum over requests of their slots, less `owned`).
    """

    total: int
    computed: int
    owned: int
    external: int = 0
    shortage: int = 0
    cached: int = 0
    free: int = 0
    shared_saved: int = 0


class LevelUsage(NamedTuple):
    """The books of a level below the pool, in its blocks: all but `total` add up to `total`.

    Attributes:
        total: blocks of the level.
        cached: blocks of a prefix cache that nobody reads; they can go.
        swapped: blocks of preempted requests; they stay.
        arriving: blocks on their way down.
        leaving: cached blocks that are read on their way up.
        free: the rest.
    """

    total: int
    cached: int
    swapped: int
    arriving: int
    leaving: int
    free: int


LEVEL_CLASSES = LevelUsage._fields[1:]


class CacheObserver(Protocol):
    """Told what a prefix cache holds, in the order in which that changes. It changes nothing."""

    def found(self, req: Request, blocks: Sequence[int]) -> None:
        """`req` was admitted with these cached blocks as its first ones, or shares them with its parent."""
        ...

    def stored(self, req: Request, table: Sequence[int], start: int, cached: Sequence[bool]) -> None:
        """Blocks [start, start + len(cached)) of `req`'s table are full; `cached` tells which of them the cache holds.

        Those that it does not are copies of its own that nobody finds. Some that it does may have been told before.
        """
        ...

    def removed(self, blocks: Sequence[int]) -> None:
        """The cache holds these blocks no more."""
        ...

    def left(self, req: Request) -> None:
        """`req` owns nothing any more. May come twice."""
        ...

    def lowered(self, blocks: Sequence[int], places: Sequence[int]) -> None:
        """These blocks, of which `removed` will tell next, go down: the level below has them at `places`."""
        ...

    def forgotten(self, places: Sequence[int]) -> None:
        """The level below holds nothing any more at these of its places."""
        ...
