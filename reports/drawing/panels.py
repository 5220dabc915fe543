"""What figures are made of: panels side by side, named rows, stacked bars and areas, lines with bands."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from textwrap import fill
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from numpy.typing import ArrayLike

from kvarena.reports.drawing.style import (
    BLUE,
    CLASS_LOOKS,
    INK,
    RED,
    Look,
    Sheet,
    hatch_kwargs,
    legend_above,
    new_figure,
)

BAND_ALPHA = 0.18
MARKERS = "o^sDvP*X"


def patches_above(figure: Figure, looks: Sequence[Look], sheet: Sheet) -> None:
    """One legend for all panels, of areas in these looks."""
    handles = [Patch(label=look.label, **hatch_kwargs(look)) for look in looks]
    legend_above(figure, handles, [look.label for look in looks], sheet)


def grid_of_panels(
    titles: Sequence[str], height: float, sheet: Sheet, **options: Any
) -> tuple[Figure, list[Axes], int]:
    """Small panels side by side, each below its title, over an axis of time.

    Args:
        titles: one a panel.
        height: of a row of panels whose titles have one line, in inches.
        sheet: what it is drawn for.
        options: as of subplots.

    Returns:
        The figure, its panels, and how many there are in a row.
    """
    number = len(titles)
    columns = 1 if number == 1 or sheet.is_narrow else 2 if number <= 4 else 3
    rows = math.ceil(number / columns)
    filled = [fill(title, sheet.line_characters // columns) for title in titles]
    figure = new_figure(0.7 + (height + 0.16 * max(title.count("\n") for title in filled)) * rows, sheet)
    every = list(figure.subplots(rows, columns, squeeze=False, **options).flat)
    for axes in every[number:]:
        axes.set_visible(False)
    for index, (axes, title) in enumerate(zip(every, filled, strict=False)):
        axes.set_title(title, fontsize=8.5)
        if index + columns >= number:
            axes.set_xlabel("time (s)")
            axes.tick_params(labelbottom=True)
    return figure, every[:number], columns


def name_rows(axes: Axes, names: Sequence[str], positions: Sequence[float] | None = None) -> None:
    """What the rows of a figure are called, from top to bottom."""
    places = list(range(len(names))) if positions is None else list(positions)
    axes.set_yticks(places, names)
    axes.tick_params(axis="y", labelcolor=INK, length=0)
    axes.set_ylim(max(places) + 0.55, -0.55)


def stacked_bar(axes: Axes, position: float, parts: Iterable[tuple[Look, float]], least_labelled: float) -> float:
    """One horizontal bar of shares in percent; returns where it ends.

    A share of less than `least_labelled` has no room for its number.
    """
    left = 0.0
    for look, share in parts:
        if share > 0:
            axes.barh(position, share, 0.7, left=left, **hatch_kwargs(look))
        if share >= least_labelled:
            box = {"facecolor": look.color, "edgecolor": "none", "pad": 1.2, "boxstyle": "round,pad=0.15"}
            axes.text(left + share / 2, position, f"{share:.1f}", ha="center", va="center", fontsize=8.5,
                      color=look.text, bbox=box if look.hatch else None)  # fmt: skip
        left += share
    return left


def staircase(values: np.ndarray, edges: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """x and y of a step curve that is `values[i]` from edge i to edge i + 1. Drawn sooner than Axes.stairs."""
    return np.repeat(edges, 2)[1:-1], np.repeat(values, 2)


def stacked_areas(axes: Axes, edges: np.ndarray, values: Mapping[str, np.ndarray]) -> None:
    """The ledger's classes over time, one upon the other; `values`: of each, one between every two edges."""
    base = np.zeros(2 * (len(edges) - 1))
    for name, look in CLASS_LOOKS.items():
        if np.nan_to_num(values[name]).any():
            x, y = staircase(values[name], edges)
            axes.fill_between(x, base, base + y, label=look.label, **hatch_kwargs(look))
            base = base + y


def requests_over_time(axes: Axes, edges: np.ndarray, named: Mapping[str, np.ndarray]) -> None:
    """Two counts of requests, named in a legend above the panel; one value between every two edges."""
    for (label, values), color, dash in zip(named.items(), (BLUE, RED), ("-", (0, (3, 1.2))), strict=True):
        axes.plot(*staircase(values, edges), color=color, linestyle=dash, label=label, linewidth=1.3)
    axes.set_ylabel("requests")
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, borderaxespad=0)


def banded_line(axes: Axes, x: Sequence[Any], y: ArrayLike, band: tuple[ArrayLike, ArrayLike], **options: Any) -> None:
    """A line with small markers, and a band between two others where these are known; None is no value."""
    values, low, high = (np.array(one, dtype=float) for one in (y, *band))
    axes.plot(x, values, markersize=4, **options)
    if np.isfinite(low).any():
        axes.fill_between(x, low, high, color=options["color"], alpha=BAND_ALPHA, linewidth=0)
