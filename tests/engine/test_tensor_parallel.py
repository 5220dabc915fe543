"""Tensor parallel: the tokens of one rank by every strategy; each rank reads its slices; what cannot be is refused."""

from __future__ import annotations

import re
import threading
from dataclasses import replace
from itertools import chain

import pytest
import torch
from checkpoints import write_checkpoint
from image_checkpoints import picture, shared_model, write_original
from packed_checkpoints import write_packed
from parallel_cells import CELLS, MAX_TOKENS, SAMPLINGS, SHORT, THREADS, alone, happened, of_model, requests, run
from safetensors.torch import load_file, save_file
from triton.runtime.interpreter import GridExecutor

from kvarena.engine.errors import ConfigError, EngineError, KvarenaError
from kvarena.engine.models import loader
from kvarena.engine.models import parts as models_parts
from kvarena.engine.models.configs import read_model_config
from kvarena.engine.parallel.layout import Layout
from kvarena.engine.parallel.shard import Shard
from kvarena.engine.quantization.linear import PackedLinear
from kvarena.engine.ranks import runners, worker
from kvarena.engine.request import Request, SamplingParams
from kvarena.engine.runner import fused_runner
from kvarena.engine.runner.fused_runner import FusedRunner
from kvarena.engine.sampling.sampler import Sampler
from kvarena.engine.vision.processing import image_span
from kvarena.engine.vision.processors import processing_of
from kvarena.experiments.building import ranks
from kvarena.experiments.building.build import build_engine
from kvarena.experiments.building.shared import SharedParts

TP2 = ("parallel.tensor_parallel_size=2", *THREADS)
FAMILIES = {
    "llama": {},
    "qwen3": {"tie_word_embeddings": True},
    "mixtral": {},
    "qwen2": {"vocab_size": 131},  # odd: the last rank's part is padded
}


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    return {
        family: write_checkpoint(tmp_path_factory.mktemp(family), family, **more) for family, more in FAMILIES.items()
    }


@pytest.fixture(scope="module")
def shared():
    """Ranks that stay while the model does."""
    parts = SharedParts()
    yield parts
    parts.clear()


@pytest.mark.parametrize("cell", CELLS)
def test_every_strategy_gives_the_tokens_of_one_rank(directories, shared, cell):
    overrides, wanted = CELLS[cell]
    asked = requests(**SAMPLINGS["temperature"])
    expected = alone(directories["llama"], asked)
    parts = build_engine(of_model(directories["llama"], *TP2, *overrides), shared)
    steps = run(parts.engine, asked)
    assert [req.output_token_ids for req in asked] == expected
    assert not wanted or wanted in happened(asked, steps)


# One of each kind here; all pairs with the slow tests.
PAIRS = list(zip(FAMILIES, SAMPLINGS, strict=True))
OTHERS = [(family, sampling) for family in FAMILIES for sampling in SAMPLINGS if (family, sampling) not in PAIRS]


@pytest.mark.parametrize(
    ("family", "sampling"), [*PAIRS, *(pytest.param(*pair, marks=pytest.mark.slow) for pair in OTHERS)]
)
def test_every_sampling_gives_the_tokens_of_one_rank(directories, shared, family, sampling):
    asked = requests(**SAMPLINGS[sampling])
    expected = alone(directories[family], asked)
    engine = build_engine(of_model(directories[family], *TP2, *CELLS["recompute"][0]), shared).engine
    steps = run(engine, asked)
    assert [req.output_token_ids for req in asked] == expected
    assert any(step.result.logprobs for step in steps) == (sampling == "edits")


def test_an_embedding_that_scales_its_rows(tmp_path):
    directory, parts, asked = write_checkpoint(tmp_path, "gemma2"), SharedParts(), requests()
    run(build_engine(of_model(directory, *TP2), parts).engine, asked)
    assert [req.output_token_ids for req in asked] == alone(directory, asked)
    parts.clear()


def test_more_ranks_than_kv_heads(directories):
    """Two KV heads on four ranks: each stands on two of them."""
    parts, asked = SharedParts(), requests()
    engine = build_engine(of_model(directories["llama"], "parallel.tensor_parallel_size=4", *THREADS), parts).engine
    run(engine, asked)
    assert [req.output_token_ids for req in asked] == alone(directories["llama"], asked)
    assert engine.runner.pool.num_kv_heads == 1
    parts.clear()


