"""Tool calls in a model's text, found while it streams.

Two ways of writing them are known:

    hermes   <tool_call>{"name": "f", "arguments": {...}}</tool_call>   any number, after any text
    llama    {"name": "f", "parameters": {...}}                          the whole answer, several joined by ;
             with or without <|python_tag|> before it

A parser shows text that is surely no call at once, and holds the rest. A call is shown when it is complete: its name
in one delta, its arguments in the next. What turns out not to be a call is shown as text.
"""

from __future__ import annotations

import json
import uuid
from abc import ABC, abstractmethod
from typing import Any, NamedTuple

from typing_extensions import override


class ToolCall(NamedTuple):
    """One call; `arguments` is JSON text."""

    call_id: str
    name: str
    arguments: str


class Parsed(NamedTuple):
    """What a piece of text turned out to be: text, new calls, or more of the last call's arguments."""

    text: str
    calls: list[ToolCall]
    arguments: str = ""


def make_call(name: str, arguments: Any) -> ToolCall:
    """A call with a fresh id; `arguments` is a JSON value, or JSON text."""
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return ToolCall(f"call_{uuid.uuid4().hex[:24]}", name, text)


class ToolParser(ABC):
    """Follows the text of one choice."""

    @abstractmethod
    def add(self, text: str) -> Parsed:
        """Take new text."""

    @abstractmethod
    def end(self) -> Parsed:
        """The text has ended: show what is held."""


class HermesParser(ToolParser):
    """`<tool_call>` blocks (Hermes, Qwen)."""

    _OPEN, _CLOSE = "<tool_call>", "</tool_call>"

    def __init__(self) -> None:
        self._held = ""
        self._after_call = False

    @override
    def add(self, text: str) -> Parsed:
        self._held += text
        shown = ""
        calls: list[ToolCall] = []
        while True:
            start = self._held.find(self._OPEN)
            if start < 0:
                keep = _overlap(self._held, self._OPEN)
                shown += self._shown(self._held[: len(self._held) - keep])
                self._held = self._held[len(self._held) - keep :]
                return Parsed(shown, calls)
            shown += self._shown(self._held[:start])
            end = self._held.find(self._CLOSE, start)
            self._held = self._held[start:]
            if end < 0:
                return Parsed(shown, calls)
            end -= start
            call = _read_call(self._held[len(self._OPEN) : end], ("arguments", "parameters"))
            block, self._held = self._held[: end + len(self._CLOSE)], self._held[end + len(self._CLOSE) :]
            if call is None:
                shown += block
            else:
                calls.append(call)
                self._after_call = True

    def _shown(self, text: str) -> str:
        """White space between two calls is no text."""
        return "" if self._after_call and not text.strip() else text

    @override
    def end(self) -> Parsed:
        held, self._held = self._held, ""
        if held.startswith(self._OPEN):
            # Models that stop right after the JSON leave the closing tag out.
            call = _read_call(held[len(self._OPEN) :], ("arguments", "parameters"))
            if call is not None:
                return Parsed("", [call])
        return Parsed(self._shown(held), [])


class LlamaParser(ToolParser):
    """A whole answer of JSON (Llama 3)."""

    _TAG = "<|python_tag|>"

    def __init__(self) -> None:
        self._held = ""
        self._is_text = False

    @override
    def add(self, text: str) -> Parsed:
        if self._is_text:
            return Parsed(text, [])
        self._held += text
        seen = self._held.lstrip()
        if not seen or seen.startswith(("{", self._TAG)) or self._TAG.startswith(seen):
            return Parsed("", [])
        self._is_text = True
        held, self._held = self._held, ""
        return Parsed(held, [])

    @override
    def end(self) -> Parsed:
        held, self._held = self._held, ""
        body = held.strip().removeprefix(self._TAG).strip()
        calls: list[ToolCall] = []
        decoder = json.JSONDecoder()
        at = 0
        while at < len(body):
            try:
                value, at = decoder.raw_decode(body, at)
            except (ValueError, RecursionError):
                return Parsed(held, [])
            call = _as_call(value, ("parameters", "arguments"))
            if call is None:
                return Parsed(held, [])
            calls.append(call)
            while at < len(body) and body[at] in " \n\t;,":
                at += 1
        return Parsed("" if calls else held, calls)


