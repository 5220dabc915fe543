"""The requests of the Responses API, as far as this server honours them.

Keys that a chat knows too (`top_k`, `seed`, `stop`, `priority`, ...) are handed on to it, and checked there.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, WithJsonSchema

from kvarena.engine.server.api.protocol import MAX_MESSAGES, MAX_TOOLS, Items, Open
from kvarena.engine.server.shared.errors import bad_request

MAX_METADATA = 16
_INPUT_SCHEMA = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "object"}, "minItems": 1}]}


class TextConfig(Open):
    """How the answer's text looks."""

    format: dict[str, Any] | None = None
    verbosity: str | None = None


class ReasoningConfig(Open):
    """How much is thought. Thoughts are given as they are: a `summary` of them is not made."""

    effort: str | None = None
    summary: str | None = None
    generate_summary: str | None = None


class ResponseStreamOptions(Open):
    """What a stream carries beside its events."""

    include_obfuscation: bool | None = None


class ResponsesRequest(Open):
    """`/v1/responses`."""

    input: Annotated[Any, WithJsonSchema(_INPUT_SCHEMA)]
    model: str | None = None
    instructions: str | None = None
    previous_response_id: str | None = Field(default=None, max_length=128)
    store: bool | None = None
    background: bool | None = None
    stream: bool | None = None
    stream_options: ResponseStreamOptions | None = None
    max_output_tokens: int | None = Field(default=None, ge=1)
    tools: Annotated[Items[dict[str, Any]], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    text: TextConfig | None = None
    reasoning: ReasoningConfig | None = None
    include: Items[str] | None = None
    top_logprobs: int | None = Field(default=None, ge=0)
    truncation: str | None = None
    metadata: dict[str, str] | None = Field(default=None, max_length=MAX_METADATA)
    service_tier: str | None = None
    prompt_cache_key: str | None = None
    safety_identifier: str | None = None
    max_tool_calls: int | None = None
    enable_response_messages: bool | None = None
    user: str | None = Field(default=None, max_length=1024)


INCLUDABLE = ("message.output_text.logprobs", "reasoning.encrypted_content", "message.input_image.image_url")
# They would change the answer. With a value that asks for nothing they are taken.
_REFUSED = {
    "conversation": "use previous_response_id",
    "prompt": "put its text into instructions and input",
    "context_management": "shorten the input",
    "moderation": "",
    "image": "",
    "response_format": "use text.format",
    "max_tokens": "use max_output_tokens",
    "max_completion_tokens": "use max_output_tokens",
    "messages": "use input",
    "n": "",
    "logprobs": 'use include=["message.output_text.logprobs"]',
    "prompt_logprobs": "",
    "return_token_ids": "",
    "continue_final_message": "",
    "add_generation_prompt": "",
    "reasoning_effort": "use reasoning.effort",
    "functions": "use tools",
}


def check_request(req: ResponsesRequest) -> None:
    """400 for what would change an answer and is not honoured."""
    for name, value in (req.model_extra or {}).items():
        if name in _REFUSED and value and not (name == "n" and value == 1):
            hint = f"; {_REFUSED[name]}" if _REFUSED[name] else ""
            raise bad_request(f"{name[:100]} is not supported by /v1/responses{hint}", name)
    if req.truncation not in (None, "disabled"):
        raise bad_request("truncation is not supported: nothing of the input is dropped; shorten it", "truncation")
    unknown = [one for one in req.include or () if one not in INCLUDABLE]
    if unknown:
        raise bad_request(f"include holds {unknown[0][:100]!r}; known: {', '.join(INCLUDABLE)}", "include")
    if req.stream_options is not None and not req.stream:
        raise bad_request("stream_options is only allowed with stream=true", "stream_options")
    if req.background and req.stream:
        raise bad_request("background does not go with stream: ask for the response by its id", "background")
    if req.text is not None and req.text.verbosity not in (None, "medium"):
        raise bad_request("text.verbosity is not supported by this server", "text")
    if isinstance(req.input, list) and len(req.input) > MAX_MESSAGES:
        raise bad_request(f"input holds more than {MAX_MESSAGES} items", "input")


# Answers: written by hand (answer.py); these describe them in the OpenAPI document.


class ResponseBody(Open):
    """A response: its items so far, and its state."""

    id: str
    object: Literal["response"]
    created_at: int
    status: Literal["completed", "failed", "in_progress", "cancelled", "queued", "incomplete"]
    model: str
    output: list[dict[str, Any]]
    usage: dict[str, Any] | None = None


class ItemList(Open):
    """Input items of a response."""

    object: Literal["list"]
    data: list[dict[str, Any]]
    has_more: bool


class Deleted(Open):
    """A response that is gone."""

    id: str
    object: Literal["response.deleted"]
    deleted: Literal[True]
