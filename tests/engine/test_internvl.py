"""InternVL: both formats on disk give the native class's tokens, with images of several sizes and several a request."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from image_checkpoints import (
    CONVERSATION,
    SYSTEM,
    TILE_TOKENS,
    expected_tokens,
    image_part,
    original_tensors,
    picture,
    processed,
    shared_model,
    write_native,
    write_original,
)
from image_runs import STRATEGIES, ImageRuns, PromptMaker

from kvarena import LLM, SamplingParams
from kvarena.engine.checkpoints.directory import resolve_directory
from kvarena.engine.checkpoints.internvl import CONVERSATIONS, conversation
from kvarena.engine.errors import ModelError
from kvarena.engine.models import load_model, load_tokenizer
from kvarena.engine.models.configs import read_model_config
from kvarena.engine.models.sizes import model_sizes
from kvarena.engine.vision.internvl_weights import part_tensors
from kvarena.engine.vision.patches import patching
from kvarena.engine.vision.processing import identity
from kvarena.engine.vision.processors import processing_of
from kvarena.engine.vision.tiles import tiling
from kvarena.experiments.correctness.reference import load_reference

FORMATS = {
    "native": ("llama", write_native),
    "native qwen2": ("qwen2", write_native),
    "InternLM2": ("llama", lambda path, model: write_original(path, model, "InternLM2ForCausalLM")),
    "Llama": ("llama", lambda path, model: write_original(path, model, "LlamaForCausalLM")),
    "Qwen2": ("qwen2", lambda path, model: write_original(path, model, "Qwen2ForCausalLM")),
}
SIZES = [(100, 210), (210, 100), (56, 56), (300, 90), (57, 58), (20, 400)]


@pytest.fixture(scope="module", params=FORMATS)
def checkpoint(request, tmp_path_factory):
    text, write = FORMATS[request.param]
    model = shared_model(text)
    return model, write(tmp_path_factory.mktemp("internvl"), model)


def test_weights_and_features_are_the_native_class_s(checkpoint):
    model, directory = checkpoint
    loaded = load_model(directory)
    wanted = {name.replace("model.language_model.", "model."): tensor for name, tensor in model.state_dict().items()}
    found = loaded.module.state_dict()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in found.items())
    images = [picture(*size, seed=i) for i, size in enumerate(SIZES)]
    cut = processing_of(directory)
    tiles = [cut.cut(image) for image in images]
    pixels, counts = processed(images)
    assert [len(one) for one in tiles] == counts == [cut.layout(*size).num_tiles for size in SIZES]
    tower = loaded.images.tower
    with torch.inference_mode():
        ours = torch.stack(tower([torch.from_numpy(tile) for one in tiles for tile in one]))
        theirs = model.model.get_image_features(pixel_values=pixels).pooler_output
    assert torch.allclose(ours, theirs, atol=1e-5)
    assert ours.std() > 0.1


@pytest.mark.parametrize(
    "changes", [{}, {"thumbnail": False}, {"min_tiles": 3}, {"max_tiles": 1}, {"resample": 0}, {"resample": 5}]
)
def test_tiles_are_those_of_the_library_byte_for_byte(original, changes):
    cut = replace(processing_of(original), **changes)
    for seed, size in enumerate([*SIZES, (112, 112), (1, 4), (640, 480)]):
        image = picture(*size, seed=seed)
        made = cut.library(images=image, do_rescale=False, do_normalize=False, return_tensors="np")["pixel_values"]
        wanted = made[:-1] if len(made) > 1 and not cut.thumbnail else made
        tiles = cut.cut(image)
        assert tiles.dtype == np.uint8 and len(tiles) == cut.layout(*size).num_tiles
        assert np.array_equal(tiles, wanted)


QUESTIONS = [
    [{"role": "user", "content": [("image", 0), "What is this?"]}],
    [{"role": "user", "content": "No picture here."}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": ["Image-1: ", ("image", 1), "Image-2: ", ("image", 2), "Compare é."]},
        {"role": "assistant", "content": "They differ."},
        {"role": "user", "content": [("image", 3), "And this?"]},
    ],
    [{"role": "user", "content": [("image", 1), "What is this?"]}],
]
IMAGES = [picture(*size, seed=i) for i, size in enumerate(SIZES[:4])]


def asked(question: list[dict]) -> tuple[list[dict], list]:
    """A chat as OpenAI's API has it, and its images."""
    used = []
    messages = []
    for message in question:
        content = message["content"]
        if isinstance(content, list):
            parts = []
            for part in content:
                if isinstance(part, tuple):
                    used.append(IMAGES[part[1]])
                    parts.append(image_part(used[-1]))
                else:
                    parts.append({"type": "text", "text": part})
            content = parts
        messages.append({"role": message["role"], "content": content})
    return messages, used


