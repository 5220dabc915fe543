"""What a step decided, as one number, so that two runs can be compared step for step."""

from __future__ import annotations

from array import array
from hashlib import blake2b

from kvarena.engine.contract import KVUsage

END = -1  # no row, start or count


def decision_hash(
    rows: array[int], starts: array[int], counts: array[int], preempted: list[int], rejected: list[int], usage: KVUsage
) -> int:
    """A 64-bit digest of a step's decisions: who computes which positions, who was preempted or refused, and the slots.

    A row is a request's place in the order of submission.

    Args:
        rows: int64, of the scheduled requests, in the plan's order.
        starts: int64, their first positions.
        counts: int64, their numbers of new tokens.
        preempted: rows of the requests that lost their slots.
        rejected: rows of the requests that ended before the step.
        usage: the slots that were computed, owned and cached during the step.

    Returns:
        A signed integer of 64 bits: BLAKE2b of all of these as little-endian int64. What is left of the pool is free,
        whatever class the ledger puts it into.
    """
    rest = array("q", (END, *preempted, END, *rejected, END, usage.computed, usage.owned, usage.cached))
    return int.from_bytes(blake2b(rows + starts + counts + rest, digest_size=8).digest(), "little", signed=True)
