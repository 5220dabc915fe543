"""Models with experts: the fused path and the plain one give transformers' tokens, and count the experts they read."""

import pytest
import torch
from checkpoints import random_prompts, write_checkpoint
from fused_helpers import LateReference, make_pool, run
from runner_driver import make_requests

from kvarena.allocators.paged import PagedAllocator
from kvarena.engine.clock import VirtualClock
from kvarena.engine.core import Engine
from kvarena.engine.fusions.check import check_decoder, record
from kvarena.engine.fusions.detect import fuse
from kvarena.engine.fusions.layers import FusedExperts, ModuleMlp
from kvarena.engine.fusions.ops import TorchOps
from kvarena.engine.fusions.triton_ops import TritonOps
from kvarena.engine.kernels.experts import routing
from kvarena.engine.models import load_model
from kvarena.engine.models.experts import ExpertSizes
from kvarena.engine.runner.fused_runner import FusedRunner
from kvarena.engine.runner.torch_runner import TorchRunner
from kvarena.experiments.correctness.reference import greedy_reference
from kvarena.schedulers.chunked import ChunkedScheduler
from kvarena.schedulers.continuous import ContinuousScheduler

QWEN = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 32, "num_hidden_layers": 2}
FAMILIES = {
    "mixtral": {"num_hidden_layers": 2},
    "qwen2_moe": QWEN | {"shared_expert_intermediate_size": 48, "norm_topk_prob": False},
    "qwen3_moe": QWEN | {"norm_topk_prob": True, "head_dim": 32},
}
PROMPTS = random_prompts((5, 9, 3))
NUM_TOKENS = 6
ON_CPU = pytest.mark.skipif(torch.cuda.is_available(), reason="Triton's interpreter is off where there is a GPU")


@pytest.fixture(scope="module", params=FAMILIES)
def checkpoint(request, tmp_path_factory):
    directory = write_checkpoint(tmp_path_factory.mktemp("experts"), request.param, **FAMILIES[request.param])
    return load_model(directory), greedy_reference(directory, PROMPTS, NUM_TOKENS)


def fused_runner(model, ops, mixed):
    pool = make_pool(model, 24, 4)
    decoder = fuse(model, ops, 128)
    assert all(isinstance(layer.mlp, FusedExperts) for layer in decoder.layers) and decoder.is_capturable
    options = {"max_num_seqs": 4, "max_model_len": 128, "mixed_tokens": 16 if mixed else 0}
    return FusedRunner(model, pool, LateReference(pool), decoder, **options)


def ways():
    """The kernels with experts that a token shares and weights that are not made to add up; all in `make test-all`."""
    for family in FAMILIES:
        for kernels in ("torch", "triton"):
            marks = pytest.mark.slow if kernels == "triton" and family != "qwen2_moe" else ()
            yield pytest.param(family, kernels, id=f"{family}-{kernels}", marks=marks)


@ON_CPU
@pytest.mark.parametrize(("checkpoint", "kernels"), ways(), indirect=["checkpoint"])
def test_fused_tokens_equal_transformers(monkeypatch, checkpoint, kernels):
    """In padded steps, as graphs run them: of three requests in buckets of four, and with prompts in them.

    Of few tokens one launch does norm, router and routing.
    """
    monkeypatch.setattr(routing, "MOST_JOINED", 8)
    model, expected = checkpoint
    assert len({token for tokens in expected for token in tokens}) > 6
    ops = TorchOps() if kernels == "torch" else TritonOps("cpu", upcast=True)
    runner = fused_runner(model, ops, mixed=True)
    assert run(runner, make_requests(PROMPTS, NUM_TOKENS), overlap=True) == expected


def counts_of(runner, prompts):
    """Experts read by each step of requests that all decode, one by one."""
    allocator = PagedAllocator(num_blocks=24, block_size=4, max_model_len=128)
    scheduler = ContinuousScheduler(allocator, max_model_len=128, max_num_seqs=4)
    engine = Engine(scheduler, allocator, runner, VirtualClock())
    for req in make_requests(prompts, 4):
        engine.add(req)
    counts = []
    while engine.has_work:
        if (step := engine.step()) is not None:
            counts.append((step.plan.num_new_tokens, step.result.num_experts_read))
    return counts


