"""Tool calls are found however the text is cut; what is no call is shown unchanged."""

from __future__ import annotations

import itertools
import json

import pytest

from kvarena.engine.errors import ModelError
from kvarena.engine.server.forms.calls import FirstCallParser, ListParser, NamedParser
from kvarena.engine.server.forms.finding import find_form, read_form
from kvarena.engine.server.forms.templates import XML_TEMPLATE, TemplateParser, check_template
from kvarena.engine.server.forms.texts import BareParser, HiddenTokens, TaggedParser
from kvarena.engine.server.text.detokenizer import Detokenizer
from kvarena.experiments.fuzzing import tool_texts as fuzz_tool_texts
from tests import tokenizer_kinds

NAMES = frozenset(("f", "g"))
SCHEMA = {"type": "object", "properties": {"x": {"type": "integer"}, "s": {"type": "string"}}}
TOOLS = [{"type": "function", "function": {"name": name, "parameters": SCHEMA}} for name in sorted(NAMES)]


def run(parser, pieces):
    """Text and calls of an answer that comes in pieces."""
    shown, calls = "", []
    for parsed in itertools.chain(map(parser.add, pieces), [None]):
        parsed = parser.end() if parsed is None else parsed
        shown += parsed.text
        calls += [(call.name, call.arguments) for call in parsed.calls]
    return shown, calls


def at_any_cut(make, text):
    """What an answer is, which must not depend on where it is cut."""
    whole = run(make(), [text])
    assert run(make(), text) == whole, text
    for at in range(1, len(text)):
        assert run(make(), [text[:at], text[at:]]) == whole, (text, at)
    return whole


def tagged(*tags):
    return lambda: TaggedParser(NAMES, *tags)


def bare():
    return BareParser(NAMES)


def xml():
    return TemplateParser(check_template(XML_TEMPLATE), TOOLS, "")


F = '{"name": "f", "arguments": {"x": 1}}'
CALLED = [("f", '{"x": 1}')]
END = "</tool_call>"
HERMES = [
    (f"Let me see.\n<tool_call>\n{F}\n{END}\n<tool_call>{F}{END}", "Let me see.\n", CALLED * 2),
    (f"\n\n<tool_call>{F}{END}\n", "", CALLED),
    (f"<tool_call>{F}{END}\n Done. ", "\n Done. ", CALLED),
    (f"<tool_call>{F}", "", CALLED),
    (f"<tool_call>{F}\n<tool_call>{F}{END}", "", CALLED * 2),
    (f"<tool_call>[{F}, {F}]{END}", "", CALLED * 2),
    (f"<tool_call>{F}\n{F}{END}", "", CALLED * 2),
    # A closing tag in an argument, and an opening one.
    (
        '<tool_call>{"name": "f", "arguments": {"s": "a \\"</tool_call> <tool_call> b"}}</tool_call>ok',
        "ok",
        [("f", '{"s": "a \\"</tool_call> <tool_call> b"}')],
    ),
    ('<tool_call>{"name": "f", "arguments": null}</tool_call>', "", [("f", "{}")]),
    ('<tool_call>{"name": "f", "arguments": "null"}</tool_call>', "", [("f", "{}")]),
    ('<tool_call>{"name": "f", "arguments": ""}</tool_call>', "", [("f", "{}")]),
    ('<tool_call>{"name": "f"}</tool_call>', "", [("f", "{}")]),
    ('<tool_call>{"name": "f", "arguments": "{\\"x\\": 1}"}</tool_call>', "", CALLED),
    ('<tool_call>{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}</tool_call>', "", CALLED),
    ('<tool_call>{"name": "f", "arguments": {"s": "a\nb"}}</tool_call>', "", [("f", '{"s": "a\\nb"}')]),
    (
        '<tool_call>{"name": "f", "arguments": {"s": "\\ud800 \u00e9"}}</tool_call>',
        "",
        [("f", '{"s": "\\ud800 \\u00e9"}')],
    ),
    # Quotes that mislead: the broken call is text, the next one is found.
    (f'<tool_call>it is 5" wide{END} <tool_call>{F}{END}', f'<tool_call>it is 5" wide{END} ', CALLED),
    (f'<tool_call>{{"a": "5" "}}{END}<tool_call>{F}{END}', f'<tool_call>{{"a": "5" "}}{END}', CALLED),
    (f"<tool_call>I would <tool_call>{F}{END}", "<tool_call>I would ", CALLED),
]
NO_CALLS = (
    "a < b <tool",
    "<tool_call>not json</tool_call> x",
    "<tool_call>{",
    "<tool_call>",
    "plain",
    "",
    " \n ",
    '<tool_call>{"name": "unknown", "arguments": {}}</tool_call>',
    '<tool_call>{"name": "f", "arguments": 7}</tool_call>',
    '<tool_call>{"name": "f", "arguments": [1]}</tool_call>',
    '<tool_call>{"name": "f", "arguments": "x"}</tool_call>',
    '<tool_call>{"name": "f", "arguments": {"x": NaN}}</tool_call>',
    '<tool_call>{"name": "f", "arguments": {"x": 1e999}}</tool_call>',
    '<tool_call>{"name": "f", "arguments": {"x": 1}}}</tool_call>',
    "<tool_call>" + '{"a":' * 3000 + "</tool_call>",
    '<tool_call>{"name": ["f"], "arguments": {}}</tool_call>',
    "<tool_call>[]</tool_call>",
)


