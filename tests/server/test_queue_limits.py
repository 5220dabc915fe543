"""What the engine takes in: a full queue says so and recovers, and what can never fit is refused at once.

The numbers are the items of the reliability suite (docs/serving.md).
"""

from __future__ import annotations

import threading
import time

import httpx
from server_harness import PATIENCE, STUB, RunningServer
from test_rough_clients import _running, _send, _wait_running
from test_server_faults import Reader
from waiting import wait_for


def _small_queue() -> RunningServer:
    """Two prompts of 300 tokens fill the pool, and four requests the queue."""
    settings = ("--step-time", "0.01", "--num-blocks", "40", "--set", "max_num_queued_requests=4")
    return RunningServer(*settings, module=STUB)


def test_20_larger_than_the_pool_is_refused_at_once_and_blocks_nobody():
    server = RunningServer("--num-blocks", "10", module=STUB)
    try:
        with server.held():
            reader = Reader(server, max_tokens=100)
            refused = server.post("/v1/completions", {"prompt": [20] * 200, "max_tokens": 4})
            assert refused.status_code == 400
            assert "160" in refused.json()["error"]["message"]
            assert reader.is_alive()  # it waits for none of what runs
        reader.join(PATIENCE)
        assert '"finish_reason":"length"' in reader.lines[-2]
        assert server.complete([20]).status_code == 200
        # A chat without max_tokens gets what fits.
        chat = server.post("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi"}]})
        assert chat.status_code == 200
        assert chat.json()["usage"]["total_tokens"] <= 160
    finally:
        server.stop()


def test_36_a_full_queue_answers_503_and_recovers():
    server = _small_queue()
    try:
        results: list[httpx.Response] = []
        body = {"prompt": [20] * 300, "max_tokens": 60, "ignore_eos": True}
        url, options = f"{server.url}/v1/completions", {"headers": server.headers, "timeout": PATIENCE}
        ask = lambda: results.append(httpx.post(url, json=body, **options))  # noqa: E731
        threads = [threading.Thread(target=ask) for _ in range(16)]
        with server.held():  # the pool and the queue are full before any comes to its end
            reader = Reader(server, max_tokens=200)
            for thread in threads:
                thread.start()
            wait_for(lambda: any(response.status_code == 503 for response in results), "none is refused")
        for thread in threads:
            thread.join()
        assert {response.status_code for response in results} == {200, 503}
        refused = next(response for response in results if response.status_code == 503)
        assert refused.headers["retry-after"]
        assert refused.json()["error"]["code"] == "queue_full"
        reader.join(PATIENCE)
        server.wait_idle()
        assert server.complete([20]).status_code == 200
    finally:
        server.stop()


def test_36_a_request_whose_second_prompt_is_refused_leaves_nothing_of_its_first():
    server = _small_queue()
    body = {"prompt": [20] * 300, "max_tokens": 300, "ignore_eos": True}
    try:
        with server.held():
            socks = [_send(server, body) for _ in range(5)]
            _wait_running(server, 5)
            together = server.post("/v1/completions", body | {"prompt": [[20] * 300] * 3})
            assert together.status_code == 503
            assert together.json()["error"]["code"] == "queue_full"
            time.sleep(1.0)  # the gauges are written after a step
            assert _running(server) == 5
            for sock in socks:
                sock.close()
        server.wait_idle()
        assert server.complete([20]).status_code == 200
    finally:
        server.stop()


def test_36_more_choices_than_the_queue_holds_are_the_requests_fault(server):
    answer = server.complete(["x"] * 101, n=3, temperature=1.0)
    assert answer.status_code == 400  # a client would try a 503 again
    assert "more than 300 choices" in answer.json()["error"]["message"]
    assert server.complete(["x"] * 75, n=4, temperature=1.0, max_tokens=1).status_code == 200
