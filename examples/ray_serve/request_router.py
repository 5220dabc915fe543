"""Which replica gets a prompt: the one that was sent its beginning, unless another one has much less KV in use."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

from ray.serve.request_router import FIFOMixin, PendingRequest, ReplicaID, RequestRouter, RunningReplica

from kvarena.engine.server.shared.ipc import AddFrame, unpack_ids

BLOCK = 64  # tokens by which prompts are compared


class KVRouter(FIFOMixin, RequestRouter):
    """A request router for `EngineReplica`, by the public interface of Ray Serve.

    What it knows of a replica: the share of its KV in use, which `record_routing_stats` tells every
    `request_routing_stats_period_s`, and how many requests it has.
    """

    def initialize_state(self, most_uneven: float = 0.2, max_blocks: int = 200_000) -> None:
        """Called by Serve with `request_router_kwargs`.

        Args:
            most_uneven: share of a pool by which a replica may be fuller than the emptiest and still be followed.
            max_blocks: beginnings that are remembered.
        """
        self._most_uneven, self._max_blocks = most_uneven, max_blocks
        self._sent: OrderedDict[int, ReplicaID] = OrderedDict()  # by the hash of a beginning; oldest first

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """The best replica, and behind it the others by their load."""
        by_load = sorted(candidate_replicas, key=self._load)
        if not by_load or pending_request is None:
            return [by_load]
        known = {replica.replica_id: replica for replica in by_load}
        emptiest = self._load(by_load[0])[0]
        for beginning in reversed(_beginnings(pending_request)):
            replica = known.get(self._sent.get(beginning))
            if replica is not None and self._load(replica)[0] - emptiest <= self._most_uneven:
                return [[replica], [one for one in by_load if one is not replica]]
        return [[one] for one in by_load]

    def on_request_routed(
        self,
        pending_request: PendingRequest,
        replica_id: ReplicaID,
        result: Any,  # noqa: ARG002 - of the base
    ) -> None:
        """Remember who was sent what."""
        for beginning in _beginnings(pending_request):
            self._sent[beginning] = replica_id
            self._sent.move_to_end(beginning)
        while len(self._sent) > self._max_blocks:
            self._sent.popitem(last=False)

    def _load(self, replica: RunningReplica) -> tuple[float, int]:
        """Share of its KV in use, and of equals the requests that it has."""
        queue = self.replica_queue_len_cache.get(replica.replica_id) or 0
        return float(replica.routing_stats.get("kv_in_use", 0.0)), queue


def _beginnings(pending: PendingRequest) -> list[int]:
    """A hash of each whole block of a prompt with all that is before it, the shortest first."""
    frame = pending.args[0] if pending.args else None
    if not isinstance(frame, AddFrame):
        return []
    tokens = unpack_ids(frame.prompt)
    made, before = [], hash(frame.cache_salt)
    for end in range(BLOCK, len(tokens) + 1, BLOCK):
        before = hash((before, *tokens[end - BLOCK : end]))
        made.append(before)
    return made