def test_who_goes_leaves_the_others_as_they_are(directories, shared):
    asked = requests()
    expected = alone(directories["llama"], asked)
    engine = build_engine(of_model(directories["llama"], *TP2, *CELLS["recompute"][0]), shared).engine
    run(engine, asked, abort={3: "r1", 5: "r4"})
    for i, req in enumerate(asked):
        assert req.output_token_ids == expected[i][: len(req.output_token_ids)]
        assert len(req.output_token_ids) == MAX_TOKENS or i in (1, 4)
    assert not engine.has_work


def test_prompt_logprobs_and_scores(directories, shared):
    found = []
    for overrides in ((), TP2):
        more = ("driver.scores=3", "kv_cache.num_slots=640")
        engine = build_engine(of_model(directories["llama"], *overrides, *more), shared if overrides else None).engine
        asked = requests(prompt_logprobs=2)
        steps = run(engine, asked)
        prompts = [entry for step in steps for entry in step.result.prompt_logprobs or () if entry]
        scores = [step.result.scores for step in steps if step.result.scores is not None]
        found.append((prompts, scores))
    (prompts, scores), (other_prompts, other_scores) = found
    for one, other in zip(chain(*prompts), chain(*other_prompts), strict=True):
        assert (one.token_id, one.rank) == (other.token_id, other.rank)
        assert one.logprob == pytest.approx(other.logprob, abs=1e-4)
    for one, other in zip(scores, other_scores, strict=True):
        assert one.values == pytest.approx(other.values, abs=1e-4)


def test_images(tmp_path):
    """The tower stands on every rank; prompts in chunks that end inside an image, and one that is found again."""
    model = shared_model()
    directory = write_original(tmp_path, model, "InternLM2ForCausalLM")
    processing, token = processing_of(directory), model.config.image_token_id

    def asked() -> list[Request]:
        found = []
        for i, size in enumerate([(100, 210), (56, 56), (100, 210)]):
            head = [20 + j for j in range(9)]
            span = image_span(processing, picture(*size, seed=i % 2), len(head))
            ids = head + [token] * (span.stop - span.start) + [40, 41 + i]
            found.append(Request(f"r{i}", ids, SamplingParams(max_tokens=5), images=(span,)))
        return found

    options = (
        "kv_cache.num_slots=400",
        "scheduler.max_num_batched_tokens=11",
        "allocator=paged_prefix",
        "allocator.block_size=4",
        "scheduler=chunked",
        "scheduler.max_num_seqs=2",
    )
    tokens = []
    for overrides in ((), TP2):
        shared, requests = SharedParts(), asked()
        engine = build_engine(of_model(directory, *options, *overrides), shared).engine
        run(engine, requests)
        tokens.append([req.output_token_ids for req in requests])
        assert requests[2].num_cached_tokens > 0
        shared.clear()
    assert tokens[0] == tokens[1] and all(len(one) == 5 for one in tokens[0])


