"""The engine benchmark's own parts, on the CPU."""

import argparse
import weakref

import pytest
import torch

from kvarena.engine.errors import ConfigError
from kvarena.experiments.benchmarks import engine as bench
from kvarena.experiments.benchmarks.engine import CONTEXT, FIRST, LAST, PROMPT, Ceilings, rates
from kvarena.experiments.benchmarks.engine_checks import check_logits, check_tokens, compare_logits
from kvarena.experiments.benchmarks.first_token import first_token
from kvarena.experiments.benchmarks.recording import make_bench
from kvarena.experiments.correctness.oracle import OracleRunner
from kvarena.experiments.gpu.engines import PREFILLED, Engines, PrefilledAllocator, attempt, drive, runner_of
from kvarena.experiments.gpu.floors import fixed_batch, floor_of, offline_workload, shape_of
from kvarena.schedulers.continuous import ContinuousScheduler


def test_workload_a_is_the_published_one():
    requests = offline_workload()
    assert sum(req.num_prompt_tokens for req in requests) == 142_827
    assert sum(req.sampling.max_tokens for req in requests) == 133_966
    assert {req.sampling.temperature for req in requests} == {0.6}


@pytest.mark.parametrize(
    ("shape", "batch", "milliseconds"),
    [("llama-3.1-8b", 1, 3.54), ("llama-3.1-8b", 32, 4.51), ("qwen3-0.6b", 1, 0.31), ("qwen3-0.6b", 32, 1.16)],
)
def test_floors_are_those_of_the_comparison(shape, batch, milliseconds):
    """At the measured copy rate; at batch 256 products are bound by the measured GEMM rate."""
    parts = floor_of(shape_of(shape)).decode(batch, 1024)
    assert moved(parts) / 4.28e12 * 1e3 == pytest.approx(milliseconds, rel=0.02)
    assert all(part.flops / 687e12 < part.moved / 4.28e12 for part in parts.values())


def moved(parts):
    return sum(part.moved for part in parts.values())


def flops(parts):
    return sum(part.flops for part in parts.values())


class Card(Ceilings):
    """The rates of one H200, as an engine benchmark measured them."""

    def __init__(self, copy=4.25e12, matmul=690e12):
        self.copy, self.matmul = copy, matmul


def test_a_floor_adds_up_parts_of_which_none_hides_behind_another():
    """256 rows of the 8B shape: products by operations, attention by bytes; the larger of the two sums is 12.46."""
    found = rates(floor_of(shape_of("llama-3.1-8b")).decode(256, 1121), 0.01542, Card())
    assert found["floor_ms"] == pytest.approx(14.42, abs=0.02)
    parts = found["floor_parts_ms"]
    assert parts["attention"] == pytest.approx(8.85, abs=0.01)
    assert parts["head"] + parts["layers"] == pytest.approx(5.57, abs=0.01)
    assert found["share_of_floor"] == pytest.approx(14.42 / 15.42, abs=0.002)
    half = rates(floor_of(shape_of("llama-3.1-8b")).decode(256, 1121), 0.01542, Card(), num_ranks=2)
    assert half["floor_ms"] == pytest.approx(found["floor_ms"] / 2, abs=0.001)


def test_the_timed_decode_steps_read_the_context_that_their_line_says():
    """The steps between token 33 and token 161, as the section picks them out of a run."""
    parts = tiny("kv_cache.num_slots=8192").build("scheduler.max_num_seqs=1")
    req = fixed_batch(1, PROMPT, LAST, vocab_size=500)[0]
    starts = []
    parts.engine.on_launch = lambda step: starts.append(step.plan.scheduled[0])
    parts.engine.runner = OracleRunner()
    drive(parts.engine, [req])
    decodes = [entry for entry in starts if entry.num_new_tokens == 1][-(LAST - 1) :]
    read = [entry.start + 1 for entry in decodes[FIRST - 1 :]]
    assert len(read) == LAST - FIRST
    assert sum(read) / len(read) == pytest.approx(CONTEXT, abs=1)


