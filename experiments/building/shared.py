"""What the cells of one study, or of a sweep in one process, share: the model, and the runner with its pool and graphs,
while nothing of them differs.

    cell 1   load model | size pool | make pool, runner | warm up: compile, capture | run
    cell 2                                                warm up: what is missing  | run        same settings
    cell 3                size pool | make pool, runner | warm up: capture          | run        another pool

Allocator, scheduler and their state are every cell's own. A runner keeps nothing of requests that ended, and the slots
that it left full are nobody's until a request writes them; so a cell measures the same as in a process of its own.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from kvarena.engine.clock import WallClock
from kvarena.engine.contract import KVAllocator
from kvarena.engine.models import LoadedModel
from kvarena.engine.pool.kv_pool import KVPool
from kvarena.engine.runner.torch_runner import TorchRunner
from kvarena.experiments.settings.config import RunConfig


@dataclass
class PreparedRunner:
    """A runner and what it was made of.

    Attributes:
        runner: idle.
        facts: what the manifest says of it.
        pool: its keys and values.
        clock: its clock.
        num_blocks: usable blocks that the pool was sized to.
        pool_in_torch: bytes of the pool that torch's allocator on a GPU gave.
    """

    runner: TorchRunner
    facts: dict[str, Any]
    pool: KVPool
    clock: WallClock
    num_blocks: int
    pool_in_torch: int = 0

    def fits(self, allocator: KVAllocator) -> bool:
        """Whether the pool is the one that `allocator` needs."""
        plain = allocator.num_virtual_blocks == allocator.num_blocks == self.num_blocks
        return plain and allocator.num_host_blocks == self.pool.num_swap_blocks


class SharedParts:
    """Keeps the last model and the last runner; asked for others, it lets go of them first, so that both fit.

    Attributes:
        context_bytes: of the GPU's memory, in use before the first model was loaded; None: not known yet.
    """

    def __init__(self) -> None:
        self.context_bytes: int | None = None
        self._model: tuple[str, LoadedModel] | None = None
        self._runner: tuple[str, PreparedRunner] | None = None

    def model(self, config: RunConfig, load: Callable[[], LoadedModel]) -> LoadedModel:
        """The model that `config` describes, loaded where it is not the last one."""
        engine = {key: config.values["engine"][key] for key in ("dtype", "device", "seed", "image_cache_mib")}
        parts = {"parallel": config.values["parallel"]} if config.parallel.world_size > 1 else {}
        key = _text({"model": config.values["model"], "engine": engine} | parts)
        if self._model is None or self._model[0] != key:
            self.clear()
            self._model = (key, load())
        return self._model[1]

    def runner(self, config: RunConfig) -> PreparedRunner | None:
        """The last runner where it was made for `config`; else None, and the last one is gone."""
        if self._runner is not None and self._runner[0] == _runner_key(config):
            return self._runner[1]
        self.drop_runner()
        return None

    def keep(self, config: RunConfig, runner: PreparedRunner) -> None:
        """Keep `runner` for the next cell. One of a pool that belongs to its allocator alone is not kept."""
        self._runner = (_runner_key(config), runner)

    def drop_runner(self) -> None:
        """Let go of the runner and its pool."""
        if self._runner is not None:
            self._runner[1].runner.finish()
            self._runner = None
            give_memory_back()

    def clear(self) -> None:
        """Let go of everything."""
        if self._model is not None:
            peers = self._model[1].peers
            self._model = self._runner = None
            if peers is not None:
                peers.close()
            give_memory_back()


def give_memory_back() -> None:
    """What nobody refers to any more goes back to the device."""
    gc.collect()  # modules and graphs refer to one another
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _runner_key(config: RunConfig) -> str:
    """All settings that a runner is made from, but for the strategy's own."""
    values = config.values
    # A pool that the config sizes is the same whatever a step may take.
    sizing: tuple[Any, ...] = ()
    if config.kv_cache.sized_by is None:
        sizing = (values["engine"]["gpu_memory_utilization"], config.scheduler.need("max_num_batched_tokens"))
    return _text(
        {name: values[name] for name in ("model", "runner", "kv_cache")}
        | {name: values["engine"][name] for name in ("dtype", "device", "seed", "max_model_len")}
        | {"block_size": config.allocator.need("block_size"), "scores": config.driver.scores, "sizing": sizing}
        | {"max_num_seqs": config.scheduler.need("max_num_seqs")}
    )


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)
