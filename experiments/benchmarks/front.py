"""What the web front costs, beside a plain FastAPI + server-sent events loop in the same run.

    kvarena benchmark front --fronts 1 --clients 64

Both stream tokens of an engine of unlimited speed to the same load (raw sockets, so that the clients cost little).
`kvarena` is the real server around experiments/serving/stub_engine.py. `plain` is what one writes first: FastAPI, one
asyncio queue per request, a pydantic model and `json` per token, tokens straight from a loop in the same process. CPU
seconds are read from the server's processes: events per second and core do not depend on what else the machine does.
With an engine of unlimited speed the front merges tokens that arrive while it writes, so its events are fewer than
tokens; `--step-time` slows the engine until each token is an event.
The last line of stdout is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import httpx
import psutil
from pydantic import BaseModel

from kvarena.experiments.tools import tool_parser

START_SECONDS = 60.0


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


async def one_stream(host: str, port: int, body: bytes) -> int:
    """Read one stream; returns its number of text events. Raises ValueError when it does not end with [DONE]."""
    reader, writer = await asyncio.open_connection(host, port, limit=1 << 20)
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    writer.write(head.encode() + b"\r\nConnection: close\r\n\r\n" + body)
    count, tail = 0, b""
    while chunk := await reader.read(1 << 16):
        data = tail + chunk
        count += data.count(b'"text":') - tail.count(b'"text":')
        tail = data[-64:]
    writer.close()
    if b"[DONE]" not in tail:
        raise ValueError(f"a stream ended early: {tail!r}")
    return count


async def load(port: int, clients: int, requests: int, num_tokens: int) -> tuple[float, int]:
    """Run the load; returns its seconds and the number of events."""
    body = json.dumps({"prompt": [20] * 32, "max_tokens": num_tokens, "ignore_eos": True, "stream": True}).encode()
    left, num_events = requests, 0

    async def client() -> None:
        nonlocal left, num_events
        while left > 0:
            left -= 1
            count = await one_stream("127.0.0.1", port, body)
            num_events += count

    start = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(clients)))
    return time.perf_counter() - start, num_events


def measure(name: str, command: list[str], port: int, options: argparse.Namespace) -> Result:
    """Start a server, warm it up, load it, and stop it."""
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        try:
            _wait(port, process)
            asyncio.run(load(port, options.clients, options.clients, 16))
            before = cpu_seconds(process.pid)
            seconds, num_events = asyncio.run(load(port, options.clients, options.requests, options.tokens))
            after = cpu_seconds(process.pid)
        finally:
            process.terminate()
            process.wait(20)
    spent = {role: round(after[role] - before[role], 3) for role in after}
    return Result(name, options.requests * options.tokens, num_events, seconds, spent)


def _wait(port: int, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if httpx.get(f"http://127.0.0.1:{port}/health", timeout=1).status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.1)
    raise RuntimeError("the server did not start")


def cpu_seconds(pid: int) -> dict[str, float]:
    """CPU time so far by role: the engine is the supervisor's first child, fronts are the others."""
    parent = psutil.Process(pid)
    children = [p for p in parent.children() if "spawn_main" in " ".join(p.cmdline())]
    children.sort(key=lambda p: p.create_time())
    if not children:
        return {"front": sum(parent.cpu_times()[:2])}
    return {
        "engine": sum(children[0].cpu_times()[:2]),
        "front": sum(sum(child.cpu_times()[:2]) for child in children[1:]),
    }


def serve_plain(port: int) -> None:
    """The plain loop: FastAPI, a queue per request, pydantic and json per token."""
    import uvicorn
    from fastapi import FastAPI
    from fastapi.responses import StreamingResponse

    app = FastAPI()

    @app.get("/health")
    async def health() -> None:
        return None

    @app.post("/v1/completions")
    async def completions(body: PlainBody) -> StreamingResponse:
        queue: asyncio.Queue[str | None] = asyncio.Queue()
        asyncio.create_task(_produce(queue, body.max_tokens))  # noqa: RUF006

        async def events():  # type: ignore[no-untyped-def]
            while (text := await queue.get()) is not None:
                choice = PlainChoice(index=0, text=text)
                chunk = PlainChunk(
                    id="c", object="text_completion", created=int(time.time()), model="m", choices=[choice]
                )
                yield f"data: {json.dumps(chunk.model_dump())}\n\n"
            yield "data: [DONE]\n\n"

        return StreamingResponse(events(), media_type="text/event-stream")

    async def _produce(queue: asyncio.Queue[str | None], count: int) -> None:
        for i in range(count):
            await queue.put(f" tok{i}")
            await asyncio.sleep(0)
        await queue.put(None)

    uvicorn.run(app, port=port, log_level="warning")


def main(argv: Sequence[str]) -> int:
    """Measure both; returns the exit code."""
    parser = tool_parser(__name__, __doc__)
    parser.add_argument("--model", default="models/demo", help="whose tokenizer to use")
    parser.add_argument("--fronts", type=int, default=1, help="HTTP processes")
    parser.add_argument("--clients", type=int, default=64, help="streams at a time")
    parser.add_argument("--requests", type=int, default=256, help="in all")
    parser.add_argument("--tokens", type=int, default=256, help="of each answer")
    parser.add_argument("--step-time", type=float, default=0.0, help="seconds per step of the stub engine")
    parser.add_argument("--port", type=int, default=18300, help="of our server; the plain one's is one more")
    parser.add_argument("--plain-server", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.plain_server:
        serve_plain(options.port)
        return 0
    stub = [
        sys.executable,
        "-m",
        "kvarena.experiments.serving.stub_engine",
        "serve",
        str(Path(options.model)),
        "--port",
    ]
    ours = [*stub, str(options.port), "--fronts", str(options.fronts)]
    ours += ["--step-time", str(options.step_time)]
    plain = [
        sys.executable,
        "-m",
        "kvarena",
        "benchmark",
        "front",
        "--plain-server",
        "--port",
        str(options.port + 1),
    ]
    results = [measure("kvarena", ours, options.port, options), measure("plain", plain, options.port + 1, options)]
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
