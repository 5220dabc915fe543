"""The CPU's fast runner gives the tokens of the modules: families, dtypes, draws, preemption, overlap."""

import pytest
import torch
from checkpoints import random_prompts, write_checkpoint
from fused_helpers import make_pool, run
from parallel_cells import of_model
from parallel_cells import run as run_engine
from runner_driver import make_requests

from kvarena.engine.attention.cpu_backend import CpuBackend
from kvarena.engine.cpu.panels import WIDTH
from kvarena.engine.errors import EngineError
from kvarena.engine.fusions.check import check_decoder, record
from kvarena.engine.fusions.cpu_ops import CpuOps
from kvarena.engine.fusions.detect import NotFusable, fuse
from kvarena.engine.fusions.panels import PanelLinear, in_panels, restore
from kvarena.engine.models import load_model
from kvarena.engine.request import Request, SamplingParams
from kvarena.engine.runner import cpu_runner
from kvarena.engine.runner.cpu_runner import CpuRunner
from kvarena.engine.runner.torch_runner import TorchRunner
from kvarena.experiments.building.build import build_engine
from kvarena.experiments.building.shared import SharedParts

PROMPTS = random_prompts((5, 13, 1, 30, 17, 8))
NUM_TOKENS = 14
# 18 blocks of 4 hold four requests of up to 44 tokens only in part: some are preempted.
NUM_BLOCKS, BLOCK_SIZE = 18, 4
KINDS = {
    "greedy": {},
    "sampled": {"temperature": 0.8, "seed": 5},
    "edited": {"temperature": 0.8, "top_p": 0.9, "repetition_penalty": 1.3, "min_tokens": 3},
}


def make_runner(model):
    pool = make_pool(model, NUM_BLOCKS, BLOCK_SIZE)
    restore(model)
    try:
        decoder = in_panels(fuse(model, CpuOps(model.spec.dtype, model.spec.dtype), 128), model, WIDTH)
    except NotFusable:
        decoder = None
    return CpuRunner(model, pool, CpuBackend(pool), decoder), decoder


# Sinks and windows: gpt_oss; soft caps: gemma2; both on their modules. Fused: the others.
@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral", "mixtral", "gemma2", "gpt_oss"])
def test_same_tokens_as_the_modules(family, tmp_path):
    model = load_model(write_checkpoint(tmp_path, family))
    for kind, options in KINDS.items():
        requests = make_requests(PROMPTS, NUM_TOKENS, **options)
        restore(model)
        expected = run(TorchRunner(model, make_pool(model, NUM_BLOCKS, BLOCK_SIZE)), requests, overlap=False)
        assert sum(req.num_preemptions for req in requests) > 0
        runner, decoder = make_runner(model)
        assert (decoder is None) == (family in ("gemma2", "gpt_oss"))
        for overlap in (False, True):
            got = run(runner, make_requests(PROMPTS, NUM_TOKENS, **options), overlap=overlap)
            assert got == expected, (kind, overlap)


@pytest.mark.parametrize("tied", [False, True])
def test_weights_are_in_memory_once_and_come_back(tied, tmp_path):
    model = load_model(write_checkpoint(tmp_path, "qwen3", tie_word_embeddings=tied))
    before = {name: weight.clone() for name, weight in model.module.named_parameters()}
    _, decoder = make_runner(model)
    taken = {name for name, weight in model.module.named_parameters() if not len(weight)}
    assert {name for name in taken if "proj" in name} == {name for name in before if "proj" in name}
    assert ("model.embed_tokens.weight" in taken) == tied
    assert isinstance(decoder.head, PanelLinear)
    ids = torch.tensor([3, 0, 47, 1])
    assert torch.equal(decoder.embed(ids), before["model.embed_tokens.weight"][ids])
    restore(model)
    after = dict(model.module.named_parameters())
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], weight) for name, weight in before.items())
    assert (model.module.lm_head.weight is model.module.model.embed_tokens.weight) == tied


def test_a_product_that_is_wrong_is_an_error(tmp_path, monkeypatch):
    model = load_model(write_checkpoint(tmp_path, "llama"))
    decoder, linear = fuse(model, CpuOps(torch.float32, torch.float32), 128), CpuOps.linear
    monkeypatch.setattr(CpuOps, "linear", lambda *args: linear(*args) * 1.01)
    with pytest.raises(EngineError, match=r"differs from torch's on this processor .* set runner.cpu=modules"):
        in_panels(decoder, model, WIDTH)


