"""Qwen2.5-VL and Qwen3-VL: transformers' own tokens, with images of several sizes and several a request."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from operator import attrgetter
from pathlib import Path

import numpy as np
import pytest
import torch
from image_checkpoints import image_part, picture
from image_runs import STRATEGIES, ImageRuns, PromptMaker
from packed_checkpoints import pack_state, settings
from qwen_checkpoints import IMAGE, KINDS, processed, qwen_model, qwen_tokens, shared_qwen, write_qwen
from safetensors.torch import load_file, save_file

from kvarena import LLM, SamplingParams
from kvarena.engine.contract import ScheduledRequest
from kvarena.engine.errors import ConfigError, ModelError
from kvarena.engine.fusions.check import check_decoder, record
from kvarena.engine.fusions.detect import fuse
from kvarena.engine.fusions.triton_ops import TritonOps
from kvarena.engine.models import load_model
from kvarena.engine.models.parts import check_parts
from kvarena.engine.models.sizes import model_sizes
from kvarena.engine.parallel.layout import Layout
from kvarena.engine.request import Request
from kvarena.engine.runner.rope_positions import rope_positions, rope_shift
from kvarena.engine.runner.torch_runner import ModuleForward
from kvarena.engine.vision.processing import NoLayout, image_span
from kvarena.engine.vision.processors import processing_of
from kvarena.experiments.correctness.reference import load_reference

SIZES = [(100, 210), (210, 100), (28, 30), (300, 40), (57, 58), (20, 400), (3, 5), (1, 1), (1, 200), (200, 1)]
IMAGES = [picture(*size, seed=i) for i, size in enumerate(SIZES[:4])]
GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def checkpoint(kind, tmp_path_factory):
    model = shared_qwen(kind)
    return model, write_qwen(tmp_path_factory.mktemp("qwen") / "tiny-vl", model)


def test_weights_and_features_are_the_native_class_s(kind, checkpoint):
    model, directory = checkpoint
    loaded = load_model(directory)
    wanted = {name.replace("model.language_model.", "model."): tensor for name, tensor in model.state_dict().items()}
    found = loaded.module.state_dict()
    assert found and all(torch.equal(tensor, wanted[name]) for name, tensor in found.items())
    images = [picture(*size, seed=i) for i, size in enumerate(SIZES)]
    given = processed(kind, images)
    tower = loaded.images.tower
    spans = [image_span(tower.processing, image) for image in images]
    grids = (given["image_grid_thw"][:, 1:] // 2).tolist()
    assert [list(span.grid) for span in spans] == grids
    assert [span.stop for span in spans] == [rows * columns for rows, columns in grids]
    pixels = [torch.from_numpy(span.pixels[0]) for span in spans]
    assert torch.equal(torch.cat([tower.patches(one) for one in pixels]), given["pixel_values"])  # bit for bit
    with torch.inference_mode():
        ours = torch.cat(tower(pixels))
        theirs = model.model.get_image_features(**given)
    levels = getattr(theirs, "deepstack_features", None) or []
    assert tower.num_levels == len(levels) == (2 if kind == "Qwen3-VL" else 0)
    assert torch.allclose(ours, torch.cat([torch.cat(theirs.pooler_output), *levels], dim=-1), atol=1e-5)
    assert all(part.std() > 0.1 for part in ours.split(64, dim=-1))


def chats() -> list[tuple[list[dict], list]]:
    """Chats as OpenAI's API has them, and their images."""
    text = {"type": "text", "text": "What is this?"}
    two = [image_part(IMAGES[1]), {"type": "text", "text": " and "}, image_part(IMAGES[2]), text]
    again = [image_part(IMAGES[3]), {"type": "text", "text": "And this?"}]
    long = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": two},
        {"role": "assistant", "content": "They differ."},
        {"role": "user", "content": again},
    ]
    return [
        ([{"role": "user", "content": [image_part(IMAGES[0]), text]}], [IMAGES[0]]),
        ([{"role": "user", "content": "No picture here."}], []),
        (long, IMAGES[1:4]),
        ([{"role": "user", "content": [image_part(IMAGES[1]), text]}], [IMAGES[1]]),
    ]


