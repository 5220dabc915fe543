"""Records runs on a GPU that the simulator is calibrated from and judged by (docs/simulator.md):

    python -m experiments.gpu.record measure --out DIR             # on the GPU machine: one file per shape and loop
    python -m experiments.gpu.record folders DIR --commit HASH     # anywhere: run folders, DIR/runs/...

Per shape (dummy weights, bf16, fused runner with graphs), without and with overlap, and per seed (the first to fit,
the others held out) three loads: `saturated` (all requests at once), `busy` (Poisson arrivals at 70 % of what saturated
served) and `light` (25 %). ShareGPT-like lengths. The seeds of a load follow each other, so that a machine that drifts
does not tell them apart, and first every length of a step that is launched kernel by kernel runs once: a library looks
for its kernels at the first use. `measure` imports torch, transformers, Triton and numpy and nothing else.
"""

from __future__ import annotations

import argparse
import gc
import gzip
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from allocators.paged import PagedAllocator
from engine.errors import KvarenaError
from engine.runner.base import ModelRunner
from engine.runner.mixed_graphs import graph_tokens
from experiments.gpu.cells import GpuCell, Strategy, make_runner, requests_from, run_cell, write_run_folder
from experiments.gpu.engines import Bed, Levers
from experiments.load.arrivals import PoissonArrival
from experiments.workloads.base import WorkloadItem
from experiments.workloads.published import ShareGPTWorkload
from schedulers.chunked import ChunkedScheduler
from schedulers.continuous import ContinuousScheduler

SCHEDULERS: dict[str, type[Any]] = {"continuous": ContinuousScheduler, "chunked": ChunkedScheduler}
LOOPS = ("plain", "overlap")
LOADS = {"saturated": None, "busy": 0.7, "light": 0.25}  # share of the saturated rate
MAX_MODEL_LEN = 2048
MAX_OUTPUT_LEN = 512
MAX_NUM_SEQS = 256
PROBE_REQUESTS = 128
MAX_REQUESTS = 2000  # of a cell
SUFFIX = ".json.gz"


class Options(NamedTuple):
    """What the command line asks for.

    Attributes:
        scheduler: a key of SCHEDULERS.
        num_slots: of the KV pool.
        max_num_seqs: most requests at once.
        seconds: for which requests arrive in a cell.
        device: cuda, or cpu to try the command out.
        loops: of LOOPS.
        seeds: of the workload.
        min_requests: of a cell, where `seconds` gives fewer. Of 250 requests the 99th percentile lies between two.
    """

    scheduler: str
    num_slots: int
    max_num_seqs: int
    seconds: float
    device: str
    loops: tuple[str, ...] = LOOPS
    seeds: tuple[int, ...] = (0, 1)
    min_requests: int = 250


def make_cell(
    options: Options, load: str, seed: int, num_requests: int, rate: float | None, vocab_size: int
) -> GpuCell:
    """A cell of `num_requests` at `rate` requests per second; None: all at once."""
    source = ShareGPTWorkload(
        num_requests=num_requests, seed=seed, vocab_size=vocab_size, max_output_len=MAX_OUTPUT_LEN,
        max_total_len=MAX_MODEL_LEN, on_exceed="clip",
    )  # fmt: skip
    items = source.items()
    times = None if rate is None else PoissonArrival(rate).times(items, seed)
    strategy = _strategy(options, options.max_num_seqs)
    return GpuCell(
        name=f"{strategy.name}, {load}",
        strategy=strategy,
        max_model_len=MAX_MODEL_LEN,
        requests=requests_from(items, None if times is None else times.tolist()),
        workload={"name": "sharegpt", "seed": seed, "description": source.description},
        arrival={"name": "all_at_once"} if rate is None else {"name": "poisson", "rate": rate},
    )


def warm_up_cell(options: Options, num_parameters: int) -> GpuCell | None:
    """Prompts of every length that no graph serves, one at a time; None where graphs serve all."""
    lengths = range(graph_tokens(num_parameters) + 1, MAX_MODEL_LEN)
    if not lengths:
        return None
    requests = requests_from([WorkloadItem([1] * length, output_len=1, arrival_time=None) for length in lengths])
    strategy = _strategy(options, max_num_seqs=1)
    return GpuCell("warm-up", strategy, MAX_MODEL_LEN, requests, {"name": "fixed", "seed": 0}, {"name": "all_at_once"})


def _strategy(options: Options, max_num_seqs: int) -> Strategy:
    return Strategy(
        "paged", PagedAllocator, options.scheduler, SCHEDULERS[options.scheduler],
        scheduler_options={"max_num_seqs": max_num_seqs, "max_num_batched_tokens": MAX_MODEL_LEN},
    )  # fmt: skip


