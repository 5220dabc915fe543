"""Tool calls are found however the text is cut; what is no call is shown unchanged."""

from __future__ import annotations

import json
import random

import pytest

from engine.server.tool_calls import HermesParser, ListParser, LlamaParser, NamedParser, make_parser

HERMES = (
    'Let me see.\n<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>\n'
    '<tool_call>{"name": "g", "arguments": {}}</tool_call>'
)


def _run(parser, text, seed=0):
    rng = random.Random(seed)
    shown, calls, at = "", [], 0
    while at < len(text):
        size = rng.randint(1, 5)
        parsed = parser.add(text[at : at + size])
        shown, calls, at = shown + parsed.text, calls + parsed.calls, at + size
    parsed = parser.end()
    return shown + parsed.text, calls + parsed.calls


@pytest.mark.parametrize("seed", range(10))
def test_hermes_finds_calls_at_any_cut(seed):
    text, calls = _run(HermesParser(), HERMES, seed)
    assert text == "Let me see.\n"
    assert [(call.name, json.loads(call.arguments)) for call in calls] == [("f", {"x": 1}), ("g", {})]
    assert len({call.call_id for call in calls}) == 2


def test_hermes_shows_what_is_no_call():
    for text in ("a < b <tool", "<tool_call>not json</tool_call> x", "<tool_call>{", "plain"):
        assert _run(HermesParser(), text) == (text, [])


def test_hermes_takes_a_call_without_its_closing_tag():
    text, calls = _run(HermesParser(), '<tool_call>{"name": "f", "arguments": {"x": 2}}')
    assert text == ""
    assert calls[0].name == "f"


@pytest.mark.parametrize("seed", range(5))
def test_llama_takes_a_whole_answer(seed):
    text = '<|python_tag|>{"name": "f", "parameters": {"x": "y"}}; {"name": "g", "parameters": {}}'
    shown, calls = _run(LlamaParser(), text, seed)
    assert shown == ""
    assert [call.name for call in calls] == ["f", "g"]


def test_llama_shows_text_at_once():
    parser = LlamaParser()
    assert parser.add("Hello").text == "Hello"
    assert _run(LlamaParser(), '{"a": 1}') == ('{"a": 1}', [])


def test_required_calls():
    _, calls = _run(ListParser(), '[{"name": "f", "parameters": {"x": 1}}]')
    assert (calls[0].name, calls[0].arguments) == ("f", '{"x": 1}')


@pytest.mark.parametrize("seed", range(5))
def test_required_calls_are_given_one_by_one_and_a_cut_one_is_not_shown(seed):
    text = '[ {"name": "f", "parameters": {"x": "a}, {"}} ,\n{"name": "g", "parameters": {}}, {"name": "f", "para'
    shown, calls = _run(ListParser(), text, seed)
    assert shown == ""
    assert [(call.name, call.arguments) for call in calls] == [("f", '{"x": "a}, {"}'), ("g", "{}")]
    parser = ListParser()
    assert not parser.add('[{"name": "f", "parameters": {}').calls
    assert parser.add("}").calls[0].name == "f"  # the list goes on
    assert _run(ListParser(), '[{"name": "f", "par', seed) == ('[{"name": "f", "par', [])


def test_the_arguments_of_a_named_function_come_as_they_are_written():
    parser = NamedParser("f")
    first, second, last = parser.add('{"x"'), parser.add(": 1}"), parser.end()
    assert [call.name for call in first.calls] == ["f"]
    assert (first.arguments, second, last.calls) == ('{"x"', ("", [], ": 1}"), [])
    assert NamedParser("f").end().calls[0].arguments == ""


@pytest.mark.parametrize("seed", range(5))
def test_one_call_when_no_parallel_ones_are_wanted(seed):
    _, calls = _run(make_parser("hermes", None, parallel=False), HERMES, seed)
    assert [call.name for call in calls] == ["f"]
    text = '{"name": "f", "parameters": {}}; {"name": "g", "parameters": {}}'
    assert len(_run(make_parser("llama", None, parallel=False), text, seed)[1]) == 1


def test_the_template_decides_the_parser():
    assert isinstance(make_parser("auto", "... <|python_tag|> ..."), LlamaParser)
    assert isinstance(make_parser("auto", "<tool_call>"), HermesParser)
    assert make_parser("none", None) is None
