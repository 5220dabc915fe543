"""What recording costs a run: alternating rounds of everything recorded, nothing recorded, and the bare engine.

    kvarena benchmark recording --shape qwen3-0.6b       # on a GPU
    kvarena benchmark recording                          # the demo model, here

One process, one model, one pool, one runner; 256 requests that all arrive at once (workload (a) of
kvarena.experiments.gpu.floors; of the demo model shorter ones). `all`: the driver with the progress bar and the
recording of a run of the main job; `none`: the same with `driver.record=none`; `bare`: engine, scheduler and allocator
stepped by a loop, with neither driver nor recorder. One JSON line per run, and a last one with the ratios of rounds,
their mean and its 95 % interval by Student's t, and where the time of a step goes.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kvarena.engine.core import Engine
from kvarena.engine.ledger import MemoryLedger
from kvarena.engine.request import Request, SamplingParams
from kvarena.engine.runner.fused_runner import FusedRunner
from kvarena.experiments.building.parts import EngineParts
from kvarena.experiments.folders.provenance import git_state, machine
from kvarena.experiments.gpu.engines import Engines, runner_of
from kvarena.experiments.gpu.floors import SHAPES, offline_workload
from kvarena.experiments.jobs.output import Progress
from kvarena.experiments.load.driver import drive
from kvarena.experiments.recording.recording import Recording
from kvarena.experiments.tools import tool_parser

Line = dict[str, Any]
MODES = ("all", "none", "bare")
DEMO_SLOTS = 256 * 12 * 16  # that all requests run at once


@dataclass
class Bench:
    """What every run shares.

    Attributes:
        engines: of one setting, so that all have the same runner.
        requests: makes the workload anew.
    """

    engines: Engines
    requests: Callable[[], list[Request]]

    def run(self, mode: str) -> Line:
        """One run to the end of its requests."""
        engine, requests = self.engines.build().engine, self.requests()
        engine.ledger = MemoryLedger() if mode == "all" else None
        gc.collect()
        gc.freeze()
        try:
            line = self._bare(engine, requests) if mode == "bare" else self._driven(mode, engine, requests)
        finally:
            gc.unfreeze()
        tokens = sum(len(req.output_token_ids) for req in requests)
        return {
            "mode": mode,
            "output_tokens": tokens,
            "output_tokens_per_s": round(tokens / line["wall"], 1),
            "processor_us_per_token": round(1e6 * line["processor"] / tokens, 3),
        } | line

    def _bare(self, engine: Engine, requests: list[Request]) -> Line:
        wall, processor = time.perf_counter(), time.process_time()
        for req in requests:
            engine.add(req)
        while engine.has_work:
            engine.step()
        return {"wall": time.perf_counter() - wall, "processor": time.process_time() - processor}

    def _driven(self, mode: str, engine: Engine, requests: list[Request]) -> Line:
        recording = Recording(engine, level="full" if mode == "all" else "none", kv_map=True, measured=True)
        progress = Progress(mode, len(requests), enabled=True)
        engine.clock.reset()
        wall, processor = time.perf_counter(), time.process_time()
        with recording:
            drive(engine, requests, recording, on_progress=progress)
        line = {"wall": time.perf_counter() - wall, "processor": time.process_time() - processor}
        progress.finish(recording)
        facts = recording.facts()
        steps = facts["num_steps"]
        line |= {"steps": steps, "recording_share": round(facts["recording"]["share"], 5)}
        line["recording_us_per_step"] = round(1e6 * facts["recording"]["seconds"] / steps, 1)
        if mode == "all" and _has_pyarrow():
            with tempfile.TemporaryDirectory() as folder:
                start = time.perf_counter()
                recording.write(Path(folder))
                line["write_seconds_after_the_run"] = round(time.perf_counter() - start, 3)
        return line


def _has_pyarrow() -> bool:
    try:
        import pyarrow  # noqa: F401
    except ImportError:
        return False
    return True


def make_bench(shape: str, num_slots: int, overrides: Sequence[str] = ()) -> tuple[Bench, EngineParts]:
    """The engine of this machine, warm, and the parts of it that watch a GPU's memory."""
    settings = ("scheduler.max_num_seqs=256", f"kv_cache.num_slots={num_slots}")
    engines = Engines(shape, *settings, *(("engine.overlap=false",) if shape == "demo" else ()), *overrides)
    parts = engines.build()
    if isinstance(runner := runner_of(parts), FusedRunner):
        runner.warm_up(256, 8192)
    return Bench(engines, short_requests if shape == "demo" else offline_workload), parts


