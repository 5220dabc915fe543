"""What serving costs: the same requests in-process and over HTTP, by the same engine under the same flags.

    kvarena benchmark served --out served.jsonl

makes a directory of the Qwen3-0.6B shape with random weights, runs every level of
the load of `kvarena benchmark stream_load` in-process (the same prompts, the same closed loop, no web front), then
starts `kvarena serve` and runs the levels over HTTP, and prints JSON lines: one per part and level, then per level the
served share. `--load-script FILE` uses another load program with stream_load's flags and lines. Flags after `--` go to
`kvarena serve`, and to the in-process engine. A run fails when a request does; a bar that is missed is printed and does
not fail it.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from kvarena.engine.core import Engine
from kvarena.engine.errors import EngineError
from kvarena.engine.request import Request, SamplingParams
from kvarena.experiments.benchmarks.front import cpu_seconds
from kvarena.experiments.benchmarks.stream_load import TEMPERATURE, WARM_UP, Level, Row, Shape, line_of
from kvarena.experiments.models.shape import make_model_dir
from kvarena.experiments.serving.flags import overrides_of, parse_flags
from kvarena.experiments.serving.serve import build_served_engine
from kvarena.experiments.settings.compose import CONF_DIR, load_run
from kvarena.experiments.tools import tool_parser

Line = dict[str, Any]

SHAPE_FLAGS = (
    "--load-format", "dummy", "--dtype", "bfloat16", "--max-model-len", "8192", "--max-num-seqs", "256",
    "--no-enable-prefix-caching",
)  # fmt: skip
START_SECONDS = 300.0
LOAD_SECONDS = 400.0
STOP_SECONDS = 60.0
# The bar, at 256 clients of the Qwen3-0.6B shape on one H200.
BAR_CLIENTS, BAR_TOKENS_PER_SECOND, BAR_ITL_P99_MS, BAR_SHARE = 256, 22_000, 20.0, 0.92


@dataclass
class _Live:
    """A request in flight: its client's share of the level, and its times in seconds."""

    group: int
    start: float
    first: float = 0.0
    last: float = 0.0

    def row(self, num_tokens: int, gaps: list[float]) -> Row:
        return Row(self.start, self.first, self.last, self.last, num_tokens, gaps, "")


class ClosedLoop:
    """A level's requests on an engine, each group of clients starting its next request when one of its own has ended.

    Args:
        engine: idle.
        shape: of the requests.
        level: clients and requests.
        num_procs: groups, as the load's processes.
    """

    def __init__(self, engine: Engine, shape: Shape, level: Level, num_procs: int) -> None:
        self._engine, self._shape, self._level = engine, shape, level
        groups, self._clients, count = level.share(num_procs)
        self._prompts = [deque(shape.prompts(level, group, count)) for group in range(groups)]
        self._live: dict[Request, _Live] = {}
        self._gaps: dict[Request, list[float]] = {}
        self._rows: list[Row] = []
        self._numbers = itertools.count()

    def run(self) -> list[Row]:
        """Run all of them. Raises EngineError when one ends before its length."""
        for group in range(len(self._prompts)):
            for _ in range(self._clients):
                self._start(group)
        while self._engine.has_work:
            output = self._engine.step()
            if output is None:
                continue
            now = time.perf_counter()
            for (req, _, _), token in zip(output.plan.scheduled, output.result.token_ids, strict=True):
                if token is not None and req in self._live:
                    self._count(req, now)
            for req in output.finished:
                self._end(req)
        return self._rows

    def _start(self, group: int) -> None:
        if not self._prompts[group]:
            return
        sampling = SamplingParams(temperature=TEMPERATURE, max_tokens=self._shape.num_output_tokens, ignore_eos=True)
        req = Request(
            f"{self._level.num_clients}-{next(self._numbers)}", self._prompts[group].popleft(), sampling,
            arrival_time=self._engine.clock.now(),
        )  # fmt: skip
        self._live[req], self._gaps[req] = _Live(group, time.perf_counter()), []
        self._engine.add(req)

    def _count(self, req: Request, now: float) -> None:
        live = self._live[req]
        if live.first:
            self._gaps[req].append(now - live.last)
        else:
            live.first = now
        live.last = now

    def _end(self, req: Request) -> None:
        live = self._live.pop(req)
        if len(req.output_token_ids) != self._shape.num_output_tokens:
            raise EngineError(f"request {req.request_id} ended after {len(req.output_token_ids)} tokens")
        self._rows.append(live.row(len(req.output_token_ids), self._gaps.pop(req)))
        self._start(live.group)


