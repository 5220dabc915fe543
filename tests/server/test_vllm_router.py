"""Two servers behind vllm-router, which is taken as it comes: chat, streams, failover, and routing by our KV events.

`make test` does without it: python -m pip install 'kvarena[router]', and python -m pytest on this file.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from server_harness import PATIENCE, RunningServer, stream_events
from test_server_faults import STREAM, _stub

pytest.importorskip("vllm_router", reason="python -m pip install 'kvarena[router]', and this file again")
openai = pytest.importorskip("openai")

EVENTS = '{"enable_kv_cache_events": true, "endpoint": "tcp://*:0", "replay_endpoint": "tcp://127.0.0.1:0"}'
HEALTH_SECONDS = 1


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


class Router:
    """`vllm-router` before some servers."""

    def __init__(self, policy: str, urls: list[str], *flags: str) -> None:
        self._log = tempfile.NamedTemporaryFile("w+", suffix=".log")  # noqa: SIM115
        self.url = f"http://127.0.0.1:{free_port()}"
        command = [
            sys.executable, "-m", "vllm_router.launch_router", "--host", "127.0.0.1", "--port", self.url[17:],
            "--policy", policy, "--worker-urls", *urls, "--prometheus-port", str(free_port()),
            "--health-check-interval-secs", str(HEALTH_SECONDS), "--health-failure-threshold", "1",
            "--worker-startup-check-interval", "1", "--log-level", "debug", *flags,
        ]  # fmt: skip
        env = os.environ | {"HF_HUB_OFFLINE": "1"}
        self.process = subprocess.Popen(command, stdout=self._log, stderr=subprocess.STDOUT, env=env)
        self.client = httpx.Client(base_url=self.url, timeout=PATIENCE)
        deadline = time.monotonic() + PATIENCE
        while not self._answers():
            assert self.process.poll() is None and time.monotonic() < deadline, self.log
            time.sleep(0.05)

    def _answers(self) -> bool:
        try:
            return self.client.get("/health").status_code == 200
        except httpx.TransportError:
            return False

    @property
    def log(self) -> str:
        return re.sub(r"\x1b\[[0-9;]*m", "", Path(self._log.name).read_text())

    def stop(self) -> None:
        self.client.close()
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


@pytest.fixture(scope="module")
def pair() -> Iterator[list[RunningServer]]:
    flags = ("--max-model-len", "512", "--num-gpu-blocks-override", "128", "--kv-events-config", EVENTS)
    servers = [RunningServer(*flags, key=None) for _ in range(2)]
    yield servers
    assert [server.stop() for server in servers] == [0, 0]


def answered(server: RunningServer) -> float:
    metrics = server.metrics()
    return metrics["vllm:request_success_total{stop}"] + metrics["vllm:request_success_total{length}"]


def test_cache_aware_answers_chats_streams_and_models(pair):
    """Unmodified clients see one server; a conversation stays where its beginning is cached."""
    router = Router("cache_aware", [server.url for server in pair])
    try:
        client = openai.OpenAI(base_url=f"{router.url}/v1", api_key="none")
        assert [model.id for model in client.models.list()] == ["demo"]
        messages = [{"role": "user", "content": "What does the function return? " * 12}]
        before = [answered(server) for server in pair]
        for _ in range(3):
            answer = client.chat.completions.create(model="demo", messages=messages, max_tokens=6)
            text = answer.choices[0].message.content
            messages += [{"role": "assistant", "content": text}, {"role": "user", "content": "And then?"}]
        assert answer.usage.prompt_tokens_details.cached_tokens > 0
        assert sorted(answered(server) - old for server, old in zip(pair, before, strict=True)) == [0, 3]
        chunks = list(client.chat.completions.create(model="demo", messages=messages, max_tokens=6, stream=True))
        assert chunks[-1].choices[0].finish_reason in ("stop", "length")
        whole = client.completions.create(model="demo", prompt="The engine keeps", max_tokens=8, temperature=0)
        parts = client.completions.create(
            model="demo", prompt="The engine keeps", max_tokens=8, temperature=0, stream=True
        )
        assert "".join(part.choices[0].text for part in parts) == whole.choices[0].text
        with pytest.raises(openai.BadRequestError, match="temperature"):
            client.completions.create(model="demo", prompt="x", temperature=-1)
    finally:
        router.stop()


def test_kv_aware_goes_where_our_events_say_a_prompt_is(pair):
    """Warmed without the router's knowledge: only the events can tell it. Evicted and cleared prompts are forgotten."""
    sources = [server.client.get("/kv_event_sources").json()["0"] for server in pair]
    flags = ["--kv-event-block-size", "16", "--kv-event-model", "demo"]
    for server, source in zip(pair, sources, strict=True):
        flags += ["--kv-event-source", f"{server.url}={source['endpoint'].replace('*', '127.0.0.1')}"]
        flags += ["--kv-event-replay-source", f"{server.url}={source['replay_endpoint']}"]
    router = Router("kv_aware", [server.url for server in pair], *flags)
    try:
        for turn, server in enumerate([pair[1], pair[0], pair[1], pair[1]]):
            prompt = [100 + turn] * 20 + list(range(200, 290))
            assert server.complete(prompt).status_code == 200
            wait_until_heard(router, server)
            body = {"model": "demo", "prompt": [*prompt, 7], "max_tokens": 2, "temperature": 0}
            answer = router.client.post("/v1/completions", json=body)
            assert answer.status_code == 200, answer.text
            # Its own blocks were found again: no other server has them.
            assert answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"] == 96
        assert router.log.count("credited_prefix_tokens=96") >= 4
        # A chat is tokenized by a server, and found by its blocks as well.
        messages = [{"role": "user", "content": "Which of the two keeps this? " * 12}]
        chat = {"model": "demo", "messages": messages, "max_tokens": 2}
        assert pair[0].post("/v1/chat/completions", chat).status_code == 200
        wait_until_heard(router, pair[0])
        answer = router.client.post("/v1/chat/completions", json=chat)
        assert answer.status_code == 200, answer.text
        assert answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"] > 32
    finally:
        router.stop()


