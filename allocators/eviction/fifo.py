"""First in, first out."""

from __future__ import annotations

from kvarena.allocators.eviction_order import Entry, EvictionPolicy
from kvarena.engine.request import Request


class FifoPolicy(EvictionPolicy):
    """The leaf that was computed first goes first, however often it was used since."""

    _clock = 0

    def inserted(self, entry: Entry, req: Request) -> None:  # noqa: ARG002
        self._clock += 1
        entry.last = self._clock

    def price(self, entry: Entry) -> float:
        return entry.last
