"""The figures of one run. Each takes the run's data and returns a Figure; time is binned, so a long run draws fast."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Annotation

from kvarena.engine.classes import CLASSES
from kvarena.reports.analysis.latency import DEFINITIONS
from kvarena.reports.analysis.memory import Bins, Spans, binned_mean, binned_rate, make_bins
from kvarena.reports.drawing import style
from kvarena.reports.drawing.format import scaled_seconds, seconds
from kvarena.reports.drawing.panels import (
    name_rows,
    patches_above,
    requests_over_time,
    stacked_areas,
    stacked_bar,
    staircase,
)
from kvarena.reports.drawing.paper import FIGURE_2
from kvarena.reports.reading.files import RunFiles

NUM_BINS = 420
NUM_RATE_BINS = 120
DISTRIBUTIONS = ("ttft_seconds", "tpot_seconds", "itl_seconds", "e2e_seconds")


def memory_figure(run: RunFiles, spans: Spans, sheet: style.Sheet = style.WIDE) -> Figure:
    """KV memory over time by ledger class; below it what finished requests hold (if any do), and the queue."""
    held = bool(run.steps["held"].any())
    figure = style.new_figure(4.3 + 0.8 * held, sheet)
    rows = figure.subplots(2 + held, 1, sharex=True, height_ratios=[4.2, *([1] * (1 + held))])
    bins = make_bins(spans, NUM_BINS)
    draw_memory(rows[0], run, spans, bins)
    patches_above(figure, seen_classes([run]), sheet)
    if held:
        share = 100 * run.steps["held"] / np.maximum(run.steps["total"], 1)
        _slim_panel(rows[1], "% held by\nfinished", binned_mean(share, spans, bins), bins)
        rows[1].set_ylim(0, 100)
        rows[1].set_yticks([0, 50, 100])
    _slim_panel(rows[-1], "requests\nwaiting", binned_mean(run.steps["num_waiting"], spans, bins), bins)
    rows[-1].set_xlabel("time since the start of the run (s)")
    figure.align_ylabels()
    return figure


def seen_classes(runs: Sequence[RunFiles]) -> list[style.Look]:
    """The looks of the ledger's classes that any of the runs had something in."""
    return [look for name, look in style.CLASS_LOOKS.items() if any(run.steps[name].any() for run in runs)]


def _slim_panel(axes: Axes, label: str, values: np.ndarray, bins: Bins) -> None:
    x, y = staircase(np.nan_to_num(values), bins.edges)
    axes.fill_between(x, 0, y, facecolor=style.MUTED, linewidth=0)
    axes.set_ylabel(label)
    axes.set_ylim(0, max(1.0, y.max(initial=0) * 1.1))
    style.whole(axes, most=3)
    style.grid(axes)


def draw_memory(axes: Axes, run: RunFiles, spans: Spans, bins: Bins, share: bool = False) -> None:
    """The stacked area of the ledger: in slots with percents at the right, or in percents of the pool alone."""
    total = float(run.steps["total"].max()) if run.num_steps else 1.0
    scale = 100 / total if share else 1.0
    stacked_areas(axes, bins.edges, {name: binned_mean(run.steps[name] * scale, spans, bins) for name in CLASSES})
    axes.set_ylim(0, total * scale)
    axes.set_xlim(bins.edges[0], bins.edges[-1])
    axes.tick_params(length=0)
    if share:
        axes.set_yticks([0, 50, 100])
        return
    axes.set_ylabel("KV slots (one token each)")
    style.whole(axes)
    to_percent, to_slots = 100 / total, total / 100
    right = axes.secondary_yaxis(
        "right", functions=(lambda y: np.asarray(y) * to_percent, lambda p: np.asarray(p) * to_slots)
    )
    right.set_ylabel("% of the pool")
    right.set_yticks([0, 20, 40, 60, 80, 100])
    right.tick_params(length=0)
    right.spines["right"].set_visible(False)


