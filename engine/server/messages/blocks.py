"""Messages of blocks as a chat: blocks become messages and calls, tools become a chat's tools."""

from __future__ import annotations

from typing import Any

import orjson

from kvarena.engine.server.api.protocol import MAX_MESSAGES, ChatCompletionRequest, has_too_many_parts
from kvarena.engine.server.front.http import validated
from kvarena.engine.server.messages.protocol import CountRequest, MessageParam, MessagesRequest
from kvarena.engine.server.shared.errors import ApiError, bad_request

Block = dict[str, Any]
_OWN = (frozenset(MessagesRequest.model_fields) | {"speed", "context_management"}) - {"model", "stream"}
_CHOICES = {"auto": "auto", "any": "required", "none": "none"}


def to_chat(req: CountRequest, can_think: bool) -> ChatCompletionRequest:
    """The chat that a request asks for.

    Args:
        req: the request, which `check_request` has seen.
        can_think: the model can be told to think.

    Raises:
        ApiError: a block, a tool or a choice that cannot be one of a chat's.
    """
    contents = [req.system, *(message.content for message in req.messages)]
    nested = (block.get("content") for content in contents if isinstance(content, list) for block in content)
    if has_too_many_parts(contents) or has_too_many_parts(nested):
        raise bad_request(f"messages hold more than {MAX_MESSAGES} blocks", "messages")
    messages: list[dict[str, Any]] = []
    if req.system:
        messages.append({"role": "system", "content": _plain_text(req.system, "system")})
    for number, message in enumerate(req.messages):
        messages += _messages(message, f"messages[{number}]")
    # The last turn is the assistant's: the answer goes on from it.
    goes_on = messages[-1]["role"] == "assistant" and not messages[-1].get("tool_calls")
    tools, choice = [_tool(tool, number) for number, tool in enumerate(req.tools or ())], req.tool_choice or {}
    body = {key: value for key, value in req if key not in _OWN and value is not None}
    body |= {
        "messages": messages,
        "tools": tools or None,
        "tool_choice": _choice(choice),
        "parallel_tool_calls": False if choice.get("disable_parallel_tool_use") else None,
        "continue_final_message": goes_on or None,
        "add_generation_prompt": False if goes_on else None,
        **_thinking(req, can_think),
    }
    if isinstance(req, MessagesRequest):
        body |= {"max_tokens": req.max_tokens, "stop": req.stop_sequences}
        user = (req.metadata or {}).get("user_id")
        body |= {"user": user[:1024]} if isinstance(user, str) else {}
    return validated(body, ChatCompletionRequest)


def _thinking(req: CountRequest, can_think: bool) -> dict[str, Any]:
    """What a chat knows of thoughts and of the answer's form."""
    made: dict[str, Any] = {}
    if req.thinking is not None:
        kind = req.thinking.type
        if kind == "enabled" and req.thinking.budget_tokens is None:
            raise bad_request("thinking.budget_tokens is missing", "thinking")
        made["thinking_token_budget"] = req.thinking.budget_tokens if kind == "enabled" else None
        # A thought that is allowed need not come: of other models it asks for nothing.
        made["enable_thinking"] = {"enabled": True if can_think else None, "disabled": False}.get(kind)
        made["include_reasoning"] = False if req.thinking.display == "omitted" else None
    config = req.output_config
    if config is not None:
        made.setdefault("reasoning_effort", config.effort)
        if config.format is not None:
            if config.format.get("type") != "json_schema" or "schema" not in config.format:
                raise bad_request("output_config.format must be of type json_schema, with a schema", "output_config")
            named = {"name": "answer", "schema": config.format["schema"]}
            made["response_format"] = {"type": "json_schema", "json_schema": named}
    return made


def _messages(message: MessageParam, where: str) -> list[dict[str, Any]]:
    """A turn as messages of a chat: results of tools are messages of their own."""
    content = message.content
    if isinstance(content, str):
        return [{"role": message.role, "content": content}]
    if message.role == "assistant":
        return [_assistant(content, where)]
    if message.role == "system":
        return [{"role": "system", "content": _plain_text(content, where)}]
    made: list[dict[str, Any]] = []
    for block in content:
        if block.get("type") == "tool_result":
            made += _result(block, where)
            continue
        if not made or made[-1]["role"] != "user":
            made.append({"role": "user", "content": []})
        made[-1]["content"].append(_part(block, where))
    return made or [{"role": message.role, "content": ""}]


