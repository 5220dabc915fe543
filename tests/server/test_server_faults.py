"""Faults of the processes: each ends as promised, within its time, and leaves nothing behind.

Most run the real fronts around an engine that computes nothing (experiments/serving/stub_engine.py): it starts fast,
and fails on command.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
import time

import httpx
import psutil
import pytest
from server_harness import PATIENCE, STUB, RunningServer
from stepped_clock import write_offset
from waiting import wait_for

FAIL, HANG, LEAK = 777, 778, 779
STREAM = {"prompt": [20] * 8, "max_tokens": 8000, "ignore_eos": True, "stream": True}


def _stub(*flags: str) -> RunningServer:
    return RunningServer("--step-time", "0.01", *flags, module=STUB)


class Reader(threading.Thread):
    """Reads one stream to its end; it has begun when this is made."""

    def __init__(self, server: RunningServer, **body: object) -> None:
        super().__init__(daemon=True)
        self.lines: list[str] = []
        self.error: Exception | None = None
        self._server, self._body = server, STREAM | body
        self.start()
        wait_for(lambda: self.lines or self.error, "the stream does not begin", 0.01)
        assert self.lines, self.error

    def run(self) -> None:
        try:
            with (
                httpx.Client(base_url=self._server.url, headers=self._server.headers, timeout=PATIENCE) as client,
                client.stream("POST", "/v1/completions", json=self._body) as response,
            ):
                self.lines += [f"status {response.status_code}"]
                for line in response.iter_lines():
                    if line:
                        self.lines.append(line)
        except httpx.HTTPError as error:
            self.error = error


def _health(server: RunningServer) -> int:
    return _status(f"{server.url}/health")


def _status(url: str) -> int:
    try:
        return httpx.get(url, timeout=PATIENCE).status_code
    except httpx.TransportError:
        return 0


def _wait_health(server: RunningServer, status: int) -> None:
    wait_for(lambda: _health(server) == status, f"/health is not {status}")


def _gone(pids: list[int]) -> bool:
    """Whether all end."""
    _, alive = psutil.wait_procs([psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)], PATIENCE)
    return not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]


@pytest.mark.parametrize("number", (signal.SIGKILL, signal.SIGSTOP), ids=("42-kill", "43-stop"))
def test_a_dead_or_frozen_engine_ends_the_server(number):
    server = _stub()
    pids = [process.pid for process in server.children()]
    readers = [Reader(server) for _ in range(3)]
    assert _health(server) == 200
    os.kill(server.engine_pid(), number)
    _wait_health(server, 503)
    for reader in readers:
        reader.join(PATIENCE)
        assert reader.error is None
        assert reader.lines[-1] == "data: [DONE]"
        assert '"error"' in reader.lines[-2]
    assert server.process.wait(PATIENCE) == 1
    assert _gone(pids)


def test_43_a_server_that_was_stopped_as_a_whole_goes_on():
    """Ctrl-Z and fg, or a machine that stood still: the engine was silent, and so was everybody else."""
    server = _stub("--set", "heartbeat_timeout=2", "step_timeout=2.5")
    try:
        with server.held():  # else it may have ended before the server is stopped
            reader = Reader(server, max_tokens=100)
            group = [psutil.Process(server.process.pid), *server.children()]
            engine = server.engine_pid()
            for process in group:
                process.suspend()
            time.sleep(3.5)
            for process in sorted(group, key=lambda process: process.pid == engine):  # the engine last
                process.resume()
                time.sleep(0.1)
        reader.join(PATIENCE)
        assert reader.lines[-1] == "data: [DONE]"
        assert '"finish_reason":"length"' in reader.lines[-2]
        assert _health(server) == 200
    finally:
        assert server.stop() == 0


def test_43_an_engine_without_progress_is_unhealthy_and_then_given_up():
    server = _stub("--hang-token", str(HANG), "--set", "stall_timeout=1", "step_timeout=10")
    reader = Reader(server)
    hanging = threading.Thread(target=lambda: _post_quietly(server, {"prompt": [HANG]}), daemon=True)
    hanging.start()
    _wait_health(server, 503)
    reader.join(PATIENCE)
    assert '"error"' in reader.lines[-2]
    assert server.process.wait(PATIENCE) == 1


def _post_quietly(server: RunningServer, body: dict) -> None:
    try:
        httpx.post(f"{server.url}/v1/completions", json=body, headers=server.headers, timeout=PATIENCE)
    except httpx.HTTPError:
        return


def test_44_a_failed_step_fails_its_requests_only():
    server = _stub("--fail-token", str(FAIL), "--leak-token", str(LEAK))
    try:
        early = Reader(server, max_tokens=50)
        answer = server.post("/v1/completions", {"prompt": [FAIL], "max_tokens": 4})
        early.join(PATIENCE)
        assert answer.status_code == 500
        assert answer.json()["error"]["code"] == "engine_error"
        # The step was shared with the stream, which ends with an error event, not silently.
        assert early.lines[-1] == "data: [DONE]"
        assert server.complete([20]).status_code == 200
        server.wait_idle()
        metrics = server.metrics()
        assert metrics["kvarena:failed_steps_total"] == 1
        assert _health(server) == 200
        # The ledger adds up, until the allocator miscounts: then that is counted and told of, and answers still come.
        assert metrics["kvarena:ledger_violations_total"] == 0
        assert server.complete([LEAK]).status_code == server.complete([20]).status_code == 200
        assert server.metrics()["kvarena:ledger_violations_total"] >= 2
        assert server.log.count("the KV ledger does not add up: owned 16 + external 0") == 1
    finally:
        assert server.stop() == 0


def test_44_steps_without_memory_end_their_requests_and_never_the_server():
    """Whoever took the memory may give it back; a trace of it would tell nobody more than the line does."""
    server = _stub("--full-token", str(FAIL))
    try:
        answers = [server.post("/v1/completions", {"prompt": [FAIL], "max_tokens": 4}) for _ in range(5)]
        assert [answer.status_code for answer in answers] == [500] * 5
        assert server.complete([20]).status_code == 200
        assert server.log.count("2.00 GiB were asked for and 1.00 GiB were free") == 5
        assert "Traceback" not in server.log
    finally:
        assert server.stop() == 0


def test_45_a_device_that_keeps_failing_ends_the_server():
    server = _stub("--fail-token", str(FAIL))
    for _ in range(3):
        _post_quietly(server, {"prompt": [FAIL]})
    assert server.process.wait(PATIENCE) == 1


def test_46_sigterm_under_load_drains():
    server = _stub("--set", "shutdown_timeout=170")
    pids = [process.pid for process in server.children()]
    with server.held():  # the streams outlast what is asked of the server meanwhile
        readers = [Reader(server, max_tokens=60) for _ in range(4)]
        server.process.send_signal(signal.SIGTERM)
        wait_for(lambda: _status(f"{server.url}/ready") == 503, "it does not drain")
        refused = server.post("/v1/completions", {"prompt": [20]})
        assert refused.status_code == 503
        assert refused.headers["retry-after"]
        assert all(reader.is_alive() for reader in readers)
    for reader in readers:
        reader.join(PATIENCE)
        assert reader.lines[-1] == "data: [DONE]"
        assert '"finish_reason":"length"' in reader.lines[-2]
    server.client.close()
    assert server.process.wait(PATIENCE) == 0
    assert _gone(pids)


@pytest.mark.parametrize("way", ("no grace", pytest.param("second signal", marks=pytest.mark.slow)))
def test_46_what_cannot_finish_ends_with_an_error_event(way):
    server = _stub("--set", f"shutdown_timeout={0 if way == 'no grace' else 60}")
    reader = Reader(server)
    server.process.send_signal(signal.SIGTERM)
    if way == "second signal":
        time.sleep(0.5)
        server.process.send_signal(signal.SIGTERM)
    reader.join(PATIENCE)
    assert reader.lines[-1] == "data: [DONE]"
    assert '"error"' in reader.lines[-2]
    server.client.close()
    assert server.process.wait(PATIENCE) == 0


def test_46_who_has_no_answer_yet_gets_one():
    """A body that is still on its way, and a browser on the dashboard, when the server leaves."""
    server = _stub("--set", "shutdown_timeout=0")
    half, page = (socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE) for _ in range(2))
    key = b"Host: x\r\nAuthorization: Bearer test-key\r\n"
    half.sendall(b"POST /v1/completions HTTP/1.1\r\n" + key + b"Content-Length: 1000\r\n\r\n{")
    page.sendall(b"GET /dashboard/events HTTP/1.1\r\n" + key + b"\r\n")
    assert b" 200 " in page.recv(1 << 16)
    reader = Reader(server)
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(PATIENCE) == 0
    reader.join(PATIENCE)
    assert '"error"' in reader.lines[-2]
    answer = b""
    while chunk := half.recv(1 << 16):
        answer += chunk
    assert answer.startswith(b"HTTP/1.1 503 ")
    assert b'"code":"draining"' in answer
    events = b""
    while chunk := page.recv(1 << 16):
        events += chunk
    assert events.endswith(b"0\r\n\r\n")  # the end of a whole answer
    assert "Traceback" not in server.log


def test_the_supervisors_death_leaves_no_orphans():
    server = _stub()
    pids = [process.pid for process in server.children()]
    server.process.kill()
    server.process.wait()
    assert _gone(pids)


def test_52_a_step_of_the_wall_clock_ends_no_wait_and_prolongs_none(tmp_path):
    """The clock of every process of the server jumps a day ahead, then two days back, under load."""
    file = tmp_path / "offset"
    server = RunningServer("--step-time", "0.01", "--clock", str(file), module="tests.server.stepped_clock")
    pids = [process.pid for process in server.children()]
    made = []
    for offset in (0, 86_400, -172_800):
        reader = Reader(server, max_tokens=100)
        write_offset(file, offset)
        reader.join(PATIENCE)
        assert reader.error is None
        assert reader.lines[-1] == "data: [DONE]"
        assert '"finish_reason":"length"' in reader.lines[-2]
        assert _health(server) == 200
        assert httpx.get(f"{server.url}/ready", timeout=PATIENCE).status_code == 200
        made.append(server.complete([20]).json()["created"])
    # The clock that its processes read did jump.
    assert made[1] - made[0] > 80_000
    assert made[2] - made[1] < -200_000
    # And the watch-dog still finds a frozen engine.
    reader = Reader(server)
    os.kill(server.engine_pid(), signal.SIGSTOP)
    write_offset(file, -400_000)
    _wait_health(server, 503)
    reader.join(PATIENCE)
    assert '"error"' in reader.lines[-2]
    assert server.process.wait(PATIENCE) == 1
    assert _gone(pids)
