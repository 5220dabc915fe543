"""Segmented LRU (Karedla, Love and Wherry, 1994): a block must be used twice to be protected."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

from kvarena.allocators.eviction_order import Entry, EvictionPolicy
from kvarena.engine.errors import ConfigError
from kvarena.engine.request import Request

PROBATION, PROTECTED = 0, 1


class SlruPolicy(EvictionPolicy):
    """Blocks used once go first, least recently used first; blocks used again are protected, up to a share of the pool.

    Args:
        protected: that share; the least recently used block beyond it is on probation again.
        sizes: see EvictionPolicy.
    """

    num_lanes = 2

    def __init__(self, *, protected: float = 0.8, **sizes: Any) -> None:
        super().__init__(**sizes)
        if not 0 < protected < 1:
            raise ConfigError(f"allocator.eviction_options.protected={protected} must be a share between 0 and 1")
        self._most = max(1, int(protected * self.num_blocks))
        self._protected: OrderedDict[Entry, None] = OrderedDict()  # least recently used first

    def hit(self, entry: Entry, req: Request) -> None:  # noqa: ARG002
        entry.lane = PROTECTED
        self._protected.pop(entry, None)
        self._protected[entry] = None
        if len(self._protected) > self._most:
            demoted, _ = self._protected.popitem(last=False)
            demoted.lane = PROBATION
            self.move(demoted)

    def released(self, entry: Entry) -> None:
        if entry.lane == PROTECTED:
            self._protected.move_to_end(entry)

    def price(self, entry: Entry) -> float:
        return entry.released_at

    def evicted(self, entry: Entry) -> None:
        self._protected.pop(entry, None)
