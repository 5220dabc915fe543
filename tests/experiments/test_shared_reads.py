"""Tokens of KV that are read, beside those that are attended to: in recordings, step times, fits and reports."""

import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pytest

from kvarena.engine.errors import ConfigError
from kvarena.engine.request import Request, SamplingParams, expand
from kvarena.experiments.benchmarks.kernels import shared_reads
from kvarena.experiments.building.simulated import build_simulated_engine
from kvarena.experiments.recording.record import RunRecorder
from kvarena.experiments.recording.step_features import StepFeatures
from kvarena.experiments.settings.compose import load_run
from kvarena.experiments.simulation.fit import Samples, _fit_device, samples
from kvarena.experiments.simulation.profiles import load_profile
from kvarena.experiments.simulation.step_time import RooflineStepTime, TableStepTime
from kvarena.reports.pages.summary import _kv_read

SETTINGS = [
    "runner=simulated", "runner.profile=h200", "model=llama-3.1-8b-shape", "engine.dtype=bfloat16",
    "allocator=paged_prefix", "scheduler=continuous", "kv_cache.num_slots=65536", "workload=shared_prefix",
    "engine.overlap=false",
]  # fmt: skip


def simulate(*more):
    """Steps of 12 requests on one prefix and 4 samples of another prompt; and what each took."""
    parts = build_simulated_engine(load_run([*SETTINGS, *more]))
    params = SamplingParams(max_tokens=40, ignore_eos=True)
    requests = [Request(f"r{i}", [*range(1000), 2000 + i], params) for i in range(12)]
    requests += expand(Request("s", [*range(3000, 3600)], dataclasses.replace(params, n=4)))
    recorder = RunRecorder(tokens=False)
    for req in requests:
        recorder.on_submit(req, 0.0)
    engine = parts.engine
    _drive(engine, requests, recorder)
    return recorder.step_columns()


def _drive(engine, requests, recorder):
    for req in requests:
        engine.add(req)
    while engine.has_work:
        if (step := engine.step()) is not None:
            recorder.on_step(step)


def test_a_simulated_run_records_what_it_reads():
    plain, shared = simulate(), simulate("runner.share_reads=true")
    assert (plain["num_distinct_kv_tokens"] == plain["num_kv_tokens"]).all()
    assert (shared["num_kv_tokens"] == plain["num_kv_tokens"]).all()
    saved = shared["num_kv_tokens"] - shared["num_distinct_kv_tokens"]
    # Parts of 256: three of the prefix of 1,000 tokens, two of the samples' 600. One of 12 rows reads them, one of 4.
    assert saved.max() == 11 * 768 + 3 * 512
    seconds = [columns["end_time"] - columns["start_time"] for columns in (plain, shared)]
    card = load_profile("h200")
    each = (1 / 4.8e12 / card.bandwidth_efficiency) * 131_072 - 4 * 32 * 32 * 128 / 9.89e14 / card.attention_efficiency
    assert seconds[0] - seconds[1] == pytest.approx(saved * each)


def test_a_step_time_reads_distinct_tokens_and_multiplies_all():
    features = StepFeatures(0, 4, 1000, 0, 0, 0, num_saved_kv_tokens=600)
    assert features.num_distinct_kv_tokens == 400
    roofline = RooflineStepTime(0.0, 0.0, 0.0, per_kv_token=1.0, per_attention_pair=0.25)
    assert roofline(features) == 400 + 600 * 0.25
    table = TableStepTime([1, 8], [0.0, 0.0], per_kv_token=0.5, per_distinct_kv_token=2.0)
    assert table(features) == 500 + 800
    assert table(features._replace(num_saved_kv_tokens=0)) == 2500


def recorded(num_steps=400, shares=True):
    """Steps whose time has two coefficients for KV."""
    rng = np.random.default_rng(0)
    prompts = np.arange(num_steps) % 4 == 0
    rows = rng.integers(1, 64, num_steps)
    kv = rows * rng.integers(100, 4000, num_steps)
    saved = (kv * rng.uniform(0, 0.9, num_steps)).astype(int) * shares
    new = np.where(prompts, rng.integers(10, 900, num_steps), 0)
    features = np.stack([new, rows, kv, new * 50, 0 * new, prompts * 1, new, saved], axis=1).astype(float)
    device = 1e-3 + 1e-5 * (new + rows) + 2e-9 * kv + 3e-8 * (kv - saved)
    nothing = np.zeros(num_steps)
    return Samples(features, device, nothing, nothing, nothing, nothing, nothing + np.nan)


def test_a_fit_tells_what_is_read_from_what_is_attended_to():
    decode, prefill = _fit_device(recorded(), "m")
    for found in (decode, prefill):
        assert found.per_kv_token == pytest.approx(2e-9, rel=0.05)
        assert found.per_distinct_kv_token == pytest.approx(3e-8, rel=0.05)
    decode, _ = _fit_device(recorded(shares=False), "m")
    assert decode.per_distinct_kv_token == 0.0 and decode.per_kv_token == pytest.approx(3.2e-8, rel=0.05)


def test_a_recording_of_before_saved_nothing():
    names = ("num_scheduled", "num_prefill_requests", "num_new_tokens", "num_attention_pairs", "num_copies",
             "longest_prefill", "start_time", "launch_time", "launched_time", "end_time")  # fmt: skip
    steps = {name: np.arange(3.0) for name in names} | {"num_kv_tokens": np.array([5, 6, 7])}
    run = SimpleNamespace(steps=steps, overlap=False, requests=[])
    assert not samples(run).features[:, 7].any()
    steps["num_distinct_kv_tokens"] = np.array([5, 4, 1])
    assert samples(run).features[:, 7].tolist() == [0, 2, 6]


def test_a_profile_of_runs_that_shared_nothing_says_so():
    with pytest.raises(ConfigError, match="fitted to runs in which each request read its own context"):
        simulate("runner.share_reads=true", "runner.profile=h200-llama-3.1-8b-overlap", "engine.overlap=true")


def test_a_report_says_what_was_saved():
    manifest = {"model": {"kv_bytes_per_token": 100}}
    steps = {"num_new_tokens": np.array([2, 2, 9]), "num_decode_tokens": np.array([2, 2, 3]),
             "num_kv_tokens": np.array([30, 50, 70]), "num_distinct_kv_tokens": np.array([20, 40, 10])}  # fmt: skip
    found = _kv_read(SimpleNamespace(manifest=manifest, steps=steps), np.array([1.0, 3.0, 5.0]))
    assert found == {"bytes_mean": pytest.approx(3500.0), "saved_share": pytest.approx(0.25)}
    steps["num_distinct_kv_tokens"] = np.zeros(3)
    assert _kv_read(SimpleNamespace(manifest=manifest, steps=steps), np.ones(3)) is None


def test_the_benchmark_of_the_plan_works_without_a_gpu(capsys):
    assert shared_reads.main(["--sections", "host", "--cases", "6,7"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["saved"] > 0.5 for line in lines] == [True, False] and "host_us" in lines[0]
