"""Each form of calls and thoughts, found by its name and by its template; whole and cut at every character."""

from __future__ import annotations

import pytest
from test_tool_calls import CALLED, EACH, TURNS, Tokenizer, at_any_cut

from kvarena.engine.server.forms import finding, templates  # noqa: F401 - registers its form
from kvarena.engine.server.forms.calls import ListParser, Thought, parts_of
from kvarena.engine.server.forms.channels import ChannelParser
from kvarena.engine.server.forms.finding import call_form, find_form
from kvarena.engine.server.forms.registry import CALL_FORMS
from kvarena.engine.server.forms.texts import TaggedParser
from kvarena.engine.server.forms.thoughts import (
    CHANNELS,
    THOUGHT_FORMS,
    AfterThoughts,
    ThoughtParser,
    find_thoughts,
    knows,
)
from kvarena.engine.server.shared.config import REASONING_PARSERS, TOOL_PARSERS

SCHEMA = {"type": "object", "properties": {"x": {"type": "integer"}, "s": {"type": "string"}}, "required": ["x"]}
TOOLS = [{"type": "function", "function": {"name": name, "parameters": SCHEMA}} for name in ("f", "g")]
NAMES = frozenset("fg")
BOTH = [("f", '{"x": 1}'), ("g", '{"x": 2, "s": "a b"}')]
BEGIN, END, ONE, OFF, SEP = (
    f"<｜tool▁{name}｜>" for name in ("calls▁begin", "calls▁end", "call▁begin", "call▁end", "sep")
)
F, G = '{"x": 1}', '{"x": 2, "s": "a b"}'
PAIR = "<arg_key>{}</arg_key>\n<arg_value>{}</arg_value>\n"
CALLS = [
    ("mistral", f"Hm. [TOOL_CALLS]f[ARGS]{F}[TOOL_CALLS]g {G}", "Hm. ", BOTH),
    ("mistral", f'[TOOL_CALLS] [{{"name": "f", "arguments": {F}}}]', "", CALLED),
    ("mistral", f"[TOOL_CALLS]f[CALL_ID]123[ARGS]{F} ok", " ok", CALLED),
    ("mistral", "[TOOL_CALLS]h[ARGS]{} x", "[TOOL_CALLS]h[ARGS]{} x", []),
    ("mistral", "[TOOL_CALLS]f is what", "[TOOL_CALLS]f is what", []),
    ("mistral", "[TOOL_CALLS]f[ARGS]", "[TOOL_CALLS]f[ARGS]", []),
    ("deepseek", f"Hm.{BEGIN}{ONE}function{SEP}f\n```json\n{F}\n```{OFF}\n{ONE}function{SEP}g\n```json\n{G}\n```{OFF}"
     f"{END}", "Hm.", BOTH),
    ("deepseek", f"{BEGIN}{ONE}f{SEP}{F}{OFF}{ONE}g{SEP}{G}{OFF}{END}", "", BOTH),
    ("deepseek", f"{BEGIN}{ONE}f{SEP}{F}", "", CALLED),
    ("deepseek", f"{BEGIN}{ONE}h{SEP}{F}{OFF}{END}", f"{BEGIN}{ONE}h{SEP}{F}{OFF}{END}", []),
    ("deepseek", f"a {BEGIN[:7]} b", f"a {BEGIN[:7]} b", []),
    ("glm", f"Hm.\n<tool_call>f\n{PAIR.format('x', 1)}</tool_call>\n<tool_call>g\n{PAIR.format('x', 2)}"
     f"{PAIR.format('s', 'a b')}</tool_call>", "Hm.\n", BOTH),
    ("glm", f"<tool_call>f\n{PAIR.format('s', '7')}</tool_call>", "", [("f", '{"s": "7"}')]),
    ("glm", "<tool_call>f</tool_call>", "", [("f", "{}")]),
    ("glm", "<tool_call>h\n</tool_call>", "<tool_call>h\n</tool_call>", []),
    ("glm", "<tool_call>f\n<arg_key>x</tool_call>", "<tool_call>f\n<arg_key>x</tool_call>", []),
    ("pythonic", '[f(x=1), g(x=2, s="a b")]', "", BOTH),
    ("pythonic", " <|python_start|>[f(x=1)]<|python_end|>", "", CALLED),
    ("pythonic", '[f(x=-1, s=None, y=[True, {"a": null}])]', "",
     [("f", '{"x": -1, "s": null, "y": [true, {"a": null}]}')]),
    ("pythonic", "[f(x=1)] and more", "[f(x=1)] and more", []),
    ("pythonic", "[1, 2]", "[1, 2]", []),
    ("pythonic", "[f(x=open('a'))]", "[f(x=open('a'))]", []),
    ("pythonic", "[f(1)]", "[f(1)]", []),
    ("pythonic", "[h(x=1)]", "[h(x=1)]", []),
    ("pythonic", "[f(x=1", "[f(x=1", []),
    ("pythonic", "[", "[", []),
    ("pythonic", "<|python", "<|python", []),
    ("pythonic", "Hello [f(x=1)]", "Hello [f(x=1)]", []),
]  # fmt: skip


