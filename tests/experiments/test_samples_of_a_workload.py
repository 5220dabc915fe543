"""`sampling.n` and `sampling.beams`: each item of a workload gives several requests."""

import json
import math

import numpy as np
import pytest

import kvarena
from kvarena.engine.core import run_to_completion
from kvarena.engine.errors import ConfigError, NotDefined
from kvarena.engine.request import FinishReason, Request, SamplingParams, expand
from kvarena.experiments.building.build import build
from kvarena.experiments.correctness import drawn_beams, verify
from kvarena.experiments.settings.compose import load_run
from kvarena.experiments.simulation.recorded import RecordedRun
from kvarena.experiments.workloads.parts.beam_scores import BeamScores

SIMULATED = ("runner=simulated", "runner.profile=h100", "engine.dtype=bfloat16", "workload=fixed")


def test_each_prompt_gives_n_requests_that_share_it():
    requests = build(load_run([*SIMULATED, "workload.num_requests=2", "sampling.n=3"])).load.requests
    group = list(requests)
    assert len(requests) == len(group) == 6
    assert [req.request_id for req in group[:3]] == ["fixed-0-0", "fixed-0-1", "fixed-0-2"]
    assert group[1].parent is group[0] and group[1].prompt_token_ids == group[0].prompt_token_ids


def test_users_who_wait_cannot_take_samples():
    with pytest.raises(ConfigError, match=r"sampling\.n=2 with users who wait"):
        build(load_run([*SIMULATED, "arrival=closed_loop", "sampling.n=2"]))


# ---- beams


def test_simulated_beams_fork_and_end_as_long_as_the_workload_says():
    outputs = {}
    for allocator in ("paged", "radix"):
        overrides = ["workload.num_requests=2", "sampling.beams=3", f"allocator={allocator}", "workload.output_len=40"]
        setup = build(load_run([*SIMULATED, *overrides]))
        requests = list(setup.load.requests)
        assert [req.request_id for req in requests[:3]] == ["fixed-0-0", "fixed-0-1", "fixed-0-2"]
        assert requests[0].search is requests[2].search is not requests[3].search
        steps = run_to_completion(setup.parts.engine, requests)
        assert any(step.plan.forked for step in steps)
        assert {(len(req.output_token_ids), req.finish_reason) for req in requests} == {(40, FinishReason.LENGTH)}
        assert max(step.usage.shared_saved for step in steps) > 0 == setup.parts.engine.allocator.usage().owned
        setup.parts.ledger.settle()
        outputs[allocator] = [req.output_token_ids for req in requests]
    # What is drawn hangs on the texts alone.
    assert outputs["paged"] == outputs["radix"]
    assert len({tuple(output) for output in outputs["paged"]}) == 6


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (["allocator=contiguous"], "allocator=paged, paged_prefix or radix"),
        (["scheduler=static"], "scheduler=chunked or scheduler=continuous"),
        (["scheduler.max_num_seqs=2"], r"scheduler\.max_num_seqs=2"),
        (["arrival=closed_loop"], r"sampling\.beams=3 with users who wait"),
        (["sampling.n=2"], r"sampling\.n=2 excludes sampling\.beams=3"),
        (["sampling.beams=400", "scheduler.max_num_seqs=512"], "than a simulated model has tokens for"),
        (["sampling.early_stopping=later"], "true, false or never"),
    ],
)
def test_beams_that_cannot_be_are_refused_before_anything_runs(wrong, said):
    with pytest.raises((ConfigError, NotDefined), match=said):
        build(load_run([*SIMULATED, "sampling.beams=3", *wrong]))


@pytest.mark.parametrize(("allocator", "width", "ends"), [("paged", 2, False), ("radix", 4, True)])
def test_a_run_s_beams_are_those_of_transformers(tmp_path, capsys, allocator, width, ends):
    overrides = [
        "workload=fixed", "workload.prompt_len=12", "workload.output_len=10", "workload.num_requests=2",
        f"sampling.beams={width}", "sampling.early_stopping=never", "sampling.length_penalty=0.4",
        f"sampling.ignore_eos={str(not ends).lower()}", "report.pages=false", "driver.probe=false",
        "driver.warmup=false",
    ]  # fmt: skip
    result = kvarena.run(allocator, folder=tmp_path / "run", overrides=overrides)
    assert result.summary.num_finished == 2 * width
    assert verify.main([str(tmp_path / "run")]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["requests"] == 2 * width
    rows = RecordedRun.read(tmp_path / "run")
    assert all(row["first_token_time"] is not None for row in rows.requests)
    assert all(len(row["token_times"]) == len(row["output_token_ids"]) for row in rows.requests)
    with pytest.raises(ConfigError, match="which beam became which is not recorded"):
        rows.make_requests()


def test_drawn_beams_are_compared_with_a_model_s(monkeypatch, capsys):
    monkeypatch.setattr(drawn_beams, "LENGTHS", {"alpaca": (20, 30)})
    monkeypatch.setattr(drawn_beams, "WIDTHS", (2,))
    monkeypatch.setattr(drawn_beams, "_text", lambda model: list(range(300, 400)))
    assert drawn_beams.main(["--prompts", "1", "--drawn-prompts", "2"]) == 0
    line = json.loads(capsys.readouterr().out)
    assert 0 < line["computed"] < 50 > line["drawn"] > 0


def test_what_beams_draw_is_a_distribution_and_always_the_same():
    asked = SamplingParams(max_tokens=9, beams=4)
    one, other = expand(Request("one", [1], asked)), expand(Request("other", [1], asked))
    first, second = BeamScores(range(256)), BeamScores(range(256))
    assert first.best(one[0]) == second.best(one[3]) != first.best(other[0])
    values = [value for _, value in first.best(one[0]).top]
    assert values == sorted(values, reverse=True) and len(values) == one[0].sampling.logprobs == 5
    whole = np.exp(first._logprobs)
    assert whole.sum(axis=1) == pytest.approx(1.0)
    assert whole[:, 0].mean() == pytest.approx(0.56, abs=0.01)  # as the demo model's beams
    one[0].output_token_ids += [1] * 5000
    assert math.exp(first.best(one[0]).top[0][1]) == pytest.approx(0.999)  # it repeats itself