class NamedParser(ToolParser):
    """The whole answer is the arguments of a function that the caller named (the grammar sees to that)."""

    def __init__(self, name: str) -> None:
        self._name, self._has_begun = name, False

    @override
    def add(self, text: str) -> Parsed:
        if not text:
            return Parsed("", [])
        return Parsed("", self._begin(), text)

    def _begin(self) -> list[ToolCall]:
        calls = [] if self._has_begun else [make_call(self._name, "")]
        self._has_begun = True
        return calls

    @override
    def end(self) -> Parsed:
        return Parsed("", self._begin())


class ListParser(ToolParser):
    """The whole answer is a JSON list of calls (`tool_choice="required"`; the grammar sees to that).

    Each call is given as soon as it is complete. Of one that `max_tokens` cut nothing is shown; a list without any
    complete call is shown as text.
    """

    _BETWEEN = " \n\r\t[,]"

    def __init__(self) -> None:
        self._held, self._text, self._has_calls = "", "", False

    @override
    def add(self, text: str) -> Parsed:
        self._text += "" if self._has_calls else text
        self._held += text
        calls: list[ToolCall] = []
        while "}" in text and (call := self._next()) is not None:
            calls.append(call)
        self._has_calls = self._has_calls or bool(calls)
        return Parsed("", calls)

    def _next(self) -> ToolCall | None:
        """The next call, if it is complete."""
        body = self._held.lstrip(self._BETWEEN)
        try:
            value, end = json.JSONDecoder().raw_decode(body)
        except (ValueError, RecursionError):
            return None
        self._held = body[end:]
        return _as_call(value, ("parameters",))

    @override
    def end(self) -> Parsed:
        return Parsed("" if self._has_calls else self._text, [])


class FirstCallParser(ToolParser):
    """At most one call of another parser's (`parallel_tool_calls=false`)."""

    def __init__(self, parser: ToolParser) -> None:
        self._parser, self._has_call = parser, False

    @override
    def add(self, text: str) -> Parsed:
        return self._first(self._parser.add(text))

    @override
    def end(self) -> Parsed:
        return self._first(self._parser.end())

    def _first(self, parsed: Parsed) -> Parsed:
        calls = [] if self._has_call else parsed.calls[:1]
        self._has_call = self._has_call or bool(calls)
        return Parsed(parsed.text, calls)


def make_parser(kind: str, chat_template: str | None, parallel: bool = True) -> ToolParser | None:
    """The parser for `tool_choice="auto"`.

    Args:
        kind: `hermes`, `llama`, `none`, or `auto` to tell from the template.
        chat_template: the model's template, or None.
        parallel: more than one call may be given.
    """
    if kind == "auto":
        template = chat_template or ""
        kind = "llama" if "<|python_tag|>" in template or '"parameters"' in template else "hermes"
    parser: ToolParser | None = {"hermes": HermesParser, "llama": LlamaParser, "none": lambda: None}[kind]()
    return parser if parser is None or parallel else FirstCallParser(parser)


def _overlap(text: str, tag: str) -> int:
    """Length of the longest end of `text` that begins `tag`."""
    for size in range(min(len(text), len(tag) - 1), 0, -1):
        if tag.startswith(text[-size:]):
            return size
    return 0


def _read_call(text: str, argument_keys: tuple[str, ...]) -> ToolCall | None:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return _as_call(value, argument_keys)


def _as_call(value: Any, argument_keys: tuple[str, ...]) -> ToolCall | None:
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return None
    arguments: Any = next((value[key] for key in argument_keys if key in value), {})
    return make_call(value["name"], arguments)
