"""Cells that served different requests are not compared without a word: the longest rejected made a cell look fast."""

from __future__ import annotations

import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fake_runs import fake_run
from rich.console import Console

from kvarena.reports.pages.comparison import compare
from kvarena.reports.pages.terminal import comparison_table
from kvarena.reports.reading.files import read_run


def edit_requests(run_dir, change):
    """Let `change(row)` edit every request's row."""
    path = run_dir / "requests.parquet"
    table = pq.read_table(path)
    rows = table.to_pylist()
    for row in rows:
        change(row)
    pq.write_table(pa.Table.from_pylist(rows, table.schema), path)


def reject_the_longest(run_dir, share):
    lengths = read_run(run_dir).requests["num_output_tokens"]
    limit = np.quantile(lengths, 1 - share)

    def change(row):
        if row["num_output_tokens"] > limit:
            row.update(finish_reason="rejected", num_output_tokens=0, output_token_ids=[], token_times=[],
                       first_token_time=None, admission_time=None, finish_time=row["arrival_time"])  # fmt: skip

    edit_requests(run_dir, change)


@pytest.fixture
def two(tmp_path):
    return [fake_run(tmp_path / name, name, num_requests=40, num_rejected=0) for name in ("paged", "contiguous")]


def compared(tmp_path, folders):
    summary = compare([(folder.name, folder) for folder in folders], tmp_path / "out")
    return summary, (tmp_path / "out" / "report.md").read_text()


def test_the_headline_and_the_terminal_say_that_the_work_differs(tmp_path, two):
    reject_the_longest(two[1], 0.2)
    summary, text = compared(tmp_path, two)
    (group,) = summary["same_work"]
    assert (group["num_requests"], group["num_common"], group["num_other_lengths"]) == (40, 32, 0)
    assert "The cells served different requests (32 to 40 of 40); over the 32 that all served, " in summary["headline"]
    console = Console(file=io.StringIO(), width=400)
    console.print(comparison_table(summary))
    assert "over the 32 that all served" in " ".join(console.file.getvalue().split())
    assert "## Over the requests that all cells served" in text
    assert "8 rejected" in text
    assert "The other requests' load was there too." in text


def test_throughput_and_latency_over_the_common_requests_are_theirs_alone(tmp_path, two):
    """Recounted from the rows: tokens of the common ones, from their first arrival to their last end."""
    reject_the_longest(two[1], 0.2)
    summary, _ = compared(tmp_path, two)
    runs = [read_run(folder) for folder in two]
    common = set(runs[0].requests["request_id"][runs[0].finished]) & set(
        runs[1].requests["request_id"][runs[1].finished]
    )
    for run, cell in zip(runs, summary["same_work"][0]["cells"], strict=True):
        inside = np.isin(run.requests["request_id"], list(common))
        arrival, finish = (run.requests[key][inside] for key in ("arrival_time", "finish_time"))
        tokens = run.requests["num_output_tokens"][inside].sum()
        assert cell["output_tokens"] == tokens
        assert cell["output_tokens_per_second"] == pytest.approx(tokens / (finish.max() - arrival.min()))
        assert cell["e2e_seconds"]["p50"] == pytest.approx(np.median(finish - arrival))
    first, second = summary["same_work"][0]["cells"]
    assert first["output_tokens"] == second["output_tokens"]
    assert second["output_tokens_per_second_ratio"] == pytest.approx(
        second["output_tokens_per_second"] / first["output_tokens_per_second"]
    )


def test_the_same_work_needs_no_word(tmp_path, two):
    summary, text = compared(tmp_path, two)
    assert summary["same_work"] == []
    assert "served" not in summary["headline"] and "that all cells served" not in text


@pytest.mark.parametrize("reason", ["error", "abort"])
def test_failed_and_aborted_requests_are_other_work_too(tmp_path, two, reason):
    edit_requests(two[0], lambda row: row.update(finish_reason=reason) if row["request_id"] == "r0007" else None)
    summary, text = compared(tmp_path, two)
    assert "(39 to 40 of 40)" in summary["headline"]
    assert f"1 {'failed' if reason == 'error' else 'aborted'}" in text


def test_as_many_but_others_are_other_work_too(tmp_path, two):
    for folder, lost in zip(two, ("r0007", "r0008"), strict=True):
        edit_requests(
            folder, lambda row, lost=lost: row.update(finish_reason="error") if row["request_id"] == lost else 0
        )
    summary, _ = compared(tmp_path, two)
    assert "(other 39 of 40); over the 38 that all served" in summary["headline"]


def test_outputs_of_other_lengths_are_named(tmp_path, two):
    def stop(row):
        if row["request_id"] == "r0005":
            row.update(num_output_tokens=2, output_token_ids=row["output_token_ids"][:2], finish_reason="stop")

    edit_requests(two[1], stop)
    summary, text = compared(tmp_path, two)
    assert "Outputs differ in length (1 of 40 requests); over the 40 that all served" in summary["headline"]
    assert "Of these requests 1 have outputs of different lengths" in text


def test_nothing_in_common(tmp_path, two):
    for folder, odd in zip(two, (0, 1), strict=True):
        edit_requests(
            folder,
            lambda row, odd=odd: row.update(finish_reason="error") if int(row["request_id"][1:]) % 2 == odd else None,
        )
    summary, _ = compared(tmp_path, two)
    assert summary["headline"].endswith("(other 20 of 40), and none that all of them finished.")
