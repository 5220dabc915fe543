"""Admission: order, watermark, chunks of long prompts, and what can never run."""

import pytest
from scheduler_simulation import request, simulate

from kvarena.allocators.paged import PagedAllocator
from kvarena.engine.clock import VirtualClock
from kvarena.engine.core import Engine, run_to_completion
from kvarena.engine.errors import ConfigError, RequestError, RequestRejected
from kvarena.engine.request import FinishReason, RequestStatus
from kvarena.experiments.correctness.oracle import OracleRunner
from kvarena.experiments.settings.strategies import strategy_names
from kvarena.schedulers.continuous import ContinuousScheduler

ITERATION_LEVEL = sorted(set(strategy_names("scheduler")) - {"static"})


@pytest.mark.parametrize("scheduler", ["continuous", "chunked", "priority", "fair"])
def test_equals_run_in_the_order_of_their_arrival(scheduler):
    load = [request(f"r{i}", 4, 20 - i) for i in range(10)]
    run = simulate(scheduler, max_num_seqs=2, max_num_batched_tokens=8).run(load)
    assert run.order == [f"r{i}" for i in range(10)]


def test_continuous_never_mixes_prompts_and_decodes():
    load = [request(f"r{i}", 5 + 7 * (i % 5), 12, arrival_time=0.03 * i) for i in range(30)]
    run = simulate("continuous", max_num_seqs=8, max_num_batched_tokens=16).run(load)
    kinds = [{entry.num_new_tokens > 1 for entry in step.plan.scheduled} for step in run.steps]
    # One token of a prompt may be left over from a chunk, so only steps of several prompt tokens are looked at.
    mixed = [step for step, kind in zip(run.steps, kinds, strict=True) if len(kind) == 2]
    decodes = [entry for step in mixed for entry in step.plan.scheduled if entry.start >= entry.req.num_prompt_tokens]
    assert decodes == []


def test_chunked_decodes_in_every_step_that_prefills():
    load = [request("first", 4, 40), request("second", 100, 4, arrival_time=0.05)]
    run = simulate("chunked", max_num_seqs=2, max_num_batched_tokens=11).run(load)
    chunks = [step for step in run.steps if any(e.req is load[1] and e.num_new_tokens > 1 for e in step.plan.scheduled)]
    assert [sorted(e.num_new_tokens for e in step.plan.scheduled) for step in chunks] == [[1, 10]] * 10


@pytest.mark.parametrize("scheduler", strategy_names("scheduler"))
def test_a_prompt_longer_than_the_budget_is_computed_in_chunks(scheduler):
    req = request("long", 50, 3)
    run = simulate(scheduler, max_num_seqs=8, max_num_batched_tokens=16).run([req])
    assert [(e.start, e.num_new_tokens) for step in run.steps[:4] for e in step.plan.scheduled] == [
        (0, 16),
        (16, 16),
        (32, 16),
        (48, 2),
    ]
    assert [step.plan.samples for step in run.steps[:4]] == [[False], [False], [False], [True]]
    assert len(req.output_token_ids) == 3


@pytest.mark.parametrize("scheduler", strategy_names("scheduler"))
def test_a_small_budget_limits_how_many_run(scheduler):
    run = simulate(scheduler, max_num_seqs=8, max_num_batched_tokens=3).run([request(f"r{i}", 4, 6) for i in range(9)])
    assert max(step.num_running for step in run.steps) == 3
    assert max(step.plan.num_new_tokens for step in run.steps) == 3


@pytest.mark.parametrize("scheduler", ITERATION_LEVEL)
def test_the_watermark_keeps_blocks_for_growth_but_never_blocks_an_idle_engine(scheduler):
    big, small = request("big", 70, 4), request("small", 4, 4)
    run = simulate(scheduler, num_blocks=20, watermark=0.2).run([big, small])  # 80 slots, 16 of them kept
    first = run.steps[0].plan.scheduled
    assert [entry.req for entry in first] == [big]  # over the watermark, but nothing else runs
    assert run.token_times["small"][0] > run.token_times["big"][-1]
    run = simulate(scheduler, num_blocks=20, watermark=0.0).run([request("big", 70, 4), request("small", 4, 4)])
    assert run.token_times["small"][0] < run.token_times["big"][-1]


@pytest.mark.parametrize(("num_prompt", "admitted"), [(16, True), (17, False)])
def test_the_watermark_itself_is_kept_and_no_more(num_prompt, admitted):
    first, second = request("first", 32, 8), request("second", num_prompt, 4)
    policy = simulate("continuous", num_blocks=20, watermark=0.4).engine.scheduler  # 32 of 80 slots
    for req in (first, second):
        policy.add(req)
    assert policy.schedule(0.0).admitted == ([first, second] if admitted else [first])


