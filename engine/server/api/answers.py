"""How tokens reach an HTTP client: one answer at the end, or server-sent events as they come.

A stream ends in exactly one of three ways: a finish reason for every choice and `[DONE]`; an error event and
`[DONE]`; or the client went away. The bytes of an event are put together by hand: only the text itself is encoded.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import orjson
from starlette.responses import Response
from starlette.types import Receive, Scope, Send
from typing_extensions import override

from kvarena.engine.request import SamplingParams
from kvarena.engine.server.api.protocol import SamplingFields
from kvarena.engine.server.api.sampling import stop_strings
from kvarena.engine.server.front.engines import Engines
from kvarena.engine.server.front.groups import Choice, ChoiceFailed, EngineGone, Group, SlowReader
from kvarena.engine.server.front.http import disconnected
from kvarena.engine.server.shared.errors import ApiError
from kvarena.engine.server.text.streams import TextStream

logger = logging.getLogger("kvarena.front")

DONE = b"data: [DONE]\n\n"
_SLOW_READER_GRACE = 5.0
Made = TypeVar("Made")


class Disconnected(Exception):
    """The client went away."""


class Answer(Group, ABC):
    """The answer to one request: its choices, and the JSON of one kind of answer.

    Args:
        client: the engines.
        req: what is asked, and how it is shown.
        model: the name that was asked for.
        arrival: when the request came, on the monotonic clock.

    Attributes:
        prompts: the choices of each prompt.
        on_end: called once when the answer is over.
        shows_metrics: how long its parts took is told with it.

    Raises:
        ApiError: a stop string that cannot be one.
    """

    client: Engines
    prefix: str  # of its id
    event_kind: str  # the `object` of an event
    # What stands before and behind the text in an event that carries text alone.
    before_text: bytes
    after_text: bytes

    def __init__(self, client: Engines, req: SamplingFields, model: str, arrival: float) -> None:
        super().__init__(client, arrival)
        self.req, self._stops = req, stop_strings(req)
        self.prompts: list[list[Choice]] = []
        self.on_end: Callable[[], None] | None = None
        self.shows_metrics = False
        self._is_closed = False
        self._streams, self._return_token_ids = bool(req.stream), bool(req.return_token_ids)
        self._fields = {"id": f"{self.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}
        options = req.stream_options
        self._wants_usage = options is not None and bool(options.include_usage)
        # Every event has the counts so far; without include_usage it asks for nothing.
        self._counts = self._wants_usage and options is not None and bool(options.continuous_usage_stats)
        self._is_plain = not (self._return_token_ids or self._counts)  # events carry text alone
        self._prefixes: list[bytes] = []

    @property
    def id(self) -> str:
        """As its client knows it."""
        return str(self._fields["id"])

    @property
    def model(self) -> str:
        """The name that was asked for."""
        return str(self._fields["model"])

    @property
    def _head(self) -> dict[str, Any]:
        """What every event has beside its choices."""
        head = {"object": self.event_kind, **self._fields}
        return head | {"usage": self.usage()} if self._counts else head

    def add_prompt(self, prompt: list[int], sampling: SamplingParams, stream: TextStream) -> list[Choice]:
        """The choices of a prompt, whose text goes on in `stream`."""
        made = self.add(prompt, sampling, stream, self._stops, bool(self.req.include_stop_str_in_output))
        self.prompts.append(made)
        self._prefixes += [b"" if self._counts else self._text_prefix(choice) for choice in made]
        return made

    def _text_prefix(self, choice: Choice) -> bytes:
        """An event that carries text alone, up to the text."""
        prefix = b"data: " + orjson.dumps(self._head)[:-1] + b',"choices":[{"index":'
        return b"%b%d,%b" % (prefix, choice.index, self.before_text)

    @abstractmethod
    def begin(self) -> bytes:
        """Events before the first token."""

    def delta(self, choice: Choice, text: str, token_ids: list[int], logprobs: list[Any]) -> bytes:
        """Events for what `choice.advance` gave; empty when there is nothing to show.

        When the choice has ended (`choice.finish_reason`) it is the last call, and its last event carries the reason.
        """
        if not self._is_plain:
            return self._rich_delta(choice, text, token_ids, logprobs)
        if not self._streams:
            choice.pieces.append(text)
            return b""
        if choice.finish_reason is not None:
            return self._last_event(choice, text)
        return self._prefixes[choice.index] + orjson.dumps(text) + self.after_text if text else b""

    @abstractmethod
    def _rich_delta(self, choice: Choice, text: str, token_ids: list[int], logprobs: list[Any]) -> bytes:
        """The same, where more than text is shown."""

    @abstractmethod
    def _last_event(self, choice: Choice, text: str) -> bytes:
        """The event of an ended choice."""

    @abstractmethod
    def whole(self) -> bytes:
        """The body of an answer that is not streamed; `delta` has been called with everything."""

    def usage(self) -> dict[str, Any]:
        """Token counts so far."""
        # A prompt counts once, however many choices it has; so do its cached tokens.
        num_prompt = sum(len(choices[0].prompt) for choices in self.prompts)
        num_output = sum(choice.num_used for choice in self.choices)
        cached = [choice.num_cached_tokens for choice in self.choices]
        differ = len({len(choice.prompt) for choice in self.choices}) > 1
        num_cached = min(sum(cached) if differ else max(cached, default=0), num_prompt)
        return {
            "prompt_tokens": num_prompt,
            "completion_tokens": num_output,
            "total_tokens": num_prompt + num_output,
            "prompt_tokens_details": {"cached_tokens": num_cached},
        }

    def ending(self) -> bytes:
        """What a stream ends with, once all choices have ended."""
        if not self._wants_usage:
            return DONE
        return event(self._head | {"choices": [], "usage": self.usage()} | self.metrics()) + DONE

    def metrics(self) -> dict[str, Any]:
        """How long the parts of a request took, under `metrics`, where the operator wants that: of one choice.

        What there is not, such as the time between tokens of one token, is left out.
        """
        if not self.shows_metrics or len(self.choices) != 1:
            return {}
        [one] = self.choices
        made: dict[str, float] = {}
        if one.scheduled and one.first_time:
            seconds = one.last_time - one.first_time
            made["queue_time_ms"] = 1e3 * (one.scheduled - self.arrival)
            made["time_to_first_token_ms"] = 1e3 * (one.first_time - one.scheduled)
            made["generation_time_ms"] = 1e3 * seconds
            if one.num_tokens > 1:
                made["mean_itl_ms"] = 1e3 * seconds / (one.num_tokens - 1)
            if one.last_time > one.scheduled:
                made["tokens_per_second"] = one.num_tokens / (one.last_time - one.scheduled)
        return {"metrics": made}

    def broken(self, error: ApiError) -> bytes:
        """What a stream ends with that could not be finished."""
        return event(error.body()) + DONE

    def close(self) -> None:
        """The answer is over: end what is still open and free its slots."""
        self.client.abort(self.choices, "abort")
        if not self._is_closed:
            self._is_closed = True
            self.client.count_answer(max((choice.num_used for choice in self.choices), default=0))
            if self.on_end is not None:
                self.on_end()


def as_api_error(error: Exception) -> ApiError:
    """The answer for a request that could not be finished."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, EngineGone):
        return ApiError(503, f"The engine is gone: {error}", code="engine_dead", headers={"Retry-After": "5"})
    if isinstance(error, SlowReader):
        return ApiError(408, str(error), code="slow_reader")
    if isinstance(error, ChoiceFailed):
        return ApiError(500, str(error), code="engine_error")
    logger.error("a request failed in the server", exc_info=error)
    return ApiError(500, "The server failed to answer this request.", code="internal_error")


