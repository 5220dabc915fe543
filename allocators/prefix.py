"""Prefix caching over hash-chained full blocks, in the manner of vLLM's automatic prefix caching.

A full block's key is (its predecessor, its tokens), so equal keys mean equal prefixes:

    salt <- [tokens 0..15] <- [tokens 16..31] <- [tokens 32..47]      links, found through one hash table
                block 5           block 9            block 2

The table compares whole keys, and a predecessor is an object, not a hash: two prefixes that collide stay apart.

    block:   free --allocate--> owned --commit--> owned, published --free--> cached --evict--> free
                                                        ^---- match + allocate ----'

A cached block is its own entry in the eviction order (least recently freed first, the tail of a request before its
head); a hit takes it out of the middle in O(1).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from itertools import count
from typing import Any

from allocators.paged import PagedAllocator
from engine.errors import EngineError
from engine.plan import NULL_BLOCK, KVUsage, cdiv
from engine.request import Request


class _Link:
    """One full block's place in a chain.

    A link outlives its block while other links or requests stand on it (`num_refs`): then `block` is the null block,
    and the same tokens, computed again, revive it.
    """

    __slots__ = ("block", "key", "num_refs", "parent", "serial")

    def __init__(self, serial: int, key: tuple, parent: _Link | None, block: int) -> None:
        self.serial = serial
        self.key = key
        self.parent = parent
        self.block = block
        self.num_refs = 0


class _Chain:
    """How far a live request's blocks are published: `num_blocks` of them, the last at `link`."""

    __slots__ = ("due", "link", "num_blocks")

    def __init__(self, num_blocks: int, link: _Link | None, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.link = link
        self.due = (num_blocks + 1) * block_size  # computed tokens at which the next block is full


class PrefixIndex:
    """Chains of full blocks by their tokens."""

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._links: dict[tuple, _Link] = {}
        self._serials = count()

    def extend(self, path: list[_Link], req: Request, num_blocks: int) -> None:
        """Append to `path`, a chain of `req`'s first blocks, the published blocks up to `num_blocks`."""
        block_size, links = self._block_size, self._links
        prompt, num_prompt = req.prompt_token_ids, req.num_prompt_tokens
        parent: int | str = path[-1].serial if path else req.cache_salt
        for start in range(len(path) * block_size, num_blocks * block_size, block_size):
            stop = start + block_size
            tokens = prompt[start:stop] if stop <= num_prompt else req.token_ids(start, stop)
            link = links.get((parent, *tokens))
            if link is None or link.block == NULL_BLOCK:
                return
            path.append(link)
            parent = link.serial

    def publish(self, parent: _Link | None, req: Request, index: int, block: int) -> tuple[_Link, bool]:
        """The link of `req`'s full block number `index`, and whether `block` was published as it.

        False: an equal block is published already, and `block` stays private.
        """
        tokens = req.token_ids(index * self._block_size, (index + 1) * self._block_size)
        key = (parent.serial if parent else req.cache_salt, *tokens)
        link = self._links.get(key)
        if link is None:
            link = self._links[key] = _Link(next(self._serials), key, parent, block)
            if parent:
                parent.num_refs += 1
            return link, True
        if link.block == NULL_BLOCK:
            link.block = block
            return link, True
        return link, False

    def withdraw(self, link: _Link) -> None:
        """The link's block is evicted."""
        link.block = NULL_BLOCK
        self._prune(link)

    def hold(self, link: _Link | None) -> None:
        """A request stands on `link`."""
        if link:
            link.num_refs += 1

    def release(self, link: _Link | None) -> None:
        """A request stands on `link` no more."""
        if link:
            link.num_refs -= 1
            self._prune(link)

    def _prune(self, link: _Link | None) -> None:
        """Forget links without a block that nothing stands on."""
        while link and link.block == NULL_BLOCK and not link.num_refs:
            del self._links[link.key]
            link = link.parent
            if link:
                link.num_refs -= 1


class PrefixCachingAllocator(PagedAllocator):
    """Paged allocation that finds the KV of equal prefixes again, block by block.

    A request shares published blocks with whoever has the same tokens and the same `cache_salt`. A hit never covers
    the last token, because its logits must be computed. Requests that compute equal blocks at the same time keep
    one copy each; only the first is published.

    Args:
        options: see PagedAllocator.
    """

    reads_tokens = True
    no_window = "a cached prefix must hold all of its tokens, and a window drops the first ones"

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._index = PrefixIndex(self.block_size)
        self._published: dict[int, _Link] = {}  # block -> its link
        self._cached: OrderedDict[int, None] = OrderedDict()  # published blocks that no request owns, oldest first
        self._chains: dict[Request, _Chain] = {}
        # The last match: a request at the head of the queue is matched again in every step.
        self._matched: tuple[Request | None, list[_Link]] = (None, [])
        self._hits: dict[Request, int] = {}  # hits whose tokens `num_computed_tokens` does not count yet

    @property
    def num_free_blocks(self) -> int:
        """Free blocks and evictable ones."""
        return self._pool.num_free + len(self._cached)

    def match_prefix(self, req: Request) -> int:
        """Tokens of `req` in published blocks. Remembers the path, which changes no answer."""
        return len(self._match(req)) * self.block_size

    def cached_blocks(self) -> Iterable[int]:
        """Published blocks that no request owns."""
        return self._cached

    def clear_cache(self) -> None:
        """Forget every cached block that no request owns, so that a measured run starts cold."""
        self._discard_cached(len(self._cached))

    def free(self, req: Request) -> None:
        """Give all blocks back; published ones stay cached. Idempotent."""
        super().free(req)
        if self._matched[0] is req:
            self._matched = (None, [])

    def commit(self, req: Request) -> None:
        """Publish the blocks that became full."""
        chain = self._chains[req]
        if req.num_computed_tokens >= chain.due:
            self._publish(req, chain)

    # ------------------------------------------------------------ matching

    def _match(self, req: Request) -> list[_Link]:
        last, path = self._matched
        if last is not req:
            path = []
        else:
            for i, link in enumerate(path):
                if link.block == NULL_BLOCK:
                    del path[i:]
                    break
        self._index.extend(path, req, (req.num_tokens - 1) // self.block_size)
        self._matched = (req, path)
        return path

    def _admit(self, req: Request, num_tokens: int, num_cached: int) -> bool:
        num_hits = num_cached // self.block_size
        hits = self._match(req)[:num_hits] if num_hits else []
        if len(hits) < num_hits:
            raise EngineError(
                f"request {req.request_id!r} was admitted with {num_cached} cached tokens, but the prefix cache holds "
                f"{len(hits) * self.block_size}; pass what match_prefix just answered"
            )
        need = cdiv(num_tokens, self.block_size) - num_hits
        blocks = [link.block for link in hits]
        if need > self.num_free_blocks - sum(block in self._cached for block in blocks):
            return False
        for block in blocks:
            self._acquire(block)
        self._tables[req] = blocks + self._take(need)
        link = hits[-1] if hits else None
        self._begin_chain(req, num_hits, link)
        req.num_slots = (num_hits + need) * self.block_size
        if num_hits:
            self._hits[req] = num_cached
        return True

    def _acquire(self, block: int) -> None:
        """Take one more reference to a published block."""
        if block in self._cached:
            del self._cached[block]
        else:
            self._share(block)

    # ------------------------------------------------------------ publishing

    def _begin_chain(self, req: Request, num_blocks: int, link: _Link | None) -> None:
        self._chains[req] = _Chain(num_blocks, link, self.block_size)
        self._index.hold(link)

    def _publish(self, req: Request, chain: _Chain) -> None:
        table, link = self._tables[req], chain.link
        num_full = min(req.num_computed_tokens, req.num_tokens) // self.block_size
        for i in range(chain.num_blocks, num_full):
            link, is_ours = self._index.publish(link, req, i, table[i])
            if is_ours:
                self._published[table[i]] = link
        self._index.hold(link)
        self._index.release(chain.link)
        chain.link, chain.num_blocks = link, max(num_full, chain.num_blocks)
        chain.due = (chain.num_blocks + 1) * self.block_size

    def _share_table(self, req: Request, child: Request, num_tokens: int) -> bool:
        """The child goes on in the chain that `req` stands in."""
        super()._share_table(req, child, num_tokens)
        chain = self._chains[req]
        link, num_blocks = chain.link, chain.num_blocks
        while num_blocks > num_tokens // self.block_size:
            link, num_blocks = link.parent if link else None, num_blocks - 1
        self._begin_chain(child, num_blocks, link)
        return True

    def swap_in(self, req: Request) -> bool:
        """Bring the KV back into blocks of its own; `commit` publishes them like new ones."""
        if not super().swap_in(req):
            return False
        self._begin_chain(req, 0, None)
        return True

    # ------------------------------------------------------------ blocks in and out

    def _take(self, num_blocks: int) -> list[int]:
        missing = num_blocks - self._pool.num_free
        if missing > 0:
            self._discard_cached(missing)
        return self._pool.take(num_blocks)

    def _discard_cached(self, num_blocks: int) -> None:
        """Evict the blocks that were freed longest ago."""
        for _ in range(num_blocks):
            block, _ = self._cached.popitem(last=False)
            self._withdraw(block)
            self._pool.give([block])

    def _withdraw(self, block: int) -> None:
        """A block that is about to be written anew must not be found any more."""
        self._index.withdraw(self._published.pop(block))

    def _discard(self, blocks: list[int]) -> None:
        """Keep published blocks in the cache, as the most recently used; free the others."""
        published = self._published
        private = []
        for block in blocks:
            if block in published:
                self._cached[block] = None
            else:
                private.append(block)
        self._pool.give(private)

    def _drop(self, req: Request, table: list[int], cancel_copies: bool) -> None:
        super()._drop(req, table, cancel_copies)
        self._hits.pop(req, None)
        self._index.release(self._chains.pop(req).link)

    def _is_shared(self, block: int) -> bool:
        """A published block is never written: others may find it."""
        return block in self._extra_refs or block in self._published

    # ------------------------------------------------------------ ledger

    def _num_shared_hits(self, req: Request) -> int:
        return sum(link.block not in self._cached for link in self._match(req))

    def count(self) -> KVUsage:
        """Raw counts; cached are the published blocks that no request owns."""
        return self._count(len(self._cached), self._num_extra_refs, self._hits)
