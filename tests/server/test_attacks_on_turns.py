"""The reliability suite's attacks (docs/serving.md) on /v1/responses and /v1/messages, and on chats with tools.

What is right there is a form of its own for each API: of errors, of streams and of their ends.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import socket
import struct
import threading
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from server_footprint import loop_is_not_held_up
from server_harness import PATIENCE, RunningServer
from test_bad_requests import CASES, CHAT, RAW

COMPLETIONS = "/v1/completions"
RESPONSES, MESSAGES, COUNT = "/v1/responses", "/v1/messages", "/v1/messages/count_tokens"
HELLO = [{"role": "user", "content": "Hello!"}]
SCHEMA = {"type": "object", "properties": {"x": {"enum": [1, 2]}}, "required": ["x"], "additionalProperties": False}
JSON = {"content-type": "application/json"}
# A request of each kind whose answer does not end by itself.
ENDLESS = {
    "response": (RESPONSES, {"input": "Hello!", "max_output_tokens": 400, "ignore_eos": True}),
    "message": (MESSAGES, {"messages": HELLO, "max_tokens": 400, "ignore_eos": True}),
    "called": (RESPONSES, {
        "input": "Hello!", "max_output_tokens": 400, "tool_choice": "required",
        "tools": [{"type": "function", "name": "f", "parameters": {
            "type": "object", "properties": {"x": {"type": "array", "items": {"enum": [1, 2]}, "minItems": 300}},
            "required": ["x"], "additionalProperties": False}}]}),
}  # fmt: skip
LAST = {RESPONSES: "response.incomplete", MESSAGES: "message_stop"}


def assert_error(path: str, response: httpx.Response, status: int) -> None:
    """It has this status, and the form of its API's errors."""
    assert response.status_code == status, response.text[:500]
    body = response.json()
    assert (body.get("type") == "error") == path.startswith(MESSAGES)
    assert body["error"]["message"] and body["error"]["type"] and "Traceback" not in response.text


def as_response(chat: dict) -> dict:
    """A chat's body as one of /v1/responses, with whatever is wrong in it."""
    names = {"messages": "input", "max_tokens": "max_output_tokens", "max_completion_tokens": "max_output_tokens"}
    return {names.get(key, key): value for key, value in chat.items()}


ODD = ({"a": 1}, [1], 7, True, 1.5, "x", "\x00")
PLACES = [
    (RESPONSES, lambda odd: {"input": [{"type": odd, "role": "user", "content": "x"}]}),
    (RESPONSES, lambda odd: {"input": [{"role": odd, "content": "x"}]}),
    (RESPONSES, lambda odd: {"input": [{"role": "user", "content": [{"type": odd, "text": "x"}]}]}),
    (RESPONSES, lambda odd: {"input": "x", "tools": [{"type": "function", "name": odd}]}),
    (RESPONSES, lambda odd: {"input": "x", "tools": [{"type": "function", "function": odd}]}),
    (RESPONSES, lambda odd: {"input": "x", "tool_choice": {"type": odd}}),
    (RESPONSES, lambda odd: {"input": "x", "tool_choice": {"type": "allowed_tools", "tools": [{"name": odd}]},
                             "tools": [{"type": "function", "name": "f"}]}),
    (RESPONSES, lambda odd: {"input": "x", "text": {"format": {"type": odd}}}),
    (MESSAGES, lambda odd: {"max_tokens": 1, "messages": [{"role": "user", "content": [{"type": odd, "text": "x"}]}]}),
    (MESSAGES, lambda odd: {"max_tokens": 1, "messages": HELLO, "tool_choice": {"type": odd}}),
    (MESSAGES, lambda odd: {"max_tokens": 1, "messages": HELLO, "tools": [{"type": odd, "name": "f"}]}),
    (MESSAGES, lambda odd: {"max_tokens": 1, "messages": HELLO, "tools": [{"name": odd, "input_schema": {}}]}),
    (MESSAGES, lambda odd: {"max_tokens": 1, "messages": HELLO, "system": [{"type": odd}]}),
    (MESSAGES, lambda odd: {"max_tokens": 1, "messages": [{"role": "user", "content": [
        {"type": "tool_result", "tool_use_id": odd, "content": odd}]}]}),
]  # fmt: skip


@pytest.mark.parametrize("place", range(len(PLACES)))
def test_anything_may_stand_where_a_kind_or_a_name_is_asked_for(server, place):
    path, made = PLACES[place]
    answers = [(odd, server.post(path, made(odd))) for odd in ODD]
    assert {answer.status_code for _, answer in answers} <= {200, 400}, [(odd, one.text) for odd, one in answers]


CHATS = [(name, body, status) for name, path, body, status in CASES if path == CHAT]


@pytest.mark.parametrize(("body", "status"), [case[1:] for case in CHATS], ids=[case[0] for case in CHATS])
def test_what_is_wrong_in_a_chat_is_wrong_in_the_others(server, body, status):
    """400 there too, or taken where that API knows the name: never a 500."""
    for path, made in ((RESPONSES, as_response(body)), (MESSAGES, {"max_tokens": 2} | body), (COUNT, body)):
        answer = server.post(path, made)
        if answer.status_code != 200:
            assert_error(path, answer, status)


