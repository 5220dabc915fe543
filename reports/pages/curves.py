"""Curves over a numeric setting, such as throughput and latency against the request rate, with the repeats' range."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from kvarena.reports.comparing.cells import Cell, is_seed
from kvarena.reports.comparing.repeats import spread
from kvarena.reports.drawing.document import Picture, Section, Table
from kvarena.reports.drawing.format import DASH, rate, scaled_seconds, seconds
from kvarena.reports.drawing.panels import MARKERS, banded_line
from kvarena.reports.drawing.style import MUTED, SERIES, WIDE, Sheet, grid, legend_above, new_figure, thousands, whole

MIN_POINTS = 3
KNEE_FACTOR = 2.0
KNEE: dict[str, Any] = {"marker": "o", "markersize": 10, "markerfacecolor": "none", "color": MUTED}
LATENCY = "normalized_latency_seconds_per_token"


UNITS = {
    "rate": "requests/s",
    "num_slots": "slots",
    "num_blocks": "blocks",
    "memory_gib": "GiB",
    "block_size": "slots",
    "max_num_seqs": "requests",
    "max_num_batched_tokens": "tokens",
    "max_model_len": "tokens",
    "num_requests": "requests",
    "num_users": "users",
}


def unit_of(key: str) -> str:
    """Unit of a setting, or nothing when it is not known."""
    return UNITS.get(key.rsplit(".", 1)[-1], "")


def curve_axis(cells: list[Cell]) -> str | None:
    """The numeric setting with the most values, at least three, that is neither a seed nor a strategy's option."""
    best, most = None, MIN_POINTS - 1
    for key in cells[0].conditions:
        values = [cell.settings[key] for cell in cells]
        if is_seed(key) or not all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
            continue
        if len(set(values)) > most:
            best, most = key, len(set(values))
    return best


def curves(cells: list[Cell], axis: str) -> list[dict[str, Any]]:
    """One curve per strategy and other settings.

    Each point has `x` and, as means over its repeats with their `_min` and `_max`, `output_tokens_per_second`, mean
    normalised latency and p99 TTFT. `knee`: the largest x of the curve, from the left, whose normalised latency stays
    within twice that of the smallest x; None when even the largest does, for then there is no knee. `knees`: that of
    each repeat that ran at every x.
    """
    groups: dict[str, list[Cell]] = {}
    for cell in cells:
        groups.setdefault(cell.named(lambda key: key != axis and not is_seed(key)), []).append(cell)
    result = []
    for name, members in groups.items():
        xs = sorted({cell.settings[axis] for cell in members})
        points = [_point(x, [cell for cell in members if cell.settings[axis] == x]) for x in xs]
        repeats: dict[Any, dict[float, Cell]] = {}
        for cell in members:
            repeats.setdefault(cell.block, {})[cell.settings[axis]] = cell
        whole = [[_point(x, [runs[x]]) for x in xs] for runs in repeats.values() if len(runs) == len(xs)]
        line = {"name": name, "points": points, "knee": _knee(points), "knees": [_knee(points) for points in whole]}
        result.append(line)
    return result


def _point(x: float, cells: list[Cell]) -> dict[str, Any]:
    """The mean over the runs at x, and their range where there are several."""
    stats = {
        "output_tokens_per_second": [cell.summary["output_tokens_per_second"] or 0.0 for cell in cells],
        LATENCY: [cell.summary[LATENCY]["mean"] for cell in cells],
        "ttft_p99_seconds": [cell.summary["ttft_seconds"]["p99"] for cell in cells],
    }
    point: dict[str, Any] = {"x": x, "num_runs": len(cells)}
    for key, values in stats.items():
        over = spread(values)
        point[key] = over["mean"]
        point[f"{key}_min"], point[f"{key}_max"] = (over["min"], over["max"]) if over["count"] > 1 else (None, None)
    return point


def _knee(points: list[dict[str, Any]]) -> float | None:
    known = [point for point in points if point[LATENCY] is not None]
    if not known:
        return None
    limit = KNEE_FACTOR * known[0][LATENCY]
    for before, point in itertools.pairwise(known):
        if point[LATENCY] > limit:
            return float(before["x"])
    return None


