"""Paged allocation with a prefix cache: full blocks are found again by their tokens, in an index.

    table   [ 5  9  2 | 7  4 ]
              ^^^^^^^^   ^^^^
              published  own: not full, or not committed yet
                       ^ where the request stands in the index

    block:   free --allocate--> owned --commit--> owned, published --free--> cached --evict--> free
                                                        ^---- match + allocate ----'

Who refers to a block is counted here, as in every paged allocator. An index knows which tokens a block holds:
`hash_index` (vLLM) and `radix_tree` (SGLang). A policy says which of the cached blocks goes first
(`eviction_order.py`): either index has any of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from kvarena.allocators.blocks import BlockPool
from kvarena.allocators.eviction_order import EvictionOrder, block_digest, salt_digest
from kvarena.allocators.eviction_policies import make_policy
from kvarena.allocators.hash_index import HashIndex
from kvarena.allocators.paged import PagedAllocator
from kvarena.allocators.prefix_index import PrefixIndex
from kvarena.engine.contract import CacheObserver, cdiv, check_number
from kvarena.engine.errors import EngineError
from kvarena.engine.request import Request


class _Stand:
    """Where a live request stands: the first `num_blocks` of its blocks are in the index, the last at `node`."""

    __slots__ = ("due", "node", "num_blocks")

    def __init__(self, node: Any, num_blocks: int, block_size: int) -> None:
        self.move(node, num_blocks, block_size)

    def move(self, node: Any, num_blocks: int, block_size: int) -> None:
        """It stands there now."""
        self.node = node
        self.num_blocks = num_blocks
        self.due = (num_blocks + 1) * block_size  # computed tokens at which the next block is full


class CachingPool(BlockPool):
    """Blocks that come back free, or stay in the index until their room is needed."""

    __slots__ = ("_index", "observer")

    def __init__(self, num_blocks: int, index: PrefixIndex) -> None:
        super().__init__(1, num_blocks)
        self._index = index
        self.observer: CacheObserver | None = None

    def take(self, num_blocks: int) -> list[int]:
        """Take free blocks, and evict what is missing."""
        if num_blocks > self.num_free:
            self.evict(num_blocks - self.num_free)
        return super().take(num_blocks)

    def evict(self, num_blocks: int) -> None:
        """Free so many blocks of the index."""
        blocks = self._index.evict(num_blocks)
        super().give(blocks)
        if self.observer is not None:
            self.observer.removed(blocks)

    def give(self, blocks: Iterable[int]) -> None:
        """Keep published blocks in the cache; free the others."""
        super().give(self._index.keep(blocks))


class PrefixCachingAllocator(PagedAllocator):
    """Paged allocation that finds the KV of equal prefixes again, block by block, in the manner of vLLM.

    A request shares published blocks with whoever has the same tokens and the same `cache_salt`. A hit never covers
    the last token, because its logits must be computed.

    Args:
        eviction: the policy by which cached blocks go; see `eviction_policies.py`. Without one as before there were
            any, so that what was recorded then is replayed with the same decisions; the config names another.
        ghosts: blocks that are not cached and that the policy may remember, per block of the pool.
        eviction_options: of the policy.
        options: see PagedAllocator.

    Attributes:
        make_index: makes the index, given the slots of a block and the order of eviction.
        policy: the policy.

    Raises:
        ConfigError: no such policy, or an option that it does not have.
    """

    make_index: type[PrefixIndex] = HashIndex
    reads_tokens = True
    no_window = "a cached prefix must hold all of its tokens, and a window drops the first ones"

    def __init__(
        self,
        *,
        eviction: str = "lru",
        ghosts: float = 8,
        eviction_options: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.policy = make_policy(
            eviction, num_blocks=self.num_blocks, block_size=self.block_size,
            ghosts=check_number("allocator.ghosts", ghosts), options=eviction_options or {},
        )  # fmt: skip
        self._index = self.make_index(self.block_size, EvictionOrder(self.policy))
        self._pool: CachingPool = CachingPool(self.num_blocks, self._index)
        self._stands: dict[Request, _Stand] = {}

    @property
    def num_free_blocks(self) -> int:
        """Free blocks and evictable ones."""
        return self._pool.num_free + self._index.num_evictable

    def foresee(self, requests: Iterable[Request]) -> None:
        """Tell a policy that `needs_future` which requests will come, in their order of arrival.

        Further samples of a prompt share their parent's blocks, and ask for none.
        """
        self.policy.foresee([(req.request_id, self._digests(req)) for req in requests if req.parent is None])

    def _digests(self, req: Request) -> list[int]:
        """Of the blocks that can be hits."""
        digest, size, found = salt_digest(req.cache_salt), self.block_size, []
        for start in range(0, (req.num_prompt_tokens - 1) // size * size, size):
            digest = block_digest(digest, req.prompt_identities[start : start + size])
            found.append(digest)
        return found

    @property
    def num_cached_blocks(self) -> int:
        """Blocks of the cache that no request owns."""
        return self._index.num_evictable

    @property
    def num_shared_entries(self) -> int:
        """Entries of block tables beyond the first of each block."""
        return self._num_extra_refs

    def match_prefix(self, req: Request) -> int:
        return self._index.match(req, (req.num_tokens - 1) // self.block_size) * self.block_size

    def cached_blocks(self) -> Iterable[int]:
        return self._index.evictable_blocks()

    def clear_cache(self) -> None:
        self._pool.evict(self._index.num_evictable)

    @property
    def observer(self) -> CacheObserver | None:
        return self._pool.observer

    @observer.setter
    def observer(self, observer: CacheObserver | None) -> None:
        self._pool.observer = observer

    def commit(self, req: Request) -> None:
        """Publish the blocks that became full."""
        stand = self._stands[req]
        if req.num_computed_tokens >= stand.due:
            self._publish(req, stand, min(req.num_computed_tokens, req.num_tokens) // self.block_size)

    def _publish(self, req: Request, stand: _Stand, num_blocks: int) -> None:
        """Put blocks up to `num_blocks` into the index; it may put equal blocks of its own in their place."""
        if num_blocks > stand.num_blocks:
            table, start = self._tables[req], stand.num_blocks
            node, replaced, shared = self._index.publish(stand.node, req, table, start, num_blocks)
            stand.move(node, num_blocks, self.block_size)
            if shared:
                self._share(shared)
            if replaced:
                self._pool.give(self._release(replaced))
            if self.observer is not None:
                self.observer.stored(req, table, start, [block in self._index for block in table[start:num_blocks]])

    # ------------------------------------------------------------ blocks in and out

    def allocate(self, req: Request, num_tokens: int, num_cached: int = 0) -> bool:
        """Begin with the blocks that `match_prefix` found, and add the missing ones."""
        if req in self._tables:
            return super().allocate(req, num_tokens)
        num_hits = num_cached // self.block_size
        hit = self._index.find(req, num_hits)
        if len(hit.blocks) < num_hits:
            raise EngineError(
                f"request {req.request_id!r} was admitted with {num_cached} cached tokens, but the prefix cache holds "
                f"{len(hit.blocks) * self.block_size}; pass what match_prefix just answered"
            )
        num_evictable = num_hits - len(hit.in_use)  # free until now
        if cdiv(num_tokens, self.block_size) - num_hits > self.num_free_blocks - num_evictable:
            return False
        self._share(hit.in_use)
        if self.observer is not None:
            self.observer.found(req, hit.blocks)
        self._stand(req, hit.node, num_hits, found=True)
        self._tables[req] = hit.blocks
        req.num_computed_tokens = num_cached
        return super().allocate(req, num_tokens)

    def _stand(self, req: Request, node: Any, num_blocks: int, *, found: bool) -> None:
        self._index.enter(node, req, found=found)
        self._stands[req] = _Stand(node, num_blocks, self.block_size)

    def free(self, req: Request) -> None:
        super().free(req)
        self._index.forget(req)
        stand = self._stands.pop(req, None)
        if stand is not None:
            self._index.leave(stand.node)
        if self.observer is not None:
            self.observer.left(req)

    def swap_in(self, req: Request) -> bool:
        """Bring the KV back into blocks of its own; `commit` publishes them like new ones."""
        if not super().swap_in(req):
            return False
        self._stand(req, self._index.root, 0, found=False)
        return True

    # ------------------------------------------------------------ sharing

    def fork(self, req: Request, child: Request, num_tokens: int | None = None) -> bool:
        """The child goes on where `req` stands."""
        if not super().fork(req, child, num_tokens):
            return False
        stand = self._stands[req]
        num_blocks = min(stand.num_blocks, child.num_computed_tokens // self.block_size)
        self._stand(child, self._index.above(stand.node, stand.num_blocks, num_blocks), num_blocks, found=False)
        if self.observer is not None:
            self.observer.found(child, self._tables[child][:num_blocks])
        return True

    def _sealed(self, req: Request, num_blocks: int) -> list[int]:
        """Published blocks alone are shared: an index evicts by what stands on its paths."""
        self._publish(req, self._stands[req], num_blocks)
        return super()._sealed(req, num_blocks)

    # ------------------------------------------------------------ ledger

    def _num_shared_hits(self, req: Request) -> int:
        return self._index.num_in_use(req, (req.num_tokens - 1) // self.block_size)
