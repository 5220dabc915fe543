"""The benchmark of images, on a small model and the CPU: it counts what it says it measures."""

import json

import pytest
from image_checkpoints import MAX_TILES, TILE_TOKENS, native_model, write_native
from qwen_checkpoints import shared_qwen, write_qwen
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from kvarena.engine.errors import ConfigError
from kvarena.engine.models.configs import read_model_config
from kvarena.engine.vision.processors import make_processing
from kvarena.experiments.benchmarks.images import DEFAULTS, main
from kvarena.experiments.settings.compose import load_run


def test_every_section_has_its_line(tmp_path, capsys):
    directory = write_native(tmp_path / "m", native_model())
    options = ["--requests", "3", "--gap-requests", "2", "--size", "120x120", "--text", "4", "--output", "3"]
    settings = [f"model.path={directory}", "engine.max_model_len=96"]
    assert main([*options, "--decodes", "2", *settings]) == 0
    found = {line["section"]: line for line in map(json.loads, capsys.readouterr().out.splitlines())}
    assert list(found) == ["start", "pixels", "tower", "images", "text", "gaps"]
    tiles = MAX_TILES + 1
    assert found["pixels"]["tiles"] == found["tower"]["tiles"] == tiles
    assert found["images"]["tiles_encoded"] == 3 * tiles and found["text"]["tiles_encoded"] == 0
    assert found["images"]["prompt_tokens"] == found["text"]["prompt_tokens"] == 3 * (tiles * TILE_TOKENS + 4)
    assert found["gaps"]["ratio"] > 0 and found["tower"]["fused"]
    parts = [found["pixels"][f"{part}_ms"] for part in ("decode", "tiles", "digest")]
    assert min(parts) > 0 and found["pixels"]["ms"] == pytest.approx(sum(parts), rel=0.5)
    image, text = found["images"]["split"], found["text"]["split"]
    assert (image["prompt_steps"], image["decode_steps"]) == (text["prompt_steps"], text["decode_steps"]) == (1, 2)
    assert min(image["tower_ms"], image["prompt_ms"], image["decode_ms"], text["prompt_ms"]) > 0 == text["tower_ms"]

    # All run at once, or what is measured is how they wait for one another.
    with pytest.raises(ConfigError, match=r"has 128 slots, and .* take 246: .* set kv_cache.num_slots=246 or more"):
        main([*options, "--decodes", "2", *settings, "kv_cache.num_slots=128"])


def test_a_tower_that_runs_on_its_modules_is_timed_as_well(tmp_path, capsys):
    directory = write_qwen(tmp_path / "m", shared_qwen("Qwen3-VL"))
    options = ["--requests", "2", "--gap-requests", "1", "--size", "120x120", "--text", "4", "--output", "3"]
    assert main([*options, "--decodes", "1", f"model.path={directory}", "engine.max_model_len=96"]) == 0
    found = {line["section"]: line for line in map(json.loads, capsys.readouterr().out.splitlines())}
    assert not found["tower"]["fused"] and found["tower"]["ms_a_tile_of_16"] > 0 and found["pixels"]["tiles"] == 1
    assert found["images"]["tiles_encoded"] == 2 and found["images"]["split"]["tower_ms"] > 0


def test_the_real_shape_has_the_pool_that_the_device_gives():
    config = load_run([*DEFAULTS, "model=internvl2-8b-shape"])
    assert config.kv_cache.sized_by is None and config.scheduler.need("max_num_batched_tokens") == 8192


def test_a_model_of_text_is_refused_in_a_line():
    with pytest.raises(ConfigError, match="needs a model that reads images"):
        main(["kv_cache.num_slots=1024"])


SHAPES = {
    "internvl2-8b-shape": ("llama", 32, 13 * 256),
    "qwen2.5-vl-7b-shape": ("qwen2_5_vl_text", 28, 37 * 27),
    "qwen3-vl-8b-shape": ("qwen3_vl_text", 36, 32 * 24),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_are_the_originals(shape):
    config = load_run([f"model={shape}"]).model
    text, _, name, whole = read_model_config(None, config.shape, config.name, False)
    made = make_processing(config.shape, {})
    assert (name, text.model_type, text.num_hidden_layers) == (shape, *SHAPES[shape][:2])
    assert made.layout(1024, 768).num_tokens == SHAPES[shape][2]
    assert type(text) in MODEL_FOR_CAUSAL_LM_MAPPING
    assert whole.vision_config.hidden_size == config.shape["vision_config"]["hidden_size"]
