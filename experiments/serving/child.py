"""A server of this checkout in a process of its own, for benchmarks and fuzzers."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import httpx
import psutil

from kvarena.engine.errors import EngineError

START_SECONDS = 300.0
STOP_SECONDS = 60.0


class Child:
    """A command that serves HTTP, with its log in a file.

    Args:
        command: what stands behind `python`.
        folder: it runs in; None: this one.

    Raises:
        EngineError: it does not say where it listens; with the end of its log.
    """

    def __init__(self, command: Sequence[str], folder: Path | None = None) -> None:
        self._log = tempfile.NamedTemporaryFile("w+", suffix=".log")  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, *command], cwd=folder, stdout=self._log, stderr=subprocess.STDOUT
        )
        self.url = self._wait()

    def _wait(self) -> str:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline and self._process.poll() is None:
            match = re.search(r"Uvicorn running on (\S+)", self.log)
            if match:
                return match[1]
            time.sleep(0.05)
        self.stop()
        raise EngineError(f"the server did not start; the end of its log:\n{self.log[-2000:]}")

    @property
    def process(self) -> psutil.Process:
        """The supervisor."""
        return psutil.Process(self._process.pid)

    @property
    def log(self) -> str:
        """What it has said."""
        return Path(self._log.name).read_text()

    def cpu_seconds(self) -> dict[str, float]:
        """Processor time so far by role; a server without parts is its own front."""
        supervisor, *parts = parts_of(self._process.pid)
        times = [sum(part.cpu_times()[:2]) for part in parts or [supervisor]]
        return {"engine": times[0], "front": sum(times[1:])} if parts else {"front": times[0]}

    def stop(self) -> None:
        """SIGTERM, and wait; what does not end is killed with all that it started."""
        if self._process.poll() is not None:
            return
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            for child in self.process.children(recursive=True):
                child.kill()
            self._process.kill()
            self._process.wait()


class Server(Child):
    """`kvarena serve` on a free port, with a key. Raises as `Child`."""

    def __init__(self, arguments: Sequence[str], key: str) -> None:
        super().__init__(["-m", "kvarena", "serve", *arguments, "--port", "0", "--api-key", key])

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


def parts_of(pid: int) -> list[psutil.Process]:
    """A server's supervisor, its engine and its fronts, in the order of their starts; the resource tracker is none."""
    parent = psutil.Process(pid)
    parts = [child for child in parent.children() if "spawn_main" in " ".join(child.cmdline())]
    return [parent, *sorted(parts, key=lambda part: part.create_time())]
