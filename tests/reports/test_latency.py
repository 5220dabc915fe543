"""Latency definitions against values worked out by hand."""

import numpy as np
import pytest
from fake_runs import fake_run

from reports.files import Ragged, read_run
from reports.latency import describe, request_latencies, token_gaps


def test_describe_uses_linear_percentiles_and_leaves_nan_out():
    stats = describe(np.array([1.0, 2.0, 3.0, 4.0, np.nan]))
    assert stats["count"] == 4
    assert stats["p50"] == 2.5
    assert stats["p90"] == pytest.approx(3.7)
    assert stats["max"] == 4.0


def test_describe_nothing():
    stats = describe(np.array([np.nan]))
    assert stats["count"] == 0
    assert stats["p99"] is None


def test_gaps_never_cross_requests():
    times = Ragged(np.array([1.0, 1.5, 2.5, 10.0, 11.0, 12.0, 13.5]), np.array([0, 3, 3, 4, 7, 7]))
    keep = np.array([True, True, True, True, True])
    assert token_gaps(times, keep).tolist() == [0.5, 1.0, 1.0, 1.5]
    keep[0] = False
    assert token_gaps(times, keep).tolist() == [1.0, 1.5]


@pytest.mark.parametrize("offsets", [[0], [0, 0, 0], [0, 1], [0, 0, 1, 1]])
def test_no_gaps(offsets):
    times = Ragged(np.arange(offsets[-1], dtype=float), np.array(offsets))
    assert token_gaps(times, np.ones(len(offsets) - 1, dtype=bool)).tolist() == []


def test_request_latencies_follow_the_definitions(tmp_path):
    run = read_run(fake_run(tmp_path / "run"))
    latencies, times = request_latencies(run), run.lists("token_times")
    index = 5
    arrival = run.requests["arrival_time"][index]
    tokens = times[index]
    assert latencies["ttft_seconds"][index] == pytest.approx(tokens[0] - arrival)
    assert latencies["e2e_seconds"][index] == pytest.approx(tokens[-1] - arrival)
    assert latencies["tpot_seconds"][index] == pytest.approx((tokens[-1] - tokens[0]) / (len(tokens) - 1))
    assert latencies["normalized_latency_seconds_per_token"][index] == pytest.approx(
        (tokens[-1] - arrival) / len(tokens)
    )
    assert np.isnan(latencies["ttft_seconds"][:2]).all()  # rejected


def test_one_output_token_has_no_tpot(tmp_path):
    run = read_run(fake_run(tmp_path / "run", one_token=True))
    assert np.isnan(request_latencies(run)["tpot_seconds"]).all()
    assert not len(token_gaps(run.lists("token_times"), run.finished))
