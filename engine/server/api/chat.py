"""`/v1/chat/completions`: how answers look."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import orjson
from typing_extensions import override

from kvarena.engine.server.api.answers import Renderer, event
from kvarena.engine.server.api.choice_text import ChoiceText, Delta
from kvarena.engine.server.api.completions import ChoicePrompt, finite, prompt_logprobs_body
from kvarena.engine.server.text.tokenization import TokenizerService
from kvarena.engine.server.text.tool_calls import Parsed, ToolCall, ToolParser


class ChatRenderer(Renderer):
    """Bytes of chat completions.

    Args:
        head: the constant fields: id, created, model.
        tokenizer: for log-probabilities.
        prompts: by choice index.
        make_parser: gives a tool parser per choice, or None when the answer is text only.
        forced_call: a named function was forced: its finish reason stays `stop`.
        logprobs, prompt_logprobs, return_token_ids: what to show beside the text.
        streams: events are shown as they come; False: only the whole answer is.
    """

    def __init__(
        self,
        head: dict[str, Any],
        tokenizer: TokenizerService,
        prompts: list[ChoicePrompt],
        *,
        make_parser: Callable[[], ToolParser | None],
        forced_call: bool,
        logprobs: bool,
        prompt_logprobs: bool,
        return_token_ids: bool,
        streams: bool,
    ) -> None:
        self._fields = head
        self._head = {"object": "chat.completion.chunk", **head}
        self._tokenizer, self._prompts = tokenizer, prompts
        self._logprobs, self._prompt_logprobs, self._return_token_ids = logprobs, prompt_logprobs, return_token_ids
        self._forced_call, self._streams = forced_call, streams
        self._parsers = [make_parser() for _ in prompts]
        self._is_plain = not (logprobs or return_token_ids) and not any(self._parsers)
        prefix = b"data: " + orjson.dumps(self._head)[:-1] + b',"choices":[{"index":'
        self._prefixes = [prefix + str(i).encode() + b',"delta":{"content":' for i in range(len(prompts))]
        self._suffix = b'},"logprobs":null,"finish_reason":null,"token_ids":null}]}\n\n'
        self._contents: list[list[str]] = [[] for _ in prompts]
        self._calls: list[list[ToolCall]] = [[] for _ in prompts]
        self._ids: list[list[int]] = [[] for _ in prompts]
        self._entries: list[list[dict[str, Any]]] = [[] for _ in prompts]
        self._texts: dict[int, ChoiceText] = {}

    @override
    def begin(self) -> bytes:
        events = []
        for index, prompt in enumerate(self._prompts):
            choice: dict[str, Any] = {
                "index": index,
                "delta": {"role": "assistant", "content": ""},
                "logprobs": None,
                "finish_reason": None,
                "token_ids": None,
            }
            ids = prompt.token_ids if self._return_token_ids else None
            events.append(event(self._head | {"choices": [choice], "prompt_token_ids": ids}))
        return b"".join(events)

    @override
    def delta(self, text: ChoiceText, delta: Delta) -> bytes:
        index = text.choice.index
        self._texts[index] = text
        if self._is_plain:
            if not self._streams:
                self._contents[index].append(delta.text)
                return b""
            if text.finish_reason is not None:
                return self._text_event(index, delta.text, [], [], text)
            return self._prefixes[index] + orjson.dumps(delta.text) + self._suffix if delta.text else b""
        return self._rich_delta(index, text, delta)

    def _rich_delta(self, index: int, text: ChoiceText, delta: Delta) -> bytes:
        parser = self._parsers[index]
        parsed = Parsed(delta.text, [])
        if parser is not None:
            parsed = parser.add(delta.text)
            if text.finish_reason is not None:
                rest = parser.end()
                parsed = Parsed(parsed.text + rest.text, parsed.calls + rest.calls, parsed.arguments + rest.arguments)
        entries = []
        if self._logprobs:
            entries = [self._logprob_entry(entry) for entry in delta.logprobs]
        first_call = len(self._calls[index])
        self._calls[index] += parsed.calls
        if parsed.arguments:
            last = self._calls[index].pop()
            self._calls[index].append(last._replace(arguments=last.arguments + parsed.arguments))
        self._contents[index].append(parsed.text)
        self._ids[index] += delta.token_ids
        if not self._streams:
            self._entries[index] += entries
            return b""
        events = b""
        ended = text if text.finish_reason is not None else None
        shows_text = parsed.text or entries or (self._return_token_ids and delta.token_ids)
        has_calls = bool(parsed.calls or parsed.arguments)
        if shows_text or (ended and not has_calls):
            events += self._text_event(index, parsed.text, entries, delta.token_ids, None if has_calls else ended)
        for number, call in enumerate(parsed.calls, start=first_call):
            events += self._call_events(index, number, call)
        if parsed.arguments:
            events += self._arguments_event(index, len(self._calls[index]) - 1, parsed.arguments)
        if ended and has_calls:
            events += self._text_event(index, "", [], [], ended)
        return events

    def _text_event(
        self, index: int, text: str, entries: list[Any], token_ids: list[int], ended: ChoiceText | None
    ) -> bytes:
        """New text; the last one of a choice carries its finish reason."""
        choice: dict[str, Any] = {
            "index": index,
            "delta": {"content": text} if text or ended is None else {},
            "logprobs": {"content": entries} if entries else None,
            "finish_reason": None,
            "token_ids": token_ids if self._return_token_ids else None,
        }
        if ended is not None:
            choice |= {"finish_reason": self._finish_reason(ended), "stop_reason": ended.stop_reason}
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

    def _logprob_entry(self, entry: Any) -> dict[str, Any]:
        token, logprob, _, top = entry
        detokenizer = self._tokenizer.detokenizer
        names = detokenizer.names_of([token, *(other for other, _ in top)])

        def named(token: int, logprob: float) -> dict[str, Any]:
            data = detokenizer.token_bytes(token)
            return {"token": names[token], "logprob": finite(logprob), "bytes": list(data)}

        return named(token, logprob) | {"top_logprobs": [named(other, value) for other, value in top]}

    def _finish_reason(self, text: ChoiceText) -> str | None:
        called = bool(self._calls[text.choice.index])
        return "tool_calls" if called and text.finish_reason == "stop" and not self._forced_call else text.finish_reason

    @override
    def usage(self, usage: dict[str, Any]) -> bytes:
        return event(self._head | {"choices": [], "usage": usage})

    @override
    def whole(self, usage: dict[str, Any]) -> bytes:
        choices = [self._whole_choice(index, self._texts[index]) for index in range(len(self._prompts))]
        ids = self._prompts[0].token_ids
        scores = prompt_logprobs_body(self._tokenizer, self._texts[0], ids) if self._prompt_logprobs else None
        body = {"object": "chat.completion", **self._fields, "choices": choices, "usage": usage}
        body |= {"prompt_logprobs": scores, "prompt_token_ids": ids if self._return_token_ids else None}
        return orjson.dumps(body)

    def _whole_choice(self, index: int, text: ChoiceText) -> dict[str, Any]:
        content = "".join(self._contents[index])
        calls = self._calls[index]
        if self._forced_call and calls and not _is_json(calls[-1].arguments):
            # Cut by max_tokens or a stop string: what was written is text, and no call that a client could make.
            content, calls = content + calls[-1].arguments, calls[:-1]
        message: dict[str, Any] = {"role": "assistant", "content": content}
        if calls:
            message["content"] = content or None
            message["tool_calls"] = [
                {"id": call.call_id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                for call in calls
            ]
        return {
            "index": index,
            "message": message,
            "logprobs": {"content": self._entries[index]} if self._logprobs else None,
            "finish_reason": self._finish_reason(text),
            "stop_reason": text.stop_reason,
            "token_ids": self._ids[index] if self._return_token_ids else None,
        }


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True
