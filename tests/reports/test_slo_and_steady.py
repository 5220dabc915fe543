"""Goodput counts every request that was asked for; the steady part leaves out ramp and drain, and may not exist."""

import dataclasses
import json

import numpy as np
import pytest
from fake_runs import fake_run

from kvarena.experiments.correctness.steady_rates import answers
from kvarena.experiments.settings.compose import CONF_DIR, compose_cell, load_run
from kvarena.experiments.settings.targets import instantiate
from kvarena.experiments.studies.capacity import RAMP
from kvarena.reports.analysis.intervals import wilson
from kvarena.reports.analysis.latency import request_latencies
from kvarena.reports.analysis.slo import is_met, kept_limits, summarize_slo
from kvarena.reports.analysis.steady import SteadyWindow, mser, steady_window
from kvarena.reports.pages.comparison import compare
from kvarena.reports.pages.run_report import write_run_report
from kvarena.reports.reading.files import RunFiles, read_run


def made_of(
    run: RunFiles, arrival, finish, num_output=2, first=None, reason="length", slo=None, admission=None
) -> RunFiles:
    """The run with requests of these times; they are admitted as they arrive, unless `admission` says otherwise."""
    count = len(arrival)
    requests = {name: np.resize(column, count) for name, column in run.requests.items()}
    requests |= {
        "arrival_time": np.asarray(arrival, float),
        "finish_time": np.asarray(finish, float),
        "admission_time": np.asarray(arrival if admission is None else admission, float),
        "first_token_time": np.asarray(finish if first is None else first, float),
        "num_output_tokens": np.broadcast_to(num_output, count).astype(np.int32),
        "finish_reason": np.broadcast_to(np.array(reason, dtype=object), count),
    }
    return dataclasses.replace(run, requests=requests, manifest=run.manifest | {"config": {"slo": slo}})


def good_requests(run: RunFiles, limits: dict[str, float]) -> np.ndarray:
    return np.logical_and.reduce(list(kept_limits(run, limits).values()))


NO_STEADY_PART = SteadyWindow(0, 0, "none")


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


@pytest.mark.parametrize("limit", ["ttft", "tpot", "e2e"])
@pytest.mark.parametrize(
    ("num_output", "first", "num_first", "kept"),
    [
        (0, np.nan, 0, ()),  # an empty answer
        (5, np.nan, 0, ("e2e",)),  # tokens that nobody saw come
        (5, 0.5, 5, ("ttft", "e2e")),  # all of them at once
        (1, 0.5, 1, ("ttft", "tpot", "e2e")),
        (5, 0.5, 1, ("ttft", "tpot", "e2e")),
    ],
)
def test_what_was_not_measured_keeps_no_limit(any_run, tmp_path, limit, num_output, first, num_first, kept):
    """NaN is not above a limit: empty answers were good requests, and an objective was met by six of them."""
    slo = {"ttft": None, "tpot": None, "e2e": None, "attainment": 0.9} | {limit: 1.0}
    times = np.arange(200.0)
    run = made_of(any_run, times, times + 0.9, num_output, first=times + first, admission=[np.nan] * 200, slo=slo)
    run.requests["num_first_tokens"] = np.full(200, num_first)
    share = float(limit in kept)
    window = steady_window(run)
    assert window.found  # a server's answer without a token has left the queue all the same
    for rule in ("per_request", "percentiles"):
        run.manifest["config"]["slo"]["rule"] = rule
        found = summarize_slo(run, 200.0, window)
        for part in (found["whole_run"], found["steady"]):
            assert (part["attainment"], part["shares_within"][limit], part["met"]) == (share, share, bool(share))
    assert good_requests(run, {limit: 1.0}).mean() == share


def test_rejected_requests_stand_in_the_denominator(any_run):
    slo = {"ttft": 1.0, "tpot": None, "e2e": None, "attainment": 0.5}
    reason = ["length"] * 6 + ["rejected", "error", "length", "length"]
    run = made_of(any_run, [0.0] * 10, [0.5] * 8 + [5.0] * 2, reason=reason, slo=slo)
    whole = summarize_slo(run, 4.0, SteadyWindow(0, 0, "none"))["whole_run"]
    assert (whole["num_good"], whole["num_requests"], whole["attainment"]) == (6, 10, 0.6)
    assert whole["good_requests_per_second"] == 1.5
    assert whole["met"]
    assert whole["attainment_ci95_low"] < 0.6 < whole["attainment_ci95_high"]


