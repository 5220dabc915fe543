"""Prefix caching in a radix tree: SGLang's RadixAttention (Zheng et al., 2024), over blocks."""

from __future__ import annotations

from kvarena.allocators.prefix import PrefixCachingAllocator
from kvarena.allocators.radix_tree import RadixTree


class RadixAllocator(PrefixCachingAllocator):
    """Paged allocation with a radix tree of all full blocks as prefix cache.

    Under one policy it finds and evicts what `PrefixCachingAllocator` does. Options: see there.
    """

    make_index = RadixTree