def split_figure(rows: list[tuple[str, dict[str, float] | None]], sheet: style.Sheet = style.WIDE) -> Figure:
    """Mean split of KV memory as bars, and the four bars of PagedAttention's Figure 2 below.

    Args:
        rows: (label, class -> share in [0, 1] or None when the window is empty).
        sheet: what it is drawn for.
    """
    reference = [(name, {key: value / 100 for key, value in split.items()}) for name, split in FIGURE_2.items()]
    bars = [*rows, *reference]
    positions = [index + 0.75 * (index >= len(rows)) for index in range(len(bars))]
    names, extra = style.row_names([label for label, _ in bars], sheet)
    figure = style.new_figure(0.75 + 0.36 * (len(bars) + 1.2) + extra, sheet)
    axes = figure.subplots()
    for position, (_, split) in zip(positions, bars, strict=True):
        if split is None:
            axes.text(0.6, position, "no such step in this run", va="center", color=style.MUTED, fontsize=8.5)
            continue
        parts = ((style.CLASS_LOOKS[name], 100 * split.get(name, 0.0)) for name in CLASSES)
        left = stacked_bar(axes, position, parts, least_labelled=sheet.share(4))
        if left < 99.5:  # the source does not say what it is
            axes.barh(position, 100 - left, 0.7, left=left, facecolor="none", edgecolor=style.MUTED, linewidth=0.7)
    axes.annotate("PagedAttention, Figure 2", (0, len(rows) - 0.02), xytext=(-6, 0), textcoords="offset points",
                  ha="right", va="center", color=style.MUTED, fontsize=8, annotation_clip=False)  # fmt: skip
    axes.axhline(len(rows) - 0.02, color=style.GRID, linewidth=0.8, linestyle=(0, (2, 2)), zorder=0)
    name_rows(axes, names, positions)
    axes.set_xlim(0, 100)
    axes.set_xlabel("mean share of the KV pool (%)")
    axes.spines["left"].set_visible(False)
    axes.tick_params(length=0)
    seen = [name for name in CLASSES if any(split and split.get(name, 0) > 0 for _, split in bars)]
    patches_above(figure, [style.CLASS_LOOKS[name] for name in seen], sheet)
    return figure


def load_figure(run: RunFiles, spans: Spans, sheet: style.Sheet = style.WIDE) -> Figure:
    """Batch size and queue, tokens computed per second, and preemptions over time."""
    preempted = bool(run.steps["num_preempted"].any())
    figure = style.new_figure(4.6 + 0.8 * preempted, sheet)
    rows = figure.subplots(3 + preempted, 1, sharex=True, height_ratios=[1.6, 1, 1, 0.8][: 3 + preempted])
    bins = make_bins(spans, NUM_BINS)
    means = {name: binned_mean(run.steps[name], spans, bins) for name in ("num_scheduled", "num_waiting")}
    requests_over_time(
        rows[0], bins.edges, {"in the step's batch": means["num_scheduled"], "waiting": means["num_waiting"]}
    )
    coarse = make_bins(spans, NUM_RATE_BINS)
    for axes, kind, color in ((rows[1], "decode", style.BLUE), (rows[2], "prefill", style.ORANGE)):
        x, y = staircase(binned_rate(run.steps[f"num_{kind}_tokens"], spans, coarse), coarse.edges)
        axes.fill_between(x, 0, y, facecolor=color, linewidth=0)
        axes.set_ylabel(f"{kind}\ntokens/s")
    if preempted:
        counts = binned_rate(run.steps["num_preempted"], spans, bins) * np.diff(bins.edges)
        rows[3].plot(bins.edges, np.concatenate([[0.0], np.cumsum(counts)]), color=style.INK, linewidth=1.3)
        rows[3].set_ylabel("preemptions\nso far")
    for axes in rows:
        axes.set_ylim(bottom=0)
        style.whole(axes, most=4)
        style.grid(axes)
    rows[-1].set_xlim(bins.edges[0], bins.edges[-1])
    rows[-1].set_xlabel("time since the start of the run (s)")
    figure.align_ylabels()
    return figure


def gauges_figure(gauges: dict[str, np.ndarray], sheet: style.Sheet = style.WIDE) -> Figure:
    """How full a server's pool was, by ledger class where it tells; below it the requests that ran and waited."""
    figure = style.new_figure(4.2, sheet)
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[2, 1.2])
    # A reading holds until the next one.
    time, between = gauges["time"], {name: values[:-1] for name, values in gauges.items()}
    total = np.sum([gauges[name] for name in CLASSES], axis=0)
    if np.isfinite(total).all() and (total > 0).all():
        shares = {name: 100 * between[name] / total[:-1] for name in CLASSES}
        stacked_areas(top, time, shares)
        patches_above(figure, [style.CLASS_LOOKS[name] for name in CLASSES if shares[name].any()], sheet)
        top.set_ylabel("share of the KV pool (%)")
    else:
        top.set_ylabel("KV pool in use (%)")
        top.plot(*staircase(100 * between["kv_usage"], time), color=style.BLUE)
        style.grid(top)
    top.set_ylim(0, 100)
    requests_over_time(bottom, time, {"running": between["num_running"], "waiting": between["num_waiting"]})
    bottom.set_ylim(bottom=0)
    style.whole(bottom)
    style.grid(bottom)
    bottom.set_xlabel("time since the start of the run (s)")
    bottom.set_xlim(time[0], max(time[-1], time[0] + 1e-3))
    figure.align_ylabels()
    return figure


