"""What a client without a key may send: heads that do not end are cut off, before they fill the memory.

The numbers are the items of the reliability suite (docs/serving.md).
"""

from __future__ import annotations

import json
import socket
import time

import pytest
from server_footprint import Footprint
from server_harness import PATIENCE, RunningServer

GET = b"GET /health HTTP/1.1\r\nHost: x\r\n"
CHUNKED = b"POST /tokenize HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
MIB = 1 << 20


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


def test_33_a_head_that_does_not_arrive_is_given_up():
    server = RunningServer("--step-time", "0.02", "--set", "body_timeout=1", module="experiments.serving.stub_engine")
    body = json.dumps({"prompt": [20], "max_tokens": 80, "ignore_eos": True, "stream": True}).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer test-key\r\nContent-Length: {len(body)}\r\n"
    )
    try:
        silent, slow, busy = (socket.create_connection(("127.0.0.1", server.port)) for _ in range(3))
        busy.sendall(head.encode() + b"\r\n" + body + b"GET /health HTTP/1.1\r\nX-Beg")
        for piece in (b"GET /hea", b"lth HTTP/1.1\r\n", b"Host: x\r\n"):
            slow.sendall(piece)
            time.sleep(0.2)
        for sock in (silent, slow):
            answer = _answer(sock, 5)
            assert answer.startswith(b"HTTP/1.1 408 ")
            assert b'"code":"request_timeout"' in answer
        # A stream goes on, whatever its client sends behind it: 2 s of tokens, then the half request is given up.
        assert b"data: [DONE]" in _answer(busy, 10)
        assert server.complete([20]).status_code == 200
    finally:
        assert server.stop() == 0
