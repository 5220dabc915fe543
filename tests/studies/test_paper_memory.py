"""The founding claims and PagedAttention's memory figures, at small scale."""

import pytest
from study_run import run_study

from engine.errors import EngineError
from experiments.studies import orca
from experiments.studies.base import Verdict


def verdicts(findings):
    return {claim.quantity: claim.verdict for claim in findings.claims}


def test_seed_claims_hold_at_small_scale(tmp_path):
    findings, cells = run_study(
        tmp_path,
        "experiment=seed_claims",
        "runner=simulated",
        "runner.profile=h100",
        "engine.dtype=bfloat16",
        "workload.num_requests=40",
        "kv_cache.num_slots=8192",
    )
    assert set(verdicts(findings).values()) == {Verdict.HOLDS}
    assert len(cells.folders) == 4
    stacks = findings.charts[0]
    assert [sum(series.y[i] for series in stacks.series) for i in range(4)] == pytest.approx([100] * 4)


def test_a_pool_that_is_never_short_is_refused(tmp_path):
    with pytest.raises(EngineError, match="make memory scarce"):
        run_study(
            tmp_path,
            "experiment=seed_claims",
            "runner=simulated",
            "runner.profile=h100",
            "engine.dtype=bfloat16",
            "workload.num_requests=4",
            "kv_cache.num_slots=9000",
        )


def test_figure_2_is_close_and_a_wrong_system_is_noticed(tmp_path, monkeypatch):
    small = ("experiment=paper_fig2", "study.num_requests=150", "study.rate=20")
    findings, _ = run_study(tmp_path / "right", *small)
    assert sum(verdict is Verdict.HOLDS for verdict in verdicts(findings).values()) >= 10
    assert verdicts(findings)["vLLM: token states"] is Verdict.HOLDS
    monkeypatch.setitem(orca.SYSTEMS, "vLLM", "orca_max")
    wrong, _ = run_study(tmp_path / "wrong", *small)
    assert verdicts(wrong)["vLLM: token states"] is Verdict.DIFFERS


def test_figure_13_has_a_bar_for_every_system_and_load(tmp_path):
    findings, _ = run_study(tmp_path, "experiment=paper_fig13", "study.num_requests=[120,600]")
    assert len(findings.claims) == 8
    assert verdicts(findings)["sharegpt, Orca (Max): mean batch"] is Verdict.HOLDS
    for chart in findings.charts:
        paper, ours = chart.series
        assert all(low <= value <= high for low, value, high in zip(ours.low, ours.y, ours.high, strict=True))
        assert paper.x == ours.x
