"""Curves over a numeric setting, and repeats over seeds."""

import numpy as np
import pytest
from fake_runs import fake_run

from kvarena.reports.comparing.pairing import make_cells
from kvarena.reports.comparing.repeats import fold
from kvarena.reports.drawing.document import render_html
from kvarena.reports.pages.comparison import summarize_comparison
from kvarena.reports.pages.comparison_figures import draw_comparison
from kvarena.reports.pages.comparison_sections import comparison_document
from kvarena.reports.pages.curves import curve_axis, curves
from kvarena.reports.pages.summary import summarize
from kvarena.reports.reading.files import read_run

RATES, SEEDS = (2, 8, 24), (0, 1)


@pytest.fixture(scope="module")
def cells(tmp_path_factory):
    """Two strategies, three rates, two seeds."""
    path = tmp_path_factory.mktemp("sweep")
    runs = []
    for rate in RATES:
        for seed in SEEDS:
            for allocator in ("contiguous", "paged"):
                name = f"{allocator}-{rate}-{seed}"
                config = {"arrival": {"rate": rate}}
                fake_run(path / name, allocator, num_requests=24, rate=rate, seed=seed, config=config)
                run = read_run(path / name)
                runs.append((name, run, summarize(run)))
    return make_cells(runs, None)


def test_axis_is_the_rate_and_never_a_seed(cells):
    assert curve_axis(cells) == "arrival.rate"
    assert curve_axis([cell for cell in cells if cell.settings["arrival.rate"] == 2]) is None


def test_curves_have_the_range_of_their_repeats_and_a_knee(cells):
    lines = {line["name"]: line for line in curves(cells, "arrival.rate")}
    assert set(lines) == {"contiguous × continuous", "paged × continuous"}
    points = lines["contiguous × continuous"]["points"]
    assert [point["x"] for point in points] == list(RATES)
    assert all(point["num_runs"] == 2 for point in points)
    for point in points:
        latency = point["normalized_latency_seconds_per_token"]
        assert point["normalized_latency_seconds_per_token_min"] < latency
        assert latency < point["normalized_latency_seconds_per_token_max"]
    assert lines["contiguous × continuous"]["knee"] in (2.0, 8.0)
    assert lines["paged × continuous"]["knee"] in (None, 8.0)
    assert len(lines["paged × continuous"]["knees"]) == 2


def test_a_curve_of_one_run_each_has_no_band(cells):
    alone = [cell for cell in cells if cell.settings["workload.seed"] == 0]
    for line in curves(alone, "arrival.rate"):
        assert all(value is None for point in line["points"] for key, value in point.items()
                   if key.endswith(("_min", "_max")))  # fmt: skip


def test_every_cell_is_paired_with_the_baseline_of_its_seed_and_rate(cells):
    for cell in cells:
        assert cell.baseline.settings["allocator"] == "contiguous"
        assert cell.baseline.conditions == cell.conditions


@pytest.mark.drawn
def test_seeds_fold_away(cells, tmp_path):
    """A row per strategy and rate; the runs themselves in an appendix."""
    summary = summarize_comparison(cells, [])
    assert [cell["label"] for cell in summary["cells"]][:2] == [
        "contiguous × continuous, rate=2",
        "paged × continuous, rate=2",
    ]
    assert len(summary["cells"]) == 6 and len(summary["runs"]) == 12
    assert summary["settings"] == ["allocator", "scheduler", "arrival.rate"]
    (entry,) = [cell for cell in summary["cells"] if cell["label"] == "paged × continuous, rate=24"]
    assert entry["num_repeats"] == 2 and len(entry["folders"]) == 2
    assert entry["paired"]["e2e_seconds"]["repeats"] == 2
    assert entry["paired"]["e2e_seconds"]["unit"] == "seeds"
    speeds = [run["output_tokens_per_second"] for run in summary["runs"] if run["cell"] == entry["label"]]
    assert entry["output_tokens_per_second"] == pytest.approx(np.mean(speeds))
    spread = entry["spread"]["output_tokens_per_second"]
    assert (spread["min"], spread["max"]) == (min(speeds), max(speeds))
    page = render_html(comparison_document(summary, cells, draw_comparison(cells, summary, tmp_path)))
    for anchor in ("against-the-baseline", "the-runs", "over-rate"):
        assert f'<h2 id="{anchor}">' in page
    assert "seed=" not in summary["headline"]
    assert page.index("seed=1") > page.index('<h2 id="the-runs">')
    assert len(page) < 3_000_000


def test_fold():
    one = {"a": 1, "valid": True, "name": "x", "e2e": {"count": 3, "p50": 1.0, "max": 5.0, "min": 1.0}, "none": None}
    other = {"a": 2, "valid": False, "name": "x", "e2e": {"count": 4, "p50": None, "max": 7.0, "min": 0.5}, "none": 3}
    assert fold([one]) is one
    assert fold([one, other]) == {
        "a": 1.5, "valid": False, "name": "x", "e2e": {"count": 7, "p50": 1.0, "max": 7.0, "min": 0.5}, "none": 3,
    }  # fmt: skip
    assert fold([{"x_ci95_low": 0.1}, {"x_ci95_low": 0.2}]) == {"x_ci95_low": None}
