"""Random constraints of structured output, most of them wrong in some way: bodies of requests, one per seed.

Sources: JSON schemas made keyword by keyword, regexes and grammars (Lark, GBNF) made from parts; many are then cut,
repeated or changed by a character, and some are made large on purpose.
"""

from __future__ import annotations

import json
import random
import string
from collections.abc import Callable
from typing import Any

MESSAGES = [{"role": "user", "content": "Hello!"}]
_NAMES = ("a", "b", "name", "description", "title", "$ref", "x y", "é", "", "0", "type", "additionalProperties")
_FORMATS = ("date-time", "date", "time", "uuid", "email", "ipv4", "ipv6", "uri", "hostname", "duration", "nonsense")
_SCALARS: tuple[Any, ...] = (
    0,
    1,
    -1,
    0.5,
    1e308,
    -1e-308,
    2**63,
    10**30,
    True,
    False,
    None,
    "",
    "a",
    '"',
    "\\",
    "é",
    "\u0000",
    [],
    {},
    [1],
)
_TYPES = ("object", "array", "string", "number", "integer", "boolean", "null", "nonsense")
GBNF = (
    'root ::= "yes" | "no"',
    'root ::= item+\nitem ::= "- " [^\\n]+ "\\n"',
    'root ::= expr\nexpr ::= term ("+" term)*\nterm ::= [0-9]+ | "(" expr ")"',
    'root ::= "{" ws "\\"a\\":" [a-z]{1,5} ws "}"\nws ::= [ \\t\\n]*',
    'root ::= a-b fooBar?\na-b ::= "x"{2,3} # note\nfooBar ::= "\\x41\\u00e9"',
)
LARK = (
    'start: "yes" | "no"',
    "start: item+\nitem: /- [^\\n]+/ NL\nNL: /\\n/",
    'start: expr\nexpr: expr "+" term | term\nterm: /[0-9]+/ | "(" expr ")"',
    "start: A B?\nA: /[a-z]+/ & /.{1,4}/\nB: ~/x*/",
    'start: "<" x ">"\nx: %json {"type": "object"}',
    "%llguidance {}\nstart[max_tokens=5]: /.*/",
    '%import common.INT\nstart: INT ("," INT)*\n%ignore " "',
)
_PARTS = (
    "a", "b", ".", "\\d", "\\w", "\\s", "\\S", "[a-f]", "[^x]", "é", "\\p{L}", "\\u0041", "\\x41", "\\b", "^", "$", "|",
    "(a|b)", "(?:x)", "(?=a)", "(?!a)", "(?i)", "(?P<n>a)", "\\1", "\\", "(", ")", "[", "]", "{", "}", "*", "+", "?",
)  # fmt: skip
_REPEATS = ("*", "+", "?", "{2}", "{1,50}", "{0,1000}", "{3,}", "{1,100000}", "*?", "++", "{5,2}", "{-1}")
_NOISE = string.printable + "é\u2028\U0001f600\u0000"


def random_schema(rng: random.Random, depth: int = 4) -> Any:
    """A JSON schema, or what somebody took for one."""
    if depth == 0 or rng.random() < 0.1:
        return rng.choice([True, False, {}, {"type": rng.choice(_TYPES)}, {"const": rng.choice(_SCALARS)}])
    schema: dict[str, Any] = {}
    if rng.random() < 0.8:
        schema["type"] = rng.choice(_TYPES) if rng.random() < 0.9 else rng.sample(_TYPES, 2)
    for _ in range(rng.randint(0, 4)):
        key, make = rng.choice(_KEYWORDS)
        schema[key] = make(rng, depth - 1) if rng.random() < 0.95 else rng.choice(_SCALARS)
    return schema


def _by_name(rng: random.Random, depth: int) -> dict[str, Any]:
    return {rng.choice(_NAMES): random_schema(rng, depth) for _ in range(rng.randint(0, 4))}


def _patterns(rng: random.Random, depth: int) -> dict[str, Any]:
    return {random_regex(rng, 3): random_schema(rng, depth) for _ in range(rng.randint(0, 4))}


def _several(rng: random.Random, depth: int) -> list[Any]:
    return [random_schema(rng, depth) for _ in range(rng.randint(0, 4))]


def _number(rng: random.Random, _: int) -> Any:
    return rng.choice([0, 1, 2, 3, 10, 0.5, 1e-9, -1, 1000, 10**6, 2**40, -(2**63)])


def _ref(rng: random.Random, _: int) -> str:
    places = (
        "#",
        "#/$defs/a",
        "#/$defs/b",
        "#/definitions/a",
        "#/properties/a",
        "#/nowhere",
        "#a",
        "http://x/y",
        "%",
        "",
    )
    return rng.choice(places)


_KEYWORDS: tuple[tuple[str, Callable[[random.Random, int], Any]], ...] = (
    ("properties", _by_name),
    ("patternProperties", _patterns),
    ("$defs", _by_name),
    ("definitions", _by_name),
    ("additionalProperties", random_schema),
    ("propertyNames", random_schema),
    ("items", random_schema),
    ("prefixItems", _several),
    ("anyOf", _several),
    ("oneOf", _several),
    ("allOf", _several),
    ("not", random_schema),
    ("if", random_schema),
    ("required", lambda rng, _: rng.sample(_NAMES, rng.randint(0, 4))),
    ("enum", lambda rng, _: rng.sample(_SCALARS, rng.randint(0, 5))),
    ("const", lambda rng, _: rng.choice(_SCALARS)),
    ("minimum", _number),
    ("maximum", _number),
    ("exclusiveMinimum", _number),
    ("multipleOf", _number),
    ("minLength", _number),
    ("maxLength", _number),
    ("minItems", _number),
    ("maxItems", _number),
    ("minProperties", _number),
    ("maxProperties", _number),
    ("pattern", lambda rng, _: random_regex(rng, 4)),
    ("format", lambda rng, _: rng.choice(_FORMATS)),
    ("$ref", _ref),
    ("$id", _ref),
    ("$anchor", lambda rng, _: rng.choice("ab")),
    ("$schema", lambda rng, _: rng.choice(["http://json-schema.org/draft-07/schema#", "http://x"])),
    ("x-guidance", lambda rng, _: {"whitespace_flexible": rng.random() < 0.5, "lenient": rng.random() < 0.5}),
)


