"""Random answers with tool calls, cut at every position: what a parser finds must not depend on the cut.

    kvarena check tool_texts --seconds 1200 --seed 0

Each text is made of what such answers are made of (tags whole and cut, calls, thoughts, broken JSON, quotes, escapes,
blanks, prose) and read by every form: at once, cut in two at every position, and character by character. Text, thoughts
and calls must be the same, no parser may raise, and every character is shown or belongs to a call.

Each is then answered by chats, /v1/responses and /v1/messages (`api_answers.py`), whole and streamed in pieces that are
cut at random: all must show the same.

A failure prints its seed (`--seed N --texts 1` makes it again). The last line of stdout is JSON; exit code 1 when
anything failed.
"""

from __future__ import annotations

import itertools
import json
import random
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial

from kvarena.engine.server.forms.calls import FirstCallParser, ListParser, Parsed, ToolParser
from kvarena.engine.server.forms.finding import call_form
from kvarena.engine.server.forms.texts import BareParser, HiddenTokens, TaggedParser
from kvarena.engine.server.forms.thoughts import THOUGHT_FORMS, ThoughtParser
from kvarena.experiments.fuzzing.api_answers import differ
from kvarena.experiments.tools import tool_parser

NAMES = ("f", "get_weather")
CALL = '{"name": "f", "arguments": {"x": "y"}}'
PIECES = (
    "<tool_call>", "</tool_call>", "<tool_", "call>", "</tool_call", "[TOOL_CALLS]", "[TOOL", "<|python_tag|>",
    "<|im_end|>", CALL, '{"name": "f", "parameters": {"s": "</tool_call>"}}', '{"name": "f", "arguments": null}',
    '{"name": "f", "arguments": "{\\"a\\": 1}"}', '{"name": "f"}', '{"name": "Bob", "age": 3}', '{"name": ["f"]}',
    '{"name": "get_weather", "arguments": {"s": "a\nb \\" } ] \\u00e9"}}', f"[{CALL}, {CALL}]", f"[{CALL}", "[]", "{}",
    '{"name": "f", "arguments": {"x": NaN}}', '{"name": "f", "arguments": {"x": "\\ud800"}}', '{"a": {"b": [', '"',
    "\\", "{", "}", "[", "]", ":", ";", ",", " ", "\n", "\t", "I would ", 'it is 5" wide', "é🙂", "null", "1e999", "<",
)  # fmt: skip
OBJECTS = (
    CALL, '{"name": "get_weather", "parameters": {"s": "a } ] \\" b"}}', '{"name": "f", "parameters": {"x": 1e999}}',
    '{"name": "f", "parameters": {"x": {"y": [1, {}]}}}', '{"name":"f","parameters":{}}',
)  # fmt: skip
# What each form is made of beside these.
OWN = {
    "mistral": ("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]1", "f", "h", '{"x": 1}'),
    "deepseek": (
        "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>", "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>",
        "<｜tool▁sep｜>", "function", "f", "h", '{"x": 1}', "\n```json\n", "\n```",
    ),
    "glm": ("f", "h", "<arg_key>", "x", "</arg_key>", "<arg_value>", "7", "</arg_value>"),
    "pythonic": ("[f(", "f(", "x=1", "s='a'", ", ", ")", "]", "[f(x=1)]", "<|python_start|>", "<|python_end|>"),
    "channels": (
        "<|channel|>", "analysis", "commentary", "final", "<|message|>", "<|end|>", "<|start|>assistant",
        " to=functions.f", " to=functions.h", "<|call|>", "<|return|>", "<|constrain|>json", '{"x": 1}',
    ),
    "thought": ("<think>", "</think>", "</thi", "Hm. ", "well\n", "a"),
}  # fmt: skip
TOOLS = [{"type": "function", "function": {"name": name}} for name in NAMES]
Found = tuple[str, str, list[tuple[str, str]]]
PARSERS: dict[str, Callable[[], ToolParser]] = {
    "tagged": partial(TaggedParser, NAMES),
    "tagged without an end": partial(TaggedParser, NAMES, "[TOOL_CALLS]", ""),
    "bare": partial(BareParser, NAMES),
    "hidden": lambda: HiddenTokens(TaggedParser(NAMES), ["<|im_end|>"]),
    "forced": partial(ListParser, NAMES),  # its texts are those that a grammar makes
    "forced, one": lambda: FirstCallParser(TaggedParser(NAMES)),
    "thought": lambda: ThoughtParser(THOUGHT_FORMS["think"], "possible", TaggedParser(NAMES)),
    "begun thought": lambda: ThoughtParser(THOUGHT_FORMS["think"], "begun", None),
    "mistral": lambda: call_form("mistral").parser(TOOLS, ""),
    "deepseek": lambda: call_form("deepseek").parser(TOOLS, ""),
    "glm": lambda: call_form("glm").parser(TOOLS, ""),
    "pythonic": lambda: call_form("pythonic").parser(TOOLS, ""),
    "channels": lambda: call_form("channels").parser(TOOLS, ""),
}


