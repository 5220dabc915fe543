"""A front's side of the worker that tries grammars out (`grammar_worker.py`): ask it once for each text."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import subprocess
import sys
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import kvarena
from kvarena.engine.errors import KvarenaError, RequestError
from kvarena.engine.server.engine.grammar_worker import BUSY, ToWorker
from kvarena.engine.server.shared.ipc import FrameDecoder, encode, socket_pair

MAX_JOBS = 1024
_MAX_ANSWERS = 1024
_MAX_ANSWER_CHARS = 16 << 20
_WORKER = ToWorker.__module__
_ROOT = str(Path(kvarena.__file__).parent.parent)


class ChecksBusy(KvarenaError):
    """Too many grammars are being tried out, or the worker is gone: the request may be tried again."""


class CheckedGrammar(NamedTuple):
    """A constraint that has been compiled once.

    Attributes:
        key: the same for the same text.
        kind: as in `to_grammar`.
        grammar: from `to_grammar`.
        seconds: processor time that it took.
    """

    key: str
    kind: str
    grammar: str
    seconds: float


@dataclass(eq=False)
class _Job:
    number: int
    key: str
    kind: str
    future: asyncio.Future[CheckedGrammar]
    num_waiting: int = 0


@dataclass
class _Answers:
    """The latest answers, by key: a grammar, or what is wrong with it."""

    by_key: OrderedDict[str, CheckedGrammar | str] = field(default_factory=OrderedDict)
    num_chars: int = 0

    def get(self, key: str) -> CheckedGrammar | str | None:
        if key in self.by_key:
            self.by_key.move_to_end(key)
        return self.by_key.get(key)

    def put(self, key: str, answer: CheckedGrammar | str) -> None:
        self.by_key[key] = answer
        self.num_chars += _size(answer)
        while len(self.by_key) > _MAX_ANSWERS or self.num_chars > _MAX_ANSWER_CHARS:
            self.num_chars -= _size(self.by_key.popitem(last=False)[1])


def _size(answer: CheckedGrammar | str) -> int:
    return len(answer) if isinstance(answer, str) else len(answer.grammar)


class GrammarChecks(asyncio.Protocol):
    """Tries grammars out, each text once. All methods run on the event loop.

    The worker is started by the first text: servers that constrain nothing have none.

    Args:
        tokenizer: from `tokenizer_json`.
        vocab_size: width of the logits.
        eos_token_ids: at least one.
    """

    def __init__(self, tokenizer: str, vocab_size: int, eos_token_ids: list[int]) -> None:
        self._tokenizer = tokenizer.encode()
        self._arguments = json.dumps([vocab_size, eos_token_ids])
        self._answers = _Answers()
        self._jobs: dict[int, _Job] = {}
        self._by_key: dict[str, _Job] = {}
        self._next = 0
        self._transport: asyncio.Transport | None = None
        self._starting: asyncio.Task[None] | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._decoder = FrameDecoder()

    async def check(self, kind: str, text: str) -> CheckedGrammar:
        """Try a constraint out. When the caller is cancelled, and was the last to wait for the text, its job ends.

        Raises:
            RequestError: it cannot be used.
            ChecksBusy: not now.
        """
        key = hashlib.sha256(f"{kind}\0{text}".encode("utf-8", "surrogatepass")).hexdigest()
        known = self._answers.get(key)
        if isinstance(known, str):
            raise RequestError(known)
        if known is not None:
            return known
        job = self._by_key.get(key) or await self._begin(key, kind, text)
        job.num_waiting += 1
        try:
            return await asyncio.shield(job.future)
        finally:
            job.num_waiting -= 1
            if not job.num_waiting and not job.future.done():
                self._forget(job)
                self._send((ToWorker.STOP, job.number))
                job.future.cancel()

    def close(self) -> None:
        """End the worker."""
        if self._transport is not None:
            self._transport.abort()
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    async def _begin(self, key: str, kind: str, text: str) -> _Job:
        if len(self._jobs) >= MAX_JOBS:
            raise ChecksBusy(f"{MAX_JOBS} other constraints are being compiled")
        if self._transport is None:
            if self._starting is None:
                self._starting = asyncio.create_task(self._start())
            await asyncio.shield(self._starting)
            if key in self._by_key:  # asked for meanwhile
                return self._by_key[key]
        self._next += 1
        job = _Job(self._next, key, kind, asyncio.get_running_loop().create_future())
        self._jobs[job.number] = self._by_key[key] = job
        self._send((ToWorker.JOB, job.number, kind, text))
        return job

    async def _start(self) -> None:
        ours, theirs = socket_pair()
        file = os.memfd_create("tokenizer")
        try:
            with os.fdopen(os.dup(file), "wb") as writer:
                writer.write(self._tokenizer)
            program = f"import sys; sys.path.insert(0, {_ROOT!r}); from {_WORKER} import main; main()"
            command = [sys.executable, "-c", program, str(theirs.fileno()), str(file), self._arguments]
            self._process = subprocess.Popen(command, pass_fds=(theirs.fileno(), file), stdin=subprocess.DEVNULL)
            await asyncio.get_running_loop().create_unix_connection(lambda: self, sock=ours)
        except OSError as error:
            raise ChecksBusy(f"the worker that compiles them cannot be started: {error}") from error
        finally:
            self._starting = None
            theirs.close()
            os.close(file)

    def _send(self, message: tuple[Any, ...]) -> None:
        if self._transport is not None:
            self._transport.write(encode(message))

    def _forget(self, job: _Job) -> None:
        self._jobs.pop(job.number, None)
        if self._by_key.get(job.key) is job:
            del self._by_key[job.key]

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        self._transport = transport  # type: ignore[assignment]
        self._decoder = FrameDecoder()

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - the protocol's signature
        """The worker has ended, and was not asked to: who waits may try again, with another worker."""
        self._transport = None
        self.close()
        for job in list(self._jobs.values()):
            self._forget(job)
            if not job.future.done():
                job.future.set_exception(ChecksBusy("the worker that compiles them has ended"))
                job.future.exception()

    def data_received(self, data: bytes) -> None:
        """Take answers in."""
        for number, error, grammar, seconds in self._decoder.feed(data):
            job = self._jobs.get(number)
            if job is None:
                continue
            self._forget(job)
            if grammar is None:
                job.future.set_exception(ChecksBusy(BUSY))
                job.future.exception()
                continue
            answer = CheckedGrammar(job.key, job.kind, grammar, seconds)
            self._answers.put(job.key, error or answer)
            if error:
                job.future.set_exception(RequestError(error))
                job.future.exception()
            else:
                job.future.set_result(answer)
