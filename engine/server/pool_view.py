"""What the dashboard and the live gauges show of the KV pool."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from engine.plan import KVAllocator, KVUsage, SchedulerProtocol
from engine.request import Request
from engine.server.ipc import pack_ids

MAX_CELLS = 8192


class PoolView:
    """Looks at an allocator a few times a second; changes nothing.

    Live, an owned and empty slot is *reservation* while its request may still grow into it, and *internal
    fragmentation* once it lies beyond prompt + max_tokens, or its request has finished and is held until its batch
    ends. (A finished run's ledger knows the true lengths.)
    """

    def __init__(self, allocator: KVAllocator) -> None:
        self._allocator = allocator

    def classes(self, usage: KVUsage, requests: Collection[Request], held: Collection[Request]) -> dict[str, int]:
        """Slots by class; they add up to the pool.

        Args:
            usage: raw counts.
            requests: those that have not finished.
            held: those that have, and still own slots.
        """
        never = sum(max(0, req.num_slots - req.max_total_tokens) for req in requests)
        never += sum(req.num_slots - req.num_computed_tokens for req in held)
        internal = min(never, usage.owned - usage.computed)
        return {
            "token_states": usage.computed,
            "reservation": usage.owned - usage.computed - internal,
            "internal": internal,
            "external": usage.external,
            "shortage": usage.shortage,
            "cached": usage.cached,
            "free": usage.free,
        }

    def snapshot(
        self, classes: dict[str, int], scheduler: SchedulerProtocol, requests: Collection[Request]
    ) -> dict[str, Any]:
        """The map: per block a request's number from 1, or 0; and per request its share.

        Above `MAX_CELLS` blocks, a cell stands for several blocks and shows the first owner among them.
        """
        num_blocks = self._allocator.num_blocks
        stride = -(-num_blocks // MAX_CELLS)
        cells = [0] * -(-num_blocks // stride)
        rows = []
        for number, req in enumerate(sorted(requests, key=lambda r: r.arrival_time), start=1):
            rows.append((req.request_id, req.num_slots, req.num_computed_tokens, req.num_prompt_tokens, req.client_id))
            if not req.num_slots:
                continue
            for block in self._allocator.block_table(req):
                if block:
                    cells[(block - 1) // stride] = number
        return {
            "num_blocks": num_blocks,
            "block_size": self._allocator.block_size,
            "stride": stride,
            "cells": pack_ids(cells),
            "classes": classes,
            "running": scheduler.num_running,
            "waiting": scheduler.num_waiting,
            "requests": rows[:256],
        }
