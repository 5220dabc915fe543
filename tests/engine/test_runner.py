"""The torch runner's own duties: inputs, pending tokens, copies, sampling, faults."""

import numpy as np
import pytest
import torch
from checkpoints import random_prompts, write_checkpoint
from runner_driver import ScatteredAllocator, generate, make_plan, make_requests, make_runner, take_tokens

from kvarena.engine.clock import WallClock
from kvarena.engine.contract import BlockCopy, CopyKind, ScheduledRequest, StepPlan
from kvarena.engine.core import Engine, run_to_completion
from kvarena.engine.errors import ConfigError, EngineError
from kvarena.engine.ledger import MemoryLedger
from kvarena.engine.models import load_model
from kvarena.engine.request import Request, SamplingParams
from kvarena.engine.runner.profile import available_kv_bytes, run_largest_step
from kvarena.experiments.correctness.reference import greedy_reference

PROMPTS = random_prompts((5, 13, 1, 30, 22, 9))
NUM_TOKENS = 10


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def model(directory):
    return load_model(directory)


@pytest.fixture(scope="module")
def expected(directory):
    return greedy_reference(directory, PROMPTS, NUM_TOKENS)


def one_step(model, prompts=PROMPTS, **sampling):
    """Runner, allocator, requests and a plan that prefills them all."""
    runner, allocator = make_runner(model, 64, 4), ScatteredAllocator(64, 4)
    requests = make_requests(prompts, NUM_TOKENS, **sampling)
    return runner, allocator, requests, make_plan([(req, req.num_tokens) for req in requests], allocator)


@pytest.mark.parametrize("seed", range(6))
def test_random_batches_with_and_without_overlap(model, expected, seed):
    requests = make_requests(PROMPTS, NUM_TOKENS)
    outcome = generate(model, requests, block_size=4, random_order=seed, overlap=seed % 2 == 1)
    assert outcome.tokens == expected


def test_real_strategies_with_preemption(model, expected):
    """A pool that cannot hold all requests: some are preempted and computed again."""
    from kvarena.allocators.paged import PagedAllocator
    from kvarena.schedulers.continuous import ContinuousScheduler

    for overlap in (False, True):
        requests = make_requests(PROMPTS, NUM_TOKENS)
        allocator = PagedAllocator(num_blocks=20, block_size=4, max_model_len=64)
        scheduler = ContinuousScheduler(
            allocator=allocator, max_model_len=64, max_num_seqs=8, max_num_batched_tokens=16, watermark=0.0
        )
        engine = Engine(
            scheduler, allocator, make_runner(model, 20, 4), WallClock(), overlap=overlap, ledger=MemoryLedger()
        )
        run_to_completion(engine, requests)
        assert [req.output_token_ids for req in requests] == expected
        assert sum(req.num_preemptions for req in requests) > 0


def test_only_entries_that_sample_get_a_token(model):
    runner, allocator, requests, _ = one_step(model)
    for req in requests:
        req.num_computed_tokens = req.num_pending_tokens = 0
    plan = make_plan([(req, min(9, req.num_tokens)) for req in requests], allocator)
    result = runner.execute(plan, allocator).result()
    assert [token is not None for token in result.token_ids] == [True, False, True, False, False, True]
    assert result.logprobs is None
    assert result.prompt_logprobs is None
    half = make_plan([(requests[1], 1)], allocator)
    assert runner.execute(half, allocator).result().token_ids == [None]


def test_an_empty_plan_still_applies_its_copies(model):
    runner, allocator, _, plan = one_step(model)
    runner.execute(plan, allocator).result()
    before = runner.pool.blocks(0)[0][3].clone()
    result = runner.execute(StepPlan(copies=[BlockCopy(CopyKind.DEVICE, 3, 60)]), allocator).result()
    assert result.token_ids == []
    assert torch.equal(runner.pool.blocks(0)[0][60], before)


def test_copies_come_before_the_forward(model, expected):
    """A request whose blocks are all moved, and whose table then names the copies, goes on as before."""
    runner, allocator, requests, plan = one_step(model)
    take_tokens(plan, runner.execute(plan, allocator).result())
    for _ in range(NUM_TOKENS - 1):
        table = allocator.tables[requests[3]]
        moved = [allocator._free.pop(0) for _ in table]
        plan = make_plan([(req, 1) for req in requests], allocator)
        plan.copies = [BlockCopy(CopyKind.DEVICE, src, dst) for src, dst in zip(table, moved, strict=False)]
        allocator._free += table[: len(moved)]
        table[: len(moved)] = moved
        take_tokens(plan, runner.execute(plan, allocator).result())
    assert [req.output_token_ids for req in requests] == expected


