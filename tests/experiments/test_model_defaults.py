"""What a run takes where nothing is said: the demo's small setting, or what a checkpoint of one's own is."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from checkpoints import write_checkpoint
from omegaconf import OmegaConf

from kvarena.engine.errors import ConfigError
from kvarena.experiments.building.build import build_engine
from kvarena.experiments.building.loading import CPU_SLOTS
from kvarena.experiments.jobs.job import execute
from kvarena.experiments.settings.compose import compose_cell, load_config, load_run

DEMO = {"max_model_len": 2048, "dtype": "float32"}
OWN = {"max_model_len": None, "dtype": "auto"}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A bfloat16 checkpoint with a context of 40,000 tokens, more than a CPU's usual pool."""
    directory = write_checkpoint(tmp_path_factory.mktemp("own"), max_position_embeddings=40_000)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    return directory


@pytest.mark.parametrize(
    ("overrides", "engine", "num_slots"),
    [
        ([], DEMO, 16384),
        (["model.path=models/demo"], DEMO, 16384),
        ([f"model.path={Path('experiments/models/demo').resolve()}"], DEMO, 16384),
        (["model=qwen3-0.6b-shape"], DEMO, 16384),
        (["model.path=elsewhere"], OWN, None),
        (["model=path", "model.path=elsewhere"], OWN, None),
        (["model.path=elsewhere", "engine.dtype=float16"], OWN | {"dtype": "float16"}, None),
        (["model.path=elsewhere", "engine.max_model_len=9", "kv_cache.num_slots=7"], OWN | {"max_model_len": 9}, 7),
        (["engine.max_model_len=null", "engine.dtype=auto", "kv_cache.num_slots=null"], OWN, None),
    ],
)
def test_defaults_by_model(overrides, engine, num_slots):
    cfg = load_config(overrides)
    assert {key: cfg.engine[key] for key in engine} == engine
    assert cfg.kv_cache.num_slots == num_slots
    # Another process gets plain values, whatever it has registered.
    assert OmegaConf.to_container(cfg, resolve=True)["kv_cache"]["num_slots"] == num_slots


def test_a_run_takes_a_checkpoint_as_it_is(checkpoint, tmp_path):
    cfg, choices = compose_cell([
        f"model.path={checkpoint}", "workload=fixed", "workload.num_requests=2", "workload.prompt_len=4",
        "workload.output_len=2", "report.pages=false", "report.progress=false", "driver.warmup=false",
        "driver.probe=false",
    ])  # fmt: skip
    summary = execute(cfg, tmp_path, "own", choices)
    assert summary["model"]["dtype"] == "bfloat16"
    assert summary["pool"]["num_slots"] == 40_000 > CPU_SLOTS
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["config"]["engine"]["max_model_len"] is None
    assert manifest["config"]["engine"]["dtype"] == "auto"


def test_a_pool_on_a_cpu_keeps_to_what_is_free(checkpoint, monkeypatch):
    """Half of it: 3 layers of 2 heads of 16 elements in bfloat16 are 384 bytes a token."""
    monkeypatch.setattr("kvarena.experiments.building.loading.free_bytes", lambda device: 2 * 384 * 1000)
    parts = build_engine(load_run([f"model.path={checkpoint}"]))
    assert parts.pool_facts["num_slots"] == 1000 // 16 * 16
    with pytest.raises(ConfigError) as caught:
        build_engine(load_run([f"model.path={checkpoint}"]), whole_context=True)
    assert str(caught.value) == (
        "the KV pool, sized by this machine's memory, holds requests of at most 992 tokens, and "
        f"{checkpoint.name} would be served with 40000; set engine.max_model_len=992"
    )


@pytest.mark.parametrize(
    ("allocator", "settings", "dtype"),
    [
        ("paged", ["kv_cache.num_slots=100"], "auto"),
        ("paged", ["kv_cache.num_blocks=7", "allocator.block_size=32"], "auto"),
        ("paged_prefix", ["kv_cache.memory_gib=0.0001"], "float32"),
        ("contiguous", ["kv_cache.num_blocks=50"], "auto"),
        ("orca_pow2", ["kv_cache.num_blocks=50"], "auto"),
        ("virtual", ["kv_cache.num_slots=100"], "auto"),
    ],
)
def test_each_way_to_hold_the_context_does_when_tried(checkpoint, allocator, settings, dtype):
    """The line is read as a person reads it, and what it says is done."""
    given = [f"model.path={checkpoint}", f"allocator={allocator}", f"engine.dtype={dtype}"]
    limit = "engine.max_model_len=1500"

    def build(*overrides: str) -> int:
        parts = build_engine(load_run([*given, *overrides]), whole_context=True)
        assert parts.engine.allocator.max_request_tokens >= parts.max_model_len
        return parts.max_model_len

    with pytest.raises(ConfigError) as caught:
        build(limit, *settings)
    line = str(caught.value)
    shorter = line.split("set engine.max_model_len=")[1].split(",", maxsplit=1)[0]
    assert build(f"engine.max_model_len={shorter}", *settings) < 1500
    larger = line.split("raise the pool to ")[1].split(",", maxsplit=1)[0]
    assert build(limit, *settings, larger) == 1500


def test_a_smaller_dtype_is_advised_only_where_it_does(checkpoint):
    gib = 800 * 768 / 2**30  # 800 tokens in float32, of 768 bytes
    given = [f"model.path={checkpoint}", f"kv_cache.memory_gib={gib}"]
    with pytest.raises(ConfigError, match="or set engine"):
        build_engine(load_run([*given, "engine.max_model_len=1500", "engine.dtype=float32"]), whole_context=True)
    parts = build_engine(load_run([*given, "engine.max_model_len=1500", "engine.dtype=bfloat16"]), whole_context=True)
    assert parts.spec.dtype == torch.bfloat16
    with pytest.raises(ConfigError) as caught:
        build_engine(load_run([*given, "engine.max_model_len=2500", "engine.dtype=float32"]), whole_context=True)
    assert "dtype" not in str(caught.value)


def test_what_is_called_like_the_demo_is_not_the_demo(checkpoint, tmp_path, monkeypatch):
    """A relative path is the working directory's before the project's, for the loader as for the defaults."""
    shutil.copytree(checkpoint, tmp_path / "models" / "demo")
    assert load_config(["model.path=models/demo"]).engine.dtype == "float32"
    monkeypatch.chdir(tmp_path)
    assert load_config(["model.path=models/demo"]).engine.dtype == "auto"


@pytest.mark.parametrize("size", [0, -1, "null", "abc"])
def test_a_block_of_no_size_is_a_line_where_the_memory_decides(checkpoint, size):
    with pytest.raises(ConfigError, match=r"allocator\.block_size=.* must be"):
        build_engine(load_run([f"model.path={checkpoint}", f"allocator.block_size={size}"]))
