"""A rank that dies, stops or has no memory ends the server: a line says which and why, every stream gets an error."""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import threading
import time

import httpx
import psutil
import pytest
from server_harness import PATIENCE, RunningServer

SECONDS = 10.0  # within which a failure is told
NUM_STREAMS = 3


def ranks_of(server: RunningServer) -> list[psutil.Process]:
    return [one for one in server.children() if "ranks.child" in " ".join(one.cmdline())]


class Stream(threading.Thread):
    """A stream that goes on as long as it may."""

    def __init__(self, server: RunningServer) -> None:
        super().__init__(daemon=True)
        self.events: list[str] = []
        self.begun = threading.Event()
        self._server = server
        self.start()

    def run(self) -> None:
        body = {"prompt": "Once", "max_tokens": 8000, "temperature": 0, "stream": True, "ignore_eos": True}
        url, headers = f"{self._server.url}/v1/completions", self._server.headers
        with httpx.stream("POST", url, json=body, headers=headers, timeout=PATIENCE) as answer:
            for line in answer.iter_lines():
                if line.startswith("data: "):
                    self.events.append(line[6:])
                    self.begun.set()


def kill(rank: psutil.Process, server: RunningServer) -> None:
    rank.kill()


def kill_planner(rank: psutil.Process, server: RunningServer) -> None:
    psutil.Process(server.engine_pid()).kill()


def stop(rank: psutil.Process, server: RunningServer) -> None:
    rank.send_signal(signal.SIGSTOP)


def starve(rank: psutil.Process, server: RunningServer) -> None:
    """No memory beyond what it has: a step with the logits of a whole prompt, which no warm-up made, finds none."""
    used = rank.memory_info().vms
    resource.prlimit(rank.pid, resource.RLIMIT_AS, (used, used))
    body = {"prompt": [5] * 6000, "max_tokens": 1, "prompt_logprobs": 1}
    threading.Thread(
        target=lambda: httpx.post(f"{server.url}/v1/completions", json=body, headers=server.headers, timeout=PATIENCE),
        daemon=True,
    ).start()


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (kill, r"rank 1 of 2: its process \d+ has ended with code -9: killed"),
        pytest.param(stop, r"rank 1 of 2: its process \d+ has been silent for", marks=pytest.mark.slow),
        pytest.param(kill_planner, r"the engine process has ended with code -9", marks=pytest.mark.slow),
        pytest.param(starve, r"rank 1 of 2: .*(memory|allocate)", marks=pytest.mark.slow),
    ],
)
def test_a_rank_s_end_is_told_and_ends_everyone(harm, reason):
    # A warm-up of long steps takes longest, and `starve` alone needs room for a long prompt.
    server = RunningServer(
        "--tensor-parallel-size", "2", "--max-num-batched-tokens", str(8192 if harm is starve else 256)
    )
    streams = [Stream(server) for _ in range(NUM_STREAMS)]
    assert all(stream.begun.wait(PATIENCE) for stream in streams)
    everyone = [psutil.Process(server.process.pid), *server.children()]
    [rank] = ranks_of(server)
    began = time.monotonic()
    harm(rank, server)
    while not re.search(reason, server.log):
        assert time.monotonic() - began < SECONDS + PATIENCE * (harm is starve), server.log[-2000:]
        time.sleep(0.05)
    for stream in streams:
        stream.join(PATIENCE)
        errors = [json.loads(event) for event in stream.events if event.startswith('{"error"')]
        assert len(errors) == 1 and stream.events[-1] == "[DONE]"
    assert server.process.wait(PATIENCE) == 1
    assert not psutil.wait_procs(everyone, timeout=PATIENCE)[1]
    os.unlink(server._log.name)


@pytest.mark.slow
def test_a_server_that_stops_takes_its_ranks_along():
    server = RunningServer("--tensor-parallel-size", "2", "--pipeline-parallel-size", "2")
    ranks = ranks_of(server)
    assert len(ranks) == 3
    assert server.complete().status_code == 200
    assert server.stop() == 0
    assert not psutil.wait_procs(ranks, timeout=PATIENCE)[1]
