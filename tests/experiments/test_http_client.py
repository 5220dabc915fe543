"""What the HTTP client takes for a token, a gap and an end, whatever chunks a server sends, and when."""

import asyncio
import json
import math
from codecs import BOM_UTF8
from types import SimpleNamespace

import numpy as np
import pytest

from kvarena.engine.request import Request, SamplingParams
from kvarena.experiments.load import http_driver
from kvarena.experiments.load.http_client import Answer, HttpServer
from kvarena.experiments.load.http_driver import HttpDriver
from kvarena.reports.analysis.latency import request_latencies

DONE = "[DONE]"


def text(value, reason=None, **more):
    return {"choices": [{"text": value, "finish_reason": reason} | more]}


def ids(*tokens, value="x", reason=None):
    return text(value, reason, token_ids=list(tokens))


def usage(count):
    return {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": count}}


class Stream:
    """A client whose server sends events that each come at their second."""

    def __init__(self, events, end):
        self.events, self.end = events, end

    async def send(self, method, path, body, answer):
        assert (method, path) == ("POST", "/v1/completions")
        answer.status = 200
        for when, *events in self.events:
            lines = [f"data: {event if isinstance(event, str) else json.dumps(event)}" for event in events]
            if answer.receive(("\n\n".join(lines) + self.end).encode(), when) == 0:
                return


def answer_of(monkeypatch, *events, end="\n\n"):
    """The client's answer, its row, and how many tokens' times the driver found to be open."""
    monkeypatch.setattr(http_driver, "time", SimpleNamespace(perf_counter=lambda: 0.0))
    driver = HttpDriver(HttpServer(Stream(events, end), "m", {}), True, lambda _: None)
    asyncio.run(driver._send(Request("r", [1, 2, 3], SamplingParams(max_tokens=4), arrival_time=0.0)))
    [row] = driver.rows
    return row, driver.token_counts


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


def test_a_client_that_hangs_up_makes_no_failed_request():
    answer = Answer(hang_up_after=1)
    answer.status = 200
    event = b"data: " + json.dumps(text("x")).encode() + b"\n\n"
    assert [answer.receive(event, float(second)) for second in (1, 2)] == [None, 0.0]
    answer.finish()
    assert (answer.is_cut, answer.error, answer.chunk_times) == (True, "", [1.0, 2.0])
    assert (Answer(start=0.5, chunk_times=[1.0, 2.0, 4.0]).wait, answer.gaps) == (0.5, [1.0])


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
def test_events_that_come_in_pieces_are_the_same_events(end):
    stream = BOM_UTF8 + b"".join(
        b"data: " + (event if isinstance(event, bytes) else json.dumps(event).encode()) + end + end
        for event in (text("x"), text("é", "stop"), usage(2), b"[DONE]")
    )
    for size in (1, 2, 7, len(stream)):
        answer = Answer(status=200)
        for at in range(0, len(stream), size):
            answer.receive(stream[at : at + size], float(at))
        answer.finish()
        assert (answer.error, answer.num_tokens, len(answer.chunk_times), answer.finish_reason) == ("", 2, 2, "stop")


@pytest.mark.parametrize("event", [b'{"usage": {"completion_tokens": 1e400}}', b'{"usage": [1]}', b"{", b"5"])
def test_an_event_that_is_no_completion_ends_its_answer_alone(event):
    answer = Answer(status=200)
    assert answer.receive(b"data: " + event + b"\n\n", 1.0) == 0.0
    answer.finish()
    assert answer.error.startswith("an event of the stream is no completion (")