@pytest.mark.parametrize(("text", "shown", "calls"), HERMES)
def test_hermes_finds_calls_at_any_cut(text, shown, calls):
    assert at_any_cut(tagged(), text) == (shown, calls)


@pytest.mark.parametrize("text", NO_CALLS)
def test_hermes_shows_what_is_no_call(text):
    if len(text) < 1000:
        assert at_any_cut(tagged(), text) == (text, [])
    assert run(tagged()(), [text]) == (text, [])


def test_a_tag_without_an_end():
    make = tagged("[TOOL_CALLS]", "")
    assert at_any_cut(make, f"[TOOL_CALLS] [{F}, {F}]") == ("", CALLED * 2)
    assert at_any_cut(make, f"Hi [TOOL_CALLS][{F}] [TOOL_CALLS]x") == ("Hi  [TOOL_CALLS]x", CALLED)
    assert at_any_cut(make, f'[TOOL_CALLS]{{"}}[TOOL_CALLS][{F}]') == ('[TOOL_CALLS]{"}', CALLED)


def test_a_text_of_broken_blocks_is_searched_in_linear_time():
    """Counted, not timed: characters that searches pass over."""
    passed = 0

    text = '<tool_call>{"' * 2000
    parser = tagged()()
    scan = parser._block_end

    def counted(is_end):
        nonlocal passed
        result = scan(is_end)
        passed += 0 if parser._scan is None else parser._scan._at
        return result

    parser._block_end = counted
    assert run(parser, [text]) == (text, [])
    assert passed < 4 * len(text)


LLAMA = [
    ('<|python_tag|>{"name": "f", "parameters": {"x": 1}}; {"name": "g", "parameters": {}}', [*CALLED, ("g", "{}")]),
    ('{"name": "f", "parameters": {"x": 1}}', CALLED),
    ('\n{"name": "f", "arguments": {"x": 1}}\n', CALLED),
    ('{"type": "function", "name": "f", "parameters": {"x": 1}}', CALLED),
    ('{"type": "function", "function": {"name": "f", "parameters": {"x": 1}}}', CALLED),
    ('{"name": "f", "parameters": null}', [("f", "{}")]),
    ('[{"name": "f", "parameters": {"x": 1}}]', CALLED),
]
NO_LLAMA = (
    '{"name": "Bob", "age": 3}',
    '{"name": "f", "age": 3}',
    '{"name": "f"}',
    '{"name": "Bob", "parameters": {}}',
    '{"name": "f", "parameters": 3}',
    '{"a": 1}',
    '{"name": "f", "parameters": {"x": 1}} is the call',
    '{"name": "f", "parameters": {"x": 1}}; {"name": "Bob"}',
    '{"name": "f", "parameters": {"x": 1}}; {"name": "g", "para',
    '{"name": "f", "parameters": {"x"',
    "Hello",
    "<|python",
    "<|python_tag|>f.call(x=1)",
    "[1, 2] and so on",
    "{]} ",
    "",
    " ",
)


@pytest.mark.parametrize(("text", "calls"), LLAMA)
def test_llama_takes_a_whole_answer(text, calls):
    assert at_any_cut(bare, text) == ("", calls)


@pytest.mark.parametrize("text", NO_LLAMA)
def test_llama_calls_only_tools_of_the_request(text):
    assert at_any_cut(bare, text) == (text, [])


def test_llama_shows_text_at_once():
    assert bare().add("Hello").text == "Hello"
    parser = bare()
    assert parser.add('{"name": "Bob", "age": 3').text == ""
    assert parser.add("}").text == '{"name": "Bob", "age": 3}'
    assert parser.add(" more").text == " more"


def test_xml_calls_have_the_types_of_the_schema():
    call = (
        "<tool_call>\n<function=f>\n<parameter=x>\n7\n</parameter>\n"
        "<parameter=s>\n7\n</parameter>\n</function>\n</tool_call>"
    )
    called = [("f", '{"x": 7, "s": "7"}')]
    assert at_any_cut(xml, f"Hm.\n{call}\n{call}") == ("Hm.\n\n", called * 2)
    assert at_any_cut(xml, f"<think>{call}</think> {call}") == (f"<think>{call}</think> ", called)
    unknown = call.replace("=f>", "=Bob>")
    for text in ("a < b <tool", unknown, "<tool_call> <function", "x" + unknown + " y", "</function></tool_call>"):
        assert at_any_cut(xml, text) == (text, [])


