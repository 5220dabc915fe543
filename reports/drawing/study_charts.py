"""Draws a study's charts: lines with bands, bars side by side, stacked shares, points against a line of equality."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from textwrap import fill
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kvarena.reports.drawing import style
from kvarena.reports.drawing.panels import MARKERS, banded_line, name_rows, patches_above, stacked_bar
from kvarena.reports.reading.errors import ReportError

MANY_BARS = 16
AXIS_CHARACTERS = 1.2  # of a line of all names below the bars, for each that a line across the figure has
CHARACTERS_UP = 46  # of a line of a label beside the axis
MAX_POINT_TICKS = 12
MAX_MARKED = 60  # points of a line that are marked
LEAST_LABELLED = 3.0  # percent; a narrower segment holds no number


def draw_charts(charts: list[dict[str, Any]], out_dir: Path) -> dict[str, str]:
    """Draw every chart into figures/NAME.png. Returns name -> inline SVG.

    Args:
        charts: as study.json holds them (kvarena.experiments.studies.base.Chart).

    Raises:
        ReportError: a chart of unknown kind, or whose series do not fit together.
    """
    with style.drawing():
        return {chart["name"]: style.export(partial(chart_figure, chart), out_dir, chart["name"]) for chart in charts}


def chart_figure(chart: dict[str, Any], sheet: style.Sheet = style.WIDE) -> Figure:
    """One chart as a figure. Raises ReportError for an unknown kind, or series that do not fit together."""
    draw = KINDS.get(chart["kind"])
    if draw is None:
        raise ReportError(f"chart {chart['name']!r}: kind {chart['kind']!r} must be one of {', '.join(KINDS)}")
    wrong = _mismatch(chart)
    if wrong is not None:
        raise ReportError(f"study.json: chart {chart['name']!r} {wrong}; run the experiment again")
    horizontal = chart["kind"] == "stacked"
    names = [str(name) for name in chart["series"][0]["x"]]
    figure = style.new_figure(0.9 + 0.36 * len(names) + style.row_names(names, sheet)[1] if horizontal else 3.6, sheet)
    axes = figure.subplots()
    draw(axes, chart, sheet)
    axes.set_xlabel(fill(_axis_label(chart, "x"), sheet.line_characters))
    axes.set_ylabel(fill(_axis_label(chart, "y"), CHARACTERS_UP))
    if chart["log_x"]:
        style.log_scale(axes, "x", *axes.dataLim.intervalx, counts=_are_counts(chart, "x"))
        _name_points(axes, chart)
    elif chart["kind"] == "lines" and _are_counts(chart, "x"):
        style.whole(axes, "x", most=8)
    if chart["log_y"]:
        style.log_scale(axes, "y", *axes.dataLim.intervaly, counts=_are_counts(chart, "y"))
    elif chart["kind"] in ("lines", "bars") and _are_counts(chart, "y"):
        style.whole(axes)
    if chart.get("y_mark") is not None:
        style.mark_line(axes, chart["y_mark"], chart.get("y_mark_name") or f"{chart['y_mark']:,g}")
    if chart.get("y_limit") is not None:
        axes.set_ylim(top=chart["y_limit"])
    handles, labels = axes.get_legend_handles_labels()
    if len(labels) > 1:
        style.legend_above(figure, handles, labels, sheet)
    return figure


def _axis_label(chart: dict[str, Any], axis: str) -> str:
    """The chart's own; where one of its axes is logarithmic, both say what they are."""
    label = str(chart[f"{axis}_label"])
    if not (chart["log_x"] or chart["log_y"]) or (axis == "x" and chart["kind"] == "bars"):
        return label
    return (label + (style.LOG if chart[f"log_{axis}"] else style.LINEAR)).removeprefix(", ")


def _are_counts(chart: dict[str, Any], axis: str) -> bool:
    """Whether all that is drawn along an axis are whole numbers."""
    values = [value for series in chart["series"] for value in series[axis] if value is not None]
    return all(isinstance(value, int | float) and float(value).is_integer() for value in values)


def _mismatch(chart: dict[str, Any]) -> str | None:
    """What does not fit together in the chart's series, whose types are checked (reports/reading/shapes.py)."""
    if not chart["series"]:
        return "has no series"
    if Path(chart["name"]).name != chart["name"]:
        return "must have a plain file name"
    points = len(chart["series"][0]["x"])
    for series in chart["series"]:
        x, y, low, high = (series[key] for key in ("x", "y", "low", "high"))
        name = f"has a series {series['name']!r}"
        if len(x) != len(y) or {len(low), len(high)} not in ({0}, {len(y)}):
            return f"{name} of {len(x)} x, {len(y)} y, {len(low)} low and {len(high)} high"
        if chart["kind"] in ("bars", "stacked"):
            if len(x) != points or not all(isinstance(value, (str, int, float)) for value in x):
                return f"{name} whose x are not {points} names"
            if chart["log_x" if chart["kind"] == "bars" else "log_y"]:
                return f"{name} with names on a logarithmic axis"
        elif not all(isinstance(value, (int, float)) for value in x):
            return f"{name} whose x are not all numbers"
        if None in low or None in high or (chart["kind"] == "parity" and None in y):
            return f"{name} with an empty value where none may be"
        on_logs = [*(x if chart["log_x"] else ()), *(y if chart["log_y"] else ())]
        if any(isinstance(value, (int, float)) and value < 0 for value in on_logs):
            return f"{name} with a value below 0 on a logarithmic axis"
    return None


