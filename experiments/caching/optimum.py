"""What no prefix cache can exceed: Belady's MIN with bypass, for one order of accesses.

    asked     leaves       asked again      a block from one owner's end to the next one's begin is an interval:
      |  owned  |--------------|            one hit, one place. MIN keeps as many intervals as fit

At each moment so many evictable blocks fit as requests leave (`room`). Where more intervals are open than fit, the one
that ends last is given up; nothing is better, for the others end before it and take no more room (intervals of equal
weight on places that come and go: the greedy choice is exact). A block is asked for whenever one behind it is, so its
interval ends no later than theirs: giving up the last, of equals the deepest, leaves prefixes whole, and hits of a
prefix are hits of its blocks. So the bound in blocks is exact for the order in which requests were admitted.

What it takes as given, and where it is generous: the order, who owned what meanwhile, and that a request's blocks are
there for others as soon as it was admitted (a real one publishes them when they are computed).

Source: L. A. Belady, A study of replacement algorithms for a virtual-storage computer, IBM Systems Journal, 1966.
"""

from __future__ import annotations

from collections.abc import Sequence
from heapq import heappop, heappush
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Keys = NDArray[np.int64]
NEVER = np.iinfo(np.int64).max


class Ask(NamedTuple):
    """Request `row` is admitted, and owns the blocks `keys` from now on.

    Attributes:
        row: of the request; it owns nothing when it asks.
        keys: of its prompt's full blocks, in order: equal numbers are equal blocks behind equal prefixes.
        num_wanted: so many of them can be hits; the others are computed in any case (a hit never covers a whole
            prompt). 0 where nobody counts: a preempted request that comes back.
        num_found: so many of them the cache had.
        time: in seconds.
    """

    row: int
    keys: Keys
    num_wanted: int
    num_found: int = 0
    time: float = 0.0


class Grow(NamedTuple):
    """Request `row` owns further blocks, which it has computed."""

    row: int
    keys: Keys


class Leave(NamedTuple):
    """Request `row` owns nothing any more, since `time` in seconds."""

    row: int
    time: float = 0.0


class Room(NamedTuple):
    """Requests' tables hold `num_entries` blocks now, shared ones once for each of their owners."""

    num_entries: int


Event = Ask | Grow | Leave | Room


def optimal_hits(events: Sequence[Event], num_blocks: int, num_keys: int, num_rows: int) -> NDArray[np.int64]:
    """Blocks that MIN finds for each request.

    Args:
        events: in order. Each `Room` is a moment in which what is kept must fit; without any, tables are taken to hold
            the keys alone, and it must fit at all times.
        num_blocks: of the pool.
        num_keys, num_rows: keys and rows are below these.
    """
    return _Optimum(num_blocks, num_keys, num_rows).replay(events, _next_asks(events, num_keys))


def _next_asks(events: Sequence[Event], num_keys: int) -> dict[int, tuple[Keys, Keys]]:
    """For each `Leave`, by its place: the blocks that the request owned, and the place at which each is a hit next."""
    owned: dict[int, list[Keys]] = {}
    at_leave: list[tuple[int, Keys]] = []
    for place, event in enumerate(events):
        if isinstance(event, Ask):
            owned[event.row] = [event.keys]
        elif isinstance(event, Grow):
            owned.setdefault(event.row, []).append(event.keys)
        elif isinstance(event, Leave) and (parts := owned.pop(event.row, None)):
            at_leave.append((place, np.concatenate(parts)))
    wanted_at = np.full(num_keys, NEVER, dtype=np.int64)
    found: dict[int, tuple[Keys, Keys]] = {}
    for place in range(len(events) - 1, -1, -1):
        event = events[place]
        if isinstance(event, Ask):
            wanted_at[event.keys] = NEVER  # computed here, whoever kept it
            wanted_at[event.keys[: event.num_wanted]] = place
        elif isinstance(event, Grow):
            wanted_at[event.keys] = NEVER
        elif isinstance(event, Leave) and at_leave and at_leave[-1][0] == place:
            keys = at_leave.pop()[1]
            found[place] = keys, wanted_at[keys]
    return found


class _Optimum:
    def __init__(self, num_blocks: int, num_keys: int, num_rows: int) -> None:
        self._num_blocks = num_blocks
        self._owners = np.zeros(num_keys, dtype=np.int32)
        self._kept = np.zeros(num_keys, dtype=np.int64)  # the run in which a block is kept; 0: it is not
        self._num_kept = self._num_owned = self._num_owners = 0
        self._num_entries: int | None = None
        self._num_runs = 0
        # Runs of blocks that are wanted at the same place, the last and deepest first.
        self._runs: list[tuple[int, int, int, Keys]] = []
        self._hits = np.zeros(num_rows, dtype=np.int64)

    def replay(self, events: Sequence[Event], leaving: dict[int, tuple[Keys, Keys]]) -> NDArray[np.int64]:
        for place, event in enumerate(events):
            if isinstance(event, Room):
                self._num_entries = event.num_entries
            elif isinstance(event, Ask):
                self._ask(event)
            elif isinstance(event, Grow):
                self._own(event.keys)
            elif place in leaving:
                self._leave(*leaving[place])
            # What tables hold is known as of the last `Room`: with any, only then it is known what fits.
            if self._num_entries is None or isinstance(event, Room):
                self._fit()
        return self._hits

    def _ask(self, ask: Ask) -> None:
        wanted = ask.keys[: ask.num_wanted]
        there = (self._owners[wanted] > 0) | (self._kept[wanted] > 0)
        missing = np.flatnonzero(~there)
        self._hits[ask.row] += len(wanted) if not len(missing) else missing[0]
        self._own(ask.keys)

    def _own(self, keys: Keys) -> None:
        self._num_kept -= int(np.count_nonzero(self._kept[keys]))
        self._kept[keys] = 0
        self._num_owned += int(np.count_nonzero(self._owners[keys] == 0))
        self._owners[keys] += 1
        self._num_owners += len(keys)

    def _leave(self, keys: Keys, wanted_at: Keys) -> None:
        self._owners[keys] -= 1
        self._num_owners -= len(keys)
        alone = self._owners[keys] == 0
        self._num_owned -= int(np.count_nonzero(alone))
        places = np.flatnonzero(alone & (wanted_at < NEVER))
        if not len(places):
            return
        breaks = np.flatnonzero((np.diff(wanted_at[places]) != 0) | (np.diff(places) != 1)) + 1
        for run in np.split(places, breaks):
            self._num_runs += 1
            self._kept[keys[run]] = self._num_runs
            heappush(self._runs, (-int(wanted_at[run[0]]), -int(run[0]), self._num_runs, keys[run]))
        self._num_kept += len(places)

    def _fit(self) -> None:
        """Give up what is wanted last, until the rest fits beside what requests own."""
        # Tables as they were, less the copies that sharing saves: a block with two owners takes one place.
        entries = self._num_owners if self._num_entries is None else self._num_entries
        room = self._num_blocks - self._num_owned - max(0, entries - self._num_owners)
        while self._num_kept > max(0, room):
            when, depth, run, keys = heappop(self._runs)
            held = np.flatnonzero(self._kept[keys] == run)
            surplus = min(len(held), self._num_kept - max(0, room))
            if not surplus:
                continue
            self._kept[keys[held[len(held) - surplus :]]] = 0
            self._num_kept -= surplus
            if surplus < len(held):
                heappush(self._runs, (when, depth, run, keys[held[: len(held) - surplus]]))
