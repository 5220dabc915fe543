"""Random request bodies against a server: no answer is a 500, no connection is cut, and no stack trace is logged.

    kvarena check bodies --seconds 1200 --seed 0 -- models/demo --max-model-len 512

A body is a valid one of some endpoint with keys added, changed and taken away, at the top and inside: the endpoints'
own keys, those of other servers, and none of anybody's, with values of every kind and size. What stands after `--` are
the arguments of `kvarena serve`. A failure prints the seed of its body (`--seed N --bodies 1`). The last line of stdout
is JSON; exit code 1 when anything failed.
"""

from __future__ import annotations

import contextlib
import copy
import json
import random
from collections import Counter
from collections.abc import Sequence
from typing import Any

import psutil

from kvarena.engine.server.api import foreign, protocol
from kvarena.engine.server.messages import protocol as messages
from kvarena.engine.server.responses import protocol as responses
from kvarena.experiments.load.connection import HttpClient, run_async
from kvarena.experiments.serving.child import Server
from kvarena.experiments.tools import say, split_arguments, tool_parser

KEY = "k"
TOOL = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object"}}}
IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}}
VALID: dict[str, tuple[dict[str, Any], ...]] = {
    "/v1/chat/completions": (
        {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4},
        {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": [{"type": "text", "text": "x"}]}],
         "max_completion_tokens": 3, "tools": [TOOL], "tool_choice": "auto", "stream": True},
        {"messages": [{"role": "assistant", "content": None, "tool_calls": [
            {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}]},
            {"role": "tool", "tool_call_id": "a", "content": "r"}], "max_tokens": 2, "logprobs": True},
        {"messages": [{"role": "user", "content": [IMAGE]}], "max_tokens": 2},
    ),
    "/v1/completions": (
        {"prompt": "The", "max_tokens": 4},
        {"prompt": [1, 2, 3], "max_tokens": 2, "echo": True, "logprobs": 2, "n": 2},
        {"prompt": ["a", "b"], "max_tokens": 2, "stream": True, "stream_options": {"include_usage": True}},
        {"prompt": "x", "max_tokens": 3, "structured_outputs": {"regex": "a+"}},
        {"prompt": "x", "max_tokens": 3, "response_format": {"type": "json_schema", "json_schema": {
            "name": "s", "schema": {"type": "object", "properties": {"a": {"type": "integer"}}}}}},
    ),
    "/v1/responses": (
        {"input": "Hi", "max_output_tokens": 4},
        {"input": [{"role": "user", "content": [{"type": "input_text", "text": "x"}]}, {
            "type": "function_call", "call_id": "a", "name": "f", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "a", "output": "r"}], "max_output_tokens": 3, "stream": True},
        {"input": "x", "max_output_tokens": 3, "tools": [{"type": "function", "name": "f", "parameters": {}}],
         "tool_choice": "auto", "reasoning": {"effort": None}, "include": ["message.output_text.logprobs"]},
        {"input": "x", "max_output_tokens": 3, "store": False, "instructions": "i", "text": {"format": {
            "type": "json_schema", "name": "s", "schema": {"type": "object"}}}},
    ),
    "/v1/messages": (
        {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "x", "cache_control": {
            "type": "ephemeral"}}]}, {"role": "assistant", "content": [
                {"type": "thinking", "thinking": "t", "signature": "s"},
                {"type": "tool_use", "id": "a", "name": "f", "input": {}}]},
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "a", "content": "r"}]}],
         "max_tokens": 3, "stream": True, "system": "s", "stop_sequences": ["zz"]},
        {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3, "tools": [{"name": "f", "input_schema": {
            "type": "object"}}], "tool_choice": {"type": "auto"}, "thinking": {"type": "disabled"}},
    ),
    "/v1/messages/count_tokens": ({"messages": [{"role": "user", "content": "Hi"}], "system": [
        {"type": "text", "text": "s"}]},),
    "/invocations": ({"prompt": "The", "max_tokens": 2}, {"messages": [{"role": "user", "content": "Hi"}]}),
    "/tokenize": ({"prompt": "The"}, {"messages": [{"role": "user", "content": "Hi"}]}),
    "/detokenize": ({"tokens": [1, 2, 3]},),
}  # fmt: skip
_MODELS = (protocol.ChatCompletionRequest, protocol.CompletionRequest, protocol.TokenizeRequest,
           protocol.DetokenizeRequest, protocol.Message, protocol.StructuredOutputs,
           protocol.ResponseFormat, responses.ResponsesRequest, messages.MessagesRequest)  # fmt: skip
