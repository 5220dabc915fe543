"""The dashboard and the playground: their data, and the pages in a real browser where there is one."""

from __future__ import annotations

import json
import os
import re
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import pytest
from browser import BROWSER, Browser
from server_harness import ROOT, RunningServer

from kvarena.reports.drawing.kv_map import SHADES
from kvarena.reports.drawing.style import CLASS_LOOKS

STATIC = ROOT / "engine/server/front/static"
NOBODY = {-4, -3, -2, -1}


def _events(server: RunningServer, count: int, headers: dict[str, str] | None = None, mine: str = "") -> list[dict]:
    made: list[dict] = []
    with server.client.stream("GET", "/dashboard/events", params={"mine": mine}, headers=headers) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        for line in response.iter_lines():
            if line.startswith("data: "):
                made.append(json.loads(line[6:]))
            if len(made) >= count and any(event["requests"] for event in made):
                break
    return made


def _busy(server: RunningServer, request_id: str = "") -> threading.Thread:
    body = {"prompt": [30] * 50, "max_tokens": 440, "ignore_eos": True, "n": 3, "temperature": 1.0, "user": "ann"}
    headers = {"X-Request-Id": request_id} if request_id else {}
    thread = threading.Thread(target=lambda: server.post("/v1/completions", body, headers=headers))
    thread.start()
    return thread


@contextmanager
def _kept_busy(server: RunningServer, request_id: str = "") -> Iterator[None]:
    """Requests one after another, for as long as a page takes to show them."""
    ended = threading.Event()

    def ask() -> None:
        while not ended.is_set():
            _busy(server, request_id).join()

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def test_the_feed_shows_blocks_by_request_and_classes_that_add_up(server):
    with _kept_busy(server):
        events = _events(server, 4)
    for event in events:
        assert sum(event["classes"].values()) == event["num_blocks"] * event["block_size"]
        assert len(event["cells"]) == len(event["filled"]) == event["num_blocks"]
        # Cached blocks are told from free ones, one for one.
        assert event["cells"].count(-2) * event["block_size"] == event["classes"]["cached"]
        assert set(event["cells"]) - NOBODY <= {row["number"] for row in event["requests"]}
    busy = max(events, key=lambda event: event["running"])
    assert busy["requests"][0]["prompt"] == 50
    assert busy["about"]["allocator"] == "paged_prefix" and busy["about"]["scheduler"] == "chunked"
    assert set(busy["latency"]) == {"ttft", "tpot", "itl"} and busy["counters"]["generated"] >= 0


def test_names_are_for_who_gave_the_key_of_the_request(server):
    """Two keys are two parties; a page that knows its own requests' secret prefix sees those as its own."""
    prefix = "0123456789abcdef" * 2
    with _kept_busy(server, prefix + "-1"):
        same, other = _events(server, 1)[-1], _events(server, 1, {"Authorization": "Bearer second-key"})[-1]
        own = _events(server, 1, {"Authorization": "Bearer second-key"}, prefix)[-1]
    assert {(row["id"], row["user"], row["mine"]) for row in same["requests"]} == {(prefix + "-1", "ann", False)}
    for row in other["requests"]:
        assert row["id"] == "" and re.fullmatch("user [0-9a-f]{4}", row["user"]) and not row["mine"]
    assert prefix not in json.dumps(other) and "ann" not in json.dumps([row["user"] for row in other["requests"]])
    assert {(row["user"], row["mine"]) for row in own["requests"]} == {("ann", True)}
    assert server.client.get("/dashboard/events", params={"mine": "0"}).status_code == 400


def test_the_pages_need_no_key_hold_no_data_and_load_nothing_from_elsewhere(server):
    for path in ("/", "/dashboard"):
        page = httpx.get(server.url + path)
        assert page.status_code == 200 and httpx.head(server.url + path).status_code == 200
        assert "http://" not in page.text and "https://" not in page.text
        assert "default-src 'self'" in page.headers["content-security-policy"]
        for name in re.findall(r'"(static/[^"]*)"', page.text):
            assert httpx.get(f"{server.url}/{name}").status_code == 200, name
    assert httpx.get(f"{server.url}/static/secret.js").status_code == 404


def test_the_colours_are_those_of_the_reports():
    script, sheet = (STATIC / "map.js").read_text(), (STATIC / "pages.css").read_text()
    shades = re.findall(r'"(#\w{6})"', script[: script.index("CLASSES")])
    assert shades == list(SHADES)
    for name, look in CLASS_LOOKS.items():
        assert name == "free" or look.color in re.search(rf"^\.{name} {{.*$", sheet, re.M)[0]
        assert f"{name}: " in script and f'"{look.label}"' in script


def _ready(browser: Browser, server: RunningServer, path: str, key: str = "test-key") -> None:
    browser.open(f"{server.url}{path}#key={key}")
    browser.wait_for('document.getElementById("state")?.textContent === "live"', 60)