def test_requests_come_and_go(model, expected):
    """Rows are reused: a new request must not see what its row's last owner left."""
    runner, allocator = make_runner(model, 64, 4), ScatteredAllocator(64, 4)
    for _ in range(3):
        for prompt, tokens in zip(PROMPTS, expected, strict=True):
            [req] = make_requests([prompt], NUM_TOKENS)
            while len(req.output_token_ids) < NUM_TOKENS:
                plan = make_plan([(req, req.num_tokens - req.num_computed_tokens)], allocator)
                take_tokens(plan, runner.execute(plan, allocator).result())
            assert req.output_token_ids == tokens
            allocator.free(req)
            runner.release([req.request_id])
            runner.release([req.request_id, "unknown"])
    assert runner._rows.num_rows == 16


def test_more_requests_than_rows(model):
    prompts = random_prompts(tuple(range(1, 41)))
    together = generate(model, make_requests(prompts, 4), block_size=3).tokens
    overlapped = generate(model, make_requests(prompts, 4), block_size=3, overlap=True).tokens
    alone = [generate(model, make_requests([prompt], 4), block_size=16).tokens[0] for prompt in prompts]
    assert together == alone
    assert overlapped == alone


def test_a_seeded_request_is_the_same_in_any_batch(model):
    def run(prompts, **way):
        return generate(model, make_requests(prompts, NUM_TOKENS, temperature=1.0, seed=7), **way).tokens

    together = run(PROMPTS, block_size=4)
    assert run(PROMPTS, block_size=4, random_order=3) == together
    assert run(PROMPTS, block_size=16, overlap=True) == together
    assert run(PROMPTS[1:2], block_size=1) == together[1:2]
    assert together != generate(model, make_requests(PROMPTS, NUM_TOKENS), block_size=4).tokens


def test_penalties_count_pending_tokens(model):
    options = {"repetition_penalty": 1.5, "presence_penalty": 1.0, "frequency_penalty": 0.5}
    plain = generate(model, make_requests(PROMPTS, NUM_TOKENS, **options), block_size=4).tokens
    overlapped = generate(model, make_requests(PROMPTS, NUM_TOKENS, **options), block_size=4, overlap=True).tokens
    assert overlapped == plain
    assert plain != generate(model, make_requests(PROMPTS, NUM_TOKENS), block_size=4).tokens


def test_logprobs_and_prompt_logprobs(model, directory):
    """Both equal the log-softmax of transformers' logits, in whichever chunks the prompt is computed."""
    reference = load_model(directory).module
    reference.set_attn_implementation("eager")
    for chunk in (None, 4):
        requests = make_requests(PROMPTS, 3, logprobs=2, prompt_logprobs=3)
        requests[1] = make_requests(PROMPTS[:2], 3)[1]
        outcome = generate(model, requests, block_size=4, chunk=chunk)
        sampled, prompts = {req: [] for req in requests}, {req: [] for req in requests}
        for plan, result in outcome.results:
            for i, entry in enumerate(plan.scheduled):
                if result.prompt_logprobs is not None and result.prompt_logprobs[i] is not None:
                    prompts[entry.req] += result.prompt_logprobs[i]
                if result.logprobs is not None and result.logprobs[i] is not None:
                    sampled[entry.req].append(result.logprobs[i])
        assert prompts.pop(requests[1]) == []
        assert sampled.pop(requests[1]) == []
        for req, rows in prompts.items():
            tokens = req.prompt_token_ids + req.output_token_ids
            logits = reference(input_ids=torch.tensor([tokens]), use_cache=False).logits[0].log_softmax(-1)
            rows = rows + sampled[req]
            assert [row.token_id for row in rows] == tokens[1:]
            for position, row in enumerate(rows):
                values = logits[position]
                assert row.logprob == pytest.approx(float(values[row.token_id]), abs=1e-4)
                assert row.rank == int((values > values[row.token_id]).sum()) + 1
                best = values.topk(3 if position < len(prompts[req]) else 2)
                assert [token for token, _ in row.top] == best.indices.tolist()
                assert [value for _, value in row.top] == pytest.approx(best.values.tolist(), abs=1e-4)