JSON_TEMPLATE = {
    "start_anchor": "<|assistant|>",
    "fields": {
        "thinking": {"open": "<think>", "close": "</think>"},
        "tool_calls": {
            "open": "<call>",
            "close": "</call>",
            "repeats": True,
            "content": "json",
            "transform": {"type": "function", "function": "{content}"},
        },
        "content": {"close": "<|end|>", "optional": False},
    },
}


def test_a_response_template_reads_calls():
    def make(prompt="<|user|>x<|assistant|>"):
        return lambda: TemplateParser(check_template(JSON_TEMPLATE), TOOLS, prompt)

    assert at_any_cut(make(), f"Hi <call>{F}</call> and <call>{F}</call>") == ("Hi  and ", CALLED * 2)
    assert at_any_cut(make(), f"<call>{F}") == ("", CALLED)  # cut before its end
    for text in ("<call>{</call> x", "<call>{", '<call>{"name": "Bob", "arguments": {}}</call>', "x<|end|>y", ""):
        assert at_any_cut(make(), text) == (text, [])
    # The prompt has begun the answer.
    assert at_any_cut(make("<|assistant|><think>"), f"<call>{F}</call></think><call>{F}</call>") == (
        f"<call>{F}</call></think>",
        CALLED,
    )
    assert at_any_cut(make("<|assistant|>Sure: <call>"), F + "</call>") == ("", CALLED)
    with pytest.raises(ModelError, match=r"response_template cannot be used: .*fields"):
        check_template({"start_anchor": "x", "fields": {}})


def test_special_tokens_that_the_parser_saw_are_not_shown():
    def make():
        return HiddenTokens(TaggedParser(NAMES), ("<tool_call>", "</tool_call>"))

    assert at_any_cut(make, f"a <tool_call>{F}{END}") == ("a ", CALLED)
    assert at_any_cut(make, f"a <tool_call>no{END} b <tool_call") == ("a no b <tool_call", [])


def test_required_calls():
    text = '[ {"name": "f", "parameters": {"s": "a}, {"}} ,\n{"name": "g", "parameters": {}}, {"name": "f", "para'
    # A cut call is not shown.
    assert at_any_cut(lambda: ListParser(NAMES), text) == ("", [("f", '{"s": "a}, {"}'), ("g", "{}")])
    parser = ListParser(NAMES)
    assert not parser.add('[{"name": "f", "parameters": {}').calls
    assert parser.add("}").calls[0].name == "f"  # the list goes on
    assert at_any_cut(lambda: ListParser(NAMES), '[{"name": "f", "par') == ('[{"name": "f", "par', [])


def test_the_arguments_of_a_named_function_come_as_they_are_written():
    parser = NamedParser("f")
    first, second, last = parser.add('{"x"'), parser.add(": 1}"), parser.end()
    assert [call.name for call in first.calls] == ["f"]
    assert (first.arguments, second.arguments, second.calls, last) == ('{"x"', ": 1}", [], [])
    assert NamedParser("f").end() == []  # cut within the thought before it: there is no call


def test_one_call_when_no_parallel_ones_are_wanted():
    assert at_any_cut(lambda: FirstCallParser(TaggedParser(NAMES)), HERMES[0][0])[1] == CALLED
    assert at_any_cut(lambda: FirstCallParser(bare()), LLAMA[0][0])[1] == CALLED


class Tokenizer:
    """A template and special tokens."""

    def __init__(self, template="", special=(), response_template=None, chat_template=""):
        self._template, self.response_template, self.chat_template = template, response_template, chat_template
        self.added_tokens_decoder = {i: Special(text) for i, text in enumerate(special)}

    def apply_chat_template(self, messages, tools=None, tokenize=False, add_generation_prompt=False):
        from transformers.utils.chat_template_utils import render_jinja_template

        made, _ = render_jinja_template(
            [messages], tools=tools, chat_template=self._template, add_generation_prompt=add_generation_prompt
        )
        return made[0]


class Special(str):
    special = True


