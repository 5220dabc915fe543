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
import statistics
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from kvarena.engine.core import Engine
from kvarena.engine.errors import ConfigError, EngineError
from kvarena.engine.request import Request, SamplingParams
from kvarena.experiments.benchmarks.stream_load import TEMPERATURE, WARM_UP, Level, Shape, line_of
from kvarena.experiments.load.http_client import Answer
from kvarena.experiments.models.shape import make_model_dir
from kvarena.experiments.serving.child import Server
from kvarena.experiments.serving.flags import overrides_of, parse_flags
from kvarena.experiments.serving.serve import build_served_engine
from kvarena.experiments.settings.compose import CONF_DIR, load_run
from kvarena.experiments.tools import say_all, split_arguments, tool_parser

Line = dict[str, Any]

SHAPE_FLAGS = (
    "--load-format", "dummy", "--dtype", "bfloat16", "--max-model-len", "8192", "--max-num-seqs", "256",
    "--no-enable-prefix-caching",
)  # fmt: skip
KEY = "k"
LOAD_SECONDS = 400.0
# The bar, at 256 clients of the Qwen3-0.6B shape on one H200.
BAR_CLIENTS, BAR_TOKENS_PER_SECOND, BAR_ITL_P99_MS, BAR_SHARE = 256, 22_000, 20.0, 0.92


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
        self._live: dict[Request, tuple[int, Answer]] = {}
        self._answers: list[Answer] = []
        self._numbers = itertools.count()

    def run(self) -> list[Answer]:
        """Run all of them; what each would have heard. Raises EngineError when one ends before its length."""
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
                    self._live[req][1].chunk_times.append(now)
            for req in output.finished:
                self._end(req)
        return self._answers

    def _start(self, group: int) -> None:
        if not self._prompts[group]:
            return
        sampling = SamplingParams(temperature=TEMPERATURE, max_tokens=self._shape.num_output_tokens, ignore_eos=True)
        req = Request(
            f"{self._level.num_clients}-{next(self._numbers)}", self._prompts[group].popleft(), sampling,
            arrival_time=self._engine.clock.now(),
        )  # fmt: skip
        self._live[req] = group, Answer(start=time.perf_counter())
        self._engine.add(req)

    def _end(self, req: Request) -> None:
        group, answer = self._live.pop(req)
        if len(req.output_token_ids) != self._shape.num_output_tokens:
            raise EngineError(f"request {req.request_id} ended after {len(req.output_token_ids)} tokens")
        answer.end = answer.chunk_times[-1]
        self._answers.append(answer)
        self._start(group)


def check_token_ids(largest: int, vocab_size: int) -> None:
    """Raise ConfigError where prompts would hold tokens that the model has not."""
    if largest >= vocab_size:
        raise ConfigError(f"--max-token-id {largest}: this model's ids end at {vocab_size - 1}; give at most that")


def run_in_process(options: argparse.Namespace) -> Iterator[Line]:
    """The levels without a web front, on the engine that the server would build."""
    start = time.perf_counter()
    served = build_served_engine(load_run(overrides_of(parse_flags(serve_flags(options)))), {})
    check_token_ids(options.max_token_id, served.info.vocab_size)
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


def run_served(options: argparse.Namespace) -> Iterator[Line]:
    """The levels over HTTP, and the CPU seconds of the server's processes in each. Raises EngineError."""
    start = time.perf_counter()
    server = Server([*serve_flags(options), "--served-model-name", "m"], KEY)
    try:
        yield {"section": "start", "part": "served", "seconds": round(time.perf_counter() - start, 1)}
        for level in options.levels:
            before = server.cpu_seconds()
            lines = _load(options, server.url, level)
            after = server.cpu_seconds()
            spent = {f"{role}_cpu_s": round(after[role] - before[role], 2) for role in after}
            # A load program may show its warm-up, too: the level's line is the last with its number of clients.
            line = [line for line in lines if line.get("concurrency") == level.num_clients][-1]
            yield {"section": "served", **line, **spent}
    finally:
        server.stop()


def _load(options: argparse.Namespace, url: str, level: Level) -> list[Line]:
    program = [str(options.load_script)] if options.load_script else ["-m", "kvarena", "benchmark", "stream_load"]
    command = [sys.executable, *program, "--url", url, "--model", "m", "--key", KEY, "--procs", str(options.procs)]
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


def _parts(options: argparse.Namespace) -> Iterator[Line]:
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
    for line in run_served(options):
        lines.append(line)
        yield line
    yield from shares(lines)


def main(argv: Sequence[str]) -> int:
    """Run the parts; returns the exit code."""
    given, flags = split_arguments(argv)
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
        return say_all(run_in_process(options), None, "errors")
    with tempfile.TemporaryDirectory(prefix="kvarena-served-") as folder:
        options.directory = options.model or make_model_dir(options.shape, Path(folder) / "model")
        options.given = given
        return say_all(_parts(options), options.out, "errors")