@pytest.mark.parametrize(("data", "status"), [case[1:] for case in RAW], ids=[case[0] for case in RAW])
def test_raw_body(server, data, status):
    for path in (RESPONSES, MESSAGES, COUNT, "/invocations"):
        assert_error(path, server.client.post(path, content=data, headers=JSON), status)


def test_2_25_26_28_wrong_types_keys_sizes_and_methods(server):
    for path in (RESPONSES, MESSAGES, COUNT):
        assert_error(path, server.client.post(path, content=b"x=y", headers={"content-type": "text/plain"}), 415)
        assert_error(path, server.client.post(path, content=b"x" * (20 << 20), headers=JSON), 413)
        for headers in ({}, {"x-api-key": "wrong"}, {"x-api-key": "TEST-KEY"}, {"Authorization": "Bearer wrong"}):
            assert_error(path, httpx.post(server.url + path, json={}, headers=headers), 401)
        for method in ("GET", "PUT", "DELETE", "PATCH"):
            wrong = server.client.request(method, path)
            assert_error(path, wrong, 405)
            assert "POST" in wrong.headers["allow"]
    for path in (f"{RESPONSES}/resp_{'0' * 32}", f"{RESPONSES}/x%00y", f"{RESPONSES}/{'x' * 300}"):
        assert_error(path, server.client.get(path), 404)
        assert_error(path, server.client.delete(path), 404)
    server.assert_alive()


MANY = {
    "items wrong": (RESPONSES, b'{"input": ', b"1", b"}"),
    "items": (RESPONSES, b'{"input": ', b'{"role": "user", "content": "a"}', b"}"),
    "parts": (RESPONSES, b'{"input": [{"role": "user", "content": ', b'"a"', b"}]}"),
    "parts of turns": (
        RESPONSES, b'{"input": ', b'{"role": "user", "content": [' + b",".join([b'"a"'] * 16384) + b"]}", b"}",
    ),
    "outputs": (
        RESPONSES, b'{"input": ',
        b'{"type": "function_call_output", "call_id": "c", "output": [' + b",".join([b'"a"'] * 9000) + b"]}", b"}",
    ),
    "results": (
        MESSAGES, b'{"max_tokens": 1, "messages": [{"role": "user", "content": ',
        b'{"type": "tool_result", "tool_use_id": "c", "content": ['
        + b",".join([b'{"type":"text","text":""}'] * 999) + b"]}", b"}]}",
    ),
    "parts of chats": (
        CHAT, b'{"messages": ', b'{"role": "user", "content": [' + b",".join([b'"a"'] * 16384) + b"]}", b"}",
    ),
    "calls of turns": (
        CHAT, b'{"messages": ', b'{"role": "assistant", "tool_calls": [' + b",".join([b"{}"] * 1024) + b"]}", b"}",
    ),
    "prompts": (COMPLETIONS, b'{"prompt": ', b'"a"', b"}"),
    "stop strings": (COMPLETIONS, b'{"prompt": "x", "stop": ', b'"a"', b"}"),
    "stop tokens": (COMPLETIONS, b'{"prompt": "x", "max_tokens": 0, "stop_token_ids": ', b"5", b"}"),
    "allowed": (COMPLETIONS, b'{"prompt": "x", "allowed_token_ids": ', b"5", b"}"),
    "choices": (COMPLETIONS, b'{"prompt": "x", "structured_outputs": {"choice": ', b'"a"', b"}}"),
    "calls": (CHAT, b'{"messages": [{"role": "assistant", "tool_calls": ', b"{}", b"}]}"),
    "functions": (RESPONSES, b'{"input": "x", "tools": ', b'{"type": "function", "name": "f"}', b"}"),
    "blocks": (MESSAGES, b'{"max_tokens": 1, "messages": [{"role": "user", "content": ', b'{"type": "text"}', b"}]}"),
    "tools": (MESSAGES, b'{"max_tokens": 1, "messages": [], "tools": ', b'{"name": "f", "input_schema": {}}', b"}"),
    "system": (MESSAGES, b'{"max_tokens": 1, "messages": [{"role": "user", "content": "x"}], "system": ', b"7", b"}"),
}  # fmt: skip


@pytest.mark.parametrize("kind", MANY)
def test_19_millions_of_values_are_refused_at_once(server, kind):
    path, before, item, after = MANY[kind]
    data = before + b"[" + b",".join([item] * ((15 << 20) // (len(item) + 1))) + b"]" + after
    with loop_is_not_held_up(server, 2.0):
        assert_error(path, server.client.post(path, content=data, headers=JSON), 400)
    server.assert_alive()


def _open(server: RunningServer, path: str, body: dict) -> socket.socket:
    """Send a request; the socket, unread."""
    data = json.dumps(body).encode()
    sock = socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE)
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nx-api-key: test-key\r\nContent-Length: {len(data)}\r\n"
    sock.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + data)
    return sock


