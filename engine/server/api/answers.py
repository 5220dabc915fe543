"""How tokens reach an HTTP client: one answer at the end, or server-sent events as they come.

A stream ends in exactly one of three ways: a finish reason for every choice and `[DONE]`; an error event and
`[DONE]`; or the client went away. The bytes of an event are put together by hand: only the text itself is encoded.
"""

from __future__ import annotations

import asyncio
import logging
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from typing import Any

import orjson
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from kvarena.engine.server.api.choice_text import ChoiceFailed, ChoiceText, Delta, usage_body
from kvarena.engine.server.front.client import EngineClient
from kvarena.engine.server.front.groups import EngineGone, Group, SlowReader
from kvarena.engine.server.front.http import RequestState
from kvarena.engine.server.shared.errors import ApiError

logger = logging.getLogger("kvarena.front")

DONE = b"data: [DONE]\n\n"
_SLOW_READER_GRACE = 5.0


class Disconnected(Exception):
    """The client went away."""


class Renderer(ABC):
    """The JSON of one kind of answer."""

    @abstractmethod
    def begin(self) -> bytes:
        """Events before the first token."""

    @abstractmethod
    def delta(self, text: ChoiceText, delta: Delta) -> bytes:
        """Events for what is new of a choice; empty when there is nothing to show.

        When the choice has ended (`text.finish_reason`) it is the last call, and its last event carries the reason.
        """

    @abstractmethod
    def usage(self, usage: dict[str, Any]) -> bytes:
        """The event that carries the usage."""

    @abstractmethod
    def whole(self, usage: dict[str, Any]) -> bytes:
        """The body of an answer that is not streamed; `delta` has been called with everything."""


@dataclass
class Job:
    """A request that the engine has taken in.

    Attributes:
        group: what to wait on.
        texts: its choices, by index.
        renderer: how they look.
        client: the engine.
        num_prompt_tokens: of all prompts together.
        include_usage: end a stream with a usage event.
        on_end: called once when the answer is over.
    """

    group: Group
    texts: list[ChoiceText]
    renderer: Renderer
    client: EngineClient
    num_prompt_tokens: int
    include_usage: bool = False
    on_end: Callable[[], None] | None = None
    is_closed: bool = False

    def usage(self) -> dict[str, Any]:
        """Token counts so far."""
        # A prompt counts once, however many choices it has; so do its cached tokens.
        cached = max((text.choice.num_cached_tokens for text in self.texts), default=0)
        if len({text.choice.num_prompt_tokens for text in self.texts}) > 1:
            cached = sum(text.choice.num_cached_tokens for text in self.texts)
        return usage_body(
            self.num_prompt_tokens, sum(text.num_tokens for text in self.texts), min(cached, self.num_prompt_tokens)
        )

    def close(self) -> None:
        """The answer is over: end what is still open and free its slots."""
        self.client.abort([text.choice for text in self.texts], "abort")
        if not self.is_closed:
            self.is_closed = True
            self.client.count_answer(max((text.num_tokens for text in self.texts), default=0))
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


async def watch_disconnect(receive: Receive, group: Group) -> None:
    """End the group's wait when the client closes the connection."""
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            group.fail(Disconnected())
            return


async def while_connected(receive: Receive, group: Group, work: Callable[[], Awaitable[Any]]) -> Any:
    """Run `work`; a disconnect ends the group's wait meanwhile."""
    watcher = asyncio.create_task(watch_disconnect(receive, group))
    try:
        return await work()
    finally:
        watcher.cancel()


async def collect(job: Job, receive: Receive) -> Response:
    """Wait for all choices and answer at once. Raises Disconnected, or ApiError when a choice failed."""

    async def run() -> Response:
        num_open = len(job.texts)
        by_choice = {text.choice: text for text in job.texts}
        while num_open:
            for choice in await job.group.changed():
                text = by_choice[choice]
                if text.finish_reason is None:
                    job.renderer.delta(text, text.advance())
                    num_open -= text.finish_reason is not None
        return Response(job.renderer.whole(job.usage()), media_type="application/json")

    try:
        return await while_connected(receive, job.group, run)
    except (EngineGone, ChoiceFailed) as error:
        raise as_api_error(error) from error
    finally:
        job.close()


class EventStream(Response):
    """Streams a job as server-sent events.

    The job's engine requests are aborted when the stream ends early, for whatever reason.
    """

    media_type = "text/event-stream"

    def __init__(self, job: Job, headers: dict[str, str]) -> None:
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no", **headers})
        self._job = job

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Write the stream, past what is between the gate and here."""
        job = self._job
        state: RequestState = scope["kvarena"]
        send, state.status = state.direct_send, 200
        headers = [(key, value) for key, value in self.raw_headers if key != b"content-length"]
        task = asyncio.current_task()

        def cut() -> None:
            if task is not None and not task.done():
                task.cancel()

        async def run() -> None:
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            try:
                await self._write(send)
            except Disconnected:
                return
            except asyncio.CancelledError:
                raise
            except Exception as error:
                event = b"data: " + orjson.dumps(as_api_error(error).body()) + b"\n\n" + DONE
                # A reader that is too slow may never take its error either: then the connection is cut.
                timer = asyncio.get_running_loop().call_later(_SLOW_READER_GRACE, cut)
                await send({"type": "http.response.body", "body": event, "more_body": False})
                timer.cancel()

        job.group.on_stuck = lambda: asyncio.get_running_loop().call_later(_SLOW_READER_GRACE, cut)
        try:
            await while_connected(receive, job.group, lambda: _apart(run()))
        finally:
            job.group.on_stuck = None
            job.close()

    async def _write(self, send: Send) -> None:
        job, renderer = self._job, self._job.renderer
        by_choice = {text.choice: text for text in job.texts}
        num_open = len(job.texts)
        pending = renderer.begin()
        if pending:
            await send({"type": "http.response.body", "body": pending, "more_body": True})
        while num_open:
            parts: list[bytes] = []
            for choice in await job.group.changed():
                text = by_choice[choice]
                if text.finish_reason is not None:
                    continue
                parts.append(renderer.delta(text, text.advance()))
                num_open -= text.finish_reason is not None
            if not num_open:
                if job.include_usage:
                    parts.append(renderer.usage(job.usage()))
                parts.append(DONE)
            body = b"".join(parts)
            if body:
                job.group.is_writing = True
                await send({"type": "http.response.body", "body": body, "more_body": bool(num_open)})
                job.group.is_writing = False


async def _apart(work: Coroutine[Any, Any, None]) -> None:
    """Run `work` in a task of its own.

    Waking a task resumes every coroutine between its root and where it waits; under the framework's layers that is a
    dozen more per token.
    """
    task = asyncio.create_task(work)
    try:
        await task
    finally:
        task.cancel()


def event(payload: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + orjson.dumps(payload) + b"\n\n"
