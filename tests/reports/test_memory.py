"""Time weights and bins of the KV ledger, and over which steps its shares are stated."""

import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fake_runs import fake_run
from rich.console import Console

from kvarena.reports.analysis.memory import Spans, binned_mean, binned_rate, make_bins, mean_shares, step_spans
from kvarena.reports.analysis.windows import ALL, ROOM, WAITING, kv_use, kv_use_text, window_masks
from kvarena.reports.drawing.format import percent
from kvarena.reports.pages.comparison import compare
from kvarena.reports.pages.run_report import write_run_report
from kvarena.reports.pages.terminal import comparison_table, run_table
from kvarena.reports.reading.files import read_run


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


def shares(over_all, for_room=None, covered=None):
    """What a summary says of KV memory, of two windows."""
    return {"kv_share_mean": over_all, "kv_share_mean_while_waiting_for_room": for_room,
            "step_time_share_while_waiting_for_room": covered}  # fmt: skip


def test_a_share_of_kv_names_its_window_and_how_much_of_the_run_it_covers():
    """97 % of the pool was 9 % of the run: while requests wait for room a paged pool is full by construction."""
    split = {"token_states": 0.62, "cached": 0.0}
    assert kv_use_text(shares(split, {"token_states": 0.97}, 0.09)) == (
        "token states filled 62.0 % of the KV pool over all steps, 97.0 % while requests waited for room (9.0 % of the "
        "step time)"
    )
    assert kv_use_text(shares(split)).endswith("over all steps, and no request waited for room")
    assert kv_use_text(shares({"token_states": 0.4, "cached": 0.5})).startswith(
        "token states filled 40.0 % of the KV pool over all steps and cached prefixes 50.0 %, "
    )
    assert (kv_use_text(shares(None)), kv_use(shares(None))) == ("", None)


def test_every_place_that_prints_a_share_of_kv_says_all_steps_and_the_other_window_s_part(tmp_path):
    names = ("contiguous", "paged")
    folders = [fake_run(tmp_path / name, name, num_requests=60, rate=40.0, total=4096) for name in names]
    rows = pq.read_table(folders[1] / "steps.parquet")
    free, place = rows.column("free").to_numpy(), rows.schema.get_field_index("cached")
    rows = rows.set_column(place, "cached", pa.array(free)).set_column(
        rows.schema.get_field_index("free"), "free", pa.array(0 * free)
    )
    pq.write_table(rows, folders[1] / "steps.parquet")
    run = write_run_report(folders[0])
    text = (folders[0] / "report.md").read_text()
    room, over_all = run["kv_share_mean_while_waiting_for_room"], run["kv_share_mean"]
    part = percent(run["step_time_share_while_waiting_for_room"])
    assert room and room["token_states"] != over_all["token_states"]
    both = f"{percent(room['token_states'])} while requests waited for room ({part} of the step time)"
    assert f"{percent(over_all['token_states'])} of the KV pool over all steps, {both}" in run["headline"]
    assert f"| KV pool in token states | **{percent(over_all['token_states'])}** | over all steps; {both} |" in text
    assert f"| of the step time | 100.0 % | {percent(run['step_time_share_while_waiting'])} | {part} |" in text
    assert f"{percent(over_all['token_states'])} of the pool over all steps; {both}" in _printed(run_table(run))
    compared = compare([(folder.name, folder) for folder in folders], tmp_path / "out")
    cells = [cell["kv_share_mean"] for cell in compared["cells"]]
    printed = _printed(comparison_table(compared))
    assert "KV, all steps + cached" in printed
    assert "| KV: token states | KV: + cached |" in (tmp_path / "out" / "report.md").read_text()
    for split in cells:
        assert f"{percent(split['token_states'])} {percent(split['cached'])}" in printed
    assert cells[1]["cached"] > 0 and cells[0]["cached"] == 0


def _printed(table):
    console = Console(file=io.StringIO(), width=400)
    console.print(table)
    return " ".join(console.file.getvalue().split())


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
