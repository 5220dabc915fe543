"""The profile of PagedAttention's engine: two step times fix two host times, and the file says what it is."""

import json
from dataclasses import fields

import numpy as np
import pytest
from study_run import run_study

from kvarena.engine.errors import ConfigError, EngineError
from kvarena.experiments.settings.compose import CONF_DIR
from kvarena.experiments.simulation.profiles import load_profile
from kvarena.experiments.studies.claims import Kind
from kvarena.experiments.studies.orca import FITTED_PROFILE
from kvarena.experiments.studies.papers.paper_profile import implied_step_times, solve_host

SMALL = ("experiment=paper_profile", "study.num_requests={sharegpt:60,alpaca:300}", "study.seeds=[0]")
RECORDED = CONF_DIR.parent / "docs" / "results" / "paper-profile" / "study.json"


def test_the_aims_are_littles_law_on_the_papers_bars():
    times = implied_step_times()
    assert times["sharegpt"] == pytest.approx(30.42 / (2 * 337.99))
    assert times["alpaca"] == pytest.approx(0.0755, abs=5e-5)


def test_two_step_times_have_one_solution():
    base, each = solve_host(np.array([0.011, 0.041]), np.array([30.0, 130.0]))
    assert (base + 30 * each, base + 130 * each) == pytest.approx((0.011, 0.041))


def test_the_fit_meets_both_step_times_and_proves_nothing(tmp_path):
    findings, cells = run_study(tmp_path, *SMALL, "study.close=0.05", "study.max_rounds=30")
    assert {claim.kind for claim in findings.claims} == {Kind.FITTED, Kind.OURS}
    fitted = [claim for claim in findings.claims if claim.kind is Kind.FITTED]
    assert [claim.ours for claim in fitted] == pytest.approx([claim.stated for claim in fitted], rel=0.05)
    profile = load_profile(str(tmp_path / "fitted.yaml"))
    last = json.loads((cells.folders[-1] / "manifest.json").read_text())
    assert last["simulation"]["figures"]["host"]["before"] == profile.host.before


def test_a_fit_that_does_not_close_is_one_line(tmp_path):
    with pytest.raises(EngineError, match="not met within 1e-09 in 1 rounds"):
        run_study(tmp_path, *SMALL, "study.close=1e-9", "study.max_rounds=1")
    with pytest.raises(Exception, match="must be a card's profile") as error:
        run_study(tmp_path, *SMALL, "study.card=h200-qwen3-0.6b-overlap")
    assert isinstance(error.value.__cause__ or error.value, ConfigError)


def test_the_committed_profile_is_the_ideal_card_with_other_host_times_and_says_so():
    fitted, ideal = load_profile(FITTED_PROFILE), load_profile("a100-40gb")
    others = [field.name for field in fields(ideal) if field.name not in ("source", "host", "error")]
    assert [getattr(fitted, name) for name in others] == [getattr(ideal, name) for name in others]
    assert fitted.host.before > ideal.host.before and fitted.host.before_per_request > ideal.host.before_per_request
    assert "fitted" in fitted.source and "fitted to" in fitted.error and "not known" in ideal.error


def test_the_committed_profile_is_the_recorded_fit():
    claims = {claim["quantity"]: claim["ours"] for claim in json.loads(RECORDED.read_text())["claims"]}
    host = load_profile(FITTED_PROFILE).host
    assert 1e3 * host.before == pytest.approx(claims["host time of a step"], rel=1e-3)
    each = claims["host time of a step, for each request in it"]
    assert 1e3 * host.before_per_request == pytest.approx(each, rel=1e-3)
