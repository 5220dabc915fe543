"""Greedy dual, size, frequency (Cherkasova, 1998): the value of a block is uses x cost over its bytes, and ages."""

from __future__ import annotations

from typing import Any

from kvarena.allocators.eviction.cost import CostPolicy
from kvarena.allocators.eviction_order import Entry
from kvarena.allocators.ghosts import Ghosts
from kvarena.engine.request import Request


class GdsfPolicy(CostPolicy):
    """As `cost`, times how often the block was used; the counts of evicted blocks are kept for a while.

    Args:
        options: see CostPolicy.
    """

    recalls = True

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._ghosts = Ghosts(self.max_ghosts)

    def inserted(self, entry: Entry, req: Request) -> None:
        super().inserted(entry, req)
        entry.uses = 1 + self._ghosts.recall(entry.digest)

    def hit(self, entry: Entry, req: Request) -> None:
        super().hit(entry, req)
        entry.uses += 1

    def price(self, entry: Entry) -> float:
        return entry.last + entry.uses * self.cost(entry)

    def evicted(self, entry: Entry) -> None:
        super().evicted(entry)
        self._ghosts.remember(entry.digest, entry.uses)

    @property
    def num_remembered(self) -> int:
        return len(self._ghosts)

    @property
    def num_bytes(self) -> int:
        return self._ghosts.num_bytes
