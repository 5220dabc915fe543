"""What the web front costs, beside a plain FastAPI + server-sent events loop in the same run.

    kvarena benchmark front --fronts 1 --clients 64
    kvarena benchmark front --apis 8 --clients 256 --tokens 128 --step-time 0.03     # chats beside the other APIs

Both stream tokens of an engine of unlimited speed to the same load.
`kvarena` is the real server around experiments/serving/stub_engine.py. `plain` is what one writes first: FastAPI, one
asyncio queue per request, a pydantic model and `json` per token, tokens straight from a loop in the same process. CPU
seconds are read from the server's processes: events per second and core do not depend on what else the machine does.
With an engine of unlimited speed the front merges tokens that arrive while it writes, so its events are fewer than
tokens; `--step-time` slows the engine until each token is an event.
With `--apis` each API runs between two runs of chats, so that whatever else the machine does meets both.
The last line of stdout is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from pydantic import BaseModel

from kvarena.engine.errors import EngineError
from kvarena.engine.request import SamplingParams
from kvarena.experiments.load.connection import HttpClient, in_turns, run_async
from kvarena.experiments.load.http_client import HttpServer
from kvarena.experiments.serving.child import Child
from kvarena.experiments.tools import tool_parser
from kvarena.reports.analysis.intervals import StudentMean


class PlainBody(BaseModel):
    """Request of the plain server."""

    prompt: list[int]
    max_tokens: int


class PlainChoice(BaseModel):
    """Part of its answer."""

    index: int
    text: str
    finish_reason: str | None = None


class PlainChunk(BaseModel):
    """One event."""

    id: str
    object: str
    created: int
    model: str
    choices: list[PlainChoice]


@dataclass(frozen=True)
class Result:
    """One server's figures. `cpu_seconds` by role of the process."""

    name: str
    num_tokens: int
    num_events: int
    seconds: float
    cpu_seconds: dict[str, float]

    @property
    def tokens_per_second(self) -> float:
        """Over the whole load."""
        return self.num_tokens / self.seconds

    @property
    def events_per_core_second(self) -> float:
        """Per second of the fronts' CPU time."""
        return self.num_events / self.cpu_seconds["front"]


async def load(url: str, clients: int, requests: int, num_tokens: int) -> tuple[float, int]:
    """Run the load, each request on a connection of its own; its seconds and the number of events with text.

    Raises:
        EngineError: a stream did not come to its end.
    """
    sampling, num_events = SamplingParams(max_tokens=num_tokens), 0
    with contextlib.closing(HttpClient(url, {"Content-Type": "application/json"}, keeps=False)) as client:
        server = HttpServer(client, None, {"ignore_eos": True})

        async def send(_: int) -> None:
            nonlocal num_events
            answer = await server.complete([20] * 32, sampling)
            if answer.error:
                raise EngineError(f"a stream of {url} ended early: {answer.error}")
            num_events += len(answer.chunk_times)

        start = time.perf_counter()
        await in_turns(clients, iter(range(requests)), send)
    return time.perf_counter() - start, num_events


def measure(name: str, command: list[str], options: argparse.Namespace) -> Result:
    """Start a server, warm it up, load it, and stop it."""
    server = Child(command)
    try:
        run_async(load(server.url, options.clients, options.clients, 16))
        before = server.cpu_seconds()
        seconds, num_events = run_async(load(server.url, options.clients, options.requests, options.tokens))
        after = server.cpu_seconds()
    finally:
        server.stop()
    spent = {role: round(after[role] - before[role], 3) for role in after}
    return Result(name, options.requests * options.tokens, num_events, seconds, spent)