def curve_figure(lines: list[dict[str, Any]], axis: str, sheet: Sheet = WIDE) -> Figure:
    """Normalised latency, p99 TTFT and throughput against the setting; bands are the repeats' ranges, rings knees."""
    figure = new_figure(6.6 if sheet.is_narrow else 3.1, sheet)
    row = sheet.panels(figure, 3)
    counts = all(float(point["x"]).is_integer() for line in lines for point in line["points"])
    for axes, key, title in (
        (row[0], LATENCY, "Mean normalised latency ({}/token)"),
        (row[1], "ttft_p99_seconds", "TTFT, p99 ({})"),
        (row[2], "output_tokens_per_second", "Output throughput (tokens/s)"),
    ):
        values = [point[key] for line in lines for point in line["points"] if point[key] is not None]
        factor, unit = scaled_seconds(max(values, default=1.0)) if "{}" in title else (1.0, "")
        for index, line in enumerate(lines):
            _draw_curve(axes, line, key, factor, index)
        axes.set_title(title.format(unit))
        axes.set_xlabel(f"{axis} ({unit_of(axis)})" if unit_of(axis) else axis)
        axes.set_ylim(bottom=0)
        grid(axes, "both")
        thousands(axes)
        if counts:
            whole(axes, "x")
    handles, labels = row[0].get_legend_handles_labels()
    if any(line["knee"] is not None for line in lines):
        handles, labels = [*handles, Line2D([], [], linestyle="", **KNEE)], [*labels, "knee"]
    legend_above(figure, handles, labels, sheet)
    return figure


def _draw_curve(axes: Any, line: dict[str, Any], key: str, factor: float, index: int) -> None:
    look, marker = SERIES[index % len(SERIES)], MARKERS[index % len(MARKERS)]
    points = [point for point in line["points"] if point[key] is not None]
    x = [point["x"] for point in points]
    y, low, high = (
        factor * np.array([point[name] for point in points], dtype=float) for name in (key, f"{key}_min", f"{key}_max")
    )
    banded_line(axes, x, y, (low, high), marker=marker, color=look.color, linestyle=look.dash, label=line["name"])
    for point in points:
        if point["x"] == line["knee"]:
            axes.plot(point["x"], point[key] * factor, **KNEE)


def curve_section(lines: list[dict[str, Any]], axis: str, svg: str) -> Section:
    """The curves and their knees."""
    short = axis.rsplit(".", 1)[-1]
    rows = []
    for line in lines:
        at = next((point for point in line["points"] if point["x"] == line["knee"]), None)
        rows.append(
            [line["name"], DASH if at is None else f"{line['knee']:g}", _knees(line["knees"]),
             seconds(at[LATENCY] if at else None), seconds(at["ttft_p99_seconds"] if at else None),
             rate(at["output_tokens_per_second"] if at else None)]
        )  # fmt: skip
    table = Table(["curve", f"knee: {short}", "of each repeat", "normalised latency", "TTFT p99", "output tok/s"], rows)
    picture = Picture(
        "curves",
        svg,
        f"Latency and throughput against {axis}: means over repeats; bands: from the smallest to the largest repeat, "
        "none where each point ran once; ring: the knee.",
        f"latency and throughput curves over {axis}",
    )
    note = (
        f"Knee: the largest {short} whose mean normalised latency stays within {KNEE_FACTOR:g} times that of the "
        "smallest one; a dash where the curve has none in the measured range. It describes these runs: it has no "
        "interval, and of one run each nothing says how far it would move."
    )
    return Section(f"Over {short}", [], [picture], [table], [note])


def _knees(knees: list[float | None]) -> str:
    """The repeats' own knees; nothing of a single one."""
    if len(knees) < 2:
        return "one run"
    return ", ".join(DASH if knee is None else f"{knee:g}" for knee in sorted(knees, key=lambda knee: knee or np.inf))