@pytest.mark.parametrize("scheduler", strategy_names("scheduler"))
def test_what_can_never_run_is_rejected_with_a_reason(scheduler):
    policy = simulate(scheduler, num_blocks=10, max_model_len=64).engine.scheduler
    for name, num_prompt, max_tokens, reason, setting in (
        ("context", 60, 5, "max_model_len", "engine.max_model_len=64"),
        ("pool", 30, 11, "max_request_tokens", "kv_cache.num_blocks"),
    ):
        with pytest.raises(RequestRejected, match=setting) as caught:
            policy.add(request(name, num_prompt, max_tokens))
        assert caught.value.reason == reason
    policy.add(request("fits", 30, 10))
    assert policy.num_waiting == 1
    with pytest.raises(RequestError, match="'fits' is in use"):
        policy.add(request("fits"))


def test_the_smallest_context_is_one_prompt_token_and_one_output_token():
    req = request("r", 1, 1)
    simulate("continuous", max_model_len=2).run([req])
    assert req.finish_reason is FinishReason.LENGTH


@pytest.mark.parametrize(("num_prompt", "num_steps"), [(8, 1), (7, 1), (20, 3)])
def test_nobody_is_admitted_beyond_the_tokens_of_the_step(num_prompt, num_steps):
    """The first prompt takes whole budgets of 8; the second comes in the step in which something is left."""
    policy = simulate("continuous", max_num_seqs=8, max_num_batched_tokens=8).engine.scheduler
    for req in (request("first", num_prompt), request("second", 1)):
        policy.add(req)
    admitted = []
    for _ in range(num_steps):
        plan = policy.schedule(0.0)
        admitted.append([req.request_id for req in plan.admitted])
        policy.update(plan, [1 if last else None for last in plan.samples])
    last = {8: ["first"], 7: ["first", "second"], 20: ["second"]}[num_prompt]
    assert admitted == ([["first"], []] if num_steps == 3 else []) + [last]


def test_fair_charges_the_prompt_once_and_then_sampled_tokens_alone():
    policy = simulate("fair", max_num_batched_tokens=8, input_weight=1.0, output_weight=2.0).engine.scheduler
    policy.add(request("r", 20, 4, client_id="c"))
    charged = []
    for _ in range(4):
        plan = policy.schedule(0.0)
        policy.update(plan, [1 if last else None for last in plan.samples])
        charged.append(policy.counters["c"])
    assert charged == [20, 20, 22, 24]


def test_fair_forgets_only_who_would_be_lifted_anyway():
    policy = simulate("fair").engine.scheduler
    policy.add(request("r", client_id="here"))
    policy.counters = {"here": 2.0, "ahead": 3.0, "behind": 1.0, "left last": 0.5}
    policy._last_to_leave = "left last"
    policy._forget()
    assert policy.counters == {"here": 2.0, "ahead": 3.0, "left last": 0.5}


class OptimisticAllocator(PagedAllocator):
    """Promises room for any request."""

    max_request_tokens = 10**6


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("preemption", ["recompute", "swap", "none"])
def test_a_request_that_outgrows_the_pool_alone_ends_with_an_error_and_the_others_go_on(preemption, overlap):
    allocator = OptimisticAllocator(num_blocks=10, block_size=4, max_model_len=200, swap_blocks=20)
    scheduler = ContinuousScheduler(allocator, max_model_len=200, preemption=preemption)
    engine = Engine(scheduler, allocator, OracleRunner(), VirtualClock(), overlap=overlap)
    load = [request("before", 10, 12), request("huge", 10, 100), request("after", 10, 12)]
    outputs = run_to_completion(engine, load)
    assert [req for output in outputs for req in output.plan.rejected] == [load[1]]
    assert load[1].finish_reason is FinishReason.ERROR
    assert "kv_cache.num_blocks" in load[1].error
    assert [req.finish_reason for req in (load[0], load[2])] == [FinishReason.LENGTH] * 2
    assert allocator.usage().owned == 0
    assert load[1].status is RequestStatus.FINISHED


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"max_num_seqs": 0}, "scheduler.max_num_seqs"),
        ({"max_num_batched_tokens": 0}, "scheduler.max_num_batched_tokens"),
        ({"watermark": 1.0}, "scheduler.watermark"),
        ({"watermark": True}, "scheduler.watermark"),
        ({"watermark": "half"}, "scheduler.watermark"),
        ({"preemption": "kill"}, "scheduler.preemption"),
        ({"victim": "nobody"}, "scheduler.victim"),
        ({"max_model_len": 1}, "engine.max_model_len"),
    ],
)
@pytest.mark.parametrize("scheduler", ITERATION_LEVEL)
def test_bad_options_name_themselves(scheduler, options, name):
    with pytest.raises(ConfigError, match=f"{name}=.* must be"):
        simulate(scheduler, **options)


@pytest.mark.parametrize(
    ("scheduler", "options", "name"),
    [
        ("sjf", {"predictor": "guess"}, "predictor"),
        ("sjf", {"sigma": -0.1}, "sigma"),
        ("sjf", {"ageing": 0.0}, "ageing"),
        ("fair", {"input_weight": 0.0}, "input_weight"),
        ("fair", {"output_weight": -1.0}, "output_weight"),
        ("fair", {"credit": -1.0}, "credit"),
    ],
)
def test_bad_policy_options_name_themselves(scheduler, options, name):
    with pytest.raises(ConfigError, match=f"scheduler.{name}=.* must be"):
        simulate(scheduler, **options)
