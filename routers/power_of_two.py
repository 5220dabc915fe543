"""The better of two replicas drawn at random: nearly as even as asking all (Mitzenmacher, IEEE TPDS 2001)."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from kvarena.engine.contract import check_int
from kvarena.engine.request import Request
from kvarena.engine.routing import ReplicaState, Router


class PowerOfTwoRouter(Router):
    """Of two different replicas the one with fewer open requests; of equals the one that was drawn first.

    Args:
        seed: of the draws.
        num_replicas: see `Router`.
    """

    def __init__(self, *, num_replicas: int, seed: int = 0) -> None:
        super().__init__(num_replicas=num_replicas)
        self._random = Random(check_int("router.seed", seed, 0))

    def route(self, req: Request, replicas: Sequence[ReplicaState]) -> int:  # noqa: ARG002 - any request alike
        drawn = self._random.sample(range(len(replicas)), min(2, len(replicas)))
        return min(drawn, key=lambda number: replicas[number].num_open)