@pytest.mark.parametrize("fused", [False, True])
def test_chats_get_the_native_class_s_tokens(checkpoint, fused):
    model, directory = checkpoint
    options = {"runner": {"fusions": True} if fused else {"cpu": "modules"}}
    llm = LLM(directory, max_model_len=512, num_gpu_blocks_override=256, max_num_batched_tokens=64, max_num_seqs=8,
              **options)  # fmt: skip
    outputs = llm.chat([messages for messages, _ in chats()], GREEDY)
    for output, (_, images) in zip(outputs, chats(), strict=True):
        assert output.outputs[0].token_ids == qwen_tokens(model, output.prompt_token_ids, images, 6)
    assert "<|vision_start|><|image_pad|>" in llm.tokenizer.decode(outputs[0].prompt_token_ids)
    runner = llm._engine.runner
    assert runner.model.images.num_encoded == 4  # distinct ones
    assert isinstance(runner.forward, ModuleForward) is not fused


@pytest.fixture(scope="module")
def tiny(checkpoint):
    """A model, and requests with the tokens that the native class gives them."""
    model, directory = checkpoint
    loaded = load_model(directory, image_cache_bytes=1 << 20)
    prompt = PromptMaker(loaded, IMAGE, IMAGES).prompt
    shared = [20 + i for i in range(9)]
    prompts = [
        prompt(shared, 0, [40, 41]),
        prompt(shared, 1, [40, 41]),  # as many tokens as the first, and the same ids
        prompt([50, 51, 52]),
        prompt(shared, 0, [60], 2, [61], 3, [40, 41, 42]),
        prompt(shared, 0, [40, 41]),  # the first again
        prompt(0, [44]),
        prompt([45, 46], 3),  # the last token is an image's
    ]
    assert len(prompts[0][0]) == len(prompts[1][0])
    wanted = [qwen_tokens(model, ids, images, 5) for ids, _, images in prompts]
    assert wanted[0] != wanted[1]
    return ImageRuns(loaded, prompts, wanted, short=48)


@pytest.mark.parametrize(("allocator", "scheduler"), STRATEGIES)
def test_every_strategy_gives_the_native_class_s_tokens(tiny, allocator, scheduler):
    """Chunks of 11 tokens end inside images; the pool is short, so that requests are preempted."""
    for overlap in (False, True):
        tiny.run(allocator, scheduler, overlap, max_num_batched_tiles=1)


@pytest.mark.parametrize("allocator", ["paged_prefix", "radix"])
def test_equal_ids_of_other_images_share_no_block_and_the_same_image_shares_all(tiny, allocator):
    first, other, _, _, again, *_ = tiny.run(allocator, "continuous", False, num_slots=640, max_num_seqs=1)
    assert first.prompt_token_ids == other.prompt_token_ids
    assert first.num_cached_tokens == 0
    assert other.num_cached_tokens == 8  # whole blocks of 4 before the image, at position 9
    assert again.num_cached_tokens == (first.num_prompt_tokens - 1) // 4 * 4


def test_an_image_is_encoded_once_for_all_chunks_preemptions_and_requests(tiny):
    runs, images = tiny.with_cache(1 << 20)
    requests = runs.run("paged", "chunked", False, budget=7)
    assert sum(req.num_preemptions for req in requests) > 0
    assert images.num_encoded == 4
    assert images.num_found > images.num_encoded


@pytest.mark.parametrize("num_pages", [0, 1, 2])
def test_a_cache_that_is_too_small_costs_time_alone(tiny, num_pages):
    width = 64 * (1 + tiny.loaded.images.tower.num_levels)
    room = num_pages * 16 * width * 4
    runs, images = tiny.with_cache(room)
    runs.run("paged_prefix", "chunked", True)
    assert images.num_encoded > 4
    assert images.cache.used_bytes == images.cache.num_bytes == room


