"""The memory ledger: every step, every slot of the pool is in exactly one class.

    |<---------------------------------- pool ---------------------------------->|
    | token states | reservation | internal | external | shortage | cached | free |
    |<------------- owned ----------------->|

A residency lasts from admission (not from the first step that computes something) until the slots are given back. An
owned, empty slot is *reservation* if the request fills it later in this residency, and *internal fragmentation* if it
never does. That is known only when the residency ends, so the ledger keeps each residency's growth and settles it
then: a residency that owned `s` slots from some step on and filled `f` in the end wasted max(0, s - f) of them in
each of those steps. A step that was launched counts as computed, whatever became of it.

What nobody owns is, by the request at the head of the queue, *shortage*, *external fragmentation* or *free*: see
`KVUsage`; the allocators count it.

Source of the classes: PagedAttention (Kwon et al., SOSP'23), section 3.1 and Figure 2.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from kvarena.engine.classes import CLASSES
from kvarena.engine.contract import KVUsage, LevelUsage, StepPlan
from kvarena.engine.errors import EngineError
from kvarena.engine.request import Request, RequestStatus


def check_usage(usage: KVUsage) -> None:
    """Raise EngineError unless the raw counts are non-negative and add up to the pool."""
    parts = usage.owned + usage.external + usage.shortage + usage.cached + usage.free
    if parts != usage.total or min(usage) < 0 or usage.computed > usage.owned:
        raise EngineError(
            f"the KV ledger does not add up: owned {usage.owned} + external {usage.external} + shortage "
            f"{usage.shortage} + cached {usage.cached} + free {usage.free} = {parts} of {usage.total} slots, "
            f"{usage.computed} computed; this is a bug of the allocator"
        )


def check_levels(levels: Sequence[LevelUsage]) -> None:
    """Raise EngineError unless the books of each level below the pool are non-negative and add up to it."""
    for level in levels:
        total, *parts = level
        if sum(parts) != total or min(level) < 0:
            counts = " + ".join(f"{name} {count}" for name, count in zip(level._fields[1:], parts, strict=True))
            raise EngineError(
                f"the books of the level below the KV pool do not add up: {counts} = {sum(parts)} of {total} blocks; "
                "this is a bug of the allocator"
            )


class Ledger(Protocol):
    """What an engine tells of every step."""

    def observe(self, plan: StepPlan, usage: KVUsage) -> None:
        """A step was planned: its slots are allocated, and nothing is freed yet."""
        ...

    def observe_levels(self, levels: Sequence[LevelUsage]) -> None:
        """The books of the levels below the pool, in that step."""
        ...


class StepCheck:
    """A ledger without a past, for an engine that serves: each step must add up, and one that does not is told of.

    Args:
        on_violation: called with one line for each.
    """

    def __init__(self, on_violation: Callable[[str], None]) -> None:
        self._on_violation = on_violation

    def observe(self, plan: StepPlan, usage: KVUsage) -> None:  # noqa: ARG002 - of a ledger
        """Check a step."""
        self.check(usage)

    def observe_levels(self, levels: Sequence[LevelUsage]) -> None:
        """Check the books of a step."""
        try:
            check_levels(levels)
        except EngineError as error:
            self._on_violation(str(error))

    def check(self, usage: KVUsage) -> None:
        """Check the counts of any moment."""
        try:
            check_usage(usage)
        except EngineError as error:
            self._on_violation(str(error))

    def check_idle(self, usage: KVUsage) -> None:
        """Check the counts of an engine without a request: nobody is there who could own a slot."""
        self.check(usage)
        if usage.owned:
            self._on_violation(f"{usage.owned} of {usage.total} slots are owned, and there is no request: they leaked")


class MemoryLedger:
    """Observes steps and splits the pool into the `CLASSES` of `kvarena.engine.classes`, in slots.

    Memory: a few integers per step and per live request.
    """

    def __init__(self) -> None:
        self._columns = {name: array("q") for name in (*KVUsage._fields, "held")}
        # The residencies that are open, by request: (step, slots) pairs; from that step on it owned so many slots.
        self._growth: dict[Request, list[tuple[int, int]]] = {}
        self._slots: dict[Request, int] = {}  # what each of them owned when it was last seen
        self._computed: list[int] = []  # and, in the same order, its computed tokens after the last step
        self._waste_delta: dict[int, int] = {}
        self.num_steps = 0

    def take(self) -> LedgerPart:
        """What was observed since the last call. Memory then holds the open residencies alone."""
        columns = {name: np.array(column, dtype=np.int64) for name, column in self._columns.items()}
        self._columns = {name: array("q") for name in self._columns}
        waste, self._waste_delta = self._waste_delta, {}
        still_open: dict[int, int] = {}
        for req, computed in zip(self._slots, self._computed, strict=True):
            _book(still_open, self._growth[req], self.num_steps, computed)
        return LedgerPart(columns, waste, still_open)

    def observe(self, plan: StepPlan, usage: KVUsage) -> None:
        """Account for one planned step; call between `schedule()` and `update()`, when nothing is freed yet.

        Raises:
            EngineError: `usage` does not add up.
        """
        check_usage(usage)
        step, slots = self.num_steps, self._slots
        # Whole lists are read and compared at once: most steps change no request's slots, and whoever runs hundreds of
        # requests must not wait for a loop over them.
        before, now = list(slots.values()), [req.num_slots for req in slots]
        if plan.admitted or plan.preempted or now != before:
            seen = zip(slots, before, now, self._computed, strict=True)
            self._follow(step, plan, [(req, count, computed) for req, was, count, computed in seen if count != was])
        for req, start, _ in plan.scheduled[plan.num_decodes :]:
            if req not in slots:  # of a scheduler that tells nobody whom it admits
                self._grow(req, start, step)
        for name, value in zip(KVUsage._fields, usage, strict=True):
            self._columns[name].append(value)
        held, finished = 0, RequestStatus.FINISHED
        if len(plan.scheduled) < len(slots):  # else all of them run
            held = sum([req.num_slots for req in slots if req.status is finished])
        self._columns["held"].append(held)
        self._computed = [req.num_computed_tokens for req in slots]
        self.num_steps += 1

    def observe_levels(self, levels: Sequence[LevelUsage]) -> None:
        """See `Ledger`. Raises EngineError where they do not add up."""
        check_levels(levels)

    def _follow(self, step: int, plan: StepPlan, changed: list[tuple[Request, int, int]]) -> None:
        """Open, grow and settle residencies. Whoever is admitted had ended an earlier one.

        Args:
            step: number of this step.
            plan: what it computes.
            changed: those whose slots changed, with their slots now and the tokens that they had computed before.
        """
        slots = self._slots
        ended = [req for req in dict.fromkeys((*plan.preempted, *plan.admitted)) if req in slots]
        if ended:
            computed_of = dict(zip(slots, self._computed, strict=True))
            for req in ended:
                self._settle(req, step, computed_of[req])
        for req, count, computed in changed:
            if req in slots:
                if count:
                    self._grow(req, computed, step)
                else:
                    self._settle(req, step, computed)
        for req in plan.admitted:
            self._grow(req, 0, step)

    def _grow(self, req: Request, computed: int, step: int) -> None:
        """`req` owns another number of slots from `step` on; it had `computed` tokens before."""
        self._slots[req] = req.num_slots
        growth = self._growth.get(req)
        if growth is None:
            self._growth[req] = [(step, req.num_slots)]
        elif req.num_slots > growth[-1][1]:
            # What is filled already cannot be wasted: earlier growth below that is settled.
            self._growth[req] = [entry for entry in growth if entry[1] > computed] + [(step, req.num_slots)]

    def _settle(self, req: Request, end: int, num_filled: int) -> None:
        """End the residency of `req`: book what it owned and never filled, over the steps [its growth, end)."""
        del self._slots[req]
        _book(self._waste_delta, self._growth.pop(req), end, num_filled)

    def settle(self) -> dict[str, np.ndarray]:
        """Close the books: per step, the slots of each class.

        Returns:
            int64 arrays of length `num_steps`: the `CLASSES`, which add up to `total`; and beside them `total`,
            `shared_saved` (slots that sharing saved) and `held` (part of the owned slots: those that finished
            requests still hold, see the static scheduler).

        Raises:
            EngineError: the classes do not add up.
        """
        for req, computed in zip(list(self._slots), self._computed, strict=True):
            self._settle(req, self.num_steps, computed)
        delta = np.zeros(self.num_steps + 1, dtype=np.int64)
        for step, wasted in self._waste_delta.items():
            delta[step] += wasted
        raw = {name: np.array(column, dtype=np.int64) for name, column in self._columns.items()}
        return into_classes(raw, np.cumsum(delta)[: self.num_steps])


class LedgerPart(NamedTuple):
    """Some steps of a ledger that is taken piece by piece. Steps count from the ledger's first.

    Attributes:
        columns: the raw counts of the steps since the last part, and `held`: int64.
        waste: step -> slots by which the internal fragmentation changes there; of earlier steps too, whose residencies
            have ended since. The changes of all parts add up.
        still_open: the same of the residencies that are open, as if they ended now; the next part's takes its place.
    """

    columns: dict[str, np.ndarray]
    waste: dict[int, int]
    still_open: dict[int, int]


def _book(delta: dict[int, int], growth: list[tuple[int, int]], end: int, num_filled: int) -> None:
    """Add to `delta` what a residency owned and never filled, over the steps [its growth, end)."""
    steps = [step for step, _ in growth[1:]] + [end]
    for (begin, slots), until in zip(growth, steps, strict=True):
        wasted = slots - num_filled
        if wasted > 0 and until > begin:
            delta[begin] = delta.get(begin, 0) + wasted
            delta[until] = delta.get(until, 0) - wasted


def into_classes(raw: Mapping[str, np.ndarray], internal: np.ndarray) -> dict[str, np.ndarray]:
    """Split the raw counts of steps, given the internal fragmentation of each; see `MemoryLedger.settle`.

    Raises:
        EngineError: the classes do not add up.
    """
    owned = {
        "token_states": raw["computed"],
        "reservation": raw["owned"] - raw["computed"] - internal,
        "internal": internal,
    }
    split = owned | {name: raw[name] for name in CLASSES if name not in owned}
    total = np.sum(list(split.values()), axis=0)
    if any((column < 0).any() for column in split.values()) or not np.array_equal(total, raw["total"]):
        raise EngineError("the settled KV ledger does not add up to the pool; this is a bug of the ledger")
    return split | {name: raw[name] for name in ("total", "shared_saved", "held")}
