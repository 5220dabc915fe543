"""Engines for benchmarks, from the main job's config: a benchmark's settings, and on top of them those of one engine.

Engines(*overrides).build(*more) -> EngineParts        model, pool and runner are kept while nothing of them differs
"""

from __future__ import annotations

import gc
import re
import time
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from kvarena.allocators.paged import PagedAllocator
from kvarena.engine.core import Engine
from kvarena.engine.errors import ConfigError
from kvarena.engine.models import LoadedModel
from kvarena.engine.request import Request
from kvarena.engine.runner.torch_runner import TorchRunner
from kvarena.experiments.building.build import build_engine, load_shared
from kvarena.experiments.building.parts import EngineParts
from kvarena.experiments.building.shared import SharedParts
from kvarena.experiments.gpu.floors import EXPERT_SHAPES, LARGE_SHAPES, MAX_MODEL_LEN, SHAPES, model_of
from kvarena.experiments.settings.compose import load_run

# One lever of the engine off. Without fusions there are no graphs, which hold the fused forward.
ABLATIONS: dict[str, tuple[str, ...]] = {
    "all": (),
    "no hopper": ("runner.attention=triton", "runner.gemm=triton"),
    "no skinny": ("runner.attention=triton", "runner.gemm=library"),
    "no overlap": ("engine.overlap=false",),
    "no mixed graphs": ("runner.graphs=decode",),
    "no graphs": ("runner.graphs=false",),
    "no fusions": ("runner.fusions=false",),
}
# Sections and groups of the config that an engine is built from; a benchmark brings its own load and its own driver.
OF_ENGINES = ("allocator", "engine", "kv_cache", "model", "parallel", "runner", "sampling", "scheduler")
# Levers that a CPU has.
HOST_LEVERS = ("all", "no overlap", "no fusions")
PREFILLED = f"allocator._target_={__name__}.PrefilledAllocator"


class PrefilledAllocator(PagedAllocator):
    """Claims that the KV of every prompt is in the pool, so that a decode step can be timed without the prefill."""

    def match_prefix(self, req: Request) -> int:
        """All but the last token of the prompt, in whole blocks."""
        return (req.num_tokens - 1) // self.block_size * self.block_size


def check_overrides(overrides: Sequence[str]) -> None:
    """Raise ConfigError where one of them sets what no engine is built from, and so nothing would read."""
    for override in overrides:
        if re.split(r"[.=@]", override.lstrip("+~"))[0] not in OF_ENGINES:
            raise ConfigError(
                f"{override}: this benchmark takes settings of an engine alone ({', '.join(OF_ENGINES)}); --help lists "
                "what says which load it runs"
            )


class Engines:
    """Engines of one model that run one after the other.

    Args:
        name: of the model, see `floors.model_of`: a real shape in bf16, the others in float32.
        overrides: what all of them have, as on run.py's command line.

    Attributes:
        name: see above.
        shared: what they share.

    Raises:
        ConfigError: an override is none of an engine's.
    """

    def __init__(self, name: str, *overrides: str) -> None:
        check_overrides(overrides)
        self.name = name
        self.shared = SharedParts()
        self._overrides = (
            *model_of(name),
            f"engine.dtype={'bfloat16' if name in SHAPES + LARGE_SHAPES + EXPERT_SHAPES else 'float32'}",
            "engine.overlap=true",
            *(() if name == "demo" else (f"engine.max_model_len={MAX_MODEL_LEN}",)),
            "scheduler.max_num_batched_tokens=8192",
            *overrides,
        )
        # Weak: a runner that `shared` lets go of must give its pool back.
        self._filled: Callable[[], TorchRunner | None] = lambda: None

    @property
    def quantization(self) -> str | None:
        """How the model's weights are packed; None: they are plain."""
        return load_run(self._overrides).model.quantization

    @property
    def num_ranks(self) -> int:
        """Devices that share the model, and a floor's bytes and operations."""
        return load_run(self._overrides).parallel.world_size

    def load(self) -> LoadedModel:
        """The model that they share; otherwise the first engine loads it."""
        return load_shared(load_run(self._overrides), self.shared)[0]

    def another(self, *overrides: str) -> LoadedModel:
        """The model with other settings, beside the one that they share."""
        return load_shared(load_run([*self._overrides, *overrides]), SharedParts())[0]

    def build(self, *overrides: str) -> EngineParts:
        """A fresh engine without a ledger; its pool is full of random keys and values, for zeros are faster."""
        parts = build_engine(load_run([*self._overrides, *overrides]), self.shared)
        parts.engine.ledger = None
        runner = runner_of(parts)
        if runner is not self._filled():
            self._filled = weakref.ref(runner)
            if parts.model is not None and parts.model.peers is not None:
                parts.model.peers.tell("fill_pool")
            runner.pool.fill_randomly()
        return parts


def runner_of(parts: EngineParts) -> TorchRunner:
    """The runner of an engine that computes."""
    runner = parts.engine.runner
    assert isinstance(runner, TorchRunner)
    return runner


class StepTimes(NamedTuple):
    """What is kept of a step: numbers alone, so that the garbage collector has nothing to walk through."""

    num_scheduled: int
    num_new_tokens: int
    start_time: float
    launch_time: float
    end_time: float
    num_experts_read: float


def drive(engine: Engine, requests: Sequence[Request]) -> tuple[float, list[StepTimes]]:
    """Run `requests` to their end; wall seconds from the first `add`, and the steps.

    What the process holds by now is collected and set aside first, as in a run of the main job: one pass of the
    collector over transformers' modules takes 0.3 s, as long as twenty steps.
    """
    gc.collect()
    gc.freeze()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    steps: list[StepTimes] = []
    start = time.perf_counter()
    try:
        for req in requests:
            engine.add(req)
        while engine.has_work:
            if (step := engine.step()) is not None:
                plan = step.plan
                counts = len(plan.scheduled), plan.num_new_tokens
                times = step.start_time, step.launch_time, step.end_time
                steps.append(StepTimes(*counts, *times, step.result.num_experts_read))
        return time.perf_counter() - start, steps
    finally:
        gc.unfreeze()


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
