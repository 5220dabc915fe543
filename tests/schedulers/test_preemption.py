"""Preemption: who loses its slots, what it costs, and what happens to tokens that are on their way."""

import pytest
from scheduler_simulation import request, simulate

from kvarena.allocators.paged import PagedAllocator
from kvarena.engine.clock import VirtualClock
from kvarena.engine.contract import CopyKind, StepPlan
from kvarena.engine.core import Engine, StepFailed, run_to_completion
from kvarena.engine.request import FinishReason, RequestStatus
from kvarena.experiments.correctness.oracle import OracleRunner, expected_output
from kvarena.experiments.settings.strategies import strategy_names
from kvarena.schedulers.continuous import ContinuousScheduler

ITERATION_LEVEL = sorted(set(strategy_names("scheduler")) - {"static"})


def paged(num_blocks: int = 10, **options) -> PagedAllocator:
    return PagedAllocator(num_blocks=num_blocks, block_size=4, max_model_len=200, **options)


def scheduler_on(allocator, cls=ContinuousScheduler, **options):
    return cls(allocator, max_model_len=200, max_num_seqs=8, max_num_batched_tokens=64, watermark=0.0, **options)


@pytest.mark.parametrize(("victim", "name"), [("last_arrived", "c"), ("lowest_priority", "b"), ("most_blocks", "d")])
def test_the_victim_policy_picks(victim, name):
    scheduler = scheduler_on(paged(), victim=victim)
    for name_, num_prompt, priority in (("a", 4, 9), ("d", 12, 0), ("b", 4, 5), ("c", 4, 0)):
        scheduler.add(request(name_, num_prompt, 8, priority=priority))
    plan = scheduler.schedule(0.0)
    scheduler.update(plan, [1] * len(plan.scheduled))
    # `a` arrived first and is never picked while others run, whatever the policy says of it.
    assert scheduler.pick_victim().request_id == name


def test_the_first_of_two_is_never_picked():
    scheduler = scheduler_on(paged(), victim="lowest_priority")
    for name, priority in (("first", 9), ("second", 0)):
        scheduler.add(request(name, priority=priority))
    scheduler.schedule(0.0)
    assert scheduler.pick_victim().request_id == "second"


@pytest.mark.parametrize(
    ("victim", "preemption", "has"),
    [("lowest_priority", "swap", True), ("lowest_priority", "none", False), ("most_blocks", "swap", False)],
)
def test_priorities_count_where_they_pick_a_victim(victim, preemption, has):
    assert scheduler_on(paged(), victim=victim, preemption=preemption).has_priorities is has


def test_a_victim_leaves_the_step_that_is_planned():
    scheduler = scheduler_on(paged(num_blocks=7), victim="most_blocks")
    first, big, grows = request("first", 5), request("big", 9), request("grows", 8)
    for req in (first, big, grows):
        scheduler.add(req)
    plan = scheduler.schedule(0.0)
    scheduler.update(plan, [1] * 3)
    plan = scheduler.schedule(0.0)  # `big` has its place in the step when `grows` needs a third block
    assert plan.preempted == [big] and plan.scheduled == [(first, 5, 1), (grows, 8, 1)]
    assert plan.num_decodes == len(plan.samples) == 2
    assert (big.num_computed_tokens, big.num_pending_tokens, big.num_recomputed_tokens) == (0, 0, 0)
    scheduler.preempt(grows, plan)
    assert plan.scheduled == [(first, 5, 1)] and plan.num_decodes == 1


