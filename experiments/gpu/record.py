"""Records runs on a GPU that the simulator is calibrated from and judged by (docs/simulator.md):

    kvarena make record measure --out DIR                 # on the GPU machine: two files per shape
    kvarena make record keep DIR TARGET --commit HASH     # packed, as the repository keeps them
    kvarena make record folders TARGET RUNS               # run folders of their cells

The cells are those of `kvarena.experiments.gpu.calibration_cells`, per shape (dummy weights, bf16, fused runner with
graphs), in the order of that table. Before them, prompts of many lengths and mixed steps run once each: a library looks
for its kernels, and Triton compiles its own, at the first use. After every cell the files are written anew, so that a
run that is cut off leaves what it has.
"""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from kvarena.allocators.paged import PagedAllocator
from kvarena.engine.model_runner import ModelRunner
from kvarena.engine.runner.mixed_graphs import graph_tokens
from kvarena.experiments.gpu.calibration_cells import CELLS, MAX_MODEL_LEN, MAX_NUM_SEQS, SEEDS, CalibrationCell
from kvarena.experiments.gpu.cells import GpuCell, Strategy, make_runner, requests_from, run_cell
from kvarena.experiments.gpu.engines import Bed, Levers
from kvarena.experiments.simulation.recordings import keep, make_folders, write_recording
from kvarena.experiments.tools import tool_parser
from kvarena.experiments.workloads.parts.base import WorkloadItem
from kvarena.schedulers.chunked import ChunkedScheduler

NUM_SLOTS = 262_144
# Of prompts that no graph serves: odd and whole multiples of 16, for which Triton compiles kernels of their own.
STRIDE, GROWTH = 64, 1.15


class Options(NamedTuple):
    """What the command line asks for.

    Attributes:
        shapes: of `kvarena.experiments.gpu.shapes`.
        num_slots: of the KV pool.
        device: cuda, or cpu to try the command out.
        share: of each cell's requests, and of their lengths.
        limit: seconds after which no cell starts.
    """

    shapes: Sequence[str]
    num_slots: int = NUM_SLOTS
    device: str = "cuda"
    share: float = 1.0
    limit: float = 540.0


