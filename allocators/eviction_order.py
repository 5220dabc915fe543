"""Which cached block goes next: a policy prices blocks, and the order keeps what no policy may break.

    published, in use --release--> evictable --evict--> gone
            ^-------- take --------'

    A - B - C       C: a leaf; only leaves are in the queue, so a child goes before its parent
         \\- D       B is queued when C and D are gone, at the price that it has then

A block that a request owns is in no queue, whatever a policy says of it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from heapq import heapify, heappop, heappush
from typing import Any, ClassVar
from zlib import crc32

from kvarena.engine.contract import NULL_BLOCK
from kvarena.engine.errors import EngineError
from kvarena.engine.request import Request

REFUSED = 0  # the queue of blocks that a policy did not admit; the policy's lanes come behind it


def salt_digest(salt: str) -> int:
    """The digest of the empty prefix under a cache salt: the same in every process."""
    return crc32(salt.encode())


def block_digest(before: int, tokens: list[int]) -> int:
    """The digest of a block behind the prefix of digest `before`: 64 bits, for counts and never for content."""
    return hash((before, *tokens))


class Entry:
    """A published block, as its policy sees it.

    Attributes:
        block: its id; the null block once it is evicted.
        parent: the entry of the block before it; None for a prompt's first.
        num_children: published blocks right behind it.
        in_use: some request owns it.
        digest: of its tokens and all before them; the same when it is computed again. 0 unless the policy `recalls`.
        depth: blocks before it.
        released_at: the number of its last release: within a request the tail's is smaller than the head's.
        queued: `released_at` of its valid record in a queue; 0: it has none.
        lane, uses, last: the policy's own.

    One that is made counts as a child of its parent.
    """

    __slots__ = ("block", "depth", "digest", "in_use", "lane", "last", "num_children", "parent", "queued",
                 "released_at", "uses")  # fmt: skip

    def __init__(self, parent: Entry | None, block: int, digest: int = 0) -> None:
        self.parent = parent
        self.block = block
        self.digest = digest
        self.num_children = self.depth = 0
        if parent is not None:
            self.depth = parent.depth + 1
            parent.num_children += 1
        self.in_use = True
        self.released_at = self.queued = 0
        self.lane = 0
        self.uses = 1
        self.last: float = 0


class EvictionPolicy(ABC):
    """Says which evictable block is worth least. One file, one class; see docs/strategies.md.

    It is told what happens, prices blocks, and changes no more than the `lane`, `uses` and `last` of an entry. Methods
    that a policy does not override are not called, so that they cost nothing.

    Args:
        num_blocks: of the pool.
        block_size: tokens of a block.
        ghosts: blocks that are not cached and that the policy may remember, per block of the pool.

    Attributes:
        recalls: entries get a digest, by which a policy knows a block again that was evicted.
        num_lanes: queues among which `next_lane` chooses; a block stands in the one of its `lane`.
        repriced: set by the policy when prices of queued blocks have changed; the order then asks for all of them.
        needs_future: `foresee` must be called before the first request.
        uses_kinds: it goes by `Request.kind`, and without kinds takes all requests for one.
        move: to be called with an entry after it was given another lane, or another price while it is queued.
        first: to be called with a lane: the entry that goes next of it, or None.
    """

    recalls: ClassVar[bool] = False
    num_lanes: ClassVar[int] = 1
    needs_future: ClassVar[bool] = False
    uses_kinds: ClassVar[bool] = False
    repriced: bool = False
    move: Callable[[Entry], None]
    first: Callable[[int], Entry | None]

    def __init__(self, *, num_blocks: int, block_size: int, ghosts: float) -> None:
        self.num_blocks, self.block_size = num_blocks, block_size
        self.max_ghosts = int(ghosts * num_blocks)

    @abstractmethod
    def price(self, entry: Entry) -> float:
        """What it is worth to keep `entry`; the cheapest leaf goes first, of equals the one released first."""

    def inserted(self, entry: Entry, req: Request) -> None:  # noqa: B027 - most policies need some of these
        """`req` computed the block, and others can find it now."""

    def hit(self, entry: Entry, req: Request) -> None:  # noqa: B027 - most policies need some of these
        """`req` asked for the block and found it (first those at the head of its prompt), or computed it once more."""

    def released(self, entry: Entry) -> None:  # noqa: B027 - most policies need some of these
        """Nobody owns the block any more (first those at the tail of a request); `price` is asked after this."""

    def evicted(self, entry: Entry) -> None:  # noqa: B027 - most policies need some of these
        """The block is gone."""

    def admits(self, entry: Entry) -> bool:  # noqa: ARG002
        """Whether a block that is released, or has become a leaf, is worth a place; else it goes before all others."""
        return True

    def spares(self, entry: Entry) -> bool:  # noqa: ARG002
        """Asked of the block that is to go: True gives it another chance, at the lane and price that it has now."""
        return False

    def next_lane(self) -> int:
        """The lane from which the next block is taken; where it is empty, the first one that is not."""
        return 0

    def foresee(self, prompts: list[tuple[str, list[int]]]) -> None:  # noqa: B027
        """The request ids and digests of all prompts that will come, in their order of arrival."""

    @property
    def num_remembered(self) -> int:
        """Blocks that are remembered beside the cached ones."""
        return 0

    @property
    def num_bytes(self) -> int:
        """Host memory of what is remembered."""
        return 0


Record = tuple[float, int, Entry]  # a price, the release that it is of, and the block


def _own(policy: EvictionPolicy, name: str) -> Callable[..., Any] | None:
    """The policy's method, if it overrides it."""
    inherited = getattr(type(policy), name) is getattr(EvictionPolicy, name)
    return None if inherited else getattr(policy, name)