@pytest.mark.skipif(BROWSER is None, reason="no chromium here")
def test_the_pages_in_a_browser(server, tmp_path):
    colored = """(() => {
        const c = document.querySelector("#map canvas");
        const d = c.getContext("2d").getImageData(0, 0, c.width, c.height).data;
        const seen = new Set();
        for (let i = 0; i < d.length; i += 4) if (d[i + 3]) seen.add(d[i] << 16 | d[i + 1] << 8 | d[i + 2]);
        return seen.size;
    })()"""
    with Browser(tmp_path) as browser:
        browser.open(f"{server.url}/dashboard")
        browser.wait_for('document.getElementById("login-text")?.textContent === "This server asks for an API key."')
        for key, answer in (("wrong", "not accept"), ("schlüssel", "not accept"), ("test-key", "")):
            browser.evaluate(
                f'document.getElementById("key").value = "{key}"; document.querySelector("form").requestSubmit()'
            )
            if answer:
                browser.wait_for(f'document.getElementById("login-text").textContent.includes("{answer}")')
        with _kept_busy(server):
            browser.wait_for('document.getElementById("state").textContent === "live"')
            assert browser.evaluate('document.getElementById("login").hidden')
            browser.wait_for(f"{colored} >= 3")  # axis, free, and at least two requests
            browser.wait_for("document.querySelectorAll('#rows tr').length >= 1")
            browser.wait_for("document.querySelectorAll('canvas').length === 4")  # the map and three charts
            assert browser.evaluate('document.getElementById("about").textContent').endswith(
                "paged_prefix × chunked · float32"
            )
        browser.wait_for("document.querySelector('[data-name=running] .value').textContent === '0'")
        server.complete()
        browser.wait_for("document.querySelector('[data-name=\"time to first token\"] .value').textContent !== '–'")

        _ready(browser, server, "/")
        browser.wait_for("document.getElementById('model').options.length === 1")
        ask = 'document.getElementById("prompt").value = "Tell me."; document.getElementById("compose").requestSubmit()'
        browser.evaluate(ask)
        browser.wait_for("document.querySelector('.message.assistant .meta')?.textContent.includes('tokens')")
        browser.wait_for("document.getElementById('slots').textContent.startsWith('the last request had')")
        # A long one is stopped; its slots come back.
        browser.evaluate(
            'document.getElementById("kind").value = "text"; document.getElementById("max_tokens").value = 400;' + ask
        )
        browser.wait_for("document.querySelector('.message.writing .text')?.textContent.length > 0 || "
                         "document.getElementById('stop').hidden")  # fmt: skip
        browser.evaluate("document.getElementById('stop').click()")
        browser.wait_for("document.getElementById('stop').hidden")
        server.wait_idle()
        # What the server refuses is said, and the text stays to be sent again.
        browser.evaluate('document.getElementById("max_tokens").value = 100000;' + ask)
        browser.wait_for("document.querySelector('.meta.error')?.textContent.includes('max')")
        assert browser.evaluate("document.getElementById('prompt').value") == "Tell me."
        for path in ("/", "/dashboard"):
            browser.call("Emulation.setDeviceMetricsOverride", width=390, height=800, deviceScaleFactor=1, mobile=True)
            _ready(browser, server, path)
            assert browser.evaluate("document.documentElement.scrollWidth") <= 390
        assert browser.problems == []
        assert {url.split("/")[2] for url in browser.requests if url.startswith("http")} == {server.url.split("/")[2]}


@pytest.mark.skipif(BROWSER is None, reason="no chromium here")
def test_a_lost_connection_dims_the_numbers(server, tmp_path):
    """Silence is noticed, not only a closed connection: the processes are stopped, and their sockets stay open."""
    with Browser(tmp_path) as browser:
        _ready(browser, server, "/dashboard")
        browser.evaluate("""window.dimmed = 0; const from = performance.now(); new MutationObserver(() => {
            if (document.body.classList.contains("stale")) window.dimmed ||= performance.now();
        }).observe(document.body, {attributes: true})""")
        fetched = "performance.getEntriesByType('resource').length"
        assert browser.evaluate(fetched) > 0
        processes = [server.process.pid, *(child.pid for child in server.children())]
        try:
            for pid in processes:
                _signal(pid, signal.SIGSTOP)
            browser.wait_for("window.dimmed > 0", 60)
            assert browser.evaluate("document.getElementById('state').textContent") == "connection lost"
            browser.wait_for("getComputedStyle(document.querySelector('.live-data')).opacity !== '1'")  # it fades
        finally:
            for pid in processes:
                _signal(pid, signal.SIGCONT)
        browser.wait_for("!document.body.classList.contains('stale')", 60)
    # The bound itself is the script's: silence is looked for more often than it may last.
    script = (STATIC / "feed.js").read_text()
    assert int(re.search(r"SILENCE = (\d+)", script)[1]) + 200 < 2000 and "}, 200);" in script


def _signal(pid: int, number: int) -> None:

    os.kill(pid, number)
