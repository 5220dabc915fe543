"""The requests of the Messages API, as far as this server honours them.

Keys that a chat knows too (`top_k`, `seed`, `priority`, ...) are handed on to it as they are, and checked there.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from kvarena.engine.server.api.protocol import MAX_MESSAGES, MAX_TOOLS, Items, Open
from kvarena.engine.server.shared.errors import bad_request

Blocks = Annotated[Items[dict[str, Any]], Field(max_length=MAX_MESSAGES)]


class MessageParam(Open):
    """A turn: text, or blocks."""

    role: Literal["user", "assistant", "system"]
    content: str | Blocks


class Thinking(Open):
    """Whether the model thinks first, and for how many tokens at most."""

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: int | None = Field(default=None, ge=1)
    display: Literal["summarized", "omitted"] | None = None


class OutputConfig(Open):
    """How much is thought, and the form of the answer."""

    effort: str | None = None
    format: dict[str, Any] | None = None


class CountRequest(Open):
    """`/v1/messages/count_tokens`."""

    model: str | None = None
    messages: Annotated[Items[MessageParam], Field(min_length=1, max_length=MAX_MESSAGES)]
    system: str | Blocks | None = None
    tools: Annotated[Items[dict[str, Any]], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: dict[str, Any] | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    cache_control: dict[str, Any] | None = None


class MessagesRequest(CountRequest):
    """`/v1/messages`."""

    max_tokens: int = Field(ge=1)
    stop_sequences: Items[str] | None = None
    stream: bool | None = None
    metadata: dict[str, Any] | None = None
    service_tier: str | None = None


# They would change the answer. With a value that asks for nothing they are taken.
_REFUSED = {
    "container": "", "mcp_servers": "", "output_format": "use output_config.format", "n": "",
    "stop": "use stop_sequences", "max_completion_tokens": "use max_tokens",
    "response_format": "use output_config.format",
    "reasoning_effort": "use output_config.effort", "thinking_token_budget": "use thinking.budget_tokens",
    "logprobs": "", "top_logprobs": "", "prompt_logprobs": "", "return_token_ids": "", "parallel_tool_calls":
    "use tool_choice.disable_parallel_tool_use", "continue_final_message": "end with a turn of the assistant's",
    "add_generation_prompt": "", "include_reasoning": "use thinking.display",
}  # fmt: skip


def check_request(req: CountRequest) -> None:
    """400 for what would change an answer and is not honoured."""
    for name, value in (req.model_extra or {}).items():
        if name in _REFUSED and value:
            hint = f"; {_REFUSED[name]}" if _REFUSED[name] else ""
            raise bad_request(f"{name} is not supported by /v1/messages{hint}", name)
        if name == "speed" and value not in (None, "standard"):
            raise bad_request("speed is not supported by this server", name)
        if name == "context_management" and value:
            edits = value.get("edits") if isinstance(value, dict) else None
            kept = isinstance(edits, list) and all(isinstance(one, dict) and one.get("keep") == "all" for one in edits)
            if not kept:
                raise bad_request("context_management is not supported: nothing of the messages is dropped", name)


# Answers: written by hand (answer.py); these describe them in the OpenAPI document.


class MessageBody(Open):
    """The assistant's message."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[dict[str, Any]]
    stop_reason: str | None = None
    stop_sequence: str | None = None
    usage: dict[str, Any]


class TokenCount(Open):
    """Tokens of a prompt."""

    input_tokens: int
