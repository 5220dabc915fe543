"""The comparison of runs: a sweep's cells, or any runs side by side.

Writes report.html, report.md, summary.json, comparison.csv, runs.csv and figures/*.png. Like a run's report it depends
on the runs' files alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from itertools import permutations
from pathlib import Path
from typing import Any

from kvarena.reports.analysis.intervals import CONFIDENCE
from kvarena.reports.analysis.windows import WINDOWS
from kvarena.reports.comparing.cells import Cell, flatten, page_of
from kvarena.reports.comparing.contention import contention_notices, run_contention
from kvarena.reports.comparing.costs import METRICS as COST_METRICS
from kvarena.reports.comparing.costs import cost_pairs, costs
from kvarena.reports.comparing.headline import headline
from kvarena.reports.comparing.judge import LATENCIES, Judgement, describe_requests, judge, throughput_ratio
from kvarena.reports.comparing.notices import comparison_notices, simulated_prefix
from kvarena.reports.comparing.pairing import make_cells, same_runs
from kvarena.reports.comparing.repeats import Contender, contenders, spread
from kvarena.reports.comparing.same_work import compare_same_work, same_work_sentences
from kvarena.reports.comparing.tokens import same_tokens
from kvarena.reports.comparing.verdicts import LEVEL, THROUGHPUT
from kvarena.reports.drawing.document import write_pages
from kvarena.reports.drawing.format import rate
from kvarena.reports.pages.comparison_figures import draw_comparison
from kvarena.reports.pages.comparison_sections import comparison_document
from kvarena.reports.pages.curves import curve_axis, curves
from kvarena.reports.pages.summary import summarize
from kvarena.reports.reading.errors import NothingRecorded, ReportError
from kvarena.reports.reading.files import RunFiles, read_json, read_run
from kvarena.reports.reading.names import MANIFEST_FILE, STUDY_FILE, SWEEP_FILE
from kvarena.reports.reading.shapes import SWEEP
from kvarena.reports.reading.writing import write_csv, write_json

SCHEMA_VERSION = 2  # 1 had a row per run in `cells`, and verdicts from single pairs of runs
CELL_METRICS = (
    "num_requests", "num_finished", "num_rejected", "num_aborted", "num_failed", "duration_seconds", "busy_share",
    "output_tokens_per_second", "total_tokens_per_second", "requests_per_second", "ttft_seconds", "tpot_seconds",
    "itl_seconds", "e2e_seconds", "queue_time_seconds", "normalized_latency_seconds_per_token", "batch_size_mean",
    "batch_size_max", "queue_mean", "num_steps", "num_preemptions", "num_recomputed_tokens", "cached_prompt_share",
    "optimal_prompt_share", "cache_share_of_optimum", "prompt_seconds_saved",
    "imbalance", "peak_rss_bytes", "peak_gpu_bytes", "memory", "recording", "valid", "slo", "steady",
    *(f"{name}{window.suffix}" for window in WINDOWS
      for name in ("kv_share_mean", "waste_beyond_token_states", "held_share_mean", "step_time_share")),
)  # fmt: skip


def write_comparison(
    sweep_dir: Path, baseline: str | None = None, out_dir: Path | None = None, command: Sequence[str] | None = None
) -> dict[str, Any]:
    """Write the comparison of a sweep, or of the whole cells of a sweep or an experiment that left no record.

    Args:
        sweep_dir: holds sweep.json: `runs` (relative folders), `baseline` (a name, or null for the first) and
            `failed` and `not_defined` (name and error of the cells that did not finish, and of those that mean
            nothing).
        baseline: compare with this run instead of the one that sweep.json names.
        out_dir: where the comparison goes; the sweep's folder by default.
        command: the words that made this comparison of the sweep's cells, where the sweep itself did not.

    Returns:
        What summary.json holds.

    Raises:
        ReportError: sweep.json or a run is missing or broken, no run finished, or the baseline is unknown.
    """
    sweep_dir = Path(sweep_dir)
    cells = whole_cells(sweep_dir)
    if (sweep_dir / SWEEP_FILE).exists() or not cells:
        sweep, home, notices = read_json(sweep_dir / SWEEP_FILE, SWEEP, "run the sweep again"), sweep_dir, []
    else:
        home = cells[0].parent
        errors = [] if home != sweep_dir else sorted(home.glob("*/error.json"))
        left_out = [{"name": path.parent.name} | read_json(path, {"error": str}) for path in errors]
        sweep = {"runs": [cell.name for cell in cells],
                 "failed": [one for one in left_out if not one.get("not_defined")],
                 "not_defined": [one for one in left_out if one.get("not_defined")]}  # fmt: skip
        word = "1 cell is" if len(cells) == 1 else f"{len(cells)} cells are"
        notices = [f"{sweep_dir} did not come to its end; {word} whole and compared here."]
    return compare_sweep(home, sweep, baseline, out_dir or sweep_dir, command, notices)


def compare_sweep(
    sweep_dir: Path,
    sweep: dict[str, Any],
    baseline: str | None = None,
    out_dir: Path | None = None,
    command: Sequence[str] | None = None,
    notices: Sequence[str] = (),
) -> dict[str, Any]:
    """The same of what sweep.json holds, or will hold, with `notices` before all others."""
    left_out = {key: sweep.get(key) or [] for key in ("failed", "not_defined")}
    if stopped := sweep.get("interrupted"):
        notices = [f"The sweep was interrupted ({stopped['by']}); not in it: {', '.join(stopped['left'])}."]
    folders = [(name, sweep_dir / name) for name in sweep["runs"]]
    base, words = baseline or sweep.get("baseline"), [sweep.get("command"), command]
    return compare(folders, out_dir or sweep_dir, base, commands=words, notices=notices, **left_out)


def whole_cells(folder: Path) -> list[Path]:
    """The cells' folders that are whole in the folder of a sweep or an experiment."""
    found = sorted(folder.glob("*/cell.json")) or sorted(folder.glob("cells/*/cell.json"))
    return [path.parent for path in found]


