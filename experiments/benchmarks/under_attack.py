"""Honest streams beside requests that mean harm: the longest silence with and without them, as JSON lines.

    kvarena benchmark under_attack --attack grammars -- models/demo --max-model-len 2048

What stands after `--` are the arguments of `kvarena serve`; the server is started here, on a free port. A turn has two
parts with the same honest load (`--clients` streams at a time, `--requests` each): alone, and while the attack goes
on. `longest_gap_s` is the longest time that an honest client heard nothing from the server: before its first token or
between two. The last line has the median over the turns of what the attack added; the exit code is 1 when that is above
`--bound` seconds, an honest request failed, or the server did not answer at the end.

The attacks are functions in ATTACKS: each gets an HTTP client and sends requests until it is cancelled.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import multiprocessing
import socket
import statistics
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from multiprocessing.queues import SimpleQueue
from typing import Any

from kvarena.experiments.benchmarks.stream_load import Level, collect_level
from kvarena.experiments.load.connection import HttpClient, in_turns, run_async
from kvarena.experiments.load.http_client import Answer
from kvarena.experiments.serving.child import Server
from kvarena.experiments.tools import say, split_arguments, tool_parser

PREFIX = "x"


class Attack:
    """What one attack may use: requests of any kind, counted by the status of their answer."""

    def __init__(self, client: HttpClient) -> None:
        self.client = client
        self.statuses: Counter[str] = Counter()

    async def post(self, body: dict[str, Any], path: str = "/v1/completions") -> None:
        """Send one request and count its answer; a connection that fails counts as `closed`."""
        try:
            reply = await self.client.request("POST", path, json.dumps(body).encode())
        except OSError:
            self.statuses["closed"] += 1
            return
        self.statuses[str(reply.status)] += 1

    async def repeat(self, num_tasks: int, send: Callable[[int], Awaitable[None]]) -> None:
        """`num_tasks` loops that call `send` with ever new numbers, until they are cancelled."""
        await in_turns(num_tasks, itertools.count(), send)


def slow_patterns(number: int, num_patterns: int = 200) -> dict[str, Any]:
    """A schema of 9 kB that takes half a second to compile; each `number` is another text."""
    patterns: dict[str, Any] = {f"^{PREFIX}{number}_{i}(a|b){{1,50}}$": {} for i in range(num_patterns)}
    return {"type": "object", "patternProperties": patterns}


def wide_schema(number: int) -> dict[str, Any]:
    """A schema of 53 kB."""
    names = [f"g{number}_{i}" for i in range(10)]
    inner = {"type": "object", "properties": {n: {"type": "string", "maxLength": 40} for n in names}, "required": names}
    return {"type": "object", "properties": {f"field_{i}": inner for i in range(95)}}


async def grammars(attack: Attack) -> None:
    """One schema for 200 prompts, slow to compile."""
    structured = {"json": slow_patterns(0)}
    body = {"prompt": [PREFIX] * 200, "max_tokens": 4, "structured_outputs": structured}
    await attack.repeat(1, lambda _: attack.post(body))


async def distinct_grammars(attack: Attack) -> None:
    """Eight clients, each schema another one, half of them too slow to be taken."""
    await attack.repeat(
        8,
        lambda i: attack.post(
            {"prompt": PREFIX, "max_tokens": 4, "structured_outputs": {"json": slow_patterns(i, 200 + 200 * (i % 2))}}
        ),
    )


async def choices(attack: Attack) -> None:
    """128 choices with a schema of 53 kB, each schema another one."""
    await attack.repeat(
        2,
        lambda i: attack.post(
            {"prompt": PREFIX, "max_tokens": 32, "n": 128, "structured_outputs": {"json": wide_schema(i)}}
        ),
    )


async def tools(attack: Attack) -> None:
    """40 tools of which one must be called, 32 choices."""
    properties = {f"p{i}": {"type": "string"} for i in range(10)}
    parameters = {"type": "object", "properties": properties, "required": list(properties)}
    made = [{"type": "function", "function": {"name": f"tool_{i}", "parameters": parameters}} for i in range(40)]
    body = {
        "messages": [{"role": "user", "content": "Hello!"}],
        "tools": made, "tool_choice": "required", "n": 32, "max_tokens": 32,
    }  # fmt: skip
    await attack.repeat(2, lambda _: attack.post(body, "/v1/chat/completions"))


async def oversize(attack: Attack) -> None:
    """Eight clients, prompts of 14 MB: far beyond any context, of short pieces of the vocabulary and of its longest."""
    await attack.repeat(
        8, lambda i: attack.post({"prompt": ("ab " if i % 2 else " " * 3) * 4_600_000, "max_tokens": 4})
    )


async def slow_readers(attack: Attack) -> None:
    """64 connections that take a byte a second of long answers, half of them streams; a new one when one is cut."""
    loop, url = asyncio.get_running_loop(), attack.client.url

    async def read(number: int) -> None:
        body = {"prompt": PREFIX, "max_tokens": 400, "ignore_eos": True, "logprobs": 5, "stream": bool(number % 2)}
        message = attack.client.message("POST", "/v1/completions", json.dumps(body).encode())
        with socket.socket() as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)  # before it connects: the window stays small
            sock.setblocking(False)
            await loop.sock_connect(sock, (url.host, url.port))
            await loop.sock_sendall(sock, message)
            attack.statuses["opened"] += 1
            try:
                while await loop.sock_recv(sock, 1):
                    await asyncio.sleep(1)
            except OSError:
                pass
            attack.statuses["closed"] += 1

    await attack.repeat(64, read)


ATTACKS: dict[str, Callable[[Attack], Awaitable[None]]] = {
    "grammars": grammars,
    "distinct_grammars": distinct_grammars,
    "choices": choices,
    "tools": tools,
    "oversize": oversize,
    "slow_readers": slow_readers,
}


def _attack_process(name: str, url: str, key: str, stop: Any, out: SimpleQueue[dict[str, int]]) -> None:
    async def attack() -> dict[str, int]:
        headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
        with contextlib.closing(HttpClient(url, headers)) as client:
            made = Attack(client)
            task = asyncio.ensure_future(ATTACKS[name](made))
            while not stop.is_set() and not task.done():
                await asyncio.sleep(0.05)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            return dict(made.statuses)

    out.put(run_async(attack()))


def longest_gap(answers: list[Answer]) -> float:
    """The longest time in seconds that a client heard nothing."""
    waits = [answer.end - answer.start if answer.wait is None else answer.wait for answer in answers]
    return max([*waits, *(gap for answer in answers for gap in answer.gaps)])


def run_part(options: argparse.Namespace, attack: str | None) -> dict[str, Any]:
    """The honest load, alone or beside an attack; its line."""
    context = multiprocessing.get_context("spawn")
    stop, out = context.Event(), context.SimpleQueue()
    process = context.Process(target=_attack_process, args=(attack, options.url, options.key, stop, out))
    if attack is not None:
        process.start()
        time.sleep(options.head_start)
    answers = collect_level(options, Level(options.clients, options.clients * options.requests))
    statuses = {}
    if attack is not None:
        stop.set()
        statuses = out.get()
        process.join()
    errors = [answer.error for answer in answers if answer.error]
    return {
        "part": attack or "alone", "requests": len(answers), "errors": len(errors),
        "first_error": errors[0] if errors else None, "longest_gap_s": round(longest_gap(answers), 3),
        "span_s": round(max(one.end for one in answers) - min(one.start for one in answers), 2), "answers": statuses,
    }  # fmt: skip


def main(argv: Sequence[str]) -> int:
    """Run the turns; 1 when the bound is not kept."""
    given, arguments = split_arguments(argv)
    parser = tool_parser(__name__, __doc__)
    parser.add_argument("--attack", choices=sorted(ATTACKS), nargs="+", default=sorted(ATTACKS), help="some of them")
    parser.add_argument("--turns", type=int, default=3, help="of each attack")
    parser.add_argument("--clients", type=int, default=32, help="honest streams at a time")
    parser.add_argument("--requests", type=int, default=4, help="requests of each honest client in a part")
    parser.add_argument("--n-in", type=int, default=128, help="prompt tokens of an honest request")
    parser.add_argument("--n-out", type=int, default=128, help="its output tokens")
    parser.add_argument("--max-token-id", type=int, default=2000, help="largest token id in a prompt")
    parser.add_argument("--procs", type=int, default=1, help="processes of the honest clients")
    parser.add_argument("--head-start", type=float, default=0.5, help="seconds that the attack begins earlier")
    parser.add_argument("--bound", type=float, default=1.0, help="seconds that an attack may add to the longest gap")
    options = parser.parse_args(given)
    options.key, options.model = "k", None
    server = Server(arguments, options.key)
    options.url = server.url
    failed = False
    try:
        run_part(options, None)  # warms up
        for attack in options.attack:
            failed |= _run_attack(options, attack, server)
    finally:
        server.stop()
    return int(failed)


def _run_attack(options: argparse.Namespace, attack: str, server: Server) -> bool:
    """The turns of one attack; whether the bound was not kept."""
    added, errors = [], 0
    for turn in range(options.turns):
        alone, beside = run_part(options, None), run_part(options, attack)
        for line in (alone, beside):
            errors += line["errors"]
            say({"attack": attack, "turn": turn, **line})
        added.append(beside["longest_gap_s"] - alone["longest_gap_s"])
    median, alive = round(statistics.median(added), 3), server.is_alive(options.key)
    met = median <= options.bound and not errors and alive
    say({"attack": attack, "added_s": median, "bound_s": options.bound, "errors": errors, "alive": alive, "met": met})
    return not met
