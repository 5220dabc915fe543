"""Prefix caching in a radix tree: SGLang's RadixAttention (Zheng et al., 2024), over blocks.

    table   [ 5  9  2 | 7  4 ]
              ^^^^^^^^   ^^^^
              in the tree, path locked (shared)    its own, not full or not published yet
                        ^ where the request stands

`commit` moves full blocks into the tree. Where the tree holds an equal block by then (another request computed the
same tokens at the same time), the table's entry is replaced by it and the duplicate is freed: every published block
of a live request lies on its locked path.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from allocators.paged import PagedAllocator
from allocators.radix_tree import RadixNode, RadixTree
from engine.errors import EngineError
from engine.plan import CopyKind, KVUsage, cdiv
from engine.request import Request


class _Stand:
    """Where a live request stands: `num_blocks` of its blocks are in the tree, the last at the end of `node`."""

    __slots__ = ("due", "node", "num_blocks")

    def __init__(self, node: RadixNode, num_blocks: int, block_size: int) -> None:
        self.move(node, num_blocks, block_size)

    def move(self, node: RadixNode, num_blocks: int, block_size: int) -> None:
        self.node = node
        self.num_blocks = num_blocks
        self.due = (num_blocks + 1) * block_size  # computed tokens at which the next block is full


class RadixAllocator(PagedAllocator):
    """Paged allocation with a radix tree of all full blocks as prefix cache.

    Against `PrefixCachingAllocator`: duplicates are merged at commit, a chain can only be evicted from its end, and
    recency belongs to whole edges.

    Args:
        options: see PagedAllocator.
    """

    reads_tokens = True
    no_window = "a cached prefix must hold all of its tokens, and a window drops the first ones"

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._tree = RadixTree(self.block_size)
        self._stands: dict[Request, _Stand] = {}
        self._hits: dict[Request, int] = {}  # hits whose tokens `num_computed_tokens` does not count yet

    @property
    def num_free_blocks(self) -> int:
        """Free blocks and evictable ones."""
        return self._pool.num_free + self._tree.num_evictable

    def match_prefix(self, req: Request) -> int:
        """Tokens of `req` in the tree."""
        return self._tree.walk(req, (req.num_tokens - 1) // self.block_size)[1] * self.block_size

    def cached_blocks(self) -> Iterable[int]:
        """Blocks of the tree's unlocked nodes."""
        return self._tree.evictable_blocks()

    def clear_cache(self) -> None:
        """Forget every block that no request owns, so that a measured run starts cold."""
        self._pool.give(self._tree.evict(self._tree.num_evictable))

    def commit(self, req: Request) -> None:
        """Move the blocks that became full into the tree."""
        stand = self._stands[req]
        if req.num_computed_tokens >= stand.due:
            self._publish(req, stand, min(req.num_computed_tokens, req.num_tokens) // self.block_size)

    def _publish(self, req: Request, stand: _Stand, num_blocks: int) -> None:
        """Move blocks up to `num_blocks` into the tree; free those that it holds already."""
        if num_blocks > stand.num_blocks:
            node, replaced = self._tree.insert(stand.node, req, self._tables[req], stand.num_blocks, num_blocks)
            stand.move(node, num_blocks, self.block_size)
            self._discard(replaced)

    def _admit(self, req: Request, num_tokens: int, num_cached: int) -> bool:
        num_hits = num_cached // self.block_size
        path, num_found = self._tree.walk(req, num_hits)
        if num_found < num_hits:
            raise EngineError(
                f"request {req.request_id!r} was admitted with {num_cached} cached tokens, but the radix tree holds "
                f"{num_found * self.block_size}; pass what match_prefix just answered"
            )
        node = self._tree.cut(path, num_hits)
        path = self._tree.path_to(node)
        need = cdiv(num_tokens, self.block_size) - num_hits
        if need > self.num_free_blocks - sum(len(node.blocks) for node in path if not node.num_locks):
            return False
        self._stand(req, node, num_hits)
        self._tables[req] = [block for node in path for block in node.blocks] + self._take(need)
        req.num_slots = (num_hits + need) * self.block_size
        if num_hits:
            self._hits[req] = num_cached
        return True

    def _stand(self, req: Request, node: RadixNode, num_blocks: int) -> None:
        self._tree.lock(node)
        self._stands[req] = _Stand(node, num_blocks, self.block_size)

    def _share_table(self, req: Request, child: Request, num_tokens: int) -> bool:
        """Full blocks are shared through the tree; of a block that is half the child's it gets a copy at once.

        (A block has one owner, the tree or a request: what the tree owns, it may evict.)
        """
        table, num_full = self._tables[req], num_tokens // self.block_size
        last = table[num_full : cdiv(num_tokens, self.block_size)]
        if len(last) > self.num_free_blocks:
            return False
        self._publish(req, self._stands[req], num_full)
        own = self._take(len(last))
        self._copies.order(CopyKind.DEVICE, last, own)
        path = self._tree.path_to(self._stands[req].node)
        self._stand(child, self._tree.cut(path, num_full), num_full)
        self._tables[child] = table[:num_full] + own
        return True

    def swap_in(self, req: Request) -> bool:
        """Bring the KV back into blocks of its own; `commit` moves them into the tree like new ones."""
        if not super().swap_in(req):
            return False
        self._stand(req, self._tree.root, 0)
        return True

    def _take(self, num_blocks: int) -> list[int]:
        missing = num_blocks - self._pool.num_free
        if missing > 0:
            self._pool.give(self._tree.evict(missing))
        return self._pool.take(num_blocks)

    def _drop(self, req: Request, table: list[int], cancel_copies: bool) -> None:
        stand = self._stands.pop(req)
        self._hits.pop(req, None)
        super()._drop(req, table[stand.num_blocks :], cancel_copies)
        self._tree.unlock(stand.node)

    def _num_shared_hits(self, req: Request) -> int:
        path, num_left = self._tree.walk(req, (req.num_tokens - 1) // self.block_size)
        num_shared = 0
        for node in path:
            if not node.num_locks:  # nor has anything below it
                break
            num_shared += min(num_left, len(node.blocks))
            num_left -= len(node.blocks)
        return num_shared

    def count(self) -> KVUsage:
        """Raw counts; cached are the blocks of unlocked nodes."""
        return self._count(self._tree.num_evictable, self._tree.num_saved, self._hits)