def large_schema(rng: random.Random) -> Any:
    """A schema that is slow to compile, or to follow."""
    count = rng.choice([20, 60, 150, 300])
    inner = {"type": "string", "pattern": random_regex(rng, 2)} if rng.random() < 0.5 else {"enum": list(range(count))}
    names = [f"p{i}" for i in range(count)]
    return rng.choice(
        [
            {
                "type": "object",
                "patternProperties": {f"^x{i}(a|b){{1,{rng.choice([5, 50])}}}$": {} for i in range(count)},
            },
            {"type": "object", "properties": dict.fromkeys(names, inner), "required": names},
            {"type": "object", "properties": dict.fromkeys(names, inner)},
            {"anyOf": [{"type": "object", "properties": {n: inner}, "required": [n]} for n in names]},
            {"allOf": [{"anyOf": [{"properties": {n: {}}}, {"required": [n]}]} for n in names[: count // 10]]},
            {"type": "array", "items": inner, "minItems": count, "maxItems": count * 100},
            {"type": "string", "minLength": count * 100, "maxLength": count * 1000},
        ]
    )


def random_regex(rng: random.Random, size: int) -> str:
    """A regex of about `size` parts, some repeated, groups within groups."""
    made = ""
    for _ in range(rng.randint(1, size)):
        part = rng.choice(_PARTS[:8]) if rng.random() < 0.7 else rng.choice(_PARTS)
        if rng.random() < 0.2 and size > 1:
            part = f"({random_regex(rng, size - 1)})"
        made += part + (rng.choice(_REPEATS) if rng.random() < 0.3 else "")
    return made


def _mutated(rng: random.Random, text: str) -> str:
    """`text` with some characters gone, new, twice, or in another place."""
    for _ in range(rng.randint(0, 4)):
        at, to = sorted((rng.randrange(len(text) + 1), rng.randrange(len(text) + 1)))
        kind = rng.randrange(5)
        if kind == 0:
            text = text[:at] + text[min(to, at + 3) :]
        elif kind == 1:
            text = text[:at] + rng.choice(_NOISE) + text[at:]
        elif kind == 2:
            text = text[:to] + text[at:]
        elif kind == 3:
            text = text[:at] + rng.choice(_PARTS + _REPEATS) + text[at:]
        else:
            text = text[:at]
    return text


def _lark_of_parts(rng: random.Random) -> str:
    """Rules that follow each other at random, some without end."""
    names = [f"r{i}" for i in range(rng.randint(1, 6))]
    lines = [f"start: {names[0]}"]
    for name in names:
        options = []
        for _ in range(rng.randint(1, 3)):
            parts = [rng.choice([*names, '"a"', '"b"', "/[a-z]{1,9}/", f"/{random_regex(rng, 2)}/"]) for _ in range(3)]
            options.append(" ".join(part + rng.choice(["", "", "*", "?", "+"]) for part in parts[: rng.randint(1, 3)]))
        lines.append(f"{name}: {' | '.join(options)}")
    return "\n".join(lines)


def random_spec(rng: random.Random) -> dict[str, Any]:
    """A `structured_outputs`."""
    kind = rng.choice(("json", "json", "json", "regex", "grammar", "grammar", "grammar", "choice"))
    if kind == "json":
        schema = large_schema(rng) if rng.random() < 0.1 else random_schema(rng)
        return {"json": _mutated(rng, json.dumps(schema)) if rng.random() < 0.1 else schema}
    if kind == "regex":
        return {"regex": _mutated(rng, random_regex(rng, rng.choice([2, 4, 8]))) * rng.choice([1, 1, 1, 20])}
    if kind == "choice":
        count = rng.choice([0, 1, 3, 1000])
        return {"choice": [_mutated(rng, rng.choice(GBNF)) + str(i) * rng.randint(0, 1) for i in range(count)]}
    text = _lark_of_parts(rng) if rng.random() < 0.3 else rng.choice(GBNF + GBNF + LARK)
    return {"grammar": _mutated(rng, text)}


def random_body(seed: int) -> tuple[str, dict[str, Any]]:
    """`completions` or `chat`, and the body of a request that asks for some constraint."""
    rng = random.Random(seed)
    kind = rng.random()
    if kind < 0.7:
        return "completions", {"prompt": "x", "structured_outputs": random_spec(rng)}
    if kind < 0.8:
        fmt = {"type": "json_schema", "json_schema": {"name": "s", "schema": random_schema(rng)}}
        return "chat", {"messages": MESSAGES, "response_format": fmt}
    tools = []
    for i in range(rng.choice([1, 2, 5, 40])):
        parameters = rng.choice([None, {}, random_schema(rng, 3), random_schema(rng, 3)])
        tools.append(
            {"type": "function", "function": {"name": rng.choice([f"f{i}", "f", "é"]), "parameters": parameters}}
        )
    choice = rng.choice(["required", "required", {"type": "function", "function": {"name": "f"}}])
    return "chat", {"messages": MESSAGES, "tools": tools, "tool_choice": choice}
