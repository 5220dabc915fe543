"""What recording costs a run: alternating rounds of everything recorded, nothing recorded, and the bare engine.

    kvarena benchmark recording --device cuda --shape qwen3-0.6b       # on a GPU
    kvarena benchmark recording --device cpu --shape demo              # here

One process, one model, one pool, one runner; 256 requests that all arrive at once (workload (a) of
kvarena.experiments.gpu.shapes, shorter on a CPU). `all`: the driver with the progress bar and the recording of a run of
the main job; `none`: the same with `driver.record=none`; `bare`: engine, scheduler and allocator stepped by a loop,
with neither driver nor recorder. One JSON line per run, and a last one with the ratios of rounds, their mean and its 95
% interval by Student's t, and where the time of a step goes. Needs no Hydra.
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
import torch

from kvarena.allocators.paged import PagedAllocator
from kvarena.engine.clock import WallClock
from kvarena.engine.core import Engine
from kvarena.engine.ledger import MemoryLedger
from kvarena.engine.model_runner import ModelRunner
from kvarena.engine.models import load_model
from kvarena.engine.pool.gpu_memory import GpuMemory
from kvarena.engine.pool.kv_pool import KVPool
from kvarena.engine.request import Request, SamplingParams
from kvarena.engine.runner.torch_runner import TorchRunner
from kvarena.experiments.folders.provenance import git_state, machine
from kvarena.experiments.gpu.engines import BLOCK_SIZE, Levers, make_bed
from kvarena.experiments.gpu.shapes import SHAPES, offline_workload
from kvarena.experiments.gpu.timing import require_cuda
from kvarena.experiments.jobs.output import Progress
from kvarena.experiments.load.driver import drive
from kvarena.experiments.recording.recording import Recording
from kvarena.experiments.tools import tool_parser
from kvarena.schedulers.continuous import ContinuousScheduler

Line = dict[str, Any]
MODES = ("all", "none", "bare")
MAX_MODEL_LEN = 8192


@dataclass
class Bench:
    """What every run shares.

    Attributes:
        runner: with its model and pool.
        num_blocks: of the pool.
        requests: makes the workload anew.
        overlap: plan a step while the one before runs.
        budget: most tokens of a step.
    """

    runner: ModelRunner
    num_blocks: int
    requests: Callable[[], list[Request]]
    overlap: bool
    budget: int

    def engine(self, *, ledger: bool) -> Engine:
        """A fresh engine over an empty pool."""
        allocator = PagedAllocator(num_blocks=self.num_blocks, block_size=BLOCK_SIZE, max_model_len=MAX_MODEL_LEN)
        scheduler = ContinuousScheduler(
            allocator, max_model_len=MAX_MODEL_LEN, max_num_seqs=256, max_num_batched_tokens=self.budget
        )
        accounts = MemoryLedger() if ledger else None
        return Engine(scheduler, allocator, self.runner, WallClock(), overlap=self.overlap, ledger=accounts)

    def run(self, mode: str) -> Line:
        """One run to the end of its requests."""
        engine, requests = self.engine(ledger=mode == "all"), self.requests()
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


def on_gpu(shape: str, num_slots: int) -> tuple[Bench, GpuMemory, torch.nn.Module]:
    """The GPU's engine, warm, as kvarena.experiments.benchmarks.engine makes it for workload (a)."""
    device = require_cuda()
    memory = GpuMemory(device)
    bed = make_bed(shape, num_slots, None)
    memory.set_pool(bed.pool, bed.pool.num_bytes)
    runner = bed.runner(Levers(), max_num_seqs=256)
    runner.warm_up(256)
    return Bench(runner, bed.pool.num_blocks, offline_workload, True, 8192), memory, bed.model.module


def on_cpu(shape: str) -> Bench:
    """The plain runner in float32 on the demo model or a small shape."""
    source = {"path": "models/demo"} if shape == "demo" else {"shape": SHAPES[shape]}
    model = load_model(**source, dtype="float32", device="cpu", load_format="auto" if shape == "demo" else "dummy")
    spec = model.spec
    num_blocks = 256 * 12
    pool = KVPool(
        num_blocks=num_blocks, block_size=BLOCK_SIZE, num_layers=spec.num_layers, num_kv_heads=spec.num_kv_heads,
        head_dim=spec.head_dim, dtype=spec.dtype, device="cpu",
    )  # fmt: skip

    def requests() -> list[Request]:
        # All run to the same length, so that 256 run all the time.
        sampling = SamplingParams(max_tokens=96, ignore_eos=True)
        return [Request(f"a{i}", [1 + (7 * i + j) % 200 for j in range(16 + i % 32)], sampling) for i in range(256)]

    return Bench(TorchRunner(model, pool), num_blocks, requests, overlap=False, budget=8192)


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
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="what runs")
    parser.add_argument("--shape", default="demo", choices=("demo", *sorted(SHAPES)), help="of the model")
    parser.add_argument("--rounds", type=int, default=5, help="of the three kinds of run")
    parser.add_argument("--slots", type=int, default=327_680, help="of the KV pool on a GPU")
    parser.add_argument("--out", type=Path, help="a file that gets every line, too")
    args = parser.parse_args(argv)
    lines = list(_measure(args))
    if args.out:
        args.out.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return 0


def _measure(args: argparse.Namespace) -> list[Line]:
    memory = module = None
    if args.device == "cuda":
        bench, memory, module = on_gpu(args.shape, args.slots)
    else:
        bench = on_cpu(args.shape)
    found: list[Line] = []

    def say(line: Line) -> None:
        found.append(line)
        print(json.dumps(line), flush=True)

    say({"section": "setting", "device": args.device, "shape": args.shape, "git": git_state(), "machine": machine()})
    bench.run("bare")  # compiles and captures what the runs need
    if memory is not None and module is not None:
        memory.begin(module)
    for index in range(args.rounds):
        # In turn, and each round begins with another one: a drift of the machine falls on all alike.
        for mode in (MODES[(index + i) % len(MODES)] for i in range(len(MODES))):
            say({"section": "run", "round": index} | bench.run(mode))
    if memory is not None:
        say({"section": "memory", **memory.parts()})
    runs = [line for line in found if line["section"] == "run"]
    say(summarize(runs, next(line["steps"] for line in runs if line["mode"] == "none")))
    return found
