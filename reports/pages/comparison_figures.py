"""The figures of a comparison. Cells keep their order, colour, dash and hatch in every figure."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from kvarena.reports.analysis.latency import token_gaps
from kvarena.reports.analysis.memory import make_bins, step_spans
from kvarena.reports.comparing.cells import Cell
from kvarena.reports.comparing.judge import LATENCIES, METRICS, ratios
from kvarena.reports.comparing.kv_maps import kv_maps_figure, kv_maps_markup, read_kv_maps
from kvarena.reports.comparing.repeats import Contender, contenders
from kvarena.reports.comparing.verdicts import DECIDED, THROUGHPUT
from kvarena.reports.drawing import style
from kvarena.reports.drawing.format import rate, scaled_seconds, seconds
from kvarena.reports.drawing.panels import grid_of_panels, name_rows, patches_above
from kvarena.reports.pages.curves import curve_figure
from kvarena.reports.pages.run_figures import DISTRIBUTIONS, draw_memory, latency_figure, seen_classes, split_figure
from kvarena.reports.pages.verdict_sections import metric_name

MAX_CURVES = len(style.SERIES)
MAX_PANELS = 12
NUM_PANEL_BINS = 160


def draw_comparison(runs: list[Cell], summary: dict[str, Any], out_dir: Path) -> dict[str, str]:
    """Draw every figure into figures/*.png. Returns name -> inline SVG; a figure without data is left out."""
    cells = contenders(runs)
    with style.drawing():
        split = [(cell.label, cell.summary["kv_share_mean"]) for cell in cells]
        figures: dict[str, Callable[[style.Sheet], Figure]] = {
            "overview": partial(overview_figure, cells),
            "kv_split": partial(split_figure, split),
            "kv_memory": partial(memory_panels, cells[:MAX_PANELS]),
            "latency": partial(latency_figure, *latency_curves(curve_cells(cells), cells)),
        }
        if summary["curves"]:
            figures["curves"] = partial(curve_figure, summary["curves"]["lines"], summary["curves"]["axis"])
        compared = [cell for cell in cells if cell.baseline is not None and not cell.is_baseline]
        if compared:
            rows = {cell["label"]: cell for cell in summary["cells"]}
            figures["paired"] = partial(ratio_figure, compared, rows)
        markup = {name: style.export(draw, out_dir, name) for name, draw in figures.items()}
        maps = read_kv_maps(cells[:MAX_PANELS])
        if maps:
            style.save_png(kv_maps_figure(maps), out_dir / "figures" / "kv_maps.png")
            markup["kv_maps"] = kv_maps_markup(maps)
        return markup


def looks_of(cells: list[Contender], every: list[Contender]) -> list[style.Look]:
    """A look per cell: its strategy's, or its own where all cells are of one strategy.

    Args:
        cells: the cells to draw.
        every: all cells of the comparison, which fix the looks.
    """
    names = [cell.strategy for cell in every]
    if len(set(names)) == 1:
        return [style.SERIES[every.index(cell) % len(style.SERIES)] for cell in cells]
    order = list(dict.fromkeys(names))
    return [style.SERIES[order.index(cell.strategy) % len(style.SERIES)] for cell in cells]


def curve_cells(cells: list[Contender]) -> list[Contender]:
    """The cells whose latency curves are drawn: those under the fastest cell's conditions, at most a look each."""
    fastest = max(cells, key=lambda cell: cell.summary["output_tokens_per_second"] or 0.0)
    if len({cell.strategy for cell in cells}) == 1:
        return cells[:MAX_CURVES]
    return [cell for cell in cells if cell.conditions == fastest.conditions][:MAX_CURVES]


def overview_figure(cells: list[Contender], sheet: style.Sheet = style.WIDE) -> Figure:
    """Throughput, mean batch and TTFT of every cell, side by side."""
    names, extra = style.row_names([cell.label for cell in cells], sheet)
    height = 0.85 + 0.34 * len(cells) + extra
    figure = style.new_figure(3 * height if sheet.is_narrow else height, sheet)
    row = sheet.panels(figure, 3, sharey=True, width_ratios=[1.25, 1, 1.25])
    positions = np.arange(len(cells))
    for axes, key, title in (
        (row[0], "output_tokens_per_second", "Output throughput (tokens/s)"),
        (row[1], "batch_size_mean", "Mean batch (requests)"),
    ):
        known = [cell.summary[key] for cell in cells]  # None where a run has none: a server's batches are not seen
        values = [value or 0.0 for value in known]
        ends: list[float] = []
        for position, value, text, look in zip(positions, values, known, looks_of(cells, cells), strict=True):
            axes.barh(position, value, 0.66, **style.hatch_kwargs(look))
            runs = [run.summary[key] for run in cells[position].runs if run.summary[key] is not None]
            largest = max([value, *runs])
            if len(runs) > 1:
                axes.plot(runs, [position] * len(runs), "o", markersize=3.5, markerfacecolor=style.PAPER,
                          markeredgecolor=style.INK, markeredgewidth=0.8, clip_on=False)  # fmt: skip
            axes.annotate(rate(text), (largest, position), xytext=(6, 0), textcoords="offset points", va="center",
                          fontsize=8.5)  # fmt: skip
            ends.append(largest)
        axes.set_xlim(0, max([*ends, 1e-9]) * 1.22)
        axes.set_title(title)
        axes.set_xticks([])
        axes.spines[["bottom"]].set_visible(False)
    _draw_ttft(row[2], cells)
    name_rows(row[0], names)
    for axes in row:
        axes.tick_params(length=0)
    return figure


def _draw_ttft(axes: Axes, cells: list[Contender]) -> None:
    """Median to 99th percentile of the time to first token, on a logarithmic axis."""
    stats = [cell.summary["ttft_seconds"] for cell in cells]
    known = [value for stat in stats for value in (stat["p50"], stat["p99"]) if value]
    factor, unit = scaled_seconds(float(np.median(known)) if known else 1.0)
    for position, (stat, look) in enumerate(zip(stats, looks_of(cells, cells), strict=True)):
        if not stat["p50"] or stat["p50"] <= 0:
            continue
        low, high = stat["p50"] * factor, stat["p99"] * factor
        axes.plot([low, high], [position, position], color=look.color, linewidth=1.6)
        axes.plot(low, position, "o", color=look.color, markersize=5)
        axes.plot(high, position, "D", color=look.color, markersize=4.5)
    axes.set_title(f"TTFT, median ● to p99 ◆ ({unit})")
    if known:
        log_axis(axes, min(known) * factor, max(known) * factor)
    axes.margins(x=0.08)
    style.grid(axes, "x")


def log_axis(axes: Axes, low: float, high: float) -> None:
    """A logarithmic x axis with plain numbers; a linear one where the values are close together. Its label says so."""
    axes.tick_params(axis="x", which="both", length=0)
    is_linear = low <= 0 or high / low < 3
    if is_linear:
        axes.xaxis.set_major_locator(MaxNLocator(5))
    else:
        style.log_scale(axes, "x", low, high)
    axes.set_xlabel((axes.get_xlabel() + (style.LINEAR if is_linear else style.LOG)).removeprefix(", "))


def memory_panels(cells: list[Contender], sheet: style.Sheet = style.WIDE) -> Figure:
    """KV memory over time of each cell's first run, on one time axis: a shorter picture is a faster run."""
    titles = [f"{cell.label}: {seconds(cell.runs[0].summary['duration_seconds'])}" for cell in cells]
    figure, panels, num_columns = grid_of_panels(titles, 1.85, sheet, sharex=True)
    spans = [step_spans(cell.run.steps) for cell in cells]
    end = max((float(span.end[-1]) for span in spans if len(span.end)), default=1.0)
    for index, (axes, cell, span) in enumerate(zip(panels, cells, spans, strict=True)):
        last = float(span.end[-1]) if len(span.end) else 0.0
        bins = make_bins(span, max(8, round(NUM_PANEL_BINS * last / end)), end=last)
        draw_memory(axes, cell.run, span, bins, share=True)
        axes.set_xlim(0, end)
        if not cell.run.num_steps:
            axes.annotate("not recorded", (0.5, 0.5), xycoords="axes fraction", ha="center", color=style.MUTED)
        axes.set_ylabel("% of the pool" if index % num_columns == 0 else "")
    patches_above(figure, seen_classes([cell.run for cell in cells]), sheet)
    return figure


def latency_curves(
    cells: list[Contender], every: list[Contender]
) -> tuple[list[tuple[str, dict[str, np.ndarray]]], list[style.Look]]:
    """The latencies of `cells` by name, and the looks that they have among `every`."""
    series = []
    for cell in cells:
        gaps = [token_gaps(run.run).values for run in cell.runs]
        found = {key: cell.latencies(key) for key in DISTRIBUTIONS if key != "itl_seconds"}
        series.append((cell.label, found | {"itl_seconds": np.concatenate(gaps)}))
    return series, looks_of(cells, every)


def ratio_figure(cells: list[Contender], rows: dict[str, dict[str, Any]], sheet: style.Sheet = style.WIDE) -> Figure:
    """Ratios to the baseline's with the repeats and their interval.

    Args:
        cells: those that have a baseline.
        rows: of summary.json, by label.
        sheet: what it is drawn for.
    """
    names, extra = style.row_names([cell.label for cell in cells], sheet)
    height = 1.15 + 0.36 * len(cells) + extra
    figure = style.new_figure(len(METRICS) * height if sheet.is_narrow else height, sheet)
    row = sheet.panels(figure, len(METRICS), sharey=True)
    for axes, metric in zip(row, METRICS, strict=True):
        bounds = [1.0]
        for position, cell in enumerate(cells):
            summary = rows[cell.label]
            entry = summary["paired"][metric] if metric in LATENCIES else summary[f"{metric}_verdict"]
            bounds += _draw_ratio(axes, cell, metric, entry, position)
        axes.axvline(1.0, color=style.MUTED, linewidth=0.9, linestyle=(0, (3, 2)), zorder=0)
        axes.annotate("baseline", (1.0, 1), xycoords=("data", "axes fraction"), xytext=(0, -1), fontsize=7.5,
                      textcoords="offset points", ha="center", va="top", color=style.MUTED)  # fmt: skip
        axes.set_xlabel("more is faster" if metric == THROUGHPUT else "less is faster")
        log_axis(axes, min(bounds), max(bounds))
        room = (max(bounds) / min(bounds)) ** 0.08 * 1.005
        axes.set_xlim(min(bounds) / room, max(bounds) * room)
        axes.set_title(metric_name(metric))
        style.grid(axes, "x")
    name_rows(row[0], names)
    row[0].set_ylim(top=-0.8)
    return figure


def _draw_ratio(axes: Axes, cell: Contender, metric: str, entry: dict[str, Any], position: int) -> list[float]:
    """One ratio, its interval and its repeats; returns the values drawn."""
    if entry["ratio"] is None or cell.baseline is None:
        axes.text(1.0, position, "no pairs", color=style.MUTED, fontsize=8, va="center", ha="center")
        return []
    repeats = [float(value) for value in ratios(cell, cell.baseline, metric).values if value > 0]
    drawn = [entry["ratio"], *repeats]
    if entry["interval"]:
        low, high = entry["interval"]
        axes.plot([low, high], [position, position], color=style.INK, linewidth=1.4)
        axes.plot(repeats, [position + 0.24] * len(repeats), ".", markersize=4, color=style.MUTED)
        reach = 3 * max(max(drawn) / min(drawn), 1.02)  # two repeats may leave an interval that hides all the rest
        drawn += [max(low, min(drawn) / reach), min(high, max(drawn) * reach)]
    face = style.INK if entry["verdict"] in DECIDED else style.PAPER
    axes.plot(entry["ratio"], position, "o", markersize=6, markeredgecolor=style.INK, markerfacecolor=face)
    return drawn
