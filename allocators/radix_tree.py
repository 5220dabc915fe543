"""A radix tree over tokens whose edges are runs of full blocks (RadixAttention, Zheng et al., 2024).

                       root
            [1 2 3 4 | 5 6 7 8]             node A: 2 blocks, locked by both requests below
             /              \\
    [9 9 9 9]          [3 1 4 1 | 5 9 2 6]  node C: unlocked leaf, 2 evictable blocks
    node B: locked

A request locks the path to the node it stands on; a locked node's ancestors are locked too. Unlocked nodes are the
cache. Eviction takes blocks off the tail of the least recently used unlocked leaf; a leaf that is used up leaves
the tree, and its parent may become a leaf.
"""

from __future__ import annotations

from collections.abc import Iterator
from heapq import heapify, heappop, heappush
from itertools import count

from engine.request import Request


class RadixNode:
    """A run of full blocks.

    Attributes:
        parent: None for the root.
        key: the entry in the parent's `children`: the tokens of the first block (at the root, after the salt).
        tokens: the run's tokens.
        blocks: the run's block ids, `len(tokens) / block_size` of them.
        children: by their key.
        num_locks: requests that stand on this node or below.
        last_used: when a request last took or left the node.
    """

    __slots__ = ("blocks", "children", "key", "last_used", "num_locks", "parent", "tokens")

    def __init__(self, parent: RadixNode | None, key: tuple, tokens: list[int], blocks: list[int]) -> None:
        self.parent = parent
        self.key = key
        self.tokens = tokens
        self.blocks = blocks
        self.children: dict[tuple, RadixNode] = {}
        self.num_locks = 0
        self.last_used = 0


