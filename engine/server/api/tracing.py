"""OpenTelemetry spans of requests, under the attribute names that vLLM and the GenAI conventions use.

    llm_request  |---------------------------------------|
      queue      |----|
      prompt          |-----|
      decode                |------------------------|
      detokenize             |------------------------|      between its first text and its last

Children are of each choice. A caller's `traceparent` header makes the span part of the caller's trace, and one that
says not to record is heeded. Spans leave in batches on a thread of their own; a collector that is away costs its spans
alone.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import SpanProcessor

    from kvarena.engine.server.api.answers import Answer
    from kvarena.engine.server.front.groups import Choice, Text

_CLOSE_MILLISECONDS = 2000
_OPERATIONS = {"cmpl": "text_completion"}  # by the prefix of an answer's id; all others are chats


class TimedText:
    """A choice's text, and when the front made it.

    Args:
        text: what it is.

    Attributes:
        begin, end: of the first piece, and of the last, on the monotonic clock; 0 before.
        seconds: that went into them.
    """

    def __init__(self, text: Text) -> None:
        self._text = text
        self.begin = self.end = self.seconds = 0.0

    def add(self, token_ids: Sequence[int]) -> str:
        """As of `TextStream`."""
        start = time.monotonic()
        piece = self._text.add(token_ids)
        self._count(start)
        return piece

    def flush(self) -> str:
        """As of `TextStream`."""
        start = time.monotonic()
        piece = self._text.flush()
        self._count(start)
        return piece

    @property
    def pending(self) -> str:
        """As of `TextStream`."""
        return self._text.pending

    def _count(self, start: float) -> None:
        self.begin, self.end = self.begin or start, time.monotonic()
        self.seconds += self.end - start


class _Part(NamedTuple):
    """A child: its name, when it began and ended, and what is told of it."""

    name: str
    begin: float
    end: float
    attributes: dict[str, Any]


class Tracer:
    """Makes the spans of requests.

    Args:
        processor: takes them.
    """

    def __init__(self, processor: SpanProcessor) -> None:
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._provider = TracerProvider(resource=Resource.create({"service.name": "kvarena"}))
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer("kvarena.server")
        self._propagator = TraceContextTextMapPropagator()

    @classmethod
    def to_collector(cls, endpoint: str) -> Tracer:
        """One that sends to a collector's URL for traces over HTTP, such as `http://127.0.0.1:4318/v1/traces`."""
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        return cls(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint, timeout=5)))

    def watch(self, answer: Answer) -> None:
        """Time the text of an answer that begins."""
        for choice in answer.choices:
            choice.stream = TimedText(choice.stream)

    def record(self, answer: Answer, request_id: str, headers: Mapping[str, str]) -> None:
        """Record an ended request."""
        from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context

        now, wall = time.monotonic(), time.time_ns()

        def at(moment: float) -> int:
            return wall - int((now - moment) * 1e9)

        parent = self._propagator.extract(dict(headers))
        span = self._tracer.start_span(
            "llm_request",
            context=parent,
            kind=SpanKind.SERVER,
            attributes=_attributes(answer, request_id, now),
            start_time=at(answer.arrival),
        )
        if span.is_recording():
            if answer.error is not None:
                span.set_status(Status(StatusCode.ERROR, str(answer.error)))
            context = set_span_in_context(span)
            for choice in answer.choices:
                for part in _parts(choice, answer.arrival, now):
                    told = part.attributes | {"gen_ai.response.choice": choice.index}
                    child = self._tracer.start_span(
                        part.name, context=context, attributes=told, start_time=at(part.begin)
                    )
                    child.end(end_time=at(part.end))
        span.end(end_time=wall)

    def close(self) -> None:
        """Send what is left; waits two seconds at most."""
        self._provider.force_flush(_CLOSE_MILLISECONDS)


def _attributes(answer: Answer, request_id: str, now: float) -> dict[str, Any]:
    usage, choice = answer.usage(), answer.choices[0]
    sampling = choice.sampling
    made: dict[str, Any] = {
        "gen_ai.operation.name": _OPERATIONS.get(answer.prefix, "chat"),
        "gen_ai.request.id": request_id,
        "gen_ai.request.n": sampling.n,
        "gen_ai.request.max_tokens": sampling.max_tokens,
        "gen_ai.request.temperature": sampling.temperature,
        "gen_ai.request.top_p": sampling.top_p,
        "gen_ai.response.id": answer.id,
        "gen_ai.response.model": answer.model,
        "gen_ai.response.finish_reasons": [one.finish_reason or "abort" for one in answer.choices],
        "gen_ai.usage.num_sequences": len(answer.choices),
        "gen_ai.usage.prompt_tokens": usage["prompt_tokens"],
        "gen_ai.usage.completion_tokens": usage["completion_tokens"],
        # As the conventions call these today.
        "gen_ai.usage.input_tokens": usage["prompt_tokens"],
        "gen_ai.usage.output_tokens": usage["completion_tokens"],
        "gen_ai.usage.cache_read.input_tokens": usage["prompt_tokens_details"]["cached_tokens"],
        "gen_ai.latency.e2e": now - answer.arrival,
    }
    if choice.first_time:
        made["gen_ai.latency.time_to_first_token"] = choice.first_time - answer.arrival
        made["gen_ai.latency.time_in_queue"] = max(0.0, choice.scheduled - answer.arrival)
    return made


def _parts(choice: Choice, arrival: float, now: float) -> Iterator[_Part]:
    """What became of a choice, up to `now`; one that never left the queue has no other part."""
    begun = max(choice.scheduled, arrival) if choice.scheduled else now
    yield _Part("queue", arrival, begun, {"gen_ai.latency.time_in_queue": begun - arrival})
    if not choice.scheduled:
        return
    first = max(begun, choice.first_time or now)
    told = {"gen_ai.usage.prompt_tokens": len(choice.prompt), "gen_ai.usage.cached_tokens": choice.num_cached_tokens}
    yield _Part("prompt", begun, first, {"gen_ai.latency.time_in_model_prefill": first - begun} | told)
    if not choice.first_time:
        return
    seconds = choice.last_time - first
    told = {"gen_ai.usage.completion_tokens": choice.num_tokens}
    yield _Part("decode", first, choice.last_time, {"gen_ai.latency.time_in_model_decode": seconds} | told)
    text = choice.stream
    if isinstance(text, TimedText) and text.begin:
        yield _Part("detokenize", text.begin, text.end, {"gen_ai.latency.time_in_detokenize": text.seconds})