def test_a_mixed_batch_draws_each_row_as_alone(tmp_path):
    model = load_model(write_checkpoint(tmp_path, "llama"))
    every = list(KINDS.values())
    mixed = [make_requests(PROMPTS, NUM_TOKENS, **every[index % 3])[index] for index in range(len(PROMPTS))]
    expected = [
        run(make_runner(model)[0], [make_requests(PROMPTS, NUM_TOKENS, **every[i % 3])[i]], overlap=False)[0]
        for i in range(len(PROMPTS))
    ]
    assert run(make_runner(model)[0], mixed, overlap=False) == expected


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits(dtype, tmp_path):
    """Fused layers agree with their modules, and greedy tokens are those of the modules for the most part."""
    model = load_model(write_checkpoint(tmp_path, "qwen3"), dtype=str(dtype).removeprefix("torch."))
    runner, decoder = make_runner(model)
    assert decoder is not None
    assert check_decoder(decoder, record(model, 128)) is None
    assert runner.pool.data.dtype == dtype
    got = run(runner, make_requests(PROMPTS, NUM_TOKENS), overlap=False)
    plain = TorchRunner(model, make_pool(model, NUM_BLOCKS, BLOCK_SIZE))
    expected = run(plain, make_requests(PROMPTS, NUM_TOKENS), overlap=False)
    assert [tokens[0] for tokens in got] == [tokens[0] for tokens in expected]


def test_threads_are_taken_where_a_layer_has_enough_to_do(tmp_path, monkeypatch):
    model = load_model(write_checkpoint(tmp_path, "llama"))
    runner, _ = make_runner(model)
    seen, before = [], torch.get_num_threads()
    forward = runner.forward
    runner.forward = lambda *args, **kwargs: (seen.append(torch.get_num_threads()), forward(*args, **kwargs))[1]
    monkeypatch.setattr(cpu_runner, "_ALONE", 1.0)
    try:
        torch.set_num_threads(2)
        run(runner, make_requests(PROMPTS[:1], 2), overlap=False)
        monkeypatch.setattr(cpu_runner, "_ALONE", 0.0)
        monkeypatch.setattr(cpu_runner, "_EACH", 1e-12)
        run(runner, make_requests(PROMPTS[:1], 2), overlap=False)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert seen[0] == 1
    assert seen[-1] == 2


def test_a_torch_without_threads_for_kernels_says_so(tmp_path, monkeypatch, caplog):
    model = load_model(write_checkpoint(tmp_path, "llama"))
    make_runner(model)
    assert not caplog.messages
    monkeypatch.setattr(cpu_runner, "has_team", lambda: False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 6)
    make_runner(model)
    assert caplog.messages == [
        "this torch has no OpenMP whose threads kernels could share: attention and draw run on one core, products on 6"
    ]


def test_logits_that_are_no_numbers_are_an_error(tmp_path):
    model = load_model(write_checkpoint(tmp_path, "llama"))
    runner, _ = make_runner(model)
    forward = runner.forward
    runner.forward = lambda *args, **kwargs: forward(*args, **kwargs).fill_(torch.nan)
    with pytest.raises(EngineError, match="no token could be sampled"):
        run(runner, make_requests(PROMPTS[:2], 2), overlap=False)


@pytest.mark.parametrize(
    "edits", [{"repetition_penalty": 1.3}, {"frequency_penalty": 1.5, "temperature": 1.7, "seed": 4}]
)
def test_penalties_count_a_token_that_the_host_has_not_seen(tmp_path, edits):
    """A request without edits shares the steps, and is drawn by the kernel."""
    directory, found = write_checkpoint(tmp_path), []
    for overlap in ("true", "false"):
        prompts = random_prompts((17, 21))
        asked = [
            Request("edited", list(prompts[0]), SamplingParams(max_tokens=12, **edits)),
            Request("plain", list(prompts[1]), SamplingParams(max_tokens=12)),
        ]
        engine = build_engine(of_model(directory, f"engine.overlap={overlap}"), SharedParts()).engine
        run_engine(engine, asked)
        assert type(engine.runner).__name__ == "CpuRunner"
        found.append([req.output_token_ids for req in asked])
    assert found[0] == found[1]
