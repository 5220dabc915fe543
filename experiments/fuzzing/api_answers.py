"""One text as the three APIs answer it, whole and streamed: the same text, thoughts and calls from each.

No engine and no HTTP: the text is handed in pieces to the classes that write answers (`engine/server/api/chat.py`,
`engine/server/responses/answer.py`, `engine/server/messages/answer.py`), and read back out of what they send.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

from kvarena.engine.request import SamplingParams
from kvarena.engine.server.api.chat import ChatAnswer
from kvarena.engine.server.api.protocol import ChatCompletionRequest
from kvarena.engine.server.api.turn import Reading, Turn
from kvarena.engine.server.forms.calls import ToolParser
from kvarena.engine.server.messages.answer import MessageAnswer
from kvarena.engine.server.responses.answer import ResponseAnswer
from kvarena.engine.server.responses.protocol import ResponsesRequest


class Shown(NamedTuple):
    """What a client has of an answer: its text, its thought, and each call's name and arguments."""

    text: str
    thought: str
    calls: list[tuple[str, Any]]


class _NoEngine:
    """Of the engines, as much as an answer asks for: nothing."""

    eos_token_ids = frozenset[int]()

    def copy(self) -> _NoEngine:
        return self


def answered(make: Callable[..., Turn], parser: Callable[[], ToolParser | None], parts: Sequence[str]) -> bytes:
    """What is sent for a text that comes in `parts`."""
    streams = len(parts) != 1
    req = ChatCompletionRequest.model_validate({"messages": [{"role": "user", "content": "x"}], "stream": streams})
    nothing = cast(Any, _NoEngine())
    answer = make(nothing, req, "m", 0.0, reading=Reading(parser, nothing, len))
    answer.add_prompt([1], SamplingParams(max_tokens=1), nothing)
    sent = answer.begin()
    [choice] = answer.choices
    for number, part in enumerate(parts, start=1):
        if number == len(parts):
            choice.finish_reason = "stop"
        sent += answer.delta(choice, part, [], [])
    return sent + answer.ending() if streams else answer.whole()


def _events(sent: bytes) -> list[Any]:
    lines = [line[6:] for line in sent.decode().split("\n") if line.startswith("data: ")]
    return [json.loads(line) for line in lines if line != "[DONE]"]


def _of_chat(sent: bytes, streams: bool) -> Shown:
    if not streams:
        message = json.loads(sent)["choices"][0]["message"]
        calls = [(one["function"]["name"], one["function"]["arguments"]) for one in message.get("tool_calls") or ()]
        return Shown(message["content"] or "", message.get("reasoning") or "", calls)
    text = thought = ""
    made: list[list[str]] = []
    for event in _events(sent):
        for delta in (one["delta"] for one in event["choices"]):
            text += delta.get("content") or ""
            thought += delta.get("reasoning") or ""
            for call in delta.get("tool_calls") or ():
                if call["index"] == len(made):
                    made.append([call["function"]["name"], ""])
                made[call["index"]][1] += call["function"]["arguments"]
    return Shown(text, thought, [(name, arguments) for name, arguments in made])


def _of_response(sent: bytes, streams: bool) -> Shown:
    events = _events(sent) if streams else []
    output = events[-1]["response"]["output"] if streams else json.loads(sent)["output"]
    if [event["sequence_number"] for event in events] != list(range(len(events))):
        raise AssertionError("events are not numbered one after the other")
    grown: dict[str, str] = {}
    for event in events:
        if event["type"].endswith(".delta"):
            grown[event["item_id"]] = grown.get(event["item_id"], "") + event["delta"]
    text = thought = ""
    calls = []
    for item in output:
        said = item["arguments"] if item["type"] == "function_call" else item["content"][0]["text"]
        if streams and grown.get(item["id"], "") != said:
            raise AssertionError(f"an item grew to {grown.get(item['id'])!r} and is {said!r}")
        if item["type"] == "function_call":
            calls.append((item["name"], said))
        elif item["type"] == "reasoning":
            thought += said
        else:
            text += said
    return Shown(text, thought, calls)


def _of_message(sent: bytes, streams: bool) -> Shown:
    if streams:
        blocks: list[dict[str, Any]] = []
        for event in _events(sent):
            if event["type"] == "content_block_start":
                blocks.append(event["content_block"] | {"grown": ""})
            elif event["type"] == "content_block_delta" and event["delta"]["type"] != "signature_delta":
                [grown] = [value for key, value in event["delta"].items() if key != "type"]
                blocks[event["index"]]["grown"] += grown
        for block in blocks:
            key = {"text": "text", "thinking": "thinking", "tool_use": "input"}[block["type"]]
            block[key] = json.loads(block["grown"] or "{}") if key == "input" else block["grown"]
    else:
        blocks = json.loads(sent)["content"]
    text = "".join(block["text"] for block in blocks if block["type"] == "text")
    thought = "".join(block["thinking"] for block in blocks if block["type"] == "thinking")
    return Shown(text, thought, [(block["name"], block["input"]) for block in blocks if block["type"] == "tool_use"])


_RESPONSE = functools.partial(
    ResponseAnswer, asked=ResponsesRequest(input="x"), response_id="resp_x", stores=False, on_state=lambda _: None
)
APIS: dict[str, tuple[Callable[..., Turn], Callable[[bytes, bool], Shown]]] = {
    "chat": (ChatAnswer, _of_chat),
    "response": (_RESPONSE, _of_response),
    "message": (functools.partial(MessageAnswer, max_tokens=1), _of_message),
}


def differ(parser: Callable[[], ToolParser | None], text: str, parts: Sequence[str]) -> str | None:
    """What is not the same of an answer whole and in `parts` (two or more), or in two APIs; None: nothing.

    White space between calls is shown by chats alone.
    """
    first: Shown | None = None
    for name, (make, read) in APIS.items():
        whole, streamed = read(answered(make, parser, [text]), False), read(answered(make, parser, parts), True)
        if whole != streamed:
            return f"{name}: whole {whole} and streamed {streamed}"
        calls = [(one, json.loads(what) if isinstance(what, str) else what) for one, what in whole.calls]
        shown = Shown("".join(whole.text.split()), whole.thought, calls)
        if first is not None and repr(shown) != repr(first):  # by their text: NaN is not equal to itself
            return f"{name}: {shown} and not {first}"
        first = shown
    return None
