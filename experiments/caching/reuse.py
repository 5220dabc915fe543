"""How long ago the blocks that a prompt asks for were last held, in seconds and in different blocks held since.

    prompt   |  in use  |  left at 12.0 s  |  left at 3.5 s  |  never held  |
             0          a                  b                 c       stretches: blocks that were left together

A block that is asked for is held, or was left when its last owner went: with it the tail of that owner's blocks, so
that what a prompt has in common with others falls into few stretches. Between a block's leaving and its being asked
for stand the blocks that were held at any time since: those that are in use now, those that were left later, and those
of its own stretch before it. With nothing in use that is LRU's stack distance (Mattson et al., Evaluation techniques
for storage hierarchies, IBM Systems Journal, 1970): a cache of more blocks than that finds it.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from kvarena.experiments.caching.optimum import Ask, Event, Grow, Keys, Leave

NEVER, IN_USE = -1, -2  # in place of the number of a leaving
NAN = float("nan")

# Of each stretch: the row that asks, its first block in the prompt, its blocks, which of them were found and which MIN
# finds, seconds since they were left (0: in use; NaN: never held), and blocks held since, of the first one (-1: in use
# or never held).
COLUMNS = {
    "row": "q", "start": "q", "num_blocks": "q", "num_found": "q", "num_optimal": "q", "seconds": "d", "num_since": "q",
}  # fmt: skip


def reuse_stretches(
    events: Sequence[Event], optimal: NDArray[np.int64], num_keys: int
) -> dict[str, NDArray[np.int64] | NDArray[np.float64]]:
    """The stretches of all that was asked for and counts, in order, as COLUMNS.

    Args:
        events: see `optimal_hits`; asks and leaves have times.
        optimal: blocks that MIN finds, by row.
        num_keys: keys are below this.
    """
    num_leaves = sum(isinstance(event, Leave) for event in events)
    return _Stretches(num_keys, num_leaves, optimal).replay(events)


class _Stretches:
    def __init__(self, num_keys: int, num_leaves: int, optimal: NDArray[np.int64]) -> None:
        self._owners = np.zeros(num_keys, dtype=np.int32)
        self._left_in = np.full(num_keys, NEVER, dtype=np.int64)  # the number of a block's last leaving
        self._num_owned = 0
        self._chains: dict[int, list[Keys]] = {}
        self._times: list[float] = []  # of leavings
        self._first: list[int] = []  # of each, the first block in its prompt that nobody has taken since
        self._staying = _Sums(num_leaves)  # of each, how many
        self._optimal = optimal
        self._columns: dict[str, array[int] | array[float]] = {name: array(code) for name, code in COLUMNS.items()}

    def replay(self, events: Sequence[Event]) -> dict[str, NDArray[np.int64] | NDArray[np.float64]]:
        for event in events:
            if isinstance(event, Ask):
                if event.num_wanted:
                    self._tell(event)
                self._chains[event.row] = [event.keys]
                self._take(event.keys, 0)
            elif isinstance(event, Grow):
                parts = self._chains.setdefault(event.row, [])
                self._take(event.keys, sum(map(len, parts)))
                parts.append(event.keys)
            elif isinstance(event, Leave) and (parts := self._chains.pop(event.row, [])):
                self._leave(np.concatenate(parts), event.time)
        return {name: np.array(column) for name, column in self._columns.items()}

    def _runs(self, keys: Keys) -> list[tuple[int, int, int]]:
        """Begin, end and leaving of the stretches of `keys`."""
        if not len(keys):
            return []
        left_in = np.where(self._owners[keys] > 0, IN_USE, self._left_in[keys])
        ends = [*(np.flatnonzero(np.diff(left_in)) + 1).tolist(), len(keys)]
        return [(begin, end, int(left_in[begin])) for begin, end in zip([0, *ends], ends, strict=False)]

    def _tell(self, ask: Ask) -> None:
        optimal = int(self._optimal[ask.row])
        for begin, end, leaving in self._runs(ask.keys[: ask.num_wanted]):
            seconds, since = NAN, -1
            if leaving == IN_USE:
                seconds = 0.0
            elif leaving != NEVER:
                seconds, since = ask.time - self._times[leaving], self._num_owned + self._staying.after(leaving)
            found, most = (min(max(0, number - begin), end - begin) for number in (ask.num_found, optimal))
            values = (ask.row, begin, end - begin, found, most, seconds, since)
            for column, value in zip(self._columns.values(), values, strict=True):
                column.append(value)  # type: ignore[arg-type]

    def _take(self, keys: Keys, start: int) -> None:
        """Somebody owns `keys`, which stand in its text from block `start` on."""
        for begin, end, leaving in self._runs(keys):
            if leaving == IN_USE:
                continue
            self._num_owned += end - begin
            if leaving != NEVER:
                # The rest of what was left there lies behind it.
                assert self._first[leaving] == start + begin
                self._first[leaving] = start + end
                self._staying.add(leaving, begin - end)
        self._owners[keys] += 1

    def _leave(self, keys: Keys, time: float) -> None:
        self._owners[keys] -= 1
        alone = np.flatnonzero(self._owners[keys] == 0)
        number = len(self._times)
        self._times.append(time)
        # Others own a prefix of it, or nothing.
        self._first.append(len(keys) - len(alone))
        self._left_in[keys[alone]] = number
        self._num_owned -= len(alone)
        self._staying.add(number, len(alone))


class _Sums:
    """Numbers at places, and the sum of all behind a place (Fenwick, 1994)."""

    def __init__(self, size: int) -> None:
        self._tree = [0] * (size + 1)
        self._total = 0

    def add(self, place: int, number: int) -> None:
        tree, at, size = self._tree, place + 1, len(self._tree)
        self._total += number
        while at < size:
            tree[at] += number
            at += at & -at

    def after(self, place: int) -> int:
        tree, at, before = self._tree, place + 1, 0
        while at:
            before += tree[at]
            at &= at - 1
        return self._total - before
