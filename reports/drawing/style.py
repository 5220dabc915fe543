"""One style for every figure: colours, hatches, axes, and how a figure becomes SVG and PNG.

Colours are Okabe and Ito's (2008), which colour-blind people can tell apart. Classes differ in hatch too, and lines
in dash, so that a grey print keeps them apart. Colours of ink, grid and paper are replaced by CSS variables in the
SVG, so that one figure serves a light and a dark page.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from textwrap import fill
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from kvarena.reports.reading.writing import replacing

INK, MUTED, GRID, PAPER, EMPTY = "#1b1f27", "#5c6470", "#dfe3e8", "#fffffe", "#e4e7eb"
THEME = {INK: "var(--ink)", MUTED: "var(--muted)", GRID: "var(--grid)", PAPER: "var(--paper)", EMPTY: "var(--empty)"}
PNG_DPI = 150
EXTRA_LINE = 0.15  # inches
HANDLE_CHARACTERS = 8  # the room that a legend's handle takes
LEGEND_LINE = 1.37  # a legend's letters are smaller than a title's
LOG, LINEAR = ", log scale", ", linear scale"  # behind the label of an axis


@dataclass(frozen=True, slots=True)
class Sheet:
    """What a figure is drawn for.

    Attributes:
        width: of a figure, in inches.
        row_characters: of a line of a row's name.
        line_characters: of a line across the figure: a legend's row, a title.
        is_narrow: panels that would stand side by side stand one below the other.
    """

    width: float
    row_characters: int
    line_characters: int
    is_narrow: bool

    def panels(self, figure: Figure, number: int, **options: Any) -> list[Axes]:
        """Panels that share what their rows are called. `options`: as of a single row of subplots."""
        if not self.is_narrow:
            return list(np.atleast_1d(figure.subplots(1, number, **options)))
        options.pop("width_ratios", None)
        return list(np.atleast_1d(figure.subplots(number, 1, **options)))

    def share(self, percent: float) -> float:
        """The percents that take as much room here as `percent` on a wide page."""
        return percent * 2.8 if self.is_narrow else percent


WIDE = Sheet(9.6, 40, 110, is_narrow=False)  # the page's text column, and the PNG files
NARROW = Sheet(4.4, 17, 44, is_narrow=True)  # a phone of 390 px, at about the same size of letters


@dataclass(frozen=True, slots=True)
class Look:
    """How a class or a series is drawn.

    Attributes:
        label: its name in legends.
        color: fill or line colour.
        hatch: matplotlib hatch of fills.
        dash: line style of lines.
        text: colour of text on the fill.
    """

    label: str
    color: str
    hatch: str = ""
    dash: str | tuple = "-"
    text: str = "#ffffff"


CLASS_LOOKS = {
    "token_states": Look("token states", "#0072B2"),
    "reservation": Look("reservation", "#E69F00", "////", text="#1a1300"),
    "internal": Look("internal fragmentation", "#D55E00", "xxxx"),
    "external": Look("external fragmentation", "#CC79A7", "----", text="#240718"),
    "shortage": Look("shortage", "#56B4E9", "....", text="#06202e"),
    "cached": Look("cached prefixes", "#009E73", "\\\\\\\\"),
    "free": Look("free", EMPTY, text=INK),
}
# Series of a comparison, in order; each has a colour, a dash and a hatch of its own.
SERIES = (
    Look("", "#0072B2", "", "-"),
    Look("", "#D55E00", "////", (0, (5, 1.5))),
    Look("", "#009E73", "----", (0, (1.2, 1.2))),
    Look("", "#CC79A7", "xxxx", (0, (5, 1.5, 1.2, 1.5)), "#240718"),
    Look("", "#E69F00", "\\\\\\\\", (0, (8, 2)), "#1a1300"),
    Look("", "#56B4E9", "++", (0, (3, 1)), "#06202e"),
    Look("", "#7a7f87", "||||", (0, (1, 3))),
)
BLUE, ORANGE, GREEN, RED = "#0072B2", "#E69F00", "#009E73", "#D55E00"

_RC: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlecolor": INK,
    "axes.titlepad": 8,
    "axes.labelsize": 9,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": GRID,
    "axes.facecolor": "none",
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": False,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.color": GRID,
    "ytick.color": GRID,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "text.color": INK,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "legend.handlelength": 1.4,
    "legend.columnspacing": 1.4,
    "legend.labelcolor": INK,
    "hatch.linewidth": 0.6,
    "lines.linewidth": 1.6,
    "figure.facecolor": "none",
    "svg.fonttype": "none",
    "svg.hashsalt": "kvarena",
    "path.simplify_threshold": 0.4,
}


@contextmanager
def drawing() -> Iterator[None]:
    """Draw in this project's style; matplotlib's settings are as before afterwards."""
    with matplotlib.rc_context(_RC):
        yield


def new_figure(height: float, sheet: Sheet = WIDE) -> Figure:
    """An empty figure, in inches. No pyplot: nothing global keeps it alive."""
    return Figure(figsize=(sheet.width, height), layout="constrained")


def legend_above(figure: Figure, handles: Sequence[Any], labels: Sequence[str], sheet: Sheet) -> None:
    """One legend for all panels, in as many columns as fit a line."""
    if not labels:
        return
    columns = next(number for number in range(len(labels), 0, -1) if number == 1 or _fits(labels, number, sheet))
    figure.set_figheight(figure.get_figheight() + EXTRA_LINE * (math.ceil(len(labels) / columns) - 1))
    figure.legend(handles, labels, loc="outside upper left", ncols=columns)


def _fits(labels: Sequence[str], columns: int, sheet: Sheet) -> bool:
    """Whether a legend's columns, filled one after the other and each as wide as its longest label, fit a line."""
    rows = math.ceil(len(labels) / columns)
    widths = [max(map(len, labels[start : start + rows])) for start in range(0, len(labels), rows)]
    return sum(widths) + HANDLE_CHARACTERS * len(widths) <= LEGEND_LINE * sheet.line_characters


