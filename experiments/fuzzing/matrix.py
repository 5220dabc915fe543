"""Strategies against the oracle: a random trace through one allocator and one scheduler, every access checked.

A cell passes when the pool is whole at the end, each request got the tokens that a run without any pool would give
it, and an independent recount (`recount.py`) finds every class of the memory ledger in every step as the ledger has
it. Pools are tiny, so that preemption, eviction, swap, growth and fragmentation happen all the time; `Coverage` counts
them, since a test that never reaches a path says nothing about it.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from kvarena.allocators.eviction_policies import policy_names
from kvarena.engine.clock import VirtualClock
from kvarena.engine.contract import NULL_BLOCK, CopyKind, KVAllocator, KVUsage, LevelUsage, StepPlan
from kvarena.engine.core import Engine, StepOutput
from kvarena.engine.errors import EngineError, NotDefined, RequestRejected
from kvarena.engine.ledger import MemoryLedger
from kvarena.engine.request import FinishReason, Request, RequestStatus
from kvarena.experiments.caching.accesses import AccessLog, watch
from kvarena.experiments.correctness.oracle import OracleRunner
from kvarena.experiments.correctness.oracle_link import SlowLink
from kvarena.experiments.fuzzing.random_traces import MAX_MODEL_LEN, VOCAB_SIZE, Trace
from kvarena.experiments.fuzzing.recount import Recount
from kvarena.experiments.settings.strategies import (
    Strategy,
    build_allocator,
    build_scheduler,
    strategy_names,
    strategy_options,
)
from kvarena.schedulers.base import Scheduler

WINDOW = 8

Coverage = Counter[str]
PATHS = (
    *("preempted", "recomputed", "swap_out", "swap_in", "grown", "chunked", "fragmented", "cached", "evicted"),
    *("short", "waiting_inside", "shared", "device", "slid", "aborted", "rejected", "read_once"),
    *("forked", "beams_held", "beams_preempted"),
    *("went_down", "loaded", "ended_loading", "loads_wait"),
)


class MatrixFailure(EngineError):
    """A strategy broke its contract. The message names what must be passed to see it again."""


@dataclass(frozen=True)
class Cell:
    """One allocator x one scheduler.

    Attributes:
        allocator: name in conf/allocator.
        scheduler: name in conf/scheduler.
        overlap: plan a step while the one before runs.
        window: sliding window, for allocators that have one.
        eviction: policy of a prefix cache, for allocators that have one; None: the config's.
        levels: a prefix cache has the trace's level below the pool.
    """

    allocator: str
    scheduler: str
    overlap: bool = False
    window: int | None = None
    eviction: str | None = None
    levels: bool = False

    def __str__(self) -> str:
        window = f" window {self.window}" if self.window else ""
        policy = f" {self.eviction}" if self.eviction else ""
        policy += " levels" if self.levels else ""
        return f"{self.allocator}{window}{policy} x {self.scheduler}{' overlap' if self.overlap else ''}"


def allocator_cells() -> list[tuple[str, int | None]]:
    """Registered allocators, each with its sliding window; those that may have one come without and with it."""
    cells: list[tuple[str, int | None]] = []
    for name in strategy_names("allocator"):
        options = strategy_options("allocator", name)
        cells.append((name, options.get("sliding_window")))
        if "sliding_window" in options and options["sliding_window"] is None:
            cells.append((name, WINDOW))
    return cells


def eviction_of(allocator: str, index: int) -> str | None:
    """One of all policies, another one for each `index`; None for an allocator without a prefix cache."""
    names = policy_names()
    return names[index % len(names)] if "eviction" in strategy_options("allocator", allocator) else None


def takes_levels(eviction: str | None) -> bool:
    """Whether a prefix cache of that policy, and an allocator that has one, may have a level below."""
    return eviction not in (None, "min")


def cells_of_round(index: int) -> list[Cell]:
    """Every allocator once, with a scheduler that changes from round to round: all pairs in num_schedulers rounds.

    So does the policy by which a prefix cache evicts.
    """
    schedulers = strategy_names("scheduler")
    return [
        Cell(
            allocator,
            schedulers[(index + i) % len(schedulers)],
            overlap=(index // len(schedulers) + i) % 2 == 1,
            window=window,
            eviction=(policy := eviction_of(allocator, index + i)),
            levels=takes_levels(policy) and (index + i) % 3 != 0,
        )
        for i, (allocator, window) in enumerate(allocator_cells())
    ]


@dataclass
class CellRun:
    """What a cell did with a trace."""

    requests: list[Request]
    coverage: Coverage
    outputs: list[StepOutput] = field(default_factory=list)


def run_cell(trace: Trace, cell: Cell) -> CellRun:
    """Run `trace` through `cell` and check tokens, plans, the ledger and the pool.

    Raises:
        MatrixFailure: anything was wrong.
    """
    try:
        allocator, scheduler = build_cell(trace, cell)
        recount = Recount(allocator, scheduler, allocator_options(trace, cell))
        return drive(trace, allocator, scheduler, OracleRunner(VOCAB_SIZE, cell.window), recount, cell.overlap)
    except EngineError as error:
        raise MatrixFailure(f"trace {trace.seed}, {cell}: {error}") from error


def allocator_options(trace: Trace, cell: Cell) -> dict[str, Any]:
    """All options of the cell's allocator: its own, the trace's, the window."""
    options = strategy_options("allocator", cell.allocator)
    options |= {key: value for key, value in trace.allocator_options.items() if key in options}
    if cell.eviction is not None:
        options["eviction"] = cell.eviction
    if cell.levels:
        options |= trace.levels
    return options if cell.window is None else options | {"sliding_window": cell.window}


def build_cell(trace: Trace, cell: Cell) -> tuple[KVAllocator, Scheduler]:
    """The strategy of `cell` with the trace's sizes and options, as far as it has them."""
    options = allocator_options(trace, cell)
    num_blocks = trace.num_slots // options["block_size"]
    allocator = build_allocator(cell.allocator, num_blocks=num_blocks, max_model_len=MAX_MODEL_LEN, **options)
    known = strategy_options("scheduler", cell.scheduler)
    options = {key: value for key, value in trace.scheduler_options.items() if key in known}
    return allocator, build_scheduler(cell.scheduler, allocator, max_model_len=MAX_MODEL_LEN, **options)


