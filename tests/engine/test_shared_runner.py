"""Tokens are the same whether common blocks are read once or by each row, under every way in which tables change."""

import functools

import numpy as np
import pytest
from checkpoints import random_prompts, write_checkpoint
from fused_helpers import LateReference, make_pool
from shared_reference import SharedReference

from kvarena.engine.attention.base import SharingBackend
from kvarena.engine.attention.triton_backend import TritonBackend
from kvarena.engine.clock import VirtualClock
from kvarena.engine.core import Engine
from kvarena.engine.errors import EngineError
from kvarena.engine.fusions.detect import fuse
from kvarena.engine.fusions.ops import TorchOps
from kvarena.engine.models import load_model
from kvarena.engine.request import Request, SamplingParams, expand
from kvarena.engine.runner import torch_runner
from kvarena.engine.runner.fused_runner import FusedRunner
from kvarena.engine.runner.graphs import GraphShape
from kvarena.engine.runner.torch_runner import TorchRunner
from kvarena.engine.sharing.reads import ReadRules
from kvarena.engine.sharing.step_reads import StepReads
from kvarena.experiments.settings.strategies import build_allocator, build_scheduler, strategy_names, strategy_options

BLOCK_SIZE, MAX_LEN = 4, 128
SMALL = ReadRules(least_part=8, most_parts=16, least_saved=0.0)
SCHEDULERS = strategy_names("scheduler")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    names = {name: write_checkpoint(tmp_path_factory.mktemp(name), name) for name in ("llama", "mistral")}
    return {name: load_model(path) for name, path in names.items()}


@pytest.fixture
def small_parts(monkeypatch):
    monkeypatch.setattr(torch_runner, "StepReads", functools.partial(StepReads, rules=SMALL))


def requests():
    """Two prefixes, one of which goes on in two ways; samples side by side, a prompt alone, another one twice."""
    first, second, middle, *tails = random_prompts((24, 17, 9, 3, 5, 1, 8, 2, 6))
    prompts = [first + tails[0], first + middle + tails[1], first + middle + tails[2], second + tails[3], tails[4],
               second + tails[5], first + tails[0]]  # fmt: skip
    found = []
    for i, prompt in enumerate(prompts):
        options = {"temperature": 0.8, "seed": i} if i % 2 else {}
        params = SamplingParams(max_tokens=8 + 5 * (i % 3), n=3 if i in (1, 3) else 1, **options)
        found += expand(Request(f"r{i}", list(prompt), params))
    return found


def limits(scheduler, max_num_seqs, max_num_batched_tokens):
    wanted = {"max_num_seqs": max_num_seqs, "max_num_batched_tokens": max_num_batched_tokens, "chunks": "budget"}
    return {name: value for name, value in wanted.items() if name in strategy_options("scheduler", scheduler)}


def run(runner, allocator, scheduler, overlap, num_blocks):
    """Tokens, and what was saved in each step."""
    allocator = build_allocator(allocator, num_blocks=num_blocks, max_model_len=MAX_LEN, block_size=BLOCK_SIZE)
    tokens = 20 if scheduler == "chunked" else MAX_LEN
    scheduler = build_scheduler(scheduler, allocator, max_model_len=MAX_LEN, **limits(scheduler, 6, tokens))
    clock = VirtualClock()
    engine = Engine(scheduler, allocator, runner, clock, overlap=overlap)
    found, saved = requests(), []
    for req in found:
        engine.add(req)
    while engine.has_work:
        output = engine.step()
        if output is not None:
            saved.append(output.result.num_kv_saved)
        else:
            clock.advance(1.0)
    return [req.output_token_ids for req in found], saved, sum(req.num_preemptions for req in found)


