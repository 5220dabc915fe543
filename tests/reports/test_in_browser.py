"""Reports in a real browser, where there is one: whole without a network, and without an error."""

import json

import pytest
import sparing
from browser import BROWSER, Browser
from fake_runs import fake_run

from kvarena.reports.pages.comparison import compare
from kvarena.reports.pages.run_report import write_run_report
from kvarena.reports.pages.study import write_study_report

pytestmark = pytest.mark.skipif(BROWSER is None, reason="no chromium here")

COLORS = """(() => {
    const c = document.querySelector(".kvmap canvas"), seen = new Set();
    const d = c.getContext("2d").getImageData(0, 0, c.width, c.height).data;
    for (let i = 0; i < d.length; i += 4) if (d[i + 3]) seen.add(d[i] << 16 | d[i + 1] << 8 | d[i + 2]);
    return seen.size;
})()"""


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """report.html of a run, a comparison and an experiment, with all that they draw."""
    with sparing.nothing_spared():
        return written(tmp_path_factory)


def written(tmp_path_factory):
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


# What a reader of a narrow page would miss: what sticks out of the window, unless its own box scrolls, and letters that
# leave their drawing, meet its edge or are too small.
AMISS = """(() => {
    const width = document.documentElement.clientWidth, found = [];
    if (document.documentElement.scrollWidth > width) found.push("the page scrolls sideways");
    for (const one of document.querySelectorAll("main *")) {
        const box = one.getBoundingClientRect();
        if (!box.width || one.closest(".scroll table, svg")) continue;
        if (box.left < -0.5 || box.right > width + 0.5) found.push(one.outerHTML.slice(0, 80));
    }
    for (const svg of document.querySelectorAll("svg")) {
        const frame = svg.getBoundingClientRect();
        if (!frame.width) continue;
        for (const text of svg.querySelectorAll("text")) {
            const box = text.getBoundingClientRect();
            const size = parseFloat(getComputedStyle(text).fontSize) * frame.width / svg.viewBox.baseVal.width;
            if (box.left < frame.left - 1 || box.right > frame.right + 1 || box.top < frame.top - 1
                || box.bottom > frame.bottom + 1) found.push("cut: " + text.textContent);
            if (size < 7) found.push("small: " + text.textContent);
        }
    }
    return found;
})()"""


def test_reports_ask_for_nothing_have_no_error_and_fit_a_phone(pages, tmp_path):
    with Browser(tmp_path / "profile") as browser:
        for kind, page in pages.items():
            for width in (1400, 390):
                browser.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1,
                             mobile=width < 600)  # fmt: skip
                browser.open(page.as_uri())
                browser.wait_for(f"document.readyState === 'complete' && location.href === '{page.as_uri()}' && "
                                 "document.querySelectorAll('svg').length")  # fmt: skip
                assert browser.evaluate(AMISS) == [], (kind, width)
                drawn = browser.evaluate("[...document.querySelectorAll('svg')].filter((s) => s.clientWidth).length")
                assert drawn == browser.evaluate("document.querySelectorAll('figure:has(svg)').length")
                if kind != "study":
                    assert browser.wait_for(f"{COLORS} > 8")
            assert browser.evaluate("document.querySelectorAll('img[src^=http]').length") == 0
        maps = "document.querySelectorAll('.maps canvas').length"
        browser.open(pages["comparison"].as_uri())
        assert browser.wait_for(maps) == 2
        assert browser.problems == []
        asked = [url for url in browser.requests if not url.startswith(("file:", "data:", "about:", "blob:"))]
        assert asked == []
        assert any(url.startswith("file:") for url in browser.requests)  # requests are seen at all