def wait_until_heard(router: Router, server: RunningServer) -> None:
    """Until the router has taken in what the server has published."""
    deadline = time.monotonic() + PATIENCE
    server.wait_idle()
    seen, since = -1, time.monotonic()
    while time.monotonic() - since < 0.5:
        count = router.log.count("sequence advanced")
        if count != seen:
            seen, since = count, time.monotonic()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert seen > 0, router.log


def test_one_of_two_killed_under_64_streams():
    """No more errors than it had streams, and after the health interval nobody is sent to it."""
    pair = [_stub() for _ in range(2)]
    router = Router("round_robin", [server.url for server in pair])
    router.client.headers.update(pair[0].headers)  # keys pass through
    ended: list[str] = []

    def read() -> None:
        try:
            with router.client.stream("POST", "/v1/completions", json=STREAM | {"max_tokens": 500}) as response:
                events = stream_events(response)
            last = json.loads(events[-2])
            ended.append(last["choices"][0]["finish_reason"] if "choices" in last else "error event")
        except (httpx.HTTPError, IndexError) as error:
            ended.append(type(error).__name__)

    try:
        threads = [threading.Thread(target=read) for _ in range(64)]
        for thread in threads:
            thread.start()
        deadline = time.monotonic() + PATIENCE
        while sum(running(server) for server in pair) < 64:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        had, kept = (running(server) for server in pair)
        for process in [*pair[0].children(), pair[0].process]:
            process.kill()
        killed_at = time.monotonic()
        time.sleep(HEALTH_SECONDS + 1.0)
        codes = [
            router.client.post("/v1/completions", json=STREAM | {"stream": False, "max_tokens": 4}).status_code
            for _ in range(16)
        ]
        assert codes == [200] * 16, (codes, time.monotonic() - killed_at)
        for thread in threads:
            thread.join(PATIENCE)
        errors = [how for how in ended if how != "length"]
        assert len(ended) == 64 and len(errors) <= had and kept + had == 64, (errors, had)
        assert len([how for how in ended if how == "length"]) >= kept
    finally:
        router.stop()
        pair[0].client.close()
        pair[0].process.wait(PATIENCE)
        assert pair[1].stop() == 0


def running(server: RunningServer) -> float:
    return server.metrics()["vllm:num_requests_running"]
