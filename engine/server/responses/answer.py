"""A response as it is answered: items that open, grow and end, each step an event with its number."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from typing import Any

import orjson
from typing_extensions import override

from kvarena.engine.request import SamplingParams
from kvarena.engine.server.api.protocol import ChatCompletionRequest
from kvarena.engine.server.api.turn import Reading, Sequence, Turn
from kvarena.engine.server.forms.calls import Arguments, Parsed, Thought, ToolCall
from kvarena.engine.server.front.engines import Engines
from kvarena.engine.server.front.groups import Choice
from kvarena.engine.server.responses.protocol import ResponsesRequest
from kvarena.engine.server.shared.errors import ApiError, ended_by_operator
from kvarena.engine.server.text.streams import TextStream

REASONING, MESSAGE, CALL = "reasoning", "message", "function_call"
_PARTS = {MESSAGE: "output_text", REASONING: "reasoning_text"}


def new_id(prefix: str) -> str:
    """An id of a response or of an item."""
    return f"{prefix}_{uuid.uuid4().hex}"


class ResponseAnswer(Turn):
    """A response.

    Args:
        client, req, model, arrival, reading: as of `Turn`.
        asked: the request as it came.
        response_id: of the answer.
        stores: it can be asked for again.
        on_state: called with the body whenever its status changes.
    """

    prefix, event_kind = "resp", "response"
    before_text = after_text = b""

    def __init__(
        self,
        client: Engines,
        req: ChatCompletionRequest,
        model: str,
        arrival: float,
        *,
        reading: Reading,
        asked: ResponsesRequest,
        response_id: str,
        stores: bool,
        on_state: Callable[[dict[str, Any]], None],
    ) -> None:
        super().__init__(client, req, model, arrival, reading=reading)
        self._is_plain = False
        self._fields["id"] = response_id
        self._on_state = on_state
        self._shows_raw = bool(asked.enable_response_messages)
        self._output_ids: list[int] = []  # where they are shown
        self.response = empty_response(asked, response_id, model, stores)
        self._sequence = Sequence()
        self._num_events = 0
        self._item: dict[str, Any] | None = None  # the open one
        self._pieces: list[str] = []  # of its text
        self._entries: list[Any] = []  # log-probabilities of its text
        self._delta_head = b""
        self._only_grows = False  # whatever comes before the end is more text of the open item

    @override
    def add_prompt(self, prompt: list[int], sampling: SamplingParams, stream: TextStream) -> list[Choice]:
        self.response |= {"temperature": sampling.temperature, "top_p": sampling.top_p}
        return super().add_prompt(prompt, sampling, stream)

    @override
    def begin(self) -> bytes:
        return self._state("created") + self._state("in_progress")

    def _event(self, kind: str, **fields: Any) -> bytes:
        if not self._streams:
            return b""
        self._num_events += 1
        body = {"type": kind, "sequence_number": self._num_events - 1, **fields}
        return b"event: " + kind.encode() + b"\ndata: " + orjson.dumps(body) + b"\n\n"

    def _state(self, state: str) -> bytes:
        return self._event(f"response.{state}", response=self.response)

    # Items

    @override
    def delta(self, choice: Choice, text: str, token_ids: list[int], logprobs: list[Any]) -> bytes:
        if self._shows_raw:
            self._output_ids += token_ids
        if self._only_grows and choice.finish_reason is None:
            return self._grow(text) if text else b""
        return super().delta(choice, text, token_ids, logprobs)

    @override
    def _quick(self, choice: Choice, kind: type[str], text: str) -> bytes:
        item = self._item
        goes_on = item is not None and item["type"] == (REASONING if kind is Thought else MESSAGE)
        return self._grow(text) if goes_on and not self._sequence.is_waiting else b""

    @override
    def _show(self, choice: Choice, parsed: Parsed, entries: list[Any], token_ids: list[int]) -> bytes:
        if self.response["status"] == "queued":
            self.response["status"] = "in_progress"
            self._on_state(self.response)
        self._entries += entries
        parts = self._sequence.of(parsed)
        events = b""
        for part in parts:
            if isinstance(part, ToolCall):
                events += self._end_item() + self._begin_call(part)
            elif type(part) is Arguments:
                events += self._grow(part)
            else:
                events += self._text(REASONING if type(part) is Thought else MESSAGE, part)
        if choice.finish_reason is not None:
            if not self.response["output"]:
                events += self._begin_item(MESSAGE)
            events += self._end_item(choice.finish_reason == "length")
        return events

    def _text(self, kind: str, text: str) -> bytes:
        events = b""
        if self._item is None or self._item["type"] != kind:
            events = self._end_item() + self._begin_item(kind)
        return events + self._grow(text)

    @property
    def _place(self) -> dict[str, Any]:
        assert self._item is not None
        return {"item_id": self._item["id"], "output_index": len(self.response["output"]) - 1}

    def _begin_item(self, kind: str) -> bytes:
        item: dict[str, Any] = {"type": kind, "id": new_id("msg" if kind == MESSAGE else "rs")}
        if kind == MESSAGE:
            item |= {"role": "assistant", "status": "in_progress", "content": []}
        else:
            item |= {"summary": [], "encrypted_content": None, "status": "in_progress", "content": []}
        events = self._open(item)
        events += self._event("response.content_part.added", **self._place, content_index=0, part=_part(kind, "", []))
        # Text alone has log-probabilities, and always names them.
        beside: dict[str, Any] = {} if kind == REASONING or self._logprobs else {"logprobs": []}
        self._head_of(f"response.{_PARTS[kind]}.delta", {"content_index": 0} | beside)
        self._only_grows = self._streams and not self._shows_more and self._parsers[0] is None
        return events

    def _begin_call(self, call: ToolCall) -> bytes:
        item = {"type": CALL, "id": new_id("fc"), "call_id": call.call_id, "name": call.name, "arguments": ""}
        events = self._open(item | {"status": "in_progress"})
        self._head_of("response.function_call_arguments.delta", {})
        return events + (self._grow(call.arguments) if call.arguments else b"")

    def _open(self, item: dict[str, Any]) -> bytes:
        self._item, self._pieces = item, []
        self.response["output"].append(item)
        return self._event("response.output_item.added", item=item, output_index=len(self.response["output"]) - 1)

    def _head_of(self, kind: str, fields: dict[str, Any]) -> None:
        """What an event of new text begins with: most events of a stream are such."""
        body = orjson.dumps({"type": kind, **self._place, **fields})
        self._delta_head = b"event: " + kind.encode() + b"\ndata: " + body[:-1]

    def _grow(self, text: str) -> bytes:
        """More text of the open item."""
        self._pieces.append(text)
        if not self._streams:
            return b""
        assert self._item is not None
        number, self._num_events = self._num_events, self._num_events + 1
        head = self._delta_head
        if self._logprobs and self._item["type"] == MESSAGE:
            head += b',"logprobs":' + orjson.dumps(self._take_entries())
        return b'%b,"sequence_number":%d,"delta":%b}\n\n' % (head, number, orjson.dumps(text))

    def _take_entries(self) -> list[Any]:
        assert self._item is not None
        new, self._entries = self._entries, []
        self._item.setdefault("_logprobs", []).extend(new)
        return new

    def _end_item(self, is_cut: bool = False) -> bytes:
        """The open item is complete, or cut off."""
        item, text = self._item, "".join(self._pieces)
        if item is None:
            return b""
        self._only_grows = False
        kind = item["type"]
        self._take_entries()
        logprobs = item.pop("_logprobs", [])
        place = self._place
        if kind == CALL:
            item["arguments"] = text
            events = self._event("response.function_call_arguments.done", **place, name=item["name"], arguments=text)
        else:
            part = _part(kind, text, logprobs)
            item["content"] = [part]
            place |= {"content_index": 0}
            notes = {"logprobs": logprobs} if kind == MESSAGE else {}
            events = self._event(f"response.{_PARTS[kind]}.done", **place, text=text, **notes)
            events += self._event("response.content_part.done", **place, part=part)
        item["status"] = "incomplete" if is_cut else "completed"
        events += self._event("response.output_item.done", item=item, output_index=place["output_index"])
        self._item = None
        return events

    # Ends

    def _finish(self) -> str:
        """Set what is known at the end; the name of the event that says so."""
        response, choice = self.response, self.choices[0]
        if choice.finish_reason == "abort":
            raise ended_by_operator()
        is_cut = choice.finish_reason == "length"
        response["usage"] = self.response_usage()
        if self._shows_raw:
            response["input_messages"] = [self._raw(choice.prompt, [])]
            response["output_messages"] = [self._raw(self._output_ids, choice.prompt)]
        response["status"] = "incomplete" if is_cut else "completed"
        response["incomplete_details"] = {"reason": "max_output_tokens"} if is_cut else None
        response["completed_at"] = None if is_cut else int(time.time())
        self._on_state(response)
        return str(response["status"])

    def _raw(self, token_ids: list[int], context: list[int]) -> dict[str, Any]:
        """Tokens as the model has them, and their text behind `context`, special tokens and all."""
        text = self._detokenizer.text(token_ids, skip_special_tokens=False, context=context)
        return {"type": "raw_message_tokens", "message": text, "tokens": token_ids}

    def response_usage(self) -> dict[str, Any]:
        """Token counts in this API's form: `cached_tokens` are a part of `input_tokens`."""
        usage = self.usage()
        return {
            "input_tokens": usage["prompt_tokens"],
            "input_tokens_details": usage["prompt_tokens_details"] | {"cache_write_tokens": 0},
            "output_tokens": usage["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": self.num_thought_tokens()},
            "total_tokens": usage["total_tokens"],
        }

    @override
    def _last_event(self, choice: Choice, text: str) -> bytes:
        raise AssertionError("its events are never plain")

    @override
    def whole(self) -> bytes:
        self._finish()
        return orjson.dumps(self.response)

    @override
    def ending(self) -> bytes:
        return self._state(self._finish())

    @override
    def broken(self, error: ApiError) -> bytes:
        self._give_up(error)
        events = self._event("error", code=error.code, message=error.message, param=error.param)
        return events + self._state("failed")

    def _give_up(self, error: ApiError) -> None:
        """It cannot be finished."""
        self._item = None
        for item in self.response["output"]:
            item.pop("_logprobs", None)
        code = "invalid_prompt" if error.status < 500 else "server_error"
        self.response |= {"status": "failed", "error": {"code": code, "message": error.message}}
        self._on_state(self.response)


