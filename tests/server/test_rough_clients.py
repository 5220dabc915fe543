"""Clients that hang up, never read, or come in crowds: slots are freed, others are served.

The numbers are the items of the reliability suite (docs/serving.md).
"""

from __future__ import annotations

import asyncio
import json
import socket
import struct
import threading

import httpx
import pytest
from server_footprint import loop_is_not_held_up
from server_harness import PATIENCE, STUB, RunningServer, stream_events
from waiting import wait_for

LONG = {"prompt": [20] * 16, "max_tokens": 400, "ignore_eos": True}


def _send(server: RunningServer, body: dict, receive_buffer: int = 0) -> socket.socket:
    """Send a request and return the socket, unread."""
    data = json.dumps(body).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer test-key\r\nContent-Length: {len(data)}\r\n"
    )
    sock = socket.socket()
    if receive_buffer:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    sock.settimeout(PATIENCE)
    sock.connect(("127.0.0.1", server.port))
    sock.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + data)
    return sock


def _running(server: RunningServer) -> float:
    metrics = server.metrics()
    return metrics["vllm:num_requests_running"] + metrics["vllm:num_requests_waiting"]


def _num_whole(server: RunningServer) -> float:
    """Choices that ran to their length."""
    return server.metrics()["vllm:request_success_total{length}"]


def _wait_running(server: RunningServer, count: int) -> None:
    wait_for(lambda: _running(server) >= count, f"{count} do not run or wait")


@pytest.mark.parametrize("kind", ("stream", "whole", "n=4", "several prompts", "at once"))
def test_29_a_disconnect_frees_the_slots(stub, kind):
    more: dict = {
        "stream": {"stream": True},
        "whole": {},
        "n=4": {"n": 4, "temperature": 1.0},
        "several prompts": {"prompt": [[20] * 9, [21] * 9], "stream": True},
        "at once": {"prompt": "word " * 400, "max_tokens": 50},
    }[kind]
    whole = _num_whole(stub)
    with stub.held():
        sock = _send(stub, LONG | more)
        if kind != "at once":  # while the body is read, tokenized, or computed
            _wait_running(stub, 1)
        sock.close()
        stub.wait_idle()
    assert _num_whole(stub) == whole  # ended by its client, not by its length
    stub.assert_alive()


def leave_while_queued(server: RunningServer, count: int) -> None:
    """24 streams, of which the pool holds a few; their clients go when `count` have come."""
    socks = [_send(server, LONG | {"stream": True, "prompt": [20] * 100, "max_tokens": 410}) for _ in range(24)]
    _wait_running(server, count)
    for sock in socks:
        sock.close()
    server.wait_idle()


def test_29_a_disconnect_while_queued(stub):
    before = stub.metrics()["vllm:generation_tokens_total"]
    with stub.held():
        leave_while_queued(stub, 24)
    assert stub.metrics()["vllm:generation_tokens_total"] - before < 20 * 410


def test_34_reset_and_half_open_connections(server):
    for _ in range(20):
        sock = _send(server, LONG | {"stream": True})
        sock.recv(64)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        sock.close()  # RST
    half = socket.create_connection(("127.0.0.1", server.port))
    server.wait_idle()
    server.assert_alive()
    half.close()


def test_30_many_that_give_up_and_then_one(stub):
    before = stub.metrics()["vllm:generation_tokens_total"]

    async def run() -> None:
        async with httpx.AsyncClient(
            base_url=stub.url, headers=stub.headers, limits=httpx.Limits(max_connections=None)
        ) as client:

            async def impatient() -> None:
                with pytest.raises(httpx.TimeoutException):
                    await client.post("/v1/completions", json=LONG | {"max_tokens": 450}, timeout=0.5)

            await asyncio.gather(*(impatient() for _ in range(200)))

    with stub.held():
        asyncio.run(run())
        stub.wait_idle()
    assert stub.complete().status_code == 200
    # Nobody computed to the end what nobody waited for.
    assert stub.metrics()["vllm:generation_tokens_total"] - before < 100 * 450


def test_32_slow_readers_cost_nobody_anything():
    """50 streams of 8 choices whose readers take nothing: another stream is not kept waiting for them, nor is memory.

    A front that waited for one of them would give the other stream nothing more, or do its work at the loop's expense.
    """
    server = RunningServer("--step-time", "0.05", module=STUB)
    socks: list[socket.socket] = []
    body = {"prompt": [20], "max_tokens": 60, "ignore_eos": True, "stream": True, "return_token_ids": True}
    try:
        slow = {"prompt": [20], "max_tokens": 8000, "n": 8, "ignore_eos": True, "stream": True}
        socks += [_send(server, slow, receive_buffer=4096) for _ in range(50)]
        _wait_running(server, 400)
        front = server.front()
        memory = front.memory_info().rss
        with loop_is_not_held_up(server), server.client.stream("POST", "/v1/completions", json=body) as response:
            events = [json.loads(event) for event in stream_events(response) if event != "[DONE]"]
        tokens = [choice["token_ids"] for event in events for choice in event["choices"] if "token_ids" in choice]
        assert sum(map(len, tokens)) == 60
        assert len([ids for ids in tokens if ids]) > 1  # as they came; a busy machine merges some
        # 400 choices lag by as many integers as the other stream has tokens.
        assert front.memory_info().rss - memory < 32 << 20
        wait_for(lambda: _running(server) == 400, "not all of them go on")
        while socks:
            socks.pop().close()
        server.wait_idle()
        assert server.complete([20]).status_code == 200
    finally:
        for sock in socks:
            sock.close()
        server.stop()


