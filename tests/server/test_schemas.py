"""Schemas of tools become one without losing what they refer to; what is only said about values plays no part."""

from __future__ import annotations

import json

import pytest
from pydantic import BaseModel, Field
from transformers import AutoTokenizer

from kvarena.engine.errors import RequestError
from kvarena.engine.server.engine.compiled import make_compiler
from kvarena.engine.server.engine.grammars import to_grammar
from kvarena.engine.server.text.schemas import required_schema, schema_text, without_notes


class Address(BaseModel):
    """Where."""

    street: str = Field(description="with its number", default="", title="Street")
    parts: list[Address] = []


class Person(BaseModel):
    """Who."""

    name: str
    home: Address
    others: list[Address] = Field(default=[], description="more of them")


NESTED = Person.model_json_schema()
INSIDE = {"home": {"street": "a", "parts": [{"street": "b", "parts": []}]}, "name": "x", "others": []}
# The same as other generators write it: all of it a reference, an id of its own, pointers into properties, itself.
BY_REFERENCE = {
    "$schema": "http://json-schema.org/draft-07/schema#",
    "$ref": "#/definitions/P",
    "definitions": {"P": {"type": "object", "properties": {"a": {"$ref": "#/definitions/I"}}, "required": ["a"],
                          "additionalProperties": False}, "I": {"type": "integer"}},
}  # fmt: skip
WITH_ID = {
    "$id": "http://x/y", "type": "object", "properties": {"a": {"$ref": "http://x/y#/$defs/I"}}, "required": ["a"],
    "additionalProperties": False, "$defs": {"I": {"type": "integer"}},
}  # fmt: skip
POINTER = {
    "type": "object", "properties": {"a": {"type": "integer"}, "b": {"$ref": "#/properties/a"}},
    "required": ["a", "b"], "additionalProperties": False,
}  # fmt: skip
RECURSIVE = {
    "type": "object", "properties": {"a": {"anyOf": [{"$ref": "#"}, {"type": "null"}]}}, "required": ["a"],
    "additionalProperties": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def accepts():
    tokenizer = AutoTokenizer.from_pretrained("experiments/models/demo")
    compile_grammar = make_compiler(tokenizer, len(tokenizer), frozenset({tokenizer.eos_token_id}))

    def check(schema, value):
        matcher = compile_grammar("json", to_grammar("json", schema_text(schema, "tools"))).start()._matcher
        ids = tokenizer.encode(json.dumps(value), add_special_tokens=False)
        return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()

    return check


@pytest.mark.parametrize(
    ("parameters", "right", "wrong"),
    [
        (NESTED, {"name": "x", "home": INSIDE["home"], "others": []}, {"name": "x", "home": {"street": 1}}),
        (BY_REFERENCE, {"a": 1}, {"a": "x"}),
        (WITH_ID, {"a": 1}, {"a": "x"}),
        (POINTER, {"a": 1, "b": 2}, {"a": 1, "b": "x"}),
        (RECURSIVE, {"a": {"a": None}}, {"a": {"a": 1}}),
        (None, {"anything": [1]}, []),
    ],
    ids=("pydantic", "a reference", "an id", "a pointer", "itself", "nothing"),
)
def test_required_calls_of_any_schema(accepts, parameters, right, wrong):
    schema = required_schema([("f", {"type": "object"}), ("g", parameters)], parallel=True)
    assert accepts(schema, [{"name": "g", "parameters": right}, {"name": "f", "parameters": {}}])
    assert not accepts(schema, [{"name": "g", "parameters": wrong}])
    assert not accepts(schema, [{"name": "h", "parameters": right}])
    assert not accepts(schema, [])
    if parameters is not None:
        assert accepts(parameters, right)


def test_one_call_when_no_parallel_ones_are_wanted(accepts):
    schema = required_schema([("f", None)], parallel=False)
    call = {"name": "f", "parameters": {}}
    assert accepts(schema, [call])
    assert not accepts(schema, [call, call])


def test_sixty_tools_with_long_descriptions(accepts):
    parameters = {
        "type": "object",
        "properties": {"a": {"type": "string", "description": "x" * 2000}},
        "required": ["a"],
    }
    schema = required_schema([(f"f{i}", parameters) for i in range(60)], parallel=True)
    assert len(json.dumps(schema)) > 120_000
    assert len(schema_text(schema, "tools")) < 20_000
    assert accepts(schema, [{"name": "f59", "parameters": {"a": "b"}}])


def test_only_notes_are_left_out():
    """A property may be called like a note, and a value may look like a schema."""
    schema = {
        "title": "T", "description": "d", "default": {}, "required": ["title"],
        "properties": {"title": {"type": "string", "description": "d"}, "default": True},
        "anyOf": [{"enum": [{"title": "T"}]}, {"const": {"description": "d"}}],
        "items": [{"examples": [1]}], "not": {"$comment": "c"}, "x": {"title": "T"},
    }  # fmt: skip
    assert without_notes(schema) == {
        "required": ["title"], "properties": {"title": {"type": "string"}, "default": True},
        "anyOf": [{"enum": [{"title": "T"}]}, {"const": {"description": "d"}}], "items": [{}], "not": {},
        "x": {"title": "T"},
    }  # fmt: skip


def test_what_is_too_deep_or_too_long_is_told():
    deep: dict = {"type": "object"}
    for _ in range(100):
        deep = {"type": "object", "properties": {"a": deep}}
    with pytest.raises(RequestError, match="deep"):
        required_schema([("f", deep)], parallel=True)
    with pytest.raises(RequestError, match="without its descriptions"):
        schema_text({"enum": ["x" * 1000] * 300}, "tools")
