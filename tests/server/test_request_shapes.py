"""One request has few shapes: docs/architecture.md lists them, and the server's classes are held to that list."""

from __future__ import annotations

import ast
import re
from dataclasses import fields
from pathlib import Path

import pytest

from kvarena.engine.request import SamplingParams
from kvarena.engine.server.api.protocol import ChatCompletionRequest, CompletionRequest, SamplingFields
from kvarena.engine.server.api.sampling import sampling_params
from kvarena.engine.server.shared.config import ServerConfig
from kvarena.engine.server.shared.ipc import EngineInfo

ROOT = Path(__file__).resolve().parents[2]
MOST_SHAPES = 8
# Names that a class has which holds what is of one request, or of one of its choices.
TELLING = frozenset(
    (
        "request_id", "shown_id", "sampling", "temperature", "top_p", "max_tokens", "prompt", "prompts", "token_ids",
        "prompt_token_ids", "num_prompt_tokens", "tokens", "logprobs", "prompt_logprobs", "choices", "texts", "handle",
        "handles", "finish_reason", "stop_reason", "stop_token", "stops", "include_usage", "arrival", "req",
        "cache_salt",
    )
)  # fmt: skip
# They have such a name and are on no request's way from the socket to the engine and back.
OTHERS = {
    "Group": "what an Answer is, in the front and in kvarena.LLM",
    "StopMatcher": "a part of a Choice",
    "StreamOptions": "a part of a request",
    "SamplingFields": "the base of both requests",
    "TokenizeRequest": "answered in the front",
    "DetokenizeRequest": "answered in the front",
    "EngineInfo": "what an engine can do",
    "EngineClient": "all of a front's choices",
    "Detokenizer": "the vocabulary",
    "PieceStream": "the vocabulary",
    "ImageInputs": "what a model's prompts have around an image",
    "ChatPrompt": "what rendering a chat answers: ids and the places of images, which go into a Choice at once",
}


def table() -> list[str]:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    return re.findall(r"^\| \d \| (.*?) \|", text.split("## What a served request is")[1].split("\n## ")[0], re.M)


def listed() -> set[str]:
    return {name for row in table() for name in re.findall(r"`(\w+)`", row)}


def members(node: ast.ClassDef) -> set[str]:
    """What objects of a class hold: annotated fields, slots, and what is set on `self`, private or not."""
    names: set[str] = set()
    for one in ast.walk(node):
        if isinstance(one, ast.AnnAssign) and isinstance(one.target, ast.Name) and one in node.body:
            names.add(one.target.id)
        elif isinstance(one, ast.Attribute) and isinstance(one.ctx, ast.Store) and isinstance(one.value, ast.Name):
            names |= {one.attr.lstrip("_")} if one.value.id == "self" else set()
    return names


def classes() -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for path in sorted((ROOT / "engine" / "server").rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        if path.name == "protocol.py":  # below this line: what the OpenAPI document says of answers; none is ever made
            text = text.split("# Answers: written by hand")[0]
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ClassDef):
                found[node.name] = members(node)
    return found


def test_a_request_has_at_most_eight_shapes():
    assert 1 <= len(table()) <= MOST_SHAPES
    known = classes()
    assert listed() - {"Request", "SamplingParams", "state"} <= set(known), (
        "docs/architecture.md names a class of before"
    )


def test_no_other_class_of_the_server_holds_a_request():
    held = {name: names & TELLING for name, names in classes().items() if names & TELLING}
    strangers = {name: names for name, names in held.items() if name not in listed() | set(OTHERS)}
    assert not strangers, "a new shape of a request: give what it holds to a class of docs/architecture.md's table"
    assert set(OTHERS) <= set(held), "an exception that no class needs any more"


def test_the_search_sees_what_it_is_for():
    known = classes()
    assert {"sampling", "prompt", "tokens", "handle"} <= known["Choice"]
    assert "req" in known["Answer"] and "handle" in known["ServedRequest"] and "request_id" in known["AddFrame"]


HANDED_ON = sorted({one.name for one in fields(SamplingParams)} & set(SamplingFields.model_fields))


@pytest.mark.parametrize("name", HANDED_ON)
def test_each_parameter_reaches_the_engine(name):
    """By its name alone: a new field of both classes is tested here without a line."""
    low = {"min_tokens": 3, "n": 2, "prompt_logprobs": 1, "top_k": 7, "seed": 11, "max_tokens": 9}
    other = {"stop_token_ids": [5], "allowed_token_ids": [5], "ignore_eos": True, "logit_bias": {"4": 1.5}}
    other |= {"logprob_token_ids": [5], "early_stopping": True}
    asked = (low | other).get(name, 0.5)
    req = CompletionRequest.model_validate({"prompt": "x", name: asked})
    info = EngineInfo(64, 64, 100)
    made = sampling_params(req, ServerConfig(), info, max_tokens=9, logprobs=0 if name == "logprob_token_ids" else None)
    expected = (5,) if asked == [5] else {4: 1.5} if name == "logit_bias" else asked
    assert getattr(made, name) == expected
    plain = sampling_params(
        ChatCompletionRequest.model_validate({"messages": [{"role": "user"}]}), ServerConfig(), info,
        max_tokens=9, logprobs=None,
    )  # fmt: skip
    assert name == "max_tokens" or getattr(plain, name) != expected