@pytest.mark.parametrize(("name", "text", "shown", "calls"), CALLS)
def test_calls_at_any_cut(name, text, shown, calls):
    assert at_any_cut(lambda: call_form(name).parser(TOOLS, ""), text) == (shown, calls)


class Called(str):
    """The name of a call."""


A, C, M, S, X = "<|channel|>analysis", "<|channel|>commentary", "<|message|>", "<|start|>assistant", "<|end|>"
FINAL = "<|channel|>final<|message|>"
CHANNEL = [
    (f"{A}{M}Hm.{X}{S}{FINAL}Hello<|return|>", [Thought("Hm."), "Hello"]),
    (f"{A}{M}Hm.{X}{S} to=functions.f{C} json{M}{F}<|call|>", [Thought("Hm."), Called("f")]),
    (f"{A}{M}Hm.{X}{S}{C} to=functions.f <|constrain|>json{M}{F}", [Thought("Hm."), Called("f")]),
    (f"{C}{M}I look.{X}{S}{C} to=functions.f{M}{F}<|call|>", ["I look.", Called("f")]),
    (f"{C} to=functions.h{M}{F}<|call|>", [F]),
    (f"{C} to=functions.f{M}no json<|call|>", ["no json"]),
    ("Hello, no channels", ["Hello, no channels"]),
    (f"{A}{M}Hm", [Thought("Hm")]),
    (f"{A}", []),
    (f"{A}{M}a{X}{S}{A}{M}b{X}{S}{FINAL}c", [Thought("ab"), "c"]),
    ("a < b <|chan", ["a < b <|chan"]),
    ("", []),
    (" to=be", [" to=be"]),
]


def parts(make, pieces):
    """All parts of an answer that comes in pieces; calls by their name."""
    parser, made = make(), []
    for piece in pieces:
        made += parser.add(piece)
    made += parser.end()
    return list(parts_of(*(part if isinstance(part, str) else Called(part.name) for part in made)))


def cut_anywhere(make, text):
    whole = parts(make, [text])
    assert parts(make, text) == whole, text
    for at in range(1, len(text)):
        assert parts(make, [text[:at], text[at:]]) == whole, (text, at)
    return [(type(part), part) for part in whole]


@pytest.mark.parametrize(("text", "found"), CHANNEL)
def test_channels_at_any_cut(text, found):
    assert cut_anywhere(lambda: ChannelParser(NAMES), text) == [(type(part), part) for part in found]


THINK = THOUGHT_FORMS["think"]
HERMES = '<tool_call>{"name": "f", "arguments": {"x": 1}}</tool_call>'
THOUGHTS = [
    ("possible", "<think>\nHm.\n</think>\n\nHello", [Thought("Hm."), "Hello"]),
    ("begun", "Hm.\n\nWell. </think>Hello", [Thought("Hm.\n\nWell."), "Hello"]),
    ("begun", "\n<think>Hm.</think> Hello", [Thought("Hm."), "Hello"]),
    ("begun", "Hm", [Thought("Hm")]),
    ("begun", "</think>Hi", ["Hi"]),
    ("possible", "<think></think>\n Hi", ["Hi"]),
    ("possible", "Hello <think>", ["Hello <think>"]),
    ("possible", "<thi", ["<thi"]),
    ("possible", " \n", [" \n"]),
    ("over", "<think>a</think>", ["<think>a</think>"]),
    ("possible", f"<think>{HERMES}</think>{HERMES}", [Thought(HERMES), Called("f")]),
    ("begun", f"a</thi</think>b{HERMES}c", [Thought("a</thi"), "b", Called("f"), "c"]),
]


