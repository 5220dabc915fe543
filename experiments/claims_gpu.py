"""The founding claim on a GPU: {contiguous/max, paged} x {static, continuous} on one model, one pool, one runner.

    python -m experiments.claims_gpu measure --out DIR       # on the GPU machine: one file per cell
    python -m experiments.claims_gpu report DIR              # anywhere: run folders and the comparison

The pool is cut to 16,384 slots, so that memory is what binds, as in PagedAttention (SOSP'23), section 6.2; all requests
are there at once. The cells share the model, the fused forward, the graphs, overlap and the pool's memory; allocator
and scheduler are all that differs. `measure` imports torch, transformers, Triton and numpy and nothing else.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from allocators.contiguous import ContiguousAllocator
from allocators.paged import PagedAllocator
from engine.clock import WallClock
from engine.core import Engine
from engine.errors import KvarenaError
from engine.ledger import MemoryLedger
from engine.plan import KVAllocator, SchedulerProtocol
from engine.request import Request, SamplingParams
from engine.runner.base import ModelRunner
from engine.runner.torch_runner import TorchRunner
from experiments.driver import drive
from experiments.engine_setup import BLOCK_SIZE, Bed, Levers, make_bed
from experiments.files import MANIFEST_FILE, REQUESTS_FILE, STEPS_FILE, SWEEP_FILE
from experiments.provenance import git_state, machine, peak_rss_bytes, versions
from experiments.record import RunRecorder, write_requests, write_steps
from experiments.workloads.published import ShareGPTWorkload
from schedulers.continuous import ContinuousScheduler
from schedulers.static import StaticScheduler

MAX_MODEL_LEN = 2048
NUM_SLOTS = 16_384
MAX_NUM_SEQS = 256
SEED = 0
SUFFIX = ".json.gz"


class Cell(NamedTuple):
    """A strategy: its names in the report, its options, and how to make it."""

    allocator: str
    scheduler: str
    allocator_options: dict[str, Any]
    make_allocator: Callable[..., KVAllocator]
    make_scheduler: Callable[..., SchedulerProtocol]

    @property
    def name(self) -> str:
        """As reports call it."""
        return f"{self.allocator} x {self.scheduler}"

    def strategy(self, num_blocks: int) -> tuple[KVAllocator, SchedulerProtocol]:
        """A fresh allocator over an empty pool, and the scheduler on top of it."""
        allocator = self.make_allocator(
            num_blocks=num_blocks, block_size=BLOCK_SIZE, max_model_len=MAX_MODEL_LEN, **self.allocator_options
        )
        return allocator, self.make_scheduler(allocator, max_model_len=MAX_MODEL_LEN, max_num_seqs=MAX_NUM_SEQS)


_Allocator = tuple[str, dict[str, Any], Callable[..., KVAllocator]]
REGIONS: _Allocator = ("contiguous", {"reservation": "max"}, ContiguousAllocator)
PAGES: _Allocator = ("paged", {}, PagedAllocator)
# The quick ones first, so that a cut-off run leaves the most; the report has an order of its own.
CELLS = [
    Cell(name, scheduler, options, make_allocator, make_scheduler)
    for (name, options, make_allocator), scheduler, make_scheduler in (
        (PAGES, "continuous", ContinuousScheduler),
        (REGIONS, "continuous", ContinuousScheduler),
        (PAGES, "static", StaticScheduler),
        (REGIONS, "static", StaticScheduler),
    )
]
REPORT_ORDER = ("contiguous x static", "contiguous x continuous", "paged x static", "paged x continuous")


def workload(num_requests: int, vocab_size: int) -> tuple[list[Request], str]:
    """The same requests for every cell, all there at time 0; and the workload's description."""
    source = ShareGPTWorkload(
        num_requests=num_requests, seed=SEED, vocab_size=vocab_size, max_total_len=MAX_MODEL_LEN, on_exceed="drop"
    )
    requests = [
        Request(
            request_id=item.request_id or f"request-{i}",
            prompt_token_ids=item.prompt_token_ids,
            sampling=SamplingParams(temperature=0.0, max_tokens=item.output_len, ignore_eos=True),
            oracle_output_len=item.output_len,
        )
        for i, item in enumerate(source.items())
    ]
    return requests, source.description


def run_cell(cell: Cell, bed: Bed, runner: ModelRunner, levers: Levers, num_requests: int) -> dict[str, Any]:
    """Run one cell; what its file holds."""
    vocab_size = bed.model.spec.vocab_size
    requests, description = workload(num_requests, vocab_size)
    allocator, scheduler = cell.strategy(bed.pool.num_blocks)
    clock, ledger, recorder = WallClock(), MemoryLedger(), RunRecorder()
    engine = Engine(scheduler, allocator, runner, clock, overlap=levers.overlap, ledger=ledger)
    gc.collect()
    gc.freeze()
    try:
        clock.reset()
        drive(engine, requests, recorder)
    finally:
        gc.unfreeze()
    columns = recorder.step_columns() | ledger.settle()
    return {
        "manifest": _manifest(cell, bed, levers, description, num_requests, recorder),
        "requests": recorder.request_rows(),
        "steps": {name: {"dtype": str(column.dtype), "values": column.tolist()} for name, column in columns.items()},
    }


