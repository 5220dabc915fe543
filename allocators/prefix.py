"""Paged allocation with a prefix cache: full blocks are found again by their tokens, in an index.

    table   [ 5  9  2 | 7  4 ]
              ^^^^^^^^   ^^^^
              published  own: not full, or not committed yet
                       ^ where the request stands in the index

    block:   free --allocate--> owned --commit--> owned, published --free--> cached --evict--> free
                                                        ^---- match + allocate ----'

Who refers to a block is counted here, as in every paged allocator. An index knows which tokens a block holds, and in
which order the cached ones are evicted: `hash_index` (vLLM) and `radix_tree` (SGLang). A third one is a third index.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from kvarena.allocators.hash_index import HashIndex
from kvarena.allocators.paged import PagedAllocator
from kvarena.allocators.prefix_index import PrefixIndex
from kvarena.engine.contract import CopyKind, KVUsage, cdiv
from kvarena.engine.errors import EngineError
from kvarena.engine.request import Request


class _Stand:
    """Where a live request stands: the first `num_blocks` of its blocks are in the index, the last at `node`."""

    __slots__ = ("due", "node", "num_blocks")

    def __init__(self, node: Any, num_blocks: int, block_size: int) -> None:
        self.move(node, num_blocks, block_size)

    def move(self, node: Any, num_blocks: int, block_size: int) -> None:
        self.node = node
        self.num_blocks = num_blocks
        self.due = (num_blocks + 1) * block_size  # computed tokens at which the next block is full


class PrefixCachingAllocator(PagedAllocator):
    """Paged allocation that finds the KV of equal prefixes again, block by block, in the manner of vLLM.

    A request shares published blocks with whoever has the same tokens and the same `cache_salt`. A hit never covers
    the last token, because its logits must be computed.

    Args:
        options: see PagedAllocator.

    Attributes:
        make_index: makes the index, given the slots of a block.
    """

    make_index: type[PrefixIndex] = HashIndex
    reads_tokens = True
    no_window = "a cached prefix must hold all of its tokens, and a window drops the first ones"

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._index = self.make_index(self.block_size)
        self._stands: dict[Request, _Stand] = {}
        self._hits: dict[Request, int] = {}  # hits whose tokens `num_computed_tokens` does not count yet

    @property
    def num_free_blocks(self) -> int:
        """Free blocks and evictable ones."""
        return self._pool.num_free + self._index.num_evictable

    def match_prefix(self, req: Request) -> int:
        return self._index.match(req, (req.num_tokens - 1) // self.block_size) * self.block_size

    def cached_blocks(self) -> Iterable[int]:
        return self._index.evictable_blocks()

    def clear_cache(self) -> None:
        self._pool.give(self._index.evict(self._index.num_evictable))

    def commit(self, req: Request) -> None:
        """Publish the blocks that became full."""
        stand = self._stands[req]
        if req.num_computed_tokens >= stand.due:
            self._publish(req, stand, min(req.num_computed_tokens, req.num_tokens) // self.block_size)

    def _publish(self, req: Request, stand: _Stand, num_blocks: int) -> None:
        """Put blocks up to `num_blocks` into the index; it may put equal blocks of its own in their place."""
        if num_blocks > stand.num_blocks:
            table = self._tables[req]
            node, replaced, shared = self._index.publish(stand.node, req, table, stand.num_blocks, num_blocks)
            stand.move(node, num_blocks, self.block_size)
            self._share(shared)
            self._discard(replaced)

    # ------------------------------------------------------------ blocks in and out

    def _admit(self, req: Request, num_tokens: int, num_cached: int) -> bool:
        num_hits = num_cached // self.block_size
        hit = self._index.find(req, num_hits)
        if len(hit.blocks) < num_hits:
            raise EngineError(
                f"request {req.request_id!r} was admitted with {num_cached} cached tokens, but the prefix cache holds "
                f"{len(hit.blocks) * self.block_size}; pass what match_prefix just answered"
            )
        need = cdiv(num_tokens, self.block_size) - num_hits
        if need > self.num_free_blocks - (num_hits - len(hit.in_use)):
            return False
        self._share(hit.in_use)
        self._stand(req, hit.node, num_hits, hit.blocks)
        self._tables[req] = hit.blocks + self._take(need)
        req.num_slots = (num_hits + need) * self.block_size
        if num_hits:
            self._hits[req] = num_cached
        return True

    def _stand(self, req: Request, node: Any, num_blocks: int, hits: list[int]) -> None:
        self._index.enter(node, hits)
        self._stands[req] = _Stand(node, num_blocks, self.block_size)

    def _take(self, num_blocks: int) -> list[int]:
        missing = num_blocks - self._pool.num_free
        if missing > 0:
            self._pool.give(self._index.evict(missing))
        return self._pool.take(num_blocks)

    def _discard(self, blocks: list[int]) -> None:
        """Keep published blocks in the cache; free the others."""
        self._pool.give(self._index.keep(blocks))

    def _drop(self, req: Request, table: list[int], cancel_copies: bool) -> None:
        super()._drop(req, table, cancel_copies)
        self._hits.pop(req, None)
        self._index.leave(self._stands.pop(req).node)

    def swap_in(self, req: Request) -> bool:
        """Bring the KV back into blocks of its own; `commit` publishes them like new ones."""
        if not super().swap_in(req):
            return False
        self._stand(req, self._index.root, 0, [])
        return True

    # ------------------------------------------------------------ sharing

    def _share_table(self, req: Request, child: Request, num_tokens: int) -> bool:
        """The child goes on where `req` stands.

        An index that evicts by path shares full blocks as published ones, and of the block that is half the child's it
        gets a copy at once: `req` will publish that block, and the path to it is not the child's to lock.
        """
        table, stand, num_full = self._tables[req], self._stands[req], num_tokens // self.block_size
        if not self._index.evicts_by_path:
            super()._share_table(req, child, num_tokens)
        else:
            last = table[num_full : cdiv(num_tokens, self.block_size)]
            if len(last) > self.num_free_blocks:
                return False
            self._publish(req, stand, num_full)
            own = self._take(len(last))
            self._copies.order(CopyKind.DEVICE, last, own)
            self._share(table[:num_full])
            self._tables[child] = table[:num_full] + own
        num_blocks = min(stand.num_blocks, num_full)
        self._stand(child, self._index.above(stand.node, stand.num_blocks, num_blocks), num_blocks, [])
        return True

    def _is_shared(self, block: int) -> bool:
        """A published block is never written: others may find it."""
        return block in self._extra_refs or block in self._index

    # ------------------------------------------------------------ ledger

    def _num_shared_hits(self, req: Request) -> int:
        return self._index.num_in_use(req, (req.num_tokens - 1) // self.block_size)

    def count(self) -> KVUsage:
        """Cached are the published blocks that no request owns."""
        return self._count(self._index.num_evictable, self._hits)
