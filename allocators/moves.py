"""What goes between a prefix cache's pool and the level below it, from its order to its arrival.

    evict -> down --------(arrives)--> found in the level
    admit -> up: the level's blocks -> the request's own --(arrives)--> computed, published
                                                '--(freed meanwhile)--> nobody's until they have arrived

Transfers of one direction arrive in the order in which they were begun.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from kvarena.allocators.block_names import BlockName, block_name, root_digest
from kvarena.allocators.host_level import Held, HostLevel
from kvarena.engine.contract import NULL_BLOCK, BlockCopy, CopyKind, Transfer
from kvarena.engine.request import Request

Order = Callable[[CopyKind, Sequence[int], Sequence[int], Transfer | None], None]


@dataclass(slots=True, eq=False)
class Move:
    """Blocks under way in one transfer.

    Attributes:
        held: in the level.
        req: whose they will be; None: they go down, or nobody's.
        first: index of the first one in the request's table.
        landing: blocks of the pool that are nobody's until they have arrived.
        transfer: says when.
    """

    held: list[Held]
    req: Request | None = None
    first: int = 0
    landing: list[int] = field(default_factory=list)
    transfer: Transfer = field(default_factory=Transfer)


class Moves:
    """Names published blocks, sends evicted ones down and brings found ones up.

    Args:
        level: below the pool.
        block_size: tokens of a block.
        order: orders copies of the runner: kind, sources, targets, transfer.
    """

    def __init__(self, level: HostLevel, block_size: int, order: Order) -> None:
        self.level = level
        self._size = block_size
        self._order = order
        self._names: dict[int, BlockName] = {}  # of published blocks
        self._downs: deque[Move] = deque()
        self._ups: deque[Move] = deque()
        self._loads: dict[Request, Move] = {}
        self._found: tuple[Request | None, list[Held]] = (None, [])  # for `up`, right after `pin`

    @property
    def is_moving(self) -> bool:
        """Whether anything is under way."""
        return bool(self._downs or self._ups)

    @property
    def landing(self) -> list[int]:
        """Blocks of the pool that are nobody's until they have arrived."""
        return [block for move in self._ups for block in move.landing]

    def next_arrival(self) -> float | None:
        """When the next blocks come up; the past where nobody knows."""
        if not self._ups:
            return None
        arrival = self._ups[0].transfer.arrival
        return float("-inf") if arrival is None else arrival

    # ------------------------------------------------------------ down

    def name(self, req: Request, table: Sequence[int], start: int, stop: int) -> None:
        """Blocks [start, stop) of `req`'s table were published."""
        names, size = self._names, self._size
        before = names[table[start - 1]].digest if start else root_digest(req.cache_salt)
        tokens = req.identities(start * size, stop * size)
        for i in range(start, stop):
            known = names.get(table[i])
            if known is None:
                known = names[table[i]] = block_name(before, i, tokens[(i - start) * size : (i - start + 1) * size])
            before = known.digest

    def down(self, blocks: Sequence[int]) -> tuple[list[int], list[int]]:
        """The pool evicted these; they can be written again by whatever is ordered after this.

        Returns:
            Those that go down, and their places there.
        """
        admitted = self.level.admit([self._names.pop(block) for block in blocks])
        sources, places = [blocks[i] for i, _ in admitted], [held.block for _, held in admitted]
        if admitted:
            move = Move([held for _, held in admitted])
            self._downs.append(move)
            self._order(CopyKind.SWAP_OUT, sources, places, move.transfer)
        return sources, places

    def forget(self, blocks: Iterable[int]) -> None:
        """The pool evicted these, and they go nowhere."""
        for block in blocks:
            del self._names[block]

    # ------------------------------------------------------------ up

    def pin(self, req: Request, hits: Sequence[int]) -> list[Held]:
        """What the level holds behind `hits`, the blocks that the pool found for `req`: it stays until `unpin`."""
        before = self._names[hits[-1]].digest if hits else root_digest(req.cache_salt)
        size, found = self._size, []
        for i in range(len(hits), (req.num_tokens - 1) // size):
            name = block_name(before, i, req.identities(i * size, (i + 1) * size))
            held = self.level.find(name.digest)
            if held is None:
                break
            self.level.read(held)
            found.append(held)
            before = name.digest
        self._found = req, found
        return found

    def unpin(self, pinned: Iterable[Held]) -> None:
        """What was pinned may go, if nobody else reads it."""
        for held in reversed(list(pinned)):
            self.level.unread(held)

    def up(self, req: Request, table: Sequence[int], first: int) -> int:
        """Begin to load what `pin` found for `req`, whose first such block is number `first`; how many blocks."""
        asked, held = self._found
        self._found = None, []
        if asked is not req or not held:
            return 0
        for one in held:
            self.level.read(one)
        self.level.hit(held, req)
        move = self._loads[req] = Move(held, req, first)
        self._ups.append(move)
        targets = table[first : first + len(held)]
        self._order(CopyKind.SWAP_IN, [one.block for one in held], targets, move.transfer)
        return len(held)

    def leave(self, req: Request, table: list[int], copies: list[BlockCopy]) -> list[BlockCopy]:
        """`req` gives its table back: what is on its way into that is nobody's, and leaves the table.

        Returns:
            `copies`, which are not begun, less those of a load that is not.
        """
        move = self._loads.pop(req, None)
        if move is None:
            return copies
        left = [copy for copy in copies if copy.transfer is not move.transfer]
        if len(left) < len(copies):
            self._ups.remove(move)
            self.unpin(move.held)
            return left
        stop = move.first + len(move.held)
        move.req, move.landing = None, table[move.first : stop]
        table[move.first : stop] = [NULL_BLOCK] * len(move.held)
        return left

    # ------------------------------------------------------------ arrivals

    def arrive(self, now: float) -> list[Move]:
        """Take in what has arrived; the moves that went up."""
        for move in _pop_due(self._downs, now):
            for held in move.held:
                self.level.arrived(held)
        ups = _pop_due(self._ups, now)
        for move in ups:
            self._end(move)
        return ups

    def abandon(self, copies: Iterable[BlockCopy]) -> list[Move]:
        """See `KVAllocator.abandon`; the moves that went up."""
        gone = {copy.transfer for copy in copies if copy.transfer is not None and copy.transfer.arrival is None}
        for move in [move for move in self._downs if move.transfer in gone]:
            self._downs.remove(move)
            for held in move.held:
                self.level.lost(held)
        ups = [move for move in self._ups if move.transfer in gone]
        for move in ups:
            self._ups.remove(move)
            self._end(move)
        return ups

    def _end(self, move: Move) -> None:
        """Nothing is read for `move` any more. Tails first, as requests give blocks back."""
        self.unpin(move.held)
        if move.req is not None:
            del self._loads[move.req]


def _pop_due(queue: deque[Move], now: float) -> list[Move]:
    due = []
    while queue and queue[0].transfer.arrival is not None and queue[0].transfer.arrival <= now:
        due.append(queue.popleft())
    return due