@pytest.mark.parametrize(("place", "text", "found"), THOUGHTS)
def test_thoughts_at_any_cut(place, text, found):
    def make():
        return ThoughtParser(THINK, place, TaggedParser(NAMES))

    expected = [(type(part), part) for part in found]
    assert cut_anywhere(make, text) == expected
    if Called("f") not in found:
        assert cut_anywhere(lambda: ThoughtParser(THINK, place, None), text) == expected


def test_forced_calls_come_after_the_thought_in_channels_too():
    text = f'{A}{M}Hm.{X}{S}{FINAL}[{{"name": "f", "parameters": {{}}}}]'
    found = cut_anywhere(lambda: AfterThoughts(ChannelParser(frozenset()), ListParser(NAMES)), text)
    assert [part for _, part in found] == ["Hm.", "f"]


def test_names_of_the_config_are_those_that_are_registered():
    assert set(TOOL_PARSERS) == {"auto", "none", *CALL_FORMS}
    assert set(REASONING_PARSERS) == {"auto", "none", *THOUGHT_FORMS}


ARGS = "{{ c.function.arguments | tojson }}"
RENDERED = [
    (f"{BEGIN}{ONE}function{SEP}{{{{ c.function.name }}}}\n```json\n{ARGS}\n```{OFF}{END}", "deepseek"),
    (f"{BEGIN}{ONE}{{{{ c.function.name }}}}{SEP}{ARGS}{OFF}{END}", "deepseek"),
    ("<tool_call>{{ c.function.name }}\n{% for k, v in c.function.arguments.items() %}<arg_key>{{ k }}</arg_key>\n"
     "<arg_value>{{ v }}</arg_value>\n{% endfor %}</tool_call>", "glm"),
    ("[{{ c.function.name }}({% for k, v in c.function.arguments.items() %}{{ k }}={{ v | tojson }}{% endfor %})]",
     "pythonic"),
    (f"[TOOL_CALLS]{{{{ c.function.name }}}}[ARGS]{ARGS}", "mistral"),
    (f"<|start|>assistant to=functions.{{{{ c.function.name }}}}<|channel|>commentary json<|message|>{ARGS}<|call|>",
     "channels"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "name"), RENDERED)
def test_a_form_knows_its_own_in_what_a_template_renders(call, name):
    found = find_form("auto", Tokenizer(TURNS.replace("CALLS", EACH.replace("BODY", call))))
    assert found.form.names[0] == name


def test_thoughts_are_told_from_the_template():
    def told(template="", response_template=None, kind="auto"):
        return find_thoughts(kind, Tokenizer(template, response_template=response_template, chat_template=template))

    assert told("{{ x.split('</think>') }}") == THINK
    assert told("[THINK][/THINK]").open == "[THINK]"
    assert told("{{ m.content }}") is None
    assert told("<|channel|>analysis<|message|>") == CHANNELS
    shipped = {"fields": {"thinking": {"open": "<a>", "close": "</a>"}}}
    assert told(response_template=shipped).close == "</a>"
    assert told("</think>", kind="none") is None
    assert told(kind="deepseek_r1").place("Hi") == "begun"
    assert [THINK.place(end) for end in ("x<think>\n", "x<think>\n\n</think>\n\n", "about <think> now")] == [
        "begun", "over", "possible",
    ]  # fmt: skip


def test_a_template_knows_the_variables_that_it_looks_at():
    template = "{% if enable_thinking is defined %}{{ m.thinking }}{{ m['effort'] }}{% endif %}"
    assert knows(template, "enable_thinking") and not knows(template, "thinking") and not knows(template, "effort")
