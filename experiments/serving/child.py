"""A server of this checkout in a process of its own, for benchmarks and fuzzers."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx
import psutil

START_SECONDS = 300.0
STOP_SECONDS = 60.0


class Server:
    """`kvarena serve` in its own process, on a free port."""

    def __init__(self, arguments: list[str], key: str) -> None:
        self._log = tempfile.NamedTemporaryFile("w+", suffix=".log")  # noqa: SIM115
        command = [
            sys.executable,
            "-m",
            "kvarena",
            "serve",
            *arguments,
            "--port",
            "0",
            "--api-key",
            key,
        ]
        self._process = subprocess.Popen(command, stdout=self._log, stderr=subprocess.STDOUT)
        self.url = self._wait()

    def _wait(self) -> str:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline and self._process.poll() is None:
            match = re.search(r"Uvicorn running on (\S+)", self.log)
            if match:
                return match[1]
            time.sleep(0.1)
        self._process.kill()
        raise SystemExit(f"the server did not start:\n{self.log[-2000:]}")

    def is_alive(self, key: str) -> bool:
        """Whether a request is answered."""
        body = {"prompt": "The", "max_tokens": 4}
        try:
            answer = httpx.post(
                f"{self.url}/v1/completions", json=body, headers={"Authorization": f"Bearer {key}"}, timeout=60
            )
        except httpx.HTTPError:
            return False
        return answer.status_code == 200

    @property
    def process(self) -> psutil.Process:
        """The supervisor."""
        return psutil.Process(self._process.pid)

    @property
    def log(self) -> str:
        """What it has said."""
        return Path(self._log.name).read_text()

    def stop(self) -> None:
        """SIGTERM, and wait."""
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
