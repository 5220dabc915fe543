"""Prefix caching in a radix tree: SGLang's RadixAttention (Zheng et al., 2024), over blocks."""

from __future__ import annotations

from kvarena.allocators.prefix import PrefixCachingAllocator
from kvarena.allocators.radix_tree import RadixTree


class RadixAllocator(PrefixCachingAllocator):
    """Paged allocation with a radix tree of all full blocks as prefix cache.

    Against `PrefixCachingAllocator`: duplicates are merged at commit (the table's entry is replaced, and the block of
    its own freed), a chain can only be evicted from its end, and recency belongs to whole edges. Options: see
    PagedAllocator.
    """

    make_index = RadixTree