def grid(axes: Axes, axis: str = "y") -> None:
    """Faint grid lines along one axis, and no tick marks."""
    axes.grid(True, axis=axis)  # type: ignore[arg-type]
    axes.tick_params(length=0)


def thousands(axes: Axes, axis: str = "y") -> None:
    """Tick labels such as 12,000."""
    target = axes.yaxis if axis == "y" else axes.xaxis
    target.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}" if value == int(value) else f"{value:g}"))


def whole(axes: Axes, axis: str = "y", most: int = 5) -> None:
    """Ticks of what is counted: whole numbers, such as 12,000."""
    target = axes.yaxis if axis == "y" else axes.xaxis
    target.set_major_locator(MaxNLocator(most, integer=True, min_n_ticks=1))
    thousands(axes, axis)


def mark_line(axes: Axes, value: float, name: str) -> None:
    """A dotted line across at `value` of the y axis, and its name upon it."""
    axes.axhline(value, color=INK, linewidth=0.9, linestyle=":", zorder=1)
    axes.annotate(name, (1, value), xycoords=("axes fraction", "data"), xytext=(-2, 2), textcoords="offset points",
                  ha="right", va="bottom", fontsize=8, color=INK)  # fmt: skip


def log_scale(axes: Axes, axis: str, low: float, high: float, *, counts: bool = False) -> None:
    """A logarithmic axis with plain numbers, some of them between powers of ten where the range is short.

    Args:
        axes: what is drawn on.
        axis: "x" or "y".
        low, high: ends of what is shown, both above 0.
        counts: whether only whole numbers are of use.
    """
    axes.set_xscale("log") if axis == "x" else axes.set_yscale("log")
    target = axes.xaxis if axis == "x" else axes.yaxis
    decades = math.log10(high / low)
    subs = (1, 1.5, 2, 3, 5, 7) if decades < 0.8 else (1, 2, 5) if decades < 1.6 else (1, 3) if decades < 2.5 else (1,)
    target.set_major_locator(LogLocator(subs=subs))
    target.set_major_formatter(
        FuncFormatter(lambda value, _: "" if counts and value != round(value) else f"{value:,.10g}")
    )
    target.set_minor_formatter(NullFormatter())


def hatch_kwargs(look: Look) -> dict:
    """Fill of a patch or an area in that look. The hatch is drawn in the edge colour, without an edge."""
    return {"facecolor": look.color, "hatch": look.hatch or None, "edgecolor": (1, 1, 1, 0.65), "linewidth": 0.0}


def to_svg(figure: Figure, prefix: str) -> str:
    """The figure as an inline `<svg>`: theme colours as CSS variables, the page's font, ids unique by `prefix`."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    text = re.sub(r'\bid="([^"]*)"', rf'id="{prefix}-\1"', text)
    text = re.sub(r"url\(#([^)]*)\)", rf"url(#{prefix}-\1)", text)
    text = re.sub(r'(xlink:href|href)="#([^"]*)"', rf'href="#{prefix}-\2"', text)
    text = re.sub(r"<[^>]*>", lambda tag: re.sub(r"(\d\.\d\d)\d+", r"\1", tag.group()), text)  # not the labels
    text = re.sub(r"font-family: [^;\"]*", "font-family: var(--font)", text)
    text = re.sub(r"font: ((?:\w+ )*[\d.]+px)[^;\"]*", r"font: \1 var(--font)", text)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*pt"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*pt"', r"\1", text, count=1)
    for color, variable in THEME.items():
        text = text.replace(color, variable)
    return re.sub(r"\n\s*", "\n", text).strip()


def save_png(figure: Figure, path: Path) -> None:
    """Write the figure on white paper."""
    with replacing(path) as partial:
        figure.savefig(partial, format="png", dpi=PNG_DPI, facecolor="white")


def export(draw: Callable[[Sheet], Figure], folder: Path, name: str) -> str:
    """Draw a figure for both sheets: figures/NAME.png below `folder`, and as inline SVG, of which a page shows one."""
    figure = draw(WIDE)
    wide = to_svg(figure, name)
    figure.set_layout_engine("none")  # the layout is solved once, not for every format
    save_png(figure, folder / "figures" / f"{name}.png")
    narrow = to_svg(draw(NARROW), f"{name}-narrow")
    return f'<div class="wide">\n{wide}\n</div>\n<div class="narrow">\n{narrow}\n</div>'


def row_names(labels: list[str], sheet: Sheet = WIDE) -> tuple[list[str], float]:
    """Names of a figure's rows over several lines where they are long, and the height in inches that those add."""
    names = [fill(label, sheet.row_characters) for label in labels]
    return names, sum(EXTRA_LINE * name.count("\n") for name in names)
