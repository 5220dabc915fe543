"""Structured output from a running server: what was asked for, or an error; never a text that only looks finished.

The numbers are the items of the reliability suite (docs/serving.md).
"""

from __future__ import annotations

import json

import pytest
from server_harness import stream_events
from test_bad_requests import COMPLETIONS, assert_error

from kvarena.experiments.benchmarks.under_attack import slow_patterns

LATE = 'start: "ab" rest\nrest: rest'  # nothing can follow "ab"


@pytest.mark.parametrize(
    "spec",
    (
        {"regex": "x{99999999}"}, {"regex": "(x{1000}){1000}"}, {"regex": ".*" * 2000},
        {"regex": "[^\\x00-\\x{10FFFF}]"}, {"grammar": "start: start"}, {"grammar": "start: a\na: b\nb: a"},
        {"json": {"$ref": "#"}},
        {"json": {"allOf": [{"anyOf": [{"properties": {f"a{i}{j}": {}}, "required": [f"a{i}{j}"]} for j in range(6)]}
                            for i in range(12)]}},
    ),
    ids=lambda spec: next(iter(spec)),
)  # fmt: skip
def test_15_what_cannot_be_matched_is_a_400(server, spec):
    error = assert_error(server.complete(structured_outputs=spec, max_tokens=3), 400)
    assert error["param"] == "structured_outputs"
    assert "cannot be used" in error["message"]


def test_15_a_grammar_that_leads_nowhere_ends_with_an_error(server):
    """Found while it is followed: the text so far must not pass for an answer."""
    body = {"prompt": "x", "max_tokens": 20, "structured_outputs": {"grammar": LATE}}
    error = assert_error(server.post(COMPLETIONS, body), 400)
    assert error["code"] == "constraint_failed"
    assert "no text matches it" in error["message"]
    with server.client.stream("POST", COMPLETIONS, json=body | {"stream": True}) as response:
        events = stream_events(response)
    assert events[-1] == "[DONE]"
    assert json.loads(events[-2])["error"]["code"] == "constraint_failed"
    server.assert_alive()


def test_a_choice_among_thousands(server):
    choices = [f"option {i}" for i in range(3000)]
    for n in (1, 2):
        answer = server.complete(structured_outputs={"choice": choices}, max_tokens=20, n=n, temperature=1.0).json()
        assert all(choice["text"] in choices for choice in answer["choices"])


def test_an_empty_schema_allows_any_json(server):
    whole = server.complete(structured_outputs={"json": {}}, max_tokens=200, temperature=0.5, seed=3)
    assert whole.status_code == 200, whole.text
    if whole.json()["choices"][0]["finish_reason"] == "stop":
        json.loads(whole.json()["choices"][0]["text"])
    assert_error(server.complete(structured_outputs={"json_object": False}), 400)


TOOL = {"type": "function", "function": {"name": "f", "parameters": {
    "type": "object", "properties": {"a": {"$ref": "#/$defs/A"}}, "required": ["a"], "$defs": {"A": {"type": "string"}},
}}}  # fmt: skip


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "f"}}])
@pytest.mark.parametrize("cut", [{"max_tokens": 1}, {"max_tokens": 40, "stop": ['"a"']}])
def test_a_call_that_is_cut_is_text_and_no_call(server, choice, cut):
    messages = [{"role": "user", "content": "Hello!"}]
    body = {"messages": messages, "tools": [TOOL], "tool_choice": choice, "temperature": 0, "seed": 1} | cut
    answer = server.post("/v1/chat/completions", body).json()["choices"][0]
    assert "tool_calls" not in answer["message"]
    assert answer["message"]["content"].lstrip()[:1] in ("{", "[", "")
    assert answer["finish_reason"] == ("length" if cut["max_tokens"] == 1 else "stop")


def test_a_mistake_in_a_gbnf_grammar_is_a_400(server):
    for grammar in ('root ::= "a', "root ::= [a", 'root ::= "a"{x}', "root ::= nowhere"):
        error = assert_error(server.complete(structured_outputs={"grammar": grammar}), 400)
        assert error["param"] == "structured_outputs"


def test_hundreds_of_prompts_with_a_schema_that_is_slow_to_compile(server):
    """Compiled once for all of them; one of six times the size is refused."""
    body = {"prompt": ["x"] * 200, "max_tokens": 2, "structured_outputs": {"json": slow_patterns(0, 100)}}
    answer = server.post(COMPLETIONS, body)
    assert answer.status_code == 200, answer.text
    assert len(answer.json()["choices"]) == 200
    assert_error(server.complete(structured_outputs={"json": slow_patterns(0, 600)}), 400)
    server.assert_alive()
