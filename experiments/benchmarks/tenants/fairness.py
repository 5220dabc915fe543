"""A client beside another one that floods, over HTTP: what the first one has of it, under each scheduler. JSON lines.

    OMP_NUM_THREADS=1 kvarena benchmark fairness -- models/demo --max-model-len 512 --max-num-seqs 8

What stands after `--` are the arguments of `kvarena serve`; a server is started here for each `--scheduler`, on a free
port, with two API keys, each a client (`--clients-by key`).

1. A closed loop tells the server's capacity in requests a second.
2. In each round two parts have the same steady client, who offers `--share` of the capacity as a Poisson process:
   `before`, where the other one offers as much, and `flood`, where it offers `--times` as much.

Clients and server share the machine here. So that it is the engine that a flood is too much for, and not the
connections that it opens, requests are long, and the engine has the first core to itself (not by `--shared-cores`).

A part's first `--head` seconds are not counted. Who had no token at a part's end has waited until then. The last line
of a scheduler has medians over the rounds; the exit code is 1 where one of `--judge` does not keep the bars: the steady
client's p99 of the time to the first token at most `--ttft-bar` times what it was before, its tokens a second at least
`--tokens-bar`, and no request of it refused.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import multiprocessing
import os
import random
import resource
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.queues import SimpleQueue
from typing import Any

import numpy as np

from kvarena.engine.request import SamplingParams
from kvarena.experiments.load.connection import HttpClient, in_turns, run_async
from kvarena.experiments.load.http_client import Answer, HttpServer
from kvarena.experiments.load.http_metrics import ask_gauges
from kvarena.experiments.serving.child import Server, parts_of
from kvarena.experiments.tools import say, split_arguments, tool_parser

STEADY, OTHER = "steady", "other"
TEMPERATURE = 0.6
START_SECONDS = 6.0  # that the processes of the clients have to be there
IDLE_SECONDS = 60.0


@dataclass(frozen=True)
class Offer:
    """What a client sends in a part: `rate` requests a second, from `begin` on (Unix time), for some seconds."""

    url: str
    key: str
    rate: float
    begin: float
    seconds: float
    seed: int
    num_in: int
    num_out: int
    max_token_id: int

    def arrivals(self) -> list[float]:
        """Seconds behind `begin` at which its requests are sent; a Poisson process, the same for the same seed."""
        source = random.Random(self.seed)
        gaps = (source.expovariate(self.rate) for _ in itertools.count())
        return list(itertools.takewhile(lambda at: at < self.seconds, itertools.accumulate(gaps)))

    def prompt(self, number: int) -> list[int]:
        """The prompt of a request."""
        source = random.Random(f"{self.seed} {number}")
        return [source.randint(10, self.max_token_id) for _ in range(self.num_in)]


@dataclass(frozen=True)
class Got:
    """What a client had of a part.

    Attributes:
        num_sent: requests that were sent in the time that counts.
        waits: their seconds to the first token, or to the part's end.
        refused: those that were refused or failed, by their status.
        tokens_per_s: tokens that came in that time, of whichever requests.
    """

    num_sent: int
    waits: list[float]
    refused: dict[int, int]
    tokens_per_s: float


def got(offer: Offer, head: float, answers: Sequence[Answer], start: float) -> Got:
    """Judge a client's answers; `start` is the part's begin on the answers' clock."""
    end = start + offer.seconds
    counted = [one for one in answers if one.start >= start + head]
    bad = Counter(one.status for one in counted if one.error)
    waits = [end - one.start if one.wait is None else one.wait for one in counted if not one.error]
    tokens = 0.0
    for one in answers:
        inside = sum(start + head <= at <= end for at in one.chunk_times)
        tokens += inside * one.num_tokens / len(one.chunk_times) if one.chunk_times else 0
    return Got(len(counted), waits, dict(bad), tokens / (offer.seconds - head))


def _client(options: argparse.Namespace, offer: Offer) -> tuple[HttpClient, HttpServer]:
    headers = {"Authorization": f"Bearer {offer.key}", "Content-Type": "application/json"}
    client = HttpClient(offer.url, headers)
    return client, HttpServer(client, options.model, {"ignore_eos": True, "return_token_ids": True})