def random_text(seed: int, own: Sequence[str] = ()) -> str:
    """An answer of up to twelve pieces, some of which lack a part or have a part twice; most are of `own`."""
    drawn = random.Random(seed)
    made = []
    for _ in range(drawn.randint(1, 12)):
        piece = drawn.choice(own if own and drawn.random() < 0.7 else PIECES)
        if drawn.random() < 0.15:
            at = drawn.randrange(len(piece) + 1)
            piece = piece[:at] + drawn.choice(("", "", piece)) + piece[at + drawn.randint(0, 2) :]
        made.append(piece)
    return "".join(made)


def random_list(seed: int) -> str:
    """What a grammar makes of a forced call: a list of objects, cut at random."""
    drawn = random.Random(seed)
    values = [drawn.choice((*OBJECTS, *OBJECTS[:2])) for _ in range(drawn.randint(1, 4))]
    text = "[" + drawn.choice((",", ", ", ",\n ")).join(values) + "]"
    return text if drawn.random() < 0.5 else text[: drawn.randrange(1, len(text) + 1)]


def _next(parser: ToolParser, text: str) -> Parsed:
    """New text as an answer has it read (`Turn._rich_delta`): what only runs on is not given to `add`."""
    kind = parser.runs_on(text) if text else None
    return parser.add(text) if kind is None else Parsed((kind(text),))


def read(parser: ToolParser, parts: Iterable[str]) -> Found:
    """The text that is shown, the thoughts, and the name and arguments of each call."""
    shown, thought, calls = "", "", []
    for parsed in (*(_next(parser, part) for part in parts), parser.end()):
        shown += parsed.text
        thought += parsed.thought
        calls += [[call.name, call.arguments] for call in parsed.calls]
        if parsed.arguments:
            calls[-1][1] += parsed.arguments
    return shown, thought, [(name, arguments) for name, arguments in calls]


def cuts(text: str) -> Iterable[list[str]]:
    """The text in two, at every position, and character by character."""
    for at in range(1, len(text)):
        yield [text[:at], text[at:]]
    yield list(text)


def check(name: str, text: str) -> str | None:
    """What is wrong with how a parser reads a text, or None."""
    make = PARSERS[name]
    try:
        whole = read(make(), [text])
        for parts in cuts(text):
            found = read(make(), parts)
            if found != whole:
                return f"cut into {[len(part) for part in parts][:3]}: {found} and not {whole}"
    except Exception as error:  # whatever it is, an answer would have been a 500
        return f"{type(error).__name__}: {error}"
    for call, arguments in whole[2]:
        if call not in NAMES or not isinstance(json.loads(arguments), dict):
            return f"no call of a tool: {call} {arguments}"
    keeps = name not in ("channels", "thought", "begun thought", "forced", "hidden", "forced, one")  # tags are no text
    if not whole[2] and keeps and whole[0] != text:
        return f"text is lost: {whole[0]!r}"
    return None


def check_answers(name: str, text: str, seed: int) -> str | None:
    """What is wrong with how the APIs answer with a text, or None."""
    drawn = random.Random(seed)
    places = sorted({0, len(text), *(drawn.randint(0, len(text)) for _ in range(drawn.randint(1, 12)))})
    parts = [text[start:end] for start, end in itertools.pairwise(places)] or [text]
    parts = list(text) if text and drawn.random() < 0.2 else parts  # as a model writes it
    try:
        return differ(PARSERS[name], text, [*parts, ""])  # the end comes by itself
    except Exception as error:  # whatever it is, an answer would have been a 500
        return f"{type(error).__name__}: {error}"


def main(argv: Sequence[str]) -> int:
    """Run the fuzzer; returns the exit code."""
    parser = tool_parser(__name__, __doc__)
    parser.add_argument("--seconds", type=float, default=60.0, help="of processor time")
    parser.add_argument("--seed", type=int, default=None, help="of the first text; default: drawn, and printed")
    parser.add_argument("--texts", type=int, default=1 << 60, help="most texts")
    args = parser.parse_args(argv)
    first = random.randrange(1 << 30) if args.seed is None else args.seed
    failures, count, until = 0, 0, time.process_time() + args.seconds
    while count < args.texts and time.process_time() < until:
        for name in PARSERS:
            own = OWN.get(name.removeprefix("begun "), ())
            text = random_list(first + count) if name == "forced" else random_text(first + count, own)
            wrong = check(name, text) or check_answers(name, text, first + count)
            if wrong is not None:
                failures += 1
                print(json.dumps({"seed": first + count, "parser": name, "text": text, "wrong": wrong}), flush=True)
        count += 1
    print(json.dumps({"first_seed": first, "texts": count, "parsers": len(PARSERS), "failures": failures}))
    return int(failures > 0)