def test_tokens_are_counted_as_recomputed_only_when_their_step_runs():
    scheduler, plan = scheduler_on(paged(num_blocks=30)), StepPlan()
    scheduler.max_num_batched_tokens = 8
    req = request("r", 20, 4)
    scheduler.add(req)
    for _ in range(3):
        plan = scheduler.schedule(0.0)
        scheduler.update(plan, [1 if last else None for last in plan.samples])
    scheduler.preempt(req, StepPlan())  # 20 tokens are lost
    plan = scheduler.schedule(0.0)
    assert req.num_recomputed_tokens == 8
    scheduler.preempt(req, plan)  # the step is planned anew
    assert plan.scheduled == [] and req.num_recomputed_tokens == 0
    scheduler.schedule(0.0)
    scheduler.preempt(req, StepPlan())  # 8 tokens are lost again, and 20 were computed before
    while scheduler.has_work:
        plan = scheduler.schedule(0.0)
        scheduler.update(plan, [1 if last else None for last in plan.samples])
    assert req.num_recomputed_tokens == 8 + 20
    kept = {name: value for name, value in vars(scheduler).items() if isinstance(value, dict) and value}
    assert kept == {}  # nothing of a request that has ended


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("preemption", ["recompute", "swap"])
def test_dropped_tokens_are_counted_as_recomputed_and_swapped_ones_are_not(preemption, overlap):
    load = [request("a", 16, 20), request("b", 15, 20)]  # 40 slots: both start, one can finish at a time
    allocator, runner = paged(swap_blocks=20), OracleRunner()
    engine = Engine(scheduler_on(allocator, preemption=preemption), allocator, runner, VirtualClock(), overlap=overlap)
    outputs = run_to_completion(engine, load)
    a, b = load
    assert a.num_preemptions == 0
    assert b.num_preemptions >= 1
    computed = sum(e.num_new_tokens for o in outputs for e in o.plan.scheduled if e.req is b)
    again = computed - (b.num_tokens - 1)
    assert again == b.num_recomputed_tokens
    assert (again > 0) is (preemption == "recompute")
    assert (runner.num_copies[CopyKind.SWAP_IN] > 0) is (preemption == "swap")
    assert b.output_token_ids == expected_output(b)


def test_no_preemption_reserves_the_whole_life():
    load = [request(f"r{i}", 6, 14) for i in range(9)]
    run = simulate("chunked", num_blocks=16, preemption="none").run(load)  # 5 blocks each
    assert max(step.num_running for step in run.steps) == 3
    assert all(req.num_preemptions == 0 for req in load)


def test_a_prefix_hit_after_a_preemption_is_not_counted_as_recomputed():
    load = [request("a", 16, 20), request("b", 15, 20)]
    run = simulate("continuous", num_blocks=10, allocator="paged_prefix", watermark=0.0)
    run.run(load)
    victim = load[1]
    assert victim.num_preemptions >= 1
    computed = sum(e.num_new_tokens for s in run.steps for e in s.plan.scheduled if e.req is victim)
    first_hit = victim.num_cached_tokens
    assert computed + first_hit - (victim.num_tokens - 1) == victim.num_recomputed_tokens


def test_swapped_in_without_room_for_the_next_token_is_recomputed():
    allocator = paged(num_blocks=4, swap_blocks=8)
    scheduler = scheduler_on(allocator, preemption="swap")
    runs, swapped = request("runs", 4, 5), request("swapped", 4, 9)
    for req in (runs, swapped):
        scheduler.add(req)
    scheduler.update(scheduler.schedule(0.0), [1, 1])
    scheduler.preempt(swapped, plan := StepPlan())
    assert swapped.status is RequestStatus.SWAPPED
    # It needs a second block for its next token; when it is back, the pool is full.
    blocks_back = allocator.swap_in
    allocator.swap_in = lambda req: blocks_back(req) and bool(allocator.allocate(runs, 12))
    scheduler.admit_waiting(plan)
    assert swapped.status is RequestStatus.WAITING
    assert swapped.num_slots == swapped.num_computed_tokens == 0
    allocator.swap_in = blocks_back
    allocator.free(runs)
    scheduler.abort("runs")
    assert [e.num_new_tokens for e in scheduler.schedule(0.0).scheduled] == [5]
    assert swapped.num_recomputed_tokens == 4


# ---- overlap


@pytest.mark.parametrize("scheduler", strategy_names("scheduler"))
def test_overlap_never_computes_past_max_tokens(scheduler):
    load = [request(f"r{i}", 5, 1 + i) for i in range(8)]
    run = simulate(scheduler, overlap=True, max_num_seqs=4, max_num_batched_tokens=16).run(load)
    for req in load:
        computed = sum(e.num_new_tokens for s in run.steps for e in s.plan.scheduled if e.req is req)
        assert computed == req.num_prompt_tokens + req.sampling.max_tokens - 1
        assert req.num_pending_tokens == 0