async def _send_all(options: argparse.Namespace, offer: Offer) -> Got:
    """An open loop: nobody waits for an answer before the next request; what is open at the end is hung up on."""
    client, server = _client(options, offer)
    answers: list[Answer] = []
    tasks: list[asyncio.Task[Answer]] = []
    sampling = SamplingParams(temperature=TEMPERATURE, max_tokens=offer.num_out)
    load = [(at, offer.prompt(number)) for number, at in enumerate(offer.arrivals())]  # made before the clock runs
    with contextlib.closing(client):
        start = time.perf_counter() + offer.begin - time.time()
        for at, prompt in load:
            await asyncio.sleep(start + at - time.perf_counter())
            answers.append(Answer())
            tasks.append(asyncio.create_task(server.complete(prompt, sampling, answers[-1])))
        await asyncio.sleep(start + offer.seconds - time.perf_counter())
        made = got(offer, options.head, answers, start)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return made


def _process(options: argparse.Namespace, offer: Offer, out: SimpleQueue[tuple[str, Got]]) -> None:
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # who floods has thousands of connections
    out.put((offer.key, run_async(_send_all(options, offer))))


def run_part(options: argparse.Namespace, url: str, rates: dict[str, float], seed: int) -> dict[str, Got]:
    """Both clients at once, each in a process of its own; what each got."""
    context = multiprocessing.get_context("spawn")
    out: SimpleQueue[tuple[str, Got]] = context.SimpleQueue()
    begin = time.time() + START_SECONDS
    shape = (options.n_in, options.n_out, options.max_token_id)
    offers = [
        Offer(url, key, rate, begin, options.seconds, seed + number, *shape)
        for number, (key, rate) in enumerate(rates.items())
    ]
    processes = [context.Process(target=_process, args=(options, offer, out)) for offer in offers]
    for process in processes:
        process.start()
    made = dict(out.get() for _ in processes)
    for process in processes:
        process.join()
    _wait_idle(options, url)
    return made


def _wait_idle(options: argparse.Namespace, url: str) -> None:
    """Until nothing is left of a part in the engine."""

    async def busy() -> float:
        with contextlib.closing(_client(options, Offer(url, STEADY, 1, 0, 0, 0, 1, 1, 10))[0]) as client:
            gauges = await ask_gauges(client)
            return gauges["num_running"] + gauges["num_waiting"]

    deadline = time.monotonic() + IDLE_SECONDS
    while run_async(busy()) and time.monotonic() < deadline:
        time.sleep(0.2)


def capacity(options: argparse.Namespace, url: str) -> float:
    """Requests a second that a closed loop of `--clients` gets, behind a second of warming up."""
    offer = Offer(url, STEADY, 1, 0, 0, options.seed, options.n_in, options.n_out, options.max_token_id)
    ends: list[float] = []
    end = time.perf_counter() + 1.0 + options.capacity_seconds

    async def load() -> None:
        client, server = _client(options, offer)
        sampling = SamplingParams(temperature=TEMPERATURE, max_tokens=offer.num_out)

        async def send(number: int) -> None:
            answer = await server.complete(offer.prompt(number), sampling)
            if not answer.error:
                ends.append(answer.end)

        with contextlib.closing(client):
            numbers = itertools.takewhile(lambda _: time.perf_counter() < end, itertools.count())
            await in_turns(options.clients, numbers, send)

    run_async(load())
    inside = [at for at in ends if end - options.capacity_seconds <= at <= end]
    return len(inside) / options.capacity_seconds


def _line(scheduler: str, part: str, turn: int, found: dict[str, Got]) -> dict[str, Any]:
    steady, other = found[STEADY], found[OTHER]
    p50, p99 = np.percentile(steady.waits, [50, 99]) if steady.waits else (np.nan, np.nan)
    return {
        "scheduler": scheduler, "part": part, "round": turn, "requests": steady.num_sent,
        "ttft_p50_s": round(float(p50), 4), "ttft_p99_s": round(float(p99), 4),
        "tokens_per_s": round(steady.tokens_per_s, 1), "refused": sum(steady.refused.values()),
        "other_requests": other.num_sent, "other_tokens_per_s": round(other.tokens_per_s, 1),
        "other_refused": sum(other.refused.values()),
    }  # fmt: skip


