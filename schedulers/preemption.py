"""Who loses its slots when the pool runs dry. A victim policy is a score: the highest is preempted.

Ties fall to the request that arrived last, as in vLLM.
"""

from __future__ import annotations

from collections.abc import Callable

from engine.request import Request

VictimScore = Callable[[Request], int]


def last_arrived(_req: Request) -> int:
    """The request that arrived last (PagedAttention, SOSP'23, section 4.5)."""
    return 0


def lowest_priority(req: Request) -> int:
    """The request with the largest priority number, whichever scheduler runs."""
    return req.priority


def most_blocks(req: Request) -> int:
    """The request that owns most: the fewest preemptions, at the price of the longest recomputation."""
    return req.num_slots


VICTIMS: dict[str, VictimScore] = {
    "last_arrived": last_arrived,
    "lowest_priority": lowest_priority,
    "most_blocks": most_blocks,
}

PREEMPTIONS = ("recompute", "swap", "none")