@pytest.mark.parametrize("fusions", [False, True])
def test_steps_without_images_go_the_graphs_way_beside_those_with(tiny, fusions, monkeypatch):
    tiny.run_in_graphs(monkeypatch, fusions=fusions)


def test_kernels_turn_along_three_axes(tiny):
    """Triton's, interpreted: each layer is compared with its module at positions that differ by axis."""
    decoder = fuse(tiny.loaded, TritonOps("cpu", upcast=True), 128)
    assert decoder.axes.unique().tolist() == [0, 1, 2]
    broken = replace(decoder, axes=decoder.axes.flip(0))
    assert "layer 0" in check_decoder(broken, record(tiny.loaded, 128))


@pytest.mark.slow
def test_kernels_give_the_native_class_s_tokens(tiny, monkeypatch):
    tiny.run_in_graphs(monkeypatch, fusions=True, ops=TritonOps("cpu", upcast=True))


def test_positions_are_the_native_class_s(kind, checkpoint, tiny):
    model, _ = checkpoint
    for ids, spans, images in tiny.prompts:
        req = Request("r", ids, images=spans)
        prompt = torch.tensor([ids])
        grids = processed(kind, images)["image_grid_thw"] if images else None
        wanted, delta = model.model.get_rope_index(prompt, (prompt == IMAGE).int(), image_grid_thw=grids)
        found = rope_positions([ScheduledRequest(req, 0, len(ids))])
        assert np.array_equal(found, wanted[:, 0].numpy())
        assert rope_shift(req) == delta.item()
        for cut in range(1, len(ids)):  # in two chunks, beside another request
            parts = [ScheduledRequest(req, 0, cut), ScheduledRequest(req, cut, len(ids) - cut)]
            assert np.array_equal(rope_positions(parts), found)


def test_several_devices_are_refused_in_a_line(kind, checkpoint):
    """Qwen2.5-VL has stages; more than its first one has layers for levels of features there are in no such model."""
    refused = [(Layout(2, 1), "tensor"), *([] if kind == "Qwen2.5-VL" else [(Layout(1, 2), "pipeline")])]
    for layout, name in refused:
        with pytest.raises(ConfigError, match=rf"^parallel\.{name}_parallel_size=2 is not available for 'x'.*; use 1$"):
            check_parts(layout, checkpoint[1], None, "x", False, "auto", None)


def test_pixels_that_came_over_a_socket_are_taken_without_a_warning(tiny, recwarn):
    image = tiny.prompts[0][1][0]
    image.pixels.flags.writeable = False
    try:
        tiny.loaded.images.encode(list(image.pixels))
    finally:
        image.pixels.flags.writeable = True
    assert not recwarn.list


def test_a_large_image_weighs_more_and_is_taken_in_alone(checkpoint):
    processing = replace(processing_of(checkpoint[1]), max_pixels=1 << 26)
    side = processing.factor
    assert processing.layout(16 * side, 16 * side).weight == 1
    large = processing.layout(40 * side, 32 * side)
    assert (large.weight, large.grid, large.num_tokens) == (5, (32, 40), 1280)
    # As many as the tower ever takes at once: 16 tiles' worth, and what is left beside the largest in whole tiles.
    assert processing.largest(500) == [(22 * side, 22 * side)] * 8
    assert processing.largest(2304) == [(48 * side, 48 * side)] + [(16 * side, 16 * side)] * 7
    assert processing.largest(1 << 14) == [(128 * side, 128 * side)]
    assert processing_of(checkpoint[1]).largest(500) == [(6 * side, 8 * side)] * 16  # of the narrowest, 1 x 48
    with pytest.raises(NoLayout, match="too narrow"):
        processing.layout(1, 201)


