"""A damaged manifest.json, study.json or sweep.json is one line, whatever was lost: a key, a type, half the file."""

import copy
import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fake_runs import fake_run

from kvarena.reports.__main__ import main
from kvarena.reports.comparing.pairing import make_cells
from kvarena.reports.drawing.document import render_html
from kvarena.reports.drawing.study_charts import chart_figure
from kvarena.reports.pages.comparison import summarize_comparison
from kvarena.reports.pages.comparison_sections import comparison_document
from kvarena.reports.pages.run_sections import run_document
from kvarena.reports.pages.study import read_study, write_study_report
from kvarena.reports.pages.study_claims import study_table
from kvarena.reports.pages.summary import summarize
from kvarena.reports.pages.terminal import comparison_table, run_table
from kvarena.reports.reading.columns import names_of
from kvarena.reports.reading.errors import ReportError
from kvarena.reports.reading.files import read_run
from kvarena.reports.reading.names import GAUGES_FILE

OTHERS: tuple[Any, ...] = (None, True, -0.5, "text", [], {}, ["x"])
LOST = object()


def places(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """Paths to every key of every object, and to the first item of every list."""
    items = value.items() if isinstance(value, dict) else enumerate(value[:1]) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*path, key)
        yield from places(inner, (*path, key))


def damaged(value: Any) -> Iterator[tuple[tuple, Any, Any]]:
    """Where, what stands there now, and the whole: once for every place and every other value."""
    for path in places(value):
        for other in (LOST, *OTHERS):
            whole = copy.deepcopy(value)
            node = whole
            for key in path[:-1]:
                node = node[key]
            if other is LOST:
                del node[path[-1]]
            else:
                node[path[-1]] = other
            yield path, other, whole


class NoFigures(dict):
    def __missing__(self, name: str) -> str:
        return "<svg/>"


def everything(run_dir: Path, other: tuple) -> None:
    """All that a report makes of a manifest, without the figures, which read none."""
    run = read_run(run_dir)
    summary = summarize(run)
    json.dumps(summary, allow_nan=False)
    render_html(run_document(summary, run.manifest["config"], NoFigures()))
    run_table(summary)
    for pair in ((("a", run, summary), other), (other, ("a", run, summary))):
        cells = make_cells(pair, None)
        compared = summarize_comparison(cells, [])
        json.dumps(compared, allow_nan=False)
        render_html(comparison_document(compared, cells, NoFigures()))
        comparison_table(compared)


def full_manifest(manifest: dict, kind: str) -> dict:
    """With what only some runs have."""
    manifest["config"] |= {"slo": {"ttft": 0.5, "tpot": None, "e2e": 2.0, "attainment": 0.9}, "arrival": {"rate": 2.0}}
    manifest |= {"arrival": {"name": "poisson", "rate": 2.0}, "cache": "warm"}
    manifest["run"] |= {"ended": "2026-11-24T10:00:00.000+00:00", "lateness_bound": 0.1}
    manifest["machine"]["gpu"] = {"name": "H100", "memory_bytes": 80 * 10**9, "count": 1}
    if kind == "simulated":
        return manifest | {"simulation": {"kind": "card", "profile": "h100", "figures": {"source": "x"}}}
    gauges = {"url": "/metrics", "num_failed": 1, "error": "e"}
    return manifest | {"target": {"url": "http://x", "model": "m", "extensions_refused": ["top_k"],
                                  "num_other_prompt_lens": 2, "gauges": gauges}}  # fmt: skip


