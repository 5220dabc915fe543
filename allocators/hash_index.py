"""A prefix index of hash-chained full blocks, in the manner of vLLM's automatic prefix caching.

A full block's key is (its predecessor, its tokens), so equal keys mean equal prefixes (at an image's positions its
digest stands in place of tokens: `Request.identities`):

    salt <- [tokens 0..15] <- [tokens 16..31] <- [tokens 32..47]      links, found through one hash table
                block 5           block 9            block 2

The table compares whole keys, and a predecessor is an object, not a hash: two prefixes that collide stay apart.
Requests that compute equal blocks at the same time keep one copy each; only the first is published.

A cached block is its own entry in the eviction order (least recently freed first, the tail of a request before its
head); a hit takes it out of the middle in O(1).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from itertools import count

from kvarena.allocators.prefix_index import Hit, PrefixIndex
from kvarena.engine.contract import NULL_BLOCK
from kvarena.engine.request import Request


class Link:
    """One full block's place in a chain.

    A link outlives its block while other links or requests stand on it (`num_refs`): then `block` is the null block,
    and the same tokens, computed again, revive it.
    """

    __slots__ = ("block", "key", "num_refs", "parent", "serial")

    def __init__(self, serial: int, key: tuple, parent: Link | None, block: int) -> None:
        self.serial = serial
        self.key = key
        self.parent = parent
        self.block = block
        self.num_refs = 0


class HashIndex(PrefixIndex):
    """Chains of full blocks by their tokens; a node is the link of the last block, or None."""

    evicts_by_path = False
    root = None

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._links: dict[tuple, Link] = {}
        self._serials = count()
        self._published: dict[int, Link] = {}  # block -> its link
        self._cached: OrderedDict[int, None] = OrderedDict()  # published blocks that no request owns, oldest first
        # The last match: a request at the head of the queue is matched again in every step.
        self._matched: tuple[Request | None, list[Link]] = (None, [])

    def __contains__(self, block: int) -> bool:
        return block in self._published

    @property
    def num_evictable(self) -> int:  # type: ignore[override]
        return len(self._cached)

    def evictable_blocks(self) -> Iterable[int]:
        return self._cached

    # ------------------------------------------------------------ finding

    def _match(self, req: Request, num_blocks: int) -> list[Link]:
        """The links of `req`'s published blocks, at least as far as `num_blocks`. Remembers them."""
        last, path = self._matched
        if last is not req:
            path = []
        else:
            for i, link in enumerate(path):
                if link.block == NULL_BLOCK:
                    del path[i:]
                    break
        self._matched = (req, path)
        block_size, links = self._block_size, self._links
        prompt, num_prompt = req.prompt_identities, req.num_prompt_tokens
        parent: int | str = path[-1].serial if path else req.cache_salt
        for start in range(len(path) * block_size, num_blocks * block_size, block_size):
            stop = start + block_size
            tokens = prompt[start:stop] if stop <= num_prompt else req.identities(start, stop)
            found = links.get((parent, *tokens))
            if found is None or found.block == NULL_BLOCK:
                break
            path.append(found)
            parent = found.serial
        return path

    def match(self, req: Request, num_blocks: int) -> int:
        return min(len(self._match(req, num_blocks)), num_blocks)

    def num_in_use(self, req: Request, num_blocks: int) -> int:
        return sum(link.block not in self._cached for link in self._match(req, num_blocks)[:num_blocks])

    def find(self, req: Request, num_blocks: int) -> Hit:
        links = self._match(req, num_blocks)[:num_blocks] if num_blocks else []
        blocks = [link.block for link in links]
        return Hit(links[-1] if links else None, blocks, [block for block in blocks if block not in self._cached])

    # ------------------------------------------------------------ requests come and go

    def enter(self, node: Link | None, hits: list[int]) -> None:
        self._hold(node)
        for block in hits:
            self._cached.pop(block, None)

    def leave(self, node: Link | None) -> None:
        if node:
            node.num_refs -= 1
            self._prune(node)

    def above(self, node: Link | None, depth: int, num_blocks: int) -> Link | None:
        for _ in range(depth - num_blocks):
            node = node.parent if node else None
        return node

    def _hold(self, node: Link | None) -> None:
        if node:
            node.num_refs += 1

    # ------------------------------------------------------------ publishing and eviction

    def publish(
        self, node: Link | None, req: Request, table: list[int], start: int, stop: int
    ) -> tuple[Link | None, list[int], list[int]]:
        link = node
        for i in range(start, stop):
            link = self._publish_one(link, req, i, table[i])
        self._hold(link)
        self.leave(node)
        return link, [], []

    def _publish_one(self, parent: Link | None, req: Request, index: int, block: int) -> Link:
        """The link of `req`'s full block number `index`: where an equal one is published, `block` stays private."""
        tokens = req.identities(index * self._block_size, (index + 1) * self._block_size)
        key = (parent.serial if parent else req.cache_salt, *tokens)
        link = self._links.get(key)
        if link is None:
            link = self._links[key] = Link(next(self._serials), key, parent, block)
            self._hold(parent)
        elif link.block != NULL_BLOCK:
            return link
        link.block = block
        self._published[block] = link
        return link

    def keep(self, blocks: Iterable[int]) -> list[int]:
        private = []
        for block in blocks:
            if block in self._published:
                self._cached[block] = None  # the most recently used
            else:
                private.append(block)
        return private

    def evict(self, num_blocks: int) -> list[int]:
        blocks = []
        for _ in range(num_blocks):
            block, _ = self._cached.popitem(last=False)
            withdrawn = self._published.pop(block)
            withdrawn.block = NULL_BLOCK
            self._prune(withdrawn)
            blocks.append(block)
        return blocks

    def _prune(self, link: Link | None) -> None:
        """Forget links without a block that nothing stands on."""
        while link and link.block == NULL_BLOCK and not link.num_refs:
            del self._links[link.key]
            link = link.parent
            if link:
                link.num_refs -= 1