def compare(
    folders: Sequence[tuple[str, Path]],
    out_dir: Path,
    baseline: str | None = None,
    failed: Sequence[dict[str, Any]] = (),
    not_defined: Sequence[dict[str, Any]] = (),
    commands: Sequence[Sequence[str] | None] = (),
    notices: Sequence[str] = (),
) -> dict[str, Any]:
    """Write the comparison of any runs into `out_dir`, which is made.

    Args:
        folders: (name, path) of each run.
        out_dir: where the report goes; no run's or experiment's own folder.
        baseline: folder, name or label of the run that others are compared with; None takes the first.
        failed: name and error of runs that did not finish.
        not_defined: the same of cells whose settings mean nothing together.
        commands: what made the runs and this comparison, each as words.
        notices: what a reader must know first.
    """
    if any((out_dir / name).exists() for name in (MANIFEST_FILE, STUDY_FILE)):
        raise ReportError(
            f"{out_dir} holds a run or an experiment, whose report this would replace; choose another one"
        )
    runs: list[tuple[str, RunFiles, dict[str, Any]]] = []
    unrecorded: list[str] = []
    broken: dict[str, str] = {}
    for name, path in folders:
        run = read_run(path)
        if came := run.manifest["run"].get("interrupted"):
            broken[name] = f"{name} ({came['num_ended']} of {came['num_requests']} requests, {came['by']})"
            continue
        ran = summarize(run)
        if run.is_unrecorded:
            unrecorded.append(f"{name} ({ran['name']}): {rate(ran['output_tokens_per_second'])} output tokens/s")
        else:
            runs.append((name, run, ran))
    if unrecorded and not runs:
        raise NothingRecorded(
            "no run recorded anything (driver.record=none), so there is nothing to compare but their throughput: "
            + "; ".join(unrecorded)
        )
    if broken and (not runs or baseline in broken):
        what = "the baseline is not whole" if runs else "nothing to compare: no run is whole"
        raise ReportError(
            f"{what}: interrupted: {'; '.join(broken.values())}; run the same command again to make them whole"
        )
    cells = make_cells(runs, baseline)
    summary = summarize_comparison(cells, list(failed), list(not_defined), commands)
    if broken:
        summary["notices"].insert(0, f"Left out, because they were interrupted: {'; '.join(broken.values())}.")
    summary["notices"] = [*notices, *summary["notices"]]
    if unrecorded:
        summary["notices"].append(
            f"Left out, because they recorded nothing (driver.record=none): {'; '.join(unrecorded)}."
        )
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ReportError(f"cannot make {out_dir} ({error.strerror}); choose another folder") from None
    pages = {cell.folder: page for cell in cells if (page := page_of(cell.run.path, out_dir)) is not None}
    document = comparison_document(summary, cells, draw_comparison(cells, summary, out_dir), pages)
    write_json(out_dir / "summary.json", summary)
    write_cells(summary["cells"], out_dir / "comparison.csv")
    write_cells(summary["runs"], out_dir / "runs.csv")
    write_pages(out_dir, document)
    return summary


