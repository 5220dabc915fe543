"""The items of a conversation as a chat: input items become messages, tools become a chat's tools."""

from __future__ import annotations

import uuid
from typing import Any

from kvarena.engine.server.api.protocol import MAX_MESSAGES, ChatCompletionRequest, has_too_many_parts
from kvarena.engine.server.front.http import validated
from kvarena.engine.server.responses.protocol import ResponsesRequest
from kvarena.engine.server.shared.errors import ApiError, bad_request

Item = dict[str, Any]
_PREFIXES = {"message": "msg", "function_call": "fc", "function_call_output": "fco", "reasoning": "rs"}
_TEXTS = ("input_text", "output_text", "text", "summary_text", "reasoning_text")
# What has no like among a chat's keys, or another form there.
_OWN = frozenset(ResponsesRequest.model_fields) - {"model", "stream", "parallel_tool_calls", "user"}


def input_items(given: Any) -> list[Item]:
    """A request's `input` as items that have a type and an id. Raises ApiError."""
    if isinstance(given, str):
        given = [{"role": "user", "content": given}]
    if not isinstance(given, list) or not given or not all(isinstance(one, dict) for one in given):
        raise bad_request("input must be a text, or a list of items with at least one", "input")
    if has_too_many_parts(one.get(key) for one in given for key in ("content", "summary", "output")):
        raise bad_request(f"input holds more than {MAX_MESSAGES} parts", "input")
    made = []
    for number, one in enumerate(given):
        kind = one.get("type") or ("message" if "role" in one else None)
        if kind not in tuple(_PREFIXES):  # it may be anything, such as an object
            raise bad_request(f"input[{number}] is of type {str(kind)[:50]!r}; known: {', '.join(_PREFIXES)}", "input")
        item = {**one, "type": kind, "id": one.get("id") or f"{_PREFIXES[kind]}_{uuid.uuid4().hex}"}
        if kind == "message" and isinstance(item.get("content"), str):
            shown = "output_text" if item.get("role") == "assistant" else "input_text"
            item["content"] = [{"type": shown, "text": item["content"]}]
            if shown == "output_text":
                item["content"][0]["annotations"] = []
        if kind in ("message", "function_call", "function_call_output"):
            item.setdefault("status", "completed")
        made.append(item)
    return made


class _Chat:
    """Messages of a chat, joined as chat templates expect them: one turn of the assistant is one message."""

    def __init__(self) -> None:
        self.messages: list[dict[str, Any]] = []
        self._names: dict[str, str] = {}  # of calls, by their id

    def add(self, item: Item, where: str) -> None:
        kind = item["type"]
        try:
            if kind == "message":
                self._add_message(item, where)
            elif kind == "reasoning":
                parts = item.get("content") or item.get("summary") or []
                if parts:
                    turn = self._turn(after=("reasoning",))
                    turn["reasoning"] = turn.get("reasoning", "") + "".join(_text(part, where) for part in parts)
            elif kind == "function_call":
                call_id, name = str(item["call_id"]), str(item["name"])
                self._names[call_id] = name
                function = {"name": name, "arguments": item["arguments"]}
                call = {"id": call_id, "type": "function", "function": function}
                self._turn(after=("reasoning", "content", "tool_calls")).setdefault("tool_calls", []).append(call)
            else:
                self._add_output(item, where)
        except (KeyError, TypeError) as error:
            raise bad_request(f"{where} of type {kind!r} lacks, or has in another form, {error}", "input") from None

    def join_instructions(self) -> None:
        """Make one message of what comes before the first turn: many templates know one system message alone."""
        texts = []
        for message in self.messages:
            content = message["content"]
            parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
            if message["role"] not in ("system", "developer") or any(part["type"] != "text" for part in parts):
                break
            texts.append("".join(part["text"] for part in parts))
        if len(texts) > 1:
            joined = {"role": self.messages[0]["role"], "content": "\n\n".join(texts)}
            self.messages[: len(texts)] = [joined]

    def _turn(self, after: tuple[str, ...]) -> dict[str, Any]:
        """The assistant's message that goes on, if it ends in one of the parts that `after` names, or a new one."""
        last = self.messages[-1] if self.messages else {}
        parts = [key for key in ("tool_calls", "content", "reasoning") if last.get(key)]
        if last.get("role") != "assistant" or (parts and parts[0] not in after):
            last = {"role": "assistant", "content": ""}
            self.messages.append(last)
        return last

    def _add_message(self, item: Item, where: str) -> None:
        role, content = item["role"], item["content"]
        parts = [_part(part, where) for part in content]
        if role == "assistant":
            turn = self._turn(after=("reasoning",))
            turn["content"] = "".join(part["text"] for part in parts)
        elif role in ("user", "system", "developer"):
            self.messages.append({"role": role, "content": parts})
        else:
            raise bad_request(f"{where} has the role {str(role)[:50]!r}; known: user, assistant, system", "input")

    def _add_output(self, item: Item, where: str) -> None:
        call_id, output = str(item["call_id"]), item["output"]
        parts = [{"type": "text", "text": output}] if isinstance(output, str) else [_part(one, where) for one in output]
        texts = [part for part in parts if part["type"] == "text"]
        message = {"role": "tool", "tool_call_id": call_id, "content": "\n".join(part["text"] for part in texts)}
        if call_id in self._names:
            message["name"] = self._names[call_id]
        self.messages.append(message)
        images = [part for part in parts if part["type"] != "text"]
        if images:
            self.messages.append({"role": "user", "content": images})


