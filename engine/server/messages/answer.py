"""A message as it is answered: blocks that open, grow and end, one after the other."""

from __future__ import annotations

import hashlib
import uuid
from typing import Any

import orjson
from typing_extensions import override

from kvarena.engine.server.api.protocol import ChatCompletionRequest
from kvarena.engine.server.api.turn import Reading, Sequence, Turn, is_json
from kvarena.engine.server.forms.calls import Arguments, Parsed, Thought, ToolCall
from kvarena.engine.server.front.engines import Engines
from kvarena.engine.server.front.groups import Choice
from kvarena.engine.server.shared.errors import ApiError, as_messages_error, ended_by_operator

TEXT, THINKING, TOOL_USE = "text", "thinking", "tool_use"
_DELTAS = {TEXT: ("text_delta", "text"), THINKING: ("thinking_delta", "thinking"),
           TOOL_USE: ("input_json_delta", "partial_json")}  # fmt: skip


class MessageAnswer(Turn):
    """A message.

    Args:
        client, req, model, arrival, reading: as of `Turn`.
        max_tokens: as the request has it: the answer may get fewer, where the context ends.
    """

    prefix, event_kind = "msg", "message"
    before_text = after_text = b""

    def __init__(
        self,
        client: Engines,
        req: ChatCompletionRequest,
        model: str,
        arrival: float,
        *,
        reading: Reading,
        max_tokens: int,
    ) -> None:
        super().__init__(client, req, model, arrival, reading=reading)
        self._is_plain = False
        self._max_tokens = max_tokens
        self._fields["id"] = f"msg_{uuid.uuid4().hex}"
        self._sequence = Sequence()
        self._blocks: list[dict[str, Any]] = []
        self._open: str | None = None  # the kind of the last block, while it grows
        self._pieces: list[str] = []
        self._has_begun = False
        self._delta_head = b""
        self._only_grows = False  # whatever comes before the end is more text of the open block

    @override
    def begin(self) -> bytes:
        # The first event counts cached tokens, which are known when the first step has begun.
        return b""

    def _event(self, kind: str, **fields: Any) -> bytes:
        if not self._streams:
            return b""
        return b"event: " + kind.encode() + b"\ndata: " + orjson.dumps({"type": kind, **fields}) + b"\n\n"

    @override
    def delta(self, choice: Choice, text: str, token_ids: list[int], logprobs: list[Any]) -> bytes:
        if self._only_grows and choice.finish_reason is None:
            return self._grow(text) if text else b""
        return super().delta(choice, text, token_ids, logprobs)

    @override
    def _quick(self, choice: Choice, kind: type[str], text: str) -> bytes:
        goes_on = self._open == (THINKING if kind is Thought else TEXT) and not self._sequence.is_waiting
        return self._grow(text) if goes_on else b""

    @override
    def _show(self, choice: Choice, parsed: Parsed, entries: list[Any], token_ids: list[int]) -> bytes:
        events = b""
        if not self._has_begun:
            self._has_begun = True
            usage = self.message_usage() | {"output_tokens": 0}
            events = self._event("message_start", message=self._message([], None, None, usage))
        for part in self._sequence.of(parsed):
            if isinstance(part, ToolCall):
                block = {"type": TOOL_USE, "id": part.call_id, "name": part.name, "input": {}}
                events += self._end_block() + self._begin(TOOL_USE, block)
                events += self._grow(part.arguments) if part.arguments else b""
            elif type(part) is Arguments:
                events += self._grow(part)
            else:
                kind = THINKING if type(part) is Thought else TEXT
                if self._open != kind:
                    empty = {"type": TEXT, "text": ""} if kind == TEXT else {
                        "type": THINKING, "thinking": "", "signature": ""
                    }  # fmt: skip
                    events += self._end_block() + self._begin(kind, empty)
                events += self._grow(part)
        return events + self._end_block() if choice.finish_reason is not None else events

    def _begin(self, kind: str, block: dict[str, Any]) -> bytes:
        self._open, self._pieces = kind, []
        self._blocks.append(block)
        index = len(self._blocks) - 1
        name, key = _DELTAS[kind]
        head = {"type": "content_block_delta", "index": index}
        # Most events of a stream are of new text.
        self._delta_head = b"event: content_block_delta\ndata: %b,\"delta\":{\"type\":\"%b\",\"%b\":" % (
            orjson.dumps(head)[:-1], name.encode(), key.encode(),
        )  # fmt: skip
        self._only_grows = self._streams and not self._shows_more and self._parsers[0] is None
        return self._event("content_block_start", index=index, content_block=block)

    def _grow(self, text: str) -> bytes:
        self._pieces.append(text)
        return self._delta_head + orjson.dumps(text) + b"}}\n\n" if self._streams else b""

    def _end_block(self) -> bytes:
        if self._open is None:
            return b""
        self._only_grows = False
        kind, block, text = self._open, self._blocks[-1], "".join(self._pieces)
        self._open, events, index = None, b"", len(self._blocks) - 1
        if kind == TOOL_USE:
            if is_json(text):
                block["input"] = orjson.Fragment(text)  # as it is: it may hold numbers that Python alone can keep
            elif not self._streams:
                # Cut off: what was written is text, and no call that a client could make.
                self._blocks[-1] = {"type": TEXT, "text": text}
        else:
            block[_DELTAS[kind][1]] = text
        if kind == THINKING:
            # Who sends a thought back is asked for it by other servers; here it says that the text is whole.
            block["signature"] = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
            delta = {"type": "signature_delta", "signature": block["signature"]}
            events = self._event("content_block_delta", index=index, delta=delta)
        return events + self._event("content_block_stop", index=index)

    def _message(
        self, content: list[dict[str, Any]], reason: str | None, stop: str | None, usage: dict[str, Any]
    ) -> dict[str, Any]:
        return {
            "id": self.id,
            "type": "message",
            "role": "assistant",
            "model": self.model,
            "content": content,
            "stop_reason": reason,
            "stop_sequence": stop,
            "usage": usage,
        }

    def message_usage(self) -> dict[str, Any]:
        """Token counts in this API's form: the three of the prompt are apart from each other, and add up to it."""
        usage = self.usage()
        cached = usage["prompt_tokens_details"]["cached_tokens"]
        return {
            "input_tokens": usage["prompt_tokens"] - cached,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": cached,
            "output_tokens": usage["completion_tokens"],
        }

    def _stop(self) -> tuple[str, str | None]:
        """Why it ended, and the stop sequence that ended it."""
        choice = self.choices[0]
        if choice.finish_reason == "abort":
            raise ended_by_operator()
        if choice.finish_reason == "length":
            is_short = choice.sampling.max_tokens < self._max_tokens
            return "model_context_window_exceeded" if is_short else "max_tokens", None
        if isinstance(choice.stop_reason, str):
            return "stop_sequence", choice.stop_reason
        return ("tool_use" if self._calls[0] else "end_turn"), None

    @override
    def _last_event(self, choice: Choice, text: str) -> bytes:
        raise AssertionError("its events are never plain")

    @override
    def whole(self) -> bytes:
        return orjson.dumps(self._message(self._blocks, *self._stop(), self.message_usage()))

    @override
    def ending(self) -> bytes:
        reason, stop = self._stop()
        delta = {"stop_reason": reason, "stop_sequence": stop}
        return self._event("message_delta", delta=delta, usage=self.message_usage()) + self._event("message_stop")

    @override
    def broken(self, error: ApiError) -> bytes:
        return b"event: error\ndata: " + orjson.dumps(as_messages_error(error)) + b"\n\n"