LISTED = (
    '{% if tools %}{"type": "function", "parameters": ...} <tool_call> <|python_tag|> {{ tools | tojson }}{% endif %}'
)
TURNS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.tool_calls %}CALLS{% else %}{{ m.content }}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ONE = '{"name": "{{ c.function.name }}", "KEY": {{ c.function.arguments | tojson }}}'
EACH = "{% for t in m.tool_calls %}{% set c = t %}BODY{% endfor %}"
JSON = ONE.replace("KEY", "arguments")
FORMS = [
    ("<tool_call>\n" + JSON + "\n</tool_call>", ("hermes", ("<tool_call>", "</tool_call>"))),
    ("<think>\n\n</think>\n\n<tool_call>" + JSON + "</tool_call>", ("hermes", ("<tool_call>", "</tool_call>"))),
    ("<|tool_call|>[" + JSON + "]<|/tool_call|>", ("hermes", ("<|tool_call|>", "<|/tool_call|>"))),
    ("[TOOL_CALLS][" + JSON + "]", ("mistral", ("[TOOL_CALLS]", ""))),
    ("functools[" + JSON + "]", ("hermes", ("functools", ""))),
    (ONE.replace("KEY", "parameters"), ("llama", ("", ""))),
    ("<|python_tag|>" + JSON, ("llama", ("", ""))),
    ("<tool_call>\n<function={{ c.function.name }}>\n</function>\n</tool_call>", ("xml", ("", ""))),
    ("call {{ c.function.name }} now", None),
]


@pytest.mark.parametrize(("call", "form"), FORMS)
def test_what_the_template_renders_for_a_call_decides(call, form):
    """What it lists tools with does not: every template here has all the words."""
    body = EACH.replace("BODY", call)
    found = find_form("auto", Tokenizer(LISTED + TURNS.replace("CALLS", body)))
    assert (found.form and (found.form.names[0], found.form.tags)) == form
    single = "{% if m.tool_calls | length != 1 %}{{ raise_exception('one call') }}{% endif %}"
    found = find_form("auto", Tokenizer(LISTED + TURNS.replace("CALLS", single + body)))
    assert (found.form and (found.form.names[0], found.form.tags)) == form


def test_a_model_whose_template_knows_no_calls_is_read_as_hermes():
    assert find_form("auto", Tokenizer(TURNS.replace("CALLS", ""))).form.tags == ("<tool_call>", "</tool_call>")
    assert find_form("auto", Tokenizer("{{ raise_exception('no') }}")).form.tags == ("<tool_call>", "</tool_call>")
    assert find_form("none", Tokenizer()).parser(TOOLS, "", parallel=True, hides=True) is None
    assert read_form("kvarena_called(x=1)") is None


def test_a_shipped_response_template_comes_first_and_special_tokens_are_kept():
    tokenizer = Tokenizer(TURNS.replace("CALLS", EACH.replace("BODY", JSON)), ("<call>", "<|end|>"), JSON_TEMPLATE)
    form = find_form("auto", tokenizer)
    assert (form.form.sees_all, form.kept, form.hidden) == (True, {0, 1}, ("<call>", "<|end|>"))
    form = find_form("hermes", Tokenizer(special=("<a>", "<tool_call>", "</tool_call>")))
    assert (form.kept, form.hidden) == ({1, 2}, ("<tool_call>", "</tool_call>"))
    text = f"<tool_call>{F}{END}"
    assert run(form.parser(TOOLS, "", parallel=True, hides=True), [text]) == ("", CALLED)
    with pytest.raises(ModelError):
        find_form("auto", Tokenizer(response_template={"fields": {}}))


KINDS = (*tokenizer_kinds.EXACT, tokenizer_kinds.ctc)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_a_text_keeps_the_special_tokens_that_are_asked_for(kind):
    tokenizer = kind()
    special = [i for i, token in tokenizer.added_tokens_decoder.items() if token.special]
    kept, left_out = special[-1], special[0]
    one = Detokenizer(tokenizer)
    ids = [kept, left_out, *range(5, 8), kept]
    for context in ([], [left_out, *range(5, 9)]):
        stream = one.keeping(frozenset([kept])).stream(True, context)
        text = "".join(stream.add([token_id]) for token_id in ids) + stream.flush()
        assert text.count(str(tokenizer.added_tokens_decoder[kept])) == 2
        assert str(tokenizer.added_tokens_decoder[left_out]) not in text
    assert str(tokenizer.added_tokens_decoder[kept]) not in one.text(ids)  # the other one is as before


def test_arguments_are_json():
    rare = '<tool_call>{"name": "g", "arguments": {"big": 123456789012345678901234567890, "e": 1E5, "u": "\u00e9"}}'
    (call,) = run(tagged()(), [rare])[1]
    assert json.loads(call[1]) == {"big": 123456789012345678901234567890, "e": 1e5, "u": "\u00e9"}


def test_what_is_found_does_not_depend_on_the_cut(capsys):
    """Random texts; one of these forced lists holds a number that is none, and calls behind it."""
    assert fuzz_tool_texts.main(["--seed", "900", "--texts", "30"]) == 0, capsys.readouterr().out
