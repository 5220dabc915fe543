"""The server that vLLM's end-to-end tests start: `kvarena serve` with their flags. Laid as their `tests/utils.py`."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

VLLM_PATH = Path(__file__).parent.parent
ROCM_EXTRA_ARGS: list[str] = []
# Adapters and embeddings are not served here: tests of these are left out, those of keys, headers and of the model
# beside an adapter are not. The demo keeps its own type, the quickest on a CPU. Each with how many arguments follow.
DROPPED = {
    "--dtype": 1,
    "--runner": 1,
    "--enable-lora": 0,
    "--lora-modules": 1,
    "--max-lora-rank": 1,
    "--max-cpu-loras": 1,
}
# The demo's tokenizer writes a third more tokens for a text than those that the tests' contexts were chosen for.
LONGER = {"2048": "4096"}
_MAX_START_SECONDS = 120.0


def multi_gpu_only(**_: Any) -> Any:
    """A mark that says nothing here."""
    return lambda test: test


def requires_fp8(test: Any) -> Any:
    """The same."""
    return test


def _kept(args: Sequence[str]) -> list[str]:
    rest, made = list(args), []
    while rest:
        flag = rest.pop(0)
        if flag in DROPPED:
            del rest[: DROPPED[flag]]
        else:
            made.append(LONGER.get(flag, flag) if made[-1:] == ["--max-model-len"] else flag)
    return made


class RemoteOpenAIServer:
    """A server, until the end of a `with` block.

    Args:
        model: a directory, from the working directory.
        args: flags of `vllm serve`.
        env_dict: set in the server's environment.
        auto_port: choose a port; else the arguments name one.
        max_wait_seconds: bound of its start.
    """

    DUMMY_API_KEY = "token-abc123"
    show_hidden_metrics = False

    def __init__(
        self,
        model: str,
        args: Sequence[str],
        *,
        env_dict: dict[str, str] | None = None,
        auto_port: bool = True,
        max_wait_seconds: float | None = None,
        **_: Any,
    ) -> None:
        args = _kept(args)
        self.host = "127.0.0.1"
        if auto_port:
            with socket.socket() as made:
                made.bind((self.host, 0))
                self.port = int(made.getsockname()[1])
            args += ["--port", str(self.port)]
        else:
            self.port = int(args[args.index("--port") + 1])
        command = [sys.executable, "-m", "kvarena", "serve", model, *args]
        self._log = open(f"server-{self.port}.log", "w+", encoding="utf-8")  # noqa: SIM115 - as long as the server
        self.proc = subprocess.Popen(
            command, env=os.environ | (env_dict or {}), stdout=self._log, stderr=subprocess.STDOUT
        )
        until = time.monotonic() + min(max_wait_seconds or _MAX_START_SECONDS, _MAX_START_SECONDS)
        while not self._answers():
            if self.proc.poll() is not None or time.monotonic() > until:
                self.stop()
                raise RuntimeError(f"the server did not start: {' '.join(command[3:])}: {self._said()}")
            time.sleep(0.2)

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(self.url_for("health"), timeout=2) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    def _said(self) -> str:
        self._log.seek(0)
        return " | ".join(self._log.read().splitlines()[-2:])

    def stop(self) -> None:
        """End the server."""
        if self.proc.poll() is None:
            self.proc.send_signal(signal.SIGTERM)
            try:
                self.proc.wait(20)
            except subprocess.TimeoutExpired:
                self.proc.kill()
                self.proc.wait()

    def __enter__(self) -> RemoteOpenAIServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        self._log.close()

    @property
    def url_root(self) -> str:
        """Where it listens."""
        return f"http://{self.host}:{self.port}"

    def url_for(self, *parts: str) -> str:
        """The URL of a path."""
        return "/".join((self.url_root, *parts))

    def get_client(self, **kwargs: Any) -> Any:
        """OpenAI's client."""
        import openai

        return openai.OpenAI(**self._of("v1", kwargs))

    def get_async_client(self, **kwargs: Any) -> Any:
        """The same for coroutines."""
        import openai

        return openai.AsyncOpenAI(**self._of("v1", kwargs))

    def get_client_anthropic(self, **kwargs: Any) -> Any:
        """Anthropic's client."""
        import anthropic

        return anthropic.Anthropic(**self._of("", kwargs))

    def get_async_client_anthropic(self, **kwargs: Any) -> Any:
        """The same for coroutines."""
        import anthropic

        return anthropic.AsyncAnthropic(**self._of("", kwargs))

    def _of(self, path: str, kwargs: dict[str, Any]) -> dict[str, Any]:
        url = self.url_for(path) if path else self.url_root
        return {"base_url": url, "api_key": self.DUMMY_API_KEY, "max_retries": 0, "timeout": 60} | kwargs
