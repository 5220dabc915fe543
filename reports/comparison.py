"""The comparison of runs: a sweep's cells, or any runs side by side.

Writes report.html, report.md, summary.json, comparison.csv and figures/*.png. Like a run's report it depends on the
runs' files alone.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from datetime import datetime
from itertools import permutations
from pathlib import Path
from typing import Any

from reports.cells import Cell, make_cells, same_runs
from reports.comparison_figures import draw_comparison
from reports.comparison_sections import comparison_document
from reports.costs import costs
from reports.curves import curve_axis, curves
from reports.document import render_html, render_markdown, write_text
from reports.errors import ReportError
from reports.files import RunFiles, read_json, read_run
from reports.format import percent, rate
from reports.latency import request_latencies
from reports.notices import comparison_notices, simulated_prefix
from reports.paired import match_requests, paired_ratio
from reports.repeats import repeat_groups, summarize_repeats
from reports.same_work import compare_same_work, same_work_sentences
from reports.shapes import SWEEP
from reports.summary import SCHEMA_VERSION, summarize
from reports.tokens import same_tokens
from reports.windows import WINDOWS, kv_use, kv_use_text, room_text

PAIRED_METRICS = ("ttft_seconds", "tpot_seconds", "e2e_seconds")
CELL_METRICS = (
    "num_requests", "num_finished", "num_rejected", "num_aborted", "num_failed", "duration_seconds", "busy_share",
    "output_tokens_per_second", "total_tokens_per_second", "requests_per_second", "ttft_seconds", "tpot_seconds",
    "itl_seconds", "e2e_seconds", "queue_time_seconds", "normalized_latency_seconds_per_token", "batch_size_mean",
    "batch_size_max", "queue_mean", "num_steps", "num_preemptions", "num_recomputed_tokens", "cached_prompt_share",
    "peak_rss_bytes", "peak_gpu_bytes", "memory", "recording", "valid", "slo", "steady",
    *(f"{name}{window.suffix}" for window in WINDOWS
      for name in ("kv_share_mean", "waste_beyond_token_states", "held_share_mean", "step_time_share")),
)  # fmt: skip


def write_comparison(sweep_dir: Path, baseline: str | None = None, out_dir: Path | None = None) -> dict[str, Any]:
    """Write the comparison of a sweep into its folder.

    Args:
        sweep_dir: holds sweep.json: `runs` (relative folders), `baseline` (a name, or null for the first) and
            `failed` and `not_defined` (name and error of the cells that did not finish, and of those that mean
            nothing).
        baseline: compare with this run instead of the one that sweep.json names.
        out_dir: where the comparison goes; the sweep's folder by default.

    Returns:
        What summary.json holds.

    Raises:
        ReportError: sweep.json or a run is missing or broken, no run finished, or the baseline is unknown.
    """
    sweep_dir = Path(sweep_dir)
    sweep = read_json(sweep_dir / "sweep.json", SWEEP, "run the sweep again")
    folders = [(name, sweep_dir / name) for name in sweep["runs"]]
    left_out = {key: sweep.get(key) or [] for key in ("failed", "not_defined")}
    return compare(folders, out_dir or sweep_dir, baseline or sweep.get("baseline"), **left_out)


def compare(
    folders: Sequence[tuple[str, Path]],
    out_dir: Path,
    baseline: str | None = None,
    failed: Sequence[dict[str, Any]] = (),
    not_defined: Sequence[dict[str, Any]] = (),
) -> dict[str, Any]:
    """Write the comparison of any runs into `out_dir`, which is made.

    Args:
        folders: (name, path) of each run.
        out_dir: where the report goes.
        baseline: folder, name or label of the run that others are compared with; None takes the first.
        failed: name and error of runs that did not finish.
        not_defined: the same of cells whose settings mean nothing together.
    """
    runs: list[tuple[str, RunFiles, dict[str, Any]]] = []
    unrecorded: list[str] = []
    for name, path in folders:
        run = read_run(path)
        ran = summarize(run)
        if run.is_unrecorded:
            unrecorded.append(f"{name} ({ran['name']}): {rate(ran['output_tokens_per_second'])} output tokens/s")
        else:
            runs.append((name, run, ran))
    if unrecorded and not runs:
        raise ReportError(
            "no run recorded anything (driver.record=none), so there is nothing to compare but their throughput: "
            + "; ".join(unrecorded)
        )
    cells = make_cells(runs, baseline)
    summary = summarize_comparison(cells, list(failed), list(not_defined))
    if unrecorded:
        summary["notices"].append(
            f"Left out, because they recorded nothing (driver.record=none): {'; '.join(unrecorded)}."
        )
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ReportError(f"cannot make {out_dir} ({error.strerror}); choose another folder") from None
    document = comparison_document(summary, cells, draw_comparison(cells, summary, out_dir))
    write_text(out_dir / "summary.json", json.dumps(summary, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    write_csv(summary, out_dir / "comparison.csv")
    write_text(out_dir / "report.md", render_markdown(document))
    write_text(out_dir / "report.html", render_html(document))
    return summary


def summarize_comparison(
    cells: list[Cell], failed: list[dict[str, Any]], not_defined: Sequence[dict[str, Any]] = ()
) -> dict[str, Any]:
    """summary.json of a comparison."""
    base = next((cell for cell in cells if cell.is_baseline), cells[0])
    summary: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "kind": "comparison",
        "baseline": base.label,
        "settings": list(cells[0].settings),
        "same_tokens": same_tokens(cells),
        "measured_together": measured_together(cells),
        "same_runs": same_runs(cells),
        "two_clocks": two_clocks(cells),
        "decode_kernels": decode_kernels(cells),
        "cells": [_cell_summary(cell) for cell in cells],
        "failed": failed,
        "not_defined": list(not_defined),
        "costs": costs(cells),
        "same_work": compare_same_work(cells),
    }
    axis = curve_axis(cells)
    summary["curves"] = {"axis": axis, "lines": curves(cells, axis)} if axis else None
    summary["repeats"] = summarize_repeats(repeat_groups(cells))
    summary["notices"] = comparison_notices(cells, summary)
    fastest = max(cells, key=lambda cell: cell.summary["output_tokens_per_second"] or 0.0)
    apart = same_work_sentences(summary["same_work"], fastest.label)
    summary["headline"] = simulated_prefix(cells) + headline(summary) + apart
    return summary


def _cell_summary(cell: Cell) -> dict[str, Any]:
    result: dict[str, Any] = {"label": cell.label, "folder": cell.folder, "settings": cell.settings}
    result |= {name: cell.summary[name] for name in CELL_METRICS}
    base = cell.baseline
    result["baseline"] = base.label if base else None
    result["unpaired"] = cell.unpaired
    result["outside"] = (cell.run.manifest.get("simulation") or {}).get("outside", [])
    ours, theirs = cell.summary["output_tokens_per_second"], base.summary["output_tokens_per_second"] if base else None
    result["output_tokens_per_second_ratio"] = ours / theirs if ours is not None and theirs else None
    result["paired"] = paired(cell, base) if base and base is not cell else None
    return result


def paired(cell: Cell, base: Cell) -> dict[str, Any]:
    """Paired ratio of each latency, over the requests that finished in both runs."""
    rows, base_rows = match_requests(cell.run, base.run)
    latencies, base_latencies = request_latencies(cell.run), request_latencies(base.run)
    return {name: paired_ratio(latencies[name][rows], base_latencies[name][base_rows]) for name in PAIRED_METRICS}


def measured_together(cells: list[Cell]) -> list[str]:
    """Labels of cells that were measured while another one was, on the same machine; a virtual clock does not mind."""
    spans = []
    for cell in cells:
        run = cell.run.manifest["run"]
        if run.get("ended") and run.get("wall_time") is not None and not cell.run.manifest.get("simulation"):
            end = datetime.fromisoformat(run["ended"]).timestamp()
            spans.append((cell, end - run["wall_time"], end))
    together = {
        one.label
        for (one, start, end), (other, other_start, other_end) in permutations(spans, 2)
        if start < other_end and other_start < end and one.run.manifest["machine"] == other.run.manifest["machine"]
    }
    return [cell.label for cell in cells if cell.label in together]


def two_clocks(cells: list[Cell]) -> list[str]:
    """Labels of the cells that are compared with one of the other kind: simulated with measured, or the reverse."""
    return [cell.label for cell in cells if cell.baseline and cell.is_simulated != cell.baseline.is_simulated]


def decode_kernels(cells: list[Cell]) -> dict[str, list[str]]:
    """Labels by the kernel that their decode attention ran in; empty if it was the same for all that name one."""
    found: dict[str, list[str]] = {}
    for cell in cells:
        runner = (cell.run.manifest.get("pool") or {}).get("runner")
        if isinstance(runner, dict) and "decode_kernel" in runner:
            found.setdefault(str(runner["decode_kernel"]), []).append(cell.label)
    return found if len(found) > 1 else {}


def headline(summary: dict[str, Any]) -> str:
    """One sentence: who is fastest, and by how much."""
    cells = [cell for cell in summary["cells"] if cell["output_tokens_per_second"]]
    if not cells:
        return f"None of {len(summary['cells'])} cells finished a request."
    best = max(cells, key=lambda cell: cell["output_tokens_per_second"])
    text = (
        f"{best['label']} is the fastest of {len(summary['cells'])} cells with "
        f"{best['output_tokens_per_second']:,.0f} output tokens/s"
    )
    ratio = best["output_tokens_per_second_ratio"]
    if best["baseline"] and best["baseline"] != best["label"] and ratio:
        text += f", {ratio:.2f} times {best['baseline']}"
    if used := kv_use_text(best):
        text += f"; {used}"
        base = next((cell for cell in cells if cell["label"] == best["baseline"] != best["label"]), None)
        if base and kv_use(base) is not None:
            text += f"; {percent(kv_use(base))} of the other's over all steps, {room_text(base)}"
    return text + "."


def write_csv(summary: dict[str, Any], path: Path) -> None:
    """comparison.csv: one row per cell; nested numbers become columns such as ttft_seconds_p50."""
    rows = []
    for cell in summary["cells"]:
        flat = {"label": cell["label"], "folder": cell["folder"], "baseline": cell["baseline"]} | cell["settings"]
        for name in (*CELL_METRICS, "output_tokens_per_second_ratio", "paired"):
            flat |= _columns(name, cell[name])
        rows.append(flat)
    names = list(dict.fromkeys(name for row in rows for name in row))
    try:
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, names, restval="")
            writer.writeheader()
            writer.writerows(rows)
    except OSError as error:
        raise ReportError(f"cannot write {path} ({error.strerror}); make the folder writable") from None


def _columns(name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        return {name: "" if value is None else value}
    flat: dict[str, Any] = {}
    for key, inner in value.items():
        flat |= _columns(f"{name}_{key}", inner)
    return flat
