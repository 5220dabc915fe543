"""Chunks that are sized by what steps take: bounds of a step with decodes, the least chunk, and idle moments."""

import random
from itertools import pairwise
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scheduler_simulation import request, simulate

from kvarena.engine.contract import ScheduledRequest, StepPlan, StepTimes, cdiv
from kvarena.engine.errors import ConfigError
from kvarena.schedulers.chunked import CALM, HURRIED, LEAST_CHUNK, QUEUE_STEPS, _Decodes

TIMES = StepTimes(
    rows=(1, 64), decode_seconds=(0.004, 0.006), tokens=(64, 128, 256, 512, 1024, 4096),
    seconds=(0.0045, 0.005, 0.008, 0.014, 0.026, 0.1), per_kv_token=2e-8, per_pair=1e-9,
)  # fmt: skip


def by_times(times):
    """A step-time function of a simulation from what its scheduler is told."""

    def seconds(features):
        if not features.num_prefill_tokens:
            return times.decode(features.num_requests, features.num_kv_tokens)
        return times.step(features.num_tokens, features.num_kv_tokens, features.num_attention_pairs)

    return seconds


def timed(scheduler="chunked", *, times=TIMES, budget=16384, **options):
    run = simulate(scheduler, num_blocks=40_000, block_size=16, max_model_len=40_000, chunks="timed", watermark=0.0,
                   step_time=by_times(times or TIMES), max_num_batched_tokens=budget, **options)  # fmt: skip
    if times is not None:
        run.engine.scheduler.set_step_times(times)
    return run


def parts(plan):
    """Decodes of a step and the tokens of its prompts, whose starts and ends come with them."""
    chunks = [(entry.start, entry.start + entry.num_new_tokens) for entry in plan.scheduled[plan.num_decodes :]]
    return plan.scheduled[: plan.num_decodes], chunks, sum(end - start for start, end in chunks)


def watch(run, found):
    """Keep what waited before each plan, the length of the prompt whose turn it was, and the plan."""
    policy = run.engine.scheduler
    schedule = policy.schedule

    def watched(now):
        waiting = {req: req.num_tokens - req.num_computed_tokens for req in policy.requests.values()
                   if req not in policy.decoding}  # fmt: skip
        turn = next(iter(policy.order_prefills()), None) or policy.head()
        length = None if turn is None else turn.num_tokens
        plan = schedule(now)
        found.append((waiting, length, plan))
        return plan

    policy.schedule = watched


