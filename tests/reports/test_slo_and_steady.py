"""Goodput counts every request that was asked for; the steady part leaves out ramp and drain, and may not exist."""

import dataclasses
import json

import numpy as np
import pytest
from fake_runs import fake_run

from experiments.compose import CONF_DIR, load_config
from experiments.config import SLOConfig
from reports.comparison import compare
from reports.files import RunFiles, read_run
from reports.run_report import write_run_report
from reports.slo import good_requests, summarize_slo, wilson
from reports.steady import SteadyWindow, mser, steady_window


def made_of(run: RunFiles, arrival, finish, num_output=2, first=None, reason="length", slo=None) -> RunFiles:
    """The run with requests of these times."""
    count = len(arrival)
    requests = {name: np.resize(column, count) for name, column in run.requests.items()}
    requests |= {
        "arrival_time": np.asarray(arrival, float),
        "finish_time": np.asarray(finish, float),
        "first_token_time": np.asarray(finish if first is None else first, float),
        "num_output_tokens": np.broadcast_to(num_output, count).astype(np.int32),
        "finish_reason": np.broadcast_to(np.array(reason, dtype=object), count),
    }
    return dataclasses.replace(run, requests=requests, manifest=run.manifest | {"config": {"slo": slo}})


@pytest.fixture(scope="module")
def any_run(tmp_path_factory):
    return read_run(fake_run(tmp_path_factory.mktemp("runs") / "run", num_requests=24))


def test_a_good_request_keeps_every_limit(any_run):
    run = made_of(
        any_run,
        arrival=[0, 0, 0, 0, 0],
        first=[1.0, 1.1, 1.0, 1.0, np.nan],
        finish=[3.0, 3.0, 3.1, 1.0, 0.0],
        num_output=[3, 3, 3, 1, 0],
        reason=["length", "stop", "length", "length", "rejected"],
    )
    # Exactly at both limits; late first token; slow afterwards; one token, so no TPOT; rejected.
    assert good_requests(run, {"ttft": 1.0, "tpot": 1.0}).tolist() == [True, False, False, True, False]
    assert good_requests(run, {"e2e": 3.0}).tolist() == [True, True, False, True, False]


def test_rejected_requests_stand_in_the_denominator(any_run):
    slo = {"ttft": 1.0, "tpot": None, "e2e": None, "attainment": 0.5}
    reason = ["length"] * 6 + ["rejected", "error", "length", "length"]
    run = made_of(any_run, [0.0] * 10, [0.5] * 8 + [5.0] * 2, reason=reason, slo=slo)
    whole = summarize_slo(run, 4.0, SteadyWindow(0, 0, "none"))["whole_run"]
    assert (whole["num_good"], whole["num_requests"], whole["attainment"]) == (6, 10, 0.6)
    assert whole["good_requests_per_second"] == 1.5
    assert whole["met"]
    assert whole["attainment_ci95_low"] < 0.6 < whole["attainment_ci95_high"]


def test_wilson_interval_of_all_good_is_no_point():
    # Brown, Cai and DasGupta (2001): for 10 of 10 the lower bound is 1 / (1 + z^2 / n).
    assert wilson(10, 10) == pytest.approx((10 / (10 + 1.959964**2), 1.0))
    assert wilson(5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)


def test_no_limit_is_no_goodput(any_run):
    assert summarize_slo(any_run, 1.0, SteadyWindow(0, 0, "none")) is None


def test_mser_cuts_the_ramp_and_refuses_a_trend():
    rng = np.random.default_rng(0)
    noise = rng.normal(0, 1, 100)
    ramp = np.concatenate([np.linspace(0, 20, 20), np.full(80, 20.0)])
    assert 17 <= mser(ramp + noise) <= 26
    assert mser(20 + noise) <= 40
    assert mser(np.linspace(0, 20, 100) + noise) is None


def test_a_run_with_ramp_and_drain_has_its_middle_as_steady_part(any_run):
    arrival = np.arange(0.0, 100.0, 0.1)
    run = made_of(any_run, arrival, arrival + 20.0)  # N(t) grows for 20 s, and falls after the last arrival at 99.9 s
    window = steady_window(run)
    assert window.found
    assert window.start == pytest.approx(20, abs=2)
    assert window.end == pytest.approx(99.9)


def test_an_overloaded_run_has_no_steady_part(any_run):
    arrival = np.arange(0.0, 100.0, 0.1)
    window = steady_window(made_of(any_run, arrival, 2 * arrival + 0.1))  # served at half the rate of arrival
    assert not window.found
    assert "has a trend" in window.reason


@pytest.mark.parametrize(("count", "why"), [(10, "fewer than 20"), (30, "at once")])
def test_short_runs_and_offline_batches_have_no_steady_part(any_run, count, why):
    assert why in steady_window(made_of(any_run, np.zeros(count), np.ones(count))).reason


def test_reports_show_attainment_and_what_they_count(tmp_path):
    slo = {"slo": {"ttft": 0.4, "tpot": None, "e2e": None, "attainment": 0.9}}
    folders = [fake_run(tmp_path / name, name, "static", config=slo) for name in ("paged", "contiguous")]
    summary = write_run_report(folders[0])
    text = (folders[0] / "report.md").read_text()
    whole = summary["slo"]["whole_run"]
    assert whole["num_requests"] == 48
    assert f"{whole['num_good']} of 48" in text
    assert "TTFT ≤ 400 ms" in text
    assert "Steady part" in text
    compared = compare([(folder.name, folder) for folder in folders], tmp_path / "out")
    assert compared["cells"][0]["slo"]["whole_run"] == whole
    assert "goodput req/s" in (tmp_path / "out" / "report.md").read_text()
    assert "slo_whole_run_attainment" in (tmp_path / "out" / "comparison.csv").read_text()
    json.loads((tmp_path / "out" / "summary.json").read_text())


def test_every_preset_is_valid():
    presets = sorted(path.stem for path in (CONF_DIR / "slo").glob("*.yaml"))
    assert len(presets) == 13
    for name in presets:
        limits = SLOConfig.from_config(load_config([f"slo={name}"]).slo).limits
        assert bool(limits) == (name != "none")
    assert SLOConfig.from_config(load_config(["slo=mlperf_llama2_70b_server"]).slo).limits == {"ttft": 2, "tpot": 0.2}


@pytest.mark.parametrize("bad", ["slo.ttft=0", "slo.tpot=fast", "slo.attainment=1.5"])
def test_bad_limits_are_refused(bad):
    with pytest.raises(Exception, match=bad.split("=")[0]):
        SLOConfig.from_config(load_config([bad]).slo)
