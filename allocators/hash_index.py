"""A prefix index of hash-chained full blocks, in the manner of vLLM's automatic prefix caching.

A full block's key is (its predecessor, its tokens), so equal keys mean equal prefixes (at an image's positions its
digest stands in place of tokens: `Request.identities`):

    salt <- [tokens 0..15] <- [tokens 16..31] <- [tokens 32..47]      links, found through one hash table
                block 5           block 9            block 2

The table compares whole keys, and a predecessor is an object, not a hash: two prefixes that collide stay apart.
Requests that compute equal blocks at the same time go on with one copy: the first is published, and takes the place of
the others in their tables. So whoever owns a block owns those before it.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import count

from kvarena.allocators.eviction_order import Entry, EvictionOrder, forgotten, salt_digest
from kvarena.allocators.prefix_index import Hit, PrefixIndex
from kvarena.engine.contract import NULL_BLOCK
from kvarena.engine.request import Request


class Link(Entry):
    """One full block's place in a chain."""

    __slots__ = ("key", "serial")
    parent: Link | None

    def __init__(self, serial: int, key: tuple, parent: Link | None, block: int, digest: int) -> None:
        # As the base does, without a call of it: this is made for every block that becomes full.
        self.parent = parent
        self.block = block
        self.digest = digest
        self.serial = serial
        self.key = key
        if parent is None:
            self.depth = 0
        else:
            self.depth = parent.depth + 1
            parent.num_children += 1
        self.num_children = self.released_at = self.queued = self.lane = 0
        self.in_use = True
        self.uses = 1
        self.last = 0


class HashIndex(PrefixIndex):
    """Chains of full blocks by their tokens; a node is the link of the last block, or None."""

    root = None

    def __init__(self, block_size: int, order: EvictionOrder) -> None:
        super().__init__(block_size, order)
        self._links: dict[tuple, Link] = {}
        self._serials = count()
        self._published: dict[int, Link] = {}  # block -> its link
        # The last match: a request at the head of the queue is matched again in every step.
        self._matched: tuple[Request | None, list[Link]] = (None, [])

    def __contains__(self, block: int) -> bool:
        return block in self._published

    def evictable_blocks(self) -> Iterable[int]:
        return [block for block, link in self._published.items() if not link.in_use]

    # ------------------------------------------------------------ finding

    def _match(self, req: Request, num_blocks: int) -> list[Link]:
        """The links of `req`'s published blocks, at least as far as `num_blocks`. Remembers them."""
        last, path = self._matched
        if last is not req:
            path = []
        else:
            for i, link in enumerate(path):
                if forgotten(link):
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
            if found is None:
                break
            path.append(found)
            parent = found.serial
        return path

    def match(self, req: Request, num_blocks: int) -> int:
        return min(len(self._match(req, num_blocks)), num_blocks)

    def num_in_use(self, req: Request, num_blocks: int) -> int:
        return sum(link.in_use for link in self._match(req, num_blocks)[:num_blocks])

    def find(self, req: Request, num_blocks: int) -> Hit:
        links = self._match(req, num_blocks)[:num_blocks] if num_blocks else []
        blocks = [link.block for link in links]
        return Hit(links[-1] if links else None, blocks, [link.block for link in links if link.in_use])

    def forget(self, req: Request) -> None:
        if self._matched[0] is req:
            self._matched = (None, [])

    # ------------------------------------------------------------ requests come and go

    def enter(self, node: Link | None, req: Request, *, found: bool) -> None:
        if not found:
            return  # it shares what another request owns
        path: list[Entry] = []
        while node is not None:
            path.append(node)
            node = node.parent
        path.reverse()
        for link in path:
            if not link.in_use:
                self.order.take(link)
        self.order.hit(path, req)

    def leave(self, node: Link | None) -> None:
        """Which blocks nobody owns, `keep` is told."""

    def above(self, node: Link | None, depth: int, num_blocks: int) -> Link | None:
        for _ in range(depth - num_blocks):
            node = node.parent if node else None
        return node

    # ------------------------------------------------------------ publishing and eviction

    def publish(
        self, node: Link | None, req: Request, table: list[int], start: int, stop: int
    ) -> tuple[Link | None, list[int], list[int]]:
        link, size, order, links, recalls = node, self._block_size, self.order, self._links, self._recalls
        texts = req.identities(start * size, stop * size)
        replaced: list[int] = []
        shared: list[int] = []
        for i in range(start, stop):
            tokens = texts[(i - start) * size : (i - start + 1) * size]
            key = (link.serial if link else req.cache_salt, *tokens)
            known = links.get(key)
            if known is None:
                digest = 0
                if recalls:
                    before = link.digest if link else salt_digest(req.cache_salt)
                    digest = hash((before, *tokens))  # `block_digest`, without a call of it
                link = links[key] = Link(next(self._serials), key, link, table[i], digest)
                self._published[table[i]] = link
                if order.inserted is not None:
                    order.inserted(link, req)
                continue
            link = known
            if link.in_use:
                shared.append(link.block)
            else:
                order.take(link)
            replaced.append(table[i])
            table[i] = link.block
            order.hit((link,), req)
        return link, replaced, shared

    def keep(self, blocks: Iterable[int]) -> list[int]:
        private = []
        published, release = self._published, self.order.release
        for block in blocks:
            link = published.get(block)
            if link is None:
                private.append(block)
            else:
                release(link)
        return private

    def evict(self, num_blocks: int) -> list[int]:
        blocks = []
        links, published = self._links, self._published
        for link in self.order.evict(num_blocks):
            blocks.append(link.block)
            del published[link.block]
            del links[link.key]  # type: ignore[attr-defined]
            link.block = NULL_BLOCK
        return blocks