def run_scheduler(options: argparse.Namespace, arguments: Sequence[str], scheduler: str) -> bool:
    """All rounds under one scheduler; whether the bars were kept."""
    cores = os.sched_getaffinity(0)
    with tempfile.NamedTemporaryFile("w", suffix=".keys") as keys:
        keys.write(OTHER)
        keys.flush()
        flags = ["--scheduler", scheduler, "--clients-by", "key", "--api-key-file", keys.name, "--disable-access-log"]
        server = Server([*arguments, *flags], STEADY)
        try:
            if not options.shared_cores:
                _part_cores(server)
            rate = options.share * capacity(options, server.url)
            _wait_idle(options, server.url)
            lines = []
            for turn in range(options.rounds):
                for part, times in (("before", 1), ("flood", options.times)):
                    rates = {STEADY: rate, OTHER: times * rate}
                    found = run_part(options, server.url, rates, options.seed + 100 * turn)
                    lines.append(_line(scheduler, part, turn, found))
                    say(lines[-1])
        finally:
            os.sched_setaffinity(0, cores)
            server.stop()
    return _judge(options, scheduler, rate, lines)


def _part_cores(server: Server) -> None:
    """The engine's threads get the first core, fronts and clients the others. Nothing is done with one core."""
    first, *others = sorted(os.sched_getaffinity(0))
    if not others:
        return
    _, engine, *fronts = parts_of(server.process.pid)
    for part, cores in ((engine, [first]), *((front, others) for front in fronts)):
        for thread in part.threads():
            os.sched_setaffinity(thread.id, cores)
    os.sched_setaffinity(0, others)  # and with it the clients' processes


def _judge(options: argparse.Namespace, scheduler: str, rate: float, lines: list[dict[str, Any]]) -> bool:
    def ratio(key: str) -> float:
        pairs = zip(lines[::2], lines[1::2], strict=True)
        return statistics.median(flood[key] / before[key] for before, flood in pairs)

    ttft, tokens = round(ratio("ttft_p99_s"), 3), round(ratio("tokens_per_s"), 3)
    refused = sum(line["refused"] for line in lines)
    met = ttft <= options.ttft_bar and tokens >= options.tokens_bar and not refused
    say({
        "scheduler": scheduler, "offered_per_s": round(rate, 2), "ttft_p99_ratio": ttft, "tokens_ratio": tokens,
        "refused": refused, "met": met,
    })  # fmt: skip
    return met


def main(argv: Sequence[str]) -> int:
    """Run the schedulers; 1 when one that is judged does not keep the bars."""
    given, arguments = split_arguments(argv)
    parser = tool_parser(__name__, __doc__)
    parser.add_argument("--scheduler", nargs="+", default=["fair", "continuous"], help="one after the other")
    parser.add_argument("--judge", nargs="*", default=["fair"], help="schedulers that must keep the bars")
    parser.add_argument("--rounds", type=int, default=1, help="of both parts")
    parser.add_argument("--seconds", type=float, default=30.0, help="of a part")
    parser.add_argument("--head", type=float, default=5.0, help="seconds of it that are not counted")
    parser.add_argument("--share", type=float, default=0.5, help="of the capacity that each client offers before")
    parser.add_argument("--times", type=float, default=10.0, help="what the other one offers of that when it floods")
    parser.add_argument("--clients", type=int, default=16, help="of the closed loop that tells the capacity")
    parser.add_argument("--capacity-seconds", type=float, default=10.0, help="of that loop")
    parser.add_argument("--n-in", type=int, default=64, help="prompt tokens")
    parser.add_argument("--n-out", type=int, default=400, help="output tokens")
    parser.add_argument("--max-token-id", type=int, default=2000, help="largest token id in a prompt")
    parser.add_argument("--shared-cores", action="store_true", help="the engine has no core to itself")
    parser.add_argument("--seed", type=int, default=0, help="of arrivals and prompts")
    parser.add_argument("--ttft-bar", type=float, default=1.3, help="most that the p99 may grow by")
    parser.add_argument("--tokens-bar", type=float, default=0.95, help="least that must stay of the tokens a second")
    options = parser.parse_args(given)
    if not 0 <= options.head < options.seconds:
        parser.error("--head must be at least 0 and below --seconds")
    options.model = None
    kept = [run_scheduler(options, arguments, one) or one not in options.judge for one in options.scheduler]
    return int(not all(kept))