def test_percentiles_judge_each_limit_apart_as_mlperf_does(any_run):
    """1 % late first tokens and another 1 % slow ones: 98 % are good, and both 99th percentiles are within."""
    first, finish = np.full(300, 1.0), np.full(300, 2.0)
    first[:2], finish[:2] = 1.5, 2.5  # over the limit of TTFT alone
    finish[2:4] = 9.0  # over the limit of TPOT alone
    limits = {"ttft": 1.2, "tpot": 1.0}
    met = {}
    for rule in (None, "per_request", "percentiles"):
        slo = limits | {"e2e": None, "attainment": 0.99} | ({"rule": rule} if rule else {})
        whole = summarize_slo(made_of(any_run, np.zeros(300), finish, first=first, slo=slo), 9.0, NO_STEADY_PART)
        met[rule] = whole["whole_run"]["met"]
        assert whole["whole_run"]["num_good"] == 296
        assert whole["whole_run"]["shares_within"] == pytest.approx({"ttft": 298 / 300, "tpot": 298 / 300})
    assert met == {None: False, "per_request": False, "percentiles": True}  # a run of before has no rule


@pytest.mark.parametrize(
    ("count", "num_late", "met"), [(100, 0, True), (100, 1, False), (200, 1, True), (200, 2, False)]
)
def test_the_percentile_is_the_latency_at_loadgens_index(any_run, count, num_late, met):
    """LoadGen compares latencies[int(n * 0.99)] of the sorted ones: of 100 the largest, of 200 the second largest."""
    finish = np.ones(count)
    finish[:num_late] = 3.0
    run = made_of(any_run, np.zeros(count), finish, num_output=1)
    assert bool(np.sort(finish)[int(count * 0.99)] <= 2.0) is met
    assert is_met(kept_limits(run, {"ttft": 2.0}), 0.99, "percentiles") is met
    lost = made_of(any_run, np.zeros(count), finish, num_output=1, reason=["rejected"] * 3 + ["length"] * (count - 3))
    assert is_met(kept_limits(lost, {"ttft": 2.0}), 0.99, "percentiles") is False


class OneRun:
    """Stands for cells that were run: one finished run, whatever is asked for."""

    def __init__(self, folder):
        self.folders = [folder]

    def run(self, *_):
        pass


def test_a_rate_is_sustained_by_the_rule_of_the_objective(tmp_path):
    """Nine in ten keep each limit, and fewer keep both: an objective of 88 % is met limit by limit, and not at once."""
    folder = fake_run(tmp_path / "run", num_requests=404, num_rejected=0)
    run = read_run(folder)
    late = run.requests["arrival_time"] >= RAMP * run.requests["arrival_time"].max()
    ttft, tpot = (request_latencies(run)[key] for key in ("ttft_seconds", "tpot_seconds"))
    limits = {"ttft": float(np.quantile(ttft[late], 0.9)), "tpot": float(np.quantile(tpot[late], 0.9))}
    both = float(((ttft <= limits["ttft"]) & (tpot <= limits["tpot"]))[late].mean())
    assert both < 0.88
    manifest = json.loads((folder / "manifest.json").read_text())
    study = instantiate(compose_cell(["experiment=capacity"])[0].study)
    found = {}
    for rule in ("per_request", "percentiles"):
        manifest["config"]["slo"] = limits | {"e2e": None, "attainment": 0.88, "rule": rule}
        (folder / "manifest.json").write_text(json.dumps(manifest))
        found[rule] = study._try(OneRun(folder), "paged", 1.0, 0, {})
    assert (found["per_request"].sustained, found["per_request"].attainment) == (False, pytest.approx(both))
    assert (found["percentiles"].sustained, found["percentiles"].attainment) == (True, pytest.approx(0.9, abs=0.01))


def test_wilson_interval_of_all_good_is_no_point():
    # Brown, Cai and DasGupta (2001): for 10 of 10 the lower bound is 1 / (1 + z^2 / n).
    assert wilson(10, 10) == pytest.approx((10 / (10 + 1.959964**2), 1.0))
    assert wilson(5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)


def test_no_limit_is_no_goodput(any_run):
    assert summarize_slo(any_run, 1.0, SteadyWindow(0, 0, "none")) is None


