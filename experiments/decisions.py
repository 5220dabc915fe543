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
        A signed integer of 64 bits: BLAKE2b of the rows of the scheduled requests in the plan's order; of start and
        number of new tokens of those that are not known to decode (a decode computes the one position that follows);
        of the rows preempted and refused; and of the slots that were computed, owned, cached and free during the
        step, as little-endian int64.
    """
    plan, usage = step.plan, step.usage
    numbers = array("q", [row_of(req) for req, _, _ in plan.scheduled])
    for _, start, num_new_tokens in plan.scheduled[plan.num_decodes :]:
        numbers.extend((start, num_new_tokens))
    for others in (plan.preempted, plan.rejected):
        numbers.append(END)
        numbers.extend(map(row_of, others))
    numbers.extend((END, plan.num_decodes, usage.computed, usage.owned, usage.cached, usage.free))
    return int.from_bytes(blake2b(numbers, digest_size=8).digest(), "little", signed=True)
