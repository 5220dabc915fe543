"""What a folder's files are in Python: the report's numbers, in frames and typed summaries."""

import json
import shutil

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

import kvarena
from kvarena.reports.pages.study import write_study_report

LATENCIES = {"ttft": "ttft_seconds", "tpot": "tpot_seconds", "e2e": "e2e_seconds", "queue_time": "queue_time_seconds"}


def test_latencies_are_those_of_the_report(comparison, with_page):
    for result in (*comparison.results, with_page):
        written = json.loads((result.folder / "summary.json").read_text())
        for column, key in LATENCIES.items():
            assert np.nanpercentile(result.requests[column], 99) == written[key]["p99"]
            assert result.requests[column].mean() == pytest.approx(written[key]["mean"], rel=1e-12)
            assert getattr(result.summary, key).p99 == written[key]["p99"]
    assert list(with_page.requests["e2e"]) == list(pd.read_csv(with_page.folder / "requests.csv")["e2e_seconds"])


def test_a_typed_summary_has_the_keys_that_are_written_and_no_other(comparison):
    for made in (comparison, comparison[0]):
        written = json.loads((made.folder / "summary.json").read_text())
        assert set(type(made.summary).model_fields) == set(written)
        assert made.summary.headline == written["headline"]


def test_frames_are_the_files(comparison):
    result = comparison[0]
    for name, frame in (("requests", result.requests), ("steps", result.steps), ("kv_map", result.kv_map)):
        table = pq.read_table(result.folder / f"{name}.parquet")
        assert len(frame) == table.num_rows and set(table.column_names) <= set(frame.columns)
    assert result.requests.attrs["units"]["ttft"] == "s" and "scheduled" in result.requests.attrs["meanings"]["ttft"]
    assert result.steps.attrs["units"]["free"] == "slots"


def test_a_sweep_is_one_long_table_with_its_settings_as_columns(comparison):
    requests = comparison.requests
    assert list(requests.columns[:4]) == ["run", "allocator", "scheduler", "workload.seed"]
    assert len(requests) == sum(len(result.requests) for result in comparison.results) == 20
    by_cell = requests.groupby(["allocator", "workload.seed"])["ttft"].median()
    assert by_cell["OwnAllocator", 1] == comparison[3].summary.ttft_seconds.p50
    assert set(comparison.steps["run"]) == {result.folder.name for result in comparison.results}
    assert list(comparison.runs["ttft_seconds_p50"]) == [r.summary.ttft_seconds.p50 for r in comparison.results]
    assert list(comparison.cells["label"]) == ["paged × continuous", "OwnAllocator × continuous"]


def test_load_gives_the_same_from_any_folder(comparison, tmp_path):
    run = kvarena.load(comparison[1].folder)
    assert isinstance(run, kvarena.Result) and run.requests.equals(comparison[1].requests)
    sweep = kvarena.load(str(comparison.folder))
    assert isinstance(sweep, kvarena.Comparison) and sweep.requests.equals(comparison.requests)
    study = {
        **dict.fromkeys(("title", "headline", "source", "created"), "text"), "experiment": None, "claims": [],
        "charts": [], **{key: [] for key in ("differences", "notes", "command")}, "git": {}, "machine": {},
        "beside": None, "cells": [f"cells/{result.folder.name}" for result in comparison.results],
    }  # fmt: skip
    for result in comparison.results:
        shutil.copytree(result.folder, tmp_path / "study" / "cells" / result.folder.name)
    (tmp_path / "study" / "study.json").write_text(json.dumps(study))
    write_study_report(tmp_path / "study")
    experiment = kvarena.load(tmp_path / "study")
    assert isinstance(experiment, kvarena.Experiment) and experiment.requests.equals(comparison.requests)
    assert experiment.summary.num_claims == 0 and "<iframe" in experiment._repr_html_()


def test_a_notebook_shows_the_page(comparison, with_page):
    page = with_page._repr_html_()
    assert page.startswith("<iframe srcdoc=") and "&lt;svg" in page and page.count("<") == 2
    assert "paged × continuous" in comparison._repr_html_()
    assert repr(comparison[0]).count("\n") == 0 and comparison[0].summary.headline in repr(comparison[0])


def test_without_a_page_there_is_the_headline(comparison):
    result = comparison[0]
    assert result.summary.headline.split(" served")[0] in result._repr_html_()


@pytest.mark.parametrize(
    ("record", "frames", "missing"),
    [("summary", ("requests", "steps"), ("kv_map",)), ("none", (), ("requests", "steps", "kv_map"))],
)
def test_what_was_not_recorded_is_a_line(simulated, record, frames, missing):
    result = kvarena.run(**simulated | {"driver.record": record})
    assert result.summary.num_finished == 5 and result.summary.recorded == record
    for name in frames:
        assert len(getattr(result, name))
    for name in missing:
        with pytest.raises(kvarena.KvarenaError, match=f"has no {name}.parquet; run it with driver.record=full"):
            getattr(result, name)


@pytest.mark.parametrize(
    ("damage", "line"),
    [
        (lambda folder: shutil.rmtree(folder), "is no folder"),
        (lambda folder: [path.unlink() for path in folder.glob("*.json")], "holds no run, sweep or experiment"),
        (lambda folder: (folder / "manifest.json").write_text("{"), "manifest.json cannot be read"),
        (lambda folder: (folder / "steps.parquet").write_bytes(b"PAR1"), "steps.parquet cannot be read"),
        (lambda folder: (folder / "summary.json").unlink(), "kvarena report"),
        (lambda folder: (folder / "summary.json").write_text('{"headline": "x"}'), "Field required; make it again"),
    ],
)
def test_a_damaged_folder_is_a_line(comparison, tmp_path, damage, line):
    folder = tmp_path / "copy"
    shutil.copytree(comparison[0].folder, folder)
    damage(folder)
    with pytest.raises(kvarena.KvarenaError, match=line) as caught:
        _ = kvarena.load(folder).summary
    assert "\n" not in str(caught.value)


def test_a_file_of_a_newer_schema_is_a_line(comparison, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(comparison[0].folder, folder)
    table = pq.read_table(folder / "kv_map.parquet")
    pq.write_table(table.replace_schema_metadata({"kvarena.schema_version": "99"}), folder / "kv_map.parquet")
    with pytest.raises(kvarena.KvarenaError, match="schema 99"):
        _ = kvarena.load(folder).kv_map