def warm_up_lengths(num_parameters: int, longest: int) -> list[int]:
    """Prompt lengths, in tokens, from where graphs end to `longest`: close together at first, then by a factor."""
    lengths = list(range(graph_tokens(num_parameters) + 1, min(2048, longest), STRIDE))
    length = 2048.0
    while length < longest:
        lengths.append(int(length))
        length *= GROWTH
    return [length // 16 * 16 + 7 * (number % 2) for number, length in enumerate(lengths)]


def warm_up(bed: Bed, runner: ModelRunner, levers: Levers, share: float) -> None:
    """Run steps of all kinds: single prompts without a graph, then chunks beside few and many decodes.

    `share` is of the lengths and of the requests, see `Options`.
    """
    longest = max(32, round((MAX_MODEL_LEN - 1) * share))
    lengths = warm_up_lengths(bed.model.spec.num_parameters, longest)
    run_cell(_warm_up_cell([WorkloadItem([1] * n, 1, None) for n in lengths], 1, longest), bed, runner, levers)
    for count, budget in ((6, 256), (6, 4096), (64, 512), (64, 2048), (64, 8192)):
        lengths = [min(40 + 97 * i, longest) for i in range(max(1, round(count * share)))]
        items = [WorkloadItem([1] * n, max(2, round(24 * share)), None) for n in lengths]
        run_cell(_warm_up_cell(items, MAX_NUM_SEQS, budget), bed, runner, levers)


def _warm_up_cell(items: list[WorkloadItem], max_num_seqs: int, budget: int) -> GpuCell:
    options = {"max_num_seqs": max_num_seqs, "max_num_batched_tokens": budget}
    strategy = Strategy("paged", PagedAllocator, "chunked", ChunkedScheduler, scheduler_options=options)
    workload = {"name": "warm-up", "seed": 0}
    return GpuCell("warm-up", strategy, MAX_MODEL_LEN, requests_from(items), workload, {"name": "all_at_once"})


def record_shape(options: Options, shape: str, until: float, out: Path) -> None:
    """Record the cells of one shape, as long as the clock (`time.monotonic`) allows, into files of `out`."""
    began = time.monotonic()
    levers = Levers(overlap=True)
    bed, runner, levers = make_runner(shape, options.num_slots, MAX_NUM_SEQS, options.device, levers, MAX_MODEL_LEN)
    warm_up(bed, runner, levers, options.share)
    _say(shape=shape, ready_s=round(time.monotonic() - began, 1))
    served: dict[str, float] = {}  # requests per second
    recorded: list[dict[str, Any]] = []
    for cell, seed in zip(CELLS, seeds(CELLS), strict=True):
        if time.monotonic() > until or (cell.of is not None and cell.of not in served):
            _say(shape=shape, cell=cell.name, skipped=True)
            continue
        began = time.monotonic()
        rate = None if cell.load is None else cell.load * served[str(cell.of)]
        gpu_cell = cell.build(shape, seed, rate, bed.model.spec.vocab_size, options.share)
        found = run_cell(gpu_cell, bed, runner, levers._replace(overlap=cell.overlap))
        run = found["manifest"]["run"]
        served[cell.name] = len(gpu_cell.requests) / run["wall_time"]
        found["manifest"]["calibration"] = {
            "part": cell.part,
            "load": cell.load,
            "of": cell.of,
            "served": served[cell.name],
        }
        recorded.append(found)
        write_recording(recorded, out, shape)
        tokens = sum(row["num_output_tokens"] for row in found["requests"])
        _say(
            shape=shape, cell=cell.name, part=cell.part, requests=len(gpu_cell.requests), rate=rate,
            output_tokens=tokens, seconds=round(run["wall_time"], 2), steps=run["num_steps"],
            whole_s=round(time.monotonic() - began, 2),
        )  # fmt: skip


def seeds(cells: Sequence[CalibrationCell]) -> list[int]:
    """A seed of its own for every cell."""
    counts = dict(SEEDS)
    found = []
    for cell in cells:
        found.append(counts[cell.part])
        counts[cell.part] += 1
    return found


def measure(out: Path, options: Options) -> None:
    """Record all cells of all shapes; each shape has an equal share of the time, and what those before it left."""
    out.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    for number, shape in enumerate(options.shapes, 1):
        record_shape(options, shape, start + options.limit * number / len(options.shapes), out)
        gc.collect()  # the next shape needs the memory


def _say(**line: Any) -> None:
    print(json.dumps(line), flush=True)


def main(argv: Sequence[str]) -> int:
    """The command line."""
    parser = tool_parser(__name__, __doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    measuring = commands.add_parser("measure", help="record the cells on this machine")
    measuring.add_argument("--out", type=Path, required=True, help="folder of the files")
    measuring.add_argument("--shapes", nargs="+", default=["llama-3.1-8b", "qwen3-0.6b"], help="of the models")
    measuring.add_argument("--slots", type=int, default=NUM_SLOTS, help="of the KV pool")
    measuring.add_argument("--share", type=float, default=1.0, help="of requests and lengths, to try it out")
    measuring.add_argument("--limit", type=float, default=540.0, help="no cell starts after so many seconds")
    measuring.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="what runs")
    keeping = commands.add_parser("keep", help="pack recordings as the repository keeps them")
    keeping.add_argument("source", type=Path, help="a folder of recordings")
    keeping.add_argument("target", type=Path, help="the folder to make")
    keeping.add_argument("--commit", required=True, help="that was measured")
    making = commands.add_parser("folders", help="make run folders of recorded cells")
    making.add_argument("source", type=Path, help="a folder of recordings")
    making.add_argument("target", type=Path, help="the folder to make")
    args = parser.parse_args(argv)
    if args.command == "measure":
        measure(args.out, Options(args.shapes, args.slots, args.device, args.share, args.limit))
        return 0
    made = (
        keep(args.source, args.target, args.commit)
        if args.command == "keep"
        else make_folders(args.source, args.target)
    )
    for path in made:
        print(path)
    return 0
