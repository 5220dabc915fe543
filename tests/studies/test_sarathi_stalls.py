"""Stalls by whole prompts, at small scale."""

import pytest
from study_run import run_study

from kvarena.engine.errors import EngineError
from kvarena.experiments.settings.compose import compose_cell
from kvarena.experiments.settings.targets import instantiate
from kvarena.experiments.studies.claims import Kind, Verdict

SMALL = ("experiment=sarathi_stalls", "study.rates=[2,7,16]", "study.duration=15")
SEEDS = pytest.mark.parametrize("seeds", ["[0]", pytest.param("[0,1]", marks=pytest.mark.slow)])


@SEEDS
def test_chunks_bound_the_gap_and_whole_prompts_do_not(tmp_path, seeds):
    findings, _ = run_study(tmp_path, *SMALL, f"study.seeds={seeds}")
    (capacity, *ratios, bounded, unbounded), by_step_times = findings.claims[:6], findings.claims[6:]
    assert capacity.kind is Kind.VALUE and capacity.stated == 2.6 and capacity.ours > 1
    assert {claim.kind for claim in ratios} == {Kind.OURS} and ratios[1].ours > 1
    assert bounded.kind is unbounded.kind is Kind.CHECK
    assert bounded.verdict is unbounded.verdict is Verdict.PASSES
    gaps, firsts = by_step_times[::2], by_step_times[1::2]
    assert {claim.kind for claim in by_step_times} == {Kind.OURS} and len(gaps) == len(firsts) == 3
    assert gaps[0].ours < 0.9, "at a low load decodes are quick, and chunks beside them small"


@SEEDS
def test_chunks_as_long_as_prompts_gain_nothing(tmp_path, seeds):
    findings, _ = run_study(tmp_path, *SMALL, f"study.seeds={seeds}", "study.token_budget=8192")
    assert findings.claims[0].ours < 1.5


def test_capacity_is_the_load_under_both_limits():
    study = instantiate(compose_cell(list(SMALL))[0].study)
    study = type(study)([1, 2], 15, 512, max_tbt=0.1, max_delay=2.0, seeds=[0])

    def cells(tbt, delay):
        return [{"itl_seconds": {"p99": tbt}, "queue_time_seconds": {"p50": delay}}]

    claim = study._capacity(
        {"prefill_first": [cells(0.05, 0), cells(0.25, 0)], "chunked": [cells(0.05, 0), cells(0.05, 3.0)]}
    )
    assert claim.ours == pytest.approx(1.5 / 1.25)
    assert claim.verdict is Verdict.NOT_DECIDED  # one seed
    with pytest.raises(EngineError, match="do not bracket"):
        study._capacity({"prefill_first": [cells(0.2, 0), cells(0.25, 0)], "chunked": [cells(0.05, 0), cells(0.2, 0)]})
