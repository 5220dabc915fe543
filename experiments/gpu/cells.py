"""One cell measured on a GPU machine that has neither Hydra nor pyarrow, as plain values.

Imports torch, transformers, Triton and numpy. `simulation/recordings.py` makes run folders of the values.
"""

from __future__ import annotations

import datetime
import gc
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from kvarena.engine.clock import WallClock
from kvarena.engine.contract import KVAllocator
from kvarena.engine.core import Engine
from kvarena.engine.ledger import MemoryLedger
from kvarena.engine.model_runner import ModelRunner
from kvarena.engine.pool.kv_pool import KVPool
from kvarena.engine.request import Request, SamplingParams
from kvarena.engine.runner.torch_runner import TorchRunner
from kvarena.experiments.folders.provenance import git_state, machine, peak_rss_bytes, versions
from kvarena.experiments.gpu.engines import BLOCK_SIZE, Bed, Levers, make_bed
from kvarena.experiments.gpu.shapes import MAX_MODEL_LEN
from kvarena.experiments.gpu.timing import require_cuda
from kvarena.experiments.load.driver import drive
from kvarena.experiments.recording.record import RunRecorder
from kvarena.experiments.workloads.parts.base import WorkloadItem
from kvarena.reports.reading.names import cell_name
from kvarena.schedulers.base import Scheduler

SAMPLING: dict[str, Any] = {"temperature": 0.0, "ignore_eos": True}


@dataclass(frozen=True)
class Strategy:
    """An allocator and a scheduler: their names in reports, their classes and options.

    Attributes:
        allocator, scheduler: names of conf/allocator and conf/scheduler.
        make_allocator, make_scheduler: their classes.
        allocator_options, scheduler_options: what differs from the classes' defaults.
    """

    allocator: str
    make_allocator: type[Any]
    scheduler: str
    make_scheduler: type[Any]
    allocator_options: dict[str, Any] = field(default_factory=dict)
    scheduler_options: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """As reports call it."""
        return cell_name(self.allocator, self.scheduler)

    def build(self, num_blocks: int, max_model_len: int) -> tuple[KVAllocator, Scheduler]:
        """A fresh allocator over an empty pool, and the scheduler on top of it."""
        allocator = self.make_allocator(
            num_blocks=num_blocks, block_size=BLOCK_SIZE, max_model_len=max_model_len, **self.allocator_options
        )
        return allocator, self.make_scheduler(allocator, max_model_len=max_model_len, **self.scheduler_options)

    def config(self) -> dict[str, Any]:
        """The sections `allocator` and `scheduler` of the config that the main job would have."""
        return {
            "allocator": {"_target_": _path(self.make_allocator), "block_size": BLOCK_SIZE, **self.allocator_options},
            "scheduler": {"_target_": _path(self.make_scheduler), **self.scheduler_options},
        }


