"""Latency definitions against values worked out by hand."""

import numpy as np
import pyarrow as pa
import pytest
from fake_runs import fake_run

from kvarena.reports.analysis.latency import describe, gaps_within, request_latencies, token_gaps
from kvarena.reports.reading.files import as_lists, flat, read_run

TIMES = pa.large_list(pa.float64())


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
    times = pa.array([[1.0, 1.5, 2.5], [], [10.0], [11.0, 12.0, 13.5], []], TIMES)
    assert gaps_within(times).tolist() == [0.5, 1.0, 1.0, 1.5]


@pytest.mark.parametrize("lists", [[], [[], []], [[0.0]], [[], [0.0], []]])
def test_no_gaps(lists):
    assert gaps_within(pa.array(lists, TIMES)).tolist() == []


def test_null_lists_are_empty(tmp_path):
    columns = pa.chunked_array([[[1.0, 2.0], None]], pa.list_(pa.float64()))
    lists = as_lists(columns, tmp_path, "token_times")
    assert lists.to_pylist() == [[1.0, 2.0], []]
    assert flat(lists).tolist() == [1.0, 2.0]


def test_gaps_of_a_run_and_of_every_third_request(tmp_path):
    run = read_run(fake_run(tmp_path / "run", num_requests=14))
    times = run.lists("token_times")
    rows = np.flatnonzero(run.finished)
    gaps = [np.diff(times[int(row)].as_py()) for row in rows]
    every = np.concatenate(gaps)
    assert token_gaps(run).stride == 1
    assert token_gaps(run).values.tolist() == every.tolist()
    total = int(run.requests["num_output_tokens"][rows].sum())
    thinned = token_gaps(run, max_gaps=total // 3 + 1)
    assert thinned.stride == 3
    assert thinned.values.tolist() == np.concatenate(gaps[::3]).tolist()


def test_lists_of_some_rows_keep_their_order(tmp_path, monkeypatch):
    monkeypatch.setattr("kvarena.reports.reading.files.ROWS_AT_ONCE", 4)
    run = read_run(fake_run(tmp_path / "run", num_requests=14))
    everything = run.lists("output_token_ids")
    rows = np.array([9, 2, 13, 3, 4])
    some = run.lists("output_token_ids", rows)
    assert some.to_pylist() == [everything[int(row)].as_py() for row in rows]
    assert len(run.lists("output_token_ids", rows[:0])) == 0


def test_request_latencies_follow_the_definitions(tmp_path):
    run = read_run(fake_run(tmp_path / "run"))
    latencies, times = request_latencies(run), run.lists("token_times")
    index = 5
    arrival = run.requests["arrival_time"][index]
    tokens = times[index].as_py()
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
    assert not len(token_gaps(run).values)


def test_digest_tells_lists_apart(tmp_path, monkeypatch):
    run = read_run(fake_run(tmp_path / "a", num_requests=9))
    same = read_run(fake_run(tmp_path / "b", "contiguous", num_requests=9))
    other = read_run(fake_run(tmp_path / "c", num_requests=9, wrong_token=1))
    assert run.digest("output_token_ids") == same.digest("output_token_ids") != other.digest("output_token_ids")
    before = run.digest("output_token_ids")
    monkeypatch.setattr("kvarena.reports.reading.files.ROWS_AT_ONCE", 2)
    assert run.digest("output_token_ids") == before
