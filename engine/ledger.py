"""The memory ledger: every step, every slot of the pool is in exactly one class.

    |<--------------------------------- pool --------------------------------->|
    | token states | reservation | internal | external | cached |     free      |
    |<------------- owned ----------------->|

An owned, empty slot is *reservation* if the request fills it later in this residency (from admission until its
slots are given back), and *internal fragmentation* if it never does. That is known only when the residency ends,
so the ledger keeps each residency's growth and settles it then: a residency that owned `s` slots from some step on
and filled `f` in the end wasted max(0, s - f) of them in each of those steps.

Source of the classes: PagedAttention (Kwon et al., SOSP'23), section 3.1 and Figure 2.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass

import numpy as np

from engine.errors import EngineError
from engine.plan import KVUsage, StepPlan
from engine.request import Request

CLASSES = ("token_states", "reservation", "internal", "external", "cached", "free")


def check_usage(usage: KVUsage) -> None:
    """Raise EngineError unless the raw counts are non-negative and add up to the pool."""
    parts = usage.owned + usage.external + usage.cached + usage.free
    if parts != usage.total or min(usage) < 0 or usage.computed > usage.owned:
        raise EngineError(
            f"the KV ledger does not add up: owned {usage.owned} + external {usage.external} + cached "
            f"{usage.cached} + free {usage.free} = {parts} of {usage.total} slots, {usage.computed} computed; "
            "this is a bug of the allocator"
        )


@dataclass(slots=True)
class _Residency:
    """One stay of a request in the pool, from its first slot until all are given back.

    Attributes:
        req: whose.
        computed: positions filled so far.
        growth: (step, slots) pairs: from that step on the request owned so many slots.
    """

    req: Request
    computed: int
    growth: list[tuple[int, int]]


class MemoryLedger:
    """Observes steps and splits the pool into the six classes, in slots.

    Memory: a few integers per step and per live request.
    """

    def __init__(self) -> None:
        self._columns = {name: array("q") for name in (*KVUsage._fields, "held")}
        self._open: dict[int, _Residency] = {}
        self._waste_delta: dict[int, int] = {}
        self.num_steps = 0

    def observe(self, plan: StepPlan, usage: KVUsage) -> None:
        """Account for one planned step; call between `schedule()` and `update()`, when nothing is freed yet.

        Raises:
            EngineError: `usage` does not add up.
        """
        check_usage(usage)
        step = self.num_steps
        self._close(step, plan.preempted)
        for req, start, num_new_tokens in plan.scheduled:
            residency = self._open.get(id(req))
            if residency is None:
                residency = self._open[id(req)] = _Residency(req, 0, [(step, req.num_slots)])
            elif req.num_slots > residency.growth[-1][1]:
                # What is filled already cannot be wasted: earlier growth below `computed` is settled.
                residency.growth = [g for g in residency.growth if g[1] > residency.computed]
                residency.growth.append((step, req.num_slots))
            residency.computed = start + num_new_tokens
        for name, value in zip(KVUsage._fields, usage, strict=True):
            self._columns[name].append(value)
        self._columns["held"].append(sum(r.req.num_slots for r in self._open.values() if r.req.is_finished))
        self.num_steps += 1

    def _close(self, step: int, preempted: list[Request]) -> None:
        """Settle the residencies that ended before `step`."""
        gone = [key for key, r in self._open.items() if r.req.num_slots == 0]
        gone += [key for key in map(id, preempted) if key in self._open and self._open[key].req.num_slots]
        for key in gone:
            self._settle(self._open.pop(key), step)

    def _settle(self, residency: _Residency, end: int) -> None:
        """Book what the residency owned and never filled, over the steps [its growth, end)."""
        steps = [step for step, _ in residency.growth[1:]] + [end]
        for (begin, slots), until in zip(residency.growth, steps, strict=True):
            wasted = slots - residency.computed
            if wasted > 0 and until > begin:
                self._waste_delta[begin] = self._waste_delta.get(begin, 0) + wasted
                self._waste_delta[until] = self._waste_delta.get(until, 0) - wasted

    def settle(self) -> dict[str, np.ndarray]:
        """Close the books: per step, the slots of each class.

        Returns:
            int64 arrays of length `num_steps`: the six `CLASSES`, which add up to `total`; and beside them `total`,
            `shared_saved` (slots that sharing saved) and `held` (part of the owned slots: those that finished
            requests still hold, see the static scheduler).

        Raises:
            EngineError: the classes do not add up.
        """
        for residency in self._open.values():
            self._settle(residency, self.num_steps)
        self._open.clear()
        delta = np.zeros(self.num_steps + 1, dtype=np.int64)
        for step, wasted in self._waste_delta.items():
            delta[step] += wasted
        raw = {name: np.array(column, dtype=np.int64) for name, column in self._columns.items()}
        internal = np.cumsum(delta)[: self.num_steps]
        split = {
            "token_states": raw["computed"],
            "reservation": raw["owned"] - raw["computed"] - internal,
            "internal": internal,
            "external": raw["external"],
            "cached": raw["cached"],
            "free": raw["free"],
        }
        total = np.sum(list(split.values()), axis=0)
        if any((column < 0).any() for column in split.values()) or not np.array_equal(total, raw["total"]):
            raise EngineError("the settled KV ledger does not add up to the pool; this is a bug of the ledger")
        return split | {name: raw[name] for name in ("total", "shared_saved", "held")}