@dataclass(frozen=True)
class GpuCell:
    """What one cell runs.

    Attributes:
        name: in reports.
        strategy: allocator and scheduler.
        max_model_len: longest prompt + output, in tokens.
        requests: fresh ones.
        workload: section `workload` of the manifest (name, seed, description).
        arrival: section `arrival` of the manifest.
        num_slots: of the pool that it may use; None: all.
    """

    name: str
    strategy: Strategy
    max_model_len: int
    requests: Sequence[Request]
    workload: dict[str, Any]
    arrival: dict[str, Any]
    num_slots: int | None = None

    def num_blocks(self, pool: KVPool) -> int:
        """Blocks of `pool` that it uses."""
        return pool.num_blocks if self.num_slots is None else min(pool.num_blocks, self.num_slots // BLOCK_SIZE)


def requests_from(items: Sequence[WorkloadItem], times: Sequence[float] | None = None) -> list[Request]:
    """Greedy requests of the stated output lengths, at `times` (seconds) or all at second 0."""
    return [
        Request(
            request_id=item.request_id or f"request-{i}",
            prompt_token_ids=item.prompt_token_ids,
            sampling=SamplingParams(**SAMPLING, max_tokens=item.output_len),
            arrival_time=0.0 if times is None else float(times[i]),
            oracle_output_len=item.output_len,
        )
        for i, item in enumerate(items)
    ]


def make_runner(
    shape: str, num_slots: int, max_num_seqs: int, device: str, levers: Levers, max_model_len: int = MAX_MODEL_LEN
) -> tuple[Bed, ModelRunner, Levers]:
    """A model of dummy weights, its pool, and a runner ready to decode.

    On a CPU it is the plain runner in fp32, to try a command out; the levers returned say so. Raises ConfigError for a
    GPU that is not there.
    """
    if device == "cuda":
        require_cuda()
    dtype = "bfloat16" if device == "cuda" else "float32"
    bed = make_bed(shape, num_slots, None, dtype=dtype, device=device, max_model_len=max_model_len)
    if device != "cuda":
        return bed, TorchRunner(bed.model, bed.pool), levers._replace(fusions=False, graphs=False)
    runner = bed.runner(levers, max_num_seqs)
    runner.warm_up(max_num_seqs)
    return bed, runner, levers


def run_cell(cell: GpuCell, bed: Bed, runner: ModelRunner, levers: Levers) -> dict[str, Any]:
    """Run one cell: its manifest, request rows and step columns as plain values."""
    allocator, scheduler = cell.strategy.build(cell.num_blocks(bed.pool), cell.max_model_len)
    clock, ledger, recorder = WallClock(), MemoryLedger(), RunRecorder()
    engine = Engine(scheduler, allocator, runner, clock, overlap=levers.overlap, ledger=ledger)
    gc.collect()
    gc.freeze()
    try:
        clock.reset()
        drive(engine, cell.requests, recorder)
    finally:
        gc.unfreeze()
    columns = recorder.step_columns() | ledger.settle()
    return {
        "manifest": _manifest(cell, bed, levers, recorder),
        "requests": recorder.request_rows(),
        "steps": {name: {"dtype": str(column.dtype), "values": column.tolist()} for name, column in columns.items()},
    }


def _path(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _manifest(cell: GpuCell, bed: Bed, levers: Levers, recorder: RunRecorder) -> dict[str, Any]:
    spec, strategy = bed.model.spec, cell.strategy
    dtype = str(spec.dtype).removeprefix("torch.")
    num_requests, num_slots = len(cell.requests), cell.num_blocks(bed.pool) * BLOCK_SIZE
    return {
        "schema_version": 1,
        "name": cell.name,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "strategy": {
            "allocator": strategy.allocator,
            "scheduler": strategy.scheduler,
            "details": {"block_size": BLOCK_SIZE, **strategy.allocator_options, **strategy.scheduler_options},
        },
        "arrival": cell.arrival,
        "config": strategy.config() | {
            "engine": {
                "max_model_len": cell.max_model_len, "dtype": dtype, "device": str(bed.pool.device),
                "overlap": levers.overlap,
            },
            "runner": {"kind": "torch", "fusions": levers.fusions, "graphs": levers.graphs},
            "kv_cache": {"num_slots": num_slots},
            "workload": {"name": cell.workload["name"], "num_requests": num_requests, "seed": cell.workload["seed"]},
            "arrival": cell.arrival,
            "sampling": SAMPLING,
        },
        "git": git_state(),
        "machine": machine(),
        "versions": versions(),
        "model": {
            "name": spec.name, "num_parameters": spec.num_parameters, "kv_bytes_per_token": spec.kv_bytes_per_token,
            "max_model_len": spec.max_model_len, "dtype": dtype,
        },
        "pool": {
            "num_blocks": num_slots // BLOCK_SIZE, "block_size": BLOCK_SIZE, "num_slots": num_slots,
            "bytes": num_slots * spec.kv_bytes_per_token,
        },
        "workload": cell.workload | {"num_requests": num_requests},
        "run": {
            "wall_time": recorder.wall_time, "num_steps": recorder.num_steps, "peak_rss_bytes": peak_rss_bytes(),
            "max_lateness": recorder.max_lateness, "warmup_time": 0.0,
        },
    }  # fmt: skip
