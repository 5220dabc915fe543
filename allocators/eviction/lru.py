"""Least recently used: what vLLM and SGLang do by default."""

from __future__ import annotations

from kvarena.allocators.eviction_order import Entry, EvictionPolicy


class LruPolicy(EvictionPolicy):
    """The block that was given back first goes first, and of one request the tail before the head."""

    def price(self, entry: Entry) -> float:
        return entry.released_at