def _assistant(content: list[Block], where: str) -> dict[str, Any]:
    made: dict[str, Any] = {"role": "assistant", "content": ""}
    for block in content:
        kind = block.get("type")
        try:
            if kind == "text":
                made["content"] += str(block["text"])
            elif kind == "thinking":
                made["reasoning"] = made.get("reasoning", "") + str(block["thinking"])
            elif kind == "tool_use":
                arguments = orjson.dumps(block["input"]).decode()
                function = {"name": block["name"], "arguments": arguments}
                made.setdefault("tool_calls", []).append({"id": block["id"], "type": "function", "function": function})
            elif kind != "redacted_thinking":  # what it holds can be read by who wrote it alone
                raise bad_request(
                    f"{where} holds a block of type {str(kind)[:50]!r}, which is not supported", "messages"
                )
        except (KeyError, TypeError) as error:
            raise bad_request(f"{where}: a block of type {kind!r} lacks {error}", "messages") from None
    return made


def _result(block: Block, where: str) -> list[dict[str, Any]]:
    """What a tool gave; images, which a tool's message cannot hold, follow as the user's."""
    call_id, content = block.get("tool_use_id"), block.get("content") or ""
    if not isinstance(call_id, str):
        raise bad_request(f"{where}: a tool_result needs a tool_use_id", "messages")
    if not isinstance(content, (str, list)):
        raise bad_request(f"{where}: the content of a tool_result must be a text or blocks", "messages")
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else [_part(one, where) for one in content]
    text = "\n".join(part["text"] for part in parts if part["type"] == "text")
    text = f"Error: {text}" if block.get("is_error") else text
    images = [part for part in parts if part["type"] != "text"]
    made: list[dict[str, Any]] = [{"role": "tool", "tool_call_id": call_id, "content": text}]
    return [*made, {"role": "user", "content": images}] if images else made


def _part(block: Any, where: str) -> Block:
    """A block of the user's as a part of a chat's message. Raises ApiError."""
    kind = block.get("type") if isinstance(block, dict) else None
    source = block.get("source") if isinstance(block, dict) else None
    if kind == "text" and isinstance(block.get("text"), str):
        return {"type": "text", "text": block["text"]}
    if kind == "image" and isinstance(source, dict):
        if source.get("type") == "base64":
            url = f"data:{source.get('media_type')};base64,{source.get('data')}"
            return {"type": "image_url", "image_url": {"url": url}}
        if source.get("type") == "url":
            return {"type": "image_url", "image_url": {"url": str(source.get("url"))}}
    if kind == "document" and isinstance(source, dict) and source.get("type") == "text":
        return {"type": "text", "text": str(source.get("data"))}
    raise bad_request(f"{where} holds a block of type {str(kind)[:50]!r} that is not supported", "messages")


def _plain_text(content: str | list[Block], where: str) -> str:
    if isinstance(content, str):
        return content
    parts = [_part(block, where) for block in content]
    if any(part["type"] != "text" for part in parts):
        raise bad_request(f"{where} holds a block that is no text", where.split("[", maxsplit=1)[0])
    return "\n".join(part["text"] for part in parts)


def _tool(tool: dict[str, Any], number: int) -> dict[str, Any]:
    if tool.get("type") not in (None, "custom"):
        raise bad_request(f"tools[{number}] is of type {str(tool['type'])[:50]!r}, which this server lacks", "tools")
    if "input_schema" not in tool:
        raise bad_request(f"tools[{number}].input_schema is missing", "tools")
    known = {"name": tool.get("name"), "description": tool.get("description"), "parameters": tool["input_schema"]}
    return {"type": "function", "function": {key: value for key, value in known.items() if value is not None}}


def _choice(choice: dict[str, Any]) -> Any:
    kind = choice.get("type")
    if kind == "tool":
        return {"type": "function", "function": {"name": choice.get("name", "")}}
    if kind is not None and kind not in tuple(_CHOICES):  # it may be anything, such as an object
        known = ", ".join((*_CHOICES, "tool"))
        raise bad_request(f"tool_choice is of type {str(kind)[:50]!r}; known: {known}", "tool_choice")
    return None if kind is None else _CHOICES[kind]


def at_this_edge(error: ApiError) -> ApiError:
    """An error of a chat with the names that its parameters have here."""
    names = {"stop": "stop_sequences", "reasoning_effort": "output_config", "response_format": "output_config"}
    return ApiError(error.status, error.message, names.get(error.param or "", error.param), error.code, error.headers)
