"""The replica that has the least to do for a request, by what its cache holds at this moment.

The cost of NVIDIA Dynamo's KV router (docs/router): what would have to be computed there, weighted, and what the
replica's requests hold. It needs to know what each cache holds, which replicas tell by KV events.
"""

from __future__ import annotations

from collections.abc import Sequence

from kvarena.engine.contract import is_number, require
from kvarena.engine.request import Request
from kvarena.engine.routing import ReplicaState, Router


class KVExactRouter(Router):
    """The lowest cost in tokens: `overlap_weight` x (to compute, with this prompt less its hits) + slots held.

    Args:
        overlap_weight: how much a token to compute counts beside a slot that is held; 0 ignores the caches.
        num_replicas: see `Router`.

    Raises:
        ConfigError: an option out of range.
    """

    def __init__(self, *, num_replicas: int, overlap_weight: float = 1.0) -> None:
        super().__init__(num_replicas=num_replicas)
        ok = is_number(overlap_weight) and overlap_weight >= 0
        require(ok, "router.overlap_weight", overlap_weight, "at least 0")
        self._overlap_weight = overlap_weight

    def route(self, req: Request, replicas: Sequence[ReplicaState]) -> int:
        def cost(number: int) -> tuple[float, int]:
            state = replicas[number]
            to_compute = state.num_tokens_to_compute + req.num_tokens - state.cached_tokens(req)
            held = state.num_owned_slots + state.num_queued_tokens
            return self._overlap_weight * to_compute + held, state.num_sent

        return min(range(len(replicas)), key=cost)
