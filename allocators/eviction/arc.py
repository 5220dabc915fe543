"""Adaptive replacement (Megiddo and Modha, FAST'03): how much room blocks used once get is learnt from the ghosts."""

from __future__ import annotations

from typing import Any

from kvarena.allocators.eviction_order import Entry, EvictionPolicy
from kvarena.allocators.ghosts import Ghosts
from kvarena.engine.request import Request

ONCE, OFTEN = 0, 1


class ArcPolicy(EvictionPolicy):
    """Two queues by last use: blocks used once and blocks used again, with a target for the length of the first.

    A miss on a block that the first queue has lost raises the target, one that the second has lost lowers it. Each
    queue remembers half of the ghosts, at most as many as the pool has blocks (the paper's size).
    """

    recalls = True
    num_lanes = 2

    def __init__(self, **sizes: Any) -> None:
        super().__init__(**sizes)
        size = min(self.max_ghosts // 2, self.num_blocks)
        self._lost = (Ghosts(size), Ghosts(size))
        self._counts = [0, 0]
        self._target = 0.0

    def inserted(self, entry: Entry, req: Request) -> None:  # noqa: ARG002
        once, often = self._lost
        if once.recall(entry.digest):
            entry.lane = OFTEN
            self._target = min(self.num_blocks, self._target + max(1.0, len(often) / (len(once) + 1)))
        elif often.recall(entry.digest):
            entry.lane = OFTEN
            self._target = max(0.0, self._target - max(1.0, len(once) / (len(often) + 1)))
        self._counts[entry.lane] += 1

    def hit(self, entry: Entry, req: Request) -> None:  # noqa: ARG002
        self._counts[entry.lane] -= 1
        entry.lane = OFTEN
        self._counts[OFTEN] += 1

    def price(self, entry: Entry) -> float:
        return entry.released_at

    def next_lane(self) -> int:
        return ONCE if self._counts[ONCE] > self._target else OFTEN

    def evicted(self, entry: Entry) -> None:
        self._counts[entry.lane] -= 1
        self._lost[entry.lane].remember(entry.digest, 1)

    @property
    def num_remembered(self) -> int:
        return sum(map(len, self._lost))

    @property
    def num_bytes(self) -> int:
        return sum(ghosts.num_bytes for ghosts in self._lost)