def run_in_process(options: argparse.Namespace) -> Iterator[Line]:
    """The levels without a web front, on the engine that the server would build."""
    start = time.perf_counter()
    served = build_served_engine(load_run(overrides_of(parse_flags(serve_flags(options)))), {})
    gc.collect()
    gc.freeze()
    yield {"section": "start", "part": "in_process", "seconds": round(time.perf_counter() - start, 1)}
    shape = Shape(options.n_in, options.n_out, options.max_token_id)
    ClosedLoop(served.engine, shape, Level(*WARM_UP), options.procs).run()
    for level in options.levels:
        line = line_of(level, ClosedLoop(served.engine, shape, level, options.procs).run())
        yield {"section": "in_process", **line}


def serve_flags(options: argparse.Namespace) -> list[str]:
    """The model and flags of `kvarena serve`."""
    shape_flags = () if options.model else SHAPE_FLAGS
    return [str(options.directory), *shape_flags, *options.flags]


class Served:
    """`kvarena serve` in its own processes, with its log in `log`."""

    def __init__(self, flags: list[str], log: Path) -> None:
        command = [sys.executable, "-m", "kvarena", "serve", *flags, "--port", "0"]
        command += ["--api-key", "k", "--served-model-name", "m"]
        self._log = log
        with log.open("w") as file:
            self._process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)

    @property
    def pid(self) -> int:
        """Of the supervisor."""
        return self._process.pid

    def wait(self) -> str:
        """The address, once it answers. Raises EngineError with the end of the log."""
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline and self._process.poll() is None:
            match = re.search(r"Uvicorn running on (\S+)", self._log.read_text())
            if match:
                return match[1]
            time.sleep(0.05)
        self.stop()
        raise EngineError(f"the server did not start; the end of its log:\n{self._log.read_text()[-2000:]}")

    def stop(self) -> None:
        """End it."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                for child in psutil.Process(self.pid).children(recursive=True):
                    child.kill()
                self._process.kill()
                self._process.wait()


def run_served(options: argparse.Namespace, log: Path) -> Iterator[Line]:
    """The levels over HTTP, and the CPU seconds of the server's processes in each. Raises EngineError."""
    start = time.perf_counter()
    server = Served(serve_flags(options), log)
    try:
        url = server.wait()
        yield {"section": "start", "part": "served", "seconds": round(time.perf_counter() - start, 1)}
        for level in options.levels:
            before = cpu_seconds(server.pid)
            lines = _load(options, url, level)
            after = cpu_seconds(server.pid)
            spent = {f"{role}_cpu_s": round(after[role] - before[role], 2) for role in after}
            # A load program may show its warm-up, too: the level's line is the last with its number of clients.
            line = [line for line in lines if line.get("concurrency") == level.num_clients][-1]
            yield {"section": "served", **line, **spent}
    finally:
        server.stop()


def _load(options: argparse.Namespace, url: str, level: Level) -> list[Line]:
    program = [str(options.load_script)] if options.load_script else ["-m", "kvarena", "benchmark", "stream_load"]
    command = [sys.executable, *program, "--url", url, "--model", "m", "--key", "k", "--procs", str(options.procs)]
    command += ["--n-in", str(options.n_in), "--n-out", str(options.n_out)]
    command += ["--levels", f"{level.num_clients}:{level.num_requests}"]
    if not options.load_script:
        command += ["--max-token-id", str(options.max_token_id)]
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False, timeout=LOAD_SECONDS)
    except subprocess.TimeoutExpired as error:
        raise EngineError(f"the load of {level.num_clients} clients did not end in {LOAD_SECONDS:g} s") from error
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    if not any(line.get("concurrency") == level.num_clients for line in lines):
        raise EngineError(f"the load of {level.num_clients} clients ended with code {done.returncode} and no figures")
    return lines


