"""Least frequently used, with the counts of evicted blocks kept for a while."""

from __future__ import annotations

from typing import Any

from kvarena.allocators.eviction_order import Entry, EvictionPolicy
from kvarena.allocators.ghosts import Ghosts
from kvarena.engine.request import Request

_TURN = 2.0**-40  # the latest use decides between equal counts, for 10^12 of them


class LfuPolicy(EvictionPolicy):
    """The block that was used least goes first, of equals the one whose last use is longest ago. Counts never age."""

    recalls = True

    def __init__(self, **sizes: Any) -> None:
        super().__init__(**sizes)
        self._ghosts = Ghosts(self.max_ghosts)

    def inserted(self, entry: Entry, req: Request) -> None:  # noqa: ARG002
        entry.uses = 1 + self._ghosts.recall(entry.digest)

    def hit(self, entry: Entry, req: Request) -> None:  # noqa: ARG002
        entry.uses += 1

    def price(self, entry: Entry) -> float:
        return entry.uses + entry.released_at * _TURN

    def evicted(self, entry: Entry) -> None:
        self._ghosts.remember(entry.digest, entry.uses)

    @property
    def num_remembered(self) -> int:
        return len(self._ghosts)

    @property
    def num_bytes(self) -> int:
        return self._ghosts.num_bytes