def _manifest(
    cell: Cell, bed: Bed, levers: Levers, description: str, num_requests: int, recorder: RunRecorder
) -> dict[str, Any]:
    spec = bed.model.spec
    return {
        "schema_version": 1,
        "name": cell.name,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "strategy": {
            "allocator": cell.allocator,
            "scheduler": cell.scheduler,
            "details": {"block_size": BLOCK_SIZE, **cell.allocator_options},
        },
        "arrival": {"name": "all_at_once"},
        "config": {
            "allocator": {"name": cell.allocator, "block_size": BLOCK_SIZE, **cell.allocator_options},
            "scheduler": {"name": cell.scheduler, "max_num_seqs": MAX_NUM_SEQS},
            "engine": {
                "max_model_len": MAX_MODEL_LEN, "dtype": str(spec.dtype).removeprefix("torch."),
                "device": str(bed.pool.device), "overlap": levers.overlap,
            },
            "runner": {"fusions": levers.fusions, "graphs": levers.graphs},
            "kv_cache": {"num_slots": bed.pool.num_slots},
            "workload": {"name": "sharegpt", "num_requests": num_requests, "seed": SEED},
            "sampling": {"temperature": 0.0, "ignore_eos": True},
        },
        "git": git_state(),
        "machine": machine(),
        "versions": versions(),
        "model": {
            "name": spec.name, "num_parameters": spec.num_parameters,
            "kv_bytes_per_token": spec.kv_bytes_per_token, "dtype": str(spec.dtype).removeprefix("torch."),
        },
        "pool": {
            "num_blocks": bed.pool.num_blocks, "block_size": BLOCK_SIZE, "num_slots": bed.pool.num_slots,
            "bytes": bed.pool.num_slots * spec.kv_bytes_per_token,
        },
        "workload": {
            "name": "sharegpt", "seed": SEED, "num_requests": num_requests, "description": description,
        },
        "run": {
            "wall_time": recorder.wall_time, "num_steps": recorder.num_steps, "peak_rss_bytes": peak_rss_bytes(),
            "max_lateness": recorder.max_lateness, "warmup_time": 0.0,
        },
    }  # fmt: skip


def measure(out: Path, shape: str, num_requests: int, num_slots: int, device: str) -> None:
    """Run all cells, one file each. On a CPU with the plain runner, to try the command out."""
    dtype = "bfloat16" if device == "cuda" else "float32"
    levers = Levers()
    bed = make_bed(shape, num_slots, None, dtype=dtype, device=device)
    runner: ModelRunner
    if device == "cuda":
        runner = bed.runner(levers, MAX_NUM_SEQS)
        runner.warm_up(MAX_NUM_SEQS)
        # And what prompts need.
        run_cell(CELLS[0], bed, runner, levers, 4)
    else:
        runner, levers = TorchRunner(bed.model, bed.pool), Levers(fusions=False, graphs=False)
    out.mkdir(parents=True, exist_ok=True)
    for cell in CELLS:
        found = run_cell(cell, bed, runner, levers, num_requests)
        path = out / (cell.name.replace(" ", "") + SUFFIX)
        with gzip.open(path, "wt") as file:
            json.dump(found, file)
        run = found["manifest"]["run"]
        tokens = sum(row["num_output_tokens"] for row in found["requests"])
        line = {"section": "claim", "cell": cell.name, "output_tokens": tokens, **run}
        print(json.dumps(line | {"output_tokens_per_s": tokens / run["wall_time"]}), flush=True)


def report(folder: Path, commit: str | None) -> dict[str, Any]:
    """Turn the cells' files into run folders and write the comparison beside them; its summary.

    Args:
        folder: with the files of `measure`.
        commit: of the checkout that was measured, where it was a copy without git.
    """
    from reports.comparison import write_comparison
    from reports.run_report import write_run_report

    cells = [json.loads(gzip.decompress(path.read_bytes())) for path in sorted(folder.glob(f"*{SUFFIX}"))]
    if not cells:
        raise KvarenaError(f"{folder} holds no cells (*{SUFFIX}); run `measure --out {folder}` on a GPU machine first")
    cells.sort(key=lambda cell: REPORT_ORDER.index(cell["manifest"]["name"]))
    for number, cell in enumerate(cells):
        run_dir = folder / str(number)
        run_dir.mkdir(exist_ok=True)
        manifest = cell["manifest"]
        if commit is not None and manifest["git"]["commit"] is None:
            manifest["git"] = {"commit": commit, "dirty": False}
        write_requests(run_dir / REQUESTS_FILE, cell["requests"])
        steps = {name: np.array(column["values"], dtype=column["dtype"]) for name, column in cell["steps"].items()}
        write_steps(run_dir / STEPS_FILE, steps)
        (run_dir / MANIFEST_FILE).write_text(json.dumps(manifest, indent=2) + "\n")
        write_run_report(run_dir)
    sweep = {"runs": [str(n) for n in range(len(cells))], "baseline": None, "failed": [], "not_defined": []}
    (folder / SWEEP_FILE).write_text(json.dumps(sweep, indent=2) + "\n")
    return write_comparison(folder)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    commands = parser.add_subparsers(dest="command", required=True)
    measuring = commands.add_parser("measure", help="run the cells on this machine")
    measuring.add_argument("--out", type=Path, required=True)
    measuring.add_argument("--shape", default="llama-3.1-8b")
    measuring.add_argument("--requests", type=int, default=120)
    measuring.add_argument("--slots", type=int, default=NUM_SLOTS)
    measuring.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    reporting = commands.add_parser("report", help="make run folders and the comparison of measured cells")
    reporting.add_argument("folder", type=Path)
    reporting.add_argument("--commit", help="of the measured checkout, where it had no git")
    args = parser.parse_args()
    try:
        if args.command == "measure":
            measure(args.out, args.shape, args.requests, args.slots, args.device)
        else:
            report(args.folder, args.commit)
            print(f"report: {args.folder / 'report.html'}")
    except KvarenaError as error:
        raise SystemExit(str(error)) from error


if __name__ == "__main__":
    main()
