"""Paged allocation with a prefix cache: full blocks are found again by their tokens, in an index.

    table   [ 5  9  2 | 7  4 ]
              ^^^^^^^^   ^^^^
              published  own: not full, or not committed yet
                       ^ where the request stands in the index

    block:   free --allocate--> owned --commit--> owned, published --free--> cached --evict--> free
                                                        ^---- match + allocate ----'

With host memory below the pool (`host_level.py`) evicted blocks go down there, and come up again for a request that has
their tokens (`moves.py`).

Who refers to a block is counted here, as in every paged allocator. An index knows which tokens a block holds:
`hash_index` (vLLM) and `radix_tree` (SGLang). A policy says which of the cached blocks goes first
(`eviction_order.py`): either index has any of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from kvarena.allocators.blocks import BlockPool
from kvarena.allocators.eviction_order import EvictionOrder, block_digest, salt_digest
from kvarena.allocators.eviction_policies import make_policy
from kvarena.allocators.hash_index import HashIndex
from kvarena.allocators.host_level import HostLevel
from kvarena.allocators.moves import Move, Moves
from kvarena.allocators.paged import PagedAllocator
from kvarena.allocators.prefix_index import PrefixIndex
from kvarena.engine.contract import (
    BlockCopy,
    CacheObserver,
    LevelUsage,
    cdiv,
    check_choice,
    check_int,
    check_number,
    require,
)
from kvarena.engine.errors import EngineError, NotDefined
from kvarena.engine.request import Request

LOADS = ("always", "never")


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

    __slots__ = ("_index", "moves", "observer")

    def __init__(self, num_blocks: int, index: PrefixIndex) -> None:
        super().__init__(1, num_blocks)
        self._index = index
        self.moves: Moves | None = None
        self.observer: CacheObserver | None = None

    def take(self, num_blocks: int) -> list[int]:
        """Take free blocks, and evict what is missing."""
        if num_blocks > self.num_free:
            self.evict(num_blocks - self.num_free)
        return super().take(num_blocks)

    def evict(self, num_blocks: int, *, keeps: bool = True) -> None:
        """Free so many blocks of the index; the level below `keeps` them, if there is one."""
        blocks = self._index.evict(num_blocks)
        if self.moves is not None:
            self._send_down(self.moves, blocks, keeps)
        super().give(blocks)
        if self.observer is not None:
            self.observer.removed(blocks)

    def _send_down(self, moves: Moves, blocks: Sequence[int], keeps: bool) -> None:
        if not keeps:
            moves.forget(blocks)
            return
        gone, places = moves.down(blocks)
        if gone and self.observer is not None:
            self.observer.lowered(gone, places)

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
        host_blocks: blocks of host memory that keep what the pool evicts, in the order of a policy of the same name;
            those that `swap_gib` states are a part of them.
        load: whether a request waits for what they hold of it: `always`, or `never`, for whoever compares.
        options: see PagedAllocator.

    Attributes:
        make_index: makes the index, given the slots of a block and the order of eviction.
        policy: the policy.

    Raises:
        ConfigError: no such policy, or an option that it does not have; more blocks to swap to than there are.
        NotDefined: a level below under a policy that knows the future of one level alone.
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
        host_blocks: int = 0,
        load: str = "always",
        **options: Any,
    ) -> None:
        super().__init__(**options)
        check_number("allocator.ghosts", ghosts)
        self._make_policy = partial(
            make_policy, eviction, block_size=self.block_size, ghosts=ghosts, options=eviction_options or {}
        )
        self.policy = self._make_policy(num_blocks=self.num_blocks)
        self._index = self.make_index(self.block_size, EvictionOrder(self.policy))
        self._pool: CachingPool = CachingPool(self.num_blocks, self._index)
        self._stands: dict[Request, _Stand] = {}
        self._loads = check_choice("kv_cache.load", load, LOADS) == "always"
        self._moves: Moves | None = None
        if check_int("allocator.host_blocks", host_blocks, 0):
            self._moves = self._pool.moves = self._make_level(host_blocks)

    def _make_level(self, num_blocks: int) -> Moves:
        """Host memory of so many blocks below the pool."""
        if self.policy.needs_future:
            raise NotDefined(
                f"allocator.eviction={self._make_policy.args[0]} knows what is asked of one level, and "
                "kv_cache.host_gib adds another; leave one of them out"
            )
        num_swap = self.num_host_blocks
        require(
            num_swap <= num_blocks, "allocator.swap_gib (or swap_blocks)", num_swap,
            f"at most kv_cache.host_gib, {num_blocks} blocks: it is a share of that",
        )  # fmt: skip
        level = HostLevel(num_blocks, num_swap, EvictionOrder(self._make_policy(num_blocks=num_blocks)))
        self.num_host_blocks, self._host = num_blocks, level
        return Moves(level, self.block_size, self._order)

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
        self._pool.evict(self._index.num_evictable, keeps=False)
        if self._moves is not None:
            self._moves.level.clear()

    @property
    def observer(self) -> CacheObserver | None:
        return self._pool.observer

    @observer.setter
    def observer(self, observer: CacheObserver | None) -> None:
        self._pool.observer = observer
        if self._moves is not None:
            self._moves.level.on_forget = None if observer is None else observer.forgotten

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
            if self._moves is not None:
                self._moves.name(req, table, start, num_blocks)
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
        if self._moves is None or not self._loads:
            return super().allocate(req, num_tokens)
        pinned = self._moves.pin(req, hit.blocks)  # what is evicted now must not take its place
        allocated = super().allocate(req, num_tokens)
        self._moves.unpin(pinned)
        return allocated

    def _stand(self, req: Request, node: Any, num_blocks: int, *, found: bool) -> None:
        self._index.enter(node, req, found=found)
        self._stands[req] = _Stand(node, num_blocks, self.block_size)

    def free(self, req: Request) -> None:
        if self._moves is not None and req in self._tables:
            self._copies = self._moves.leave(req, self._tables[req], self._copies)
        super().free(req)
        self._index.forget(req)
        stand = self._stands.pop(req, None)
        if stand is not None:
            self._index.leave(stand.node)
        if self.observer is not None:
            self.observer.left(req)

    def swap_out(self, req: Request) -> bool:
        """Copy the computed blocks to host memory, where cached ones make room for them; see PagedAllocator."""
        if self._moves is not None:
            self._moves.level.make_room(cdiv(req.num_computed_tokens, self.block_size))
        return super().swap_out(req)

    def swap_in(self, req: Request) -> bool:
        """Bring the KV back into blocks of its own; `commit` publishes them like new ones."""
        if not super().swap_in(req):
            return False
        self._stand(req, self._index.root, 0, found=False)
        return True

    # ------------------------------------------------------------ the level below

    @property
    def levels(self) -> Sequence[LevelUsage]:  # type: ignore[override]
        return () if self._moves is None else (self._moves.level.usage(),)

    @property
    def is_moving(self) -> bool:  # type: ignore[override]
        return self._moves is not None and self._moves.is_moving

    def landing_blocks(self) -> Sequence[int]:
        return [] if self._moves is None else self._moves.landing

    def load(self, req: Request) -> int:
        first, unaligned = divmod(req.num_computed_tokens, self.block_size)
        if self._moves is None or unaligned:
            return 0
        return self._moves.up(req, self._tables[req], first) * self.block_size

    def arrive(self, now: float) -> list[Request]:
        return [] if self._moves is None else self._landed(self._moves.arrive(now), came=True)

    def next_arrival(self) -> float | None:
        return None if self._moves is None else self._moves.next_arrival()

    def abandon(self, copies: Iterable[BlockCopy]) -> list[Request]:
        return [] if self._moves is None else self._landed(self._moves.abandon(copies), came=False)

    def _landed(self, moves: Iterable[Move], *, came: bool) -> list[Request]:
        """Loads are over, and brought something or not; whose they are."""
        requests = []
        for move in moves:
            self._pool.give(move.landing)
            req = move.req
            if req is None:
                continue
            requests.append(req)
            if came:
                stop = move.first + len(move.held)
                req.num_computed_tokens = stop * self.block_size
                self._publish(req, self._stands[req], stop)
        return requests

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
