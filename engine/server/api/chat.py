"""`/v1/chat/completions`: how answers look."""

from __future__ import annotations

import functools
from typing import Any

import orjson
from typing_extensions import override

from kvarena.engine.server.api.answers import event
from kvarena.engine.server.api.completions import prompt_logprobs_body
from kvarena.engine.server.api.turn import Turn, is_json
from kvarena.engine.server.forms.calls import Parsed, Thought, ToolCall
from kvarena.engine.server.front.groups import Choice


class ChatAnswer(Turn):
    """A chat completion."""

    prefix, event_kind = "chatcmpl", "chat.completion.chunk"
    before_text = b'"delta":{"content":'
    after_text = b'},"logprobs":null,"finish_reason":null,"token_ids":null}]}\n\n'

    @override
    def begin(self) -> bytes:
        events = []
        for one in self.choices:
            choice: dict[str, Any] = {
                "index": one.index,
                "delta": {"role": "assistant", "content": ""},
                "logprobs": None,
                "finish_reason": None,
                "token_ids": [] if self._return_token_ids else None,
            }
            ids = one.prompt if self._return_token_ids else None
            events.append(event(self._head | {"choices": [choice], "prompt_token_ids": ids}))
            if self._echoed:
                events.append(self._text_event(one, {"content": self._echoed}, [], [], False))
        return b"".join(events)

    @functools.cached_property
    def _echoed(self) -> str:
        """What `echo` puts before the answer: the text of the last message, where it is the assistant's own."""
        last = self.req.messages[-1]
        if not self.req.echo or last.role != "assistant" or last.content is None:
            return ""
        if isinstance(last.content, str):
            return last.content
        return "".join(part if isinstance(part, str) else str(part.get("text", "")) for part in last.content)

    @override
    def _last_event(self, choice: Choice, text: str) -> bytes:
        return self._text_event(choice, {"content": text} if text else {}, [], [], True)

    @override
    def _quick(self, choice: Choice, kind: type[str], text: str) -> bytes:
        prefix = (self._thought_prefixes if kind is Thought else self._prefixes)[choice.index]
        return prefix + orjson.dumps(text) + self.after_text

    @functools.cached_property
    def _thought_prefixes(self) -> list[bytes]:
        return [prefix[: -len(self.before_text)] + b'"delta":{"reasoning":' for prefix in self._prefixes]

    @override
    def _show(self, choice: Choice, parsed: Parsed, entries: list[Any], token_ids: list[int]) -> bytes:
        is_end = choice.finish_reason is not None
        if not self._streams:
            choice.pieces.append(parsed.text)
            choice.token_ids += token_ids
            choice.entries += entries
            return b""
        return self._rich_events(choice, parsed, entries, token_ids, is_end)

    def _rich_events(
        self, choice: Choice, parsed: Parsed, entries: list[Any], token_ids: list[int], is_end: bool
    ) -> bytes:
        events, number = b"", len(self._calls[choice.index]) - len(parsed.calls)
        text, thought, arguments = parsed.text, parsed.thought, parsed.arguments
        has_calls = bool(parsed.calls or arguments)
        delta = ({"reasoning": thought} if thought else {}) | ({"content": text} if text else {})
        shows = delta or entries or (self._return_token_ids and token_ids)
        if shows or (is_end and not has_calls):
            delta = delta if delta or is_end else {"content": ""}
            events += self._text_event(choice, delta, entries, token_ids, is_end and not has_calls)
        for call in parsed.calls:
            events += self._call_events(choice.index, number, call)
            number += 1
        if arguments:
            events += self._arguments_event(choice.index, number - 1, arguments)
        if is_end and has_calls:
            events += self._text_event(choice, {}, [], [], True)
        return events

    def _text_event(
        self, of: Choice, delta: dict[str, str], entries: list[Any], token_ids: list[int], is_end: bool
    ) -> bytes:
        """New text; the last one of a choice carries its finish reason."""
        choice: dict[str, Any] = {
            "index": of.index,
            "delta": delta,
            "logprobs": {"content": entries} if entries else None,
            "finish_reason": None,
            "token_ids": token_ids if self._return_token_ids else None,
        }
        if is_end:
            choice |= {"finish_reason": self._finish_reason(of), "stop_reason": of.stop_reason}
        return event(self._head | {"choices": [choice]})

    def _call_events(self, index: int, number: int, call: ToolCall) -> bytes:
        """A call's name, then its arguments as far as they are known."""
        head = {
            "index": number,
            "id": call.call_id,
            "type": "function",
            "function": {"name": call.name, "arguments": ""},
        }
        events = self._tool_event(index, head)
        return events + self._arguments_event(index, number, call.arguments) if call.arguments else events

    def _arguments_event(self, index: int, number: int, arguments: str) -> bytes:
        return self._tool_event(index, {"index": number, "function": {"arguments": arguments}})

    def _tool_event(self, index: int, part: dict[str, Any]) -> bytes:
        choice = {"index": index, "delta": {"tool_calls": [part]}, "logprobs": None, "finish_reason": None}
        return event(self._head | {"choices": [choice]})

    def _finish_reason(self, choice: Choice) -> str | None:
        called = bool(self._calls[choice.index]) and not self._forced_call
        return "tool_calls" if called and choice.finish_reason == "stop" else choice.finish_reason

    @override
    def whole(self) -> bytes:
        first = self.choices[0]
        scores = prompt_logprobs_body(self._detokenizer, first, self.req.prompt_logprobs)
        choices = [self._whole_choice(choice) for choice in self.choices]
        body = {"object": "chat.completion", **self._fields, "choices": choices, "usage": self.usage()}
        body |= {"prompt_logprobs": scores, "prompt_token_ids": first.prompt if self._return_token_ids else None}
        return orjson.dumps(body | self.metrics())

    def _whole_choice(self, choice: Choice) -> dict[str, Any]:
        content = self._echoed + "".join(choice.pieces)
        calls = self._calls[choice.index]
        if self._forced_call and calls and not is_json(calls[-1].arguments):
            # Cut by max_tokens or a stop string: what was written is text, and no call that a client could make.
            content, calls = content + calls[-1].arguments, calls[:-1]
        message: dict[str, Any] = {"role": "assistant", "content": content}
        if self._thoughts[choice.index] and self.req.include_reasoning is not False:
            message["reasoning"] = "".join(self._thoughts[choice.index])
        if calls:
            message["content"] = content or None
            message["tool_calls"] = [
                {"id": call.call_id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                for call in calls
            ]
        return {
            "index": choice.index,
            "message": message,
            "logprobs": {"content": choice.entries} if self._logprobs else None,
            "finish_reason": self._finish_reason(choice),
            "stop_reason": choice.stop_reason,
            "token_ids": choice.token_ids if self._return_token_ids else None,
        }
