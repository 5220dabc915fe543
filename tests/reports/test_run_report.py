"""The report of one run: complete, self-contained, and one clear line when a file is missing or broken."""

import csv
import json
import re
import shutil

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import sparing
from fake_runs import REQUEST_SCHEMA, STEP_SCHEMA, fake_run, write_run

from kvarena.engine.classes import CLASSES
from kvarena.reports.drawing.document import render_html, render_markdown
from kvarena.reports.pages.run_report import write_run_report
from kvarena.reports.pages.run_sections import run_document
from kvarena.reports.pages.summary import summarize
from kvarena.reports.reading.errors import ReportError
from kvarena.reports.reading.files import read_run


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A static contiguous run, its report and its summary."""
    run_dir = fake_run(tmp_path_factory.mktemp("runs") / "run", "contiguous", "static", num_requests=24)
    with sparing.nothing_spared():
        return run_dir, write_run_report(run_dir)


def test_writes_every_file(made):
    run_dir, summary = made
    for name in ("report.md", "report.html", "summary.json", "requests.csv"):
        assert (run_dir / name).stat().st_size > 500, name
    assert {path.stem for path in (run_dir / "figures").iterdir()} >= {"kv_memory", "kv_split", "latency", "load"}
    assert json.loads((run_dir / "summary.json").read_text()) == summary


def test_summary_numbers_match_the_files(made):
    run_dir, summary = made
    requests = pq.read_table(run_dir / "requests.parquet").to_pandas()
    steps = pq.read_table(run_dir / "steps.parquet").to_pandas()
    done = requests[requests.finish_reason == "length"]
    duration = done.finish_time.max() - requests.arrival_time.min()
    assert summary["num_finished"] == len(done) == 22
    assert summary["num_rejected"] == 2
    assert summary["duration_seconds"] == pytest.approx(duration)
    assert summary["output_tokens_per_second"] == pytest.approx(done.num_output_tokens.sum() / duration)
    ttft = (done.first_token_time - done.arrival_time).to_numpy()
    assert summary["ttft_seconds"]["p95"] == pytest.approx(np.percentile(ttft, 95))
    waiting = steps[steps.num_waiting > 0]
    weight = waiting.end_time - waiting.start_time
    expected = (waiting.token_states / waiting.total * weight).sum() / weight.sum()
    assert summary["kv_share_mean_while_waiting"]["token_states"] == pytest.approx(expected)
    assert sum(summary["kv_share_mean"][name] for name in CLASSES) == pytest.approx(1)
    assert summary["waste_beyond_token_states_while_waiting"] == pytest.approx(1 - expected)
    assert summary["held_share_mean"] > 0


def test_rejections_of_one_kind_are_one_row(made):
    (kind,) = made[1]["rejections"]
    assert kind["count"] == 2
    assert "engine.max_model_len" in kind["example"]


def test_html_is_one_file_without_network(made):
    page = (made[0] / "report.html").read_text()
    assert len(page) < 3_000_000
    assert not re.findall(r"""(?:src|href)\s*=\s*["'](?!#|data:)[^"']*""", page)
    assert "@import" not in page
    assert not re.findall(r"url\((?!#|&#34;#)[^)]*\)", page)
    ids = re.findall(r'\bid="([^"]*)"', page)
    assert len(ids) == len(set(ids)), "ids of different figures clash"
    for target in re.findall(r"url\(#([^)]*)\)", page):
        assert target in ids


def _document(run_dir):
    run = read_run(run_dir)
    return run_document(summarize(run), {}, dict.fromkeys(("kv_memory", "kv_split", "latency", "load", "timeline"), ""))


def test_html_escapes_what_a_run_wrote(tmp_path):
    run_dir = fake_run(tmp_path / "run", num_requests=6)
    manifest = json.loads((run_dir / "manifest.json").read_text())
    manifest["name"] = "<script>alert(1)</script>"
    (run_dir / "manifest.json").write_text(json.dumps(manifest))
    assert "<script>alert" not in render_html(_document(run_dir))


def test_requests_csv_has_a_row_per_request(made):
    rows = list(csv.DictReader((made[0] / "requests.csv").open()))
    assert len(rows) == 24
    assert rows[0]["ttft_seconds"] == "" and float(rows[5]["ttft_seconds"]) > 0


@pytest.mark.drawn
def test_the_same_files_give_the_same_report(made, tmp_path):
    run_dir = made[0]
    other = tmp_path / "copy"
    other.mkdir()
    for name in ("manifest.json", "requests.parquet", "steps.parquet"):
        shutil.copy(run_dir / name, other)
    write_run_report(other)
    assert (other / "report.html").read_text() == (run_dir / "report.html").read_text()


def _rewrite(run_dir, rows, steps):
    write_run(run_dir, rows, steps, "paged", "continuous", 7680, 16)


def _rows(run_dir, name, schema):
    return pq.read_table(run_dir / name, schema=schema).to_pylist()


EDGES = ("all_rejected", "none_finished", "one_step", "one_token", "no_token_times", "nothing")


@pytest.mark.parametrize(
    ("case", "is_drawn"),
    [
        *((case, False) for case in EDGES),
        *(pytest.param(case, True, marks=[pytest.mark.drawn, pytest.mark.slow]) for case in EDGES),
    ],
)
def test_edges(tmp_path, case, is_drawn):
    """With their figures drawn to the end in `make test-all`."""
    run_dir = fake_run(tmp_path / "run", num_requests=8, one_token=case == "one_token")
    rows = _rows(run_dir, "requests.parquet", REQUEST_SCHEMA)
    steps = _rows(run_dir, "steps.parquet", STEP_SCHEMA)
    empty = {"admission_time": None, "first_token_time": None, "finish_time": None, "token_times": [],
             "num_output_tokens": 0, "output_token_ids": []}  # fmt: skip
    if case == "all_rejected":
        rows = [row | empty | {"finish_reason": "rejected", "error": "too long"} for row in rows]
        steps = []
    elif case == "none_finished":
        rows = [row | empty | {"finish_reason": "abort"} for row in rows]
    elif case == "one_step":
        steps = steps[:1]
    elif case == "no_token_times":
        rows = [row | {"token_times": []} for row in rows]
    elif case == "nothing":
        rows, steps = [], []
    _rewrite(run_dir, rows, steps)
    summary = write_run_report(run_dir)
    if case in ("all_rejected", "none_finished", "nothing"):
        assert summary["ttft_seconds"]["p50"] is None
        assert summary["output_tokens_per_second"] in (None, 0)
    if case in ("one_token", "no_token_times"):
        assert summary["itl_seconds"]["count"] == 0
    assert summary["headline"].endswith(".")


def test_a_late_driver_makes_the_run_invalid(tmp_path):
    run_dir = fake_run(tmp_path / "run", num_requests=6)
    manifest = json.loads((run_dir / "manifest.json").read_text())
    manifest["run"]["lateness_bound"] = 1e-9
    (run_dir / "manifest.json").write_text(json.dumps(manifest))
    assert summarize(read_run(run_dir))["valid"] is False
    assert "Invalid run" in render_markdown(_document(run_dir))


@pytest.mark.parametrize("name", ["manifest.json", "requests.parquet", "steps.parquet"])
@pytest.mark.parametrize("damage", ["missing", "truncated", "garbage"])
def test_missing_and_broken_files_are_one_line(tmp_path, name, damage):
    run_dir = fake_run(tmp_path / "run", num_requests=6)
    path = run_dir / name
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:100] if damage == "truncated" else b"\x00garbage")
    with pytest.raises(ReportError) as caught:
        write_run_report(run_dir)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_ledger_that_does_not_add_up_is_refused(tmp_path):
    run_dir = fake_run(tmp_path / "run", num_requests=6)
    steps = _rows(run_dir, "steps.parquet", STEP_SCHEMA)
    steps[3]["free"] += 1
    pq.write_table(pa.Table.from_pylist(steps, STEP_SCHEMA), run_dir / "steps.parquet")
    with pytest.raises(ReportError, match="ledger of step 3"):
        write_run_report(run_dir)


