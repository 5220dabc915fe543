"""Each replica in turn, whatever they do."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle

from kvarena.engine.request import Request
from kvarena.engine.routing import ReplicaState, Router


class RoundRobinRouter(Router):
    """Request i goes to replica i modulo their number. Options: see `Router`."""

    def __init__(self, *, num_replicas: int) -> None:
        super().__init__(num_replicas=num_replicas)
        self._turns = cycle(range(num_replicas))

    def route(self, req: Request, replicas: Sequence[ReplicaState]) -> int:  # noqa: ARG002 - looks at nothing
        return next(self._turns)