def cells():
    """Every scheduler with a prefix cache; some beside it, the rest slow."""
    for scheduler in SCHEDULERS:
        for allocator in ("paged_prefix", "radix", "paged"):
            fast = (scheduler, allocator) in (("chunked", "paged_prefix"), ("continuous", "paged"), ("fair", "radix"))
            yield pytest.param(scheduler, allocator, marks=[] if fast else pytest.mark.slow)


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize(("scheduler", "allocator"), cells())
def test_same_tokens_over_the_strategies(models, scheduler, allocator):
    num_blocks = 26
    for name, fused in (("llama", True), ("mistral", False)):
        model, tokens = models[name], []
        for shares in (False, True):
            pool = make_pool(model, num_blocks, BLOCK_SIZE)
            backend = SharedReference(pool) if shares else LateReference(pool)
            if fused:
                runner = FusedRunner(
                    model, pool, backend, fuse(model, TorchOps(), MAX_LEN), max_num_seqs=6, max_model_len=MAX_LEN,
                    mixed_tokens=16, shares=shares,
                )  # fmt: skip
                assert not shares or isinstance(backend, SharingBackend)
            else:
                runner = TorchRunner(model, pool, backend, shares=shares)
            found, saved, preempted = run(runner, allocator, scheduler, overlap=shares and fused, num_blocks=num_blocks)
            tokens.append(found)
            assert preempted or scheduler == "static"
            # A static batch admits samples beside their parent, which has nothing to fork yet.
            can_share = shares and (scheduler, allocator) != ("static", "paged")
            assert bool(sum(saved)) == can_share and (not can_share or backend.num_shared)
        assert tokens[0] == tokens[1]


@pytest.mark.usefixtures("small_parts")
def test_warm_up_reaches_both_kinds_of_steps_and_leaves_no_trace(models):
    model = models["llama"]
    pool = make_pool(model, 38, BLOCK_SIZE)
    runner = FusedRunner(
        model, pool, SharedReference(pool), fuse(model, TorchOps(), MAX_LEN), max_num_seqs=4, max_model_len=MAX_LEN,
        mixed_tokens=16, shares=True,
    )  # fmt: skip
    shapes = runner._graphs.reachable(4, 16)
    assert sum(shape.shares for shape in shapes) == 3  # decodes of 2 and 4, and the one of steps with prompts
    assert GraphShape(1, 1, is_decode=True, shares=True) not in shapes
    assert runner.warm_up(4, 16) == len(shapes) == 7
    assert pool.data[:, :, BLOCK_SIZE:].abs().sum() == 0
    assert str(shapes[-1]) == "the forward for 16 new tokens of 4 requests that share their reads"


def test_a_plan_for_shared_reads_takes_no_other_step(models):
    backend = TritonBackend(
        make_pool(models["llama"], 8, BLOCK_SIZE), models["llama"].module.config.num_attention_heads
    )
    meta = type("Meta", (), {"prepared": None, "reads": None})()
    backend.reserve(meta, 4, shares=True)
    meta.host_query_start_loc, meta.host_seq_lens = np.arange(3), np.array([5, 6])
    with pytest.raises(EngineError, match="share their reads"):
        backend.prepare(meta)


def test_the_kernel_in_the_runner(models, monkeypatch):
    """Decode and mixed steps, padding among them, by the interpreted kernel."""
    monkeypatch.setattr(torch_runner, "StepReads", functools.partial(StepReads, rules=SMALL._replace(least_part=32)))
    model = models["llama"]
    start, *tails = random_prompts((40, 3, 5, 1))
    found = []
    for shares in (False, True):
        pool = make_pool(model, 60, BLOCK_SIZE)
        backend = TritonBackend(pool, model.module.config.num_attention_heads)
        runner = FusedRunner(
            model, pool, backend, fuse(model, TorchOps(), MAX_LEN), max_num_seqs=4, max_model_len=MAX_LEN,
            mixed_tokens=16, shares=shares,
        )  # fmt: skip
        allocator = build_allocator("paged_prefix", num_blocks=60, max_model_len=MAX_LEN, block_size=BLOCK_SIZE)
        scheduler = build_scheduler("continuous", allocator, max_model_len=MAX_LEN, **limits("continuous", 4, MAX_LEN))
        engine = Engine(scheduler, allocator, runner, VirtualClock(), overlap=False)
        asked = [Request(f"r{i}", list(start + tail), SamplingParams(max_tokens=2 + i)) for i, tail in enumerate(tails)]
        saved = []
        for req in asked:
            engine.add(req)
            saved += [step.result.num_kv_saved for step in (engine.step(),) if step is not None]
        while engine.has_work:
            saved.append(engine.step().result.num_kv_saved)
        assert (max(saved) == 64) == shares, "three rows, of which two need not read the first 32 tokens"
        found.append([req.output_token_ids for req in asked])
    assert found[0] == found[1]