@pytest.mark.parametrize("ends", ("closed", "reset"))
def test_29_34_hanging_up_frees_the_slots(server, ends):
    for path, body in ENDLESS.values():
        for stream in (True, False):
            sock = _open(server, path, body | {"stream": stream})
            if stream:
                assert b" 200 " in sock.recv(64)
            if ends == "reset":
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            sock.close()
    server.wait_idle()
    server.assert_alive()


async def _turn(client: httpx.AsyncClient, rng: random.Random) -> None:
    """A stream of either API, whole or left in the middle."""
    path, body = rng.choice((ENDLESS["response"], ENDLESS["message"]))
    length, leaves = rng.randint(4, 30), rng.random() < 0.3
    body = body | {"stream": True, "max_tokens" if path == MESSAGES else "max_output_tokens": length}
    async with client.stream("POST", path, json=body) as response:
        assert response.status_code == 200
        kinds = []
        async for line in response.aiter_lines():
            kinds += [line.removeprefix("event: ")] if line.startswith("event: ") else []
            if leaves and len(kinds) > 3:
                return
    assert kinds[-1] == LAST[path], kinds[-3:]


def test_31_36_40_a_crowd_of_streams_loses_none(server):
    async def run() -> None:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(
            base_url=server.url, headers=server.headers, timeout=PATIENCE, limits=limits
        ) as client:
            await asyncio.gather(*(_turn(client, random.Random(i)) for i in range(120)))

    asyncio.run(run())
    server.wait_idle()
    server.assert_alive()


def test_32_what_a_slow_reader_was_sent_is_whole(server):
    """Merged events are numbered and add up all the same."""
    request = {"input": "Hello!", "max_output_tokens": 300, "ignore_eos": True, "temperature": 0}
    whole = server.post(RESPONSES, request).json()
    with server.client.stream("POST", RESPONSES, json=request | {"stream": True}) as response:
        data = b""
        for number, part in enumerate(response.iter_raw(64)):
            data += part
            if number % 40 == 0:
                server.complete()  # others are served meanwhile
    events = [json.loads(line[6:]) for line in data.decode().splitlines() if line.startswith("data: ")]
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    text = "".join(event["delta"] for event in events if event["type"] == "response.output_text.delta")
    assert text == whole["output"][0]["content"][0]["text"]


def test_35_a_response_is_deleted_and_cancelled_by_many_at_once(server):
    for way in ("cancel", "delete"):
        path, body = ENDLESS["response"]
        made = server.post(path, body | {"background": True}).json()["id"]
        url = f"{server.url}{RESPONSES}/{made}" + ("/cancel" if way == "cancel" else "")
        method = "POST" if way == "cancel" else "DELETE"
        with ThreadPoolExecutor(8) as pool:
            asked = [pool.submit(httpx.request, method, url, headers=server.headers) for _ in range(8)]
        answers = [one.result().status_code for one in asked]
        assert len(answers) == 8 and 200 in answers and set(answers) <= {200, 404}, answers
    server.wait_idle()
    server.assert_alive()


class Reader(threading.Thread):
    """Reads a stream to its end."""

    def __init__(self, server: RunningServer, path: str, body: dict) -> None:
        super().__init__(daemon=True)
        self._server, self._path, self._body, self.lines, self.begun = server, path, body, [], threading.Event()
        self.start()
        assert self.begun.wait(PATIENCE)

    def run(self) -> None:
        body = self._body | {"stream": True}
        with (
            httpx.Client(base_url=self._server.url, headers=self._server.headers, timeout=PATIENCE) as client,
            client.stream("POST", self._path, json=body) as response,
        ):
            for line in response.iter_lines():
                self.lines += [line] if line else []
                self.begun.set()

    def end(self) -> list[str]:
        """The kinds of the last events."""
        self.join(PATIENCE)
        return [line.removeprefix("event: ") for line in self.lines if line.startswith("event: ")][-2:]


@pytest.mark.parametrize("fault", ("44-step", "42-kill", "46-drain"))
def test_faults_end_each_stream_in_its_own_form(fault):
    flags = ("--step-time", "0.01", "--fail-token", "777", "--set", "shutdown_timeout=0")
    server = RunningServer(*flags, module="kvarena.experiments.serving.stub_engine")
    pids = server.engine_pid()
    endless = {"max_tokens": 8000, "max_output_tokens": 8000}
    readers = []
    for path, body in (ENDLESS["response"], ENDLESS["message"]):
        body = body | {name: value for name, value in endless.items() if name in body}
        readers.append(Reader(server, path, body))
    if fault == "44-step":
        assert server.post("/v1/completions", {"prompt": [777], "max_tokens": 4}).status_code == 500
    else:
        target = pids if fault == "42-kill" else server.process.pid
        os.kill(target, signal.SIGKILL if fault == "42-kill" else signal.SIGTERM)
    response, message = (reader.end() for reader in readers)
    assert response == ["error", "response.failed"]
    assert message[-1] == "error"
    assert "Traceback" not in "".join(readers[0].lines + readers[1].lines)
    if fault == "44-step":
        server.assert_alive()
        assert server.stop() == 0
    else:
        server.client.close()
        assert server.process.wait(PATIENCE) == (1 if fault == "42-kill" else 0)
