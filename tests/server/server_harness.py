"""Starts real servers on free loopback ports and looks at them from outside."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
from prometheus_client.parser import text_string_to_metric_families
from waiting import PATIENCE
from warm import PARTS, start

ROOT = Path(__file__).resolve().parent.parent.parent
KEY = "test-key"
STUB = "kvarena.experiments.serving.stub_engine"
OWNED = ("token_states", "reservation", "internal")


class RunningServer:
    """A server in its own process.

    Args:
        flags: of `kvarena serve`, after the model.
        model: a model directory.
        module: what to run in place of the command (stub engines).
    """

    def __init__(
        self,
        *flags: str,
        model: str = "models/demo",
        module: str = "kvarena",
        key: str | None = KEY,
    ):
        self._log = tempfile.NamedTemporaryFile("w+", suffix=".log", delete=False)  # noqa: SIM115
        self._hold = Path(self._log.name + ".hold")
        command = ["-m", module, "serve", model, "--port", "0", *flags]
        if module == STUB:
            command += ["--hold", str(self._hold)]
        if key is not None:
            command += ["--api-key", key, "second-key"]
        env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        self.process = start(command, ROOT, Path(self._log.name), Path(self._log.name), env)
        self.headers = {"Authorization": f"Bearer {key}"} if key else {}
        self.url = self._wait()
        self.client = httpx.Client(base_url=self.url, headers=self.headers, timeout=PATIENCE)

    def _wait(self) -> str:
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            match = re.search(r"Uvicorn running on (\S+)", self.log)
            if match:
                return match[1]
            if self.process.poll() is not None:
                break
            time.sleep(0.05)
        self.process.kill()
        raise RuntimeError(f"the server did not start:\n{self.log}")

    @property
    def log(self) -> str:
        return Path(self._log.name).read_text()

    @property
    def port(self) -> int:
        return int(self.url.rsplit(":", 1)[1])

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """A stub's steps take so long meanwhile that what runs goes on, and comes to no end of its own.

        What a test does to requests that run has to come before their end, on a fast machine and on a slow one.
        """
        self._hold.touch()
        try:
            yield
        finally:
            self._hold.unlink()

    def post(self, path: str, body: object, **kwargs: object) -> httpx.Response:
        return self.client.post(path, json=body, **kwargs)

    def complete(self, prompt: object = "The", **body: object) -> httpx.Response:
        return self.post("/v1/completions", {"prompt": prompt, "max_tokens": 4, "temperature": 0} | body)

    def metrics(self) -> dict[str, float]:
        """Samples by `name` or `name{label values}` (model_name left out), added up over the engines."""
        text = self.client.get("/metrics").text
        samples: dict[str, float] = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                labels = [v for k, v in sample.labels.items() if k not in ("model_name", "engine")]
                key = sample.name + (f"{{{','.join(labels)}}}" if labels else "")
                samples[key] = samples.get(key, 0.0) + sample.value
        return samples

    def slots(self) -> dict[str, float]:
        """Slots by class."""
        metrics = self.metrics()
        return {key[17:-1]: value for key, value in metrics.items() if key.startswith("kvarena:kv_slots{")}

    def wait_idle(self, seconds: float = PATIENCE) -> None:
        """Wait until nothing runs and no request owns a slot; fails when that does not happen."""
        deadline = time.monotonic() + seconds
        while True:
            metrics = self.metrics()
            slots = {key[17:-1]: v for key, v in metrics.items() if key.startswith("kvarena:kv_slots{")}
            owned = sum(slots[name] for name in OWNED)
            busy = metrics["vllm:num_requests_running"] + metrics["vllm:num_requests_waiting"]
            if not owned and not busy:
                return
            assert time.monotonic() < deadline, f"not idle after {seconds} s: {busy} requests, {slots}"
            time.sleep(0.05)

    def assert_alive(self) -> None:
        """A normal request is answered and the pool is whole again."""
        answer = self.complete()
        assert answer.status_code == 200, answer.text
        self.wait_idle()

    def children(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def front(self) -> psutil.Process:
        """The front that was started last."""
        return self.parts()[-1]

    def engine_pid(self) -> int:
        """The engine is the first process that the supervisor starts."""
        return self.parts()[0].pid

    def parts(self) -> list[psutil.Process]:
        """The engine and the fronts, in the order in which they were started."""
        return sorted((one for one in self.children() if is_part(one)), key=lambda one: (one.create_time(), one.pid))

    def stop(self, seconds: float = PATIENCE) -> int:
        """SIGTERM and wait; returns the exit code. `said` is what the server had logged then."""
        self.client.close()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(seconds)
            except subprocess.TimeoutExpired:
                self.process.kill()
                raise
        self.said = self.log
        os.unlink(self._log.name)
        return self.process.returncode


def is_part(process: psutil.Process) -> bool:
    """Whether it is an engine or a front."""
    line = " ".join(process.cmdline())
    return any(part in line for part in PARTS)


def stream_events(response: httpx.Response) -> list[str]:
    """The `data:` lines of a streamed answer."""
    return [line[6:] for line in response.iter_lines() if line.startswith("data: ")]
