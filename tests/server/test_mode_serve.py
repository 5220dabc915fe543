"""`python run.py mode=serve` is the same server as `kvarena serve`."""

import re
import signal

import httpx
import warm
from server_harness import PATIENCE, ROOT
from waiting import wait_for


def test_run_py_serves_and_stops(tmp_path):
    command = [str(ROOT / "run.py"), "mode=serve", "server.port=0", "allocator=paged", "scheduler=chunked"]
    log = tmp_path / "server.log"
    process = warm.start(command, tmp_path, log, log)
    try:
        is_ready = lambda: process.poll() is not None or "Uvicorn running on" in log.read_text()  # noqa: E731
        wait_for(lambda: log.exists() and is_ready(), "it does not start", 0.1)
        ready = re.search(r"Uvicorn running on (\S+)", log.read_text())
        assert ready, log.read_text()
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
