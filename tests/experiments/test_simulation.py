"""Simulated runs: sizes without weights, profiles, the host's time under overlap, and a run's files."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from omegaconf import OmegaConf

from kvarena.engine.errors import ConfigError
from kvarena.engine.models import load_model
from kvarena.engine.models import sizes as sizes_module
from kvarena.engine.models.sizes import model_sizes
from kvarena.experiments.jobs.job import execute
from kvarena.experiments.recording.step_features import StepFeatures
from kvarena.experiments.settings.compose import CONF_DIR, load_config, load_run
from kvarena.experiments.simulation.profiles import load_profile
from kvarena.experiments.simulation.step_time import RooflineStepTime

OPT = ["model=opt-13b-shape", "engine.dtype=auto", "runner=simulated", "runner.profile=a100-40gb"]
CELL = ["workload=uniform", "workload.num_requests=20", "report.progress=false", "report.pages=false",
        "kv_cache.num_slots=6000"]  # fmt: skip
CHOICES = {"allocator": "paged", "scheduler": "continuous", "workload": "uniform", "arrival": "poisson"}


def sizes_of(model: str, dtype: str = "auto"):
    shape = OmegaConf.to_container(load_config([f"model={model}"]).model.shape)
    return model_sizes(shape=shape, dtype=dtype, name=model)


def test_sizes_are_those_of_the_loaded_model():
    found, model = model_sizes("models/demo"), load_model("models/demo")
    assert found.spec == model.spec
    assert found.special_token_ids == model.special_token_ids
    embedding = model.spec.vocab_size * 128
    assert found.num_head_weights == embedding  # tied to the embedding, and multiplied all the same
    assert found.num_layer_weights == model.spec.num_parameters - embedding


def test_a_directory_is_traced_again_when_it_is_another_one(tmp_path, monkeypatch):
    calls = []
    trace = sizes_module.trace_attention
    monkeypatch.setattr(sizes_module, "trace_attention", lambda *args: calls.append(args) or trace(*args))
    for file in Path("experiments/models/demo").glob("*.json"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    first = model_sizes(tmp_path)
    assert model_sizes(tmp_path) is first and len(calls) == 1
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1, "layer_types": None}))
    assert model_sizes(tmp_path).spec.num_layers == 1 < first.spec.num_layers


def test_opt_13b_has_the_sizes_of_the_paper():
    sizes = sizes_of("opt-13b-shape")
    assert sizes.spec.kv_bytes_per_token == 819_200
    assert sizes.spec.num_parameters == pytest.approx(13e9, rel=0.02)
    assert sizes.weight_bytes == pytest.approx(26e9, rel=0.02)
    assert sizes.spec.max_model_len == 2048


def test_an_analytic_step_is_bytes_and_operations_over_rates():
    sizes, card = sizes_of("llama-3.1-8b-shape"), load_profile("h200")
    step_time = card.step_time(sizes, 16)
    weights = sizes.num_layer_weights + sizes.num_head_weights
    read = 4.8e12 * card.bandwidth_efficiency
    decode = StepFeatures(0, 8, 8000, 0, 0, 0)
    expected = 2 * weights / read + 8000 * 131_072 / read + 32 * card.layer_gap
    assert step_time(decode) == pytest.approx(expected)
    prefill = StepFeatures(8192, 0, 8192, 8192 * 8193 // 2, 0, 2)
    rate = 9.89e14 * card.flops_efficiency
    operations = (2 * 8192 * sizes.num_layer_weights + 2 * 2 * sizes.num_head_weights) / rate
    attention = 4 * 32 * 32 * 128 * (8192 * 8193 // 2) / (9.89e14 * card.attention_efficiency)
    expected = operations + attention + 8192 * 131_072 / read + 32 * card.layer_gap
    assert step_time(prefill) == pytest.approx(expected)


def test_the_longer_of_bytes_and_operations_counts():
    step_time = RooflineStepTime(base=1.0, weights=10.0, per_token=1.0)
    assert step_time(StepFeatures(0, 4, 0, 0, 0, 0)) == 11.0
    assert step_time(StepFeatures(0, 40, 0, 0, 0, 0)) == 41.0


@pytest.mark.parametrize("path", sorted((CONF_DIR / "profile").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_profile_loads_and_states_its_source(path: Path):
    assert len(load_profile(path.stem).source) > 20
    assert load_profile(str(path)) == load_profile(path.stem)


@pytest.mark.parametrize("name", [path.stem for path in (CONF_DIR / "profile").glob("h200-*-overlap.yaml")])
def test_a_measured_profile_times_the_model_of_its_name(name: str):
    profile = load_profile(name)
    model = name.removeprefix("h200-").removesuffix("-overlap")
    step_time = profile.step_time(sizes_of(f"{model}-shape", "bfloat16"), 16)
    profile.check_overlap(name.endswith("-overlap"))
    assert profile.model == model
    # A step cannot be faster than the card reads the weights and KV.
    card = dataclasses.replace(load_profile("h200"), bandwidth_efficiency=1.0, layer_gap=0.0)
    decode = StepFeatures(0, 32, 32 * 500, 0, 0, 0)
    floor = card.step_time(sizes_of(f"{model}-shape", "bfloat16"), 16)(decode)
    assert floor < step_time(decode) < 3 * floor


MEASURED = """
kind: measured
source: test
error: none
fitted:
  {schedulers: [continuous 8], workloads: [uniform], num_steps: 9, decode_requests: 11, decode_kv_tokens: 100,
   prefill_tokens: 4, prefill_requests: 2, prefill_decodes: 0, prefill_kv_tokens: 4, longest_prefill: 4}
