"""Step times are fitted before a run, on a device or on a profile's clock, and a recording decides by the same ones."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from kvarena.engine.clock import VirtualClock
from kvarena.engine.contract import StepTimes
from kvarena.experiments.building.timing import Limits, StepTimer, time_steps
from kvarena.experiments.jobs.job import execute
from kvarena.experiments.settings.compose import compose_cell
from kvarena.experiments.settings.strategies import build_allocator
from kvarena.experiments.simulation.recorded import RecordedRun
from kvarena.experiments.simulation.replay import replay
from kvarena.experiments.simulation.runner import SimulatedRunner

QUIET = ("report.progress=false", "report.pages=false", "report.kv_map=false", "driver.probe=false")
TIMED = ("scheduler=chunked", "scheduler.chunks=timed", "scheduler.max_num_batched_tokens=16384")
LLAMA = ("runner=simulated", "runner.profile=h200-llama-3.1-8b-overlap", "model=llama-3.1-8b-shape",
         "engine.dtype=bfloat16", "engine.max_model_len=8192", "kv_cache.num_slots=327680")  # fmt: skip


def run(folder: Path, *args: str) -> tuple[RecordedRun, dict]:
    folder.mkdir()
    config, choices = compose_cell([*args, *QUIET])
    summary = execute(config, folder, "cell", choices)
    return RecordedRun.read(folder), summary


def device(features):
    """Seconds: weights, tokens, context and pairs, as they are to be found again."""
    return 0.003 + 2e-5 * features.num_tokens + 3e-8 * features.num_kv_tokens + 1e-9 * features.num_attention_pairs


@pytest.mark.parametrize("name", ["paged", "contiguous", "virtual", "radix"])
@pytest.mark.parametrize("overlap", [False, True])
def test_a_fit_finds_a_device_s_own_numbers(name, overlap):
    clock = VirtualClock()
    allocator = build_allocator(name, num_blocks=8192, max_model_len=9000, block_size=16)
    timer = StepTimer(SimulatedRunner(device, clock), allocator, clock, overlap=overlap)
    times = time_steps(timer, Limits(rows=200, tokens=16384, length=9000))
    # A chunk's own reading of its context is taken for pairs.
    assert times.per_pair == pytest.approx(1e-9 + 3e-8 / 512, rel=0.01)
    assert times.per_kv_token == pytest.approx(3e-8, rel=0.05)
    assert times.decode(100, 50_000) == pytest.approx(0.003 + 0.002 + 0.0015, rel=0.01)
    at = next(size for size in times.tokens if size >= 500)
    assert times.step(at, 0, 0) == pytest.approx(0.003 + 2e-5 * at, rel=0.02)
    assert allocator.usage().owned == 0


def test_sizes_that_steps_are_padded_to_are_timed_and_small_pools_are_enough():
    clock = VirtualClock()
    allocator = build_allocator("paged", num_blocks=16, max_model_len=128, block_size=16)
    timer = StepTimer(SimulatedRunner(device, clock), allocator, clock, overlap=False)
    times = time_steps(timer, Limits(rows=64, tokens=2048, length=128, padded=(32, 64, 128, 2048)))
    assert times.tokens[:2] == (32, 64) and times.rows[-1] == 16
    tiny = build_allocator("paged", num_blocks=1, max_model_len=16, block_size=1)
    times = time_steps(StepTimer(SimulatedRunner(device, clock), tiny, clock, overlap=False), Limits(4, 16, 1))
    assert times.rows == (1,) and tiny.usage().owned == 0


def test_a_slow_device_is_not_held_up():
    clock, calls = VirtualClock(), []
    runner = SimulatedRunner(lambda features: calls.append(1) or 0.3 * features.num_tokens, clock)
    allocator = build_allocator("paged", num_blocks=8192, max_model_len=9000, block_size=16)
    times = time_steps(StepTimer(runner, allocator, clock, overlap=False), Limits(256, 16384, 9000))
    assert len(calls) <= 4
    assert times.rows == (1,) and times.decode(4, 0) == pytest.approx(0.3)


def test_a_simulation_s_clock_is_left_alone_and_its_manifest_has_the_fit(tmp_path):
    load = ("workload=fixed", "workload.num_requests=4", "workload.prompt_len=600", "workload.output_len=40",
            "arrival=constant", "arrival.rate=20")  # fmt: skip
    patient = "scheduler.max_step_time=0.01"
    recorded, summary = run(tmp_path / "timed", *LLAMA, *TIMED, patient, *load)
    times = StepTimes.of(recorded.manifest["engine"]["step_times"])
    assert summary["engine"]["step_times"]["per_kv_token"] == times.per_kv_token > 0
    assert float(recorded.steps["start_time"][0]) == 0.0
    assert recorded.strategy().scheduler.step_times == times
    assert replay(recorded).identical
    del recorded.manifest["engine"]["step_times"]
    assert not replay(recorded).identical, "the fit decided"
    plain, _ = run(tmp_path / "budget", *LLAMA, "scheduler=chunked", *load)
    assert plain.manifest["engine"]["step_times"] is None


@pytest.mark.parametrize("more", [("engine.overlap=true",), ("allocator=radix", "workload=shared_prefix")])
def test_a_cpu_engine_fits_its_own_and_is_replayed(tmp_path, more):
    load = ("workload=uniform", "workload.num_requests=12", "workload.prompt_len.max=300", "workload.output_len.max=24",
            "engine.max_model_len=1024", "kv_cache.num_slots=8192", "arrival=poisson", "arrival.rate=40")  # fmt: skip
    if more[-1] == "workload=shared_prefix":
        load = ("workload.num_requests=8", *load[4:])
    recorded, summary = run(tmp_path / "cell", *TIMED, *more, *load)
    assert summary["num_finished"] == len(recorded.requests)
    assert recorded.manifest["engine"]["step_times"]["seconds"][0] > 0
    result = replay(recorded)
    assert result.identical and result.num_steps > 10, str(result)


def test_replicas_plan_by_one_fit(tmp_path):
    load = ("workload=fixed", "workload.num_requests=8", "workload.prompt_len=600", "workload.output_len=8",
            "router=round_robin", "router.num_replicas=2")  # fmt: skip
    recorded, _ = run(tmp_path / "cell", *LLAMA, *TIMED, *load)
    first, second = (recorded.of_replica(number).strategy().scheduler for number in (0, 1))
    assert first.step_times == second.step_times is not None


def test_thirty_two_clients_wait_less_for_each_token_and_have_no_fewer(tmp_path):
    """Prompts of 512 and some 256 tokens of output, simulated: p99 between tokens 21 ms by a budget, below 9 here."""
    load = ("workload=uniform", "workload.prompt_len.min=500", "workload.prompt_len.max=524", "arrival=closed_loop",
            "workload.output_len.min=150", "workload.output_len.max=362", "arrival.num_users=32",
            "workload.num_requests=160")  # fmt: skip
    _, timed = run(tmp_path / "timed", *LLAMA, *TIMED, *load)
    _, budget = run(tmp_path / "budget", *LLAMA, "scheduler=chunked", *load)
    assert timed["itl_seconds"]["p99"] < 0.009 < 0.014 < budget["itl_seconds"]["p99"]
    assert timed["output_tokens_per_second"] > 0.99 * budget["output_tokens_per_second"]


def test_manifests_of_a_fit_are_plain_json(tmp_path):
    times = StepTimes((1, 2), (0.1, 0.2), (16, 32), (0.1, 0.3), 1e-8, 1e-9)
    assert StepTimes.of(json.loads(json.dumps(times.facts))) == times
    assert isinstance(SimpleNamespace(**times.facts).rows, list)
