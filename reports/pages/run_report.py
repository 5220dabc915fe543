"""The report of one run: report.html, report.md, summary.json, requests.csv and figures/*.png from its files.

Depends on nothing but the files, so `kvarena report DIR` makes the same report again.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
from matplotlib.figure import Figure
from pyarrow import csv

from kvarena.reports.analysis.gauges import read_gauges
from kvarena.reports.analysis.latency import TokenGaps, request_latencies, token_gaps
from kvarena.reports.analysis.memory import Spans, step_spans
from kvarena.reports.analysis.windows import WINDOWS
from kvarena.reports.drawing.document import write_pages
from kvarena.reports.drawing.kv_map import kv_map_figure, kv_map_markup, read_kv_map
from kvarena.reports.drawing.style import SERIES, Sheet, drawing, export, save_png
from kvarena.reports.drawing.timeline import timeline_figure
from kvarena.reports.pages.run_figures import (
    gauges_figure,
    latency_figure,
    load_figure,
    memory_figure,
    split_figure,
)
from kvarena.reports.pages.run_sections import run_document
from kvarena.reports.pages.summary import summarize
from kvarena.reports.reading.files import REQUEST_COLUMNS, RunFiles, read_json, read_run
from kvarena.reports.reading.writing import replacing, write_json


def write_run_report(run_dir: Path) -> dict[str, Any]:
    """Write the report of one run into its folder.

    Args:
        run_dir: holds manifest.json, requests.parquet and steps.parquet (docs/files.md), or the first
            alone where nothing was recorded.

    Returns:
        What summary.json holds.

    Raises:
        ReportError: a file is missing or broken, or the folder cannot be written.
    """
    run = read_run(run_dir)
    spans = step_spans(run.steps)
    gaps = token_gaps(run)
    summary = _write_summary(run, gaps)
    svg = {}
    if not run.is_unrecorded:
        svg = draw_run(run, spans, summary, gaps)
        write_requests_csv(run)
    write_pages(run.path, run_document(summary, run.manifest["config"], svg))
    return summary


def write_summary(run_dir: Path) -> dict[str, Any]:
    """Write summary.json alone and return what it holds. Raises as `write_run_report`."""
    run = read_run(run_dir)
    return _write_summary(run, token_gaps(run))


def read_summary(run_dir: Path) -> dict[str, Any]:
    """What summary.json of a finished run holds. Raises ReportError."""
    shape = {"kind": str}
    summary: dict[str, Any] = read_json(run_dir / "summary.json", shape, f"remove {run_dir} to measure it again")
    return {"notices": []} | summary  # a run of before there were any


def _write_summary(run: RunFiles, gaps: TokenGaps) -> dict[str, Any]:
    summary = summarize(run, gaps)
    write_json(run.path / "summary.json", summary)
    return summary


def write_requests_csv(run: RunFiles) -> None:
    """requests.csv: the scalar columns, and the latencies derived from them; one row per request."""
    latencies = request_latencies(run)
    columns = [pa.array(run.requests[name], from_pandas=True) for name in REQUEST_COLUMNS]
    columns += [pa.array(values, from_pandas=True) for values in latencies.values()]
    table = pa.Table.from_arrays(columns, names=[*REQUEST_COLUMNS, *latencies])
    path = run.path / "requests.csv"
    with replacing(path) as partial:
        csv.write_csv(table, partial)


def draw_run(run: RunFiles, spans: Spans, summary: dict[str, Any], gaps: TokenGaps) -> dict[str, str]:
    """Draw every figure of the run into figures/*.png. Returns name -> markup for the page."""
    latencies = request_latencies(run) | {"itl_seconds": gaps.values}
    bars = [(f"this run, {window.label}", summary[f"kv_share_mean{window.suffix}"]) for window in WINDOWS]
    kv_map = read_kv_map(run)
    with drawing():
        figures: dict[str, Callable[[Sheet], Figure]] = {
            "kv_memory": partial(memory_figure, run, spans),
            "kv_split": partial(split_figure, bars),
            "load": partial(load_figure, run, spans),
            "latency": partial(latency_figure, [("", latencies)], SERIES[:1]),
            "timeline": partial(timeline_figure, run),
        }
        gauges = read_gauges(run)
        if gauges is not None:
            figures["gauges"] = partial(gauges_figure, gauges)
        markup = {name: export(draw, run.path, name) for name, draw in figures.items()}
        if kv_map is not None:
            save_png(kv_map_figure(kv_map), run.path / "figures" / "kv_map.png")
            markup["kv_map"] = kv_map_markup(kv_map, run)
        return markup
