"""What is held of an answer: a call from where it begins, all that follows a thought, a thought's length."""

from __future__ import annotations

import json

import numpy as np
import pytest
from transformers import AutoTokenizer

from kvarena.engine.server.engine.grammars import GrammarCompiler, to_grammar, tokenizer_json
from kvarena.engine.server.forms import templates  # noqa: F401 - registers its form
from kvarena.engine.server.forms.finding import call_form
from kvarena.engine.server.forms.registry import CALL_FORMS
from kvarena.engine.server.forms.thoughts import CHANNELS, THOUGHT_FORMS
from tests.tokenizer_kinds import DEMO

SCHEMA = {
    "type": "object",
    "properties": {"x": {"type": "integer"}, "s": {"type": "string"}, "e": {"enum": ["p", "q"]}},
    "required": ["x"], "additionalProperties": False, "weird": 7,
}  # fmt: skip
TOOLS = [{"type": "function", "function": {"name": name, "parameters": SCHEMA}} for name in ("f", "g")]
MARKERS = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<|channel|>", "<|message|>", "<|start|>", "<|end|>")


@pytest.fixture(scope="module", params=("texts", "tokens"))
def compiler(request):
    """Of a tokenizer to which tags are texts, and of one to which they are tokens."""
    tokenizer = AutoTokenizer.from_pretrained(str(DEMO))
    if request.param == "tokens":
        seen = {one for kind in CALL_FORMS.values() for one in kind.seen}
        tokenizer.add_tokens([*MARKERS, *sorted(seen - set(MARKERS))])
    made = GrammarCompiler(tokenizer_json(tokenizer), len(tokenizer) + 3, [tokenizer.eos_token_id])
    made.encode = lambda text: tokenizer.encode(text, add_special_tokens=False)
    made.end = tokenizer.eos_token_id
    return made


def start(compiler, held=(), then=None, thought=None):
    spec = {"thought": thought, "then": then, "held": [list(one) for one in held]}
    return compiler("steered", to_grammar("steered", json.dumps(spec))).start()


