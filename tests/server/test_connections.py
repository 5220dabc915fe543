"""What a client without a key may send: heads that do not end are cut off, before they fill the memory.

The numbers are the items of the reliability suite (docs/serving.md).
"""

from __future__ import annotations

import contextlib
import json
import socket
import time
from collections.abc import Iterator

import pytest
from server_footprint import Footprint
from server_harness import PATIENCE, RunningServer

GET = b"GET /health HTTP/1.1\r\nHost: x\r\n"
CHUNKED = b"POST /tokenize HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
MIB = 1 << 20
UNREAD = "did not read its answer in time"


@pytest.mark.parametrize(
    ("begin", "more"),
    (
        (b"GET /", b"a" * MIB),
        (b"GET /health?", b"a" * MIB),
        (GET + b"X: ", b"a" * MIB),
        (GET, b"X: aaaaaaaaaaaa\r\n" * (MIB // 17)),
        (CHUNKED + b"2;", b"a" * MIB),
        (CHUNKED + b"0\r\n", b"X: aaaaaaaaaaaa\r\n" * (MIB // 17)),
    ),
    ids=("path", "query", "one header", "headers", "chunk extension", "trailers"),
)
def test_26_a_head_without_end_is_cut_off(server, begin, more):
    before = Footprint.of(server)
    with socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE) as sock:
        sock.sendall(begin)
        with pytest.raises(ConnectionError):
            for _ in range(64):
                sock.sendall(more)
    assert Footprint.of(server).rss - before.rss < 16 * MIB
    server.assert_alive()


def _answer(sock: socket.socket, seconds: float) -> bytes:
    sock.settimeout(seconds)
    data = b""
    while chunk := sock.recv(1 << 16):
        data += chunk
    return data


@pytest.fixture(scope="module")
def strict() -> Iterator[RunningServer]:
    """One that gives its clients a second."""
    server = RunningServer(
        "--step-time", "0.02", "--set", "body_timeout=1", module="kvarena.experiments.serving.stub_engine"
    )
    yield server
    assert server.stop() == 0


def _request(body: dict, path: str = "/v1/completions") -> bytes:
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer test-key\r\nContent-Length: {len(data)}\r\n\r\n"
    return head.encode() + data


def test_33_a_head_that_does_not_arrive_is_given_up(strict):
    body = {"prompt": [20], "max_tokens": 80, "ignore_eos": True, "stream": True}
    silent, slow, busy = (socket.create_connection(("127.0.0.1", strict.port)) for _ in range(3))
    busy.sendall(_request(body) + b"GET /health HTTP/1.1\r\nX-Beg")
    for piece in (b"GET /hea", b"lth HTTP/1.1\r\n", b"Host: x\r\n"):
        slow.sendall(piece)
        time.sleep(0.2)
    for sock in (silent, slow):
        answer = _answer(sock, 60)
        assert answer.startswith(b"HTTP/1.1 408 ")
        assert b'"code":"request_timeout"' in answer
    # A stream goes on, whatever its client sends behind it: 2 s of tokens, then the half request is given up.
    assert b"data: [DONE]" in _answer(busy, 60)
    assert strict.complete([20]).status_code == 200


@pytest.mark.parametrize("kind", ("whole", "several on one connection", "stream"))
def test_33_an_answer_that_nobody_reads_is_given_up(strict, kind):
    """Megabytes that the client leaves in the server: its connection is cut, and one that reads gets all."""
    many = {"prompt": "word " * 400_000, "return_token_strs": True}
    stream = {"prompt": ["word " * 4000] * 300, "echo": True, "max_tokens": 1, "stream": True}
    sent = _request(stream) if kind == "stream" else _request(many, "/tokenize") * (1 if kind == "whole" else 3)
    before = strict.log.count(UNREAD)
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.connect(("127.0.0.1", strict.port))
        sock.sendall(sent)
        deadline = time.monotonic() + PATIENCE
        while strict.log.count(UNREAD) == before:
            assert time.monotonic() < deadline, "the connection is still open"
            time.sleep(0.1)
        # What the kernel had taken may still come, then the end; a client sees that the answer is not whole.
        with contextlib.suppress(ConnectionResetError):
            assert not _answer(sock, PATIENCE).endswith((b"}", b"0\r\n\r\n"))
    assert strict.post("/tokenize", many).json()["count"] == 400_001
    strict.wait_idle(60)
