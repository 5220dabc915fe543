"""Which constraint a request asks for: a JSON schema, regex, choice or grammar, as kind and text.

request -> (kind, text) -> tried out under limits (`grammar_checks.py`) -> compiled in the engine's process, once
           (`compiled.py`) -> a copy for each choice -> a mask per token (`engine/runner/constraints.py`)
"""

from __future__ import annotations

import json

from kvarena.engine.errors import RequestError
from kvarena.engine.server.api.protocol import ResponseFormat, StructuredOutputs
from kvarena.engine.server.text.schemas import schema_text

MAX_SPEC_CHARS = 65536
MAX_CHOICES = 4096
JSON_OBJECT = '{"type": "object"}'
Constraint = tuple[str, str]


def from_response_format(fmt: ResponseFormat | None) -> Constraint | None:
    """The constraint of `response_format`. Raises RequestError."""
    if fmt is None:
        return None
    named = None if fmt.json_schema is None else fmt.json_schema.schema_
    if fmt.schema_ is not None and named is not None:
        raise RequestError("response_format holds two schemas; leave one out", "response_format")
    if fmt.type != "json_schema" and fmt.json_schema is not None:
        raise RequestError('response_format.json_schema goes with type "json_schema"', "response_format")
    if fmt.type == "text":
        if fmt.schema_ is not None:
            raise RequestError('response_format.schema goes with type "json_schema"', "response_format")
        return None
    schema = named if fmt.schema_ is None else fmt.schema_
    if schema is not None:
        return ("json", schema_text(schema, "response_format"))
    if fmt.type == "json_schema":
        raise RequestError("response_format.json_schema.schema is missing", "response_format")
    return ("json", JSON_OBJECT)


def from_structured_outputs(spec: StructuredOutputs | None) -> Constraint | None:
    """The constraint of `structured_outputs`. Raises RequestError."""
    if spec is None:
        return None
    asked = {name: getattr(spec, name) for name in ("json_", "regex", "choice", "grammar", "json_object")}
    # An empty schema allows any JSON; an empty text constrains nothing that could be meant.
    given = [name for name, value in asked.items() if value or (name == "json_" and value is not None)]
    if len(given) != 1:
        raise RequestError(
            "structured_outputs must hold exactly one of json, regex, choice, grammar, json_object",
            "structured_outputs",
        )
    kind = given[0]
    if kind == "json_":
        return ("json", schema_text(spec.json_, "structured_outputs"))
    if kind == "json_object":
        return ("json", JSON_OBJECT)
    if kind == "choice":
        choices = spec.choice or []
        if len(choices) > MAX_CHOICES or not all(choices):
            raise RequestError(
                f"structured_outputs.choice must be 1 to {MAX_CHOICES} non-empty strings", "structured_outputs"
            )
        if sum(map(len, choices)) > MAX_SPEC_CHARS:
            raise RequestError(
                f"the choices are longer than {MAX_SPEC_CHARS} characters together", "structured_outputs"
            )
        # One terminal: as many rules the parser would follow side by side, and give up above 2,000.
        return ("choice", "start: CHOICE\nCHOICE: " + " | ".join(json.dumps(choice) for choice in choices))
    text: str = getattr(spec, kind)
    if len(text) > MAX_SPEC_CHARS:
        raise RequestError(f"the {kind} is longer than {MAX_SPEC_CHARS} characters", "structured_outputs")
    return (kind, text)