def test_timed_lines_say_the_card_s_rates(monkeypatch):
    """What a figure is held against stands beside it: cards of one kind differ by several percent."""
    monkeypatch.setattr(bench, "prefill", lambda *_args: {"ms": 1.0})
    monkeypatch.setattr(bench, "offline", lambda *_args, **_options: {"ms": 1.0})
    monkeypatch.setattr(bench, "decode", lambda *_args, **_options: {"ms": 1.0})
    monkeypatch.setattr(bench, "pool", lambda *_args: {"slots": 1})
    args = argparse.Namespace(batch=[1], levers=["all"], budget=None, requests=4, chunked=False, sampling=None)
    wanted = ["decode", "ablate", "prefill", "offline", "pool"]
    lines = list(bench._sections_of(args, tiny(), Card(), wanted, {"shape": "tiny"}))
    timed = [line for line in lines if line["section"] != "pool"]
    assert {line["section"] for line in timed} == set(wanted[:-1])
    assert {(line["copy_tbps"], line["matmul_tflops"]) for line in timed} == {(4.25, 690.0)}


def test_a_floor_of_packed_weights():
    """Layers in 4.16 bits a weight, the head in 16: 7.0e9 and 0.53e9 of the 8B shape."""
    floor = floor_of(shape_of("llama-3.1-8b"), "awq")
    assert floor.weight_bytes == pytest.approx(6.98e9 * 4.156 / 8 + 2 * 0.525e9, rel=0.001)
    assert moved(floor.decode(1, 1024)) / 4.05e12 * 1e3 == pytest.approx(1.19, rel=0.01)
    assert floor_of(shape_of("llama-3.1-8b"), "fp8").weight_bytes == pytest.approx(6.98e9 + 2 * 0.525e9, rel=0.001)
    mixture, plain = (floor_of(shape_of("mixtral-8x7b"), method) for method in ("gptq", None))
    assert mixture.expert_bytes == pytest.approx(plain.expert_bytes * 4.156 / 16, rel=0.001)


def test_decode_steps_are_measured_with_the_sampling_that_is_asked_for(capsys):
    name, fields = bench.sampling_of("top_k=20,top_p=0.95")
    assert (name, fields) == ("top_k=20,top_p=0.95", {"top_k": 20, "top_p": 0.95})
    assert bench.sampling_of("plain")[1] == {}
    request = fixed_batch(1, 3, 4, vocab_size=50, sampling=fields)[0]
    assert (request.sampling.top_k, request.sampling.top_p, request.sampling.temperature) == (20, 0.95, 0.6)
    for text in ("top_p=2.0", "top_q=0.9", "top_p", "top_p=x"):
        with pytest.raises(SystemExit):
            bench.main(["--sections", "decode", "--sampling", text])
        assert f"argument --sampling: {text!r} is neither plain nor NAME=NUMBER" in capsys.readouterr().err


def test_prefilled_requests_decode_at_once():
    allocator = PrefilledAllocator(num_blocks=64, block_size=16, max_model_len=256)
    scheduler = ContinuousScheduler(allocator, max_model_len=256, max_num_seqs=4)
    for req in fixed_batch(4, 100, 5, vocab_size=50):
        scheduler.add(req)
    first = scheduler.schedule(0.0)
    assert [(entry.start, entry.num_new_tokens) for entry in first.scheduled] == [(96, 4)] * 4


def test_a_failing_section_leaves_its_error_in_the_line():
    def fail():
        raise ValueError("broken") from KeyError("why")

    line = attempt("x", fail, shape="s")
    assert line["section"] == "x"
    assert line["shape"] == "s"
    assert "broken" in line["error"]
    assert "KeyError" in line["error"]
    assert attempt("y", lambda: {"ms": 1})["ms"] == 1


def test_a_fused_forward_is_judged_by_the_modules_own_error():
    exact = torch.randn(4, 50)
    noise = torch.randn(4, 50)
    same = compare_logits(exact + 0.01 * noise, exact - 0.01 * noise, exact)
    assert same["excess"] == pytest.approx(1, rel=1e-3)
    assert compare_logits(exact + 0.03 * noise, exact + 0.01 * noise, exact)["excess"] == pytest.approx(3, rel=1e-3)


def tiny(*overrides):
    return Engines("tiny", "engine.device=cpu", "kv_cache.num_slots=4096", *overrides)


