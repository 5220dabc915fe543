"""Greedy dual (Young, 1994): a block is worth what it takes to compute it again, and ages by what was evicted."""

from __future__ import annotations

from typing import Any

from kvarena.allocators.eviction_order import Entry, EvictionPolicy
from kvarena.engine.contract import check_number
from kvarena.engine.request import Request

# Of a token behind 32,768 others about as much goes into attention as into products, at the shape of Llama-3.1-8B:
# 4 x 32 layers x 4,096 operations a pair against 2 x 8e9 a token.
PAIR_COST = 4 * 32 * 4096 / 16e9


class CostPolicy(EvictionPolicy):
    """The value of a block: what computing it costs, over its bytes, above the value of the last one that went.

    All blocks have as many bytes, so these only scale. The cost of a block is that of its tokens, and of the pairs of
    these with all tokens before them: attention is quadratic, so the end of a long prompt is dearer than its head.

    Args:
        pair_cost: of a pair of query and key, over what a token costs beside.
        sizes: see EvictionPolicy.
    """

    def __init__(self, *, pair_cost: float = PAIR_COST, **sizes: Any) -> None:
        super().__init__(**sizes)
        self._pair_cost = check_number("allocator.eviction_options.pair_cost", pair_cost)
        self._age = 0.0

    def cost(self, entry: Entry) -> float:
        """Of computing the block again, in units of a token at the head of a prompt a token."""
        return 1.0 + self._pair_cost * (entry.depth + 0.5) * self.block_size

    def inserted(self, entry: Entry, req: Request) -> None:  # noqa: ARG002
        entry.last = self._age

    def hit(self, entry: Entry, req: Request) -> None:  # noqa: ARG002
        entry.last = self._age

    def price(self, entry: Entry) -> float:
        return entry.last + self.cost(entry)

    def evicted(self, entry: Entry) -> None:
        # A parent may be cheaper than the child that went before it.
        self._age = max(self._age, self.price(entry))
