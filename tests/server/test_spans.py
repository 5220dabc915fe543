"""What a request's spans tell, with the SDK's own exporter: a child for each part of its way, and no other."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from kvarena.engine.request import SamplingParams
from kvarena.engine.server.api.completions import CompletionAnswer
from kvarena.engine.server.api.protocol import CompletionRequest
from kvarena.engine.server.api.tracing import Tracer
from kvarena.engine.server.text.tokenization import TokenizerService


@pytest.fixture(scope="module")
def detokenizer():
    return TokenizerService("experiments/models/demo", False, None).detokenizer


@pytest.fixture
def traced():
    exporter = InMemorySpanExporter()
    return Tracer(SimpleSpanProcessor(exporter)), exporter


def answer_of(detokenizer, n=1, **asked):
    client = SimpleNamespace(eos_token_ids=frozenset(), abort=lambda *_: None)
    made = CompletionAnswer(
        client, CompletionRequest(prompt="x", **asked), "m", time.monotonic() - 10.0, detokenizer=detokenizer
    )
    made.add_prompt([20, 21, 22], SamplingParams(n=n, max_tokens=4, temperature=0.5), detokenizer.stream(True, []))
    return made


def run(answer, choice):
    """A choice that waits 2 s, whose prompt takes 1 s and whose other tokens take 3 s."""
    choice.scheduled, choice.first_time, choice.last_time = (answer.arrival + at for at in (2.0, 3.0, 6.0))
    choice.tokens, choice.num_tokens, choice.num_cached_tokens, choice.ended = [30, 31, 32, 33], 4, 1, "length"
    answer.delta(choice, *choice.advance())


def seconds(span):
    return (span.end_time - span.start_time) / 1e9


def test_a_request_s_parts_are_children_one_behind_the_other(detokenizer, traced):
    tracer, exporter = traced
    answer = answer_of(detokenizer, n=2)
    tracer.watch(answer)
    for choice in answer.choices:
        run(answer, choice)
    tracer.record(answer, "id-1", {})
    spans = exporter.get_finished_spans()
    [root] = [span for span in spans if span.parent is None]
    assert {
        "gen_ai.request.id": "id-1", "gen_ai.request.n": 2, "gen_ai.request.max_tokens": 4,
        "gen_ai.request.temperature": 0.5, "gen_ai.response.model": "m", "gen_ai.usage.num_sequences": 2,
        "gen_ai.usage.prompt_tokens": 3, "gen_ai.usage.completion_tokens": 8, "gen_ai.usage.input_tokens": 3,
        "gen_ai.usage.output_tokens": 8, "gen_ai.operation.name": "text_completion",
        "gen_ai.usage.cache_read.input_tokens": 1, "gen_ai.response.id": answer.id,
        "gen_ai.response.finish_reasons": ("length", "length"),
    }.items() <= dict(root.attributes).items()  # fmt: skip
    assert root.attributes["gen_ai.latency.time_in_queue"] == pytest.approx(2.0)
    assert root.attributes["gen_ai.latency.time_to_first_token"] == pytest.approx(3.0)
    for index in (0, 1):
        parts = {span.name: span for span in spans if span.attributes.get("gen_ai.response.choice") == index}
        assert list(parts) == ["queue", "prompt", "decode", "detokenize"]
        assert all(span.parent.span_id == root.context.span_id for span in parts.values())
        assert [seconds(parts[name]) for name in ("queue", "prompt", "decode")] == pytest.approx([2.0, 1.0, 3.0])
        assert parts["queue"].start_time == root.start_time
        assert parts["prompt"].start_time == pytest.approx(parts["queue"].end_time, abs=1e4)
        assert parts["decode"].start_time == pytest.approx(parts["prompt"].end_time, abs=1e4)
        assert parts["prompt"].attributes["gen_ai.latency.time_in_model_prefill"] == pytest.approx(1.0)
        assert parts["decode"].attributes["gen_ai.latency.time_in_model_decode"] == pytest.approx(3.0)
        text = parts["detokenize"]
        assert root.start_time <= text.start_time < text.end_time <= root.end_time
        assert 0 < text.attributes["gen_ai.latency.time_in_detokenize"] <= seconds(text) + 1e-6


def test_what_never_happened_has_no_span(detokenizer, traced):
    """A client that leaves the queue; one that leaves while its prompt is computed; an engine that is lost."""
    tracer, exporter = traced
    for scheduled, names in ((0.0, {"queue"}), (2.0, {"queue", "prompt"})):
        answer = answer_of(detokenizer)
        tracer.watch(answer)
        answer.choices[0].scheduled = scheduled and answer.arrival + scheduled
        answer.error = RuntimeError("the engine is gone") if scheduled else None
        exporter.clear()
        tracer.record(answer, "id", {})
        spans = exporter.get_finished_spans()
        assert {span.name for span in spans} == {"llm_request", *names}
        assert spans[-1].attributes["gen_ai.response.finish_reasons"] == ("abort",)
        assert spans[-1].status.is_ok is not bool(scheduled)


def test_a_caller_that_records_nothing_gets_no_span(detokenizer, traced):
    tracer, exporter = traced
    answer = answer_of(detokenizer)
    run(answer, answer.choices[0])  # and one whose text nobody timed
    tracer.record(answer, "id", {"traceparent": f"00-{'ab' * 16}-{'cd' * 8}-00"})
    assert not exporter.get_finished_spans()
    tracer.record(answer, "id", {"traceparent": f"00-{'ab' * 16}-{'cd' * 8}-01"})
    assert [span.name for span in exporter.get_finished_spans()] == ["queue", "prompt", "decode", "llm_request"]
    assert {span.context.trace_id for span in exporter.get_finished_spans()} == {int("ab" * 16, 16)}
