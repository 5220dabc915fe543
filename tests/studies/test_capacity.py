"""Bisection finds the rate where a strategy stops keeping its limits, and equal strategies do not differ."""

import pytest
from study_run import run_study

from kvarena.engine.errors import ConfigError, EngineError
from kvarena.experiments.settings.compose import compose_cell
from kvarena.experiments.settings.targets import instantiate
from kvarena.experiments.studies.capacity import Trial, _charts, bisect_capacity
from kvarena.experiments.studies.claims import Mean, Verdict

SMALL = (
    "experiment=capacity", "study.duration=10", "study.tolerance=0.5", "study.curve=[0.5]",
    "slo.ttft=1", "workload.max_output_len=100",
)  # fmt: skip


@pytest.mark.parametrize("true", [0.3, 1.0, 5.7, 300.0])
def test_the_bracket_closes_on_the_true_capacity(true):
    tried = []

    def attempt(rate: float) -> bool:
        tried.append(rate)
        return rate <= true

    found = bisect_capacity(attempt, start=2.0, tolerance=0.05)
    assert found <= true < found * 1.05
    assert len(tried) == len(set(tried)) < 16


@pytest.mark.parametrize(("ok", "message"), [(True, "even .* are sustained"), (False, "not even .* are sustained")])
def test_a_limit_that_never_or_always_holds_is_an_error(ok, message):
    with pytest.raises(EngineError, match=message):
        bisect_capacity(lambda _: ok, 1.0, 0.05)


def test_the_interval_over_seeds_is_students():
    mean = Mean.of([1.0, 2.0, 3.0])
    assert mean.value == 2
    assert mean.high - 2 == pytest.approx(4.303 / 3**0.5, rel=1e-3)
    assert Mean.of([1.0]) == (1.0, None, None)


def test_paged_sustains_more_than_orca_max(tmp_path):
    only = ("~study.strategies.orca_oracle", "study.start_rate=4", "study.seeds=[0]", "study.curve=[]")
    findings, cells = run_study(tmp_path, *SMALL, *only)
    claims = {claim.quantity: claim for claim in findings.claims}
    assert list(claims) == ["orca_max", "paged", "paged / orca_max"]
    assert claims["paged"].ours > claims["orca_max"].ours
    assert claims["paged"].verdict is Verdict.MEASURED
    assert claims["paged / orca_max"].ours == claims["paged"].ours / claims["orca_max"].ours
    attainment, latency = findings.charts
    assert attainment.y_mark == 90
    paged = next(series for series in attainment.series if series.name == "paged")
    assert list(paged.x) == sorted(paged.x)
    sustained = {rate for rate, share in zip(paged.x, paged.y, strict=True) if share >= 90}
    assert max(sustained) == claims["paged"].ours
    assert min(paged.y) < 90
    assert [series.name for series in latency.series] == ["orca_max", "paged"]
    assert len(cells.folders) == len(set(cells.folders))


def test_lines_are_drawn_through_rates_that_every_seed_was_run_at():
    found = {1.0: [Trial(1.0, 1.0, 0.1, True), Trial(1.0, 0.8, 0.3, False)], 2.0: [Trial(2.0, 0.5, 1.0, False)]}
    attainment, latency = _charts({"a": found}, target=0.9, num_seeds=2)
    (line,) = attainment.series
    assert (list(line.x), list(line.y), list(line.low), list(line.high)) == ([1.0], [90.0], [80.0], [100.0])
    assert latency.series[0].y == pytest.approx([200.0])


def test_equal_strategies_show_no_significant_difference():
    study = instantiate(compose_cell(["experiment=capacity"])[0].study)
    verdict = {claim.quantity: claim.verdict for claim in study._compared(
        {"a": [1.0, 1.1, 1.2], "b": [1.1, 1.0, 1.2], "c": [2.0, 2.3, 2.4], "d": [0.5, 0.5, 0.6]})}  # fmt: skip
    assert verdict == {"b / a": Verdict.SAME, "c / a": Verdict.HIGHER, "d / a": Verdict.LOWER}


@pytest.mark.parametrize("bad", ["study.duration=0", "study.seeds=[1,1]", "study.tolerance=-1", "study.curve=[0]"])
def test_bad_settings_are_refused(bad):
    with pytest.raises(Exception, match=bad.split("=")[0]) as error:
        instantiate(compose_cell(["experiment=capacity", bad])[0].study)
    assert isinstance(error.value.__cause__ or error.value, ConfigError)


def test_a_preset_replaces_the_limits_and_the_rule():
    slo = compose_cell(["experiment=capacity", "slo=mlperf_llama3_1_8b_interactive"])[0].slo
    assert (slo.ttft, slo.tpot, slo.attainment, slo.rule) == (0.5, 0.03, 0.99, "percentiles")


def test_capacity_needs_a_limit(tmp_path):
    with pytest.raises(ConfigError, match="needs a limit"):
        run_study(tmp_path, *SMALL, "slo.ttft=null", "slo.tpot=null")