def serve_plain(port: int) -> None:
    """The plain loop: FastAPI, a queue per request, pydantic and json per token."""
    import uvicorn
    from fastapi import FastAPI
    from fastapi.responses import StreamingResponse

    app = FastAPI()

    @app.post("/v1/completions")
    async def completions(body: PlainBody) -> StreamingResponse:
        queue: asyncio.Queue[tuple[str, str | None]] = asyncio.Queue()
        asyncio.create_task(_produce(queue, body.max_tokens))  # noqa: RUF006

        async def events():  # type: ignore[no-untyped-def]
            reason = None
            while reason is None:
                text, reason = await queue.get()
                choice = PlainChoice(index=0, text=text, finish_reason=reason)
                chunk = PlainChunk(
                    id="c", object="text_completion", created=int(time.time()), model="m", choices=[choice]
                )
                yield f"data: {json.dumps(chunk.model_dump())}\n\n"
            yield "data: [DONE]\n\n"

        return StreamingResponse(events(), media_type="text/event-stream")

    async def _produce(queue: asyncio.Queue[tuple[str, str | None]], count: int) -> None:
        for i in range(count):
            await queue.put((f" tok{i}", "length" if i == count - 1 else None))
            await asyncio.sleep(0)

    uvicorn.run(app, port=port, access_log=False)


_SAID = [{"role": "user", "content": "Hello!"}]
_SCHEMA = {"type": "object", "properties": {"x": {"type": "integer"}}}
CHAT = "/v1/chat/completions"
# Path, body, and whether the server reads all of it as a thought.
APIS: dict[str, tuple[str, dict[str, Any], bool]] = {
    "chat": (CHAT, {"messages": _SAID}, False),
    "chat, tools": (
        CHAT,
        {"messages": _SAID, "tools": [{"type": "function", "function": {"name": "f", "parameters": _SCHEMA}}]},
        False,
    ),
    "chat, thoughts": (CHAT, {"messages": _SAID}, True),
    "responses": ("/v1/responses", {"input": "Hello!", "store": False}, False),
    "messages": ("/v1/messages", {"messages": _SAID}, False),
}
_LENGTH = {"/v1/responses": "max_output_tokens"}
_THINKING = ("--set", 'reasoning_parser="deepseek_r1"')  # which takes an answer for a thought until it is closed


async def _one(host: str, port: int, path: str, body: bytes) -> int:
    """One stream on a connection of its own, to its end; its events."""
    reader, writer = await asyncio.open_connection(host, port)
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nConnection: close\r\n"
    writer.write(head.encode() + b"Content-Length: %d\r\n\r\n" % len(body) + body)
    status = await reader.readline()
    if b" 200 " not in status:
        raise SystemExit(f"{path}: {status.decode().strip()} {(await reader.read()).decode()[-300:]}")
    events = 0
    while data := await reader.read(1 << 16):
        events += data.count(b"data: ")
    writer.close()
    return events


async def _load_api(url: str, name: str, clients: int, tokens: int) -> int:
    path, body, _ = APIS[name]
    whole = body | {"stream": True, "ignore_eos": True, _LENGTH.get(path, "max_tokens"): tokens}
    address = urlsplit(url)
    data = json.dumps(whole).encode()
    host, port = address.hostname or "", address.port or 0
    return sum(await asyncio.gather(*(_one(host, port, path, data) for _ in range(clients))))


def _order(turn: int) -> list[str]:
    """A round: each API between two runs of chats, the APIs in turned order."""
    others = [name for name in APIS if name != "chat"]
    turned = others[turn % len(others) :] + others[: turn % len(others)]
    return ["chat", *(name for other in turned for name in (other, "chat"))]


