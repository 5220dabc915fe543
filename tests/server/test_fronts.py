"""Several fronts, and several servers: a front that freezes or dies is replaced, a port belongs to one server."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx
import psutil
import pytest
from server_harness import PATIENCE, ROOT, is_part
from test_server_faults import Reader, _gone, _stub
from waiting import wait_for

from kvarena.engine.errors import ConfigError
from kvarena.engine.server.processes.listeners import open_listeners


def _fronts(server) -> list[psutil.Process]:
    engine = server.engine_pid()
    return [one for one in server.parts() if one.pid != engine]


def _num_connected(front: psutil.Process) -> int:
    return sum(one.status == "ESTABLISHED" for one in front.net_connections("tcp"))


def test_a_front_that_freezes_or_dies_is_replaced_and_the_others_streams_go_on():
    server = _stub("--fronts", "2", "--set", "heartbeat_timeout=6")  # a busy machine keeps the living ones alive
    try:
        for number in (signal.SIGSTOP, signal.SIGKILL):
            victim = _fronts(server)[0]
            of_victim = {one.laddr.port for one in victim.net_connections("tcp") if one.status == "LISTEN"}
            assert of_victim == {server.port}
            with server.held():
                readers: list[Reader] = []
                while not all(_num_connected(front) for front in _fronts(server)):  # the kernel deals them out
                    assert len(readers) < 100, "one front gets nothing"
                    readers.append(Reader(server, max_tokens=90))
                os.kill(victim.pid, number)
                assert _gone([victim.pid])
            for reader in readers:
                reader.join(PATIENCE)
                assert not reader.is_alive()
            # A broken connection is an error that every client reports; the others' streams end as ever.
            whole = [reader for reader in readers if reader.error is None]
            for reader in whole:
                assert reader.lines[-1] == "data: [DONE]"
                assert '"finish_reason":"length"' in reader.lines[-2]
            assert whole, [(str(r.error), len(r.lines)) for r in readers]
            wait_for(lambda: len(_fronts(server)) == 2, "no other front was started")
            for _ in range(12):
                assert httpx.get(f"{server.url}/health", timeout=PATIENCE).status_code == 200
            with httpx.Client(base_url=server.url, headers=server.headers, timeout=PATIENCE) as server.client:
                server.wait_idle()
                # The one that asks: gauges of a front that is gone do not stay.
                assert server.metrics()["kvarena:open_requests"] == 1
        assert "has been silent for" in server.log
        assert "has ended with code -9" in server.log
        assert server.process.poll() is None
    finally:
        assert server.stop() == 0


def test_a_front_that_freezes_while_the_server_drains_holds_nobody_up():
    server = _stub("--set", "heartbeat_timeout=2", "shutdown_timeout=600")
    reader = Reader(server)
    server.process.send_signal(signal.SIGTERM)
    os.kill(_fronts(server)[0].pid, signal.SIGSTOP)
    assert server.process.wait(PATIENCE) == 0
    reader.join(PATIENCE)
    assert reader.error is not None


def test_fronts_that_never_last_end_the_server():
    server = _stub("--set", "heartbeat_timeout=1")
    engine = server.engine_pid()
    while server.process.poll() is None:
        # As soon as they are there; what has ended already is nobody's loss.
        with contextlib.suppress(psutil.NoSuchProcess):
            for one in server.children():
                if one.pid != engine and is_part(one):
                    one.kill()
        time.sleep(0.05)
    assert server.process.wait(PATIENCE) == 1
    assert "after 3 others" in server.log
    assert "Traceback" not in server.log


@pytest.mark.parametrize("counts", ((1, 1), (2, 2), (1, 2), (2, 1)))
def test_a_port_belongs_to_the_server_that_came_first(counts):
    """Even while neither serves yet."""
    first = open_listeners("127.0.0.1", 0, counts[0])
    port = first[0].getsockname()[1]
    try:
        for host in ("127.0.0.1", "0.0.0.0"):
            with pytest.raises(ConfigError, match="choose another --port"):
                open_listeners(host, port, counts[1])
        with socket.create_connection(("127.0.0.1", port)):
            pass
    finally:
        for sock in first:
            sock.close()
    for sock in open_listeners("127.0.0.1", port, counts[1]):
        sock.close()


def test_of_servers_that_start_at_once_one_gets_the_port():
    code = (
        "import sys; from kvarena.engine.errors import ConfigError\n"
        "from kvarena.engine.server.processes.listeners import open_listeners\n"
        "sys.stdin.readline()\n"
        "try:\n    held = open_listeners('127.0.0.1', int(sys.argv[1]), 2)\n"
        "except ConfigError as error:\n    print('error', flush=True)\n"
        "else:\n    print('serves', flush=True)\n"
        "sys.stdin.readline()"
    )
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = str(sock.getsockname()[1])
    command = [sys.executable, "-c", code, port]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    servers = [subprocess.Popen(command, cwd=ROOT, **pipes) for _ in range(4)]
    for one in servers:
        one.stdin.write("\n")
        one.stdin.flush()
    words = [one.stdout.readline().strip() for one in servers]
    for one in servers:
        one.communicate("\n", timeout=PATIENCE)
    assert sorted(words) == ["error", "error", "error", "serves"]


def test_nothing_is_left_of_a_server_whose_supervisor_was_killed(tmp_path):
    command = [sys.executable, "-m", "kvarena.experiments.serving.stub_engine", "serve", "models/demo", "--port", "0"]
    with tempfile.TemporaryFile("w+") as log:
        env = os.environ | {"TMPDIR": str(tmp_path)}
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, env=env)

        def text() -> str:
            log.seek(0)
            return log.read()

        wait_for(lambda: "Uvicorn running on" in text(), "it did not start")
        children = [one.pid for one in psutil.Process(process.pid).children(recursive=True)]
        process.kill()
        process.wait()
        assert _gone(children)
    # torch keeps one cache for each user.
    assert [one.name for one in Path(tmp_path).iterdir() if not one.name.startswith("torchinductor_")] == []