def record_loop(
    options: Options, bed: Bed, runner: ModelRunner, levers: Levers, until: float
) -> Iterator[dict[str, Any]]:
    """The cells of one shape and loop (with or without overlap), as long as the clock allows."""
    vocab_size = bed.model.spec.vocab_size
    served = 0.0  # requests per second
    # The first compiles what prompts need, the second says how many requests fill the time.
    for _ in range(2):
        probe = make_cell(options, "probe", max(options.seeds) + 1, PROBE_REQUESTS, None, vocab_size)
        served = PROBE_REQUESTS / run_cell(probe, bed, runner, levers)["manifest"]["run"]["wall_time"]
    for load, share in LOADS.items():
        for seed in options.seeds:
            if time.monotonic() > until:
                print(json.dumps({"skipped": load, "seed": seed, "overlap": levers.overlap}), flush=True)
                continue
            rate = None if share is None else share * served
            wanted = round(options.seconds * (rate or served))
            num_requests = min(max(wanted, options.min_requests), MAX_REQUESTS)
            cell = run_cell(make_cell(options, load, seed, num_requests, rate, vocab_size), bed, runner, levers)
            run = cell["manifest"]["run"]
            if rate is None and seed == options.seeds[0]:
                served = num_requests / run["wall_time"]
            cell["folder"] = f"{bed.name}-{'overlap' if levers.overlap else 'plain'}-{load}-seed{seed}"
            tokens = sum(row["num_output_tokens"] for row in cell["requests"])
            line = {"cell": cell["folder"], "requests": num_requests, "rate": rate, "output_tokens": tokens}
            print(json.dumps(line | run), flush=True)
            yield cell


def measure(out: Path, shapes: list[str], options: Options, limit: float) -> None:
    """Record all cells: a file per shape and loop. Cells that would start after `limit` seconds are left out."""
    out.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    for number, shape in enumerate(shapes, 1):
        until = start + limit * number / len(shapes)
        bed, runner, levers = make_runner(
            shape, options.num_slots, options.max_num_seqs, options.device, Levers(overlap=False)
        )
        warm_up = warm_up_cell(options, bed.model.spec.num_parameters)
        if warm_up is not None:
            run_cell(warm_up, bed, runner, levers)
        for loop in options.loops:
            cells = list(record_loop(options, bed, runner, levers._replace(overlap=loop == "overlap"), until))
            for cell in cells:
                for row in cell["requests"]:
                    row["token_times"] = [round(when, 7) for when in row["token_times"]]
            with gzip.open(out / f"{shape}-{loop}{SUFFIX}", "wt") as file:
                json.dump(cells, file)
        del bed, runner  # the next shape needs the memory
        gc.collect()


def folders(source: Path, commit: str | None) -> list[Path]:
    """Make a run folder of every recorded cell in DIR/runs; returns them."""
    files = sorted(source.glob(f"*{SUFFIX}"))
    if not files:
        raise KvarenaError(f"{source} holds no recordings (*{SUFFIX}); run `measure --out {source}` first")
    made = []
    for file in files:
        for cell in json.loads(gzip.decompress(file.read_bytes())):
            made.append(source / "runs" / cell["folder"])
            write_run_folder(cell, made[-1], commit)
    return made


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    commands = parser.add_subparsers(dest="command", required=True)
    measuring = commands.add_parser("measure", help="record the cells on this machine")
    measuring.add_argument("--out", type=Path, required=True)
    measuring.add_argument("--shapes", nargs="+", default=["llama-3.1-8b", "qwen3-0.6b"])
    measuring.add_argument("--scheduler", choices=sorted(SCHEDULERS), default="continuous")
    measuring.add_argument("--slots", type=int, default=262_144, help="of the KV pool")
    measuring.add_argument("--max-num-seqs", type=int, default=MAX_NUM_SEQS)
    measuring.add_argument("--seconds", type=float, default=9.0, help="for which requests arrive in a cell")
    measuring.add_argument("--loops", nargs="+", choices=LOOPS, default=list(LOOPS))
    measuring.add_argument("--seeds", nargs="+", type=int, default=[0, 1], help="the first to fit, the others held out")
    measuring.add_argument("--min-requests", type=int, default=250, help="of a cell")
    measuring.add_argument("--limit", type=float, default=600.0, help="no cell starts after so many seconds")
    measuring.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    making = commands.add_parser("folders", help="make run folders of recorded cells")
    making.add_argument("folder", type=Path)
    making.add_argument("--commit", help="that was measured, where the machine had a copy without its history")
    args = parser.parse_args()
    try:
        if args.command == "measure":
            options = Options(
                args.scheduler, args.slots, args.max_num_seqs, args.seconds, args.device, tuple(args.loops),
                tuple(args.seeds), args.min_requests,
            )  # fmt: skip
            measure(args.out, args.shapes, options, args.limit)
        else:
            for run_dir in folders(args.folder, args.commit):
                print(run_dir)
    except KvarenaError as error:
        raise SystemExit(str(error)) from error


if __name__ == "__main__":
    main()