def test_the_exact_logits_are_those_of_the_same_weights():
    """An exact model with other weights would show as an error of order one."""
    line = check_logits(tiny("runner.fusions=true", "engine.dtype=bfloat16"))
    for name in ("prefill", "decode"):
        assert 0 < line[name]["fused_error"] < 0.05
        assert 0 < line[name]["modules_error"] < 0.05


def test_a_forward_that_is_not_fused_has_no_logits_to_check():
    with pytest.raises(ConfigError, match=r"needs runner\.fusions=true"):
        check_logits(tiny("runner.fusions=false"))


def test_steps_are_kept_as_numbers():
    parts = tiny().build()
    _, steps = drive(parts.engine, fixed_batch(2, 5, 3, vocab_size=500))
    assert [(step.num_scheduled, step.num_new_tokens) for step in steps] == [(2, 10), (2, 2), (2, 2)]


def test_engines_of_one_setting_share_a_runner_whose_pool_is_full():
    engines = tiny()
    first = engines.build("scheduler.max_num_batched_tokens=64")
    pool = runner_of(first).pool.data
    assert float(pool[:, :, 16:].abs().min()) > 0
    other = engines.build(
        "scheduler=chunked", "scheduler.max_num_batched_tokens=128", "engine.overlap=false", PREFILLED
    )
    assert runner_of(other) is runner_of(first)
    assert isinstance(other.engine.allocator, PrefilledAllocator)
    assert runner_of(engines.build("runner.fusions=true")) is not runner_of(first)


@pytest.mark.collected
def test_a_runner_that_is_let_go_of_gives_its_pool_back():
    """Two pools at once would leave half of the card for the one that is measured."""
    engines = tiny()
    pool = weakref.ref(runner_of(engines.build()).pool)
    engines.shared.drop_runner()
    assert pool() is None


@pytest.mark.slow
def test_levers_leave_tokens_alone():
    line = check_tokens("cpu", 4, (5, 40, 1, 9))
    assert set(line["same"].values()) == {True}, line
    assert len(line["same"]) == 8  # none, and the three levers that a CPU has, by two schedulers


def test_the_benchmarks_run_on_the_demo_model():
    found = first_token("demo", 2048, ["engine.device=cpu"])
    assert found["since_process_start"] >= found["imports"] > 0
    assert found["token"] > 0
    bench, parts = make_bench("demo", 2048)
    bench.requests = lambda: fixed_batch(2, 5, 3, vocab_size=200)
    assert parts.gpu_memory is None or torch.cuda.is_available()
    for mode in ("all", "none", "bare"):
        assert bench.run(mode)["output_tokens"] == 6


@pytest.mark.parametrize(
    ("shape", "active", "all_of_them"), [("mixtral-8x7b", 12.7e9, 46.6e9), ("qwen3-30b-a3b", 3.04e9, 30.2e9)]
)
def test_a_floor_has_the_experts_that_a_step_reads(shape, active, all_of_them):
    """At one request those of one token, at many all of them; or as many as were counted."""
    floor = floor_of(shape_of(shape))
    assert moved(floor.decode(1, 0)) == pytest.approx(2 * active, rel=0.01)
    assert moved(floor.decode(1000, 0)) == pytest.approx(2 * all_of_them, rel=0.01)
    counted = floor.experts.num_layers * floor.experts.top_k
    assert moved(floor.decode(32, 0, counted)) == pytest.approx(moved(floor.decode(1, 0)))
    assert flops(floor.decode(1, 0)) == pytest.approx(2 * active, rel=0.01)
    parts = floor.decode(1, 0)
    assert parts["experts"].flops == pytest.approx(parts["experts"].moved)  # 2 operations and 2 bytes a weight
    assert floor.prefill(1, 1) | {"attention": None} == parts | {"attention": None}


@pytest.mark.parametrize("override", ["workload.num_requests=4", "+driver.record=none", "arrival=poisson", "slo=chat"])
def test_a_setting_that_no_engine_has_is_refused(override):
    with pytest.raises(ConfigError, match="this benchmark takes settings of an engine alone"):
        tiny("scheduler=chunked", override)