def shares(lines: list[Line]) -> Iterator[Line]:
    """Per number of clients: medians over its levels of both parts, the served share, and the bar where it applies."""
    for clients in sorted({line["concurrency"] for line in lines if "concurrency" in line}):
        speeds = {
            part: statistics.median(
                line["out_tok_per_s"] for line in lines if line["section"] == part and line["concurrency"] == clients
            )
            for part in ("in_process", "served")
        }
        gaps = [line["itl_p99_ms"] for line in lines if line["section"] == "served" and line["concurrency"] == clients]
        share = speeds["served"] / speeds["in_process"]
        made: Line = {"section": "share", "concurrency": clients, **speeds, "served_share": round(share, 4)}
        if clients == BAR_CLIENTS:
            made["bar"] = {
                "out_tok_per_s": speeds["served"] >= BAR_TOKENS_PER_SECOND,
                "itl_p99_ms": max(gaps) < BAR_ITL_P99_MS,
                "served_share": share >= BAR_SHARE,
            }
        yield made


def _parts(options: argparse.Namespace, folder: Path) -> Iterator[Line]:
    """All lines. The in-process part has a process of its own, so that its memory is free when the server starts."""
    own = [sys.executable, "-m", "kvarena", "benchmark", "served", *options.given, "--part", "in-process"]
    own += ["--directory", str(options.directory), "--", *options.flags]
    lines: list[Line] = []
    with subprocess.Popen(own, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for text in process.stdout:
            if text.startswith("{"):
                lines.append(json.loads(text))
                yield lines[-1]
    if process.returncode:
        raise EngineError(f"the in-process part ended with code {process.returncode}")
    for line in run_served(options, folder / "server.log"):
        lines.append(line)
        yield line
    yield from shares(lines)


def main(argv: Sequence[str]) -> int:
    """Run the parts; returns the exit code."""
    given = list(argv)
    given, flags = (given[: given.index("--")], given[given.index("--") + 1 :]) if "--" in given else (given, [])
    parser = tool_parser(__name__, __doc__)
    parser.add_argument(
        "--shape",
        type=Path,
        default=CONF_DIR / "model" / "qwen3-0.6b-shape.yaml",
        help="a file of conf/model with a shape",
    )
    parser.add_argument("--model", type=Path, help="a model directory in place of the shape")
    parser.add_argument(
        "--levels", type=Level.parse, default="1:4,32:128,256:768,256:768", help="CLIENTS:REQUESTS, separated by commas"
    )
    parser.add_argument("--n-in", type=int, default=512, help="prompt tokens")
    parser.add_argument("--n-out", type=int, default=256, help="output tokens")
    parser.add_argument("--max-token-id", type=int, default=10000, help="largest token id in a prompt")
    parser.add_argument("--procs", type=int, default=6, help="client processes")
    parser.add_argument("--load-script", type=Path, help="another load program")
    parser.add_argument("--out", type=Path, help="a file that gets every line, too")
    parser.add_argument("--directory", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--part", choices=("in-process",), help=argparse.SUPPRESS)
    options = parser.parse_args(given)
    options.flags = flags
    if options.part:
        return _print(run_in_process(options), None)
    with tempfile.TemporaryDirectory(prefix="kvarena-served-") as folder:
        options.directory = options.model or make_model_dir(options.shape, Path(folder) / "model")
        options.given = given
        return _print(_parts(options, Path(folder)), options.out)


def _print(lines: Iterator[Line], out: Path | None) -> int:
    """Print lines as they come; 1 when a request failed."""
    failed = False
    for line in lines:
        failed |= bool(line.get("errors"))
        print(json.dumps(line), flush=True)
        if out is not None:
            with out.open("a") as file:
                file.write(json.dumps(line) + "\n")
    return int(failed)
