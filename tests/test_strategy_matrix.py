"""Every registered allocator x every registered scheduler against the oracle, and faults that it must catch.

A strategy is in here as soon as conf/allocator or conf/scheduler has a file for it.
"""

import json

import pytest

from kvarena.allocators.blocks import BlockPool
from kvarena.allocators.contiguous import ContiguousAllocator
from kvarena.allocators.eviction_policies import policy_names
from kvarena.allocators.hash_index import HashIndex
from kvarena.allocators.host_level import HostLevel
from kvarena.allocators.moves import Moves
from kvarena.allocators.paged import PagedAllocator
from kvarena.allocators.placement import Buddy
from kvarena.allocators.prefix import PrefixCachingAllocator
from kvarena.engine.contract import CopyKind, KVAllocator, QueueHead
from kvarena.engine.copies import arrive_in_order
from kvarena.engine.errors import EngineError
from kvarena.engine.request import Request
from kvarena.experiments.correctness.oracle import OracleRunner
from kvarena.experiments.correctness.oracle_link import SlowLink
from kvarena.experiments.fuzzing import random_traces
from kvarena.experiments.fuzzing import traces as fuzz
from kvarena.experiments.fuzzing.matrix import (
    PATHS,
    WINDOW,
    Cell,
    Coverage,
    MatrixFailure,
    allocator_cells,
    cells_of_round,
    eviction_of,
    run_cell,
    takes_levels,
)
from kvarena.experiments.fuzzing.random_traces import make_trace
from kvarena.experiments.fuzzing.recount import Recount
from kvarena.experiments.settings.strategies import strategy_names
from kvarena.schedulers.base import Scheduler

TRACES = [make_trace(seed) for seed in range(6)]
SCHEDULERS = strategy_names("scheduler")


@pytest.mark.parametrize("traces", [TRACES[:2], pytest.param(TRACES, marks=pytest.mark.slow)], ids=["two", "all"])
@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize(("allocator", "window"), allocator_cells())
def test_tokens_plans_ledger_and_pool_are_right(allocator, window, scheduler, traces):
    """Two traces here; six, and the 10,000 of the fuzzer, in `make test-all`.

    A prefix cache has another eviction policy in each run: with two traces each has its turn.
    """
    turn = 4 * SCHEDULERS.index(scheduler) + 2 * (allocator == "radix")
    for number, trace in enumerate(traces):
        for overlap in (False, True):
            policy = eviction_of(allocator, turn + 2 * number + overlap)
            run_cell(trace, Cell(allocator, scheduler, overlap, window, policy))


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("allocator", [name for name, _ in allocator_cells() if eviction_of(name, 0)])
def test_blocks_that_went_down_and_came_up_carry_the_right_kv(allocator, scheduler):
    """With a level below the pool, whose transfers take up to nine steps; each policy has its turn."""
    coverage, names = Coverage(), [name for name in policy_names() if takes_levels(name)]
    for number in range(8):
        policy = names[(2 * SCHEDULERS.index(scheduler) + number) % len(names)]
        trace = make_trace(30 + number)
        coverage += run_cell(trace, Cell(allocator, scheduler, number % 2 == 1, eviction=policy, levels=True)).coverage
    assert coverage["went_down"] > 0 and coverage["loaded"] > 0


def test_what_came_up_for_a_request_that_is_preempted_at_once_is_known_to_be_cached():
    """The recount took it for what the blocks held before."""
    run_cell(make_trace(9352), Cell("paged_prefix", "sjf", eviction="s3fifo", levels=True))


def test_every_eviction_policy_is_in_the_matrix():
    turns = [4 * i + 2 * number + overlap for i in range(len(SCHEDULERS)) for number in (0, 1) for overlap in (0, 1)]
    assert {eviction_of("radix", turn + 2) for turn in turns} == set(policy_names())
    assert {eviction_of("paged_prefix", turn) for turn in turns} == set(policy_names())
    assert eviction_of("paged", 0) is None


@pytest.mark.parametrize(("rounds", "least"), [(1, 1), pytest.param(4, 5, marks=pytest.mark.slow)])
def test_the_traces_reach_every_path(rounds, least):
    coverage = Coverage()
    for index in range(rounds * len(SCHEDULERS)):
        trace = make_trace(1000 + index)
        for cell in cells_of_round(index):
            coverage += run_cell(trace, cell).coverage
    assert [path for path in PATHS if coverage[path] < least] == []


def test_rounds_cover_every_pair():
    pairs = {
        (cell.allocator, cell.window, cell.scheduler, cell.overlap)
        for index in range(2 * len(SCHEDULERS))
        for cell in cells_of_round(index)
    }
    assert len(pairs) == 2 * len(SCHEDULERS) * len(allocator_cells())


# ---- seeded faults: each must be caught, or the matrix proves nothing


def first_failure(allocator: str, window: int | None = None, *, levels: bool = False) -> str:
    """The first failure of `allocator` in some traces; fails the test when there is none."""
    for seed in range(40):
        trace = make_trace(seed)
        for overlap in (False, True):
            for scheduler in SCHEDULERS:
                try:
                    eviction = "lru" if levels else None
                    run_cell(trace, Cell(allocator, scheduler, overlap, window, eviction, levels))
                except MatrixFailure as failure:
                    return str(failure)
    return pytest.fail("the fault was not caught")