def test_a_missing_column_is_named(tmp_path):
    run_dir = fake_run(tmp_path / "run", num_requests=6)
    table = pq.read_table(run_dir / "steps.parquet")
    pq.write_table(table.drop_columns(["held"]), run_dir / "steps.parquet")
    with pytest.raises(ReportError, match="held"):
        write_run_report(run_dir)


def test_preemption_costs_are_tokens_and_bytes_with_their_times(tmp_path):
    fake_run(tmp_path, "paged", "continuous")
    steps = pd.read_parquet(tmp_path / "steps.parquet")
    steps["num_recomputed_tokens"] = 0
    steps.loc[0, "num_recomputed_tokens"] = steps.loc[0, "num_new_tokens"] // 2
    steps.loc[3, ["num_copies", "num_swapped_out", "num_swapped_in"]] = [5, 3, 1]
    steps["copy_time"] = 0.0
    steps.loc[3, "copy_time"] = 0.25
    steps.to_parquet(tmp_path / "steps.parquet")
    summary = write_run_report(tmp_path)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    block_bytes = manifest["model"]["kv_bytes_per_token"] * manifest["pool"]["block_size"]
    first = steps.loc[0]
    part = (first["num_new_tokens"] // 2) / first["num_new_tokens"]
    assert summary["recompute_seconds"] == pytest.approx(part * (first["end_time"] - first["start_time"]))
    assert summary["swapped_out_bytes"] == 3 * block_bytes
    assert summary["swapped_in_bytes"] == block_bytes
    assert summary["block_copy_seconds"] == 0.25


def test_the_machine_is_named_by_its_gpus(tmp_path):
    fake_run(tmp_path, "paged", "continuous")
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    manifest["machine"]["gpu"] = {"name": "NVIDIA H200", "memory_bytes": 140 * 2**30, "count": 2}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    write_run_report(tmp_path)
    assert "2 x NVIDIA H200 (140 GiB), " in (tmp_path / "report.md").read_text()