@given(
    seed=st.integers(0, 10**6), scheduler=st.sampled_from(["chunked", "fair", "priority", "sjf"]),
    max_step_time=st.sampled_from([None, 0.001, 0.02, 0.05]), overlap=st.booleans(), length=st.integers(1, 9000),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_a_step_with_decodes_stays_within_its_bound_or_has_the_least_chunk(
    seed, scheduler, max_step_time, overlap, length
):
    """Prompts of one length, so that what waits is known without the scheduler's own estimate."""
    rng = random.Random(seed)
    load = [request(f"r{i}", length, rng.randint(1, 40), arrival_time=rng.uniform(0, 1), priority=rng.randint(0, 2),
                    client_id=rng.choice("ab")) for i in range(rng.randint(1, 20))]  # fmt: skip
    run, found = timed(scheduler, overlap=overlap, max_step_time=max_step_time), []
    watch(run, found)
    run.run(load)
    assert all(req.finish_reason.value == "length" for req in load)
    for waiting, turn, plan in found:
        decodes, chunks, num_tokens = parts(plan)
        left = sum(waiting.values())
        if not decodes:
            assert num_tokens == min(left, 16384)
            continue
        if not left:
            continue
        least = max(LEAST_CHUNK, cdiv(turn, 8))
        assert num_tokens >= min(left, least), "prompts go on"
        kv_tokens = sum(entry.start + 1 for entry in decodes)
        pairs = sum((end - start) * (start + end + 1) / 2 for start, end in chunks)
        bound = max(max_step_time or 0, HURRIED * TIMES.decode(len(decodes), kv_tokens))
        if num_tokens > least:
            assert TIMES.step(len(decodes) + num_tokens, kv_tokens, pairs) <= bound + 1e-9
        if num_tokens > least and left <= QUEUE_STEPS * LEAST_CHUNK:
            calm = max(max_step_time or 0, CALM * TIMES.decode(len(decodes), kv_tokens))
            assert TIMES.step(len(decodes) + num_tokens, kv_tokens, pairs) <= calm + 1e-9


def test_the_chunk_is_the_largest_within_the_bound():
    """4.06 ms of decodes, so 6.1 with a chunk: 128 tokens in all take 5, 256 take 8."""
    run, found = timed(), []
    watch(run, found)
    run.run([request("long", 8, 200), request("late", 900, 4, arrival_time=0.1)])
    beside = [parts(plan) for _, _, plan in found if parts(plan)[0] and parts(plan)[2]]
    assert [num_tokens for _, _, num_tokens in beside] == [128] * 7 + [4]  # the least: 127 would fill the bucket
    patient = timed(max_step_time=0.0085)
    watch(patient, found := [])
    patient.run([request("long", 8, 200), request("late", 900, 4, arrival_time=0.1)])
    beside = [parts(plan)[2] for _, _, plan in found if parts(plan)[0] and parts(plan)[2]]
    assert beside == [255, 255, 255, 135]


def test_what_decodes_need_not_read_takes_no_time():
    """Decodes whose context is nearly all common bound a step as short ones do, once the engine has said so."""
    found = []
    for saved in (0, 4 * 30_000):
        run = timed()
        run.engine.scheduler.note_saved(saved)
        plan = StepPlan([ScheduledRequest(request(f"d{i}", 31_000, 9), 31_000, 1) for i in range(4)], [True] * 4)
        turn = request("p", 9000, 9)
        found.append(_Decodes(TIMES, plan, [turn], turn, run.engine.scheduler._num_kv_saved).seconds)
    assert found == [TIMES.decode(4, 124_004), TIMES.decode(4, 4004)]


def test_the_engine_says_what_was_saved():
    """When it changes, and before the scheduler plans again."""
    run, told = timed(), []
    run.engine.scheduler.note_saved = told.append
    saved = iter([0, 5, 5, 0])
    execute = run.engine.runner.execute

    def saving(plan, allocator):
        step = execute(plan, allocator)
        return SimpleNamespace(result=lambda: step.result()._replace(num_kv_saved=next(saved, 0)))

    run.engine.runner.execute = saving
    run.run([request("r", 20, 4)])
    assert told == [5, 0]


def test_one_step_takes_all_prompts_while_nobody_decodes():
    run, found = timed(), []
    watch(run, found)
    run.run([request(f"r{i}", 900, 3) for i in range(20)])
    assert parts(found[0][2])[2] == 16384  # of 18,000
    assert parts(found[1][2])[2] < 900


def test_long_prompts_go_on_and_a_long_queue_bounds_the_steps_as_well():
    """Alone the least chunk of 128 tokens took 250 steps for each prompt of 32,000."""
    run, found = timed(), []
    watch(run, found)
    load = [request(f"r{i}", 32_000, 256) for i in range(4)]
    run.run(load)
    steps = [parts(plan) for _, _, plan in found]
    assert min(num for decodes, chunks, num in steps if decodes and chunks and chunks[-1][1] < 32_000) >= 4000
    queue, found = timed(max_num_seqs=500), []
    watch(queue, found)
    queue.run([request(f"q{i}", 512, 300) for i in range(200)])
    with_prompts = [num for _, _, plan in found if (num := parts(plan)[2])]
    assert len(with_prompts) < 600
    longest = max(TIMES.step(plan.num_new_tokens, 0, 0) for _, _, plan in found if parts(plan)[0])
    assert longest <= HURRIED * TIMES.decode(200, 200 * 812), "an overload makes no step longer"


def test_hits_of_a_prefix_cache_do_not_count_as_what_is_left():
    """8,000 tokens of which 7,936 are cached: what is left is one small chunk, not an eighth of the prompt."""
    policy = timed(allocator="paged_prefix")
    policy.run([request("first", 8000, 2)])
    again = [request("decodes", 8, 300, arrival_time=policy.engine.clock.now()),
             request("second", 8000, 2, arrival_time=policy.engine.clock.now() + 0.05)]  # fmt: skip
    watch(policy, found := [])
    policy.run(again)
    beside = [parts(plan)[2] for _, _, plan in found if parts(plan)[0] and parts(plan)[2]]
    assert sum(beside) <= 64 + 16


def test_without_times_the_chunk_is_the_least_one():
    run, found = timed(times=None), []
    watch(run, found)
    assert run.engine.scheduler.wants_step_times
    run.run([request("long", 8, 100), request("late", 900, 4, arrival_time=0.1)])
    assert [parts(plan)[2] for _, _, plan in found if parts(plan)[0] and parts(plan)[2]] == [128] * 7 + [4]
    run.engine.scheduler.set_step_times(TIMES)
    assert not run.engine.scheduler.wants_step_times
    assert not simulate("chunked").engine.scheduler.wants_step_times
    assert not simulate("continuous").engine.scheduler.wants_step_times


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"chunks": "small"}, r"scheduler\.chunks"),
        ({"chunks": "timed", "max_step_time": 0}, r"scheduler\.max_step_time=0 must be above 0"),
        ({"chunks": "timed", "max_step_time": "fast"}, r"scheduler\.max_step_time"),
        ({"max_step_time": 0.01}, r"scheduler\.max_step_time=0\.01 must be left out, or scheduler\.chunks=timed"),
    ],
)
def test_bad_options_are_one_line(options, words):
    with pytest.raises(ConfigError, match=words):
        simulate("chunked", **options)


# ---- what the scheduler is told


def test_step_times_are_stairs_over_tokens_and_lines_over_rows():
    assert TIMES.decode(1, 0) == 0.004
    assert TIMES.decode(32, 1000) == pytest.approx(0.004 + 0.002 * 31 / 63 + 2e-5)
    assert TIMES.decode(127, 0) == pytest.approx(0.008)
    assert [TIMES.step(n, 0, 0) for n in (1, 64, 65, 128, 129)] == [0.0045, 0.0045, 0.005, 0.005, 0.008]
    assert TIMES.step(8192, 0, 0) == pytest.approx(0.1 + 4096 * 0.074 / 3072)
    assert StepTimes.of(TIMES.facts) == TIMES
    alone = StepTimes((1,), (0.1,), (16,), (0.2,))
    assert (alone.decode(50, 0), alone.step(5000, 0, 0)) == (0.1, 0.2)
    assert all(a <= b for a, b in pairwise(TIMES.step(n, 0, 0) for n in range(1, 5000, 7)))


@pytest.mark.parametrize(
    "wrong", [{"rows": ()}, {"rows": (4, 1)}, {"seconds": (1.0,)}, {"per_pair": -1.0}, {"decode_seconds": (0.2, 0.1)}]
)
def test_tables_that_fall_are_refused(wrong):
    with pytest.raises(ConfigError, match="step_times"):
        StepTimes(**({"rows": (1, 2), "decode_seconds": (0.1, 0.2), "tokens": (1, 2), "seconds": (0.1, 0.2)} | wrong))
    with pytest.raises(ConfigError, match="must have the numbers of a fit"):
        StepTimes.of({"rows": [1]})
