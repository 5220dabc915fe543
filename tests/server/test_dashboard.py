"""The dashboard in a real browser, where there is one."""

from __future__ import annotations

import json
import threading

import httpx
import pytest
from browser import BROWSER, Browser
from server_harness import RunningServer


def _events(server: RunningServer, count: int) -> list[dict]:
    made = []
    with server.client.stream("GET", "/dashboard/events") as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        for line in response.iter_lines():
            if line.startswith("data: "):
                made.append(json.loads(line[6:]))
            if len(made) == count:
                break
    return made


def _busy(server: RunningServer) -> threading.Thread:
    body = {"prompt": [30] * 50, "max_tokens": 440, "ignore_eos": True, "n": 3, "temperature": 1.0}
    thread = threading.Thread(target=lambda: server.post("/v1/completions", body))
    thread.start()
    return thread


def test_the_feed_shows_blocks_by_request_and_classes_that_add_up(server):
    thread = _busy(server)
    events = _events(server, 4)
    thread.join()
    for event in events:
        assert sum(event["classes"].values()) == event["num_blocks"] * event["block_size"]
        assert len(event["cells"]) == event["num_blocks"]
    busy = max(events, key=lambda event: event["running"])
    assert {owner for owner in busy["cells"] if owner} <= set(range(1, len(busy["requests"]) + 1))
    assert any(busy["cells"])
    assert busy["requests"][0][3] == 50


def test_the_page_itself_needs_no_key_and_holds_no_data(server):
    page = httpx.get(f"{server.url}/dashboard")
    assert page.status_code == 200
    assert "http://" not in page.text and "https://" not in page.text  # nothing from elsewhere


@pytest.mark.skipif(BROWSER is None, reason="no chromium here")
def test_the_page_draws_in_a_browser(server, tmp_path):
    colored = """(() => {
        const c = document.getElementById("map"), d = c.getContext("2d").getImageData(0, 0, c.width, c.height).data;
        const seen = new Set();
        for (let i = 0; i < d.length; i += 4) if (d[i + 3]) seen.add(d[i] << 16 | d[i + 1] << 8 | d[i + 2]);
        return seen.size;
    })()"""
    with Browser(tmp_path) as browser:
        browser.open(f"{server.url}/dashboard")
        browser.wait_for('document.getElementById("state").textContent === "a key is needed"')
        browser.evaluate(
            'document.getElementById("key").value = "test-key"; document.querySelector("form").requestSubmit()'
        )
        thread = _busy(server)
        browser.wait_for('document.getElementById("shape").textContent === "128 blocks of 16 slots"')
        browser.wait_for(f"{colored} >= 3")  # free, and at least two requests
        assert browser.evaluate("document.querySelectorAll('#rows tr').length") >= 1
        thread.join()
        browser.wait_for("document.querySelector('[data-name=running] b').textContent === '0'")
        assert browser.problems == []
