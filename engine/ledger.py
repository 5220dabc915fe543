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

import numpy as np

from engine.errors import EngineError
from engine.plan import CLASSES, KVUsage, StepPlan
from engine.request import Request, RequestStatus


def check_usage(usage: KVUsage) -> None:
    """Raise EngineError unless the raw counts are non-negative and add up to the pool."""
    parts = usage.owned + usage.external + usage.shortage + usage.cached + usage.free
    if parts != usage.total or min(usage) < 0 or usage.computed > usage.owned:
        raise EngineError(
            f"the KV ledger does not add up: owned {usage.owned} + external {usage.external} + shortage "
            f"{usage.shortage} + cached {usage.cached} + free {usage.free} = {parts} of {usage.total} slots, "
            f"{usage.computed} computed; this is a bug of the allocator"
        )


class MemoryLedger:
    """Observes steps and splits the pool into the `CLASSES` of `engine.plan`, in slots.

    Memory: a few integers per step and per live request.
    """

    def __init__(self) -> None:
        self._columns = {name: array("q") for name in (*KVUsage._fields, "held")}
        # The residencies that are open, by request: (step, slots) pairs; from that step on it owned so many slots.
        self._growth: dict[Request, list[tuple[int, int]]] = {}
        self._slots: dict[Request, int] = {}  # what each of them owned when it was last seen
        self._filled: dict[Request, int] = {}  # and how many of those slots its last step filled
        self._waste_delta: dict[int, int] = {}
        self.num_steps = 0

    def observe(self, plan: StepPlan, usage: KVUsage) -> None:
        """Account for one planned step; call between `schedule()` and `update()`, when nothing is freed yet.

        Raises:
            EngineError: `usage` does not add up.
        """
        check_usage(usage)
        step, slots, filled = self.num_steps, self._slots, self._filled
        self._close(step, plan)
        for req in plan.admitted:
            filled[req] = req.num_computed_tokens
            self._grow(req, 0, step)
        for req, start, num_new_tokens in plan.scheduled:
            if slots.get(req) != req.num_slots:
                self._grow(req, start, step)
            filled[req] = start + num_new_tokens
        for name, value in zip(KVUsage._fields, usage, strict=True):
            self._columns[name].append(value)
        finished = RequestStatus.FINISHED
        self._columns["held"].append(sum([req.num_slots for req in slots if req.status is finished]))
        self.num_steps += 1

    def _grow(self, req: Request, start: int, step: int) -> None:
        """`req` owns another number of slots from `step` on, in which it computes from position `start`."""
        self._slots[req] = req.num_slots
        growth = self._growth.get(req)
        if growth is None:
            self._growth[req] = [(step, req.num_slots)]
        elif req.num_slots > growth[-1][1]:
            # What is filled already cannot be wasted: earlier growth below `start` is settled.
            self._growth[req] = [*(entry for entry in growth if entry[1] > start), (step, req.num_slots)]

    def _close(self, step: int, plan: StepPlan) -> None:
        """Settle the residencies that ended before `step`; whoever is admitted had ended an earlier one."""
        for req in (*plan.preempted, *plan.admitted):
            if req in self._slots:
                self._settle(req, step)
        for req in [req for req in self._slots if req.num_slots == 0]:
            self._settle(req, step)

    def _settle(self, req: Request, end: int) -> None:
        """End the residency of `req`: book what it owned and never filled, over the steps [its growth, end)."""
        del self._slots[req]
        num_filled = self._filled.pop(req)
        growth = self._growth.pop(req)
        steps = [step for step, _ in growth[1:]] + [end]
        for (begin, slots), until in zip(growth, steps, strict=True):
            wasted = slots - num_filled
            if wasted > 0 and until > begin:
                self._waste_delta[begin] = self._waste_delta.get(begin, 0) + wasted
                self._waste_delta[until] = self._waste_delta.get(until, 0) - wasted

    def settle(self) -> dict[str, np.ndarray]:
        """Close the books: per step, the slots of each class.

        Returns:
            int64 arrays of length `num_steps`: the `CLASSES`, which add up to `total`; and beside them `total`,
            `shared_saved` (slots that sharing saved) and `held` (part of the owned slots: those that finished
            requests still hold, see the static scheduler).

        Raises:
            EngineError: the classes do not add up.
        """
        for req in list(self._slots):
            self._settle(req, self.num_steps)
        delta = np.zeros(self.num_steps + 1, dtype=np.int64)
        for step, wasted in self._waste_delta.items():
            delta[step] += wasted
        raw = {name: np.array(column, dtype=np.int64) for name, column in self._columns.items()}
        internal = np.cumsum(delta)[: self.num_steps]
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
