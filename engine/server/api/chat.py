"""`/v1/chat/completions`: how answers look."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import orjson
from typing_extensions import override

from kvarena.engine.request import SamplingParams
from kvarena.engine.server.api.answers import Answer, event
from kvarena.engine.server.api.completions import finite, prompt_logprobs_body
from kvarena.engine.server.api.protocol import ChatCompletionRequest, NamedToolChoice
from kvarena.engine.server.front.engines import Engines
from kvarena.engine.server.front.groups import Choice
from kvarena.engine.server.text.detokenizer import Detokenizer
from kvarena.engine.server.text.streams import TextStream
from kvarena.engine.server.text.tool_calls import Parsed, ToolCall, ToolParser


class ChatAnswer(Answer):
    """A chat completion.

    Args:
        client, req, model, arrival: as of `Answer`.
        detokenizer: names tokens.
        make_parser: gives a tool parser per choice, or None when the answer is text only.
    """

    prefix, event_kind = "chatcmpl", "chat.completion.chunk"
    before_text = b'"delta":{"content":'
    after_text = b'},"logprobs":null,"finish_reason":null,"token_ids":null}]}\n\n'

    def __init__(
        self,
        client: Engines,
        req: ChatCompletionRequest,
        model: str,
        arrival: float,
        *,
        detokenizer: Detokenizer,
        make_parser: Callable[[], ToolParser | None],
    ) -> None:
        super().__init__(client, req, model, arrival)
        self._detokenizer, self._make_parser = detokenizer, make_parser
        self._logprobs = bool(req.logprobs)
        # A function was named: its finish reason stays `stop`.
        self._forced_call = isinstance(req.tool_choice, NamedToolChoice)
        self._parsers: list[ToolParser | None] = []
        self._calls: list[list[ToolCall]] = []

    @override
    def add_prompt(self, prompt: list[int], sampling: SamplingParams, stream: TextStream) -> list[Choice]:
        made = super().add_prompt(prompt, sampling, stream)
        self._parsers += [self._make_parser() for _ in made]
        self._calls += [[] for _ in made]
        self._is_plain = self._is_plain and not (self._logprobs or any(self._parsers))
        return made

    @override
    def begin(self) -> bytes:
        events = []
        for one in self.choices:
            choice: dict[str, Any] = {
                "index": one.index,
                "delta": {"role": "assistant", "content": ""},
                "logprobs": None,
                "finish_reason": None,
                "token_ids": None,
            }
            ids = one.prompt if self._return_token_ids else None
            events.append(event(self._head | {"choices": [choice], "prompt_token_ids": ids}))
        return b"".join(events)

    @override
    def _last_event(self, choice: Choice, text: str) -> bytes:
        return self._text_event(choice, text, [], [], True)

    @override
    def _rich_delta(self, choice: Choice, text: str, token_ids: list[int], logprobs: list[Any]) -> bytes:
        parser, known = self._parsers[choice.index], self._calls[choice.index]
        parsed = Parsed(text, [])
        is_end = choice.finish_reason is not None
        if parser is not None:
            parsed = parser.add(text)
            if is_end:
                rest = parser.end()
                parsed = Parsed(parsed.text + rest.text, parsed.calls + rest.calls, parsed.arguments + rest.arguments)
        entries = [self._logprob_entry(entry) for entry in logprobs] if self._logprobs else []
        first_call = len(known)
        known += parsed.calls
        if parsed.arguments:
            last = known.pop()
            known.append(last._replace(arguments=last.arguments + parsed.arguments))
        if not self._streams:
            choice.pieces.append(parsed.text)
            choice.token_ids += token_ids
            choice.entries += entries
            return b""
        events = b""
        shows_text = parsed.text or entries or (self._return_token_ids and token_ids)
        has_calls = bool(parsed.calls or parsed.arguments)
        if shows_text or (is_end and not has_calls):
            events += self._text_event(choice, parsed.text, entries, token_ids, is_end and not has_calls)
        for number, call in enumerate(parsed.calls, start=first_call):
            events += self._call_events(choice.index, number, call)
        if parsed.arguments:
            events += self._arguments_event(choice.index, len(known) - 1, parsed.arguments)
        if is_end and has_calls:
            events += self._text_event(choice, "", [], [], True)
        return events

    def _text_event(self, of: Choice, text: str, entries: list[Any], token_ids: list[int], is_end: bool) -> bytes:
        """New text; the last one of a choice carries its finish reason."""
        choice: dict[str, Any] = {
            "index": of.index,
            "delta": {"content": text} if text or not is_end else {},
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

    def _logprob_entry(self, entry: Any) -> dict[str, Any]:
        token, logprob, _, top = entry
        detokenizer = self._detokenizer
        names = detokenizer.names_of([token, *(other for other, _ in top)])

        def named(token: int, logprob: float) -> dict[str, Any]:
            data = detokenizer.token_bytes(token)
            return {"token": names[token], "logprob": finite(logprob), "bytes": list(data)}

        return named(token, logprob) | {"top_logprobs": [named(other, value) for other, value in top]}

    def _finish_reason(self, choice: Choice) -> str | None:
        called = bool(self._calls[choice.index]) and not self._forced_call
        return "tool_calls" if called and choice.finish_reason == "stop" else choice.finish_reason

    @override
    def whole(self) -> bytes:
        first = self.choices[0]
        scores = None if self.req.prompt_logprobs is None else prompt_logprobs_body(self._detokenizer, first)
        choices = [self._whole_choice(choice) for choice in self.choices]
        body = {"object": "chat.completion", **self._fields, "choices": choices, "usage": self.usage()}
        body |= {"prompt_logprobs": scores, "prompt_token_ids": first.prompt if self._return_token_ids else None}
        return orjson.dumps(body)

    def _whole_choice(self, choice: Choice) -> dict[str, Any]:
        content = "".join(choice.pieces)
        calls = self._calls[choice.index]
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
            "index": choice.index,
            "message": message,
            "logprobs": {"content": choice.entries} if self._logprobs else None,
            "finish_reason": self._finish_reason(choice),
            "stop_reason": choice.stop_reason,
            "token_ids": choice.token_ids if self._return_token_ids else None,
        }


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True