def _text(part: Any, where: str) -> str:
    """The text of a part. Raises ApiError."""
    if isinstance(part, str):
        return part
    if isinstance(part, dict) and part.get("type") in _TEXTS and isinstance(part.get("text"), str):
        return part["text"]
    raise bad_request(f"{where} holds a part without text", "input")


def _part(part: Any, where: str) -> dict[str, Any]:
    """A part of a message as a chat has it. Raises ApiError."""
    kind = part.get("type") if isinstance(part, dict) else "text"
    if kind == "refusal" and isinstance(part.get("refusal"), str):
        return {"type": "text", "text": part["refusal"]}
    if kind == "input_image":
        url = part.get("image_url")
        if not isinstance(url, str):
            raise bad_request(f"{where}: an input_image needs an image_url; files are not kept here", "input")
        return {"type": "image_url", "image_url": {"url": url}}
    if kind not in _TEXTS:
        raise bad_request(f"{where} holds a part of type {str(kind)[:50]!r}, which is not supported", "input")
    return {"type": "text", "text": _text(part, where)}


def to_chat(req: ResponsesRequest, items: list[Item]) -> ChatCompletionRequest:
    """The chat that a request asks for.

    Args:
        req: the request, which `check_request` has seen.
        items: the whole conversation, from `input_items`.

    Raises:
        ApiError: an item, a tool or a format that cannot be one of a chat's.
    """
    chat = _Chat()
    if req.instructions:
        chat.messages.append({"role": "system", "content": req.instructions})
    for number, item in enumerate(items):
        chat.add(item, f"input[{number}]")
    chat.join_instructions()
    tools, choice = _tools(req)
    with_logprobs = "message.output_text.logprobs" in (req.include or ())
    body = {key: value for key, value in req if key not in _OWN and value is not None}
    body |= {
        "messages": chat.messages,
        "max_completion_tokens": req.max_output_tokens,
        "tools": tools,
        "tool_choice": choice,
        "response_format": _format(req),
        "reasoning_effort": None if req.reasoning is None else req.reasoning.effort,
        "logprobs": with_logprobs or None,
        "top_logprobs": req.top_logprobs if with_logprobs else None,
    }
    return validated(body, ChatCompletionRequest)


def _tools(req: ResponsesRequest) -> tuple[list[dict[str, Any]] | None, Any]:
    """A chat's `tools` and `tool_choice`."""
    made: list[dict[str, Any]] = []
    for number, tool in enumerate(req.tools or ()):
        if tool.get("type") != "function":
            other = str(tool.get("type"))[:50]
            raise bad_request(f"tools[{number}] is of type {other!r}; this server knows functions only", "tools")
        function = tool.get("function") or {key: value for key, value in tool.items() if key != "type"}
        if not isinstance(function, dict):
            raise bad_request(f"tools[{number}].function must be an object", "tools")
        made.append({"type": "function", "function": function})
    given = req.tool_choice
    if not isinstance(given, dict):
        return made or None, given
    kind, allowed = given.get("type"), given.get("tools")
    if kind == "function":
        return made or None, {"type": "function", "function": {"name": given.get("name", "")}}
    if kind == "allowed_tools" and isinstance(allowed, list):
        names = [one.get("name") for one in allowed if isinstance(one, dict)]
        made = [tool for tool in made if tool["function"].get("name") in names]
        return made or None, given.get("mode", "auto")
    raise bad_request(f"tool_choice of type {str(kind)[:50]!r} is not supported", "tool_choice")


def _format(req: ResponsesRequest) -> dict[str, Any] | None:
    """A chat's `response_format`."""
    given = None if req.text is None else req.text.format
    if given is None or given.get("type") == "text":
        return None
    if given.get("type") != "json_schema":
        return given
    named = {key: value for key, value in given.items() if key != "type"}
    if "schema" not in named:
        raise bad_request("text.format.schema is missing", "text")
    return {"type": "json_schema", "json_schema": named}


def at_this_edge(error: ApiError) -> ApiError:
    """An error of a chat, which names the chat's parameters, with the names that they have here."""
    names = {
        "messages": "input", "max_completion_tokens": "max_output_tokens", "response_format": "text",
        "reasoning_effort": "reasoning", "logprobs": "include",
    }  # fmt: skip
    return ApiError(error.status, error.message, names.get(error.param or "", error.param), error.code, error.headers)
