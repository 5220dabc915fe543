"""Engines for the engine benchmark: one model and pool, and a runner and scheduler for every setting of the levers."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from kvarena.allocators.paged import PagedAllocator
from kvarena.engine.attention.triton_backend import TritonBackend
from kvarena.engine.clock import WallClock
from kvarena.engine.core import Engine
from kvarena.engine.fusions.decoder import FusedDecoder
from kvarena.engine.fusions.detect import fuse
from kvarena.engine.fusions.ops import Ops, TorchOps
from kvarena.engine.fusions.triton_ops import TritonOps
from kvarena.engine.kernels.gemm.table import GemmTable
from kvarena.engine.models import LoadedModel, load_model
from kvarena.engine.pool.kv_pool import KVPool
from kvarena.engine.request import Request
from kvarena.engine.runner.fused_runner import FusedRunner
from kvarena.engine.runner.mixed_graphs import graph_tokens
from kvarena.experiments.gpu.shapes import MAX_MODEL_LEN, SHAPES
from kvarena.schedulers.base import Scheduler
from kvarena.schedulers.chunked import ChunkedScheduler
from kvarena.schedulers.continuous import ContinuousScheduler

BLOCK_SIZE = 16


class Levers(NamedTuple):
    """What can be switched.

    Attributes:
        fusions: fused layers; False runs the transformers modules.
        graphs: CUDA graphs of decode steps.
        mixed: with `graphs`, graphs of small steps with prompts too.
        overlap: plan a step while the one before runs.
        skinny: most rows for which the skinny GEMM is asked; 0 sends every product to the library.
        hopper: the CUDA kernels for Hopper, which come before the skinny GEMM and the library.
    """

    fusions: bool = True
    graphs: bool = True
    overlap: bool = True
    skinny: int = 128
    mixed: bool = True
    hopper: bool = True


ABLATIONS: dict[str, Levers] = {
    "all": Levers(),
    "no hopper": Levers(hopper=False),
    "no skinny": Levers(skinny=0, hopper=False),
    "no overlap": Levers(overlap=False),
    "no mixed graphs": Levers(mixed=False),
    "no graphs": Levers(graphs=False),
    "no fusions": Levers(fusions=False),
}


class PrefilledAllocator(PagedAllocator):
    """Claims that the KV of every prompt is in the pool, so that a decode step can be timed without the prefill."""

    def match_prefix(self, req: Request) -> int:
        """All but the last token of the prompt, in whole blocks."""
        return (req.num_tokens - 1) // self.block_size * self.block_size


@dataclass
class Bed:
    """One model and pool for all settings.

    Attributes:
        name: of the shape.
        model: dummy weights.
        pool: keys and values, random to begin with (zeros would be faster than real ones).
        gemm: text of a `GemmTable`, or None for the built-in one.
        max_model_len: longest context of its runners.
    """

    name: str
    model: LoadedModel
    pool: KVPool
    gemm: str | None
    max_model_len: int = MAX_MODEL_LEN
    _fused: FusedDecoder | None = field(default=None, repr=False)

    def decoder(self, levers: Levers) -> FusedDecoder | None:
        """The fused decoder for a setting: one set of layers, with the operations that the setting asks for."""
        if not levers.fusions:
            return None
        ops: Ops = TorchOps()
        device = self.pool.device
        if device.type == "cuda":
            table = None
            if levers.skinny and self.pool.dtype.itemsize == 2:
                processors = torch.cuda.get_device_properties(device).multi_processor_count
                if self.gemm is None:
                    table = GemmTable(levers.skinny, processors)
                else:
                    table = GemmTable.from_json(self.gemm, levers.skinny, processors)
            ops = TritonOps(device, table, hopper=levers.hopper)
        if self._fused is None:
            self._fused = fuse(self.model, ops, self.max_model_len)
        return replace(self._fused, ops=ops)

    def runner(self, levers: Levers, max_num_seqs: int) -> FusedRunner:
        """A runner for a setting."""
        heads = self.model.module.config.num_attention_heads  # type: ignore[union-attr]
        graphs = levers.graphs and self.pool.device.type == "cuda"
        return FusedRunner(
            self.model,
            self.pool,
            TritonBackend(self.pool, heads, use_hopper=levers.hopper),  # type: ignore[arg-type]
            self.decoder(levers),
            max_num_seqs=max_num_seqs,
            max_model_len=self.max_model_len,
            graphs=graphs,
            mixed_tokens=graph_tokens(self.model.spec.num_parameters) if graphs and levers.mixed else 0,
        )

    def engine(
        self,
        runner: FusedRunner,
        *,
        overlap: bool,
        max_num_seqs: int,
        max_num_batched_tokens: int = 8192,
        prefilled: bool = False,
        chunked: bool = False,
    ) -> Engine:
        """A fresh engine around `runner`."""
        make = PrefilledAllocator if prefilled else PagedAllocator
        allocator = make(num_blocks=self.pool.num_blocks, block_size=BLOCK_SIZE, max_model_len=MAX_MODEL_LEN)
        kind: type[Scheduler] = ChunkedScheduler if chunked else ContinuousScheduler
        scheduler = kind(
            allocator,
            max_model_len=MAX_MODEL_LEN,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
        )
        return Engine(scheduler, allocator, runner, WallClock(), overlap=overlap)


def make_bed(
    name: str,
    num_slots: int,
    gemm: Path | None,
    *,
    dtype: str = "bfloat16",
    device: str = "cuda",
    max_model_len: int = MAX_MODEL_LEN,
) -> Bed:
    """Load a shape with dummy weights, and fill a pool with random keys and values."""
    shape = SHAPES[name] | {"max_position_embeddings": max_model_len}
    model = load_model(shape=shape, dtype=dtype, device=device, load_format="dummy", name=name)
    spec = model.spec
    pool = KVPool.of_model(
        spec,
        num_blocks=num_slots // BLOCK_SIZE,
        block_size=BLOCK_SIZE,
        dtype=spec.dtype,
        device=device,
    )
    for layer in range(spec.num_layers):
        pool.data[:, layer].normal_()
    return Bed(name, model, pool, None if gemm is None else gemm.read_text(), max_model_len)


class StepTimes(NamedTuple):
    """What is kept of a step: numbers alone, so that the garbage collector has nothing to walk through."""

    num_scheduled: int
    num_new_tokens: int
    start_time: float
    launch_time: float
    end_time: float


def drive(engine: Engine, requests: list[Request]) -> tuple[float, list[StepTimes]]:
    """Run `requests` to their end; wall seconds from the first `add`, and the steps.

    What the process holds by now is collected and set aside first, as in a run of the main job: one pass of the
    collector over transformers' modules takes 0.3 s, as long as twenty steps.
    """
    gc.collect()
    gc.freeze()
    synchronize(engine)
    steps: list[StepTimes] = []
    start = time.perf_counter()
    try:
        for req in requests:
            engine.add(req)
        while engine.has_work:
            if (step := engine.step()) is not None:
                plan = step.plan
                counts = len(plan.scheduled), plan.num_new_tokens
                steps.append(StepTimes(*counts, step.start_time, step.launch_time, step.end_time))
        return time.perf_counter() - start, steps
    finally:
        gc.unfreeze()


def synchronize(engine: Engine) -> None:
    """Wait for the device."""
    if engine.runner.pool.device.type == "cuda":  # type: ignore[attr-defined]
        torch.cuda.synchronize()


def attempt(section: str, run: Callable[[], dict[str, Any]], **labels: Any) -> dict[str, Any]:
    """A section's line. One that fails must not cost the others: its line holds the error instead of figures."""
    start = time.perf_counter()
    line = {"section": section, **labels}
    try:
        line |= run()
    except Exception as error:  # recorded in the line, which is what the caller reads
        cause = error.__cause__ or error
        frames, at = [], cause.__traceback__
        while at is not None:
            frames.append(f"{Path(at.tb_frame.f_code.co_filename).name}:{at.tb_lineno}")
            at = at.tb_next
        line["error"] = f"{type(error).__name__}: {error} <- {type(cause).__name__} at {' '.join(frames[-6:])}"[:900]
    line["seconds"] = round(time.perf_counter() - start, 2)
    return line