def summarize_comparison(
    cells: list[Cell],
    failed: list[dict[str, Any]],
    not_defined: Sequence[dict[str, Any]] = (),
    commands: Sequence[Sequence[str] | None] = (),
) -> dict[str, Any]:
    """summary.json of a comparison."""
    rows = contenders(cells)
    base = next((row for row in rows if row.is_baseline), rows[0])
    pairs = cost_pairs(rows)
    judgement = judge(rows, [(pair.one, pair.other, metric) for pair in pairs for metric in COST_METRICS])
    summary: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "kind": "comparison",
        "baseline": base.label,
        "settings": list(rows[0].settings),
        "same_tokens": same_tokens(cells),
        "measured_together": measured_together(cells),
        "same_runs": same_runs(cells),
        "two_clocks": two_clocks(cells),
        "decode_kernels": attention_kernels(cells, "decode_kernel"),
        "prefill_kernels": attention_kernels(cells, "prefill_kernel"),
        "cells": [_row_summary(row, judgement) for row in rows],
        "runs": [_run_summary(cell) for cell in cells],
        "fastest": _fastest(judgement),
        "verdicts": judgement.as_list(),
        "verdict_rule": {"level": LEVEL, "correction": "Holm", "num_verdicts": judgement.num_verdicts,
                         "interval_confidence": CONFIDENCE},
        "commands": [list(words) for words in commands if words],
        "failed": failed,
        "not_defined": list(not_defined),
        "costs": costs(pairs, judgement),
        "same_work": compare_same_work(_one_round(cells)),
    }  # fmt: skip
    axis = curve_axis(cells)
    summary["curves"] = {"axis": axis, "lines": curves(cells, axis)} if axis else None
    firsts = [row.runs[0] for row in rows]
    summary["notices"] = comparison_notices(cells, summary) + contention_notices(cells)
    apart = same_work_sentences(summary["same_work"], judgement.best.label if judgement.best else None)
    summary["headline"] = simulated_prefix(firsts) + headline(rows, judgement) + apart
    return summary


def _one_round(cells: Sequence[Cell]) -> list[Cell]:
    """The first run of each cell with each seed: the requests of all its rounds are the same."""
    return list({(cell.contender, cell.seeds): cell for cell in reversed(cells)}.values())[::-1]


def _fastest(judgement: Judgement) -> dict[str, Any] | None:
    """The contender with the largest throughput against the next one; its verdict says whether the lead is shown."""
    best, second = judgement.best, judgement.runner_up
    if best is None or second is None or judgement.fastest is None:
        return None
    return {"cell": best.label, "against": second.label} | judgement.fastest.as_dict()