def test_a_step_counts_the_experts_that_it_read(checkpoint):
    """Of one decode k in every layer, padding and shared experts left out; the same by modules and fused."""
    model, _ = checkpoint
    sizes = model.spec.experts
    plain = counts_of(TorchRunner(model, make_pool(model, 24, 4)), PROMPTS[:1])
    fused = counts_of(fused_runner(model, TorchOps(), mixed=False), PROMPTS[:1])
    assert [read for tokens, read in plain if tokens == 1] == [sizes.num_layers * sizes.top_k] * 3
    # Behind its attention the fused forward's last layer works for the sampled token of a prompt alone.
    assert fused[1:] == plain[1:]
    most = sizes.num_layers * min(sizes.num_experts, 5 * sizes.top_k)
    assert sizes.num_layers * sizes.top_k <= fused[0][1] <= plain[0][1] <= most
    three = [counts_of(runner, PROMPTS)[1:] for runner in (
        TorchRunner(model, make_pool(model, 24, 4)), fused_runner(model, TorchOps(), mixed=False))]  # fmt: skip
    assert three[0] == three[1] and all(tokens == 3 for tokens, _ in three[0])


def test_sizes_of_experts(checkpoint):
    model, _ = checkpoint
    config = model.module.config
    inner = getattr(config, "moe_intermediate_size", config.intermediate_size)
    count = getattr(config, "num_experts", 0) or config.num_local_experts
    assert model.spec.experts == ExpertSizes(2, count, config.num_experts_per_tok, 3 * 64 * inner)
    # What the modules run on, and the fused path is held against: torch's grouped product, and no loop over experts.
    assert config._experts_implementation == "grouped_mm"


def test_experts_of_another_kind_stay_modules(tmp_path, monkeypatch):
    """A router that does what its parts do not tell: found by the check, and left to its module."""
    model = load_model(write_checkpoint(tmp_path, "mixtral", **FAMILIES["mixtral"]))
    gate = model.module.model.layers[1].mlp.gate
    forward = type(gate).forward

    def louder(self, hidden):
        logits, scores, ids = forward(self, hidden)
        return logits, 1.5 * scores, ids

    monkeypatch.setattr(type(gate), "forward", louder)
    decoder = fuse(model, TorchOps(), 128)
    assert all(isinstance(layer.mlp, ModuleMlp) for layer in decoder.layers)
    assert decoder.num_read is None and not decoder.is_capturable


def test_bfloat16_layers_are_judged_despite_near_ties(tmp_path):
    """Of 32 experts two are often as good as each other to bf16, and either choice is right."""
    options = QWEN | {"num_experts": 32, "num_experts_per_tok": 4, "head_dim": 32}
    directory = write_checkpoint(tmp_path, "qwen3_moe", **options)
    model = load_model(directory, dtype="bfloat16")
    decoder = fuse(model, TorchOps(), 128)
    assert all(isinstance(layer.mlp, FusedExperts) for layer in decoder.layers)
    decoder.layers[0].mlp.experts.down.mul_(3)
    recorded = record(load_model(directory, dtype="bfloat16"), 128)
    assert "layer 0, fused, differs" in check_decoder(decoder, recorded)


def test_a_step_that_samples_nothing_reads_no_experts_in_the_last_layer(checkpoint):
    """Of a prompt's first part the last layer's keys and values are all that anybody needs."""
    model, _ = checkpoint
    runner = fused_runner(model, TorchOps(), mixed=False)
    allocator = PagedAllocator(num_blocks=24, block_size=4, max_model_len=128)
    scheduler = ChunkedScheduler(allocator, max_model_len=128, max_num_seqs=4, max_num_batched_tokens=5)
    engine = Engine(scheduler, allocator, runner, VirtualClock())
    for req in make_requests(random_prompts((9,)), 2):
        engine.add(req)
    steps = [step for _ in range(3) if (step := engine.step()) is not None]
    assert [step.plan.samples for step in steps] == [[False], [True], [True]]
    sizes = model.spec.experts
    first, *others = [step.result.num_experts_read for step in steps]
    assert sizes.top_k <= first <= sizes.num_experts
    assert all(read >= 2 * sizes.top_k for read in others)


def test_layers_that_are_given_different_tokens_are_counted_one_by_one(checkpoint):
    model, _ = checkpoint
    experts = [layer.mlp.experts for layer in model.module.model.layers]
    for module, tokens in zip(experts, (2, 3), strict=True):
        ids = torch.arange(tokens)[:, None].expand(tokens, 2) % 4
        module(torch.zeros(tokens, 64), ids, torch.ones(tokens, 2))
    assert int(model.experts_read.total()) == 2 + 3
    assert model.experts_read.total() is None
