"""JSON schemas that callers send: what of them shapes an answer, and how several become one."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from kvarena.engine.errors import RequestError

MAX_SCHEMA_CHARS = 1 << 18  # of what shapes an answer
MAX_SCHEMA_TEXT = 1 << 20  # of a schema that is given as text
MAX_SCHEMA_DEPTH = 64
# They say something about a value and allow or forbid none.
_NOTES = frozenset(
    ("title", "description", "default", "examples", "example", "deprecated", "readOnly", "writeOnly", "$comment")
)
# Keywords by what they hold: schemas by name, a list of schemas, or a schema. What others hold is no schema, however
# much it looks like one: the values of `const` and `enum`, for example.
_BY_NAME = frozenset(("properties", "patternProperties", "$defs", "definitions", "dependentSchemas", "dependencies"))
_LISTS = frozenset(("allOf", "anyOf", "oneOf", "prefixItems", "items"))
_SINGLE = frozenset(
    ("items", "additionalItems", "unevaluatedItems", "contains", "additionalProperties", "unevaluatedProperties",
     "propertyNames", "if", "then", "else", "not", "contentSchema")
)  # fmt: skip


def schema_text(schema: Any, param: str) -> str:
    """A JSON schema as text, without notes, checked for size and nesting. A string is taken for JSON text.

    Raises:
        RequestError: it is no schema, or too large; `param` is named as the one at fault.
    """
    if isinstance(schema, str):
        if len(schema) > MAX_SCHEMA_TEXT:
            raise RequestError(f"the schema is longer than {MAX_SCHEMA_TEXT} characters", param)
        try:
            schema = json.loads(schema)
        except (ValueError, RecursionError) as error:
            raise RequestError("the schema is not valid JSON", param) from error
    if not isinstance(schema, (dict, bool)):
        raise RequestError("a JSON schema is an object", param)
    if _depth(schema) > MAX_SCHEMA_DEPTH:
        raise RequestError(f"the schema is nested more than {MAX_SCHEMA_DEPTH} deep", param)
    text = json.dumps(without_notes(schema))
    if len(text) > MAX_SCHEMA_CHARS:
        raise RequestError(f"the schema is longer than {MAX_SCHEMA_CHARS} characters without its descriptions", param)
    return text


def without_notes(schema: Any) -> Any:
    """A schema less what is only said about its values: descriptions, titles, defaults, examples."""
    return _map(schema, lambda one: {key: value for key, value in one.items() if key not in _NOTES})


def named_schema(parameters: dict[str, Any] | None) -> dict[str, Any]:
    """JSON schema of the arguments of one function."""
    return parameters or {"type": "object"}


def required_schema(functions: list[tuple[str, dict[str, Any] | None]], parallel: bool) -> dict[str, Any]:
    """JSON schema of a non-empty list of calls of any of `functions`; with `parallel` off, of one call.

    Each function's schema keeps its own definitions: its references are to itself and not to the whole.

    Raises:
        RequestError: the schemas are nested too deep.
    """
    calls = []
    definitions = {}
    for number, (name, parameters) in enumerate(functions):
        if _depth(parameters) > MAX_SCHEMA_DEPTH:
            raise RequestError(f"the schema of {name[:100]!r} is nested more than {MAX_SCHEMA_DEPTH} deep", "tools")
        definitions[str(number)] = _moved(named_schema(parameters), f"#/$defs/{number}")
        calls.append(
            {
                "type": "object",
                "properties": {"name": {"const": name}, "parameters": {"$ref": f"#/$defs/{number}"}},
                "required": ["name", "parameters"],
                "additionalProperties": False,
            }
        )
    schema: dict[str, Any] = {"type": "array", "minItems": 1, "items": {"anyOf": calls}, "$defs": definitions}
    return schema if parallel else schema | {"maxItems": 1}


def _moved(schema: dict[str, Any], place: str) -> dict[str, Any]:
    """A whole schema as a part of another one: what it calls `#` is now at `place`."""
    own = schema.get("$id") or schema.get("id")
    own = own.rstrip("#") if isinstance(own, str) else None

    def move(one: dict[str, Any]) -> dict[str, Any]:
        ref = one.get("$ref")
        if not isinstance(ref, str):
            return one
        if own and ref.split("#")[0] == own:
            ref = "#" + ref.partition("#")[2]
        return one | {"$ref": place + ref[1:]} if ref == "#" or ref.startswith("#/") else one

    # A part with an id of its own refers to itself.
    top = {key: value for key, value in schema.items() if key not in ("$id", "id", "$schema")}
    return _map(top, move, into=lambda one: not isinstance(one.get("$id"), str))


def _map(
    schema: Any,
    change: Callable[[dict[str, Any]], dict[str, Any]],
    into: Callable[[dict[str, Any]], bool] = lambda _: True,
) -> Any:
    """A copy of a schema with `change` made to it and to every schema in it into which `into` lets."""
    if not isinstance(schema, dict) or not into(schema):
        return schema
    made = dict(change(schema))
    for key, value in made.items():
        if key in _BY_NAME and isinstance(value, dict):
            made[key] = {name: _map(one, change, into) for name, one in value.items()}
        elif key in _LISTS and isinstance(value, list):
            made[key] = [_map(one, change, into) for one in value]
        elif key in _SINGLE:
            made[key] = _map(value, change, into)
    return made


def _depth(value: Any) -> int:
    """Nesting of a JSON value, without recursion."""
    deepest, stack = 0, [(value, 1)]
    while stack:
        node, level = stack.pop()
        deepest = max(deepest, level)
        if level > MAX_SCHEMA_DEPTH:
            return level
        children = node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
        stack += [(child, level + 1) for child in children]
    return deepest