model: llama
kv_bytes_per_token: 131072
overlap: false
decode: {tokens: [1, 3, 11], seconds: [0.25, 0.5, 1.5], per_kv_token: 1.0e-3}
prefill: {tokens: [2, 4], seconds: [1.0, 1.5], per_request: 0.5}
host: {before: 0.25}
"""


def test_a_measured_profile_belongs_to_its_model(tmp_path: Path):
    path = tmp_path / "mine.yaml"
    path.write_text(MEASURED)
    profile = load_profile(str(path))
    assert profile.host.before == 0.25
    step_time = profile.step_time(sizes_of("llama-3.1-8b-shape"), 16)
    assert step_time(StepFeatures(0, 1, 100, 0, 0, 0)) == pytest.approx(0.25 + 0.1)
    assert step_time(StepFeatures(0, 2, 0, 0, 0, 0)) == pytest.approx(0.375)  # in the middle of two entries
    assert step_time(StepFeatures(0, 19, 0, 0, 0, 0)) == pytest.approx(2.5)  # beyond the last: its slope goes on
    assert step_time(StepFeatures(1000, 3, 0, 0, 0, 2)) == pytest.approx(1.5 + 999 * 0.25 + 5 * 0.5)
    with pytest.raises(ConfigError, match="131072 bytes of KV a token"):
        profile.step_time(sizes_of("qwen3-0.6b-shape"), 16)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("kind: card\nsource: x\n", "lacks a key"),
        ("kind: guess\n", "kind: card or measured"),
        ("- 1\n", "kind: card or measured"),
        ("kind: [\n", "cannot be read as YAML"),
        (MEASURED.replace("0.25, 0.5, 1.5", "0.25, 0.5, 0.4"), "must not fall"),
        (MEASURED.replace("[1, 3, 11]", "[1, 3]"), "of one length"),
        (MEASURED.replace("[1.0, 1.5]", "[1.0, 1.0]"), "longer prompts would cost nothing"),
        (MEASURED.replace("decode_requests: 11", "decode_requests: -1"), "decode_requests"),
        (MEASURED.replace("per_request: 0.5", "per_request: -0.5"), "per_request=-0.5"),
        (MEASURED.replace("before: 0.25", "befor: 0.25"), "unknown key 'befor'"),
        (MEASURED.replace("overlap: false", "overlap: maybe"), "overlap=maybe"),
    ],
)
def test_a_broken_profile_is_one_line(content: str, message: str, tmp_path: Path):
    path = tmp_path / "broken.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError, match=message) as caught:
        load_profile(str(path))
    assert "\n" not in str(caught.value)


def test_an_unknown_profile_names_the_known_ones():
    with pytest.raises(ConfigError, match=r"a100-40gb, .*a100-80gb, h100, h200"):
        load_profile("h300")


def test_a_card_refuses_what_it_has_no_rates_for():
    with pytest.raises(ConfigError, match="16 bit"):
        load_profile("h200").step_time(sizes_of("llama-3.1-8b-shape", "float32"), 16)


def simulate(tmp_path: Path, *overrides: str) -> tuple[dict, Path]:
    run_dir = tmp_path / str(len(list(tmp_path.iterdir())))
    run_dir.mkdir()
    return execute(load_run([*OPT, *CELL, *overrides]), run_dir, "paged x continuous", CHOICES), run_dir


def test_a_simulated_run_leaves_a_run_s_files_and_says_what_it_is(tmp_path: Path):
    summary, run_dir = simulate(tmp_path, "arrival=poisson", "report.pages=true")
    assert summary["num_finished"] == 20
    assert summary["valid"]
    manifest = json.loads((run_dir / "manifest.json").read_text())
    assert manifest["simulation"]["profile"] == "a100-40gb"
    assert manifest["simulation"]["kind"] == "analytic"
    assert manifest["pool"]["bytes"] == 6000 // 16 * 16 * 819_200
    report = (run_dir / "report.md").read_text()
    assert report.startswith("# paged × continuous, simulated\n\nSimulated by the card profile a100-40gb: ")
    steps = pd.read_parquet(run_dir / "steps.parquet")
    assert steps["end_time"].iloc[-1] == pytest.approx(manifest["run"]["wall_time"])
    assert (np.diff(steps["start_time"]) > 0).all()


def test_the_same_config_simulates_the_same_run(tmp_path: Path):
    first, second = (simulate(tmp_path, "arrival=poisson")[1] for _ in range(2))
    for name in ("requests.parquet", "steps.parquet"):
        assert pd.read_parquet(first / name).equals(pd.read_parquet(second / name))


def test_overlap_hides_the_host_and_changes_no_token_count(tmp_path: Path):
    room = "kv_cache.num_slots=60000"
    plain, run_dir = simulate(tmp_path, room)
    overlapped, _ = simulate(tmp_path, room, "engine.overlap=true")
    assert overlapped["num_output_tokens"] == plain["num_output_tokens"]
    host = json.loads((run_dir / "manifest.json").read_text())["simulation"]["figures"]["host"]
    steps = pd.read_parquet(run_dir / "steps.parquet")
    on_host = (host["before"] + host["after"]) * len(steps)
    on_host += (host["before_per_request"] + host["after_per_request"]) * steps["num_scheduled"].sum()
    saved = plain["wall_time_seconds"] - overlapped["wall_time_seconds"]
    assert 0.9 * on_host < saved < 1.05 * on_host


def test_the_pool_is_what_the_weights_leave_of_the_card(tmp_path: Path):
    _, run_dir = simulate(tmp_path, "kv_cache.num_slots=null", "engine.gpu_memory_utilization=0.95")
    # The paper's pool for OPT-13B on this card: 12 GB, 15.7 K slots (its Table 1).
    assert json.loads((run_dir / "manifest.json").read_text())["pool"]["num_slots"] == pytest.approx(15_700, rel=0.05)
    with pytest.raises(ConfigError, match="do not fit"):
        simulate(tmp_path, "kv_cache.num_slots=null", "engine.gpu_memory_utilization=0.5")


def test_a_summary_has_the_same_numbers_and_no_tokens(tmp_path: Path):
    options = ["arrival=poisson", "arrival.rate=4", "workload.num_requests=40", "engine.overlap=true"]
    full, full_dir = simulate(tmp_path, *options)
    summary, summary_dir = simulate(tmp_path, *options, "driver.record=summary")
    whole, short = (pd.read_parquet(folder / "requests.parquet") for folder in (full_dir, summary_dir))
    lists = ["prompt_token_ids", "output_token_ids", "token_times"]
    assert short[lists].isna().all().all()
    assert whole.drop(columns=lists).equals(short.drop(columns=lists))
    assert full["num_preemptions"] > 0
    assert [len(times) for times in whole["token_times"]] == whole["num_output_tokens"].tolist()
    assert [times[0] for times in whole["token_times"]] == whole["first_token_time"].tolist()
    assert pd.read_parquet(full_dir / "steps.parquet").equals(pd.read_parquet(summary_dir / "steps.parquet"))
    assert summary["itl_seconds"]["count"] == 0
    assert summary["ttft_seconds"] == full["ttft_seconds"]


def test_a_prefix_cache_sees_the_prompts_also_in_a_summary(tmp_path: Path):
    cfg = load_run([*OPT, *CELL[2:4], "allocator=radix", "workload=shared_prefix", "driver.record=summary"])
    summary = execute(cfg, tmp_path, "radix", CHOICES)
    assert 0 < summary["num_cached_tokens"] < summary["num_prompt_tokens"]


@pytest.mark.parametrize(("model", "parameters", "active"), [
    ("mixtral-8x7b-shape", 46.7e9, 12.9e9), ("qwen3-30b-a3b-shape", 30.5e9, 3.3e9)])  # fmt: skip
def test_experts_are_read_as_far_as_tokens_take_them(model, parameters, active):
    sizes, card = sizes_of(model), load_profile("h200")
    spec, step_time = sizes.spec, card.step_time(sizes_of(model), 16)
    experts = spec.experts
    assert spec.num_parameters == pytest.approx(parameters, rel=0.01)
    # What bounds a graph's tokens, too: 465 of the Mixtral shape, where all its weights would leave 128.
    assert spec.active_parameters == pytest.approx(active, rel=0.02)
    rate = 4.8e12 * card.bandwidth_efficiency

    def read(num_tokens):
        """Bytes of weights in a decode step of so many requests."""
        seconds = step_time(StepFeatures(0, num_tokens, 0, 0, 0, 0)) - spec.num_layers * card.layer_gap
        return seconds * rate

    outside = sizes.num_layer_weights + sizes.num_head_weights
    outside -= experts.num_layers * experts.num_experts * experts.num_weights
    one = experts.num_layers * experts.num_weights
    assert read(1) == pytest.approx(2 * (outside + experts.top_k * one))
    # All parameters but the embedding's, which no step reads whole.
    embedding = spec.num_parameters - sizes.num_layer_weights - sizes.num_head_weights
    assert read(1) == pytest.approx(2 * (active - embedding), rel=0.03)
    hit = experts.num_experts * (1 - (1 - experts.top_k / experts.num_experts) ** 8)
    assert read(8) == pytest.approx(2 * (outside + hit * one))
    assert read(300) == pytest.approx(2 * (sizes.num_layer_weights + sizes.num_head_weights), rel=1e-5)
    skewed = card.step_time(sizes, 16, 1.0)
    assert skewed(StepFeatures(0, 8, 0, 0, 0, 0)) < step_time(StepFeatures(0, 8, 0, 0, 0, 0))
    # A prompt's operations are those of the experts that a token takes.
    prompt = step_time(StepFeatures(8192, 0, 0, 0, 0, 1)) - spec.num_layers * card.layer_gap
    weights = outside - sizes.num_head_weights + experts.top_k * one
    operations = 2 * (8192 * weights + sizes.num_head_weights) / (9.89e14 * card.flops_efficiency)
    assert prompt == pytest.approx(operations)


def test_a_skew_without_experts_is_refused():
    with pytest.raises(ConfigError, match="is dense"):
        load_profile("h200").step_time(sizes_of("llama-3.1-8b-shape"), 16, 0.5)
    measured = load_profile("h200-llama-3.1-8b-overlap")
    with pytest.raises(ConfigError, match="is for a card"):
        measured.step_time(sizes_of("llama-3.1-8b-shape", "bfloat16"), 16, 0.5)


def test_a_run_with_experts_says_how_many_its_steps_read(tmp_path: Path):
    mixtral = ["model=mixtral-8x7b-shape", "runner.profile=h200", "engine.max_model_len=2048", "report.pages=true"]
    runs = [simulate(tmp_path, *mixtral, f"runner.expert_skew={skew}") for skew in (0.0, 1.0)]
    for (summary, run_dir), skew in zip(runs, (0.0, 1.0), strict=True):
        steps = pd.read_parquet(run_dir / "steps.parquet")
        one = steps[(steps["num_new_tokens"] == 1)]["num_experts_read"]
        assert len(one) and one.to_numpy() == pytest.approx(32 * 2)
        assert 2 <= summary["experts"]["read_mean"] <= 8
        assert summary["experts"]["skew"] == pytest.approx(skew, abs=0.01)
        assert f"(skew {skew:.2f})" in (run_dir / "report.md").read_text()
        manifest = json.loads((run_dir / "manifest.json").read_text())
        assert manifest["model"]["experts"] == {
            "num_layers": 32, "num_experts": 8, "top_k": 2, "num_weights": 3 * 4096 * 14336}  # fmt: skip
    (balanced, _), (skewed, _) = runs
    assert skewed["experts"]["read_mean"] < skewed["experts"]["read_mean_balanced"]
    assert skewed["tpot_seconds"]["mean"] < balanced["tpot_seconds"]["mean"]
    dense, _ = simulate(tmp_path)
    assert dense["experts"] is None


def test_a_skew_out_of_range_is_a_line():
    with pytest.raises(ConfigError, match=r"runner.expert_skew=5"):
        load_run([*OPT, "runner.expert_skew=5"])
