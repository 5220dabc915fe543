"""The default: uses that age. How slowly, shadow caches find out as the traffic goes.

    value = last use + age x (uses - 1)          time: blocks evicted; age: 0, 1/2, 2 or 8 times the pool

With age 0 that is LRU, and with a long one nearly LFU. None is right everywhere: a block that was used twice is worth
keeping for long where documents come back, and for no time at all where conversations end. So for each age a shadow
cache, which has no blocks, plays what it would have found of every eighth block; the age whose shadow found most of
late is the one that counts. The constants were chosen on first thirds of traces (`experiment=cache_policies`).
"""

from __future__ import annotations

from heapq import heapify, heappop, heappush
from sys import getsizeof
from typing import Any

from kvarena.allocators.eviction_order import Entry, EvictionPolicy
from kvarena.allocators.ghosts import Ghosts
from kvarena.engine.request import Request

AGES = (0.0, 0.5, 2.0, 8.0)  # in pools
SAMPLED = 8  # every so many-th block is played in the shadows
LARGEST_SHADOW = 4096  # blocks; a larger pool is sampled more thinly
MEMORY = 16  # after so many pools of played blocks a hit counts half
_DEEPER = 2.0**-24  # of a value, for each block before
MARGIN = 1.02  # so much more must another shadow find
LOOK_EVERY = 8  # played blocks
RECORD_BYTES = 116  # of a shadow's record: a pair of numbers


class _Shadow:
    """What a cache of `size` blocks would hold under one age."""

    __slots__ = ("_age", "_clock", "_held", "_queue", "_size", "hits")

    def __init__(self, size: int, age: float) -> None:
        self._size = size
        self._age = age * size
        self._clock = 0
        self._held: dict[int, tuple[float, int]] = {}  # by digest
        self._queue: list[tuple[float, int]] = []
        self.hits = 0.0

    def __len__(self) -> int:
        return len(self._held)

    def use(self, digest: int, depth: int, uses: int, weight: float) -> None:
        held = self._held
        if digest in held:
            self.hits += weight
        # Of equal values the deepest goes first.
        record = held[digest] = (self._clock + self._age * (uses - 1) - depth * _DEEPER, digest)
        heappush(self._queue, record)
        while len(held) > self._size:
            record = heappop(self._queue)
            if held.get(record[1]) is record:
                del held[record[1]]
                self._clock += 1
        if len(self._queue) > 64 + self._size * 9 // 8:
            self._queue = list(held.values())
            heapify(self._queue)

    @property
    def num_bytes(self) -> int:
        return getsizeof(self._held) + getsizeof(self._queue) + RECORD_BYTES * len(self._queue)


class AgeingPolicy(EvictionPolicy):
    """The block of least value goes first: its last use, put off for each use before it.

    Of the ghosts that it may have, the shadows' blocks are a part.
    """

    recalls = True

    def __init__(self, **sizes: Any) -> None:
        super().__init__(**sizes)
        self._thin = max(SAMPLED, -(-self.num_blocks // LARGEST_SHADOW))
        size = max(1, self.num_blocks // self._thin)
        self._shadows = [_Shadow(size, age) for age in AGES] if self.max_ghosts >= len(AGES) * size else []
        self._ghosts = Ghosts(self.max_ghosts - len(self._shadows) * size)
        self._best = 0
        self._age = 0.0
        self._clock = self._num_played = 0
        self._weight, self._growth = 1.0, 0.5 ** (-1 / (MEMORY * size))

    def inserted(self, entry: Entry, req: Request) -> None:  # noqa: ARG002
        if uses := self._ghosts.recall(entry.digest):
            entry.uses += uses
        entry.last = self._clock
        if not entry.digest % self._thin:
            self._play(entry)

    def hit(self, entry: Entry, req: Request) -> None:  # noqa: ARG002
        entry.uses += 1
        entry.last = self._clock
        if not entry.digest % self._thin:
            self._play(entry)

    def price(self, entry: Entry) -> float:
        return entry.last + self._age * (entry.uses - 1)

    def evicted(self, entry: Entry) -> None:
        self._clock += 1
        self._ghosts.remember(entry.digest, entry.uses)

    def _play(self, entry: Entry) -> None:
        """Use a block in the shadows, and now and then see which of them is the best."""
        self._weight *= self._growth
        for shadow in self._shadows:
            shadow.use(entry.digest, entry.depth, entry.uses, self._weight)
        self._num_played += 1
        if self._num_played % LOOK_EVERY == 0:
            self._look()

    def _look(self) -> None:
        if self._weight > 1e100:
            for shadow in self._shadows:
                shadow.hits /= self._weight
            self._weight = 1.0
        best = max(range(len(self._shadows)), key=lambda i: self._shadows[i].hits, default=0)
        if best != self._best and self._shadows[best].hits > MARGIN * self._shadows[self._best].hits:
            self._best, self._age = best, AGES[best] * self.num_blocks
            self.repriced = True

    @property
    def num_remembered(self) -> int:
        return len(self._ghosts) + sum(map(len, self._shadows))

    @property
    def num_bytes(self) -> int:
        return self._ghosts.num_bytes + sum(shadow.num_bytes for shadow in self._shadows)
