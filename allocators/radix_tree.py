"""A radix tree over tokens whose edges are runs of full blocks (RadixAttention, Zheng et al., 2024).

                       root
            [1 2 3 4 | 5 6 7 8]             node A: 2 blocks, locked by both requests below
             /              \\
    [9 9 9 9]          [3 1 4 1 | 5 9 2 6]  node C: unlocked leaf, 2 evictable blocks
    node B: locked

At an image's positions its digest stands in place of tokens (`Request.identities`).

A request locks the path to the node it stands on; a locked node's ancestors are locked too. Unlocked nodes are the
cache. Eviction takes blocks off the tails of unlocked leaves, in the order that the policy says; a leaf that is used up
leaves the tree, and its parent may become a leaf.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from kvarena.allocators.eviction_order import Entry, EvictionOrder, block_digest, salt_digest
from kvarena.allocators.prefix_index import Hit, PrefixIndex
from kvarena.engine.contract import NULL_BLOCK
from kvarena.engine.request import Request


class Leaf(Entry):
    """A block of the tree, and the node whose run it is in."""

    __slots__ = ("node",)
    node: RadixNode


class RadixNode:
    """A run of full blocks.

    Attributes:
        parent: None for the root.
        key: the entry in the parent's `children`: the tokens of the first block (at the root, after the salt).
        tokens: the run's tokens.
        blocks: the run's block ids, `len(tokens) / block_size` of them.
        entries: the same blocks, as the order of eviction has them.
        children: by their key.
        num_locks: requests that stand on this node or below.
    """

    __slots__ = ("blocks", "children", "entries", "key", "num_locks", "parent", "tokens")

    def __init__(self, parent: RadixNode | None, key: tuple, tokens: list[int]) -> None:
        self.parent = parent
        self.key = key
        self.tokens = tokens
        self.blocks: list[int] = []
        self.entries: list[Leaf] = []
        self.children: dict[tuple, RadixNode] = {}
        self.num_locks = 0


class RadixTree(PrefixIndex):
    """Full blocks of requests by their tokens. The root is never locked and never evicted."""

    def __init__(self, block_size: int, order: EvictionOrder) -> None:
        super().__init__(block_size, order)
        self.root = RadixNode(None, (), [])
        self._blocks: set[int] = set()

    def __contains__(self, block: int) -> bool:
        return block in self._blocks

    # ------------------------------------------------------------ finding

    def match(self, req: Request, num_blocks: int) -> int:
        return self._walk(req, num_blocks)[1]

    def num_in_use(self, req: Request, num_blocks: int) -> int:
        path, num_left = self._walk(req, num_blocks)
        num_shared = 0
        for node in path:
            if not node.num_locks:  # nor has anything below it
                break
            num_shared += min(num_left, len(node.blocks))
            num_left -= len(node.blocks)
        return num_shared

    def find(self, req: Request, num_blocks: int) -> Hit:
        node = self._cut(*self._walk(req, num_blocks))
        path = self._path_to(node)
        blocks = [block for node in path for block in node.blocks]
        return Hit(node, blocks, [block for node in path if node.num_locks for block in node.blocks])

    def above(self, node: RadixNode, depth: int, num_blocks: int) -> RadixNode:  # noqa: ARG002
        return self._cut(self._path_to(node), num_blocks)

    def _walk(self, req: Request, num_blocks: int) -> tuple[list[RadixNode], int]:
        """Nodes along `req`'s first `num_blocks` blocks, and how many of them the tree holds.

        The last node may be covered in part. Changes nothing.
        """
        path: list[RadixNode] = []
        node, done = self.root, 0
        while done < num_blocks:
            child = node.children.get(self._key(node, req, done))
            if child is None:
                break
            num_common = self._num_common(child, req, done, num_blocks)
            path.append(child)
            done += num_common
            if num_common < len(child.blocks):
                break
            node = child
        return path, done

    def _cut(self, path: list[RadixNode], num_blocks: int) -> RadixNode:
        """The node at which the first `num_blocks` blocks of `path` end; splits an edge where they end inside."""
        node = self.root
        for child in path:
            if not num_blocks:
                break
            if num_blocks < len(child.blocks):
                return self._split(child, num_blocks)
            num_blocks -= len(child.blocks)
            node = child
        return node

    def _path_to(self, node: RadixNode) -> list[RadixNode]:
        """Nodes from below the root down to `node`."""
        path = []
        while node.parent is not None:
            path.append(node)
            node = node.parent
        return path[::-1]

    def _key(self, parent: RadixNode, req: Request, index: int) -> tuple:
        tokens = req.identities(index * self._block_size, (index + 1) * self._block_size)
        return tuple(tokens) if parent.parent or index else (req.cache_salt, *tokens)

    def _num_common(self, node: RadixNode, req: Request, start: int, stop: int) -> int:
        """Leading blocks of `node` that equal `req`'s blocks [start, stop). Compares whole runs at a time."""
        size = self._block_size
        high = min(len(node.blocks), stop - start)
        tokens = req.identities(start * size, (start + high) * size)
        if tokens == (node.tokens if high == len(node.blocks) else node.tokens[: high * size]):
            return high
        low = 0  # blocks below `low` are equal, block `high - 1` or one before it is not
        while high - low > 1:
            middle = (low + high) // 2
            if tokens[low * size : middle * size] == node.tokens[low * size : middle * size]:
                low = middle
            else:
                high = middle
        return low

    def _split(self, node: RadixNode, num_blocks: int) -> RadixNode:
        """Cut an edge after `num_blocks` blocks. Whoever stood on `node` still does; returns the new upper part."""
        size = num_blocks * self._block_size
        parent = node.parent
        assert parent is not None
        upper = RadixNode(parent, node.key, node.tokens[:size])
        upper.blocks, node.blocks = node.blocks[:num_blocks], node.blocks[num_blocks:]
        upper.entries, node.entries = node.entries[:num_blocks], node.entries[num_blocks:]
        for entry in upper.entries:
            entry.node = upper
        upper.num_locks = node.num_locks
        parent.children[node.key] = upper
        node.tokens = node.tokens[size:]
        node.parent, node.key = upper, tuple(node.tokens[: self._block_size])
        upper.children[node.key] = node
        return upper

    def forget(self, req: Request) -> None:
        """Nothing is remembered of who was looked for."""

    # ------------------------------------------------------------ growing

    def publish(
        self, node: RadixNode, req: Request, table: list[int], start: int, stop: int
    ) -> tuple[RadixNode, list[int], list[int]]:
        """Put the blocks into the tree; where it holds an equal one already, the entry becomes the tree's block."""
        replaced: list[int] = []
        shared: list[int] = []
        while start < stop:
            key = self._key(node, req, start)
            child = node.children.get(key)
            if child is None:
                return self._append(node, key, req, table, start, stop), replaced, shared
            num_common = self._num_common(child, req, start, stop)
            if num_common < len(child.blocks):
                child = self._split(child, num_common)
            if child.num_locks:
                shared += child.blocks
            self._lock_one(child)
            self.order.hit(child.entries, req)
            replaced += table[start : start + num_common]
            table[start : start + num_common] = child.blocks
            start += num_common
            node = child
        return node, replaced, shared

    def _append(self, node: RadixNode, key: tuple, req: Request, table: list[int], start: int, stop: int) -> RadixNode:
        tokens = req.identities(start * self._block_size, stop * self._block_size)
        last = node.entries[-1] if node.entries else None
        if node.num_locks == 1 and not node.children:  # nobody else stands here: the edge grows
            node.tokens += tokens
        else:
            node.children[key] = node = RadixNode(node, key, list(tokens))
            node.num_locks = 1
        node.blocks += table[start:stop]
        self._blocks.update(table[start:stop])
        digest, size = (last.digest if last else salt_digest(req.cache_salt)) if self._recalls else 0, self._block_size
        for i in range(stop - start):
            if self._recalls:
                digest = block_digest(digest, tokens[i * size : (i + 1) * size])
            last = Leaf(last, table[start + i], digest)
            last.node = node
            node.entries.append(last)
            if self.order.inserted is not None:
                self.order.inserted(last, req)
        return node

    # ------------------------------------------------------------ locks

    def enter(self, node: RadixNode, req: Request, *, found: bool) -> None:
        """Lock the path to `node`: nothing on it can be evicted."""
        for part in self._path_to(node):
            self._lock_one(part)
            if found:
                self.order.hit(part.entries, req)

    def leave(self, node: RadixNode) -> None:
        while node.parent is not None:
            node.num_locks -= 1
            if not node.num_locks:
                for entry in reversed(node.entries):
                    self.order.release(entry)
            node = node.parent

    def _lock_one(self, node: RadixNode) -> None:
        if not node.num_locks:
            for entry in node.entries:
                self.order.take(entry)
        node.num_locks += 1

    # ------------------------------------------------------------ eviction

    def keep(self, blocks: Iterable[int]) -> list[int]:
        """What the tree holds stays; unlocked paths say from when on it is cached."""
        return [block for block in blocks if block not in self._blocks]

    def evictable_blocks(self) -> Iterator[int]:
        """All blocks of unlocked nodes; visits the whole tree."""
        stack = list(self.root.children.values())
        while stack:
            node = stack.pop()
            stack += node.children.values()
            if not node.num_locks:
                yield from node.blocks

    def evict(self, num_blocks: int) -> list[int]:
        """Each block is the last of its node: the order lets no other go."""
        evicted: list[int] = []
        for entry in self.order.evict(num_blocks):
            node = entry.node  # type: ignore[attr-defined]
            evicted.append(entry.block)
            entry.block = NULL_BLOCK
            node.blocks.pop()
            node.entries.pop()
            del node.tokens[-self._block_size :]
            if not node.blocks:
                assert node.parent is not None
                del node.parent.children[node.key]
        self._blocks.difference_update(evicted)
        return evicted
