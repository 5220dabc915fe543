"""The founding claims and PagedAttention's memory figures, at small scale."""

import json

import pytest
from study_run import run_study

from kvarena.engine.classes import CLASSES
from kvarena.engine.errors import ConfigError, EngineError
from kvarena.experiments.studies import orca
from kvarena.experiments.studies.claims import Kind, Verdict
from kvarena.experiments.studies.memory_use import SEGMENTS, memory_use, waiting
from kvarena.experiments.studies.papers.paper_fig2 import LABELS

SEED_CLAIMS = (
    "experiment=seed_claims", "runner=simulated", "runner.profile=h100", "engine.dtype=bfloat16", "study.seeds=[0,1]",
)  # fmt: skip
SIZES = pytest.mark.parametrize("thorough", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["few", "many"])
FIGURE_2 = ("experiment=paper_fig2", "study.duration=8", "study.saturated=0.5")


def verdicts(findings):
    return {claim.quantity: claim.verdict for claim in findings.claims}


def test_seed_claims_hold_at_small_scale(tmp_path):
    findings, cells = run_study(tmp_path, *SEED_CLAIMS, "workload.num_requests=40")
    judged = {claim.quantity: claim.verdict for claim in findings.claims if claim.kind in (Kind.BOUND, Kind.CHECK)}
    assert Verdict.DIFFERS not in judged.values() and Verdict.FAILS not in judged.values()
    assert len(cells.folders) == 8
    assert [claim.kind for claim in findings.claims].count(Kind.BOUND) == 3  # the stated shares of memory
    stacks = findings.charts[0]
    assert [sum(series.y[i] for series in stacks.series) for i in range(4)] == pytest.approx([100] * 4)


def test_a_pool_that_is_never_short_is_refused(tmp_path):
    with pytest.raises(EngineError, match="make memory scarce"):
        run_study(tmp_path, *SEED_CLAIMS, "workload.num_requests=4", "kv_cache.num_slots=9000")


def test_a_window_of_a_few_steps_is_refused(tmp_path):
    """Under one seed paged allocation queued requests in 1 % of its run, and its share was a verdict's all the same."""
    few = ("engine.max_model_len=2048", "workload.max_total_len=2048", "workload.num_requests=36")
    with pytest.raises(EngineError, match=r"paged-continuous-seed0: the window .* covers \S+ % of .* less than 25 %"):
        run_study(tmp_path, *SEED_CLAIMS, *few, "kv_cache.num_slots=8192")


@SIZES
def test_figure_2_has_one_window_and_no_seed_ends_it(tmp_path, monkeypatch, thorough):
    """At a rate that leaves memory free the next one is taken; every system has the same window."""
    seeds = [0, 1] if thorough else [0]
    small = (*FIGURE_2, f"study.seeds={seeds}", "study.rates=[0.5,20]", "study.ideal=null")
    findings, cells = run_study(tmp_path / "right", *small)
    assert len(cells.folders) == (1 + 4) * len(seeds)  # vLLM at 0.5, then all four at 20
    assert "at 0.5 requests/s vLLM has a request waiting in 0 % of it" in " ".join(findings.notes)
    assert "at 20 requests/s" in findings.headline
    found = {claim.quantity: claim for claim in findings.claims}
    assert found["vLLM: token states"].ours > 80 > found["Orca (Max): token states"].ours
    for system in orca.SYSTEMS:
        covers = found[f"{system}: part of the run's step time that the window covers"]
        assert 0 < covers.ours < 100 and covers.kind is Kind.OURS
        assert found[f"{system}: part of the window in which a request waits"].ours > 50
        assert sum(found[f"{system}: {LABELS[name]}"].ours for name in SEGMENTS) == pytest.approx(100)
    monkeypatch.setitem(orca.SYSTEMS, "vLLM", "orca_max")
    wrong, _ = run_study(tmp_path / "wrong", *small, "study.rates=[20]")
    [share] = [claim for claim in wrong.claims if claim.quantity == "vLLM: token states"]
    assert share.ours < 80 and share.verdict is (Verdict.DIFFERS if thorough else Verdict.NOT_DECIDED)


def test_figure_2_without_a_saturating_rate_is_one_line(tmp_path):
    with pytest.raises(EngineError, match="no rate saturates all four"):
        run_study(tmp_path, *FIGURE_2, "study.seeds=[0]", "study.rates=[0.5]", "study.ideal=null")
    with pytest.raises(Exception, match="must rise") as error:
        run_study(tmp_path, *FIGURE_2, "study.rates=[2,1]")
    assert isinstance(error.value.__cause__ or error.value, ConfigError)


def test_external_and_others_is_what_nobody_owns_while_a_request_waits(tmp_path):
    """Under paged blocks that is the papers' "external fragmentation & others", though no hole is too small."""
    _, cells = run_study(tmp_path, *FIGURE_2, "study.rates=[20]", "study.ideal=null", "study.seeds=[0]")
    for folder in cells.folders:
        use = memory_use(folder, waiting)
        unowned = sum(use.shares[name] for name in CLASSES if name not in ("token_states", "reservation", "internal"))
        assert use.segments["others"] == pytest.approx(unowned)
        assert use.segments["unwanted"] == 0 and use.waiting_share == pytest.approx(100)
        everything = memory_use(folder, lambda run: run.steps["step"] >= 0)
        assert everything.time_share == pytest.approx(100) and everything.segments["unwanted"] > 0


@SIZES
def test_figure_13_has_a_bar_for_every_system_and_load(tmp_path, thorough):
    small = ("study.num_requests={sharegpt:25,alpaca:50}", "study.seeds=[0]")
    if thorough:
        small = ("study.num_requests={sharegpt:100,alpaca:200}", "study.seeds=[0,1]")
    findings, cells = run_study(tmp_path, "experiment=paper_fig13", *small)
    found = {claim.quantity: claim for claim in findings.claims}
    assert len(found) == 8
    assert not thorough or found["sharegpt, Orca (Max): mean batch"].ours == pytest.approx(7, rel=0.25)
    fitted = {name for name, claim in found.items() if claim.kind is Kind.FITTED}
    assert fitted == {"sharegpt, vLLM: mean batch", "alpaca, vLLM: mean batch"}  # what the profile was fitted to
    vllm = found["alpaca, vLLM: mean batch"]
    assert vllm.beside < vllm.ours  # the ideal card's steps are shorter
    profiles = {json.loads((folder / "manifest.json").read_text())["simulation"]["profile"] for folder in cells.folders}
    assert profiles == {orca.FITTED_PROFILE, "a100-40gb"}
    for chart in findings.charts:
        paper, ours, ideal = chart.series
        if thorough:  # one seed has no interval
            assert all(low <= value <= high for low, value, high in zip(ours.low, ours.y, ours.high, strict=True))
        assert paper.x == ours.x == ideal.x
    # Under another profile nothing was fitted, so vLLM's bars are judged as well.
    other, _ = run_study(
        tmp_path / "other", "experiment=paper_fig13", "study.num_requests={sharegpt:5,alpaca:5}", "study.seeds=[0]",
        "runner.profile=a100-40gb", "study.ideal=null",
    )  # fmt: skip
    assert all(claim.kind is Kind.VALUE for claim in other.claims)
