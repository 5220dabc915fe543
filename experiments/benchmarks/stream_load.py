"""A closed loop of streaming clients on `/v1/completions`, as JSON lines.

    kvarena benchmark stream_load --url http://127.0.0.1:8000 --levels 1:4,32:128,256:768

`256:768` is 768 requests by 256 clients. The clients live in several processes (`--procs`), which share a level's
clients and requests evenly; what does not divide is left out, so 256 clients in 6 processes are 252. Each client
streams one request after the other over a kept connection: random token ids in, a fixed number of tokens out,
end-of-sequence ignored. A short level that is not shown comes first. Any server of the OpenAI API will do.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.queues import SimpleQueue
from typing import NamedTuple
from urllib.parse import urlsplit

import httptools
import httpx
import orjson

from kvarena.experiments.tools import tool_parser

WARM_UP = (8, 16)
REQUEST_TIMEOUT = 600.0
TEMPERATURE = 0.6


class Level(NamedTuple):
    """How many clients, and how many requests they send together."""

    num_clients: int
    num_requests: int

    @classmethod
    def parse(cls, text: str) -> list[Level]:
        """Levels such as `1:4,32:128`. Raises ValueError."""
        return [cls(*map(int, part.split(":"))) for part in text.split(",")]

    def share(self, num_procs: int) -> tuple[int, int, int]:
        """Processes used, and each one's clients and requests."""
        procs = min(num_procs, self.num_clients)
        return procs, self.num_clients // procs, self.num_requests // procs


@dataclass(frozen=True)
class Shape:
    """What a request looks like: prompt tokens below `max_token_id`, output tokens."""

    num_prompt_tokens: int
    num_output_tokens: int
    max_token_id: int = 10000

    def prompts(self, level: Level, process: int, count: int) -> list[list[int]]:
        """The prompts of one process of a level, the same in every run."""
        source = random.Random(1000 * level.num_clients + process)
        first = min(10, self.max_token_id)
        return [[source.randint(first, self.max_token_id) for _ in range(self.num_prompt_tokens)] for _ in range(count)]


class Row(NamedTuple):
    """One request; times in seconds, on a clock that the machine shares. `error` is empty when it ended well."""

    start: float
    first: float
    last: float
    end: float
    num_tokens: int
    gaps: list[float]
    error: str


class _Connection(asyncio.Protocol):
    """A kept HTTP connection that reads one stream of events at a time."""

    def __init__(self) -> None:
        self.transport: asyncio.Transport | None = None
        self._done: asyncio.Future[str] | None = None

    def begin(self, data: bytes) -> asyncio.Future[str]:
        """Send a request; the future gives an error text, empty when the stream ended with `[DONE]`."""
        assert self.transport is not None
        self._parser = httptools.HttpResponseParser(self)
        self._rest, self.finished, self.num_tokens = b"", False, 0
        self.first = self.last = 0.0
        self.gaps: list[float] = []
        self._done = asyncio.get_running_loop().create_future()
        self.transport.write(data)
        return self._done

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]

    def connection_lost(self, exc: Exception | None) -> None:
        self._end(f"the connection was closed: {exc!r}")

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._end(f"malformed HTTP: {error}")

    def on_body(self, body: bytes) -> None:
        """The parser's: a part of the answer."""
        if self._parser.get_status_code() != 200:
            self._end(f"status {self._parser.get_status_code()}: {body[:200]!r}")
            return
        *events, self._rest = (self._rest + body).split(b"\n\n")
        for event in events:
            self._on_event(event)

    def on_message_complete(self) -> None:
        """The parser's: the answer is whole."""
        self._end("" if self.finished else "the stream ended without [DONE]")

    def _on_event(self, event: bytes) -> None:
        if event == b"data: [DONE]":
            self.finished = True
            return
        payload = orjson.loads(event.removeprefix(b"data: "))
        now = time.perf_counter()
        if "error" in payload:
            self._end(str(payload["error"])[:200])
        if usage := payload.get("usage"):
            self.num_tokens = usage["completion_tokens"]
        if payload.get("choices"):
            if self.first:
                self.gaps.append(now - self.last)
            else:
                self.first = now
            self.last = now

    def _end(self, error: str) -> None:
        if self._done is not None and not self._done.done():
            self._done.set_result(error)


