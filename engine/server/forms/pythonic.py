"""Calls written as Python: `[f(x=1), g(s="a")]`, the whole answer (Llama 3.2 and 4, Olmo 3, and others)."""

from __future__ import annotations

import ast
import re
from typing import Any

from typing_extensions import override

from kvarena.engine.server.forms.calls import Parsed, ToolCall, ToolParser, as_call, parts_of
from kvarena.engine.server.forms.registry import (
    CallForm,
    Held,
    Tools,
    escaped,
    names_of,
    parameters_of,
    properties_of,
    quoted,
    schema_rule,
)

_TAGS = ("<|python_start|>", "<|python_end|>")
_JSON_NAMES = {"true": True, "false": False, "null": None}


class PythonicForm(CallForm):
    """A list of calls with keyword arguments."""

    names = ("pythonic", "llama4_pythonic", "olmo3")
    tags = _TAGS
    seen = _TAGS

    @classmethod
    @override
    def known(cls, call: str, name: str) -> CallForm | None:
        return cls() if re.search(rf"\[\s*{name}\(", call) else None

    @override
    def parser(self, tools: Tools, prompt: str) -> ToolParser:
        return PythonicParser(names_of(tools))

    @override
    def held(self, tools: Tools) -> list[Held]:
        names = "|".join(escaped(tool["function"]["name"]) for tool in tools)
        calls = " | ".join(f"call{i}" for i in range(len(tools)))
        rules = f'start: WS call (WS "," WS call)* WS "]"\ncall: {calls}\nWS: /[ \\n]{{0,4}}/\n'
        for i, tool in enumerate(tools):
            arguments = []
            for j, (name, schema, needed) in enumerate(properties_of(parameters_of(tool))):
                arguments.append((f'{quoted(name)} WS "=" WS value{i}_{j}', needed))
                rules += f"value{i}_{j}: {schema_rule(schema)}\n"
            rules += f"call{i}: {quoted(tool['function']['name'] + '(')} WS first{i}_0\n" + _in_order(arguments, str(i))
        return [Held(rf"\A\s*(?:{escaped(_TAGS[0])})?\s*\[\s*(?=(?:{names})\()", [rules])]


def _in_order(arguments: list[tuple[str, bool]], name: str) -> str:
    """Rules for arguments in their order, of which those that are not needed may be left out, up to the bracket."""
    rules = []
    for i, (argument, needed) in enumerate(arguments):
        skip = "" if needed else f" | first{name}_{i + 1}"
        rules.append(f"first{name}_{i}: {argument} WS more{name}_{i + 1}{skip}\n")
        skip = "" if needed else f" | more{name}_{i + 1}"
        rules.append(f'more{name}_{i}: "," WS {argument} WS more{name}_{i + 1}{skip}\n' if i else "")
    last = len(arguments)
    return "".join(rules) + f'first{name}_{last}: ")"\n' + (f'more{name}_{last}: ")"\n' if last else "")


class PythonicParser(ToolParser):
    """A whole answer of calls. It is text as soon as it cannot be a list of calls, and where it turns out to be none.

    Args:
        names: the request's tools.
    """

    # Beginnings of a list of calls; a longer one goes on with whatever Python allows.
    _BEGINS = re.compile(r"\s*(?:<\|python_start\|>)?\s*\[\s*[\w.]+\s*\(")
    _MAY_BEGIN = re.compile(r"\s*(?:<\|python_start\|>)?\s*(?:\[\s*[\w.]*\s*)?")

    def __init__(self, names: frozenset[str]) -> None:
        self._names, self._held, self._is_text, self._has_begun = names, "", False, False

    @override
    def runs_on(self, text: str) -> type[str] | None:
        return str if self._is_text else None

    @override
    def add(self, text: str) -> Parsed:
        if self._is_text:
            return parts_of(text)
        self._held += text
        if self._has_begun:
            return Parsed()
        self._has_begun = self._BEGINS.match(self._held) is not None
        opening = _TAGS[0].startswith(self._held.lstrip())
        if self._has_begun or opening or self._MAY_BEGIN.fullmatch(self._held):
            return Parsed()
        self._is_text = True
        return self._release()

    def _release(self) -> Parsed:
        held, self._held = self._held, ""
        return parts_of(held)

    @override
    def end(self) -> Parsed:
        calls = read_python(self._held, self._names) if self._has_begun else None
        return self._release() if calls is None else parts_of(*calls)


def read_python(text: str, names: frozenset[str]) -> list[ToolCall] | None:
    """The calls that a text consists of, or None when it is else."""
    body = text.strip().removeprefix(_TAGS[0]).removesuffix(_TAGS[1]).strip()
    try:
        tree = ast.parse(body, mode="eval").body
        if not isinstance(tree, ast.List) or not tree.elts:
            return None
        made = [_call(one, names) for one in tree.elts]
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    return None if None in made else [call for call in made if call is not None]


def _call(node: ast.expr, names: frozenset[str]) -> ToolCall | None:
    if not isinstance(node, ast.Call) or node.args or any(one.arg is None for one in node.keywords):
        return None
    arguments = {str(one.arg): _value(one.value) for one in node.keywords}
    return as_call({"name": ast.unparse(node.func), "arguments": arguments}, names)


def _value(node: ast.expr) -> Any:
    """A literal. Raises ValueError for anything else."""
    if isinstance(node, ast.Name) and node.id in _JSON_NAMES:
        return _JSON_NAMES[node.id]
    if isinstance(node, (ast.List, ast.Tuple)):
        return [_value(one) for one in node.elts]
    if isinstance(node, ast.Dict):
        # A key that is none (`**rest`) is no literal, which the function says.
        return {
            str(ast.literal_eval(key or node)): _value(one) for key, one in zip(node.keys, node.values, strict=True)
        }
    value = ast.literal_eval(node)
    if not isinstance(value, (str, int, float, bool, type(None))):
        raise ValueError("no value of JSON's")
    return value