def test_mser_cuts_the_ramp():
    rng = np.random.default_rng(0)
    noise = rng.normal(0, 1, 100)
    ramp = np.concatenate([np.linspace(0, 20, 20), np.full(80, 20.0)])
    assert 17 <= mser(ramp + noise) <= 26
    assert mser(20 + noise) <= 40


def test_a_run_with_ramp_and_drain_has_its_middle_as_steady_part(any_run):
    arrival = np.arange(0.0, 100.0, 0.1)
    run = made_of(any_run, arrival, arrival + 20.0)  # N(t) grows for 20 s, and falls after the last arrival at 99.9 s
    window = steady_window(run)
    assert window.found
    assert window.start == pytest.approx(20, abs=2)
    assert window.end == pytest.approx(99.9)


def test_an_overloaded_run_has_no_steady_part(any_run):
    arrival = np.arange(0.0, 100.0, 0.1)
    run = made_of(any_run, arrival, 2 * arrival + 0.1, admission=2 * arrival)  # served at half the rate of arrival
    window = steady_window(run)
    assert not window.found
    assert window.verdict == "overloaded"
    assert window.reason.endswith("to 500 requests at the last arrival")


def test_what_grows_without_a_queue_cannot_be_told(any_run):
    """Admitted at once and served at half the rate of arrival, as by an engine whose pool is not yet full."""
    rng = np.random.default_rng(0)
    arrival = np.cumsum(rng.exponential(0.1, 1000))
    window = steady_window(made_of(any_run, arrival, 2 * arrival + 0.1, admission=arrival))
    assert (window.found, window.verdict) == (False, "cannot tell")
    assert "the number in the system grows" in window.reason


@pytest.mark.parametrize(
    ("count", "verdict", "why"), [(30, "does not apply", "at once"), (120, "does not apply", "at once")]
)
def test_offline_batches_have_no_steady_part(any_run, count, verdict, why):
    window = steady_window(made_of(any_run, np.zeros(count), np.ones(count)))
    assert (window.verdict, why in window.reason) == (verdict, True)


def test_short_runs_and_users_who_wait_have_no_steady_part(any_run):
    arrival = np.arange(0.0, 9.9, 0.1)
    assert steady_window(made_of(any_run, arrival, arrival + 1)).reason == "fewer than 100 requests finished"
    arrival = np.arange(0.0, 100.0, 0.1)
    run = made_of(any_run, arrival, arrival + 1)
    closed = dataclasses.replace(run, manifest=run.manifest | {"arrival": {"name": "closed_loop"}})
    assert (steady_window(run).verdict, steady_window(closed).verdict) == ("steady", "does not apply")
    assert "users wait for their answers" in steady_window(closed).reason


def test_a_server_that_names_no_admission_is_judged_by_its_first_tokens(any_run):
    arrival = np.arange(0.0, 100.0, 0.1)
    nothing = np.full(len(arrival), np.nan)
    slow = made_of(any_run, arrival, 2 * arrival + 0.1, admission=nothing)
    assert steady_window(slow).verdict == "overloaded"
    assert steady_window(made_of(any_run, arrival, arrival + 0.05, admission=nothing)).found


@pytest.mark.parametrize("service", ["exponential", "lognormal"])
@pytest.mark.parametrize(
    ("load", "num_requests", "steady"),
    [(0.05, 1000, True), (0.5, 1000, True), (0.9, 1000, True), (1.1, 4000, False), (1.3, 1000, False)],
)
def test_how_often_a_steady_part_is_found_in_a_queue_of_16_servers(service, load, num_requests, steady):
    """The trend of MSER's remainder alone found one in half of the runs at a load of 1.1, and in 65 % at 0.95."""
    rates = answers(load, 16, num_requests, service, num_runs=60, seed=0)
    assert (rates["steady"] if steady else 1 - rates["steady"]) >= 0.95


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
        limits = load_run([f"slo={name}"]).slo.limits
        assert bool(limits) == (name != "none")
        section = load_run([f"slo={name}"]).slo
        assert (section.rule, section.attainment) == (
            ("percentiles", 0.99) if "mlperf" in name else ("per_request", 0.9)
        )
    assert load_run(["slo=mlperf_llama2_70b_server"]).slo.limits == {"ttft": 2, "tpot": 0.2}


@pytest.mark.parametrize("bad", ["slo.ttft=0", "slo.tpot=fast", "slo.attainment=1.5", "slo.rule=mlperf"])
def test_bad_limits_are_refused(bad):
    with pytest.raises(Exception, match=bad.split("=")[0]):
        load_run([bad])
