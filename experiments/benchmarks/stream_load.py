"""A closed loop of streaming clients on `/v1/completions`, as JSON lines.

    kvarena benchmark stream_load --url http://127.0.0.1:8000 --levels 1:4,32:128,256:768

`256:768` is 768 requests by 256 clients. The clients live in several processes (`--procs`), which share a level's
clients and requests evenly; what does not divide is left out, so 256 clients in 6 processes are 252. Each client
streams one request after the other over a kept connection: random token ids in, a fixed number of tokens out,
end-of-sequence ignored. A short level that is not shown comes first. Any server of the OpenAI API will do.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.queues import SimpleQueue
from typing import NamedTuple

import httpx

from kvarena.engine.request import SamplingParams
from kvarena.experiments.load.connection import HttpClient, in_turns, run_async
from kvarena.experiments.load.http_client import Answer, HttpServer
from kvarena.experiments.tools import tool_parser

WARM_UP = (8, 16)
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
    """What a request looks like: prompt tokens below `max_token_id`, output tokens.

    With `num_prefixes` each prompt begins with one of so many prefixes, in turn: `num_prefix_tokens` more, the same
    ones in every level and process.
    """

    num_prompt_tokens: int
    num_output_tokens: int
    max_token_id: int = 10000
    num_prefixes: int = 0
    num_prefix_tokens: int = 0

    def prompts(self, level: Level, process: int, count: int) -> list[list[int]]:
        """The prompts of one process of a level, the same in every run."""
        source = random.Random(1000 * level.num_clients + process)
        starts = [self._tokens(random.Random(-1 - i), self.num_prefix_tokens) for i in range(self.num_prefixes)] or [[]]
        return [starts[i % len(starts)] + self._tokens(source, self.num_prompt_tokens) for i in range(count)]

    def _tokens(self, source: random.Random, count: int) -> list[int]:
        first = min(10, self.max_token_id)
        return [source.randint(first, self.max_token_id) for _ in range(count)]


async def _load(options: argparse.Namespace, prompts: list[list[int]], num_clients: int) -> list[Answer]:
    """What came of each prompt, by so many clients that take turns."""
    answers: list[Answer] = []
    sampling = SamplingParams(temperature=TEMPERATURE, max_tokens=options.n_out)
    headers = {"Authorization": f"Bearer {options.key}", "Content-Type": "application/json"}
    with contextlib.closing(HttpClient(options.url, headers)) as client:
        server = HttpServer(client, options.model, {"ignore_eos": True})

        async def send(prompt: list[int]) -> None:
            answers.append(await server.complete(prompt, sampling))

        await in_turns(num_clients, iter(prompts), send)
    return answers


def _process(
    options: argparse.Namespace, level: Level, process: int, clients: int, count: int, out: SimpleQueue[list[Answer]]
) -> None:
    shape = Shape(options.n_in, options.n_out, options.max_token_id, options.prefixes, options.prefix_tokens)
    prompts = shape.prompts(level, process, count)
    out.put(run_async(_load(options, prompts, clients)))


def run_level(options: argparse.Namespace, level: Level) -> dict[str, object]:
    """Load the server with one level; its line."""
    return line_of(level, collect_level(options, level))


def collect_level(options: argparse.Namespace, level: Level) -> list[Answer]:
    """Load the server with one level; its answers."""
    context = multiprocessing.get_context("spawn")
    out: SimpleQueue[list[Answer]] = context.SimpleQueue()
    procs, clients, count = level.share(options.procs)
    processes = [context.Process(target=_process, args=(options, level, i, clients, count, out)) for i in range(procs)]
    for process in processes:
        process.start()
    answers = [answer for _ in processes for answer in out.get()]
    for process in processes:
        process.join()
    return answers


def line_of(level: Level, answers: list[Answer]) -> dict[str, object]:
    """A level's figures: tokens per second from the first start to the last end; latencies in ms."""
    good = [answer for answer in answers if not answer.error]
    bad = [answer.error for answer in answers if answer.error]
    waits = [wait for answer in good if (wait := answer.wait) is not None]
    gaps = [gap for answer in good for gap in answer.gaps]
    tokens = sum(answer.num_tokens for answer in good)
    span = max(answer.end for answer in good) - min(answer.start for answer in good) if good else 0.0
    return {
        "concurrency": level.num_clients, "requests": len(answers), "errors": len(bad),
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
    parser.add_argument("--prefixes", type=int, default=0, help="prompts begin with one of so many prefixes, in turn")
    parser.add_argument("--prefix-tokens", type=int, default=4096, help="of each, before the --n-in of its own")
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
