"""A slow second count of the memory ledger, in hindsight and from block tables alone.

    during the run, step by step     who owns which blocks, how far each owner has filled them, who waits first
    when the run has ended           how far each owner filled them later, in the same residency

It shares no code with the ledger or with the allocators' counters: a residency ends where the allocator is told to give
slots back, a slot is filled later if its owner's count passes it later, and what is free is what no table names.
`Recount.check` compares every class of every step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from kvarena.engine.classes import LEDGER
from kvarena.engine.contract import NULL_BLOCK, KVAllocator
from kvarena.engine.core import StepOutput
from kvarena.engine.errors import EngineError
from kvarena.engine.request import Request
from kvarena.experiments.fuzzing.recount_pools import Owner, Unowned, pool_of
from kvarena.schedulers.base import Scheduler


@dataclass
class _Residency:
    """A request's time in the pool, from the first step in which it owns slots until it gives them back."""

    num_filled: int = 0


class _Share(NamedTuple):
    """One owner in one step: how many of its `num_slots` slots it has filled."""

    residency: _Residency
    num_filled: int
    num_slots: int


@dataclass
class _Step:
    """What a step showed. `num_filled`, `num_saved`: over all owners, a slot that several share once. `num_landing`:
    slots that copies are still to arrive in, and nobody's."""

    num_filled: int
    num_saved: int
    held: int
    unowned: Unowned
    num_landing: int = 0
    shares: list[_Share] = field(default_factory=list)


class Recount:
    """Watches one run.

    Args:
        allocator: whose blocks. `free` and `swap_out` of this object are wrapped, to see residencies end.
        scheduler: it says who waits first.
        options: of the allocator, by name, as configured.
    """

    def __init__(self, allocator: KVAllocator, scheduler: Scheduler, options: Mapping[str, Any]) -> None:
        self._allocator = allocator
        self._pool = pool_of(allocator, scheduler, options)
        self._requests: list[Request] = []
        self._open: dict[Request, _Residency] = {}
        self._steps: list[_Step] = []
        for name in ("free", "swap_out"):
            setattr(allocator, name, self._watched(getattr(allocator, name)))

    def _watched(self, release: Callable[[Request], Any]) -> Callable[[Request], Any]:
        def watched(req: Request) -> Any:
            before = self._table(req)
            answer = release(req)
            if before is not None and self._table(req) is None:
                self._open.pop(req, None)
                self._pool.left(req, before)
            return answer

        return watched

    def add(self, req: Request) -> None:
        """`req` was handed to the engine: it may own blocks from now on."""
        self._requests.append(req)

    def _table(self, req: Request) -> list[int] | None:
        try:
            return list(self._allocator.block_table(req))
        except KeyError:
            return None

    def observe(self, step: StepOutput) -> None:  # noqa: ARG002
        """Look at the tables of a step while its slots are allocated; what `Engine.on_launch` calls.

        Raises:
            EngineError: two requests own one block that is not full, or the tables cannot be.
        """
        owners: list[Owner] = []
        for req in list(self._requests):
            table = self._table(req)
            if table is not None:
                owners.append(self._pool.owner(req, table))
            elif req.is_finished:
                self._requests.remove(req)
        num_filled, num_saved = self._fill(owners)
        held = sum(owner.num_slots for owner in owners if owner.req.is_finished)
        num_landing = len(self._allocator.landing_blocks()) * self._allocator.block_size
        seen = _Step(num_filled, num_saved, held, self._pool.unowned(owners), num_landing)
        for owner in owners:
            residency = self._open.setdefault(owner.req, _Residency())
            residency.num_filled = max(residency.num_filled, owner.num_filled)
            seen.shares.append(_Share(residency, owner.num_filled, owner.num_slots))
        self._steps.append(seen)

    def _fill(self, owners: list[Owner]) -> tuple[int, int]:
        """Slots that hold KV, each once; and slots that owners have in common, beyond the first of them."""
        size = self._allocator.block_size
        filled: dict[int, int] = {}
        num_saved = 0
        for owner in owners:
            left = owner.num_filled
            for block in owner.table:
                here = min(max(left, 0), size)
                left -= size
                if block == NULL_BLOCK:
                    continue
                if block not in filled:
                    filled[block] = here
                    continue
                num_saved += size
                if here < size or filled[block] < size:
                    raise EngineError(f"block {block} has two owners and is not full: {owner.req.request_id!r}")
        return sum(filled.values()), num_saved

    def columns(self) -> dict[str, np.ndarray]:
        """The recount, in the columns of `MemoryLedger.settle`."""
        rows = [self._row(step) for step in self._steps]
        return {name: np.array([row[name] for row in rows], dtype=np.int64) for name in LEDGER}

    def _row(self, step: _Step) -> dict[str, int]:
        reservation, internal = step.num_landing, 0
        for share in step.shares:
            later = min(share.residency.num_filled, share.num_slots)
            reservation += later - share.num_filled
            internal += share.num_slots - later
        return {
            "token_states": step.num_filled,
            "reservation": reservation,
            "internal": internal,
            **step.unowned._asdict(),
            "total": self._allocator.num_blocks * self._allocator.block_size,
            "shared_saved": step.num_saved,
            "held": step.held,
        }

    def check(self, settled: Mapping[str, np.ndarray]) -> None:
        """Compare with the settled ledger.

        Raises:
            EngineError: a class, the pool, the saving or the held slots of a step differ, or the steps themselves.
        """
        for name, ours in self.columns().items():
            theirs = settled[name]
            if len(ours) != len(theirs):
                raise EngineError(f"the ledger has {len(theirs)} steps, the recount {len(ours)}")
            wrong = np.flatnonzero(ours != theirs)
            if len(wrong):
                i = wrong[0]
                raise EngineError(
                    f"step {i}: the ledger has {theirs[i]} slots of {name}, the recount from block tables {ours[i]} "
                    f"({len(wrong)} such steps)"
                )
