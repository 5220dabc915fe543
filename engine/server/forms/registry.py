"""The forms in which models write calls of tools: one small class each, found by its names.

A form reads calls (`parser`), says how its grammar holds one that has begun (`held`), and knows its own in what a chat
template renders (`known`). A new form is a new subclass: it registers itself.
"""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

from kvarena.engine.server.forms.calls import ToolParser
from kvarena.engine.server.text.schemas import MAX_SCHEMA_CHARS, named_schema, without_notes

# What a schema of a tool's cannot be held to is left to the model, and so are blanks within bounds.
_GUIDANCE = {"x-guidance": {"lenient": True, "whitespace_pattern": r"[\x20\x0A\x0D\x09]{0,12}"}}
Piece = str | dict[str, str]
Tools = Sequence[dict[str, Any]]


class Held(NamedTuple):
    """A call that has begun.

    Attributes:
        pattern: a regular expression that ends where the grammar begins; `\\A` is the beginning of the answer.
        pieces: of the grammar of the rest, as `steering.resolve` takes them.
    """

    pattern: str
    pieces: list[Piece]


class CallForm(ABC):
    """One form.

    Attributes:
        names: of `--tool-call-parser`; ours comes first, others are vLLM's.
        seen: texts that the parser must see, though they may be special tokens.
        sees_all: it must see every special token.
    """

    names: ClassVar[tuple[str, ...]] = ()
    seen: tuple[str, ...] = ()
    sees_all: ClassVar[bool] = False

    def __init_subclass__(cls) -> None:
        for name in cls.__dict__.get("names", ()):
            if name in CALL_FORMS:
                raise ValueError(f"two forms of calls are named {name}")
            CALL_FORMS[name] = cls

    @classmethod
    def known(cls, call: str, name: str) -> CallForm | None:  # noqa: ARG003 - of a form that its tags tell
        """The form of a rendered call of `name`, if it is this one."""
        return None

    @abstractmethod
    def parser(self, tools: Tools, prompt: str) -> ToolParser:
        """A parser for one choice.

        Args:
            tools: the request's, as chat templates get them.
            prompt: the end of the prompt, for forms that look for the beginning of the answer in it.
        """

    def held(self, tools: Tools) -> list[Held]:  # noqa: ARG002 - of a form that cannot hold
        """How calls that have begun are held to their tools' schemas; empty: they are not."""
        return []


CALL_FORMS: dict[str, type[CallForm]] = {}


def names_of(tools: Tools) -> frozenset[str]:
    """The functions that may be called."""
    return frozenset(tool["function"]["name"] for tool in tools)


def parameters_of(tool: dict[str, Any]) -> dict[str, Any]:
    """The JSON schema of a tool's arguments; of one that is too large, that they are an object."""
    schema = without_notes(named_schema(tool["function"].get("parameters")))
    return {"type": "object"} if len(json.dumps(schema)) > MAX_SCHEMA_CHARS else schema


def schema_rule(schema: Any) -> str:
    """Lark's form of a JSON schema."""
    if not isinstance(schema, dict):
        schema = {} if schema is not False else {"not": {}}
    return "%json " + json.dumps(schema | _GUIDANCE)


def quoted(text: str) -> str:
    """Lark's form of a text."""
    return json.dumps(text, ensure_ascii=False)


def properties_of(schema: dict[str, Any]) -> list[tuple[str, Any, bool]]:
    """Name, schema and whether it is required, of each argument that a schema names."""
    properties, required = schema.get("properties"), schema.get("required")
    if not isinstance(properties, dict):
        return []
    needed = required if isinstance(required, list) else []
    return [(name, value, name in needed) for name, value in properties.items()]


def is_text(schema: Any) -> bool:
    """Whether an argument is any text."""
    return isinstance(schema, dict) and schema.get("type") == "string" and not schema.keys() & {"enum", "const"}


def escaped(text: str) -> str:
    """A text as a part of a pattern."""
    return re.escape(text)


def value_pieces(schema: Any, close: str, name: str, around: str = "") -> list[Piece]:
    """The end of a grammar's rule: a value up to a tag, text as it is and all else as JSON.

    Args:
        schema: of the value.
        close: the tag.
        name: of a further rule, where one is needed.
        around: what stands between the value and the tag.
    """
    if is_text(schema):
        return [{"until": around + close}, " WS\n"]
    choices = schema.get("enum", [schema["const"]] if "const" in schema else []) if isinstance(schema, dict) else []
    beside = quoted(around) + " " if around else ""
    if choices and all(isinstance(one, str) for one in choices):
        return ["(" + " | ".join(quoted(one) for one in choices) + f") {beside}", {"tag": close}, " WS\n"]
    return [f"{name} {beside}", {"tag": close}, f" WS\n{name}: {schema_rule(schema)}\n"]