class RadixTree:
    """Full blocks of requests by their tokens.

    Attributes:
        root: the empty prefix; never locked, never evicted.
        num_evictable: blocks of unlocked nodes.
        num_saved: blocks that sharing saved: per block, its locks less one.
    """

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self.root = RadixNode(None, (), [], [])
        self.num_evictable = 0
        self.num_saved = 0
        self._num_nodes = 0
        self._ticks = count(1)
        # Unlocked leaves by last use. Entries of nodes that were locked or grew children since are stale.
        self._leaves: list[tuple[int, int, RadixNode]] = []

    # ------------------------------------------------------------ finding

    def walk(self, req: Request, num_blocks: int) -> tuple[list[RadixNode], int]:
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

    def cut(self, path: list[RadixNode], num_blocks: int) -> RadixNode:
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

    def path_to(self, node: RadixNode) -> list[RadixNode]:
        """Nodes from below the root down to `node`."""
        path = []
        while node.parent is not None:
            path.append(node)
            node = node.parent
        return path[::-1]

    def _key(self, parent: RadixNode, req: Request, index: int) -> tuple:
        tokens = req.token_ids(index * self._block_size, (index + 1) * self._block_size)
        return tuple(tokens) if parent.parent or index else (req.cache_salt, *tokens)

    def _num_common(self, node: RadixNode, req: Request, start: int, stop: int) -> int:
        """Leading blocks of `node` that equal `req`'s blocks [start, stop). Compares whole runs at a time."""
        size = self._block_size
        high = min(len(node.blocks), stop - start)
        tokens = req.token_ids(start * size, (start + high) * size)
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
        upper = RadixNode(parent, node.key, node.tokens[:size], node.blocks[:num_blocks])
        upper.num_locks, upper.last_used = node.num_locks, node.last_used
        parent.children[node.key] = upper
        node.tokens, node.blocks = node.tokens[size:], node.blocks[num_blocks:]
        node.parent, node.key = upper, tuple(node.tokens[: self._block_size])
        upper.children[node.key] = node
        self._num_nodes += 1
        return upper

    # ------------------------------------------------------------ growing

    def insert(
        self, node: RadixNode, req: Request, table: list[int], start: int, stop: int
    ) -> tuple[RadixNode, list[int]]:
        """Put `req`'s full blocks [start, stop) into the tree, below `node`, on which it stands.

        Where the tree holds an equal block already, the table's entry becomes the tree's block.

        Returns:
            The locked node on which `req` now stands, and the blocks that left its table.
        """
        replaced: list[int] = []
        while start < stop:
            key = self._key(node, req, start)
            child = node.children.get(key)
            if child is None:
                return self._append(node, key, req, table, start, stop), replaced
            num_common = self._num_common(child, req, start, stop)
            if num_common < len(child.blocks):
                child = self._split(child, num_common)
            self._lock_one(child)
            replaced += table[start : start + num_common]
            table[start : start + num_common] = child.blocks
            start += num_common
            node = child
        return node, replaced

    def _append(self, node: RadixNode, key: tuple, req: Request, table: list[int], start: int, stop: int) -> RadixNode:
        tokens = req.token_ids(start * self._block_size, stop * self._block_size)
        if node.num_locks == 1 and not node.children:  # nobody else stands here: the edge grows
            node.tokens += tokens
            node.blocks += table[start:stop]
            return node
        child = node.children[key] = RadixNode(node, key, list(tokens), table[start:stop])
        child.num_locks, child.last_used = 1, next(self._ticks)
        self._num_nodes += 1
        return child

    # ------------------------------------------------------------ locks

    def lock(self, node: RadixNode) -> None:
        """A request stands on `node`: nothing on the path to it can be evicted."""
        while node.parent is not None:
            self._lock_one(node)
            node = node.parent

    def unlock(self, node: RadixNode) -> None:
        """A request leaves `node`."""
        now = next(self._ticks)
        while node.parent is not None:
            self._unlock_one(node, now)
            node = node.parent

    def _lock_one(self, node: RadixNode) -> None:
        if node.num_locks:
            self.num_saved += len(node.blocks)
        else:
            self.num_evictable -= len(node.blocks)
        node.num_locks += 1
        node.last_used = next(self._ticks)

    def _unlock_one(self, node: RadixNode, now: int) -> None:
        node.num_locks -= 1
        node.last_used = now
        if node.num_locks:
            self.num_saved -= len(node.blocks)
            return
        self.num_evictable += len(node.blocks)
        if not node.children:
            self._push_leaf(node)

    # ------------------------------------------------------------ eviction

    def evictable_blocks(self) -> Iterator[int]:
        """All blocks of unlocked nodes; visits the whole tree."""
        stack = list(self.root.children.values())
        while stack:
            node = stack.pop()
            stack += node.children.values()
            if not node.num_locks:
                yield from node.blocks

    def evict(self, num_blocks: int) -> list[int]:
        """Remove `num_blocks` <= num_evictable blocks, least recently used leaves and their tails first."""
        evicted: list[int] = []
        while len(evicted) < num_blocks:
            entry = heappop(self._leaves)
            if not self._is_current(entry):
                continue
            node = entry[2]
            num_taken = min(num_blocks - len(evicted), len(node.blocks))
            num_left = len(node.blocks) - num_taken
            evicted += reversed(node.blocks[num_left:])
            del node.blocks[num_left:], node.tokens[num_left * self._block_size :]
            if num_left:
                heappush(self._leaves, entry)
            else:
                self._remove(node)
        self.num_evictable -= num_blocks
        return evicted

    def _remove(self, node: RadixNode) -> None:
        parent = node.parent
        assert parent is not None
        del parent.children[node.key]
        self._num_nodes -= 1
        if parent.parent is not None and not parent.num_locks and not parent.children:
            self._push_leaf(parent)

    def _push_leaf(self, node: RadixNode) -> None:
        if len(self._leaves) > 64 + 2 * self._num_nodes:  # stale entries outnumber the tree: forget them
            self._leaves = [entry for entry in self._leaves if self._is_current(entry)]
            heapify(self._leaves)
        heappush(self._leaves, (node.last_used, next(self._ticks), node))

    @staticmethod
    def _is_current(entry: tuple[int, int, RadixNode]) -> bool:
        last_used, _, node = entry
        return bool(node.blocks) and not node.num_locks and not node.children and node.last_used == last_used