@pytest.mark.parametrize("step", [17, pytest.param(1, marks=pytest.mark.slow)], ids=["some", "all"])
@pytest.mark.parametrize("kind", ["simulated", "target"])
def test_no_damage_to_a_manifest_is_a_trace(kind, step, tmp_path):
    """Eight damages to each place: a step of 17 does one to every other place, all kinds of damage in turn."""
    fake_run(tmp_path / "other", "contiguous", num_requests=8)
    other_run = read_run(tmp_path / "other")
    other = ("other", other_run, summarize(other_run))
    run_dir = fake_run(tmp_path / "run", num_requests=8)
    manifest = full_manifest(json.loads((run_dir / "manifest.json").read_text()), kind)
    if kind == "target":
        columns = {name: np.arange(1.0, 4.0) for name in names_of(GAUGES_FILE)}
        pq.write_table(pa.table(columns), run_dir / "gauges.parquet")
    (run_dir / "manifest.json").write_text(json.dumps(manifest))
    everything(run_dir, other)
    num_refused = 0
    for path, value, whole in islice(damaged(manifest), None, None, step):
        (run_dir / "manifest.json").write_text(json.dumps(whole))
        try:
            everything(run_dir, other)
        except ReportError as error:
            num_refused += 1
            assert "\n" not in str(error)
        except Exception as error:
            raise AssertionError(f"{path} = {value!r}") from error
    assert num_refused > 200 // step


def chart(kind: str, x: list, **more: Any) -> dict:
    series = [{"name": "a", "x": x, "y": [1.0, 2.0], "low": [0.5, 1.5], "high": [1.5, 2.5]},
              {"name": "b", "x": x, "y": [2.0, 3.0], "low": [], "high": []}]  # fmt: skip
    return {"name": kind, "kind": kind, "x_label": "x", "y_label": "y", "caption": "c", "log_x": False, "log_y": False,
            "y_limit": None, "y_mark": 1.0, "series": series} | more  # fmt: skip


CHARTS = [chart("lines", [1, 2], log_x=True), chart("bars", ["u", "v"]), chart("stacked", ["u", "v"]),
          chart("parity", [1, 2])]  # fmt: skip
STUDY = {
    "title": "t", "headline": "h", "source": "s", "created": "c", "experiment": "e",
    "claims": [{"quantity": "q", "unit": "%", "stated": 1.0, "ours": 1.1, "tolerance": "t", "verdict": "holds",
                "low": 1.0, "high": 1.2, "note": "n", "kind": "range", "stated_least": 1.0, "stated_most": 2.0,
                "beside": 1.5, "beside_low": 1.4, "beside_high": 1.6}],
    "beside": "ideal card", "versions": {"python": "3"},
    "conditions": {"simulated": True, "seeds": [0], "profiles": [{"name": "p", "source": "s", "error": "e"}]},
    "charts": [], "differences": ["d"], "notes": ["n"], "command": ["python"], "cells": ["cells/a"],
    "git": {"commit": "abc", "dirty": False}, "machine": {"cpu": "x", "cores": 2, "memory_bytes": 1, "gpu": None},
}  # fmt: skip


def test_no_damage_to_a_study_is_a_trace(tmp_path):
    for path, value, whole in damaged(STUDY):
        (tmp_path / "study.json").write_text(json.dumps(whole))
        try:
            study_table(write_study_report(tmp_path))
        except ReportError as error:
            assert "\n" not in str(error)
        except Exception as error:
            raise AssertionError(f"{path} = {value!r}") from error


@pytest.mark.filterwarnings("ignore")  # matplotlib's, of figures with odd limits
@pytest.mark.parametrize("whole", CHARTS, ids=lambda chart: chart["kind"])
def test_no_damage_to_a_chart_is_a_trace(whole, tmp_path):
    for path, value, broken in damaged(whole):
        (tmp_path / "study.json").write_text(json.dumps(STUDY | {"charts": [broken]}))
        try:
            chart_figure(read_study(tmp_path)["charts"][0])
        except ReportError as error:
            assert "\n" not in str(error)
        except Exception as error:
            raise AssertionError(f"{path} = {value!r}") from error


@pytest.mark.parametrize("name", ["manifest.json", "study.json", "sweep.json"])
@pytest.mark.parametrize("text", ["", '{"name": ', "null", "[]", "7", '{"a": NaN}', '{"a": 1e999}', "[" * 100_000])
def test_a_file_that_is_none_is_one_line_and_exit_code_2(name, text, tmp_path, capsys):
    (tmp_path / name).write_text(text)
    assert main([str(tmp_path)]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {tmp_path / name}")