def test_32_what_a_slow_reader_was_sent_is_whole(stub):
    slow = [_send(stub, LONG | {"stream": True, "n": 4, "temperature": 1.0, "max_tokens": 100}) for _ in range(3)]
    stub.wait_idle()  # they run to their end, merged into the sockets' buffers
    for sock in slow:
        data = b""
        while b"data: [DONE]" not in data:
            chunk = sock.recv(1 << 16)
            assert chunk, "a stream ended without [DONE]"
            data += chunk
        assert data.count(b'"finish_reason":"length"') == 4
        sock.close()


def test_33_slow_bodies_hold_nobody_up(server):
    head = (
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer test-key\r\nContent-Length: 1000\r\n\r\n{"
    )
    socks = []
    for _ in range(200):
        sock = socket.create_connection(("127.0.0.1", server.port))
        sock.sendall(head)
        socks.append(sock)
    server.assert_alive()
    for sock in socks:
        sock.setblocking(False)
        with pytest.raises(BlockingIOError):  # not even refused yet: all of them were there meanwhile
            sock.recv(1)
        sock.close()


def test_32_a_client_that_never_reads_is_ended():
    server = RunningServer("--step-time", "0.002", "--set", "max_stream_lag=64", module=STUB)
    try:
        body = {"prompt": [20], "max_tokens": 8000, "n": 64, "ignore_eos": True, "stream": True}
        sock = _send(server, body, receive_buffer=4096)

        def is_ended() -> float:
            assert httpx.get(f"{server.url}/health", timeout=PATIENCE).status_code == 200
            return server.metrics()["kvarena:slow_reader_aborts_total"]

        wait_for(is_ended, "the slow reader was not ended")
        server.wait_idle()
        # The one that asks.
        wait_for(lambda: server.metrics()["kvarena:open_requests"] == 1, "its connection was not cut")
        assert server.complete([20]).status_code == 200
        sock.close()
    finally:
        server.stop()


def test_37_oversubscribed_pool_gives_the_unloaded_outputs(server):
    """Three times what the pool holds: all finish, with the tokens that each gets alone."""
    body = {"max_tokens": 60, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    prompts = [[100 + i] * 40 for i in range(60)]
    alone = [server.post("/v1/completions", body | {"prompt": prompts[i]}).json() for i in (0, 29, 59)]

    async def run() -> list[dict]:
        async with httpx.AsyncClient(base_url=server.url, headers=server.headers, timeout=PATIENCE) as client:
            answers = await asyncio.gather(
                *(client.post("/v1/completions", json=body | {"prompt": prompt}) for prompt in prompts)
            )
            return [answer.json() for answer in answers]

    together = asyncio.run(run())
    assert all(answer["choices"][0]["finish_reason"] == "length" for answer in together)
    for answer, index in zip(alone, (0, 29, 59), strict=True):
        assert together[index]["choices"][0]["token_ids"] == answer["choices"][0]["token_ids"]
    server.wait_idle()


def test_36_40_a_crowd_of_300_streams_loses_nothing(stub):
    results: list[bool] = []

    async def run() -> None:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(
            base_url=stub.url, headers=stub.headers, timeout=PATIENCE, limits=limits
        ) as client:

            async def one(i: int) -> None:
                body = {"prompt": [20 + i % 7] * 4, "max_tokens": 6, "ignore_eos": True, "stream": True}
                async with client.stream("POST", "/v1/completions", json=body) as response:
                    if response.status_code == 503:
                        assert response.headers["retry-after"]
                        return
                    lines = [line async for line in response.aiter_lines() if line]
                    results.append(lines[-1] == "data: [DONE]" and '"finish_reason":"length"' in lines[-2])

            await asyncio.gather(*(one(i) for i in range(300)))

    asyncio.run(run())
    assert all(results)
    assert len(results) >= 250
    stub.wait_idle()
    stub.assert_alive()


@pytest.mark.slow
def test_40_two_thousand_connections():
    server = RunningServer("--step-time", "0.05", module=STUB)
    done: list[bytes] = []

    def batch() -> None:
        socks = [
            _send(server, {"prompt": [20], "max_tokens": 40, "ignore_eos": True, "stream": True}) for _ in range(250)
        ]
        for sock in socks:
            sock.settimeout(PATIENCE)
            data = b""
            while chunk := sock.recv(1 << 16):
                data += chunk
                if b"data: [DONE]" in data:
                    break
            done.append(data[-40:])
            sock.close()

    try:
        threads = [threading.Thread(target=batch) for _ in range(8)]
        with loop_is_not_held_up(server, 1.0):
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        assert len(done) == 2000
        assert all(b"[DONE]" in end for end in done)
        server.wait_idle()
    finally:
        server.stop()


def test_stream_and_whole_text_agree_byte_for_byte(server):
    body = {"prompt": "\u4f60\u597d \u2615", "max_tokens": 60, "temperature": 1.5, "seed": 11, "ignore_eos": True}
    whole = server.post("/v1/completions", body).json()["choices"][0]["text"]
    with server.client.stream("POST", "/v1/completions", json=body | {"stream": True}) as response:
        events = [json.loads(line) for line in stream_events(response) if line != "[DONE]"]
    assert "".join(event["choices"][0]["text"] for event in events) == whole