def original_prompt(question: list[dict], counts: list[int], sep: str, system: str) -> str:
    """The prompt as the original's `chat` makes it: conversation, then a run of placeholders for each image."""
    if question[0]["role"] == "system":
        system, question = question[0]["content"], question[1:]
    text = f"<|im_start|>system\n{system}{sep}"
    for message in question:
        content = message["content"]
        if isinstance(content, list):
            content = "".join("<image>\n" if isinstance(part, tuple) else part for part in content)
        text += f"<|im_start|>{message['role']}\n{content}{sep}"
    text += "<|im_start|>assistant\n"
    for count in counts:
        text = text.replace("<image>", "<img>" + "<IMG_CONTEXT>" * (TILE_TOKENS * count) + "</img>", 1)
    return text


def test_chats_get_the_native_class_s_tokens(checkpoint):
    model, directory = checkpoint
    llm = LLM(directory, max_model_len=512, num_gpu_blocks_override=256, max_num_batched_tokens=64, max_num_seqs=8)
    chats = [asked(question) for question in QUESTIONS]
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    outputs = llm.chat([messages for messages, _ in chats], params)
    conversation = (directory / "conversation.py").is_file()
    is_original = (directory / "modeling_internvl_chat.py").is_file()
    for question, output, (_, images) in zip(QUESTIONS, outputs, chats, strict=True):
        wanted = expected_tokens(model, output.prompt_token_ids, images, 6)
        assert output.outputs[0].token_ids == wanted
        if is_original:
            system = SYSTEM if conversation else CONVERSATIONS["Hermes-2"].system_message
            text = original_prompt(question, processed(images)[1] if images else [], "<|im_end|>", system)
            assert output.prompt_token_ids == llm.tokenizer(text)["input_ids"]
            assert (output.prompt_token_ids[0] == 1) is conversation  # InternLM2's tokenizer puts <s> before a text
    # The third image of the third chat is another one than the first; the first of the fourth was seen in the third.
    encoder = llm._engine.runner.model.images
    assert encoder.num_encoded == sum(processed(IMAGES)[1])


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A model, and requests with the tokens that the native class gives them."""
    model = shared_model()
    loaded = load_model(write_native(tmp_path_factory.mktemp("tiny"), model), image_cache_bytes=1 << 20)
    maker = PromptMaker(loaded, model.config.image_token_id, IMAGES)
    prompt = maker.prompt
    shared = [20 + i for i in range(9)]
    prompts = [
        prompt(shared, 0, [40, 41]),
        prompt(shared, 1, [40, 41]),  # as many tiles as the first, and the same ids
        prompt([50, 51, 52]),
        prompt(shared, 0, [60], 2, 3, [40, 41, 42]),
        prompt(shared, 0, [40, 41]),  # the first again
        prompt(0, [44]),
    ]
    wanted = [expected_tokens(model, ids, images, 5) for ids, _, images in prompts]
    return ImageRuns(loaded, prompts, wanted, short=80)


@pytest.mark.parametrize(("allocator", "scheduler"), STRATEGIES)
def test_every_strategy_gives_the_native_class_s_tokens(tiny, allocator, scheduler):
    """Chunks of 11 tokens end inside images and tiles; the pool is short, so that requests are preempted."""
    for overlap in (False, True):
        tiny.run(allocator, scheduler, overlap, max_num_batched_tiles=2)


@pytest.mark.parametrize("allocator", ["paged_prefix", "radix"])
def test_equal_ids_of_other_images_share_no_block_and_the_same_image_shares_all(tiny, allocator):
    first, other = tiny.prompts[:2]
    assert first[0] == other[0] and first[1] != other[1]  # the same ids at the same places
    first, other, _, _, again, _ = tiny.run(allocator, "continuous", False, num_slots=640, max_num_seqs=1)
    assert first.num_cached_tokens == 0
    assert other.num_cached_tokens == 8  # whole blocks of 4 before the image, at position 9
    assert again.num_cached_tokens == (first.num_prompt_tokens - 1) // 4 * 4


def test_a_tile_is_encoded_once_for_all_chunks_preemptions_and_requests(tiny):
    runs, images = tiny.with_cache(1 << 20)
    requests = runs.run("paged", "chunked", False, budget=7)
    assert sum(req.num_preemptions for req in requests) > 0
    assert images.num_encoded == sum(processed(IMAGES)[1])
    assert images.num_found > images.num_encoded


@pytest.mark.parametrize("num_tiles", [0, 1])
def test_a_cache_that_is_too_small_costs_time_alone(tiny, num_tiles):
    room = num_tiles * TILE_TOKENS * 64 * 4
    runs, images = tiny.with_cache(room)
    assert images.cache.num_rows == num_tiles * TILE_TOKENS and images.cache.num_bytes == room
    runs.run("paged_prefix", "chunked", True)
    assert images.num_encoded > sum(processed(IMAGES)[1])
    assert images.cache.used_bytes == room


@pytest.mark.parametrize("scheduler", ["continuous", "chunked", "static"])
def test_an_album_is_taken_in_over_several_steps(tiny, scheduler):
    tiny.run("paged", scheduler, False, num_slots=640, budget=400, max_num_batched_tiles=3)
    counts = []
    for step in tiny.steps:
        tiles = [req.within_tiles(start, start + count, 99)[1] for req, start, count in step.plan.scheduled]
        counts.append(sum(tiles))
    assert max(counts) == 3 and counts.count(3) > 3


def test_fused_layers_take_images_too(checkpoint):
    model, directory = checkpoint
    fused = {"fusions": True, "attention": "reference"}
    llm = LLM(directory, max_model_len=512, num_gpu_blocks_override=256, max_num_batched_tokens=64, runner=fused)
    messages, images = asked(QUESTIONS[2])
    [output] = llm.chat(messages, SamplingParams(temperature=0, max_tokens=6, ignore_eos=True))
    assert output.outputs[0].token_ids == expected_tokens(model, output.prompt_token_ids, images, 6)
    assert llm._engine.runner.forward.func.__class__.__name__ == "FusedDecoder"


@pytest.mark.parametrize("fusions", [False, True])
def test_steps_without_images_go_the_graphs_way_beside_those_with(tiny, fusions, monkeypatch):
    tiny.run_in_graphs(monkeypatch, fusions=fusions)


def test_every_layout_of_names_is_known():
    """transformers before 5 saved the native class without `model.` in front."""
    model = shared_model()
    state = model.state_dict()
    old = {
        re.sub(r"^lm_head", "language_model.lm_head", name.removeprefix("model.")).replace(
            "language_model.", "language_model.model.", name.startswith("model.language_model.")
        ): tensor
        for name, tensor in state.items()
    }
    parts = [part_tensors(one, model.config) for one in (state, old, original_tensors(model, packed=True))]
    for parted in parts[1:]:
        for mine, first in zip(parted, parts[0], strict=True):
            assert mine.keys() == first.keys()
            assert all(torch.equal(mine[name][...], first[name][...]) for name in mine)


def rewritten(directory: Path, tmp_path: Path, **changes) -> Path:
    """A copy of a checkpoint with another config.json."""
    made = shutil.copytree(directory, tmp_path / "changed")
    values = json.loads((made / "config.json").read_text())
    for key, value in changes.items():
        section, _, name = key.rpartition("__")
        (values[section] if section else values)[name] = value
    (made / "config.json").write_text(json.dumps(values))
    return made


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return write_original(tmp_path_factory.mktemp("original"), shared_model(), "InternLM2ForCausalLM")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"llm_config__architectures": ["Gemma9ForCausalLM"], "llm_config__model_type": "gemma9"}, "not converted"),
        ({"llm_config__bias": True}, "with biases"),
        ({"llm_config": None}, "config.json: it has no llm_config"),
        ({"vision_config": {}}, "config.json: it has no vision_config"),
        ({"select_layer": 99}, "those of layer 99 (select_layer, vision_feature_layer), and the tower has 2"),
        ({"select_layer": -4}, "those of layer -4"),
        ({"force_image_size": 57}, "does not fit together"),
        ({"max_dynamic_patch": 0}, "does not fit together"),
        ({"vision_config__hidden_size": 48}, "embeddings.cls_token has shape [1, 1, 32]"),
        ({"vision_config__num_hidden_layers": 1}, "no place for: vision_tower.encoder.layer.1"),
        ({"vision_config__num_hidden_layers": 3}, "lacks the weights vision_tower.encoder.layer.2"),
        ({"llm_config__num_hidden_layers": 3}, "lacks the weights model.layers.2"),
        ({"vision_config__hidden_act": "no such"}, "vision_config makes no tower (KeyError"),
        ({"vision_config__norm_type": ""}, "vision_config makes no tower (KeyError"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_in_a_line(original, tmp_path, changes, words):
    with pytest.raises(ModelError) as caught:
        load_model(rewritten(original, tmp_path, **changes))
    assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"image_mean": 7}, "image_mean=7 of the images' config is not a number for each"),
        ({"image_mean": [0.5, 0.5]}, "image_mean=[0.5, 0.5]"),
        ({"image_std": ["a", 1, 1]}, "image_std=['a', 1, 1]"),
        ({"image_std": [0.5, 0, 0.5]}, "divides by 0"),
        ({"resample": ["x"]}, "resample=['x'] of the images' config is none of the filters 0 to 5"),
        ({"resample": 9}, "resample=9"),
        ({"min_patches": 0}, "does not fit together"),
        ({"size": {"height": 56, "width": 28}}, "is not the side of a square"),
    ],
)
def test_a_processor_s_settings_are_judged_by_name(values, words):
    config = {"model_type": "internvl", "vision_config": {"image_size": 56, "patch_size": 14}}
    with pytest.raises(ModelError) as caught:
        tiling(config, values)
    assert words in str(caught.value)


def test_the_nearest_pixel_is_a_filter():
    internvl = {"model_type": "internvl", "vision_config": {"image_size": 56, "patch_size": 14}}
    for config, make in ((internvl, tiling), ({"model_type": "qwen3_vl"}, patching)):
        assert make(config, {"resample": 0}).resample == 0
        assert make(config, {}).resample == 3
        with pytest.raises(ModelError, match="image_mean=7 of the images' config"):
            make(config, {"image_mean": 7})


def test_no_code_of_an_original_runs_and_the_flag_is_said_to_be_needless(original, caplog):
    load_model(original, trust_remote_code=True)
    load_tokenizer(original, trust_remote_code=True)
    assert "configuration_internvl_chat.py, modeling_internvl_chat.py" in caplog.text and "not needed" in caplog.text


@pytest.mark.parametrize(
    ("text", "name", "message"),
    [
        (CONVERSATION, "internlm2-chat", SYSTEM),
        (CONVERSATION, "internvl2_5", CONVERSATIONS["internvl2_5"].system_message),  # the file has no such name
        ("def broken(", "Hermes-2", CONVERSATIONS["Hermes-2"].system_message),
        ("\0", "Hermes-2", CONVERSATIONS["Hermes-2"].system_message),
        (CONVERSATION.replace("Style.MPT", "Style.CHATML"), "internlm2-chat", None),
        (CONVERSATION.replace("roles=", "parts="), "internlm2-chat", None),
        (CONVERSATION.replace("{system_message}", ""), "internlm2-chat", None),
        (CONVERSATION.replace(f"'{SYSTEM}'", "str(1)"), "internlm2-chat", ""),
        ("", "nobody's", None),
    ],
)
def test_a_conversation_is_read_and_not_run(tmp_path, text, name, message):
    (tmp_path / "conversation.py").write_text(text)
    found = conversation(tmp_path, {"template": name})
    assert (None if found is None else found.system_message) == message


def test_a_run_is_judged_by_the_native_class_where_there_is_one(original, tmp_path):
    assert type(load_reference(str(write_native(tmp_path / "native", shared_model())))) is type(shared_model())
    with pytest.raises(ModelError, match="no class to judge by"):
        load_reference(str(original))


def test_a_refusal_names_the_code_that_would_run(tmp_path):
    auto_map = {"AutoConfig": "configuration_x.XConfig", "AutoModelForCausalLM": "someone/x--modeling_x.XModel"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "x_llm", "auto_map": auto_map}))
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ModelError, match=r"\(configuration_x.py, modeling_x.py\).*trust_remote_code=true"):
        read_model_config(tmp_path, None, None, trust_remote_code=False)


def test_sizes_and_dummy_weights_need_no_weights(original, tmp_path):
    bare = rewritten(original, tmp_path)
    for file in bare.glob("*.safetensors*"):
        file.unlink()
    loaded = load_model(bare, load_format="dummy", image_cache_bytes=1 << 16)
    assert model_sizes(bare).spec.num_parameters == loaded.spec.num_parameters
    assert loaded.images.tower.processing.tokens == TILE_TOKENS
    assert loaded.image_cache_bytes == 1 << 16
    shape = json.loads((bare / "config.json").read_text())
    assert load_model(shape=shape, load_format="dummy").images.tower.processing == loaded.images.tower.processing


def test_an_identity_is_of_pixels_and_of_how_they_were_made(original):
    cut = processing_of(original)
    tiles = cut.cut(IMAGES[0])
    names = {
        identity(cut, IMAGES[0].size, tiles),
        identity(cut, (210, 100), tiles),
        identity(replace(cut, mean=(0.5, 0.5, 0.5)), IMAGES[0].size, tiles),
        identity(cut, IMAGES[0].size, cut.cut(picture(*IMAGES[0].size, seed=9))),
        identity(cut, IMAGES[0].size, tiles[:-1]),
    }
    assert len(names) == 5 and all(name > 2**255 for name in names)
    assert identity(cut, IMAGES[0].size, cut.cut(IMAGES[0])) in names


def test_whose_code_a_flag_would_run_is_said(tmp_path, caplog):
    """Of a type that transformers has the flag is needless; of one without a causal class its files are named."""
    auto_map = {"AutoConfig": "configuration_own.C", "AutoModelForCausalLM": "modeling_own.M"}
    config = json.loads((resolve_directory("models/demo") / "config.json").read_text()) | {"auto_map": auto_map}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert read_model_config(tmp_path, None, None, trust_remote_code=False).config.model_type == "llama"
    assert not caplog.text
    (tmp_path / "configuration_own.py").write_text(
        "from transformers import LlamaConfig\nclass C(LlamaConfig):\n    pass\n"
    )
    read_model_config(tmp_path, None, None, trust_remote_code=True)
    assert "transformers has model type 'llama' itself" in caplog.text
    assert "(configuration_own.py, modeling_own.py) would run" in caplog.text
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "dinov2", "auto_map": auto_map}))
    with pytest.raises(ModelError, match=r"no causal language model .* \(configuration_own.py, modeling_own.py\); if"):
        read_model_config(tmp_path, None, None, trust_remote_code=False)