@pytest.fixture
def no_recount(monkeypatch):
    """The oracle alone: the recount of the ledger would see the fault a step earlier."""
    monkeypatch.setattr(Recount, "observe", lambda self, step: None)
    monkeypatch.setattr(Recount, "check", lambda self, settled: None)


@pytest.mark.usefixtures("no_recount")
def test_a_stale_hash_on_reuse_is_caught(monkeypatch):
    def evict(self, num_blocks):
        blocks = [link.block for link in self.order.evict(num_blocks)]
        for block in blocks:
            self._published.pop(block)  # and its link still says where it was
        return blocks

    monkeypatch.setattr(HashIndex, "evict", evict)
    assert "holds the KV of other tokens" in first_failure("paged_prefix")


def test_a_wrong_buddy_merge_is_caught(monkeypatch):
    def give(self, start, num_blocks):
        offset, size = start - 1, self.extent(num_blocks)
        self.num_free += size
        while offset + size in self._free.get(size, ()):  # the next region, buddy or not
            del self._free[size][offset + size]
            size *= 2
        self._free[size][offset] = None

    monkeypatch.setattr(Buddy, "give", give)
    assert first_failure("orca_oracle")


@pytest.mark.usefixtures("no_recount")
def test_a_leaked_block_is_caught(monkeypatch):
    give = BlockPool.give
    monkeypatch.setattr(BlockPool, "give", lambda self, blocks: give(self, list(blocks)[:-1] or blocks))
    assert "the pool is not whole" in first_failure("paged")


def test_a_free_while_shared_is_caught(monkeypatch):
    monkeypatch.setattr(PagedAllocator, "_release", lambda self, blocks: [block for block in blocks if block])
    assert first_failure("paged")


def test_a_fork_without_its_copy_is_caught(monkeypatch):
    drain = PagedAllocator.drain_copies
    monkeypatch.setattr(
        PagedAllocator, "drain_copies", lambda self: [c for c in drain(self) if c.kind is not CopyKind.DEVICE]
    )
    assert " holds " in first_failure("paged")


def test_a_swap_without_copy_back_is_caught(monkeypatch):
    drain = PagedAllocator.drain_copies
    monkeypatch.setattr(
        PagedAllocator, "drain_copies", lambda self: [c for c in drain(self) if c.kind is not CopyKind.SWAP_IN]
    )
    assert " holds " in first_failure("paged")


def test_a_window_off_by_one_is_caught(monkeypatch):
    slid_at = PagedAllocator._num_slid_at
    monkeypatch.setattr(PagedAllocator, "_num_slid_at", lambda self, num_computed: slid_at(self, num_computed + 1))
    assert "holds nothing" in first_failure("paged", WINDOW)


@pytest.mark.usefixtures("no_recount")
def test_a_region_in_two_pieces_is_caught(monkeypatch):
    def torn(self, req):
        region = self._regions[req]
        return [*region[:-1], region.start]

    monkeypatch.setattr(ContiguousAllocator, "block_table", torn)
    assert "not contiguous" in first_failure("contiguous")