KEYS = (
    *sorted({name for model in _MODELS for name in model.model_fields} | set(foreign.REPLACED)),
    "", "role", "type", "text", "content", "url", "__class__", "a" * 300, "é", "$ref", "$defs", "topP", "name",
)  # fmt: skip
VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 7, 2**31, 2**63, -(2**63), 2**70, 0.0, 0.5, -0.5, 1.0, 1e308, 1e-308, "", " ", "x",
    "auto", "required", "none", "json_object", "text", "-1", "\ud83d", "\x00", "🙂", "a" * 3000, [], {}, [[]], [{}],
    [None], [0], [-1], [2**40], ["x"], [["x"]], {"a": 1}, {"type": "text"},
    {"type": "function", "function": {"name": "f"}},
    {"5": 1.5}, {"x": -200}, [TOOL, TOOL], {"type": "object"}, {"$ref": "#"}, {"regex": "("}, {"json": True},
    {"type": "any"}, {"type": "tool", "name": "f"}, {"type": "tool_result", "tool_use_id": 1}, {"effort": "high"},
    {"type": "input_image", "image_url": "x"}, {"format": {"type": "json_schema"}}, {"type": "reasoning"},
    {"grammar": "root ::="}, {"choice": ["a", ""]}, {"include_usage": True}, [1] * 600, ["a"] * 40,
)  # fmt: skip


def random_body(seed: int) -> tuple[str, dict[str, Any]]:
    """An endpoint and a body for it."""
    drawn = random.Random(seed)
    path = drawn.choice(sorted(VALID))
    body = copy.deepcopy(drawn.choice(VALID[path]))
    for _ in range(drawn.choice((1, 1, 2, 3, 6))):
        place: Any = body
        while drawn.random() < 0.6:
            inner = [
                one for one in (place.values() if isinstance(place, dict) else place) if isinstance(one, dict | list)
            ]
            if not inner:
                break
            place = drawn.choice(inner)
        _change(place, drawn)
    return path, body


def _change(place: Any, drawn: random.Random) -> None:
    value = copy.deepcopy(drawn.choice(VALUES))
    if isinstance(place, list):
        place.insert(drawn.randint(0, len(place)), value)
    elif place and drawn.random() < 0.2:
        del place[drawn.choice(list(place))]
    else:
        keys = list(place) if place and drawn.random() < 0.4 else KEYS
        place[drawn.choice(keys)] = value


def main(argv: Sequence[str]) -> int:
    """Run the fuzzer; returns the exit code."""
    given, arguments = split_arguments(argv)
    parser = tool_parser(__name__, __doc__)
    parser.add_argument("--seconds", type=float, default=60.0, help="of processor time, server and this process")
    parser.add_argument("--seed", type=int, default=None, help="of the first body; default: drawn, and printed")
    parser.add_argument("--bodies", type=int, default=1 << 60, help="most bodies")
    args = parser.parse_args(given)
    first = random.randrange(1 << 30) if args.seed is None else args.seed
    server = Server(arguments, KEY)
    try:
        statuses, failures = run_async(_run(server, first, args.bodies, args.seconds))
        alive = server.is_alive(KEY)
        traces = server.log.count("Traceback")
    finally:
        server.stop()
    line = {"first_seed": first, "bodies": sum(statuses.values()), "answers": dict(sorted(statuses.items())),
            "failures": failures, "stack_traces": traces, "alive": alive}  # fmt: skip
    say(line)
    return int(failures > 0 or traces > 0 or not alive)


async def _run(server: Server, first: int, most: int, seconds: float) -> tuple[Counter[str], int]:
    processes = [server.process, *server.process.children(recursive=True), psutil.Process()]
    began = _processor_seconds(processes)
    statuses: Counter[str] = Counter()
    failures, number = 0, 0
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
    with contextlib.closing(HttpClient(server.url, headers, patience=120)) as client:
        while number < most and (number % 50 or _processor_seconds(processes) - began < seconds):
            path, body = random_body(first + number)
            try:
                reply = await client.request("POST", path, json.dumps(body).encode())
                status, told = str(reply.status), reply.body.decode(errors="replace")
            except OSError as error:
                status, told = type(error).__name__, str(error)
            statuses[status] += 1
            if not status.isdecimal() or int(status) >= 500 or "internal_error" in told:
                failures += 1
                say({"seed": first + number, "status": status, "path": path, "answer": told[:300]})
            number += 1
    return statuses, failures


def _processor_seconds(processes: Sequence[psutil.Process]) -> float:
    return sum(sum(one.cpu_times()[:4]) for one in processes if one.is_running())
