"""Reports in a real browser, where there is one: whole without a network, and without an error."""

import json

import pytest
from browser import BROWSER, Browser
from fake_runs import fake_run

from reports.comparison import compare
from reports.run_report import write_run_report
from reports.study import write_study_report

pytestmark = pytest.mark.skipif(BROWSER is None, reason="no chromium here")

COLORS = """(() => {
    const c = document.querySelector(".kvmap canvas"), seen = new Set();
    const d = c.getContext("2d").getImageData(0, 0, c.width, c.height).data;
    for (let i = 0; i < d.length; i += 4) if (d[i + 3]) seen.add(d[i] << 16 | d[i + 1] << 8 | d[i + 2]);
    return seen.size;
})()"""


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """report.html of a run, a comparison and an experiment."""
    root = tmp_path_factory.mktemp("pages")
    runs = [fake_run(root / name, name, num_requests=24, kv_map=True) for name in ("contiguous", "paged")]
    write_run_report(runs[0])
    compare([(run.name, run) for run in runs], root / "comparison", None)
    series = {"name": "s", "x": ["a", "b"], "y": [1, 2], "low": [], "high": []}
    chart = {
        "name": "c", "kind": "bars", "x_label": "", "y_label": "requests", "caption": "A chart.", "log_x": False,
        "log_y": False, "series": [series],
    }  # fmt: skip
    study = {
        "title": "A study", "headline": "It holds.", "source": "here", "claims": [], "charts": [chart],
        "differences": [], "notes": [], "experiment": "none", "created": "today", "cells": [], "command": ["python"],
        "git": {"commit": None, "dirty": None}, "machine": {"gpu": None, "cores": 2, "cpu": "a cpu"},
    }  # fmt: skip
    (root / "study").mkdir()
    (root / "study" / "study.json").write_text(json.dumps(study))
    write_study_report(root / "study")
    return {"run": runs[0] / "report.html", "comparison": root / "comparison" / "report.html",
            "study": root / "study" / "report.html"}  # fmt: skip


@pytest.mark.parametrize("kind", ["run", "comparison", "study"])
def test_a_report_asks_for_nothing_and_has_no_error(kind, pages, tmp_path):
    with Browser(tmp_path / "profile") as browser:
        browser.open(pages[kind].as_uri())
        browser.wait_for("document.readyState === 'complete' && document.querySelectorAll('svg').length")
        if kind == "run":
            assert browser.wait_for(f"{COLORS} > 8")
        assert browser.evaluate("document.querySelectorAll('img[src^=http]').length") == 0
        assert browser.problems == []
        asked = [url for url in browser.requests if not url.startswith(("file:", "data:", "about:", "blob:"))]
        assert asked == []
        assert any(url.startswith("file:") for url in browser.requests)  # requests are seen at all
