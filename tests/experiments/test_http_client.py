"""What the HTTP client takes for a token, a gap and an end, whatever chunks a server sends, and when."""

import asyncio
import json
import math
from types import SimpleNamespace

import httpx
import numpy as np
import pytest

from kvarena.engine.request import Request, SamplingParams
from kvarena.experiments.load import http_client, http_driver
from kvarena.experiments.load.http_client import HttpServer
from kvarena.experiments.load.http_driver import HttpDriver
from kvarena.reports.analysis.latency import request_latencies

DONE = "[DONE]"


def text(value, reason=None, **more):
    return {"choices": [{"text": value, "finish_reason": reason} | more]}


def ids(*tokens, value="x", reason=None):
    return text(value, reason, token_ids=list(tokens))


def usage(count):
    return {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": count}}


class Stream(httpx.AsyncByteStream):
    """Events that each come at their second; `clock` stands there when they do."""

    def __init__(self, events, clock, end):
        self.events, self.clock, self.end = events, clock, end

    async def __aiter__(self):
        for when, *events in self.events:
            self.clock.now = when
            lines = [f"data: {event if isinstance(event, str) else json.dumps(event)}" for event in events]
            yield ("\n\n".join(lines) + self.end).encode()


def answer_of(monkeypatch, *events, end="\n\n"):
    """The client's answer, its row, and how many tokens' times the driver found to be open."""
    clock = SimpleNamespace(now=0.0)
    for module in (http_client, http_driver):
        monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: clock.now))

    async def ask():
        transport = httpx.MockTransport(lambda _: httpx.Response(200, stream=Stream(events, clock, end)))
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
            server = HttpServer(client, "m", {})
            driver = HttpDriver(server, True, lambda _: None)
            req = Request("r", [1, 2, 3], SamplingParams(max_tokens=4), arrival_time=0.0)
            await driver._send(req)
            [row] = driver.rows
            return row, driver.token_counts

    return asyncio.run(ask())


# events -> first token, last token, finish; times of chunks; tokens, tokens of the first chunk; what is said
SERVERS = {
    "a token a chunk": (
        [(1, ids(7)), (2, ids(8)), (3, ids(9, reason="length")), (4, usage(3), DONE)],
        (1, 3, 3), [1, 2, 3], (3, 1), (),
    ),
    "an empty chunk at once, as of a chat's role": (
        [(0, text("")), (0.1, text(None)), (1, text("x")), (2, text("x")), (2, text("", "stop"), usage(2), DONE)],
        (1, 2, 2), [1, 2], (2, 1), (),
    ),
    "signs of life": (
        [(0, text("")), (1, text("x")), (2, text("")), (3, text("x")), (3, text("", "stop"), usage(2), DONE)],
        (1, 3, 3), [1, 3], (2, 1), (),
    ),
    "nothing but its end": ([(2, text("", "stop"), usage(0), DONE)], (None, None, 2), [], (0, 0), ()),
    "an empty chunk and its end": (
        [(0, text("")), (2, text("", "stop"), usage(0), DONE)], (None, None, 2), [], (0, 0), (),
    ),
    "ids without text: half a character": (
        [(1, ids(7, value="")), (2, ids(8, value="é")), (2, text("", "length"), usage(2), DONE)],
        (1, 2, 2), [1, 2], (2, 1), (),
    ),
    "text behind the last id: held back for a stop": (
        [(1, ids(7)), (2, ids(8, value="")), (5, text("rest", "stop")), (5, usage(2), DONE)],
        (1, 2, 5), [1, 2], (2, 1), (),
    ),
    "merged ids": (
        [(1, ids(7, 8, 9)), (3, ids(10, 11, reason="length")), (3, usage(5), DONE)],
        (1, 3, 3), [1, 3], (5, 3), ("merged",),
    ),
    "all in one chunk": (
        [(3, text("xxxx", "length"), usage(4), DONE)], (3, 3, 3), [3], (4, 4), ("other_than_shown", "merged"),
    ),
    "all ids in one chunk": ([(3, ids(1, 2, 3, reason="stop"), usage(3), DONE)], (3, 3, 3), [3], (3, 3), ("merged",)),
    "merged text": (
        [(1, text("x")), (2, text("xxx")), (4, text("", "length"), usage(4), DONE)],
        (1, 4, 4), [1, 2], (4, 1), ("other_than_shown", "merged"),
    ),
    "more chunks than tokens": (
        [(1, text("x")), (2, text("x")), (3, text("x", "stop")), (3, usage(2), DONE)],
        (1, 3, 3), [1, 2, 3], (2, 1), ("other_than_shown",),
    ),
    "no count": (
        [(1, text("x")), (2, text("x", "stop")), (2, DONE)], (1, 2, 2), [1, 2], (2, 1), ("not_stated",),
    ),
    "a late count": (
        [(1, ids(7)), (2, ids(8, reason="length")), (9, usage(2)), (12, DONE)], (1, 2, 2), [1, 2], (2, 1), (),
    ),
    "a late reason": (
        [(1, text("x")), (2, text("x")), (9, text("", "length"), usage(2), DONE)], (1, 2, 9), [1, 2], (2, 1), (),
    ),
    "a late end of the connection": (
        [(1, ids(7)), (2, ids(8, reason="length")), (2, usage(2), DONE), (60, text("more"))],
        (1, 2, 2), [1, 2], (2, 1), (),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SERVERS)
def test_only_tokens_are_timed(name, monkeypatch):
    events, times, chunks, counts, said = SERVERS[name]
    row, found = answer_of(monkeypatch, *events)
    assert row["error"] == ""
    assert (row["first_token_time"], row["last_token_time"], row["finish_time"]) == times
    assert row["token_times"] == chunks
    assert (row["num_output_tokens"], row["num_first_tokens"]) == counts
    assert {name for name, number in found.items() if number} == set(said)
    ttft, tpot = latencies_of(row)
    assert ttft == (times[0] if chunks else None)
    later = counts[0] - counts[1]
    assert tpot == ((times[1] - times[0]) / later if later else None)


def latencies_of(row):
    """TTFT and TPOT as reports work them out; None: not known."""
    scalars = {key: value for key, value in row.items() if not isinstance(value, list)}
    columns = {key: np.array([np.nan if value is None else value]) for key, value in scalars.items()}
    found = request_latencies(SimpleNamespace(requests=columns, finished=np.array([True])))
    values = (float(found[key][0]) for key in ("ttft_seconds", "tpot_seconds"))
    return tuple(None if math.isnan(value) else value for value in values)


def test_the_last_line_may_lack_its_end(monkeypatch):
    row, _ = answer_of(monkeypatch, (1, text("x", "stop")), (1, usage(1)), (1, DONE), end="\n")
    assert row["error"] == ""
    row, _ = answer_of(monkeypatch, (1, text("x", "stop"), usage(1), DONE), end="")
    assert (row["error"], row["num_output_tokens"]) == ("", 1)


@pytest.mark.parametrize(
    "event",
    [{"usage": {"completion_tokens": 2**31}}, {"usage": {"completion_tokens": -1}}, ids(2**31), text(5),
     {"usage": {"prompt_tokens_details": {"cached_tokens": 10**12}}}],
)  # fmt: skip
def test_a_count_that_no_file_holds_is_a_failed_request(event, monkeypatch):
    """Writing the run's files failed on it, and all answers were lost."""
    row, _ = answer_of(monkeypatch, (1, text("x")), (2, event), (3, text("", "stop"), DONE))
    assert "is no completion" in row["error"]
    assert row["finish_reason"] == "error"
