"""What an answer consists of (text, thoughts, calls of tools), and how the parsers of forced calls read it.

A parser shows text that is surely no call at once, and holds the rest. A call is shown when it is complete. What turns
out not to be a call is shown as text. What a parser gives in the end, and in which order, depends on the whole text
alone, never on where it was cut.
"""

from __future__ import annotations

import json
import uuid
from abc import ABC, abstractmethod
from collections.abc import Collection
from typing import Any, NamedTuple

from typing_extensions import override

# Between values: several calls are joined by these. Models write line ends in strings as they are (`strict`).
BETWEEN = " \n\r\t;,"


def _refuse(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


_DECODER = json.JSONDecoder(strict=False, parse_constant=_refuse)


class ToolCall(NamedTuple):
    """One call; `arguments` is JSON text."""

    call_id: str
    name: str
    arguments: str


class Thought(str):
    """Text of a thought: what the model wrote for itself, before its answer."""

    __slots__ = ()


class Arguments(str):
    """More of the last call's arguments."""

    __slots__ = ()


Part = str | ToolCall  # a plain str is text


class Parsed(list[Part]):
    """What a piece of text turned out to be, in its order."""

    __slots__ = ()

    @property
    def text(self) -> str:
        """What is shown as the answer's text."""
        return "".join([part for part in self if type(part) is str])

    @property
    def thought(self) -> str:
        """What belongs to a thought."""
        return "".join([part for part in self if type(part) is Thought])

    @property
    def calls(self) -> list[ToolCall]:
        """New calls."""
        return [part for part in self if isinstance(part, ToolCall)]

    @property
    def arguments(self) -> str:
        """More of the last call's arguments."""
        return "".join([part for part in self if type(part) is Arguments])


def parts_of(*parts: Part) -> Parsed:
    """Those of the parts that hold anything; text that follows text is joined to it."""
    made = Parsed()
    for part in parts:
        if isinstance(part, ToolCall):
            made.append(part)
        elif part:
            if made and type(made[-1]) is type(part):
                part = type(part)(made.pop() + part)  # type: ignore[operator]
            made.append(part)
    return made


def make_call(name: str, arguments: Any) -> ToolCall:
    """A call with a fresh id; `arguments` is a JSON value, or JSON text."""
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return ToolCall(f"call_{uuid.uuid4().hex[:24]}", name, text)


class ToolParser(ABC):
    """Follows the text of one choice."""

    @abstractmethod
    def add(self, text: str) -> Parsed:
        """Take new text."""

    def runs_on(self, text: str) -> type[str] | None:  # noqa: ARG002 - of a parser that has no shorter way
        """What all of a new text surely is (`str` or `Thought`), as it changes nothing of what the parser knows.

        None: it has to be given to `add`. Most of an answer only runs on, and this is quicker than to read it.
        """
        return None

    @abstractmethod
    def end(self) -> Parsed:
        """The text has ended: show what is held."""


class NamedParser(ToolParser):
    """The whole answer is the arguments of a function that the caller named (the grammar sees to that)."""

    def __init__(self, name: str) -> None:
        self._name, self._has_begun = name, False

    @override
    def add(self, text: str) -> Parsed:
        return parts_of(*self._begin(), Arguments(text)) if text else Parsed()

    def _begin(self) -> list[ToolCall]:
        calls = [] if self._has_begun else [make_call(self._name, "")]
        self._has_begun = True
        return calls

    @override
    def end(self) -> Parsed:
        return Parsed()  # of a call that was cut before it began nothing is shown


class ListParser(ToolParser):
    """The whole answer is a JSON list of calls (`tool_choice="required"`; the grammar sees to that).

    Each call is given as soon as it is complete. Of one that `max_tokens` cut nothing is shown; a list without any
    complete call is shown as text.
    """

    _BETWEEN = " \n\r\t[,]"

    def __init__(self, names: Collection[str]) -> None:
        self._names = names
        self._held, self._text, self._has_calls = "", "", False

    @override
    def add(self, text: str) -> Parsed:
        self._text += "" if self._has_calls else text
        self._held += text
        calls = self._complete() if "}" in text else []
        self._has_calls = self._has_calls or bool(calls)
        return parts_of(*calls)

    def _complete(self) -> list[ToolCall]:
        """The calls that are complete. What a grammar allows and is no call all the same (1e999) is left out."""
        calls: list[ToolCall] = []
        while True:
            body = self._held.lstrip(self._BETWEEN)
            try:
                value, end = _DECODER.raw_decode(body)
            except (ValueError, RecursionError):
                return calls
            self._held = body[end:]
            if (call := as_call(value, self._names)) is not None:
                calls.append(call)

    @override
    def end(self) -> Parsed:
        return Parsed() if self._has_calls else parts_of(self._text)


class FirstCallParser(ToolParser):
    """At most one call of another parser's (`parallel_tool_calls=false`)."""

    def __init__(self, parser: ToolParser) -> None:
        self._parser, self._has_call = parser, False

    @override
    def runs_on(self, text: str) -> type[str] | None:
        return self._parser.runs_on(text)

    @override
    def add(self, text: str) -> Parsed:
        return self._first(self._parser.add(text))

    @override
    def end(self) -> Parsed:
        return self._first(self._parser.end())

    def _first(self, parsed: Parsed) -> Parsed:
        made: list[Part] = []
        for part in parsed:
            if isinstance(part, ToolCall):
                if self._has_call:
                    continue
                self._has_call = True
            made.append(part)
        return parts_of(*made)


def as_call(value: Any, names: Collection[str], needs_arguments: bool = True) -> ToolCall | None:
    """The call that a JSON value is, or None.

    Args:
        value: `{"name": ..., "arguments": {...}}`, with `parameters` in place of `arguments`, or the same under a key
            `function`. Arguments may be JSON text; null means that there are none.
        names: the request's tools; nothing else can be called.
        needs_arguments: a value without arguments is no call.
    """
    if not isinstance(value, dict):
        return None
    if "name" not in value and isinstance(value.get("function"), dict):
        value = value["function"]
    name = value.get("name")
    if not isinstance(name, str) or name not in names:
        return None
    keys = [key for key in ("arguments", "parameters") if key in value]
    if not keys:
        return None if needs_arguments else make_call(name, {})
    arguments = _arguments(value[keys[0]])
    return None if arguments is None else make_call(name, arguments)


def read_calls(text: str, names: Collection[str], needs_arguments: bool) -> list[ToolCall] | None:
    """The calls that a text consists of: JSON values or lists of them, one after the other. None when it is else."""
    calls: list[ToolCall] = []
    at = _next_value(text, 0)
    while at < len(text):
        try:
            value, at = _DECODER.raw_decode(text, at)
        except (ValueError, RecursionError):
            return None
        for one in value if isinstance(value, list) else [value]:
            call = as_call(one, names, needs_arguments)
            if call is None:
                return None
            calls.append(call)
        at = _next_value(text, at)
    return calls or None


def _next_value(text: str, at: int) -> int:
    while at < len(text) and text[at] in BETWEEN:
        at += 1
    return at


def _arguments(value: Any) -> str | None:
    """Arguments as JSON text, or None when they are no object."""
    try:
        if isinstance(value, str):
            value = _DECODER.decode(value) if value.strip() else {}
        if value is None:
            value = {}
        if not isinstance(value, dict):
            return None
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
        # Half a surrogate pair is JSON as an escape only.
        return text if text.isascii() or _is_unicode(text) else json.dumps(value, allow_nan=False)
    except (ValueError, RecursionError):
        return None


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
