"""What the dashboard and the live gauges show of the KV pool."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import chain, count
from typing import Any

import numpy as np

from kvarena.engine.contract import KVAllocator, KVUsage, StepScheduler, cdiv
from kvarena.engine.request import Request
from kvarena.engine.server.engine.served import ServedRequest
from kvarena.engine.server.shared.ipc import pack_ids

MAX_CELLS = 8192
MAX_ROWS = 1024
EXTERNAL, SHARED, CACHED, FREE = -4, -3, -2, -1  # owners of a cell that are no request, as in kv_map.parquet
FULL = 255  # a cell's fill when all of its slots hold computed tokens


class PoolView:
    """Looks at an allocator a few times a second; changes nothing.

    Live, an owned and empty slot is *reservation* while its request may still grow into it, and *internal
    fragmentation* once it lies beyond prompt + max_tokens, or its request has finished and is held until its batch
    ends. (A finished run's ledger knows the true lengths.)
    """

    def __init__(self, allocator: KVAllocator) -> None:
        self._allocator = allocator
        # Of a pool of virtual addresses, a cell is a place in them: there may be more than memory has room for.
        self._stride = cdiv(allocator.num_virtual_blocks, MAX_CELLS)
        self._num_cells = cdiv(allocator.num_virtual_blocks, self._stride)
        self._numbers: dict[Request, int] = {}
        self._next_number = count(1)

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
        self, classes: dict[str, int], scheduler: StepScheduler, open_requests: Collection[Request]
    ) -> dict[str, Any]:
        """The map: per cell a request's number or one of the owners above, and how full it is; and a row per request.

        Above `MAX_CELLS` blocks, a cell stands for several blocks and shows one owner among them.
        """
        requests = [*sorted(open_requests, key=lambda req: (not req.num_slots, req.arrival_time)), *scheduler.held]
        known = self._numbers
        self._numbers = {req: known.get(req) or next(self._next_number) for req in requests}
        owner, filled = self._paint([req for req in requests if req.num_slots])
        return {
            "num_blocks": self._allocator.num_blocks,
            "block_size": self._allocator.block_size,
            "num_virtual_blocks": self._allocator.num_virtual_blocks,
            "stride": self._stride,
            "cells": pack_ids(owner.tolist()),
            "filled": filled.astype(np.uint8).tobytes(),
            "classes": classes,
            "running": scheduler.num_running,
            "waiting": scheduler.num_waiting,
            "requests": [self._row(req) for req in requests[:MAX_ROWS]],
        }

    def _row(self, req: Request) -> list[Any]:
        """What `ROW` of front/dashboard.py names. One that is held has finished, and its batch has not."""
        state = "held" if req.is_finished else "running" if req.num_slots else "waiting"
        shown_id, key = ("", -1)
        if isinstance(req, ServedRequest) and req.is_open:
            shown_id, key = req.shown_id, req.key
        lengths = (req.num_prompt_tokens, len(req.output_token_ids), req.num_computed_tokens, req.num_slots)
        return [self._numbers[req], state, *lengths, shown_id, req.client_id, key]

    def _paint(self, residents: Sequence[Request]) -> tuple[np.ndarray, np.ndarray]:
        """Owner and fill of every cell."""
        allocator, block_size = self._allocator, self._allocator.block_size
        owner = np.full(self._num_cells, FREE, dtype=np.int64)
        filled = np.zeros(self._num_cells, dtype=np.int64)
        cached = self._cells(np.fromiter(allocator.cached_blocks(), dtype=np.int64))
        owner[cached], filled[cached] = CACHED, FULL
        tables = [allocator.block_table(req) for req in residents]
        owner[self._cells(self._rounded_up(tables))] = EXTERNAL
        lengths = np.array(list(map(len, tables)), dtype=np.int64)
        blocks = np.fromiter(chain.from_iterable(tables), dtype=np.int64, count=int(lengths.sum()))
        index = np.arange(len(blocks)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        computed = np.repeat([req.num_computed_tokens for req in residents], lengths)
        slots = np.clip(computed - block_size * index, 0, block_size)
        cells = self._cells(blocks)
        owner[cells] = np.repeat([self._numbers[req] for req in residents], lengths)[blocks > 0]
        shared = np.bincount(blocks) > 1
        owner[self._cells(np.flatnonzero(shared))] = SHARED
        filled[cells] = 0
        np.maximum.at(filled, cells, (FULL * slots // block_size)[blocks > 0])
        return owner, filled

    def _cells(self, blocks: np.ndarray) -> np.ndarray:
        """The cells of blocks; block 0 is nobody's and has none."""
        return (blocks[blocks > 0] - 1) // self._stride

    def _rounded_up(self, tables: Sequence[Sequence[int]]) -> np.ndarray:
        """Blocks behind the requests' own that their regions take beside them."""
        extent = self._allocator.region_extent
        behind = (range(table[0] + len(table), table[0] + extent(len(table))) for table in tables if len(table))
        return np.fromiter(chain.from_iterable(behind), dtype=np.int64)