def configured(directory: Path, tmp_path: Path, **changes) -> Path:
    """A copy of a checkpoint with another config.json, or preprocessor_config.json."""
    made = shutil.copytree(directory, tmp_path / "changed")
    for key, value in changes.items():
        file, _, name = key.partition("__")
        path = made / f"{file}.json"
        values = json.loads(path.read_text())
        section, _, name = name.rpartition("__")
        (values[section] if section else values)[name] = value
        path.write_text(json.dumps(values))
    return made


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"config__vision_config__hidden_size": 48}, "has shape [32"),
        ({"config__vision_config__depth": 2}, "no place for: visual.blocks."),
        ({"config__vision_config__depth": 5}, "lacks the weights visual.blocks."),
        ({"preprocessor_config__patch_size": 7}, "does not fit together"),
        ({"preprocessor_config__merge_size": 4}, "does not fit together"),
        ({"preprocessor_config__min_pixels": 1 << 30}, "does not fit together"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_in_a_line(checkpoint, tmp_path, changes, words):
    with pytest.raises(ModelError) as caught:
        load_model(configured(checkpoint[1], tmp_path, **changes))
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_tied_weights_and_names_as_transformers_saves_them(kind, tmp_path):
    model = qwen_model(kind, tie_word_embeddings=True)
    written = write_qwen(tmp_path / "tied", model)
    saved = shutil.copytree(written, tmp_path / "saved", ignore=shutil.ignore_patterns("*.safetensors*", "config.json"))
    model.save_pretrained(saved)
    states = [load_model(path) for path in (written, saved)]
    assert all(one.module.lm_head.weight is one.module.model.embed_tokens.weight for one in states)
    for part in ("module", "images.tower"):
        first, second = map(attrgetter(part), states)
        assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_a_packed_language_model_beside_a_plain_tower(kind, checkpoint, tmp_path, caplog):
    """As the published AWQ checkpoints have it: packed projections, and the tower named as not converted."""
    packed_dir, plain_dir = (
        shutil.copytree(checkpoint[1], tmp_path / name, ignore=shutil.ignore_patterns("*.safetensors*"))
        for name in ("packed", "plain")
    )
    state = {name: tensor for file in checkpoint[1].glob("*.safetensors") for name, tensor in load_file(file).items()}
    tower = {name: tensor for name, tensor in state.items() if "visual." in name}
    packed, plain = pack_state({name: state[name] for name in state.keys() - tower}, "awq", 32)
    save_file(packed | tower, packed_dir / "model.safetensors", metadata={"format": "pt"})
    save_file(plain | tower, plain_dir / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((packed_dir / "config.json").read_text())
    said = settings("awq", 32, symmetric=False, act_order=False) | {"modules_to_not_convert": ["visual"]}
    (packed_dir / "config.json").write_text(json.dumps(config | {"quantization_config": said}))
    found, wanted = load_model(packed_dir, quantization="awq"), load_model(plain_dir)
    layers = wanted.module.config.num_hidden_layers
    assert f"{7 * layers} weights in" in caplog.text and "dequantised at load" in caplog.text
    for part in ("module", "images.tower"):
        mine, theirs = (attrgetter(part)(one).state_dict() for one in (found, wanted))
        assert mine.keys() == theirs.keys()
        for name, tensor in theirs.items():
            torch.testing.assert_close(mine[name], tensor, rtol=1e-6, atol=1e-8)


def test_sizes_dummy_weights_and_the_judge(kind, checkpoint, tmp_path):
    model, directory = checkpoint
    assert type(load_reference(str(directory))) is type(model)
    bare = shutil.copytree(directory, tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors*"))
    loaded = load_model(bare, load_format="dummy", image_cache_bytes=1 << 16)
    assert model_sizes(bare).spec.num_parameters == loaded.spec.num_parameters
    assert 0 < loaded.image_cache_bytes <= 1 << 16
    shape = json.loads((bare / "config.json").read_text())
    assert load_model(shape=shape, load_format="dummy").images.tower.processing.factor == 28 + 4 * (kind == "Qwen3-VL")
    half = load_model(bare, load_format="dummy", dtype="bfloat16").images
    half.run_largest(4)
    assert half.tower.dtype == torch.bfloat16 and half.tower.visual.rotary_pos_emb.inv_freq.dtype == torch.float32
