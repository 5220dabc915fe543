"""n > 1: children fork their parent's prompt, or compute it themselves when the parent cannot share it."""

import pytest
from scheduler_simulation import simulate

from kvarena.engine.clock import VirtualClock
from kvarena.engine.contract import CopyKind
from kvarena.engine.core import Engine, run_to_completion
from kvarena.engine.ledger import MemoryLedger
from kvarena.engine.request import Request, SamplingParams, expand
from kvarena.experiments.correctness.oracle import OracleRunner, expected_output
from kvarena.experiments.settings.strategies import strategy_names

ITERATION_LEVEL = sorted(set(strategy_names("scheduler")) - {"static"})


def samples(n: int = 3, num_prompt: int = 10, max_tokens: int = 6, seed: int | None = 5) -> list[Request]:
    prompt = list(range(num_prompt))
    return expand(
        Request("r", prompt, SamplingParams(max_tokens=max_tokens, n=n, seed=seed), client_id="c", priority=2)
    )


def test_expand_names_links_and_seeds():
    first, second, third = group = samples()
    assert [req.request_id for req in group] == ["r-0", "r-1", "r-2"]
    assert first.parent is None
    assert second.parent is third.parent is first
    assert first.sampling.seed == 5
    assert len({req.sampling.seed for req in group}) == 3
    assert all(req.sampling.n == 1 and req.client_id == "c" and req.priority == 2 for req in group)
    assert all(req.sampling.seed is None for req in samples(seed=None))
    single = Request("s", [1])
    assert expand(single) == [single]


def run_group(scheduler: str, group: list[Request], allocator: str = "paged", overlap: bool = False, **options):
    """Through the oracle; returns (positions computed per request, the runner, the allocator)."""
    engine = simulate(scheduler, allocator=allocator, **options).engine
    runner = OracleRunner()
    engine = Engine(engine.scheduler, engine.allocator, runner, VirtualClock(), overlap, MemoryLedger())
    outputs = run_to_completion(engine, group)
    computed = {req.request_id: 0 for req in group}
    for output in outputs:
        for entry in output.plan.scheduled:
            computed[entry.req.request_id] += entry.num_new_tokens
    assert engine.allocator.usage().owned == 0
    assert [req.output_token_ids for req in group] == [expected_output(req) for req in group]
    return computed, runner, outputs


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("scheduler", ITERATION_LEVEL)
def test_children_compute_only_the_last_token_of_the_prompt(scheduler, overlap):
    computed, runner, outputs = run_group(scheduler, samples(), overlap=overlap)
    assert computed == {"r-0": 15, "r-1": 6, "r-2": 6}
    assert runner.num_copies[CopyKind.DEVICE] >= 2  # the half-filled block, once for each child
    assert max(output.usage.shared_saved for output in outputs) == 2 * 8  # two full blocks, two children


@pytest.mark.parametrize("scheduler", ITERATION_LEVEL)
def test_children_compute_the_prompt_where_the_allocator_cannot_share(scheduler):
    computed, runner, _ = run_group(scheduler, samples(), allocator="contiguous", max_model_len=64)
    assert set(computed.values()) == {15}
    assert runner.num_copies[CopyKind.DEVICE] == 0


def test_a_static_batch_runs_samples_as_requests_of_their_own():
    computed, _, _ = run_group("static", samples())
    assert set(computed.values()) == {15}


@pytest.mark.parametrize("scheduler", ITERATION_LEVEL)
def test_children_wait_for_a_prompt_that_takes_several_steps_and_do_not_block_others(scheduler):
    engine = simulate(scheduler, max_num_seqs=8, max_num_batched_tokens=8).engine
    group, other = samples(num_prompt=30), Request("other", [1] * 4, priority=2)
    for req in (*group, other):
        engine.add(req)
    engine.step()
    assert engine.scheduler.head() is other
    assert engine.scheduler.num_waiting == 3
    while engine.has_work:
        engine.step()
    assert engine.allocator.usage().owned == 0


@pytest.mark.parametrize("scheduler", strategy_names("scheduler"))
def test_children_of_an_aborted_parent_run_on_their_own(scheduler):
    engine = simulate(scheduler, max_num_seqs=8, max_num_batched_tokens=8).engine
    group = samples(num_prompt=30)
    for req in group:
        engine.add(req)
    engine.clock.advance(1.0)
    engine.step()
    assert engine.abort("r-0") is group[0]
    assert engine.abort("r-1") is group[1]  # a child that waits for its parent
    while engine.has_work:
        engine.step()
    assert [len(req.output_token_ids) for req in group] == [0, 0, 6]
    assert engine.allocator.usage().owned == 0


def test_children_fit_into_a_pool_that_could_not_hold_their_prompts_apart():
    group = samples(n=4, num_prompt=33, max_tokens=3)  # 9 blocks each; forked: 8 shared and one each
    _, _, outputs = run_group("chunked", group, num_blocks=14, watermark=0.0)
    assert max(output.num_running for output in outputs) == 4


# ---- forks at the limits: what is asked of the pool is what a child takes beside the shared blocks


def forked(num_blocks: int, watermark: float, num_prompt: int = 33):
    """A parent that decodes, and the plan in which its child was first considered; blocks of 4."""
    engine = simulate("continuous", num_blocks=num_blocks, watermark=watermark).engine
    parent, child = samples(n=2, num_prompt=num_prompt, max_tokens=3)
    engine.add(parent)
    engine.step()
    engine.add(child)
    plan = engine.scheduler.schedule(0.0)
    return engine, plan, parent, child


def test_a_child_that_was_added_after_its_parents_prompt_is_admitted_at_once():
    _, plan, _, child = forked(num_blocks=20, watermark=0.0)
    assert plan.admitted == [child] and (child, 32, 1) in plan.scheduled


def test_a_child_of_a_parent_that_has_ended_computes_its_prompt():
    engine = simulate("continuous").engine
    parent, child = samples(n=2)
    engine.add(parent)
    while engine.has_work:
        engine.step()
    engine.add(child)
    plan = engine.scheduler.schedule(0.0)
    assert plan.admitted == [child] and plan.scheduled[0].start == 0


# The parent has 9 of 20 blocks, 36 of 80 slots; the child shares 8 and asks for one slot more.
@pytest.mark.parametrize(("num_blocks", "watermark", "admitted"), [(20, 0.54, True), (20, 0.55, False)])
def test_a_child_leaves_the_watermark_free_beside_the_blocks_that_it_shares(num_blocks, watermark, admitted):
    engine, plan, _, child = forked(num_blocks, watermark)
    assert plan.admitted == ([child] if admitted else [])
    assert engine.allocator.usage().owned == 4 * (10 if admitted else 9)


def test_a_child_without_room_for_its_own_block_waits_and_preempts_nobody():
    engine, plan, parent, child = forked(num_blocks=9, watermark=0.0)
    assert plan.admitted == plan.preempted == []
    assert (child.num_computed_tokens, child.num_slots) == (0, 0)
    assert [entry.req for entry in plan.scheduled] == [parent]
    assert engine.allocator.usage().shared_saved == 0
