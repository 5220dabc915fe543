"""`python run.py mode=serve` is the same server as `kvarena serve`."""

import re
import signal
import subprocess
import sys
import time

import httpx
from server_harness import PATIENCE, ROOT


def test_run_py_serves_and_stops(tmp_path):
    command = [
        sys.executable,
        str(ROOT / "run.py"),
        "mode=serve",
        "server.port=0",
        "allocator=paged",
        "scheduler=chunked",
    ]
    log = tmp_path / "server.log"
    with log.open("w") as stream:
        process = subprocess.Popen(command, cwd=tmp_path, stdout=stream, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + PATIENCE
        while not (ready := re.search(r"Uvicorn running on (\S+)", log.read_text())):
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        # What there is to be had stands above it: model, dtype, strategy, pool, room, and where to look.
        said = log.read_text()
        assert "demo: 1.0M weights in float32 on cpu, paged x chunked; KV pool of 16,384 tokens (32.0 MiB), " in said
        assert "room for 8 requests of 2,048 tokens" in said
        assert f"a page to try it: {ready[1]}/, metrics: {ready[1]}/metrics, API: {ready[1]}/v1" in said
        body = {"prompt": "The", "max_tokens": 4, "model": "demo"}
        answer = httpx.post(f"{ready[1]}/v1/completions", json=body, timeout=PATIENCE)
        assert answer.status_code == 200, answer.text
        assert answer.json()["usage"]["completion_tokens"] <= 4
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE) == 0
    finally:
        process.kill()
