"""The engine benchmark's own parts, on the CPU."""

import pytest
import torch

from kvarena.experiments.benchmarks.engine_checks import check_logits, check_tokens, compare_logits
from kvarena.experiments.gpu.engines import Levers, PrefilledAllocator, attempt, drive, make_bed
from kvarena.experiments.gpu.shapes import SHAPES, fixed_batch, floor_of, offline_workload
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
    """At the measured copy rate; batch 256 is bound by the measured GEMM rate, not by this sum."""
    moved, flops = floor_of(SHAPES[shape]).decode(batch, 1024)
    assert moved / 4.28e12 * 1e3 == pytest.approx(milliseconds, rel=0.02)
    assert flops / 687e12 < moved / 4.28e12


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


@pytest.mark.slow
def test_the_exact_logits_are_those_of_the_same_weights():
    """In float32 all three agree, so an exact model with other weights would show as an error of order one."""
    bed = make_bed("tiny", 2048, None, dtype="float32", device="cpu")
    line = check_logits(bed, Levers())
    for name in ("prefill", "decode"):
        assert line[name]["fused_error"] < 1e-4
        assert line[name]["modules_error"] < 1e-4


def test_steps_are_kept_as_numbers():
    bed = make_bed("tiny", 2048, None, dtype="float32", device="cpu")
    engine = bed.engine(bed.runner(Levers(fusions=False), max_num_seqs=2), overlap=True, max_num_seqs=2)
    _, steps = drive(engine, fixed_batch(2, 5, 3, vocab_size=500))
    assert [(step.num_scheduled, step.num_new_tokens) for step in steps] == [(2, 10), (2, 2), (2, 2)]


@pytest.mark.slow
def test_levers_leave_tokens_alone_in_the_interpreter():
    line = check_tokens("cpu", 4, (5, 40, 1, 9))
    assert all(line["same"].values()), line