def drive(
    trace: Trace,
    allocator: KVAllocator,
    scheduler: Scheduler,
    runner: OracleRunner,
    recount: Recount,
    overlap: bool = False,
) -> CellRun:
    """Run `trace` on given objects; one step per simulated second. Raises EngineError when anything is wrong."""
    clock, ledger = VirtualClock(), MemoryLedger()
    engine = Strategy(allocator, scheduler).engine(
        runner, clock, overlap=overlap, ledger=ledger, on_launch=recount.observe
    )
    run, before = CellRun(trace.requests(), Counter()), allocator.usage()
    accesses = watch(allocator, clock.now)
    if trace.most_delay:
        runner.link = SlowLink(clock, trace.most_delay, trace.seed)
    leaving = random.Random(f"leaving {trace.seed}")
    num_slots: dict[Request, int] = {}
    todo, aborts = run.requests[::-1], trace.aborts[::-1]
    limit = 200 + 4 * len(run.requests) + 20 * sum(req.max_total_tokens for req in run.requests)
    while todo or engine.has_work:
        now = clock.now()
        while todo and todo[-1].arrival_time <= now:
            req = todo.pop()
            recount.add(req)
            _submit(engine, req, run)
        while aborts and aborts[-1][0] <= now:
            num_loading = len(scheduler.loading)
            run.coverage["aborted"] += engine.abort(aborts.pop()[1]) is not None
            run.coverage["ended_loading"] += len(scheduler.loading) < num_loading
        if scheduler.loading and leaving.random() < 0.2:
            engine.abort(next(iter(scheduler.loading)).request_id)
            run.coverage["ended_loading"] += 1
        output = engine.step()
        if output is not None:
            _check_plan(output.plan, scheduler)
            run.coverage["beams_held"] += len(scheduler.holding)
            run.coverage["loads_wait"] += len(scheduler.loading) > 0 and len(output.plan.scheduled) > 0
            run.outputs.append(output)
            for entry in output.plan.scheduled:
                req, slots = entry.req, entry.req.num_slots
                run.coverage["grown"] += 0 < num_slots.get(req, 0) < slots
                num_slots[req] = slots
                if runner.window is not None and slots:
                    run.coverage["slid"] += allocator.block_table(req)[0] == NULL_BLOCK
        elif not todo and engine.has_work and not engine.in_flight and engine.wake_time(now) is None:
            raise EngineError("requests wait and nothing is planned")
        if now > limit:
            raise EngineError(f"{scheduler.num_waiting} wait and {scheduler.num_running} run after {now} steps")
        clock.advance(1.0)
    recount.check(ledger.settle())
    allocator.arrive(float("inf"))
    _check_pool(before, allocator.usage())
    _check_levels(allocator.levels)
    _check_end(run, trace.expected(runner.window))
    if accesses is not None:
        _check_bound(run, accesses)
    _count(run, runner)
    return run