def compare_apis(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Each API's cost to the front beside that of the chats right before and after it, for as many tokens.

    A front that has not its core to itself merges tokens, which is cheaper for each of them: events of a token are
    told, and should be near 1.
    """
    servers = [Child(_stub(options, options.port)), Child([*_stub(options, options.port + 1), *_THINKING])]
    seconds: dict[str, list[float]] = {name: [] for name in APIS}
    events: dict[str, list[int]] = {name: [] for name in APIS}
    ratios: dict[str, list[float]] = {name: [] for name in APIS}
    try:
        for turn in range(-1, options.apis):
            order = _order(turn)
            spent = []
            for name in order if turn >= 0 else APIS:  # the first round warms up
                server = servers[APIS[name][2]]
                before = server.cpu_seconds()["front"]
                count = run_async(_load_api(server.url, name, options.clients, options.tokens))
                spent.append(server.cpu_seconds()["front"] - before)
                events[name] += [count] if turn >= 0 else []
            for place, (name, cost) in enumerate(zip(order, spent, strict=True) if turn >= 0 else ()):
                seconds[name].append(cost)
                beside = [spent[i] for i in ((place - 1, place + 1) if name != "chat" else (place - 2, place + 2))
                          if 0 <= i < len(spent)]  # fmt: skip
                ratios[name].append(float(np.mean(beside)) / cost)
    finally:
        for server in servers:
            server.stop()
    num_tokens = options.clients * options.tokens
    return {name: _row(name, num_tokens, seconds[name], events[name], ratios[name]) for name in APIS}


def _row(name: str, num_tokens: int, seconds: list[float], events: list[int], ratios: list[float]) -> dict[str, Any]:
    """An API's figures: medians, and the interval of the mean ratio."""
    per_core = num_tokens / float(np.median(seconds))
    low, high = StudentMean.of(ratios).interval if len(ratios) > 1 else (ratios[0], ratios[0])
    middle, of_a_token = float(np.median(ratios)), float(np.median(events)) / num_tokens
    print(
        f"{name:15} {per_core:>8,.0f} tokens per second and core, {middle:.3f} of a chat's "
        f"(mean {np.mean(ratios):.3f}, at 95 % {low:.3f} to {high:.3f}), {of_a_token:.2f} events a token"
    )
    return {
        "tokens_per_front_core_second": round(per_core),
        "beside_chat": round(middle, 3),
        "mean_and_interval": [round(float(one), 3) for one in (np.mean(ratios), low, high)],
        "events_per_token": round(of_a_token, 3),
    }


def _stub(options: argparse.Namespace, port: int) -> list[str]:
    """The command of our server around a stub engine."""
    made = ["-m", "kvarena.experiments.serving.stub_engine", "serve", options.model, "--port", str(port)]
    return [*made, "--fronts", str(options.fronts), "--step-time", str(options.step_time)]


def main(argv: Sequence[str]) -> int:
    """Measure both; returns the exit code."""
    parser = tool_parser(__name__, __doc__)
    parser.add_argument("--model", default="models/demo", help="whose tokenizer to use")
    parser.add_argument("--fronts", type=int, default=1, help="HTTP processes")
    parser.add_argument("--clients", type=int, default=64, help="streams at a time")
    parser.add_argument("--requests", type=int, default=256, help="in all")
    parser.add_argument("--tokens", type=int, default=256, help="of each answer")
    parser.add_argument("--step-time", type=float, default=0.0, help="seconds per step of the stub engine")
    parser.add_argument("--port", type=int, default=18300, help="of our server; another one's is one more")
    parser.add_argument(
        "--apis", type=int, default=0, metavar="ROUNDS", help="compare the APIs with each other instead"
    )
    parser.add_argument("--plain-server", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.plain_server:
        serve_plain(options.port)
        return 0
    if options.apis:
        rows_of_apis = compare_apis(options)
        print(json.dumps({"clients": options.clients, "rounds": options.apis, "apis": rows_of_apis}))
        return 0
    plain = ["-m", "kvarena", "benchmark", "front", "--plain-server", "--port", str(options.port + 1)]
    results = [measure("kvarena", _stub(options, options.port), options), measure("plain", plain, options)]
    rows = []
    for result in results:
        row = asdict(result) | {
            "tokens_per_second": round(result.tokens_per_second),
            "events_per_front_core_second": round(result.events_per_core_second),
        }
        rows.append(row)
        per_core = row["events_per_front_core_second"]
        print(f"{result.name:8} {row['tokens_per_second']:>8,} tokens/s  {per_core:>8,} events per second and core")
    ratio = results[0].events_per_core_second / results[1].events_per_core_second
    print(json.dumps({"clients": options.clients, "fronts": options.fronts, "results": rows, "ratio": round(ratio, 2)}))
    return 0