def test_a_request_preempted_in_flight_waits_for_its_token():
    allocator = paged()
    scheduler = scheduler_on(allocator)
    req = request("r", 4, 8)
    scheduler.add(req)
    in_flight = scheduler.schedule(0.0)
    scheduler.preempt(req, scheduler.schedule(0.0))
    assert scheduler.schedule(0.0).scheduled == []
    scheduler.update(in_flight, [7])
    assert req.output_token_ids == [7]
    plan = scheduler.schedule(0.0)
    assert [(e.start, e.num_new_tokens) for e in plan.scheduled] == [(0, 5)]
    assert req.num_recomputed_tokens == 4  # position 4 was planned, and taken out of the plan again


def test_a_request_preempted_in_flight_may_end_with_its_token():
    allocator = paged(swap_blocks=8)
    for preemption in ("recompute", "swap"):
        scheduler = scheduler_on(allocator, preemption=preemption)
        req = request("r", 4, 1)
        scheduler.add(req)
        in_flight = scheduler.schedule(0.0)
        plan = scheduler.schedule(0.0)
        scheduler.preempt(req, plan)
        assert scheduler.update(in_flight, [7]) == [req]
        assert not scheduler.has_work
        assert scheduler.head() is None
        allocator.drain_copies()
        assert allocator.usage().owned == 0


# ---- abort and fail


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("scheduler", strategy_names("scheduler"))
def test_abort_works_in_every_state_and_only_once(scheduler, overlap):
    options = {} if scheduler == "static" else {"watermark": 0.0}
    run = simulate(scheduler, num_blocks=10, max_num_seqs=2, max_num_batched_tokens=16, overlap=overlap, **options)
    engine = run.engine
    load = [request("decoding", 4, 20), request("prefilling", 18, 12), request("waiting", 4, 12)]
    for req in load:
        engine.add(req)
    engine.clock.advance(1.0)
    engine.step()
    for req in load:
        assert engine.abort(req.request_id) is req
        assert req.finish_reason is FinishReason.ABORT
        assert engine.abort(req.request_id) is None
    while engine.has_work:
        engine.step()
    assert [req.output_token_ids for req in load if req.output_token_ids] in ([], [[0]])
    assert engine.allocator.usage().owned == 0
    assert engine.scheduler.num_waiting == engine.scheduler.num_running == 0


def test_a_failed_step_ends_its_requests_and_no_others():
    scheduler = scheduler_on(paged())
    load = [request("a", 16, 4), request("b", 16, 4), request("c", 16, 4)]
    for req in load:
        scheduler.add(req)
    plan = scheduler.schedule(0.0)
    assert scheduler.fail(plan) == load[:2]
    assert all(req.finish_reason is FinishReason.ERROR and req.error for req in load[:2])
    assert scheduler.head() is load[2]
    assert scheduler.allocator.usage().owned == 0


def test_what_a_failed_step_should_have_swapped_is_computed_again():
    allocator, runner = paged(swap_blocks=20), OracleRunner()
    scheduler = scheduler_on(allocator, preemption="swap")
    load = [request("a", 16, 20), request("b", 15, 20)]
    engine = Engine(scheduler, allocator, runner, VirtualClock())
    for req in load:
        engine.add(req)
    execute = runner.execute

    def fail_at_the_swap(plan, blocks):
        if plan.copies:
            runner.execute = execute
            raise RuntimeError("out of memory")
        return execute(plan, blocks)

    runner.execute = fail_at_the_swap
    with pytest.raises(StepFailed) as caught:
        while engine.has_work:
            engine.step()
    assert load[1].status is RequestStatus.SWAPPED
    assert scheduler.fail(caught.value.plan) == [load[0]]
    while engine.has_work:
        engine.step()  # the oracle would see KV that never came back
    assert load[1].output_token_ids == expected_output(load[1])
    assert load[1].num_recomputed_tokens > 0
    assert allocator.usage().owned == 0