def test_constraints_bar_tokens(model):
    class Only:
        num_late = 0
        is_free = False

        def __init__(self, *token_ids):
            self.token_ids = token_ids

        def fill(self, bitmask):
            bitmask[:] = 0
            for token in self.token_ids:
                bitmask.view(np.uint32)[token // 32] |= np.uint32(1 << token % 32)

        def accept(self, token_id):
            raise AssertionError("the engine's duty, not the runner's")

    runner, allocator, requests, plan = one_step(model)
    free = runner.execute(plan, allocator).result().token_ids
    runner, allocator, requests, plan = one_step(model)
    requests[0].constraint, requests[2].constraint, requests[3].constraint = Only(63), Only(0), Only(127, 31)
    tokens = runner.execute(plan, allocator).result().token_ids
    assert (tokens[0], tokens[2]) == (63, 0)
    assert tokens[3] in (127, 31)
    assert [tokens[i] for i in (1, 4, 5)] == [free[i] for i in (1, 4, 5)]


def test_a_fault_in_the_forward_is_an_engine_error(model, monkeypatch):
    runner, allocator, _, plan = one_step(model)
    fault = RuntimeError("device-side assert\nwith more lines")

    def fail(*args):
        raise fault

    monkeypatch.setattr(type(model), "logits", fail)
    with pytest.raises(EngineError, match="6 requests and 80 tokens failed with RuntimeError: device-side") as error:
        runner.execute(plan, allocator)
    assert error.value.__cause__ is fault
    assert "\n" not in str(error.value)

    def out_of_memory(*args):
        raise torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 3.50 MiB. GPU 0 has a total capacity of 139.81 GiB of which "
            "1.31 MiB is free. Including non-PyTorch memory, this process has 139.80 GiB memory in use."
        )

    monkeypatch.setattr(type(model), "logits", out_of_memory)
    with pytest.raises(EngineError) as error:
        runner.execute(plan, allocator)
    assert str(error.value) == (
        "out of memory on cpu in a step of 6 requests and 80 tokens: 3.50 MiB were asked for and 1.31 MiB were free; "
        "lower scheduler.max_num_batched_tokens, scheduler.max_num_seqs, or the KV pool (kv_cache.num_blocks, "
        "num_slots or memory_gib)"
    )


def test_the_runner_goes_on_after_a_fault(model, expected, monkeypatch):
    runner, allocator, _, plan = one_step(model)
    with monkeypatch.context() as patch:
        patch.setattr(type(model), "logits", None)
        with pytest.raises(EngineError):
            runner.execute(plan, allocator)
    assert runner.execute(plan, allocator).result().token_ids == [tokens[0] for tokens in expected]


def test_logits_that_are_not_numbers_are_an_engine_error(model, monkeypatch):
    runner, allocator, _, plan = one_step(model)
    original = type(model).logits
    monkeypatch.setattr(type(model), "logits", lambda self, *args: original(self, *args) * float("nan"))
    pending = runner.execute(plan, allocator)
    with pytest.raises(EngineError, match="NaN"):
        pending.result()


def test_plans_that_cannot_be_right_are_engine_errors(model):
    runner, allocator, requests, _ = one_step(model)
    req = requests[0]
    with pytest.raises(EngineError, match="block table holds 8 slots"):
        runner.execute(StepPlan([ScheduledRequest(req, 0, 9)], [False]), allocator)
    req.num_pending_tokens = 0
    with pytest.raises(EngineError, match=r"5 tokens and 0 pending; a bug of the scheduler"):
        runner.execute(StepPlan([ScheduledRequest(req, 5, 1)], [True]), allocator)


def test_largest_step_runs_on_any_device(model):
    run_largest_step(model, num_tokens=3 * 256 + 5, max_num_seqs=4)
    with pytest.raises(ConfigError, match=r"kv_cache\.num_slots"):
        available_kv_bytes(
            model,
            gpu_memory_utilization=0.9,
            max_num_batched_tokens=64,
            max_num_seqs=4,
            max_model_len=64,
            in_use_before=0,
            block_bytes=1,
        )


def test_bfloat16_end_to_end(directory):
    model = load_model(directory, dtype="bfloat16")
    assert make_runner(model, 4, 4).pool.dtype == torch.bfloat16
    whole = generate(model, make_requests(PROMPTS, NUM_TOKENS), block_size=16).tokens
    assert all(len(tokens) == NUM_TOKENS and max(tokens) < 128 for tokens in whole)


def test_requests_of_sampling_options_mix(model, expected):
    """Greedy requests are untouched by what their neighbours ask for."""
    requests = make_requests(PROMPTS, NUM_TOKENS)
    requests[1] = Request("hot", list(PROMPTS[1]), SamplingParams(max_tokens=NUM_TOKENS, temperature=1.5, top_k=5))
    requests[4] = Request("biased", list(PROMPTS[4]), SamplingParams(max_tokens=NUM_TOKENS, logit_bias={17: 1e4}))
    tokens = generate(model, requests, block_size=4, random_order=1).tokens
    assert [tokens[i] for i in (0, 2, 3, 5)] == [expected[i] for i in (0, 2, 3, 5)]
    assert tokens[4] == [17] * NUM_TOKENS
