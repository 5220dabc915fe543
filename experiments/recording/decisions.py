"""What a step decided, as one number, so that two runs can be compared step for step."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from hashlib import blake2b

from engine.core import StepOutput
from engine.request import Request

END = -1  # no row, start or count


def decision_hash(step: StepOutput, row_of: Callable[[Request], int]) -> int:
    """A 64-bit digest of a step's decisions: who computes which positions, who was preempted or refused, and the slots.

    Args:
        step: a finished step.
        row_of: a request's place in the order of submission.

    Returns:
        A signed integer of 64 bits: BLAKE2b of the rows of the scheduled requests in the plan's order, of their starts
        and of their numbers of new tokens; of the rows preempted and refused; and of the slots that were computed,
        owned and cached during the step, as little-endian int64. What is left of the pool is free, whatever class the
        ledger puts it into.
    """
    plan, usage = step.plan, step.usage
    numbers = array("q")
    if plan.scheduled:
        requests, starts, counts = zip(*plan.scheduled, strict=True)
        numbers.extend(map(row_of, requests))
        numbers.extend(starts)
        numbers.extend(counts)
    for others in (plan.preempted, plan.rejected):
        numbers.append(END)
        numbers.extend(map(row_of, others))
    numbers.extend((END, usage.computed, usage.owned, usage.cached))
    return int.from_bytes(blake2b(numbers, digest_size=8).digest(), "little", signed=True)