def _row_summary(row: Contender, judgement: Judgement) -> dict[str, Any]:
    """A contender: its numbers folded over its repeats, and how they compare with its baseline's."""
    base = row.baseline
    result: dict[str, Any] = {
        "label": row.label,
        "folder": row.folder,
        "folders": [run.folder for run in row.runs],
        "num_repeats": len(row.runs),
        "settings": row.settings,
    }
    result |= {name: row.summary[name] for name in CELL_METRICS}
    result["spread"] = {
        name: spread([run.summary[name] if key is None else run.summary[name][key] for run in row.runs])
        for name, key in ((THROUGHPUT, None), *((metric, "p50") for metric in LATENCIES))
    }
    result["baseline"] = base.label if base else None
    result["unpaired"] = row.unpaired
    outside = [(run.run.manifest.get("simulation") or {}).get("outside", []) for run in row.runs]
    result["outside"] = list(dict.fromkeys(line for lines in outside for line in lines))
    result["output_tokens_per_second_ratio"] = throughput_ratio(row, base) if base else None
    result["output_tokens_per_second_verdict"] = result["paired"] = None
    if base and base is not row:
        result["output_tokens_per_second_verdict"] = judgement.of(row, base, THROUGHPUT).as_dict()
        result["paired"] = {
            metric: {"requests": describe_requests(row, base, metric)} | judgement.of(row, base, metric).as_dict()
            for metric in LATENCIES
        }
    return result


def _run_summary(cell: Cell) -> dict[str, Any]:
    """One run of a contender."""
    result: dict[str, Any] = {
        "label": cell.run_label,
        "cell": cell.label,
        "folder": cell.folder,
        "settings": cell.settings,
        "round": cell.round,
        "baseline": cell.baseline.run_label if cell.baseline else None,
        "unpaired": cell.unpaired,
    }
    return result | {name: cell.summary[name] for name in CELL_METRICS} | {"contention": run_contention(cell)}


def measured_together(cells: list[Cell]) -> list[str]:
    """Labels of cells that were measured while another one was, on the same machine; a virtual clock does not mind."""
    spans = []
    for cell in cells:
        run = cell.run.manifest["run"]
        if run.get("ended") and run.get("wall_time") is not None and not cell.run.manifest.get("simulation"):
            end = datetime.fromisoformat(run["ended"]).timestamp()
            spans.append((cell, end - run["wall_time"], end))
    together = {
        one
        for (one, start, end), (other, other_start, other_end) in permutations(spans, 2)
        if start < other_end and other_start < end and one.run.manifest["machine"] == other.run.manifest["machine"]
    }
    return list(dict.fromkeys(cell.label for cell in cells if cell in together))


def two_clocks(cells: list[Cell]) -> list[str]:
    """Labels of the cells that are compared with one of the other kind: simulated with measured, or the reverse."""
    apart = [cell.label for cell in cells if cell.baseline and cell.is_simulated != cell.baseline.is_simulated]
    return list(dict.fromkeys(apart))


def attention_kernels(cells: list[Cell], kind: str) -> dict[str, list[str]]:
    """Labels by the kernel that their attention of one kind, `decode_kernel` or `prefill_kernel`, ran in.

    Empty if it was the same for all that name one.
    """
    found: dict[str, list[str]] = {}
    for cell in cells:
        runner = (cell.run.manifest.get("pool") or {}).get("runner")
        if isinstance(runner, dict) and kind in runner:
            labels = found.setdefault(str(runner[kind]), [])
            if cell.label not in labels:
                labels.append(cell.label)
    return found if len(found) > 1 else {}


def write_cells(entries: Sequence[dict[str, Any]], path: Path) -> None:
    """comparison.csv and runs.csv: one row per entry; nested numbers become columns such as ttft_seconds_p50."""
    rows = []
    for entry in entries:
        row = {"label": entry["label"]} | entry["settings"]
        numbers = {name: value for name, value in entry.items() if name not in ("label", "settings")}
        for name, value in flatten(numbers, separator="_").items():
            if not isinstance(value, list | tuple):
                row[name] = value
            elif name.endswith("_interval"):
                row[f"{name}_low"], row[f"{name}_high"] = value
            else:
                row[name] = " ".join(map(str, value))
        rows.append(row)
    names = list(dict.fromkeys(name for row in rows for name in row))
    # What only some entries have (a window, a pair) is columns of its parts in these, and nothing in the others.
    names = [
        name for name in names
        if any(row.get(name) not in (None, "") for row in rows)
        or not any(other.startswith(f"{name}_") for other in names)
    ]  # fmt: skip
    write_csv(path, rows, names)