class Noting:
    """A stored tensor that counts what is read of it."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor, self.num_read = tensor, 0

    def get_shape(self) -> list[int]:
        return list(self.tensor.shape)

    def __getitem__(self, index: object) -> torch.Tensor:
        found = self.tensor[index]
        self.num_read += found.numel()
        return found


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_a_rank_reads_its_own_slices_alone(directories, family):
    config = read_model_config(directories[family], None, None, False).config
    from kvarena.engine.quantization.state import open_tensors

    whole = {name: stored[...] for name, stored in open_tensors(directories[family]).items()}
    sums = dict.fromkeys(whole, 0)
    for rank in range(2):
        stored = {name: Noting(tensor) for name, tensor in whole.items()}
        parts = Shard(Layout(2, 1, rank), config, family).cut(stored)
        for name, part in parts.items():
            read = part[...]
            assert stored[name].num_read == read.numel()
            sums[name] += read.numel()
    twice = {name for name, count in sums.items() if count == 2 * whole[name].numel()}
    assert all("norm" in name or ".gate.weight" in name for name in twice)
    assert all(count == whole[name].numel() for name, count in sums.items() if name not in twice)


@pytest.mark.parametrize(
    ("family", "overrides", "words"),
    [
        ("llama", ("parallel.tensor_parallel_size=3",), "tensor_parallel_size=3 does not divide the 4 attention heads"),
        ("llama", ("parallel.tensor_parallel_size=65",), "must be an integer in [1, 64]"),
        ("llama", ("parallel.pipeline_parallel_size=4",), "pipeline_parallel_size=4 is more than the 3 layers"),
        ("gpt2", ("parallel.tensor_parallel_size=2",), "transformers says for no model of this type how it is cut"),
        ("deepseek_v3", ("parallel.tensor_parallel_size=2",), "which is no part of it by transformers' plan"),
    ],
)
def test_what_cannot_be_shared_out_is_refused_in_a_line(tmp_path, directories, family, overrides, words):
    directory = directories.get(family) or write_checkpoint(tmp_path, family)
    with pytest.raises(ConfigError, match=r"parallel\.") as caught:
        build_engine(of_model(directory, *overrides, *THREADS))
    assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("part", ["mlp.down_proj", "mlp.up_proj", "self_attn.k_proj"])
def test_a_misshapen_weight_is_told_by_its_shape_in_the_files(tmp_path, part):
    """A rank's part of it is of no use to who looks for it."""
    directory, name = write_checkpoint(tmp_path), f"model.layers.1.{part}.weight"
    state = load_file(directory / "model.safetensors")
    wanted = list(state[name].shape)
    state[name] = state[name][:-2, :-2].contiguous()
    save_file(state, directory / "model.safetensors", metadata={"format": "pt"})
    words = f"weight {name} has shape {list(state[name].shape)} and config.json asks for {wanted}"
    with pytest.raises(KvarenaError, match=re.escape(words)):
        build_engine(of_model(directory, *TP2), SharedParts())


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))])
def test_a_plan_that_was_corrupted_on_its_way_is_caught(directories, monkeypatch, seed):
    """A block's number differs by one, in a message of a step that the seed chooses."""
    generator = torch.Generator().manual_seed(seed)
    victim = int(torch.randint(0, 6, (), generator=generator))
    read = worker.Mirror.read

    def corrupted(self, message):
        gone, plan, step, checksum = read(self, message)
        if step >= victim and plan.scheduled:
            table = self._tables[plan.scheduled[0].req.request_id]
            table[0] ^= 1
        return gone, plan, step, checksum

    monkeypatch.setattr(worker.Mirror, "read", corrupted)
    parts = SharedParts()
    engine = build_engine(of_model(directories["llama"], *TP2), parts).engine
    with pytest.raises(EngineError, match=r"rank 1 of 2: its plan of step \d+ is another one than the planning rank's"):
        run(engine, requests())
    parts.clear()


@pytest.mark.parametrize(
    "family", ["mixtral", *(pytest.param(one, marks=pytest.mark.slow) for one in ("llama", "qwen3"))]
)
def test_the_fused_forward_gives_the_tokens_of_one_rank(directories, shared, family):
    """Parts are owed until the stream is read: sums, residuals and experts meet in other places than in the modules."""
    asked = requests(**SAMPLINGS["temperature"])
    fused = ("runner.fusions=true", *CELLS["recompute"][0])
    parts = build_engine(of_model(directories[family], *TP2, *fused), shared)
    run(parts.engine, asked)
    assert parts.pool_facts["runner"]["fusions"] and parts.engine.runner.forward.func.ops.defers
    assert [req.output_token_ids for req in asked] == alone(directories[family], asked)


# Format, family, its options; how many layers of a rank's three stay packed of how many. 96 inputs of the MLP's second
# product lie in groups of 32 on two ranks: one of them on both; with act-order every rank has inputs of all groups.
PACKED = {
    "gptq": (("gptq", "llama"), {"group_size": 32}, (18, 21)),
    "gptq-act": (("gptq", "llama"), {"group_size": 32, "act_order": True}, (15, 21)),
    "awq": (("awq", "llama"), {"group_size": 16}, (21, 21)),
    "compressed": (("compressed-tensors", "qwen3"), {"group_size": -1, "symmetric": True}, (21, 21)),
}


