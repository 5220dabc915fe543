"""Figures that can be read: numbers on logarithmic axes, titles of panels that stay in their columns."""

import itertools

import pytest
from fake_runs import fake_run
from matplotlib.patches import Patch

from kvarena.reports.comparing.cells import Cell
from kvarena.reports.comparing.repeats import Contender
from kvarena.reports.drawing.study_charts import chart_figure
from kvarena.reports.drawing.style import NARROW, WIDE, drawing, legend_above, new_figure
from kvarena.reports.pages.comparison_figures import memory_panels
from kvarena.reports.pages.summary import summarize
from kvarena.reports.reading.files import read_run


def test_a_short_logarithmic_axis_has_several_numbers():
    line = {"name": "a", "x": [1.0, 2.0, 3.0], "y": [38.0, 60.0, 140.0], "low": [], "high": []}
    chart = {"name": "c", "kind": "lines", "x_label": "", "y_label": "ms", "log_x": False, "log_y": True}
    with drawing():
        figure = chart_figure(chart | {"series": [line]})
        figure.draw_without_rendering()
        (axes,) = figure.axes
        low, high = axes.get_ylim()
        shown = [
            label.get_text() for at, label in zip(axes.get_yticks(), axes.get_yticklabels(), strict=True)
            if low <= at <= high
        ]  # fmt: skip
    assert {"50", "100"} <= set(shown)


def test_titles_of_panels_do_not_meet(tmp_path):
    fake_run(tmp_path / "run", "paged", "continuous", num_requests=8)
    run = read_run(tmp_path / "run")
    label = "contiguous × continuous, layout=contiguous, seed={}"
    runs = [Cell(str(i), run, summarize(run), label=label.format(i)) for i in range(6)]
    cells = [Contender([run], run.label, {}) for run in runs]
    with drawing():
        figure = memory_panels(cells)
        figure.draw_without_rendering()
        boxes = [axes._left_title.get_window_extent() for axes in figure.axes if axes._left_title.get_text()]
        boxes = [box for box in boxes if box.width > 1]
    assert len(boxes) == 6
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[i + 1 :])
    assert all(box.x1 <= figure.bbox.x1 for box in boxes)


@pytest.mark.parametrize(
    "groups",
    [
        ["contiguous × static", "contiguous × continuous", "paged × static", "paged × continuous",
         "contiguous × static, the card's own pool", "paged × continuous, the card's own pool"],
        [f"{allocator}_with_one_long_word_as_a_name" for allocator in "abcdefgh"],
    ],
)  # fmt: skip
def test_long_names_below_bars_do_not_meet(groups):
    bars = {"name": "a", "x": groups, "y": [1.0] * len(groups), "low": [], "high": []}
    chart = {"name": "c", "kind": "bars", "x_label": "", "y_label": "y", "log_x": False, "log_y": False}
    with drawing():
        figure = chart_figure(chart | {"series": [bars]})
        figure.draw_without_rendering()
        labels = figure.axes[0].get_xticklabels()
    boxes = [label.get_window_extent() for label in labels]
    assert [label.get_text().replace("\n", " ") for label in labels] == groups
    assert all(box.x0 >= 0 and box.x1 <= figure.bbox.x1 for box in boxes)
    if not labels[0].get_rotation():
        assert all(left.x1 < right.x0 for left, right in itertools.pairwise(boxes))


def _chart(kind="lines", x=(1.0, 2.0, 4.0), y=(1.0, 2.0, 3.0), **more):
    series = {"name": "a", "x": list(x), "y": list(y), "low": [], "high": []}
    return {"name": "c", "kind": kind, "x_label": "x", "y_label": "y", "caption": "", "log_x": False, "log_y": False,
            "series": [series]} | more  # fmt: skip


def _drawn(chart, sheet=WIDE):
    with drawing():
        figure = chart_figure(chart, sheet)
        figure.draw_without_rendering()
    return figure


@pytest.mark.parametrize("logs", [{"log_x": True}, {"log_y": True}, {"log_x": True, "log_y": True}, {}])
def test_axes_say_whether_they_are_logarithmic(logs):
    (axes,) = _drawn(_chart(**logs)).axes
    for axis, label in (("x", axes.get_xlabel()), ("y", axes.get_ylabel())):
        kind = "log" if logs.get(f"log_{axis}") else "linear"
        assert label == (f"{axis}, {kind} scale" if logs else axis)


@pytest.mark.parametrize("given, words", [({"y_mark_name": "the bound"}, "the bound"), ({}, "2.5")])
def test_a_line_of_reference_has_its_name_upon_it(given, words):
    (axes,) = _drawn(_chart(y_mark=2.5, **given)).axes
    [text] = axes.texts
    assert (text.get_text(), text.xy[1]) == (words, 2.5)
    assert [line.get_text() for line in _drawn(_chart("parity")).axes[0].texts] == ["equal"]


@pytest.mark.parametrize("sheet", [WIDE, NARROW])
@pytest.mark.parametrize("logs", [{}, {"log_x": True}, {"log_y": True}])
def test_counts_have_whole_ticks(sheet, logs):
    (axes,) = _drawn(_chart(**logs), sheet).axes
    for labels in (axes.get_xticklabels(), axes.get_yticklabels()):
        shown = [label.get_text().replace(",", "") for label in labels if label.get_text()]
        assert shown and all(float(text).is_integer() for text in shown)


@pytest.mark.parametrize("sheet", [WIDE, NARROW])
def test_a_legend_fits_its_sheet(sheet):
    labels = ["token states", "reservation", "internal fragmentation", "external fragmentation", "shortage", "free"]
    with drawing():
        figure = new_figure(3, sheet)
        figure.subplots()
        legend_above(figure, [Patch() for _ in labels], labels, sheet)
        figure.draw_without_rendering()
    box = figure.legends[0].get_window_extent()
    assert box.x0 >= 0 and box.x1 <= figure.bbox.x1
    assert figure.legends[0]._ncols == (len(labels) if sheet is WIDE else 2)