def _part(kind: str, text: str, logprobs: list[Any]) -> dict[str, Any]:
    part: dict[str, Any] = {"type": _PARTS[kind], "text": text}
    return part | {"annotations": [], "logprobs": logprobs} if kind == MESSAGE else part


def empty_response(asked: ResponsesRequest, response_id: str, model: str, stores: bool) -> dict[str, Any]:
    """A response to which nothing has been answered yet."""
    effort = None if asked.reasoning is None else asked.reasoning.effort
    text = {"format": {"type": "text"}} if asked.text is None or asked.text.format is None else {}
    if asked.text is not None and asked.text.format is not None:
        text = {"format": asked.text.format}
    return {
        "id": response_id,
        "object": "response",
        "created_at": int(time.time()),
        "status": "queued" if asked.background else "in_progress",
        "background": bool(asked.background),
        "completed_at": None,
        "error": None,
        "incomplete_details": None,
        "instructions": asked.instructions,
        "max_output_tokens": asked.max_output_tokens,
        "max_tool_calls": asked.max_tool_calls,
        "metadata": asked.metadata or {},
        "model": model,
        "output": [],
        "parallel_tool_calls": asked.parallel_tool_calls is not False,
        "previous_response_id": asked.previous_response_id,
        "prompt_cache_key": asked.prompt_cache_key,
        "reasoning": {"effort": effort, "summary": None},
        "safety_identifier": asked.safety_identifier,
        "service_tier": "default",
        "store": stores,
        "temperature": None,
        "text": text,
        "tool_choice": asked.tool_choice or "auto",
        "tools": asked.tools or [],
        "top_logprobs": asked.top_logprobs or 0,
        "top_p": None,
        "truncation": "disabled",
        "usage": None,
        "user": asked.user,
    }