def _submit(engine: Engine, req: Request, run: CellRun) -> None:
    try:
        engine.add(req)
    except (RequestRejected, NotDefined) as error:
        req.status, req.finish_reason, req.error = RequestStatus.FINISHED, FinishReason.REJECTED, str(error)
        run.coverage["rejected"] += 1


def _check_plan(plan: StepPlan, scheduler: Scheduler) -> None:
    names = [entry.req.request_id for entry in plan.scheduled]
    if len(set(names)) < len(names) or len(names) > scheduler.max_num_seqs:
        raise EngineError(f"a step schedules {names}, of at most {scheduler.max_num_seqs} different requests")
    if plan.num_new_tokens > scheduler.max_num_batched_tokens:
        raise EngineError(f"a step of {plan.num_new_tokens} tokens, of at most {scheduler.max_num_batched_tokens}")


def _check_pool(before: KVUsage, after: KVUsage) -> None:
    if after.owned or after.shared_saved or after.free + after.cached != before.free:
        raise EngineError(f"the pool is not whole after the run: {after}, before it {before}")


def _check_levels(levels: Sequence[LevelUsage]) -> None:
    for level in levels:
        if level.swapped or level.arriving or level.leaving:
            raise EngineError(f"a level is not whole after the run: {level}")


def _check_end(run: CellRun, expected: dict[str, list[int]]) -> None:
    for req in run.requests:
        got, want, reason = req.output_token_ids, expected[req.request_id], req.finish_reason
        whole = reason in (FinishReason.STOP, FinishReason.LENGTH)
        # What a beam has before the end another one may have in the end.
        wrong = got != want if whole else got != want[: len(got)] and req.search is None
        if not req.is_finished or wrong:
            raise EngineError(f"request {req.request_id!r} ended by {reason} with tokens {got}, expected {want}")
        if reason is FinishReason.ERROR:
            raise EngineError(f"request {req.request_id!r} was accepted and failed: {req.error}")


def _check_bound(run: CellRun, accesses: AccessLog) -> None:
    """No prefix cache finds more than the best one would have (`caching/optimum.py`)."""
    reuse = accesses.reuse()
    found, most = sum(req.num_cached_tokens for req in run.requests), int(reuse.optimal_tokens.sum())
    if found > most:
        raise EngineError(f"{found} prompt tokens were found in the cache, and the most that can be are {most}")
    told = int(reuse.stretches["num_found"].sum()) * reuse.block_size
    if told != found:
        raise EngineError(f"{found} prompt tokens were found in the cache, and {told} of what was asked for")


def _count(run: CellRun, runner: OracleRunner) -> None:
    """Add what happened to the run's coverage."""
    count = run.coverage
    count["read_once"] += 0 if runner.judge is None else runner.judge.num_saved
    for req in run.requests:
        count["preempted"] += req.num_preemptions
        count["recomputed"] += req.num_recomputed_tokens
        count["cached"] += req.num_cached_tokens
        count["loaded"] += req.num_loaded_tokens
    for kind in CopyKind:
        count[kind.value] += runner.num_copies[kind] - runner.num_moved[kind]
    count["went_down"] += runner.num_moved[CopyKind.SWAP_OUT]
    previous: StepOutput | None = None
    for output in run.outputs:
        usage = output.usage
        count["fragmented"] += usage.external > 0 and output.num_waiting > 0
        count["forked"] += len(output.plan.forked)
        count["beams_preempted"] += sum(req.search is not None for req in output.plan.preempted)
        count["short"] += usage.shortage > 0
        count["waiting_inside"] += not {entry.req for entry in output.plan.scheduled}.issuperset(output.plan.admitted)
        count["shared"] += usage.shared_saved > 0
        if previous is not None:
            before = {entry.req for entry in previous.plan.scheduled}
            hits = sum(start for req, start, _ in output.plan.scheduled if req not in before)
            count["evicted"] += max(0, previous.usage.cached - usage.cached - hits)
        previous = output
        count["steps"] += 1
        count["chunked"] += sum(start > 0 and num_new > 1 for _, start, num_new in output.plan.scheduled)