@pytest.mark.parametrize(
    ("case", "stays"),
    [("gptq", False), ("gptq", True), ("gptq-act", True), ("awq", False), ("compressed", True),
     *(pytest.param(*one, marks=pytest.mark.slow)
       for one in (("gptq-act", False), ("awq", True), ("compressed", False)))],
)  # fmt: skip
def test_packed_weights_give_the_tokens_of_one_rank(tmp_path, monkeypatch, case, stays):
    """As on a CPU, where all are dequantised, and as on a GPU, where parts of whole groups stay packed."""
    (kind, family), options, (kept, packed) = PACKED[case]
    directory, _ = write_packed(tmp_path, kind, family, **options)
    asked = requests()
    expected = alone(directory, asked)
    monkeypatch.setattr(loader, "keeps_packed", lambda device: stays)
    if stays:
        for module in (loader, models_parts):
            monkeypatch.setattr(module, "placement", lambda directory, device: {"device_map": {"": device}})
    parts = SharedParts()
    for fused in ("false", "true"):
        copies = [replace(req, output_token_ids=[]) for req in asked]
        engine = build_engine(of_model(directory, *TP2, f"runner.fusions={fused}"), parts).engine
        run(engine, copies)
        assert [req.output_token_ids for req in copies] == expected
    model = engine.runner.model
    layers = [part for part in model.module.modules() if isinstance(part, PackedLinear)]
    assert len(layers) == kept * stays
    said = "dequantised" if not stays else f"{packed - kept} of {packed} dequantised"
    assert (said in model.spec.quantization) == (not stays or kept < packed)
    parts.clear()


@pytest.mark.parametrize(
    ("tensor", "pipeline", "named"), [(2, 1, "tensor_parallel_size=2"), (1, 4, "pipeline_parallel_size=4")]
)
def test_more_ranks_than_gpus_is_a_line(directories, monkeypatch, tensor, pipeline, named):
    monkeypatch.setattr(ranks, "target_device", lambda name: "cuda")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    sizes = (f"parallel.tensor_parallel_size={tensor}", f"parallel.pipeline_parallel_size={pipeline}")
    with pytest.raises(ConfigError) as caught:
        ranks.layout_of(of_model(directories["llama"], *sizes))
    words = f"parallel.{named} needs {tensor * pipeline} GPUs"
    assert str(caught.value).startswith(words) and "this machine has 1; lower it" in str(caught.value)


def test_a_simulation_of_ranks_asks_for_a_profile_that_knows_what_they_exchange(directories):
    simulated = ("runner=simulated", "engine.dtype=bfloat16", "kv_cache.num_slots=512")
    with pytest.raises(ConfigError, match="says nothing of what 2 cards take to exchange data"):
        build_engine(of_model(directories["llama"], *TP2, *simulated, "runner.profile=h100"))
    parts = build_engine(of_model(directories["llama"], *TP2, *simulated, "runner.profile=h200"))
    assert parts.simulation_facts is not None and parts.simulation_facts["ranks"] == {"tensor": 2, "pipeline": 1}


@pytest.mark.parametrize("sampling", ["top_p", "edits", pytest.param("temperature", marks=pytest.mark.slow)])
def test_ranks_draw_with_the_kernels(directories, shared, monkeypatch, sampling):
    """Interpreted: each rank among its columns, and the planning rank from gathered rows."""
    # The ranks are threads here, and the interpreter runs one kernel at a time.
    lock, launch = threading.RLock(), GridExecutor.__call__

    def launch_alone(*args, **options):
        with lock:
            return launch(*args, **options)

    monkeypatch.setattr(GridExecutor, "__call__", launch_alone)
    for module in (fused_runner, runners):
        monkeypatch.setattr(module, "draws_on", lambda device: True)
    monkeypatch.setattr(Sampler, "_race", lambda *args: pytest.fail("the sampler drew"))
    asked = requests(**SAMPLINGS[sampling])[:3]
    overrides = ("allocator=paged", "scheduler=continuous", "engine.overlap=true", "runner.fusions=true", SHORT)
    engine = build_engine(of_model(directories["llama"], *TP2, *overrides), SharedParts()).engine
    assert isinstance(engine.runner, FusedRunner)
    run(engine, asked)
    monkeypatch.undo()
    assert [req.output_token_ids for req in asked] == alone(directories["llama"], asked)
