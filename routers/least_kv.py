"""The replica whose requests hold, and wait for, the least KV."""

from __future__ import annotations

from collections.abc import Sequence

from kvarena.engine.request import Request
from kvarena.engine.routing import ReplicaState, Router


class LeastKVRouter(Router):
    """The fewest slots owned and asked for by queued requests; of equals whoever was sent the fewest requests.

    Queued tokens count, or a burst that arrives while a step runs would go to one replica as a whole. Options: see
    `Router`.
    """

    def route(self, req: Request, replicas: Sequence[ReplicaState]) -> int:  # noqa: ARG002 - all are asked the same
        def load(number: int) -> tuple[int, int]:
            state = replicas[number]
            return state.num_owned_slots + state.num_queued_tokens, state.num_sent

        return min(range(len(replicas)), key=load)
