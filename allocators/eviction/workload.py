"""Reuse by kind of request (Wang et al., KVCache Cache in the Wild, USENIX ATC'25): the least likely block goes first.

    priority = (chance that the block is used again within `life`, - depth)

    chance      share of a kind's blocks
      |\\          that are used again              F: exponential, of each kind its own
      | \\___     x (F(t + life) - F(t))            t: since the last use
      +------- t

Requests of one kind, a type and a turn say, are used again alike, and other kinds otherwise. The paper fits the
distributions to a sample of the last hours in the background and takes `life` as given; here both are learnt as
requests come: from blocks that are found, and from ghosts, which tell of those that were evicted too early.
"""

from __future__ import annotations

from math import exp
from typing import Any

from kvarena.allocators.eviction_order import Entry, EvictionPolicy
from kvarena.allocators.ghosts import Ghosts
from kvarena.engine.contract import check_number
from kvarena.engine.request import Request

MOST_KINDS = 64  # all others are one more
MEMORY = 4  # after so many pools of a kind's blocks what was counted of it counts half
DOUBT = 64.0  # blocks for which a kind is taken to be as all together
LIFE_SHARE = 0.02  # of blocks that go together in the mean time that blocks are kept
# A ghost is its kind, from 1, and behind it the time of its last use.
_KIND_BITS = 7
_TICKS = 1000  # a second
GHOST_BYTES = 32  # of such a number, beside what a ghost has


class _Counts:
    """What is known of a kind's blocks: how many were used, how many of these again, and the seconds in between."""

    __slots__ = ("again", "seconds", "used")

    def __init__(self) -> None:
        self.used = self.again = self.seconds = 0.0

    def add(self, used: float, again: float, seconds: float, most: float) -> None:
        """Count blocks; with more than `most` all that was counted counts half."""
        self.used, self.again, self.seconds = self.used + used, self.again + again, self.seconds + seconds
        if self.used > most:
            self.used, self.again, self.seconds = self.used / 2, self.again / 2, self.seconds / 2


def _ghost(entry: Entry) -> int:
    return int(entry.last * _TICKS) << _KIND_BITS | entry.lane + 1


class WorkloadPolicy(EvictionPolicy):
    """The block that its kind of request is least likely to use again goes first; of one use the tail before the head.

    It needs kinds of requests from the workload (`Request.kind`). Without them all are of one kind, and it is LRU. Time
    is that of arrivals, in seconds; where all requests arrive at once none passes, and kinds alone decide.

    Args:
        life: seconds in which a block must be used again to be worth its place; 0: as long as blocks are kept, which
            is learnt.
        sizes: see EvictionPolicy.

    Attributes:
        kinds: the kinds that came, by their lanes.
    """

    recalls = True
    uses_kinds = True
    num_lanes = MOST_KINDS + 1

    def __init__(self, *, life: float = 0.0, **sizes: Any) -> None:
        super().__init__(**sizes)
        self._life = check_number("allocator.eviction_options.life", life)
        self._kept = 0.0  # mean seconds between a block's last use and its eviction
        self.kinds: dict[str, int] = {}
        self._counts: list[_Counts] = []
        self._all = _Counts()
        self._ghosts = Ghosts(self.max_ghosts)
        self._now = 0.0
        # Of the request whose blocks come: itself, its kind, and its blocks so far.
        self._req: Request | None = None
        self._kind = self._num_used = 0
        # Blocks that were used together go together: their lane, last use and ghosts; is another lane to be chosen?
        self._lane = self._ghost = 0
        self._last, self._is_due = -1.0, True

    # ---- what happens to blocks

    def inserted(self, entry: Entry, req: Request) -> None:
        if req is not self._req:
            self._begin(req)
        if ghost := self._ghosts.recall(entry.digest):
            kind, last = (ghost & (2**_KIND_BITS - 1)) - 1, (ghost >> _KIND_BITS) / _TICKS
            self._count_again(kind, self._now - last)
        entry.lane, entry.last = self._kind, self._now
        self._num_used += 1

    def hit(self, entry: Entry, req: Request) -> None:
        if req is not self._req:
            self._begin(req)
        self._count_again(entry.lane, self._now - entry.last)
        entry.lane, entry.last = self._kind, self._now
        self._num_used += 1

    def price(self, entry: Entry) -> float:
        return entry.last

    def evicted(self, entry: Entry) -> None:
        if entry.last != self._last or entry.lane != self._lane:
            self._is_due = True
            self._ghosts.remember(entry.digest, _ghost(entry))
            return
        self._ghosts.remember(entry.digest, self._ghost)
        parent = entry.parent
        if parent is None or parent.last != self._last or parent.num_children > 1 or parent.lane != self._lane:
            self._is_due = True  # it is not the next one

    # ---- kinds

    def _begin(self, req: Request) -> None:
        """The next blocks are those of `req`."""
        self._settle()
        self._req, self._is_due = req, True
        self._now = max(self._now, req.arrival_time)
        kind = self.kinds.get(req.kind, MOST_KINDS)
        if kind == MOST_KINDS and len(self.kinds) < MOST_KINDS:
            kind = self.kinds[req.kind] = len(self.kinds)
        while len(self._counts) <= min(kind, len(self.kinds)):
            self._counts.append(_Counts())
        self._kind = kind

    def _settle(self) -> None:
        """Count the blocks that the last request used."""
        if self._num_used:
            self._counts[self._kind].add(self._num_used, 0, 0, MEMORY * self.num_blocks)
            self._all.add(self._num_used, 0, 0, MEMORY * self.num_blocks)
            self._num_used = 0

    def _count_again(self, kind: int, seconds: float) -> None:
        counts = self._counts[kind]
        counts.again += 1
        counts.seconds += seconds
        counts = self._all
        counts.again += 1
        counts.seconds += seconds

    # ---- which goes first

    def next_lane(self) -> int:
        if self._is_due:
            self._choose()
        return self._lane

    def _choose(self) -> None:
        self._settle()
        firsts = [entry for lane in range(len(self._counts)) if (entry := self.first(lane)) is not None]
        if not firsts:
            return
        entry = min(firsts, key=lambda one: (self.chance(one.lane, self._now - one.last), one.last, -one.depth))
        self._lane, self._last, self._ghost, self._is_due = entry.lane, entry.last, _ghost(entry), False
        self._kept += LIFE_SHARE * (self._now - entry.last - self._kept)

    def chance(self, kind: int, seconds: float) -> float:
        """That a block is used again within `life`, if a request of this kind used it last so many seconds ago."""
        mine, others = self._counts[kind], self._all
        if not others.again:
            return 0.0
        share = (mine.again + DOUBT * others.again / others.used) / (mine.used + DOUBT)
        mean = (mine.seconds + DOUBT * others.seconds / others.again) / (mine.again + DOUBT)
        life = self._life or self._kept
        if not mean:
            return share if not seconds else 0.0
        return share * (exp(-seconds / mean) - (exp(-(seconds + life) / mean) if life else 0.0))

    @property
    def num_remembered(self) -> int:
        return len(self._ghosts)

    @property
    def num_bytes(self) -> int:
        return self._ghosts.num_bytes + GHOST_BYTES * len(self._ghosts)
