"""The level below the pool: host memory for cached blocks that the pool evicts, and for preempted requests.

             evicted                         a hit
    pool --(arriving)--> host: cached --(leaving)--> pool         a copy that is read is cached again afterwards
         --------------> host: swapped ------------> pool         stays as long as its request waits

A block stands in one class of the books at a time. Cached blocks go in the order of a policy, as in the pool, a child
before its parent; a swapped one never goes, nor one that is on its way. Free of tensors: who copies is the runner.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from kvarena.allocators.block_names import BlockName
from kvarena.allocators.blocks import BlockPool
from kvarena.allocators.eviction_order import Entry, EvictionOrder
from kvarena.engine.contract import LevelUsage
from kvarena.engine.request import Request, SamplingParams

# What policies are told when a block comes down: no request asked for it.
_NOBODY = Request("nobody", [0], SamplingParams())


class Held(Entry):
    """A cached block of the level.

    Attributes:
        name: what it holds.
        num_readers: loads that read it.
        is_here: its bytes have arrived.
        is_void: it is forgotten, and stays until its copies are made.
    """

    __slots__ = ("is_here", "is_void", "name", "num_readers")

    def __init__(self, name: BlockName, parent: Held | None, block: int) -> None:
        super().__init__(parent, block, name.number)
        self.depth = name.depth
        self.name = name
        self.num_readers = 0
        self.is_here = self.is_void = False


class HostLevel:
    """Blocks 0..num_blocks - 1 of host memory. `take` and `give` are for swaps; cached blocks come by `admit`.

    Args:
        num_blocks: of the level.
        num_swap_blocks: most of them that preempted requests may have.
        order: of the cached blocks.

    Attributes:
        on_forget: told of cached blocks that nobody finds any more.
    """

    def __init__(self, num_blocks: int, num_swap_blocks: int, order: EvictionOrder) -> None:
        self.num_blocks = num_blocks
        self._num_swap_blocks = num_swap_blocks
        self._order = order
        self._pool = BlockPool(0, num_blocks)
        self._held: dict[bytes, Held] = {}
        self._children: dict[bytes, dict[Held, None]] = {}  # by the digest of the block before them
        self._num_swapped = self._num_arriving = self._num_leaving = 0
        self.on_forget: Callable[[Sequence[int]], None] | None = None

    def usage(self) -> LevelUsage:
        """The books."""
        return LevelUsage(
            total=self.num_blocks,
            cached=self._order.num_evictable,
            swapped=self._num_swapped,
            arriving=self._num_arriving,
            leaving=self._num_leaving,
            free=self._pool.num_free,
        )

    # ------------------------------------------------------------ swapped blocks

    @property
    def num_free(self) -> int:
        """Free blocks that a preempted request may take now."""
        return min(self._num_swap_blocks - self._num_swapped, self._pool.num_free)

    def make_room(self, num_blocks: int) -> None:
        """Let cached blocks go until a preempted request may take so many, where its share allows that."""
        if num_blocks <= self._num_swap_blocks - self._num_swapped:
            self._free(num_blocks)

    def take(self, num_blocks: int) -> list[int]:
        """Take `num_blocks` <= num_free blocks."""
        self._num_swapped += num_blocks
        return self._pool.take(num_blocks)

    def give(self, blocks: Iterable[int]) -> None:
        """Take blocks back that `take` handed out."""
        blocks = list(blocks)
        self._num_swapped -= len(blocks)
        self._pool.give(blocks)

    # ------------------------------------------------------------ cached blocks

    def find(self, digest: bytes) -> Held | None:
        """The block of that name, if its bytes are here."""
        held = self._held.get(digest)
        return held if held is not None and held.is_here else None

    def admit(self, names: Sequence[BlockName]) -> list[tuple[int, Held]]:
        """Blocks come down: those that get a place, with their index in `names`. They are arriving.

        What is here already is only made young again. Where all that is left is on its way, or swapped, a block gets no
        place.
        """
        new = []
        for i, name in enumerate(names):
            held = self._held.get(name.digest)
            if held is None:
                new.append(i)
            elif not held.in_use:
                self._order.take(held)
                self._order.release(held)
        num_free = self._free(len(new))
        # What was evicted last: of a prefix that is its head.
        return [(i, self._place(names[i])) for i in new[len(new) - num_free :]]

    def _place(self, name: BlockName) -> Held:
        held = self._held[name.digest] = Held(name, self._held.get(name.before), self._pool.take(1)[0])
        if held.parent is not None:
            held.parent.queued = 0  # no leaf any more
        if name.depth:
            self._children.setdefault(name.before, {})[held] = None
        for child in self._children.get(name.digest, ()):  # mostly they came down before
            if child.parent is not None:  # one that is void
                child.parent.num_children -= 1
            child.parent = held
            held.num_children += 1
        self._num_arriving += 1
        if self._order.inserted is not None:
            self._order.inserted(held, _NOBODY)
        return held

    def arrived(self, held: Held) -> None:
        """Its bytes are here: it may be found, and may go."""
        self._num_arriving -= 1
        held.is_here = True
        self._settle(held)

    def lost(self, held: Held) -> None:
        """Its bytes will never come."""
        self._num_arriving -= 1
        self._make_void(held)
        self._settle(held)

    def read(self, held: Held) -> None:
        """A load reads it, and it stays; comes to an end with `unread`."""
        if not held.num_readers:
            self._num_leaving += 1
            self._order.take(held)
        held.num_readers += 1

    def unread(self, held: Held) -> None:
        """A load that read it is over."""
        held.num_readers -= 1
        if not held.num_readers:
            self._num_leaving -= 1
            self._settle(held)

    def hit(self, held: Sequence[Held], req: Request) -> None:
        """`req` found these, head first."""
        self._order.hit(held, req)

    def clear(self) -> None:
        """Forget all cached blocks. Those that are on their way stay until their copies are made."""
        for held in list(self._held.values()):
            if held.in_use:
                self._make_void(held)
        self._evict(self._order.num_evictable)
        for held in list(self._held.values()):  # what stands before those
            self._order.take(held)
            self._make_void(held)
            self._settle(held)

    def _settle(self, held: Held) -> None:
        """Nobody copies to or from it any more."""
        if held.is_void:
            self._order.drop(held)
            self._gone(held)
        else:
            self._order.release(held)

    def _make_void(self, held: Held) -> None:
        """Nobody finds it any more."""
        if not held.is_void:
            held.is_void = True
            del self._held[held.name.digest]
            if self.on_forget is not None:
                self.on_forget([held.block])

    def _gone(self, held: Held) -> None:
        siblings = self._children.get(held.name.before)
        if siblings is not None:
            siblings.pop(held, None)
            if not siblings:
                del self._children[held.name.before]
        self._pool.give([held.block])

    def _free(self, num_blocks: int) -> int:
        """Let cached blocks go until so many are free, or none can go; how many are free, at most `num_blocks`."""
        if num_blocks > self._pool.num_free:
            self._evict(num_blocks - self._pool.num_free)
        return min(num_blocks, self._pool.num_free)

    def _evict(self, num_blocks: int) -> None:
        gone = self._order.evict_leaves(num_blocks)
        for held in gone:
            assert isinstance(held, Held)
            del self._held[held.name.digest]
            self._gone(held)
        if gone and self.on_forget is not None:
            self.on_forget([held.block for held in gone])
