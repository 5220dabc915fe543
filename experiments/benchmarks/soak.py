"""A soak of a running server: a closed loop of streaming clients of which some hang up, and what leaks meanwhile.

    kvarena serve models/demo --port 8000 --disable-access-log &
    kvarena benchmark soak --url http://127.0.0.1:8000 --pid $! --out soak

Each client streams one request after the other; every tenth is dropped somewhere in its stream. Once a second the
resident memory of every server process, open files, the gauges and the ledger are written to `soak.csv`. At the end the
pool must be whole, no request may have failed, and memory must be flat: the mean of the last quarter against that of
the second quarter (the first is warm-up). The last line of stdout is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from kvarena.engine.classes import OWNED
from kvarena.engine.errors import EngineError
from kvarena.engine.request import SamplingParams
from kvarena.experiments.load.connection import HttpClient, run_async
from kvarena.experiments.load.http_client import Answer, HttpServer
from kvarena.experiments.load.http_metrics import ask_gauges
from kvarena.experiments.serving.child import parts_of
from kvarena.experiments.tools import tool_parser
from kvarena.reports.drawing.style import SERIES, drawing, grid, new_figure, save_png, thousands
from kvarena.reports.reading.writing import write_csv

MEMORY_BOUND = 0.02
DRAIN_SECONDS = 20.0


@dataclass
class Counts:
    """What happened so far."""

    finished: int = 0
    aborted: int = 0
    tokens: int = 0
    errors: list[str] = field(default_factory=list)


async def client(server: HttpServer, seed: int, until: float, counts: Counts, abort_share: float) -> None:
    """A closed loop of streams, some of which are hung up on after a few chunks."""
    rng = random.Random(seed)
    while time.monotonic() < until:
        aborts = rng.random() < abort_share
        prompt = [rng.randint(10, 2000) for _ in range(rng.randint(4, 200))]
        sampling = SamplingParams(temperature=0.8, max_tokens=rng.randint(8, 128))
        answer = await server.complete(prompt, sampling, Answer(hang_up_after=rng.randint(0, 4) if aborts else None))
        counts.tokens += len(answer.chunk_times)
        counts.aborted += answer.is_cut
        if answer.error:
            counts.errors.append(answer.error)
        elif not answer.is_cut:
            counts.finished += 1


async def sample(http: HttpClient, pid: int, until: float, counts: Counts, rows: list[dict[str, Any]]) -> None:
    """A row per second."""
    start = time.monotonic()
    watched = parts_of(pid)
    while time.monotonic() < until:
        gauges = await ask_gauges(http)
        row: dict[str, Any] = {
            "seconds": round(time.monotonic() - start, 2),
            "rss_bytes": sum(process.memory_info().rss for process in watched),
            "num_fds": sum(process.num_fds() for process in watched),
            "num_threads": sum(process.num_threads() for process in watched),
            "running": gauges["num_running"],
            "waiting": gauges["num_waiting"],
            "kv_usage": gauges["kv_usage"],
            "finished": counts.finished,
            "aborted": counts.aborted,
            "tokens": counts.tokens,
            "errors": len(counts.errors),
        }
        for index, process in enumerate(watched):
            row[f"rss_{index}"] = process.memory_info().rss
        rows.append(row)
        await asyncio.sleep(1.0)


async def drained(http: HttpClient) -> dict[str, float]:
    """Wait until nothing runs; the gauges then."""
    deadline = time.monotonic() + DRAIN_SECONDS
    while True:
        gauges = await ask_gauges(http)
        busy = gauges["num_running"] + gauges["num_waiting"]
        owned = sum(gauges[name] for name in OWNED)
        if not (busy or owned) or time.monotonic() > deadline:
            return gauges | {"owned_slots": owned}
        await asyncio.sleep(0.3)


def growth(rows: list[dict[str, Any]]) -> float:
    """Relative growth of resident memory from the second to the last quarter."""
    quarter = len(rows) // 4
    early = [row["rss_bytes"] for row in rows[quarter : 2 * quarter]]
    late = [row["rss_bytes"] for row in rows[-quarter:]]
    return (sum(late) / len(late)) / (sum(early) / len(early)) - 1


def plot(rows: list[dict[str, Any]], path: Path, title: str) -> None:
    """Memory by process, load, pool, files and threads over time, one below the other."""
    at = [row["seconds"] for row in rows]
    names = ("supervisor", "engine", *(f"front {i}" for i in range(sum(key.startswith("rss_") for key in rows[0]) - 3)))
    panels: tuple[tuple[str, list[tuple[str, list[float]]]], ...] = (
        ("MiB resident", [(name, [row[f"rss_{i}"] / 2**20 for row in rows]) for i, name in enumerate(names)]),
        ("requests", [(key, [row[key] for row in rows]) for key in ("running", "waiting")]),
        ("% of the KV pool owned", [("", [100 * row["kv_usage"] for row in rows])]),
        ("of all processes", [(label, [row[key] for row in rows]) for key, label in
                              (("num_fds", "open files"), ("num_threads", "threads"))]),
    )  # fmt: skip
    with drawing():
        figure = new_figure(7.6)
        all_axes = figure.subplots(len(panels), 1, sharex=True)
        for axes, (unit, lines) in zip(all_axes, panels, strict=True):
            for look, (label, values) in zip(SERIES, lines, strict=False):
                axes.plot(at, values, color=look.color, linestyle=look.dash, label=label)
            axes.set_ylabel(unit)
            axes.set_ylim(bottom=0)
            grid(axes)
            thousands(axes)
            if len(lines) > 1:
                axes.legend(ncols=len(lines), loc="lower right", bbox_to_anchor=(1, 1))
        all_axes[0].set_title(title)
        all_axes[-1].set_xlabel("seconds")
        save_png(figure, path)


async def soak(options: argparse.Namespace) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Run it; the summary and the rows."""
    counts = Counts()
    rows: list[dict[str, Any]] = []
    until = time.monotonic() + options.seconds
    http = HttpClient(options.url, {"Content-Type": "application/json"}, keeps=False)
    server = HttpServer(http, None, {"ignore_eos": True})
    clients = [client(server, i, until, counts, options.abort_share) for i in range(options.clients)]
    await asyncio.gather(sample(http, options.pid, until, counts, rows), *clients)
    gauges = await drained(http)
    summary = {
        "seconds": options.seconds,
        "clients": options.clients,
        "finished": counts.finished,
        "aborted": counts.aborted,
        "tokens": counts.tokens,
        "errors": len(counts.errors),
        "first_error": counts.errors[0] if counts.errors else None,
        "leaked_slots": gauges["owned_slots"],
        "memory_growth": round(growth(rows), 5),
        "rss_mib_last": round(rows[-1]["rss_bytes"] / 2**20),
        "fds_first_last": [rows[len(rows) // 4]["num_fds"], rows[-1]["num_fds"]],
        "threads_first_last": [rows[len(rows) // 4]["num_threads"], rows[-1]["num_threads"]],
    }
    summary["ok"] = not counts.errors and not gauges["owned_slots"] and summary["memory_growth"] < MEMORY_BOUND
    return summary, rows


def main(argv: Sequence[str]) -> int:
    """Soak a server; 1 when it failed."""
    parser = tool_parser(__name__, __doc__)
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="of the server")
    parser.add_argument("--pid", type=int, required=True, help="of the server's supervisor")
    parser.add_argument("--clients", type=int, default=256, help="streams at a time")
    parser.add_argument("--seconds", type=float, default=600.0, help="how long")
    parser.add_argument("--abort-share", type=float, default=0.1, help="share of requests that are hung up on")
    parser.add_argument("--out", type=Path, default=Path("soak"), help="folder of soak.csv, soak.json and soak.png")
    options = parser.parse_args(argv)
    try:
        summary, rows = run_async(soak(options))
    except (OSError, psutil.Error) as error:
        raise EngineError(f"--url {options.url} or --pid {options.pid} is no server that runs ({error})") from error
    options.out.mkdir(parents=True, exist_ok=True)
    write_csv(options.out / "soak.csv", rows, rows[0])
    title = f"{options.clients} clients, {summary['finished']:,} requests finished, {summary['aborted']:,} hung up"
    plot(rows, options.out / "soak.png", title)
    (options.out / "soak.json").write_text(json.dumps(summary, indent=2) + "\n")
    print(json.dumps(summary))
    return 0 if summary["ok"] else 1
