"""Time weights and bins of the KV ledger."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fake_runs import fake_run

from reports.files import read_run
from reports.memory import Spans, binned_mean, binned_rate, make_bins, mean_shares, step_spans
from reports.windows import ALL, ROOM, WAITING, telling, window_masks


def _steps(start, end, **columns):
    return {"start_time": np.array(start, float), "end_time": np.array(end, float)} | {
        name: np.array(values) for name, values in columns.items()
    }


def test_overlapped_steps_are_not_counted_twice():
    spans = step_spans(_steps([0, 1, 2.5], [2, 3, 4]))
    assert spans.start.tolist() == [0, 2, 3]
    assert spans.weight.sum() == 4


def test_idle_time_counts_nowhere():
    assert step_spans(_steps([0, 5], [1, 7])).weight.tolist() == [1, 2]


def test_mean_shares_weigh_by_time_and_add_up():
    zeros = [0, 0]
    steps = _steps([0, 1], [1, 4], token_states=[10, 30], reservation=[30, 10], internal=zeros, external=zeros,
                   shortage=zeros, cached=zeros, free=zeros, total=[40, 40], num_waiting=[0, 2])  # fmt: skip
    spans = step_spans(steps)
    shares = mean_shares(steps, spans)
    assert shares["token_states"] == pytest.approx((0.25 * 1 + 0.75 * 3) / 4)
    assert sum(shares.values()) == pytest.approx(1)
    assert mean_shares(steps, spans, steps["num_waiting"] > 0)["token_states"] == pytest.approx(0.75)
    assert mean_shares(steps, spans, np.array([False, False])) is None


def test_bins_keep_the_mean_and_show_gaps():
    spans = Spans(np.array([0.0, 1.0, 3.0]), np.array([1.0, 2.0, 4.0]))
    values = np.array([2.0, 4.0, 6.0])
    bins = make_bins(spans, 4)
    means = binned_mean(values, spans, bins)
    assert means[[0, 1, 3]].tolist() == [2.0, 4.0, 6.0]
    assert np.isnan(means[2])
    coarse = make_bins(spans, 2)
    assert binned_mean(values, spans, coarse).tolist() == [3.0, 6.0]
    assert binned_rate(np.array([10, 20, 30]), spans, coarse).tolist() == [15.0, 15.0]


def test_a_million_steps_bin_fast():
    end = np.cumsum(np.full(1_000_000, 0.01))
    spans = Spans(end - 0.01, end)
    means = binned_mean(np.arange(1_000_000), spans, make_bins(spans, 400))
    assert np.diff(means).min() > 0


def test_no_steps():
    spans = step_spans(_steps([], []))
    assert np.isnan(binned_mean(np.empty(0), spans, make_bins(spans, 3))).all()


def test_windows(tmp_path):
    run = read_run(fake_run(tmp_path / "run", "contiguous", num_requests=24))
    steps = run.steps
    masks = window_masks(run)
    assert masks[ALL.suffix].all()
    assert (masks[WAITING.suffix] == (steps["num_waiting"] > 0)).all()
    assert (masks[ROOM.suffix] == masks[WAITING.suffix]).all()  # the made-up limits are never reached
    scheduler = run.manifest["config"]["scheduler"]
    scheduler["max_num_seqs"] = int(steps["num_running"].max())
    full = steps["num_running"] == scheduler["max_num_seqs"]
    assert not window_masks(run)[ROOM.suffix][full].any()
    scheduler["max_num_batched_tokens"] = 8
    assert (steps["num_new_tokens"][window_masks(run)[ROOM.suffix]] < 8).all()


def test_waiting_for_the_token_budget_says_nothing_about_memory():
    summary = {f"kv_share_mean{window.suffix}": None for window in (ROOM, WAITING, ALL)}
    assert telling(summary) == (ALL, None)
    summary["kv_share_mean"], summary["kv_share_mean_while_waiting"] = {"free": 0.5}, {"free": 0.9}
    assert telling(summary) == (ALL, {"free": 0.5})
    summary["kv_share_mean_while_waiting_for_room"] = {"free": 0.1}
    assert telling(summary) == (ROOM, {"free": 0.1})


def test_a_run_folder_from_before_a_shortage_was_a_class_has_none(tmp_path):
    run_dir = fake_run(tmp_path / "run", "contiguous", num_requests=24)
    path = run_dir / "steps.parquet"
    table = pq.read_table(path)
    shortage = table.column("shortage").to_numpy()
    assert shortage.any()
    old = table.drop(["shortage"])
    external = pa.array(table.column("external").to_numpy() + shortage)
    pq.write_table(old.set_column(old.column_names.index("external"), "external", external), path)
    steps = read_run(run_dir).steps
    assert not steps["shortage"].any() and steps["external"].tolist() == external.to_pylist()
