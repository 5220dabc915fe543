"""OpenTelemetry spans, one per request, under the attribute names that vLLM and the GenAI conventions use.

A caller's `traceparent` header makes the span part of the caller's trace. Spans leave in batches on a thread of their
own; a collector that is away costs nothing but its spans.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvarena.engine.server.api.answers import Answer

_CLOSE_MILLISECONDS = 2000


class Tracer:
    """Sends spans to a collector.

    Args:
        endpoint: its URL for traces over HTTP, such as `http://127.0.0.1:4318/v1/traces`.
    """

    def __init__(self, endpoint: str) -> None:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._provider = TracerProvider(resource=Resource.create({"service.name": "kvarena"}))
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint, timeout=5)))
        self._tracer = self._provider.get_tracer("kvarena.server")
        self._propagator = TraceContextTextMapPropagator()

    def record(self, answer: Answer, request_id: str, headers: Mapping[str, str]) -> None:
        """Record an ended request."""
        from opentelemetry.trace import SpanKind

        now, wall = time.monotonic(), time.time_ns()

        def at(moment: float) -> int:
            return wall - int((now - moment) * 1e9)

        usage = answer.usage()
        attributes: dict[str, Any] = {
            "gen_ai.request.id": request_id,
            "gen_ai.request.n": len(answer.choices),
            "gen_ai.usage.prompt_tokens": usage["prompt_tokens"],
            "gen_ai.usage.completion_tokens": usage["completion_tokens"],
            "gen_ai.latency.e2e": now - answer.arrival,
            "gen_ai.response.finish_reasons": [one.finish_reason or "abort" for one in answer.choices],
        }
        choice = answer.choices[0]
        if choice.first_time:
            attributes["gen_ai.latency.time_to_first_token"] = choice.first_time - answer.arrival
            attributes["gen_ai.latency.time_in_queue"] = max(0.0, choice.scheduled - answer.arrival)
        parent = self._propagator.extract(dict(headers))
        span = self._tracer.start_span(
            "llm_request", context=parent, kind=SpanKind.SERVER, attributes=attributes, start_time=at(answer.arrival)
        )
        span.end(end_time=wall)

    def close(self) -> None:
        """Send what is left; waits two seconds at most."""
        self._provider.force_flush(_CLOSE_MILLISECONDS)
