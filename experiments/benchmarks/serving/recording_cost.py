"""What recording costs a server's engine: alternating rounds of two servers, one that records and one that does not.

    kvarena benchmark recording_cost --rounds 10

Both serve the same model under the same flags and are there all the time; in each round both get the same load, one
after the other, in turned order. `on`: the ledger checks every step, and all is recorded (`--record`); `off`: neither.
A round's figure is processor time of the engine's process, all its threads, per output token. One JSON line per round
and server, and a last one with the ratios on / off: their mean and its 95 % interval by Student's t. Exit code 1 when
the mean is above 1.01 or the interval ends above 1.02. Flags after `--` go to both servers.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil

from kvarena.engine.errors import EngineError
from kvarena.engine.request import SamplingParams
from kvarena.experiments.folders.provenance import git_state, machine
from kvarena.experiments.load.connection import HttpClient, in_turns, run_async
from kvarena.experiments.load.http_client import HttpServer
from kvarena.experiments.serving.child import Server, parts_of
from kvarena.experiments.tools import say, split_arguments, tool_parser

KEY = "k"
MODES = ("off", "on")
MOST, MOST_UPPER = 1.01, 1.02
Line = dict[str, Any]


def engine_seconds(server: Server) -> float:
    """Processor time of the engine's process so far: of each thread in nanoseconds, where the system tells."""
    engine = parts_of(server.process.pid)[1]
    tasks = Path(f"/proc/{engine.pid}/task")
    try:
        return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks.iterdir()) / 1e9
    except OSError:
        return float(sum(engine.cpu_times()[:2]))


def writer_seconds(server: Server) -> float:
    """Processor time of the processes that the engine has started: who writes the recording."""
    engine = parts_of(server.process.pid)[1]
    return float(sum(sum(child.cpu_times()[:2]) for child in psutil.Process(engine.pid).children(recursive=True)))


def load(server: Server, options: argparse.Namespace, seed: int) -> int:
    """A closed loop of clients; the output tokens. Raises EngineError when a request fails."""
    source, made = random.Random(seed), 0
    prompts = [[source.randint(10, options.max_token_id) for _ in range(options.n_in)] for _ in range(options.requests)]
    sampling = SamplingParams(temperature=0.6, max_tokens=options.n_out)
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}

    async def run() -> None:
        with contextlib.closing(HttpClient(server.url, headers)) as client:
            http = HttpServer(client, None, {"ignore_eos": True})

            async def send(prompt: list[int]) -> None:
                nonlocal made
                answer = await http.complete(prompt, sampling)
                if answer.error:
                    raise EngineError(f"a request failed: {answer.error}")
                made += answer.num_tokens

            await in_turns(options.clients, iter(prompts), send)

    run_async(run())
    return made


def measure(servers: dict[str, Server], options: argparse.Namespace) -> Iterator[Line]:
    """A line for each round and server, after one round that is not shown."""
    for index in range(-1, options.rounds):
        for mode in MODES if index % 2 else MODES[::-1]:
            before, writer = engine_seconds(servers[mode]), writer_seconds(servers[mode])
            tokens = load(servers[mode], options, seed=index)
            seconds = engine_seconds(servers[mode]) - before
            if index >= 0:
                yield {
                    "section": "round", "round": index, "mode": mode, "output_tokens": tokens,
                    "engine_us_per_token": 1e6 * seconds / tokens,
                    "writer_us_per_token": 1e6 * (writer_seconds(servers[mode]) - writer) / tokens,
                }  # fmt: skip


def summarize(lines: Sequence[Line]) -> Line:
    """The ratios, and whether they are within the bars."""
    from kvarena.reports.analysis.intervals import StudentMean  # scipy

    of = {mode: [line["engine_us_per_token"] for line in lines if line["mode"] == mode] for mode in MODES}
    mean = StudentMean.of([on / off for on, off in zip(of["on"], of["off"], strict=True)])
    low, high = mean.interval
    return {
        "section": "result",
        "engine_us_per_token": {mode: round(statistics.median(of[mode]), 2) for mode in MODES},
        "writer_us_per_token": round(
            statistics.median(line["writer_us_per_token"] for line in lines if line["mode"] == "on"), 2
        ),
        "on_over_off": {"mean": round(mean.value, 4), "ci95": [round(low, 4), round(high, 4)]},
        "within": mean.value <= MOST and high <= MOST_UPPER,
    }  # fmt: skip


def main(argv: Sequence[str]) -> int:
    """Measure and print; see the module's docstring."""
    given, flags = split_arguments(argv)
    parser = tool_parser(__name__, __doc__)
    parser.add_argument("--model", default="models/demo", help="a model directory")
    parser.add_argument("--rounds", type=int, default=10, help="of both servers, at least 2")
    parser.add_argument("--clients", type=int, default=256, help="at a time")
    parser.add_argument("--requests", type=int, default=512, help="of a round and server")
    parser.add_argument("--n-in", type=int, default=32, help="prompt tokens")
    parser.add_argument("--n-out", type=int, default=64, help="output tokens")
    parser.add_argument("--max-token-id", type=int, default=2000, help="largest token id in a prompt")
    parser.add_argument("--out", type=Path, help="a file that gets every line, too")
    options = parser.parse_args(given)
    common = [options.model, "--max-model-len", "2048", "--served-model-name", "m", "--disable-access-log", *flags]
    lines: list[Line] = []
    with tempfile.TemporaryDirectory(prefix="kvarena-recorded-") as folder, contextlib.ExitStack() as stack:
        servers = {}
        for mode, own in (("off", ["--set", "server.ledger=false"]), ("on", ["--record", folder])):
            servers[mode] = Server([*common, *own], KEY)
            stack.callback(servers[mode].stop)
        shape = {name: getattr(options, name) for name in ("clients", "requests", "n_in", "n_out")}
        say({"section": "setting", **shape, "flags": flags, "git": git_state(), "machine": machine()}, options.out)
        for line in measure(servers, options):
            lines.append(line)
            say(line, options.out)
    found = summarize(lines)
    say(found, options.out)
    return 0 if found["within"] else 1
