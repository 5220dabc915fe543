"""Pipeline parallel, alone and with tensor parallel: the tokens of one rank, and no stage that waits."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from checkpoints import write_checkpoint
from fused_helpers import LateReference
from image_checkpoints import picture, shared_model, write_original
from packed_checkpoints import write_packed
from parallel_cells import CELLS, SAMPLINGS, THREADS, alone, happened, of_model, requests, run
from qwen_checkpoints import IMAGE, shared_qwen, write_qwen
from safetensors.torch import load_file, save_file

from kvarena.engine.errors import ConfigError, KvarenaError
from kvarena.engine.ranks import stages
from kvarena.engine.ranks.stage_forward import StageForward
from kvarena.engine.request import Request, SamplingParams, expand
from kvarena.engine.vision.processing import image_span
from kvarena.engine.vision.processors import processing_of
from kvarena.experiments.building import build, ranks, runners
from kvarena.experiments.building.build import build_engine
from kvarena.experiments.building.shared import SharedParts

PP2 = ("parallel.pipeline_parallel_size=2", *THREADS)
BOTH = ("parallel.tensor_parallel_size=2", *PP2)
SIZES = {"pp2": PP2, "tp2xpp2": BOTH}
FAMILIES = {"llama": {}, "qwen3": {"tie_word_embeddings": True}, "mixtral": {}}


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


ALL = [(cell, name) for name in SIZES for cell in CELLS]
# The paths that differ here, and engines one after the other on the same ranks; all cells with the slow tests.
SOME = [("recompute", "pp2"), ("swap", "pp2"), ("prefix", "tp2xpp2"), ("radix", "tp2xpp2"), ("static", "tp2xpp2")]


@pytest.mark.parametrize(
    ("cell", "sizes"), [*SOME, *(pytest.param(*one, marks=pytest.mark.slow) for one in ALL if one not in SOME)]
)
def test_every_strategy_gives_the_tokens_of_one_rank(directories, shared, cell, sizes):
    overrides, wanted = CELLS[cell]
    asked = requests(**SAMPLINGS["temperature"])
    expected = alone(directories["llama"], asked)
    steps = run(build_engine(of_model(directories["llama"], *SIZES[sizes], *overrides), shared).engine, asked)
    assert [req.output_token_ids for req in asked] == expected
    assert not wanted or wanted in happened(asked, steps)


@pytest.mark.parametrize("sizes", SIZES)
def test_blocks_come_up_on_every_rank(directories, shared, sizes):
    """Each request comes a second time, when a pool of four blocks has long evicted what it computed."""
    level = ("allocator=paged_prefix", "scheduler=chunked", "kv_cache.num_slots=64", "kv_cache.host_gib=0.001")
    engine = build_engine(of_model(directories["llama"], *SIZES[sizes], *level), shared).engine
    expected, loaded = alone(directories["llama"], requests()), []
    for _ in range(2):
        asked = requests()
        run(engine, asked)
        assert [req.output_token_ids for req in asked] == expected
        loaded.append(sum(req.num_loaded_tokens for req in asked))
    assert loaded[1] >= 32


PAIRS = list(zip(FAMILIES, ("edits", "top_p", "greedy"), strict=True))
OTHERS = [(family, sampling) for family, _ in PAIRS for _, sampling in PAIRS if (family, sampling) not in PAIRS]


@pytest.mark.parametrize(
    ("family", "sampling"), [*PAIRS, *(pytest.param(*pair, marks=pytest.mark.slow) for pair in OTHERS)]
)
def test_every_sampling_gives_the_tokens_of_one_rank(directories, shared, family, sampling):
    """Three layers: the first stage has two."""
    asked = requests(**SAMPLINGS[sampling])
    expected = alone(directories[family], asked)
    sizes = BOTH if sampling == "top_p" else PP2
    engine = build_engine(of_model(directories[family], *sizes, *CELLS["recompute"][0]), shared).engine
    steps = run(engine, asked)
    assert [req.output_token_ids for req in asked] == expected
    assert any(step.result.logprobs for step in steps) == (sampling == "edits")
    assert engine.runner.pool.num_layers == 2


FUSED = (
    "runner.fusions=true", "kv_cache.num_slots=160", "allocator=paged", "engine.overlap=true", "scheduler=chunked",
    "scheduler.max_num_batched_tokens=24",
)  # fmt: skip


def in_fixed_places(monkeypatch) -> list[bool]:
    """Let steps run as a graph holds them, on a CPU; whether each that did was a decode step."""
    launches: list[bool] = []
    plain, compute = runners._fused_runner, StageForward.captured

    def noted(self, *args, all_rows=False, **more):
        launches.append(all_rows)
        return compute(self, *args, all_rows=all_rows, **more)

    monkeypatch.setattr(StageForward, "captured", noted)
    monkeypatch.setattr(runners, "_fused_runner", lambda *args, **more: plain(*args, **more | {"mixed_tokens": 24}))
    for module in (build, ranks):
        monkeypatch.setattr(module, "attention_backend", lambda config, model, pool: LateReference(pool))
    return launches


FUSED_CELLS = [("llama", "tp2xpp2", "temperature"), ("mixtral", "pp2", "greedy"), ("qwen3", "tp2xpp2", "top_p")]


@pytest.mark.parametrize(
    ("family", "sizes", "sampling", "captured"),
    [
        *((*cell, True) for cell in FUSED_CELLS),
        *(pytest.param(*cell, False, marks=[] if cell[0] == "mixtral" else pytest.mark.slow) for cell in FUSED_CELLS),
    ],
)
def test_fused_stages_give_the_tokens_of_one_rank(directories, shared, monkeypatch, family, sizes, sampling, captured):
    """Layers by layers, and as steps of fixed shape between two places, as a graph holds them."""
    launches = in_fixed_places(monkeypatch) if captured else []
    asked = requests(**SAMPLINGS[sampling])
    expected = alone(directories[family], asked)
    parts = build_engine(of_model(directories[family], *SIZES[sizes], *FUSED, f"engine.seed={int(captured)}"), shared)
    run(parts.engine, asked)
    assert [req.output_token_ids for req in asked] == expected
    assert parts.pool_facts["runner"]["fusions"]
    assert bool(launches) == captured and (not captured or set(launches) == {True, False})


WRITES = {
    "plain": write_checkpoint,
    "packed": lambda path: write_packed(path, "gptq", "llama", group_size=32)[0],
    "images": lambda path: write_original(path, shared_model(), "LlamaForCausalLM"),
}


@pytest.mark.parametrize("kind", WRITES)
def test_a_head_that_is_missing_is_no_embedding(tmp_path, kind):
    directory = WRITES[kind](tmp_path / "model")
    for file in directory.glob("*.safetensors"):
        state = {name: tensor for name, tensor in load_file(file).items() if "lm_head" not in name}
        save_file(state, file, metadata={"format": "pt"})
    if (index := directory / "model.safetensors.index.json").exists():
        said = json.loads(index.read_text())
        said["weight_map"] = {name: file for name, file in said["weight_map"].items() if "lm_head" not in name}
        index.write_text(json.dumps(said))
    for sizes in ((), PP2):
        with pytest.raises(KvarenaError, match=r"lacks the weights lm_head\.weight"):
            build_engine(of_model(directory, *sizes), SharedParts())


def test_a_model_that_cannot_be_parted_so_is_refused_before_a_rank_is_started(tmp_path):
    """By its second stage, whose layers count from 0 and would be others."""
    with pytest.raises(ConfigError, match=r"a stage would have .*, and the whole has none; use 1"):
        build_engine(of_model(write_checkpoint(tmp_path, "deepseek_v3"), *PP2), SharedParts())


@pytest.mark.parametrize("number", [0, -1])
@pytest.mark.parametrize("sizes", [(), PP2])
def test_a_model_without_layers_is_a_line(tmp_path, number, sizes):
    config = json.loads((write_checkpoint(tmp_path) / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": number}))
    with pytest.raises(KvarenaError, match=f"num_hidden_layers={number} must be at least 1"):
        build_engine(of_model(tmp_path, *sizes), SharedParts())


@pytest.mark.parametrize(("fault", "words"), [("missing", "lacks the weights {}"), ("flat", "weight {} has shape")])
def test_a_stage_names_weights_as_the_files_do(tmp_path, fault, words):
    directory, name = write_checkpoint(tmp_path), "model.layers.2.mlp.down_proj.weight"
    state = load_file(directory / "model.safetensors")
    weight = state.pop(name)
    more = {name: weight.flatten()} if fault == "flat" else {}
    save_file(state | more, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(KvarenaError, match=words.format(name)):
        build_engine(of_model(directory, "parallel.pipeline_parallel_size=2", *THREADS), SharedParts())


def test_a_stage_of_layers_alone(directories):
    """Three stages: the one between embeds nothing and picks nothing."""
    parts, asked = SharedParts(), requests()
    expected = alone(directories["llama"], asked)
    for fusions in ("false", "true"):
        config = of_model(
            directories["llama"], "parallel.pipeline_parallel_size=3", *THREADS, f"runner.fusions={fusions}"
        )
        copies = [replace(req, output_token_ids=[]) for req in asked]
        run(build_engine(config, parts).engine, copies)
        assert [req.output_token_ids for req in copies] == expected
    parts.clear()


def test_who_goes_leaves_the_others_as_they_are(directories, shared):
    asked = requests(**SAMPLINGS["top_p"])
    expected = alone(directories["llama"], asked)
    engine = build_engine(of_model(directories["llama"], *BOTH, *CELLS["recompute"][0]), shared).engine
    run(engine, asked, abort={3: "r1", 5: "r4"})
    for req, tokens in zip(asked, expected, strict=True):
        assert req.output_token_ids == tokens[: len(req.output_token_ids)]
        assert req.output_token_ids == tokens or req.request_id in ("r1", "r4")


def test_prompt_logprobs_and_scores(directories, shared):
    found = []
    for overrides in ((), PP2):
        more = ("driver.scores=3", "kv_cache.num_slots=640")
        engine = build_engine(of_model(directories["llama"], *overrides, *more), shared if overrides else None).engine
        steps = run(engine, requests(prompt_logprobs=2))
        prompts = [one for step in steps for entry in step.result.prompt_logprobs or () for one in entry or ()]
        scores = [step.result.scores.values for step in steps if step.result.scores is not None]
        found.append((prompts, scores))
    (prompts, scores), (others, other_scores) = found
    assert [(one.token_id, one.rank) for one in prompts] == [(one.token_id, one.rank) for one in others]
    assert len(scores) == len(other_scores)
    assert all(one == pytest.approx(other, abs=1e-4) for one, other in zip(scores, other_scores, strict=True))


def test_no_stage_waits_in_steady_decode(directories, shared, monkeypatch):
    """Stage 0 hands a part on before it asks for the tokens of the one before: as many parts in flight as stages."""
    events: list[str] = []
    compute, take = StageForward.__call__, stages.Staged.take

    def noted(self, *args, **kwargs):
        found = compute(self, *args, **kwargs)
        if self._layout.rank == 0:
            events.append("sent")
        return found

    def taken(self, *args):
        if self._layout.rank == 0:
            events.append("taken")
        return take(self, *args)

    engine = build_engine(of_model(directories["llama"], *PP2, "engine.overlap=true"), shared).engine
    monkeypatch.setattr(StageForward, "__call__", noted)
    monkeypatch.setattr(stages.Staged, "take", taken)
    run(engine, [Request(f"r{i}", [5 + i, 6], SamplingParams(max_tokens=12)) for i in range(4)])
    in_flight, at_sent = 0, []
    for event in events:
        in_flight += 1 if event == "sent" else -1
        if event == "sent":
            at_sent.append(in_flight)
    # From the second part on, whenever stage 0 has handed one on, the one before is still on its way.
    assert len(at_sent) >= 24 and set(at_sent[1:-2]) == {2}


class Fussy:
    """Allows other tokens at every position, and twice has no time for its mask: that token is void."""

    failure = ""
    num_late = 0
    is_free = False

    def __init__(self) -> None:
        self.num_filled = 0
        self.accepted: list[int] = []

    def fill(self, bitmask) -> None:
        self.num_filled += 1
        bitmask[:] = 0
        bitmask[0] = -4 if self.num_filled % 2 else 0x00FFFF00
        self.num_late = int(self.num_filled in (2, 5))

    def accept(self, token_id: int) -> None:
        self.accepted.append(token_id)


def test_void_tokens_and_samples_that_share_a_prompt(directories, shared):
    """A token that is sampled again, and forks with their copies: what the devices hold is not what counts."""
    found = []
    for overrides in ((), BOTH):
        more = ("allocator=paged_prefix", "engine.overlap=true", "kv_cache.num_slots=640")
        engine = build_engine(of_model(directories["llama"], *overrides, *more), shared if overrides else None).engine
        fussy = Request("fussy", [5] * 9, SamplingParams(max_tokens=8, temperature=0.7, seed=4), constraint=Fussy())
        forked = expand(Request("forked", [7] * 21, SamplingParams(max_tokens=8, temperature=0.9, seed=3, n=3)))
        steps = run(engine, [fussy, *forked])
        assert fussy.constraint.num_filled == 10 and fussy.constraint.accepted == fussy.output_token_ids
        assert any(copy.kind.value == "device" for step in steps for copy in step.plan.copies)
        found.append([req.output_token_ids for req in (fussy, *forked)])
    assert found[0] == found[1] and len({tuple(tokens) for tokens in found[0]}) == 4


@pytest.mark.parametrize(("fused", "captured"), [(False, False), (True, False), (True, True)])
def test_images_whose_positions_have_three_dimensions(tmp_path, monkeypatch, fused, captured):
    """Every stage turns by row and column; prompts in chunks that end inside an image, and one that is found again."""
    directory = write_qwen(tmp_path / "tiny-vl", shared_qwen("Qwen2.5-VL"))
    processing = processing_of(directory)

    def asked() -> list[Request]:
        found = []
        for i, size in enumerate([(100, 210), (56, 56), (100, 210)]):
            head = [20 + j for j in range(9)]
            span = image_span(processing, picture(*size, seed=i % 2), len(head))
            ids = head + [IMAGE] * (span.stop - span.start) + [40, 41 + i]
            found.append(Request(f"r{i}", ids, SamplingParams(max_tokens=5), images=(span,)))
        return found

    options = (
        "kv_cache.num_slots=400", "scheduler.max_num_batched_tokens=11", "allocator=paged_prefix",
        "allocator.block_size=4", "scheduler=chunked", "scheduler.max_num_seqs=2", "engine.max_model_len=128",
    )  # fmt: skip
    tokens = []
    for overrides in ((), (*PP2, f"runner.fusions={str(fused).lower()}")):
        parts, given = SharedParts(), asked()
        launches = in_fixed_places(monkeypatch) if captured and overrides else []
        run(build_engine(of_model(directory, *options, *overrides), parts).engine, given)
        tokens.append([req.output_token_ids for req in given])
        assert given[2].num_cached_tokens > 0
        parts.clear()
    assert tokens[0] == tokens[1] and all(len(one) == 5 for one in tokens[0])
    assert bool(launches) == captured
