"""Flags and parameters that only show in what a server does: who is served first, names, dtype, swap, templates."""

from __future__ import annotations

import json
import threading

import httpx
import pytest
from server_harness import PATIENCE, RunningServer
from test_bad_requests import CHAT, COMPLETIONS
from waiting import wait_for

FLAGS = ("--max-model-len", "512", "--num-gpu-blocks-override", "64", "--max-num-seqs", "1", "--enable-admin")
BODY = {"prompt": [20] * 8, "max_tokens": 80, "ignore_eos": True, "temperature": 0}


def _order(server: RunningServer, requests: list[dict]) -> list[str]:
    """The `tag`s of requests in the order in which they end; they arrive in the order given, before any is begun."""
    ended: list[str] = []

    def ask(tag: str, body: dict) -> None:
        answer = httpx.post(f"{server.url}{COMPLETIONS}", json=BODY | body, headers=server.headers, timeout=PATIENCE)
        assert answer.status_code == 200, answer.text
        ended.append(tag)

    threads = []
    # A fast machine would answer the first before the last has come.
    assert server.client.post("/pause", params={"mode": "keep"}).is_success
    try:
        for number, body in enumerate(requests, start=1):
            threads.append(threading.Thread(target=ask, args=(body.pop("tag"), body)))
            threads[-1].start()
            wait_for(
                lambda number=number: server.metrics()["vllm:num_requests_waiting"] >= number,
                "one does not arrive",
                0.01,
            )
    finally:
        assert server.client.post("/resume").is_success
    for thread in threads:
        thread.join()
    return ended


def test_the_fair_scheduler_knows_clients_by_user():
    server = RunningServer(
        *FLAGS, "--scheduler", "fair", "--served-model-name", "one", "two", "--dtype", "bfloat16", "--block_size", "8",
        "--no-enable-prefix-caching", "--seed", "3",
    )  # fmt: skip
    try:
        flood = [{"tag": f"a{i}", "user": "a"} for i in range(6)]
        order = _order(server, [*flood, {"tag": "b", "user": "b"}])
        assert order.index("b") <= 1  # behind the one that was first, before the rest of the flood
        assert [model["id"] for model in server.client.get("/v1/models").json()["data"]] == ["one", "two"]
        assert server.complete(model="two").json()["model"] == "two"
        assert server.complete(model="demo").status_code == 404
        assert server.slots()["cached"] == 0
        text = server.client.get("/metrics").text
        assert 'model_name="one"' in text
        assert 'block_size="8"' in text
    finally:
        assert server.stop() == 0
    lines = [line for line in server.said.splitlines() if " by an operator" not in line]
    assert not [line for line in lines if "WARNING" in line or "ERROR" in line], server.said  # a clean stop is none


def test_the_priority_scheduler_and_swapping():
    server = RunningServer(*FLAGS, "--scheduler=priority", "--allocator=paged", "--swap-space", "0.01")
    try:
        crowd = [{"tag": f"low{i}", "priority": 5} for i in range(5)]
        order = _order(server, [*crowd, {"tag": "urgent", "priority": -1}])
        assert order.index("urgent") <= 1
        server.wait_idle()
        server.assert_alive()
    finally:
        assert server.stop() == 0


def test_special_tokens_are_shown_when_asked_for(server):
    body = {"messages": [{"role": "user", "content": "Hello!"}], "temperature": 0, "max_tokens": 40}
    hidden = server.post(CHAT, body | {"ignore_eos": True}).json()["choices"][0]["message"]["content"]
    shown = server.post(CHAT, body | {"ignore_eos": True, "skip_special_tokens": False}).json()
    assert "<|" in shown["choices"][0]["message"]["content"]
    assert "<|" not in hidden


@pytest.mark.parametrize("path", (COMPLETIONS, CHAT))
def test_json_object(server, path):
    prompt = {"prompt": "JSON:"} if path == COMPLETIONS else {"messages": [{"role": "user", "content": "JSON"}]}
    for seed in range(4):
        body = {"response_format": {"type": "json_object"}, "max_tokens": 200, "seed": seed}
        choice = server.post(path, prompt | body).json()["choices"][0]
        text = choice["text"] if path == COMPLETIONS else choice["message"]["content"]
        assert text.lstrip().startswith("{")
        if choice["finish_reason"] == "stop":
            assert isinstance(json.loads(text), dict)


def test_ping_is_health(server):
    assert httpx.get(f"{server.url}/ping").status_code == 200
