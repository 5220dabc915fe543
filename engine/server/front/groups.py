"""What one HTTP connection waits for: a group of choices, filled by the engine's frames."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from kvarena.engine.server.shared.ipc import Finish


class EngineGone(Exception):
    """The engine died, froze, or is being shut down: no more tokens will come."""


class Refused(Exception):
    """The engine did not take a request in. `reason` as in `vllm:admission_rejections`, or `invalid`."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class SlowReader(Exception):
    """The client of a stream reads too slowly."""


@dataclass(eq=False, slots=True)
class Choice:
    """One sequence of tokens that the engine makes.

    Attributes:
        tokens: arrived and not yet taken.
        logprobs: beside `tokens`, when asked for: (token id, logprob, rank, top).
        prompt_logprobs: by prompt position, when asked for; the choices of one prompt share it.
        scheduled: when its first step began, on the monotonic clock, or 0.
        num_cached_tokens: prompt tokens served from the prefix cache.
        finish: how it ended, once all tokens are here.
    """

    group: Group
    index: int
    handle: int
    num_prompt_tokens: int
    tokens: list[int] = field(default_factory=list)
    logprobs: list[Any] = field(default_factory=list)
    prompt_logprobs: dict[int, Any] = field(default_factory=dict)
    finish: Finish | None = None
    num_tokens: int = 0
    scheduled: float = 0.0
    num_cached_tokens: int = 0
    first_time: float = 0.0
    last_time: float = 0.0
    is_dirty: bool = False
    is_open: bool = True

    def take(self) -> tuple[list[int], list[Any]]:
        """The tokens that arrived since the last call, and their log-probabilities."""
        tokens, logprobs = self.tokens, self.logprobs
        self.tokens, self.logprobs = [], []
        return tokens, logprobs


class Group:
    """The choices of one HTTP request. One task waits on it."""

    __slots__ = ("arrival", "choices", "dirty", "error", "is_writing", "num_open", "on_stuck", "waiter")

    def __init__(self, arrival: float) -> None:
        self.arrival = arrival
        self.choices: list[Choice] = []
        self.dirty: list[Choice] = []
        self.error: BaseException | None = None
        self.waiter: asyncio.Future[None] | None = None
        self.num_open = 0
        self.is_writing = False  # its task is waiting for the client to read
        self.on_stuck: Callable[[], object] | None = None

    def wake(self) -> None:
        """Let the waiting task run."""
        waiter = self.waiter
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    def fail(self, error: BaseException) -> None:
        """End the wait with `error`; the first one counts."""
        if self.error is None:
            self.error = error
        self.wake()
        if self.is_writing and self.on_stuck is not None:
            self.on_stuck()

    async def changed(self) -> list[Choice]:
        """Wait for tokens or ends; the choices that have some. Raises what `fail` was given."""
        if not self.dirty and self.error is None:
            self.waiter = asyncio.get_running_loop().create_future()
            await self.waiter
            self.waiter = None
        if not self.dirty and self.error is not None:
            raise self.error
        dirty, self.dirty = self.dirty, []
        for choice in dirty:
            choice.is_dirty = False
        return dirty
