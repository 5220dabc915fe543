"""A front's connection to one engine: requests out, tokens in, bounded for slow readers.

A *group* is what one HTTP connection waits for: one or several choices. All that a step brings for a group arrives in
one frame, and wakes its task once: one write per step and connection. Nothing waits for a slow reader: its tokens
pile up as integers, are merged when it reads again, and beyond `max_stream_lag` of them its request ends.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from kvarena.engine.server.engine.grammar_checks import CheckedGrammar
from kvarena.engine.server.front.groups import Choice, EngineGone, Refused, SlowReader
from kvarena.engine.server.shared.ipc import (
    AddFrame,
    EngineInfo,
    FrameDecoder,
    ToEngine,
    ToFront,
    encode,
    unpack_ids,
)
from kvarena.engine.server.shared.metrics import Histogram, Row

MAX_HANDLE = 2**31 - 4096


class Sent(NamedTuple):
    """A prompt of which no token has come: what it takes to send it to another engine."""

    frame: AddFrame
    waiting: list[Choice]
    grammar: CheckedGrammar | None
    admission: asyncio.Future[None]


class EngineClient(asyncio.Protocol):
    """Speaks to an engine's process. All methods run on the event loop.

    Args:
        number: of the engine.
        row: this front's metrics of it.
        max_stream_lag: tokens that a choice's reader may lag behind.
        on_pool_map: called with each dashboard frame.
        on_lost: called with the engine's end: why, and the prompts that nobody has seen a token of.

    Attributes:
        info: what the engine can do, once it is ready.
        gone: why there is no engine any more; empty before.
    """

    def __init__(
        self,
        number: int,
        row: Row,
        max_stream_lag: int,
        on_pool_map: Callable[[dict[str, Any]], None],
        on_lost: Callable[[str, list[Sent]], None],
    ) -> None:
        self.info: EngineInfo | None = None
        self.ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.gone: str = ""
        self._number, self._on_lost = number, on_lost
        self._row, self._max_lag, self._on_pool_map = row, max_stream_lag, on_pool_map
        self._decoder = FrameDecoder()
        self._choices: dict[int, Choice] = {}
        self._queued: dict[int, int] = {}  # prompt tokens by first handle, until a step has begun them
        self._silent: dict[int, Sent] = {}  # prompts by first handle, until a token comes
        self._admissions: dict[int, tuple[asyncio.Future[None], list[Choice]]] = {}
        self._next_handle = 1
        self._orders: dict[int, asyncio.Future[dict[str, Any]]] = {}  # by token, until they are done
        self._tokens = itertools.count()
        self._transport: asyncio.Transport | None = None
        self._itl = Histogram(row, "vllm:inter_token_latency_seconds")
        self._ttft = Histogram(row, "vllm:time_to_first_token_seconds")

    @property
    def num_open(self) -> int:
        """Choices that have not ended."""
        return len(self._choices)

    def submit(
        self,
        frame: AddFrame,
        choices: list[Choice],
        grammar: CheckedGrammar | None = None,
        admission: asyncio.Future[None] | None = None,
    ) -> asyncio.Future[None]:
        """Hand a prompt to the engine; the future is done when the engine has queued it.

        Args:
            frame: what is asked; its handle is picked here.
            choices: `frame.sampling.n` that wait for its tokens.
            grammar: that they follow; the engine was told of it.
            admission: the future; None: a new one.

        Raises:
            Refused: (the future) the engine cannot take it.
            EngineGone: there is no engine; the future raises it, too.
        """
        if self.gone:
            raise EngineGone(self.gone)
        handle = self._next_handle
        self._next_handle = handle + len(choices) if handle < MAX_HANDLE else 1
        for choice_handle, choice in enumerate(choices, start=handle):
            choice.engine, choice.handle, choice.first = self._number, choice_handle, handle
            self._choices[choice_handle] = choice
        if admission is None:
            admission = asyncio.get_running_loop().create_future()
        self._admissions[handle] = (admission, choices)
        admission.add_done_callback(lambda _: self._admissions.pop(handle, None))
        num_tokens = len(choices[0].prompt)
        self._silent[handle], self._queued[handle] = Sent(frame, choices, grammar, admission), num_tokens
        self._row.inc("num_sent")
        self._row.inc("queued_tokens", by=num_tokens)
        self._row.inc("tokens_to_compute", by=num_tokens)
        self._row.set("num_open", len(self._choices))
        self._send(ToEngine.ADD, *frame._replace(handle=handle))
        return admission

    def constrain(self, grammar: CheckedGrammar) -> None:
        """Announce a grammar that the next prompts are to follow: once for all of a request's."""
        self._send(ToEngine.CONSTRAINT, *grammar)

    def abort(self, choices: list[Choice], reason: str) -> None:
        """End choices early and free their slots; `reason` is what the metrics count."""
        handles = []
        for choice in choices:
            # Handles begin anew with an engine that takes another one's place.
            if self._choices.get(choice.handle) is choice:
                self._leave(choice)
                handles.append(choice.handle)
                self._close(choice, reason, time.monotonic(), None)
        if handles:
            self._send(ToEngine.ABORT, handles, reason == "stop")

    def _leave(self, choice: Choice) -> None:
        """The engine has a choice no more."""
        self._choices.pop(choice.handle, None)
        self._begun(choice)
        self._heard(choice)
        self._row.set("num_open", len(self._choices))

    def _begun(self, choice: Choice) -> None:
        """A step has begun a choice's prompt, or none will."""
        self._row.inc("queued_tokens", by=-self._queued.pop(choice.first, 0))

    def _heard(self, choice: Choice) -> None:
        """A token of a choice's prompt has come, or none will."""
        if self._silent.pop(choice.first, None) is not None:
            self._row.inc("tokens_to_compute", by=-len(choice.prompt))

    def count_answer(self, num_tokens: int) -> None:
        """Count an answer whose longest choice has `num_tokens`."""
        self._row.observe("vllm:request_max_num_generation_tokens", num_tokens)

    def watch(self, on: bool) -> None:
        """Ask for dashboard frames, or stop them."""
        self._send(ToEngine.WATCH, on)

    def order(self, kind: str, given: dict[str, Any]) -> asyncio.Future[dict[str, Any]]:
        """Order the engine to do something (`engine/orders.py`); the future has what came of it, or EngineGone."""
        done = asyncio.get_running_loop().create_future()
        token = next(self._tokens)
        self._orders[token] = done
        done.add_done_callback(lambda one: self._orders.pop(token, None) and not one.cancelled() and one.exception())
        if self.gone:
            done.set_exception(EngineGone(self.gone))
        self._send(ToEngine.ORDER, token, kind, given)
        return done

    def _send(self, *message: Any) -> None:
        if self._transport is not None and not self.gone:
            self._transport.write(encode(message))

    def fail_all(self, reason: str, may_retry: bool = True) -> None:
        """The engine is gone: it gets no more prompts, and `on_lost` learns of those that another one may have.

        Every other open stream ends with an error. Without `may_retry` all do.
        """
        if self.gone:
            return
        self.gone = reason
        error = EngineGone(reason)
        if not self.ready.done():
            self.ready.set_exception(error)
            self.ready.exception()
        silent = list(self._silent.values()) if may_retry else []
        unheard = [sent for sent in silent if not any(choice.ended or choice.num_tokens for choice in sent.waiting)]
        spared = {choice.handle for sent in unheard for choice in sent.waiting}
        for handle, (admission, _) in list(self._admissions.items()):
            if handle not in spared and not admission.done():
                admission.set_exception(error)
        for done in list(self._orders.values()):
            if not done.done():
                done.set_exception(error)
        for choice in list(self._choices.values()):
            self._leave(choice)
            if choice.handle not in spared:
                self._row.inc("vllm:request_success", "error")
                choice.group.fail(error)
        self._on_lost(reason, unheard)

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        self._transport = transport  # type: ignore[assignment]

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - the protocol's signature
        """The engine process has ended."""
        self.fail_all("the engine process has ended")

    def data_received(self, data: bytes) -> None:
        """Deal frames out."""
        for message in self._decoder.feed(data):
            kind = message[0]
            if kind == ToFront.STEP:
                self._on_step(*message[1:])
            elif kind == ToFront.POOL_MAP:
                self._on_pool_map(message[1])
            elif kind == ToFront.ORDER:
                done = self._orders.get(message[1])
                if done is not None and not done.done():
                    done.set_result(message[2])
            elif kind == ToFront.READY:
                self.info = message[1]
                if not self.ready.done():
                    self.ready.set_result(None)

    def _on_step(
        self,
        admitted: list[tuple[int, str, str]],
        started: list[tuple[int, float, int]],
        packed_handles: bytes,
        packed_tokens: bytes,
        logprobs: list[tuple[int, Any]],
        prompt_logprobs: list[tuple[int, int, Any]],
        finished: list[tuple[int, str, int | None, str, int]],
    ) -> None:
        for handle, reason, text in admitted:
            self._on_admission(handle, reason, text)
        for handle, scheduled, num_cached in started:
            choice = self._choices.get(handle)
            if choice is not None:
                choice.scheduled, choice.num_cached_tokens = scheduled, num_cached
                self._begun(choice)
        handles, tokens = unpack_ids(packed_handles), unpack_ids(packed_tokens)
        for at, entry in logprobs:
            choice = self._choices.get(handles[at])
            if choice is not None:
                choice.logprobs.append(entry)
        for handle, first, entries in prompt_logprobs:
            choice = self._choices.get(handle)
            if choice is not None:
                choice.prompt_logprobs.update(enumerate(entries, start=first))
        now = time.monotonic()
        choices, max_lag, itl = self._choices, self._max_lag, self._itl
        lagging = []
        for handle, token in zip(handles, tokens, strict=True):
            choice = choices.get(handle)
            if choice is None:
                continue
            choice.tokens.append(token)
            choice.num_tokens += 1
            if choice.last_time:
                if choice.last_time != now:  # of a beam all come at once
                    itl.observe(now - choice.last_time)
            else:
                choice.first_time = now
                self._heard(choice)
                self._ttft.observe(now - choice.group.arrival)
            choice.last_time = now
            if not choice.is_dirty:
                choice.is_dirty = True
                choice.group.dirty.append(choice)
            elif len(choice.tokens) > max_lag and choice.group.is_writing:
                lagging.append(choice)
                continue
            choice.group.wake()
        for how in finished:
            self._on_finish(*how, now)
        for choice in lagging:
            self._row.inc("kvarena:slow_reader_aborts")
            choice.group.fail(SlowReader(f"the client did not read for {max_lag} tokens"))
            self.abort([choice], "abort")

    def _on_admission(self, handle: int, reason: str, text: str) -> None:
        admission, choices = self._admissions.get(handle, (None, []))
        if admission is None or admission.done():
            return
        if not reason:
            admission.set_result(None)
            return
        # The engine has none of this prompt's choices; of the request's other prompts it may have.
        for choice in choices:
            self._leave(choice)
        admission.set_exception(Refused(reason, text))

    def _on_finish(
        self, handle: int, reason: str, stop_token: int | None, error: str, num_preemptions: int, now: float
    ) -> None:
        choice = self._choices.get(handle)
        if choice is None:
            return
        self._leave(choice)
        choice.ended, choice.stop_token, choice.error = reason, stop_token, error
        self._close(choice, reason, now, num_preemptions)
        if not choice.is_dirty:
            choice.is_dirty = True
            choice.group.dirty.append(choice)
        choice.group.wake()

    def _close(self, choice: Choice, reason: str, now: float, num_preemptions: int | None) -> None:
        """Count an ended choice."""
        row, count, num_prompt = self._row, choice.num_tokens, len(choice.prompt)
        row.inc("vllm:request_success", reason if reason in ("stop", "length", "abort") else "error")
        row.observe("vllm:e2e_request_latency_seconds", now - choice.group.arrival)
        row.observe("vllm:request_prompt_tokens", num_prompt)
        row.observe("vllm:request_generation_tokens", count)
        if reason not in ("stop", "length") or not count:
            return
        if num_preemptions is not None:  # a stop string is found here, where preemptions are not known
            row.observe("vllm:request_num_preemptions", num_preemptions)
        row.observe("vllm:request_prefill_kv_computed_tokens", num_prompt - choice.num_cached_tokens)
        row.observe("vllm:request_queue_time_seconds", max(0.0, choice.scheduled - choice.group.arrival))
        row.observe("vllm:request_inference_time_seconds", now - choice.scheduled)
        row.observe("vllm:request_prefill_time_seconds", max(0.0, choice.first_time - choice.scheduled))
        row.observe("vllm:request_decode_time_seconds", choice.last_time - choice.first_time)
        if count > 1:
            row.observe(
                "vllm:request_time_per_output_token_seconds", (choice.last_time - choice.first_time) / (count - 1)
            )
