"""Starting a server: a wrong setting is one line, and what surrounds it (shell, disk, GPU) cannot hurt it.

The numbers are the items of the reliability suite (docs/serving.md).
"""

from __future__ import annotations

import os
import resource
import select
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
import torch
import warm
from server_harness import PATIENCE, ROOT, RunningServer
from test_server_faults import _health, _status
from waiting import wait_for


def test_a_shells_limit_on_open_files_is_lifted():
    limit = f"import resource; resource.setrlimit({resource.RLIMIT_NOFILE}, (64, 4096)); "
    run = "import sys; from kvarena.experiments.serving.stub_engine import main; sys.exit(main())"
    command = [sys.executable, "-c", limit + run, "serve", "models/demo", "--port", "0"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        log = ""
        while "Uvicorn running on" not in log:
            line = process.stdout.readline()
            assert line, log
            log += line
        port = int(log.rsplit(":", 1)[1].split()[0])
        socks = [socket.create_connection(("127.0.0.1", port)) for _ in range(200)]
        assert httpx.get(f"http://127.0.0.1:{port}/health", timeout=PATIENCE).status_code == 200
        for sock in socks:
            sock.close()
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE) == 0


@pytest.mark.parametrize(
    ("flags", "words"),
    (
        (["/nonexistent"], "MODEL /nonexistent does not exist; give a local directory"),
        (["models/demo", "--max-model-len", "100000"], "--max-model-len 100000 is over the 8192 positions"),
        (["models/demo", "--max-model-len", "0"], "--max-model-len 0 must be"),
        (["models/demo", "--num-gpu-blocks-override", "0"], "--num-gpu-blocks-override 0 must be"),
        (
            ["models/demo", "--num-gpu-blocks-override", "10"],
            "holds requests of at most 160 tokens, and demo would be served with 8192; set --max-model-len 160, or "
            "raise the pool to --num-gpu-blocks-override 512",
        ),
        (
            ["models/demo", "--tensor-parallel-size", "3"],
            "--tensor-parallel-size 3 does not divide the 4",
        ),
        (["models/demo", "--pipeline-parallel-size", "5"], "--pipeline-parallel-size 5 is more than the 4 layers of"),
        (["models/demo", "-tp", "0"], "--tensor-parallel-size 0 must be an integer in [1, 64]"),
        (
            ["models/demo", "--quantization", "awq"],
            "--quantization awq, and the weights of",
        ),
        (["models/demo", "--gpu-memory-utilization", "1.5"], "--gpu-memory-utilization 1.5 must be in (0, 1]"),
        (["models/demo", "--port", "70000"], "--port 70000 must be"),
        (["models/demo", "--ssl-certfile", "pyproject.toml"], "--ssl-certfile and --ssl-keyfile go together"),
        (["models/demo", "--ssl_keyfile", "/nonexistent"], "--ssl-"),
        (["models/demo", "--dtype", "int4"], "--dtype"),
        (["models/demo", "--max-model-len", "many"], "--max-model-len"),
        (["models/demo", "--max-num-seqs", "0"], "--max-num-seqs 0"),
        (["models/demo", "--enable-prefix-caching", "--allocator", "paged"], "--enable-prefix-caching"),
        (["models/demo", "--set", "server.no_such_key=1"], "'server.no_such_key'"),
        (["models/demo", "--scheduler", "chunkd"], "--scheduler chunkd: there is no such choice; did you mean chunked"),
        (["models/demo", "--no-such-flag"], "--no-such-flag"),
        (["models/demo", "--chat-template", "/nonexistent"], "--chat-template '/nonexistent' must be a file"),
    ),
)
def test_47_a_wrong_setting_is_one_line(flags, words):
    done = warm.run(["-m", "kvarena", "serve", *flags], ROOT)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 2, done.stderr
    assert len(errors) == 1
    assert words in errors[0]
    assert "Traceback" not in done.stderr + done.stdout


def test_47_a_web_framework_that_lacks_a_package_of_its_own_is_one_line(tmp_path):
    (tmp_path / "starlette.py").write_text("raise ModuleNotFoundError(\"No module named 'half'\", name='half')\n")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-m", "kvarena", "serve", "models/demo", "--port", "0"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=PATIENCE)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 1 and len(errors) == 1, done.stderr
    assert "No module named 'half'" in errors[0] and "kvarena[serve]" in errors[0]
    assert "Traceback" not in done.stderr + done.stdout


def test_47_a_port_in_use_is_one_line(server):
    done = warm.run(["-m", "kvarena", "serve", "--port", str(server.port)], ROOT)
    assert done.returncode == 2
    assert f"{server.port}" in done.stderr
    assert "choose another --port" in done.stderr
    server.assert_alive()


@pytest.mark.parametrize("log", ("a full disk", "a closed pipe"))
def test_49_a_log_that_cannot_be_written_stops_nothing(log, tmp_path):
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    command = ["-m", "kvarena.experiments.serving.stub_engine", "serve", "models/demo", "--port", str(port)]
    errors = tmp_path / "errors"
    if log == "a full disk":
        process = warm.start(command, ROOT, Path("/dev/full"), errors)
    else:
        os.mkfifo(pipe := tmp_path / "pipe")
        reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
        process = warm.start(command, ROOT, pipe, errors)
        wait_for(lambda: select.select([reader], [], [], 0)[0] and os.read(reader, 1), "it says nothing")
        os.close(reader)
    try:
        url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + PATIENCE
        while _status(f"{url}/health") != 200:
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.1)
        for prompt, status in (([20], 200), ([], 400), ([20], 200)) * 5:
            answer = httpx.post(f"{url}/v1/completions", json={"prompt": prompt, "max_tokens": 2})
            assert answer.status_code == status
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE) == 0
    # One line for each process that logs, whatever the number of requests.
    lines = errors.read_text().splitlines()
    assert 1 <= len(lines) <= 3
    assert all("the log cannot be written" in line for line in lines)


@pytest.mark.gpu
@pytest.mark.timeout(600)
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_51_two_servers_share_a_gpu_by_their_shares():
    """Each share is its server's own: two with 0.4 run side by side; 0.9 beside one is a line, the first goes on."""
    flags = ("--max-model-len", "512", "--max-num-seqs", "8")
    with ThreadPoolExecutor(2) as pool:  # at once: neither takes the other's memory for its own
        starts = [pool.submit(RunningServer, "--gpu-memory-utilization", "0.4", *flags) for _ in range(2)]
    servers = [start.result() for start in starts if start.exception() is None]
    try:
        first, second = servers
        before = first.slots()
        assert sum(second.slots().values()) == pytest.approx(sum(before.values()), rel=0.05)
        for server in servers:
            assert server.complete("The", max_tokens=16).status_code == 200
        assert servers.pop().stop() == 0
        command = [sys.executable, "-m", "kvarena", "serve", "--port", "0", *flags]
        third = subprocess.Popen(
            [*command, "--gpu-memory-utilization", "0.9"], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True,
        )  # fmt: skip
        while third.poll() is None:
            answer = first.complete("The", max_tokens=200, ignore_eos=True).json()
            assert answer["usage"]["completion_tokens"] == 200
            assert _health(first) == 200
        _, errors = third.communicate(timeout=60)
        assert third.returncode == 2, errors
        lines = [line for line in errors.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1, errors
        assert "gpu-memory-utilization 0.9 asks for" in lines[0]
        assert "lower it to at most 0.5" in lines[0]
        assert "Traceback" not in errors
        first.assert_alive()
        assert sum(first.slots().values()) == sum(before.values())
    finally:
        assert [server.stop() for server in servers] == [0] * len(servers)