async def while_connected(receive: Receive, work: Coroutine[Any, Any, Made]) -> Made:
    """What `work` gives; a client that closes the connection ends it.

    It runs in a task of its own: waking a task resumes every coroutine between its root and where it waits; under the
    framework's layers that is a dozen more per token.

    Raises:
        Disconnected: the client went away.
    """
    task = asyncio.create_task(work)
    watcher = asyncio.create_task(disconnected(receive))
    watcher.add_done_callback(lambda _: None if watcher.cancelled() else task.cancel())
    try:
        return await task
    except asyncio.CancelledError:
        if watcher.done():
            raise Disconnected from None
        raise
    finally:
        watcher.cancel()


async def collect(answer: Answer) -> Response:
    """Wait for all choices and answer at once. Raises what a choice ended with."""
    try:
        num_open = len(answer.choices)
        while num_open:
            for choice in await answer.changed():
                if choice.finish_reason is None:
                    answer.delta(choice, *choice.advance())
                    num_open -= choice.finish_reason is not None
        return Response(answer.whole(), media_type="application/json")
    finally:
        answer.close()


class EventStream(Response):
    """Streams an answer as server-sent events.

    Its engine requests are aborted when the stream ends early, for whatever reason.
    """

    media_type = "text/event-stream"

    def __init__(self, answer: Answer, request_id: str) -> None:
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no", "x-request-id": request_id})
        self._answer = answer

    @override
    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Write the stream, past what is between the gate and here."""
        answer, state = self._answer, scope["state"]
        send, state["status"] = state["send"], 200
        headers = [(key, value) for key, value in self.raw_headers if key != b"content-length"]
        task = asyncio.current_task()

        def cut() -> None:
            if task is not None and not task.done():
                task.cancel()

        async def run() -> None:
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            try:
                await self._write(send)
            except Exception as error:
                last = answer.broken(as_api_error(error))
                # A reader that is too slow may never take its error either: then the connection is cut.
                timer = asyncio.get_running_loop().call_later(_SLOW_READER_GRACE, cut)
                await send({"type": "http.response.body", "body": last, "more_body": False})
                timer.cancel()

        answer.on_stuck = lambda: asyncio.get_running_loop().call_later(_SLOW_READER_GRACE, cut)
        try:
            with contextlib.suppress(Disconnected):
                await while_connected(receive, run())
        finally:
            answer.on_stuck = None
            answer.close()

    async def _write(self, send: Send) -> None:
        answer = self._answer
        num_open = len(answer.choices)
        pending = answer.begin()
        if pending:
            await send({"type": "http.response.body", "body": pending, "more_body": True})
        while num_open:
            parts: list[bytes] = []
            for choice in await answer.changed():
                if choice.finish_reason is not None:
                    continue
                parts.append(answer.delta(choice, *choice.advance()))
                num_open -= choice.finish_reason is not None
            if not num_open:
                parts.append(answer.ending())
            body = b"".join(parts)
            if body:
                answer.is_writing = True
                await send({"type": "http.response.body", "body": body, "more_body": bool(num_open)})
                answer.is_writing = False


def event(payload: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + orjson.dumps(payload) + b"\n\n"