class EvictionOrder:
    """The queue of evictable blocks under a policy.

    Attributes:
        policy: prices them.
        num_evictable: published blocks that no request owns. All of them can go: whoever owns a block owns those
            before it.
        inserted: to be called with each new entry and the request that owns it; None: the policy need not know.
    """

    def __init__(self, policy: EvictionPolicy) -> None:
        self.policy = policy
        self.num_evictable = 0
        self._queues: list[list[Record]] = [[] for _ in range(1 + policy.num_lanes)]
        # What stands before each queue, if anything does: the parent of the last one that went mostly follows, and need
        # not go through the queue.
        self._heads: list[Record | None] = [None] * len(self._queues)
        self._tick = 0
        self.inserted, self._hit = _own(policy, "inserted"), _own(policy, "hit")
        self._released, self._evicted = _own(policy, "released"), _own(policy, "evicted")
        self._admits, self._spares = _own(policy, "admits"), _own(policy, "spares")
        self._price = policy.price
        policy.move, policy.first = self.move, self.first
        self._next_lane = policy.next_lane if policy.num_lanes > 1 else None

    # ------------------------------------------------------------ what happens to blocks

    def hit(self, entries: Sequence[Entry], req: Request) -> None:
        """`req` found these, head first. One that was preempted and comes back is no new use of what it had."""
        if self._hit is not None and not req.num_preemptions:
            for entry in entries:
                self._hit(entry, req)

    def take(self, entry: Entry) -> None:
        """Somebody owns `entry` now, which nobody did."""
        entry.in_use = True
        entry.queued = 0
        self.num_evictable -= 1

    def release(self, entry: Entry) -> None:
        """Nobody owns `entry` any more."""
        entry.in_use = False
        self._tick = entry.released_at = self._tick + 1
        self.num_evictable += 1
        if self._released is not None:
            self._released(entry)
        if not entry.num_children:
            self._push(entry)

    # ------------------------------------------------------------ eviction

    def evict(self, num_blocks: int) -> list[Entry]:
        """Take `num_blocks` <= num_evictable leaves out, one after the other."""
        gone: list[Entry] = []
        if self.policy.repriced:
            self._reprice()
        forget, spares, price, next_lane = self._evicted, self._spares, self._price, self._next_lane
        queues, heads, asks = self._queues, self._heads, self._admits is not None
        for _ in range(num_blocks):
            number = 1 if next_lane is None else 1 + next_lane()
            head = None if asks else heads[number]
            if head is None or head[2].queued != head[1]:
                entry = self._pop(number)
            elif spares is not None and spares(head[2]):
                heads[number] = None
                self._queue_anew(head[2])
                entry = self._pop(1 if next_lane is None else 1 + next_lane())
            else:
                heads[number], entry = None, head[2]
                entry.queued = 0
            gone.append(entry)
            if forget is not None:
                forget(entry)
            parent = entry.parent
            if parent is None:
                continue
            parent.num_children -= 1
            if parent.num_children or parent.in_use:
                continue
            if asks:
                self._push(parent)
                continue
            # As `_push`, without a call of it.
            parent.queued = parent.released_at
            record, number = (price(parent), parent.released_at, parent), 1 + parent.lane
            if heads[number] is None and (not queues[number] or record < queues[number][0]):
                heads[number] = record
            else:
                self._put(number, record)
        self.num_evictable -= num_blocks
        return gone

    def evict_leaves(self, num_blocks: int) -> list[Entry]:
        """At most `num_blocks`, for whoever owns blocks and not those before them: what stands before these stays."""
        gone: list[Entry] = []
        while len(gone) < num_blocks and self._has_leaf():
            gone += self.evict(1)
        return gone

    def drop(self, entry: Entry) -> None:
        """`entry`, which somebody owned, is gone; nothing that is behind it goes with it."""
        if self._evicted is not None:
            self._evicted(entry)
        parent = entry.parent
        if parent is not None:
            parent.num_children -= 1
            if not parent.num_children and not parent.in_use:
                self._push(parent)

    def _has_leaf(self) -> bool:
        return any(map(self._has_first, range(len(self._queues))))

    def _pop(self, number: int) -> Entry:
        """Take the next block out: one that is refused, one of queue `number`, or any."""
        patience = 2 * self.num_evictable  # a policy that spares for ever is not asked any more
        while True:
            if self._admits is not None and self._has_first(REFUSED):
                number = REFUSED
            elif not self._has_first(number):
                number = self._any_queue()
            head, self._heads[number] = self._heads[number], None
            entry = (heappop(self._queues[number]) if head is None else head)[2]
            entry.queued = 0
            if self._spares is None or patience <= 0 or not self._spares(entry):
                return entry
            patience -= 1
            self._queue_anew(entry)
            number = 1 if self._next_lane is None else 1 + self._next_lane()

    def _any_queue(self) -> int:
        for number in range(len(self._queues)):
            if self._has_first(number):
                return number
        raise EngineError("the prefix cache has no block to evict and counted on one; this is a fault of its index")

    def _has_first(self, number: int) -> bool:
        """Whether a queue has anything, once what is void at its front is gone."""
        head = self._heads[number]
        if head is not None:
            if head[2].queued == head[1]:
                return True
            self._heads[number] = None
        queue = self._queues[number]
        while queue and queue[0][2].queued != queue[0][1]:
            heappop(queue)
        return bool(queue)

    def first(self, lane: int) -> Entry | None:
        """The entry that goes next of a lane; None where it is empty."""
        if not self._has_first(1 + lane):
            return None
        return (self._heads[1 + lane] or self._queues[1 + lane][0])[2]

    def _push(self, entry: Entry) -> None:
        """Queue a leaf that nobody owns."""
        entry.queued = tick = entry.released_at
        refused = self._admits is not None and not self._admits(entry)
        self._put(REFUSED if refused else 1 + entry.lane, (self._price(entry), tick, entry))

    def _put(self, number: int, record: Record) -> None:
        queue, head = self._queues[number], self._heads[number]
        if head is not None:
            if record < head:
                record, self._heads[number] = head, record
        elif not queue or record < queue[0]:
            self._heads[number] = record
            return
        if len(queue) > 64 + 2 * self.num_evictable:  # stale records outnumber the blocks: forget them
            queue[:] = [one for one in queue if one[2].queued == one[1]]
            heapify(queue)
        heappush(queue, record)

    def _queue_anew(self, entry: Entry) -> None:
        self._tick = entry.released_at = self._tick + 1  # what was said of it before is void
        self._push(entry)

    def move(self, entry: Entry) -> None:
        """The policy gave `entry` another lane or price: if it is queued, it is queued anew, as released just now."""
        if entry.queued:
            self._queue_anew(entry)

    def _reprice(self) -> None:
        self.policy.repriced = False
        records = [record for queue in self._queues for record in queue]
        records += [head for head in self._heads if head is not None]
        self._heads = [None] * len(self._heads)
        for queue in self._queues:
            queue.clear()
        for _, tick, entry in records:
            if entry.queued == tick:
                self._push(entry)


def forgotten(entry: Entry) -> bool:
    """Whether `entry` was evicted."""
    return entry.block == NULL_BLOCK