def _name_points(axes: Axes, chart: dict[str, Any]) -> None:
    """Ticks at a few measured points in place of powers of ten."""
    points = sorted({x for series in chart["series"] for x in series["x"]})
    if chart["kind"] == "lines" and len(points) <= MAX_POINT_TICKS:
        axes.set_xticks(points, [f"{point:,g}" for point in points])
        axes.set_xticks([], minor=True)


def _look(index: int, name: str) -> style.Look:
    """A series' look: a ledger class's own colour where it is one, or begins with one ("free while nobody waits")."""
    known = next((look for look in style.CLASS_LOOKS.values() if f"{name} ".startswith(f"{look.label} ")), None)
    return known or style.SERIES[index % len(style.SERIES)]


def _number(value: float) -> str:
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) >= 1 else f"{value:.2g}"


def _lines(axes: Axes, chart: dict[str, Any], _: style.Sheet) -> None:
    for index, series in enumerate(chart["series"]):
        look = _look(index, series["name"])
        marker = MARKERS[index % len(MARKERS)] if len(series["y"]) <= MAX_MARKED else None
        banded_line(
            axes, series["x"], series["y"], (series["low"], series["high"]), color=look.color, linestyle=look.dash,
            marker=marker, label=series["name"],
        )  # fmt: skip
    style.grid(axes)
    if not chart["log_y"]:
        axes.set_ylim(bottom=0)
        style.thousands(axes)


def _bars(axes: Axes, chart: dict[str, Any], sheet: style.Sheet) -> None:
    groups = chart["series"][0]["x"]
    width = 0.8 / len(chart["series"])
    number = len(groups) * len(chart["series"])
    size = 8 if number <= MANY_BARS else 6.5
    upright = sheet.is_narrow and number > MANY_BARS / 2  # numbers side by side would meet
    positions = np.arange(len(groups))
    for index, series in enumerate(chart["series"]):
        look = _look(index, series["name"])
        x = positions + (index - (len(chart["series"]) - 1) / 2) * width
        y = np.array(series["y"], dtype=float)
        errors = None
        if series["low"]:
            errors = np.abs(np.array([series["low"], series["high"]], dtype=float) - y)
        fill_of = style.hatch_kwargs(look)
        axes.bar(x, y, width * 0.92, yerr=errors, label=series["name"], ecolor=style.INK, capsize=3, **fill_of)
        ends = y if errors is None else np.where(y >= 0, y + errors[1], y - errors[0])
        for place, end, value in zip(x, ends, y, strict=True):
            if value == value:
                up = value >= 0
                axes.annotate(_number(value), (place, end), xytext=(0, 2 if up else -2), textcoords="offset points",
                              ha="center", va="bottom" if up else "top", fontsize=size,
                              rotation=90 if upright else 0)  # fmt: skip
    _name_groups(axes, [str(group) for group in groups], sheet)
    style.grid(axes)
    style.thousands(axes)


def _name_groups(axes: Axes, groups: list[str], sheet: style.Sheet) -> None:
    """Names below groups of bars: over several lines where they are long, slanting where one word is too long."""
    room = max(1, int(AXIS_CHARACTERS * sheet.line_characters) // len(groups))
    fits = all(len(word) <= room for group in groups for word in group.split())
    axes.set_xticks(np.arange(len(groups)), [fill(group, room if fits else sheet.row_characters) for group in groups])
    if not fits:
        axes.tick_params(axis="x", labelrotation=35)
        for label in axes.get_xticklabels():
            label.set(horizontalalignment="right", rotation_mode="anchor")


def _stacked(axes: Axes, chart: dict[str, Any], sheet: style.Sheet) -> None:
    every = [series["name"] for series in chart["series"]]
    looks = [replace(_look(index, name), label=name) for index, name in enumerate(every)]
    names = [str(name) for name in chart["series"][0]["x"]]
    for position in range(len(names)):
        shares = (float(series["y"][position] or 0) for series in chart["series"])
        stacked_bar(axes, position, zip(looks, shares, strict=True), sheet.share(LEAST_LABELLED))
    name_rows(axes, style.row_names(names, sheet)[0])
    axes.tick_params(length=0)
    if len(looks) > 1:
        patches_above(axes.figure, looks, sheet)  # type: ignore[arg-type]


def _parity(axes: Axes, chart: dict[str, Any], _: style.Sheet) -> None:
    ends = [np.inf, 0.0]
    for index, series in enumerate(chart["series"]):
        look = _look(index, series["name"])
        axes.plot(
            series["x"], series["y"], linestyle="", marker=MARKERS[index % len(MARKERS)], markersize=3, alpha=0.55,
            color=look.color, label=series["name"], markeredgewidth=0,
        )  # fmt: skip
        ends = [min(ends[0], *series["x"], *series["y"]), max(ends[1], *series["x"], *series["y"])]
    axes.plot(ends, ends, color=style.INK, linewidth=0.8, zorder=0)
    axes.annotate("equal", (ends[1], ends[1]), xytext=(-9, 0), textcoords="offset points", ha="right", va="center",
                  fontsize=8)  # fmt: skip
    style.grid(axes)


KINDS: dict[str, Callable[[Axes, dict[str, Any], style.Sheet], None]] = {
    "lines": _lines, "bars": _bars, "stacked": _stacked, "parity": _parity,
}  # fmt: skip
