"""The short tables that end a run or a sweep on the terminal."""

from __future__ import annotations

from typing import Any

from rich.markup import escape
from rich.table import Table

from kvarena.reports.analysis.windows import kv_use, room_text
from kvarena.reports.comparing.costs import brief, cost_lines
from kvarena.reports.drawing.device_memory import device_memory_line
from kvarena.reports.drawing.format import DASH, count, percent, rate, ratio, seconds, size_bytes
from kvarena.reports.pages.comparison_sections import pairing_notes
from kvarena.reports.pages.run_sections import run_title

LEAST_NAME = 18  # characters of a cell's name in a row, however wide the numbers are
MAX_NOTES = 4
MAX_COST_LINES = 6  # a large grid's are in its report


def run_table(summary: dict[str, Any]) -> Table:
    """A run's numbers, a handful of rows.

    Args:
        summary: what `write_run_report` returned.
    """
    title = headed(run_title(summary), summary["notices"])
    table = Table(title=title, title_justify="left", show_header=False, box=None)
    table.add_column(style="dim")
    table.add_column(justify="right")
    table.add_column(style="dim")
    table.add_row(
        "requests",
        f"{count(summary['num_finished'])} of {count(summary['num_requests'])}",
        f"{count(summary['num_rejected'])} rejected, {_failed(summary['num_failed'])}"
        + ("" if summary["num_preemptions"] is None else f", {count(summary['num_preemptions'])} preemptions"),
    )
    table.add_row(
        "output throughput",
        f"{rate(summary['output_tokens_per_second'])} tok/s",
        f"{count(summary['num_finished_output_tokens'])} tokens in {seconds(summary['duration_seconds'])}",
    )
    if summary.get("recorded") != "none":  # a summary of before has no such key
        _add_recorded(table, summary)
    if summary["peak_gpu_bytes"]:
        table.add_row("peak GPU memory", size_bytes(summary["peak_gpu_bytes"]), device_memory_line(summary))
    table.add_row("peak host memory", size_bytes(summary["peak_rss_bytes"]), "")
    return table


def _add_recorded(table: Table, summary: dict[str, Any]) -> None:
    for key, label in (("ttft", "TTFT"), ("tpot", "TPOT"), ("e2e", "E2E")):
        stats = summary[f"{key}_seconds"]
        table.add_row(f"{label} median", seconds(stats["p50"]), f"p99 {seconds(stats['p99'])}")
    table.add_row("KV in token states", percent(kv_use(summary)), f"of the pool over all steps; {room_text(summary)}")
    if cached := kv_use(summary, "cached"):
        table.add_row("KV in cached prefixes", percent(cached), "of the pool over all steps")
    if summary.get("optimal_prompt_share"):  # not in a summary of before
        found, most = (percent(summary[f"{name}_prompt_share"]) for name in ("cached", "optimal"))
        table.add_row("prompt tokens from cache", found, f"of at most {most} in this order of admissions")
    if routing := summary.get("routing"):
        hits = percent(summary["cached_prompt_share"])
        row = "replicas", count(routing["num_replicas"]), f"imbalance {ratio(routing['imbalance'])}, hit rate {hits}"
        table.add_row(*row)
    table.add_row("mean batch", rate(summary["batch_size_mean"]), f"largest {count(summary['batch_size_max'])}")


def headed(headline: str, notices: list[str]) -> str:
    """A headline with its notices below, as the title of a table."""
    return "\n".join([escape(headline), *(f"[yellow]note: {escape(line)}[/yellow]" for line in notices)])


def _failed(number: int) -> str:
    return f"[red]{count(number)} failed[/red]" if number else "0 failed"


def comparison_table(summary: dict[str, Any]) -> Table:
    """A comparison's grid, one row per cell.

    Args:
        summary: what `write_comparison` returned.

    TTFT is the median; KV is the mean share of the pool in token states over all steps, and beside it, where there are
    any, in cached prefixes; behind routers the hit rate and the imbalance stand in their place. The last column is the
    ratio of E2E to the baseline's, with its interval and verdict where there are repeats, ≈ where no difference is
    shown.
    """
    notes = [
        f"{cell['label']}: {count(cell['num_failed'])} of {count(cell['num_requests'])} requests failed."
        for cell in summary["cells"]
        if cell["num_failed"]
    ]
    notes += [f"{one.get('name', DASH)} is not defined: {one.get('error', DASH)}." for one in summary["not_defined"]]
    notes += pairing_notes(summary)
    lines = [summary["same_tokens"]["line"], *notes[:MAX_NOTES]]
    if len(notes) > MAX_NOTES:
        lines.append(f"{len(notes) - MAX_NOTES} more such notes are in the report.")
    if len(summary["costs"]) <= MAX_COST_LINES:
        lines += cost_lines(summary["costs"])
    table = Table(
        title=headed(summary["headline"], summary["notices"]), title_justify="left",
        caption=escape("\n".join(lines)), caption_justify="left", box=None, pad_edge=False,
    )  # fmt: skip
    table.add_column("cell", overflow="fold", min_width=LEAST_NAME)
    routed = any(cell["imbalance"] for cell in summary["cells"])
    cached = not routed and any(kv_use(cell, "cached") for cell in summary["cells"])
    kv_columns = ["hits", "imbalance"] if routed else ["KV, all steps", *(["+ cached"] if cached else [])]
    for name in ("tok/s", "ratio", "TTFT", *kv_columns):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("E2E ratio", justify="right")
    for cell in summary["cells"]:
        table.add_row(
            escape(cell["label"]),
            rate(cell["output_tokens_per_second"]),
            ratio(cell["output_tokens_per_second_ratio"]),
            seconds(cell["ttft_seconds"]["p50"]),
            *([percent(cell["cached_prompt_share"]), ratio(cell["imbalance"])] if routed else [percent(kv_use(cell))]),
            *([percent(kv_use(cell, "cached"))] if cached else []),
            _paired(cell),
        )
    for left_out in summary["not_defined"]:
        table.add_row(f"{escape(str(left_out.get('name', DASH)))}: not defined")
    for failed in summary["failed"]:
        table.add_row(f"[red]{escape(str(failed.get('name', DASH)))}: failed[/red]")
    return table


def _paired(cell: dict[str, Any]) -> str:
    if cell["baseline"] == cell["label"]:
        return "baseline"
    return escape(brief(cell["paired"]["e2e_seconds"])) if cell["paired"] else DASH
