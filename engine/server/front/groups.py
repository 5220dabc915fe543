"""What one HTTP request waits for: a group of choices, filled by the engine's frames, and the texts that they make."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from kvarena.engine.request import SamplingParams
from kvarena.engine.server.shared.errors import bad_request
from kvarena.engine.server.shared.ipc import BAD_CONSTRAINT
from kvarena.engine.server.text.stops import StopMatcher
from kvarena.engine.server.text.streams import TextStream


class EngineGone(Exception):
    """The engine died, froze, or is being shut down: no more tokens will come."""


class Refused(Exception):
    """The engine did not take a request in. `reason` as in `vllm:admission_rejections`, or `invalid`."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class SlowReader(Exception):
    """The client of a stream reads too slowly."""


class ChoiceFailed(Exception):
    """The engine could not finish a choice."""


class Text(Protocol):
    """What a choice asks of its text; see `TextStream`."""

    @property
    def pending(self) -> str:
        """What `flush` would give."""
        ...

    def add(self, token_ids: Sequence[int]) -> str:
        """The text that these tokens complete."""
        ...

    def flush(self) -> str:
        """What is held at the end."""
        ...


class Source(Protocol):
    """Where choices come from.

    Attributes:
        eos_token_ids: the model's end-of-sequence tokens.
    """

    eos_token_ids: frozenset[int]

    def abort(self, choices: list[Choice], reason: str) -> None:
        """End choices early; those that have ended are let be."""
        ...


@dataclass(eq=False, slots=True)
class Choice:
    """One sequence of tokens that the engine makes, from its prompt to the end of its text.

    Attributes:
        group: what waits for it; `index` is its place there.
        prompt: token ids.
        sampling: how its tokens are picked.
        stream: the text that goes on from the prompt; its own.
        matcher: its stop strings.
        prompt_logprobs: by prompt position, when asked for; the choices of one prompt share it.
        engine: which of the server's engines has it.
        handle: under which the engine knows it; `first` is that of its prompt's first choice.

        tokens: arrived and not yet taken.
        logprobs: beside `tokens`, when asked for: (token id, logprob, rank, top).
        num_tokens: that arrived.
        scheduled: when its first step began, on the monotonic clock, or 0.
        num_cached_tokens: prompt tokens served from the prefix cache.
        first_time, last_time: when its first and last token arrived, or 0.
        ended: why the engine ended it, once all tokens are here; empty before.
        stop_token: the token that ended it, if one did.
        error: what went wrong.

        num_used: tokens that the text has taken: fewer where a stop string cut it.
        finish_reason, stop_reason: how the text ended, as clients are told.
        pieces, token_ids, entries: what a whole answer shows: text, tokens, and their log-probabilities.
    """

    group: Group
    index: int
    prompt: list[int]
    sampling: SamplingParams
    stream: Text
    matcher: StopMatcher
    prompt_logprobs: dict[int, Any]
    engine: int = 0
    handle: int = 0
    first: int = 0

    tokens: list[int] = field(default_factory=list)
    logprobs: list[Any] = field(default_factory=list)
    num_tokens: int = 0
    scheduled: float = 0.0
    num_cached_tokens: int = 0
    first_time: float = 0.0
    last_time: float = 0.0
    ended: str = ""
    stop_token: int | None = None
    error: str = ""
    is_dirty: bool = False

    num_used: int = 0
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    pieces: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    entries: list[Any] = field(default_factory=list)

    def advance(self) -> tuple[str, list[int], list[Any]]:
        """Take the new tokens; sets `finish_reason` when the text has ended.

        Returns:
            New text, the tokens, and the log-probabilities beside them where these were asked for.

        Raises:
            ChoiceFailed: the engine gave it up.
            ApiError: its structured output turned out to be impossible.
        """
        tokens, logprobs, matcher = self.tokens, self.logprobs, self.matcher
        self.tokens, self.logprobs = [], []
        shown = tokens
        if self.stop_token is not None and tokens and not matcher.include:
            shown = tokens[:-1]  # the token that ended it is counted and not shown
        if not matcher.stops:
            text, used = self.stream.add(shown) if shown else "", len(tokens)
        else:
            text, used = self._match(shown, len(tokens))
        if used < len(tokens):
            del tokens[used:], logprobs[used:]
        self.num_used += used
        if matcher.matched is not None:
            self.finish_reason, self.stop_reason = "stop", matcher.matched
            self.group.client.abort([self], "stop")
        elif self.ended:
            text += self._end()
        return text, tokens, logprobs

    def _match(self, shown: list[int], num_tokens: int) -> tuple[str, int]:
        """Text of `shown` up to a stop string, and how many tokens were used."""
        text = ""
        for i, token in enumerate(shown):
            piece = self.stream.add((token,))
            if self.num_used + i + 1 < self.sampling.min_tokens:
                text += piece
                continue
            text += self.matcher.add(piece)
            if self.matcher.matched is None and self.matcher.would_match(held := self.stream.pending):
                # Held because another token might change it; none will come.
                text += self.matcher.add(held)
            if self.matcher.matched is not None:
                return text, i + 1
        return text, num_tokens

    def _end(self) -> str:
        if self.ended == BAD_CONSTRAINT:
            raise bad_request(self.error, "structured_outputs", "constraint_failed")
        if self.ended not in ("stop", "length", "abort"):  # the last: by an operator's order
            raise ChoiceFailed(self.error or "the engine ended this request")
        self.finish_reason = self.ended
        is_eos = self.stop_token in self.group.client.eos_token_ids and not self.sampling.ignore_eos
        if self.stop_token is not None and not is_eos:
            self.stop_reason = self.stop_token
        tail = self.matcher.add(self.stream.flush())
        if self.matcher.matched is not None:
            self.finish_reason, self.stop_reason = "stop", self.matcher.matched
            return tail
        return tail + self.matcher.flush()


class Group:
    """The choices of one request. One task waits on it.

    Args:
        client: where its choices come from.
        arrival: when the request came, on the monotonic clock.
    """

    def __init__(self, client: Source, arrival: float) -> None:
        self.client, self.arrival = client, arrival
        self.choices: list[Choice] = []
        self.dirty: list[Choice] = []
        self.error: BaseException | None = None
        self.waiter: asyncio.Future[None] | None = None
        self.is_writing = False  # its task is waiting for the client to read
        self.on_stuck: Callable[[], object] | None = None

    def add(
        self, prompt: list[int], sampling: SamplingParams, stream: TextStream, stops: Sequence[str], include: bool
    ) -> list[Choice]:
        """The `sampling.n` choices of a prompt.

        Args:
            prompt: token ids.
            sampling: how the tokens are picked.
            stream: the text that goes on from the prompt; each choice takes a copy.
            stops, include: as of `StopMatcher`.
        """
        # One for all: the engine may compute a prompt for one choice only, and let the others share its KV.
        scores: dict[int, Any] = {}
        first = len(self.choices)
        made = [
            Choice(self, index, prompt, sampling, stream.copy(), StopMatcher(stops, include), scores)
            for index in range(first, first + sampling.n)
        ]
        self.choices += made
        return made

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