def latency_figure(
    series: Sequence[tuple[str, Mapping[str, np.ndarray]]], looks: Sequence[style.Look], sheet: style.Sheet = style.WIDE
) -> Figure:
    """Cumulative distributions, one panel a latency, one curve a series.

    Args:
        series: each one's name, and its values in seconds by DISTRIBUTIONS.
        looks: a look per series.
        sheet: what it is drawn for.
    """
    figure = style.new_figure(1.85 * len(DISTRIBUTIONS) if sheet.is_narrow else 2.55, sheet)
    row = sheet.panels(figure, len(DISTRIBUTIONS), sharey=True)
    for axes, key in zip(row, DISTRIBUTIONS, strict=True):
        draw_cdf(axes, DEFINITIONS[key][0], [(name, values[key]) for name, values in series], looks)
    for axes in row if sheet.is_narrow else row[:1]:
        axes.set_ylabel("share (%)" if sheet.is_narrow else "share of requests (%)")
    if len(looks) > 1:
        handles, labels = row[0].get_legend_handles_labels()
        style.legend_above(figure, handles, labels, sheet)
    return figure


def draw_cdf(axes: Axes, metric: str, curves: list[tuple[str, np.ndarray]], looks: Sequence[style.Look]) -> None:
    """One panel: on a logarithmic axis when the values spread over more than a factor 30."""
    curves = [(name, np.sort(values[~np.isnan(values)])) for name, values in curves]
    known = [values for _, values in curves if len(values)]
    low = min((_quantiles(values, 1.0) for values in known), default=0.0)
    high = max((_quantiles(values, 99.0) for values in known), default=1.0)
    least, most = min((v[0] for v in known), default=0.0), max((v[-1] for v in known), default=0.0)
    factor, unit = scaled_seconds(float(high))
    if least > 0 and most / low > 30:
        style.log_scale(axes, "x", low, most)
    for (name, values), look in zip(curves, looks, strict=True):
        shares = np.linspace(0, 100, min(400, len(values) + 1)) if len(values) else np.empty(0)
        points = _quantiles(values, shares) * factor if len(values) else shares
        axes.plot(points, shares, color=look.color, linestyle=look.dash, label=name, linewidth=1.5)
        if len(curves) == 1 and len(values):
            _mark_percentiles(axes, values, factor, look)
    if not known:
        axes.text(0.5, 0.5, "no values", transform=axes.transAxes, ha="center", color=style.MUTED)
    axes.set_title(metric)
    axes.set_xlabel(unit + (style.LOG if axes.get_xscale() == "log" else style.LINEAR))
    axes.set_ylim(0, 112)
    axes.set_yticks([0, 25, 50, 75, 100])
    if axes.get_xscale() == "linear":
        axes.set_xlim(0, float(most) * factor * 1.06 if most > 0 else 1.0)
    if len(curves) == 1:
        _place_labels(axes)
    style.grid(axes, "both")


def _quantiles(ordered: np.ndarray, percents: np.ndarray | float) -> Any:
    """Percentiles of sorted values, linear between order statistics; np.percentile would look for the order again."""
    return np.interp(np.asarray(percents) / 100 * (len(ordered) - 1), np.arange(len(ordered)), ordered)


def _mark_percentiles(axes: Axes, values: np.ndarray, factor: float, look: style.Look) -> None:
    for share, marker in ((50, "o"), (99, "D")):
        value = float(_quantiles(values, share))
        axes.plot(value * factor, share, marker, color=look.color, markersize=4.5)
        label = axes.annotate(
            f"p{share} {seconds(value)}", (value * factor, share), xytext=(-6, 0), textcoords="offset points",
            ha="right", va="center", fontsize=8, color=style.INK,
        )  # fmt: skip
        label.set_in_layout(False)


def _place_labels(axes: Axes) -> None:
    """Percentile labels stand on the side of their marker that has more room; the upper one stands above the curve."""
    for label in axes.texts:
        if not isinstance(label, Annotation):
            continue
        x = float(axes.transLimits.transform(axes.transScale.transform(label.xy))[0])
        to_right = x < 0.5
        label.set_horizontalalignment("left" if to_right else "right")
        label.set_position((6 if to_right else -6, 0 if label.xy[1] < 90 else 7))