async def _client(options: argparse.Namespace, prompts: list[list[int]], rows: list[Row]) -> None:
    """One client: takes prompts off the shared list until it is empty."""
    address = urlsplit(options.url)
    loop = asyncio.get_running_loop()
    connection: _Connection | None = None
    while prompts:
        body = orjson.dumps({
            "model": options.model, "prompt": prompts.pop(0), "max_tokens": options.n_out, "temperature": TEMPERATURE,
            "ignore_eos": True, "stream": True, "stream_options": {"include_usage": True},
        })  # fmt: skip
        head = (
            f"POST {address.path}/v1/completions HTTP/1.1\r\nHost: {address.netloc}\r\n"
            f"Authorization: Bearer {options.key}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\n\r\n"
        )
        start = time.perf_counter()
        try:
            if connection is None:
                _, connection = await loop.create_connection(_Connection, address.hostname, address.port)
            error = await asyncio.wait_for(connection.begin(head.encode() + body), REQUEST_TIMEOUT)
        except (OSError, TimeoutError) as fault:
            rows.append(Row(start, 0.0, 0.0, time.perf_counter(), 0, [], repr(fault)))
            connection = None
            continue
        made = connection
        rows.append(Row(start, made.first, made.last, time.perf_counter(), made.num_tokens, made.gaps, error))
        if error:
            assert made.transport is not None
            made.transport.close()
            connection = None


def _process(
    options: argparse.Namespace, level: Level, process: int, clients: int, count: int, out: SimpleQueue[list[Row]]
) -> None:
    rows: list[Row] = []
    prompts = Shape(options.n_in, options.n_out, options.max_token_id).prompts(level, process, count)

    async def run() -> None:
        await asyncio.gather(*(_client(options, prompts, rows) for _ in range(clients)))

    asyncio.run(run())
    out.put(rows)


def run_level(options: argparse.Namespace, level: Level) -> dict[str, object]:
    """Load the server with one level; its line."""
    return line_of(level, collect_level(options, level))


def collect_level(options: argparse.Namespace, level: Level) -> list[Row]:
    """Load the server with one level; a row per request."""
    context = multiprocessing.get_context("spawn")
    out: SimpleQueue[list[Row]] = context.SimpleQueue()
    procs, clients, count = level.share(options.procs)
    processes = [context.Process(target=_process, args=(options, level, i, clients, count, out)) for i in range(procs)]
    for process in processes:
        process.start()
    rows = [row for _ in processes for row in out.get()]
    for process in processes:
        process.join()
    return rows


def line_of(level: Level, rows: list[Row]) -> dict[str, object]:
    """A level's figures: tokens per second from the first start to the last end; latencies in ms."""
    good = [row for row in rows if not row.error]
    bad = [row.error for row in rows if row.error]
    waits = [row.first - row.start for row in good if row.first]
    gaps = [gap for row in good for gap in row.gaps]
    tokens = sum(row.num_tokens for row in good)
    span = max(row.end for row in good) - min(row.start for row in good) if good else 0.0
    return {
        "concurrency": level.num_clients, "requests": len(rows), "errors": len(bad),
        "first_error": bad[0] if bad else None, "out_tokens": tokens,
        "out_tok_per_s": round(tokens / span, 1) if span else 0.0,
        "ttft_p50_ms": _percentile(waits, 0.5), "ttft_p99_ms": _percentile(waits, 0.99),
        "itl_p50_ms": _percentile(gaps, 0.5), "itl_p99_ms": _percentile(gaps, 0.99),
        "chunks": len(gaps) + len(waits), "span_s": round(span, 2),
    }  # fmt: skip


def _percentile(seconds: list[float], share: float) -> float | None:
    values = sorted(seconds)
    return round(1e3 * values[min(len(values) - 1, int(share * len(values)))], 2) if values else None


def _wait(url: str, key: str, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if httpx.get(f"{url}/v1/models", headers={"Authorization": f"Bearer {key}"}, timeout=2).is_success:
                return
        except httpx.TransportError:
            time.sleep(0.2)
    raise SystemExit(f"no answer from {url} in {seconds:g} s")


def main(argv: Sequence[str]) -> int:
    """Run the levels; 1 when a request failed."""
    parser = tool_parser(__name__, __doc__)
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="of the server")
    parser.add_argument("--model", default="m", help="the name that the server knows")
    parser.add_argument("--key", default="k", help="API key")
    parser.add_argument("--n-in", type=int, default=512, help="prompt tokens")
    parser.add_argument("--n-out", type=int, default=256, help="output tokens")
    parser.add_argument("--max-token-id", type=int, default=10000, help="largest token id in a prompt")
    parser.add_argument(
        "--levels",
        type=Level.parse,
        default="1:4,32:128,256:768",
        metavar="CLIENTS:REQUESTS,...",
        help="one after the other",
    )
    parser.add_argument("--procs", type=int, default=6, help="client processes")
    parser.add_argument("--wait", type=float, default=200.0, help="seconds to wait for the server")
    options = parser.parse_args(argv)
    _wait(options.url, options.key, options.wait)
    failed = bool(run_level(options, Level(*WARM_UP))["errors"])
    for level in options.levels:
        line = run_level(options, level)
        failed |= bool(line["errors"])
        print(json.dumps(line), flush=True)
    return int(failed)