def test_a_hit_on_the_whole_prompt_is_caught(monkeypatch):
    def whole(self, req):
        return self._index.match(req, req.num_tokens // self.block_size) * self.block_size

    monkeypatch.setattr(PrefixCachingAllocator, "match_prefix", whole)
    assert first_failure("paged_prefix")


@pytest.mark.usefixtures("no_recount")
@pytest.mark.parametrize("allocator", ["paged_prefix", "radix"])
def test_a_prefix_cache_that_looks_at_placeholder_ids_alone_is_caught(monkeypatch, allocator):
    """Two images have the same ids and as many of them: only their digests keep their blocks apart."""
    make = Request.__post_init__

    def by_ids(self):
        make(self)
        self.true_identities = self.prompt_identities
        self.prompt_identities = self.prompt_token_ids

    class Blind(Request):
        __slots__ = ("true_identities",)
        __post_init__ = by_ids

        def identities(self, start, stop):
            return self.token_ids(start, stop)

    def seen(self, req, pos):
        known = pos < req.num_prompt_tokens and hasattr(req, "true_identities")
        return req.true_identities[pos] if known else token(self, req, pos)

    token = OracleRunner._token
    monkeypatch.setattr(OracleRunner, "_token", seen)
    monkeypatch.setattr(random_traces, "Request", Blind)
    assert "holds the KV of other tokens" in first_failure(allocator)


def test_a_preempted_request_that_starts_too_late_is_caught(monkeypatch):
    take_slots = Scheduler._take_slots

    def keep_one(self, req):
        taken = take_slots(self, req)
        if taken and req.num_preemptions and req.num_computed_tokens == 0 < req.num_tokens - 1:
            req.num_computed_tokens = 1
        return taken

    monkeypatch.setattr(Scheduler, "_take_slots", keep_one)
    assert "position 0" in first_failure("paged")


def test_a_token_of_a_request_that_ended_is_not_taken_in_twice(monkeypatch):
    update = Scheduler.update

    def update_all(self, plan, sampled):
        for entry, token in zip(plan.scheduled, sampled, strict=True):
            if entry.req.is_finished and token is not None:
                entry.req.output_token_ids.append(token)
        return update(self, plan, sampled)

    monkeypatch.setattr(Scheduler, "update", update_all)
    assert "overlap" in first_failure("paged")


def test_beams_that_hold_are_not_swapped_where_a_window_slid_past_what_they_compute_again():
    run = run_cell(make_trace(5080), Cell("paged", "priority", overlap=True, window=8))
    assert run.coverage["beams_preempted"] and run.coverage["swap_out"]


# ---- what the recount of the ledger must catch


def test_a_residency_that_begins_with_its_first_step_is_caught(monkeypatch):
    schedule = Scheduler.schedule

    def forget(self, now):
        plan = schedule(self, now)
        plan.admitted = []
        return plan

    monkeypatch.setattr(Scheduler, "schedule", forget)
    assert "slots of " in first_failure("contiguous")


def test_every_small_hole_called_external_is_caught(monkeypatch):
    def count(self):
        usage = counted(self)
        return usage._replace(external=usage.external + usage.free, free=0)

    counted = ContiguousAllocator.count
    monkeypatch.setattr(ContiguousAllocator, "count", count)
    assert "slots of external" in first_failure("orca_oracle")


@pytest.mark.parametrize("allocator", ["contiguous", "orca_oracle", "paged", "paged_prefix", "radix", "virtual"])
def test_a_shortage_called_free_is_caught(monkeypatch, allocator):
    monkeypatch.setattr(KVAllocator, "usage", lambda self, head=None: self.count())
    assert "slots of " in first_failure(allocator)


@pytest.mark.parametrize("allocator", ["paged_prefix", "radix"])
def test_a_need_that_forgets_what_the_head_would_share_is_caught(monkeypatch, allocator):
    monkeypatch.setattr(PrefixCachingAllocator, "_num_shared_hits", lambda self, req: 0)
    assert "slots of shortage" in first_failure(allocator)


def test_a_need_that_forgets_the_parents_prompt_is_caught(monkeypatch):
    monkeypatch.setattr(PagedAllocator, "_can_fork", lambda self, req, num_shared: False)
    assert "slots of shortage" in first_failure("paged")


def test_a_head_that_asks_for_less_than_its_admission_takes_is_caught(monkeypatch):
    def head(self):
        req = self.head()
        return None if req is None else QueueHead(req, req.num_tokens)

    monkeypatch.setattr(Scheduler, "queue_head", head)
    assert "slots of shortage" in first_failure("paged")


@pytest.mark.usefixtures("no_recount")
def test_a_block_that_goes_while_it_is_read_is_caught(monkeypatch):
    monkeypatch.setattr(HostLevel, "read", lambda self, held: None)
    monkeypatch.setattr(HostLevel, "unread", lambda self, held: None)
    assert "position" in first_failure("paged_prefix", levels=True)


@pytest.mark.usefixtures("no_recount")
def test_blocks_that_are_handed_out_before_copies_into_them_arrive_are_caught(monkeypatch):
    def leave(self, req, table, copies):
        move = self._loads.pop(req, None)
        if move is not None:
            move.req = None  # and its blocks are free at once
        return copies

    monkeypatch.setattr(Moves, "leave", leave)
    assert "holds" in first_failure("radix", levels=True)


@pytest.mark.usefixtures("no_recount")
def test_a_request_that_does_not_wait_for_its_blocks_is_caught(monkeypatch):
    monkeypatch.setattr(SlowLink, "launch", lambda self, copies: arrive_in_order(copies))
    monkeypatch.setattr(SlowLink, "due", lambda self: [])
    assert "holds nothing" in first_failure("paged_prefix", levels=True)


def test_books_of_a_level_that_do_not_add_up_are_caught(monkeypatch):
    usage = HostLevel.usage
    monkeypatch.setattr(HostLevel, "usage", lambda self: usage(self)._replace(arriving=1))
    assert "the level below the KV pool do not add up" in first_failure("paged_prefix", levels=True)


# ---- the long version


def test_fuzz_ends_in_a_line_of_json(capsys):
    assert fuzz.main(["--traces", "3", "--seed", "7"]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["traces"] == 3
    assert report["runs"] == 3 * len(allocator_cells())
    assert report["failures"] == 0
    assert report["happened"]["preempted"] > 0


def test_fuzz_reports_failures_and_stops(capsys, monkeypatch):
    def broken(trace, cell):
        raise MatrixFailure(f"trace {trace.seed}, {cell}: broken")

    monkeypatch.setattr(fuzz, "run_cell", broken)
    assert fuzz.main(["--traces", "50", "--max-failures", "3"]) == 1
    captured = capsys.readouterr()
    report = json.loads(captured.out.splitlines()[-1])
    assert report["traces"] < 50
    assert report["first_failure"].startswith("trace 0, ")
    assert "broken" in captured.err
    assert issubclass(MatrixFailure, EngineError)