def short_requests() -> list[Request]:
    """256 that all run to the same length, so that all run all the time."""
    sampling = SamplingParams(max_tokens=96, ignore_eos=True)
    return [Request(f"a{i}", [1 + (7 * i + j) % 200 for j in range(16 + i % 32)], sampling) for i in range(256)]


def ratio(lines: Sequence[Line], mode: str, base: str, key: str) -> Line:
    """The ratio of two modes, round by round: its mean and 95 % interval (Student's t); one round has no interval."""
    of_mode, of_base = ([line[key] for line in lines if line["mode"] == name] for name in (mode, base))
    ratios = [ours / theirs for ours, theirs in zip(of_mode, of_base, strict=True)]
    entry: Line = {"mean": round(statistics.fmean(ratios), 4), "rounds": [round(value, 4) for value in ratios]}
    if len(ratios) > 1:
        # Imported here: a machine that only measures need not have scipy.
        from kvarena.reports.analysis.intervals import StudentMean

        entry["ci95"] = [round(end, 4) for end in StudentMean.of(ratios).interval]
    return entry


def summarize(lines: Sequence[Line], steps: int) -> Line:
    """The last line: ratios of throughput and of processor time, and what lies between bare engine and run."""

    def median(mode: str, key: str) -> float:
        return float(np.median([line[key] for line in lines if line["mode"] == mode]))

    per_step = {mode: 1e6 * median(mode, "wall") / steps for mode in MODES}
    return {
        "section": "result",
        "tokens_per_s": {mode: round(median(mode, "output_tokens_per_s"), 1) for mode in MODES},
        "processor_us_per_token": {mode: round(median(mode, "processor_us_per_token"), 3) for mode in MODES},
        "all_over_none": ratio(lines, "all", "none", "output_tokens_per_s"),
        "all_over_bare": ratio(lines, "all", "bare", "output_tokens_per_s"),
        "none_over_bare": ratio(lines, "none", "bare", "output_tokens_per_s"),
        "processor_none_over_all": ratio(lines, "none", "all", "processor_us_per_token"),
        "us_per_step": {
            "bare": round(per_step["bare"], 1),
            "driver, progress bar and totals": round(per_step["none"] - per_step["bare"], 1),
            "recording, as it shows": round(per_step["all"] - per_step["none"], 1),
            "recording, as it is charged": median("all", "recording_us_per_step"),
        },
        "recording_share": median("all", "recording_share"),
    }


def main(argv: Sequence[str]) -> int:
    """The command line; see the module's docstring."""
    parser = tool_parser(__name__, __doc__)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="what runs")
    parser.add_argument("--shape", default="demo", choices=("demo", *SHAPES), help="of the model")
    parser.add_argument("--rounds", type=int, default=5, help="of the three kinds of run")
    parser.add_argument("--slots", type=int, default=327_680, help="of the KV pool of a shape")
    parser.add_argument("--out", type=Path, help="a file that gets every line, too")
    parser.add_argument("overrides", nargs="*", help="further settings of the engine, as of run.py")
    args = parser.parse_args(argv)
    lines = list(_measure(args))
    if args.out:
        args.out.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return 0


def _measure(args: argparse.Namespace) -> list[Line]:
    slots = DEMO_SLOTS if args.shape == "demo" else args.slots
    bench, parts = make_bench(args.shape, slots, [f"engine.device={args.device}", *args.overrides])
    memory, model = parts.gpu_memory, parts.model
    found: list[Line] = []

    def say(line: Line) -> None:
        found.append(line)
        print(json.dumps(line), flush=True)

    say(
        {
            "section": "setting",
            "device": str(runner_of(parts).pool.device),
            "shape": args.shape,
            "git": git_state(),
            "machine": machine(),
        }
    )
    bench.run("bare")  # compiles and captures what the runs need
    if memory is not None and model is not None:
        memory.begin(model.modules, model.image_cache_bytes)
    for index in range(args.rounds):
        # In turn, and each round begins with another one: a drift of the machine falls on all alike.
        for mode in (MODES[(index + i) % len(MODES)] for i in range(len(MODES))):
            say({"section": "run", "round": index} | bench.run(mode))
    if memory is not None:
        say({"section": "memory", **memory.parts()})
    runs = [line for line in found if line["section"] == "run"]
    say(summarize(runs, next(line["steps"] for line in runs if line["mode"] == "none")))
    return found