def allowed(compiler, constraint):
    words = np.zeros(compiler._num_words, dtype=np.int32)
    if constraint.is_free:
        words[:] = -1
    else:
        constraint.fill(words)
    assert not constraint.failure
    return {i for i in range(compiler._num_words * 32) if int(words[i // 32]) >> (i % 32) & 1}


def follow(compiler, constraint, text):
    """How much of a text the constraint lets through; whether the text may end there."""
    for i, token in enumerate(ids := compiler.encode(text)):
        may = allowed(compiler, constraint)
        if token not in may:
            return text[: len(compiler.tokenizer.decode_str(ids[:i]))], False
        constraint.accept(token)
    return text, compiler.end in allowed(compiler, constraint)


B, E, N, F, S = (f"<｜tool▁{name}｜>" for name in ("calls▁begin", "calls▁end", "call▁begin", "call▁end", "sep"))
K = "<arg_key>{}</arg_key>\n<arg_value>{}</arg_value>\n"
GOOD = [
    ("hermes", 'Hi <tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call> and on'),
    ("mistral", '[TOOL_CALLS][{"name": "f", "arguments": {"x": 1}}, {"name": "g", "arguments": {"x": 2}}]'),
    ("mistral", 'Hi [TOOL_CALLS]f[ARGS]{"x": 1} and on'),
    ("llama", '{"name": "f", "parameters": {"x": 1, "s": "a"}}'),
    ("deepseek", f'Hi {B}{N}function{S}f\n```json\n{{"x": 1}}\n```{F}{E}'),
    ("deepseek", f'{B}{N}g{S}{{"x": 1}}{F}{E}'),
    ("glm", f"<tool_call>f\n{K.format('x', 1)}{K.format('s', 'any < text')}{K.format('e', 'q')}</tool_call>\n ok"),
    ("pythonic", '[f(x=1, s="a b"), g(x=2)]'),
    ("xml", "<tool_call>\n<function=f>\n<parameter=x>\n7\n</parameter>\n<parameter=s>\na < b\n</parameter>\n</function>"
     "\n</tool_call>\n"),
    ("channels", '<|channel|>commentary to=functions.f <|constrain|>json<|message|>{"x": 1}<|call|>'),
    ("channels", ' to=functions.g<|channel|>commentary json<|message|>{"x": 1}<|call|>'),
]  # fmt: skip
BAD = [  # what is let through of it
    ("hermes", 'Hi <tool_call>\n{"name": "f", "arguments": {"x": "no"}}</tool_call>',
     'Hi <tool_call>\n{"name": "f", "arguments": {"x":'),
    ("hermes", '<tool_call>{"name": "h", "arguments": {}}</tool_call>', '<tool_call>{"name": "'),
    ("mistral", '[TOOL_CALLS]f[ARGS]{"y": 1}', '[TOOL_CALLS]f[ARGS]{"'),
    ("llama", '{"name": "f", "parameters": {"x": 1.5}}', '{"name": "f", "parameters": {"x": 1'),
    ("deepseek", f'{B}{N}g{S}{{"x": null}}{F}{E}', f'{B}{N}g{S}{{"x":'),
    ("glm", f"<tool_call>f\n{K.format('s', 'x')}</tool_call>", "<tool_call>f\n<arg_key>"),
    ("pythonic", "[f(x='a')]", "[f(x="),
    ("xml", "<tool_call>\n<function=f>\n<parameter=x>\nseven\n</parameter>",
     "<tool_call>\n<function=f>\n<parameter=x>\n"),
    ("channels", ' to=functions.f<|channel|>commentary json<|message|>{"x": []}',
     ' to=functions.f<|channel|>commentary json<|message|>{"x":'),
]  # fmt: skip


@pytest.mark.parametrize(("name", "text"), GOOD)
def test_a_right_call_passes_and_the_text_is_free_again(compiler, name, text):
    assert follow(compiler, start(compiler, call_form(name).held(TOOLS)), text) == (text, True)


@pytest.mark.parametrize(("name", "text", "passes"), BAD)
def test_a_wrong_call_is_held_where_it_leaves_the_schema(compiler, name, text, passes):
    found, may_end = follow(compiler, start(compiler, call_form(name).held(TOOLS)), text)
    assert passes.startswith(found.rstrip(' "')) and len(found) >= len(passes) - 8 and not may_end
    cut = text[: len(found)]
    assert follow(compiler, start(compiler, call_form(name).held(TOOLS)), cut) == (cut, False)


def test_what_is_no_call_is_free(compiler):
    for name in ("hermes", "llama", "pythonic", "glm"):
        for text in ("Hello, [1, 2] and {3}", '{"name": "Bob", "age": 3}', "a <tool b", "f(x='a')"):
            assert follow(compiler, start(compiler, call_form(name).held(TOOLS)), text) == (text, True)


JSON = ("json", json.dumps({"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]}))


def think(has_begun, budget=None, form=THOUGHT_FORMS["think"]):
    return {"open": form.open, "close": form.close, "forced": form.forced, "has_begun": has_begun, "budget": budget}


@pytest.mark.parametrize(
    ("thought", "text", "ends"),
    [
        (think(True), 'Hm { any } text.\n</think>\n\n{"x": 1}', (True, True)),
        (think(False), '<think>Hm.</think>{"x": 1}', (True, True)),
        (think(False), '{"x": 1}', (True, True)),
        (think(True), "Hm. And no answer", (True, False)),  # it may not end in the thought
        (think(True), "Hm.</think>Hello", (False, False)),
        (think(False), "Hello", (False, False)),
        (think(True, form=CHANNELS), '<|channel|>analysis<|message|>Hm<|end|><|start|>assistant'
         '<|channel|>final<|message|>{"x": 2}', (True, True)),
    ],
)  # fmt: skip
def test_a_schema_holds_what_follows_the_thought(compiler, thought, text, ends):
    passed, may_end = follow(compiler, start(compiler, then=JSON, thought=thought), text)
    assert (passed == text, may_end) == ends


def write(compiler, constraint, wish, most=60):
    """A text of a model that would say `wish` over and over, and does what it must."""
    made, ids = [], compiler.encode(wish)
    for i in range(most):
        may = allowed(compiler, constraint)
        token = ids[i % len(ids)] if ids[i % len(ids)] in may else min(may)
        if len(may) == 1:
            [token] = may
        made.append(token)
        constraint.accept(token)
    return compiler.tokenizer.decode_str(made)


@pytest.mark.parametrize("budget", (0, 1, 5))
def test_a_thought_is_closed_when_its_budget_is_used_up(compiler, budget):
    text = write(compiler, start(compiler, thought=think(True, budget)), "so it is ")
    thought, _, answer = text.partition("</think>")
    assert len(compiler.encode(thought)) <= budget + 1 and answer
    opened = write(compiler, start(compiler, thought=think(False, budget)), "<think>abcdefgh ")
    assert "</think>" in opened


def test_a_budget_does_not_break_a_character(compiler):
    text = write(compiler, start(compiler, thought=think(True, 1)), "\U0001f680")
    assert "\ufffd" not in text.partition("</think>")[0]


def test_calls_are_held_behind_a_thought_and_not_in_it(compiler):
    held = call_form("hermes").held(TOOLS)
    wrong = '<tool_call>{"name": "f", "arguments": {"x": "no"}}</tool_call>'
    constraint = start(compiler, held, thought=think(True))
    assert follow(compiler, constraint, f"Hm {wrong} hm </think>")[0].endswith("</think>")
    assert follow(compiler, constraint, wrong)[0] != wrong
