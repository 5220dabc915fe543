"""Stalls by whole prompts, at small scale."""

import pytest
from hydra.utils import instantiate
from study_run import run_study

from experiments.compose import compose_cell
from experiments.studies.base import Verdict

SMALL = ("experiment=sarathi_stalls", "study.rates=[4]", "study.duration=15")


def verdicts(findings):
    return [claim.verdict for claim in findings.claims]


def test_chunks_bound_the_gap_and_whole_prompts_do_not(tmp_path):
    findings, _ = run_study(tmp_path, *SMALL)
    assert verdicts(findings) == [Verdict.HOLDS, Verdict.HOLDS, Verdict.HOLDS, Verdict.NOT_COMPARABLE]


def test_chunks_as_long_as_prompts_gain_nothing(tmp_path):
    findings, _ = run_study(tmp_path, *SMALL, "study.token_budget=8192")
    assert Verdict.DIFFERS in verdicts(findings)


def test_capacity_is_the_load_under_both_limits():
    study = instantiate(compose_cell(list(SMALL))[0].study)
    study = type(study)([1, 2], 15, 512, max_tbt=0.1, max_delay=2.0)

    def cell(tbt, delay):
        return {"itl_seconds": {"p99": tbt}, "queue_time_seconds": {"p50": delay}}

    claim = study._capacity(
        {"prefill_first": [cell(0.05, 0), cell(0.25, 0)], "chunked": [cell(0.05, 0), cell(0.05, 3.0)]}
    )
    assert claim.ours == pytest.approx(1.5 / 1.25)
    assert claim.verdict is Verdict.HOLDS
