"""The contract of routers: which of several replicas gets a request. Free of torch.

    request --> Router.route(request, replicas) --> number of a replica --> its scheduler, its allocator

A router sees replicas through `ReplicaState`, as they are between two actions of their hosts: while a step runs, with
the slots that it was planned with. What a replica caches it may be asked exactly (a replica that publishes KV events
tells the world as much), or the router keeps a guess of its own.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Protocol

from kvarena.engine.checked import Checked
from kvarena.engine.checks import check_int
from kvarena.engine.request import Request

MOST_REPLICAS = 1024


class ReplicaState(Protocol):
    """What may be known of a replica."""

    @property
    def num_slots(self) -> int:
        """Slots of its pool."""
        ...

    @property
    def num_sent(self) -> int:
        """Requests that it was ever sent."""
        ...

    @property
    def num_open(self) -> int:
        """Requests that it was sent and that have not ended: running, queued, or on their way."""
        ...

    @property
    def num_owned_slots(self) -> int:
        """Slots that its requests own; cached blocks that nobody uses are not among them."""
        ...

    @property
    def num_queued_tokens(self) -> int:
        """Tokens of its requests that own no slots yet."""
        ...

    @property
    def num_tokens_to_compute(self) -> int:
        """Tokens of its requests whose KV is still to be computed; of a queued one all, for nobody knows its hits."""
        ...

    def cached_tokens(self, req: Request) -> int:
        """Leading tokens of `req` that its prefix cache would serve now. Changes nothing."""
        ...


class Router(metaclass=Checked):
    """Base of all routers. Host-only; called for one request after the other, in the order of their arrival.

    Args:
        num_replicas: replicas to choose from.

    Raises:
        ConfigError: an option out of range.
    """

    _set_by_base = "num_replicas"

    def __init__(self, *, num_replicas: int) -> None:
        self.num_replicas = check_int("router.num_replicas", num_replicas, 1, MOST_REPLICAS)

    @abstractmethod
    def route(self, req: Request, replicas: Sequence[ReplicaState]) -> int:
        """The number of the replica that gets `req`, from 0. `replicas` are `num_replicas`, always in one order."""
