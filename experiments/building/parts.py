"""What an engine is made of, and what a simulated one and one that computes have in common."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch

from kvarena.engine.checkpoints.packed_settings import MADE
from kvarena.engine.checks import check_int
from kvarena.engine.clock import Clock
from kvarena.engine.contract import KVAllocator
from kvarena.engine.core import Engine
from kvarena.engine.errors import ConfigError
from kvarena.engine.ledger import MemoryLedger
from kvarena.engine.models import LoadedModel, ModelSpec
from kvarena.engine.models.sizes import ModelSizes, model_sizes
from kvarena.engine.pool.gpu_memory import GpuMemory
from kvarena.engine.pool.kv_pool import blocks_for_budget
from kvarena.experiments.settings.config import EngineConfig, RunConfig
from kvarena.experiments.settings.strategies import Strategy
from kvarena.experiments.simulation.runner import SimulatedRunner

CUDA_PAGE_BYTES = 2 * 2**20


@dataclass
class EngineParts:
    """An engine and what it was built from.

    Attributes:
        engine: runs one strategy; its clock is `clock` and its ledger `ledger`.
        spec: the model's sizes.
        special_token_ids: the model's tokens that are not text.
        model: with its weights; None in a simulation, which has none.
        max_model_len: longest prompt + output, in tokens.
        pool_facts: the pool's size and the runner, for the manifest.
        config: section `engine`.
        simulator: the runner of a simulation; None when steps are computed.
        simulation_facts: the profile of a simulation, for the manifest.
        gpu_memory: follows the GPU's memory; None where there is no GPU.
        outside: of a simulation with a measured profile: given the columns of its steps, a sentence for whatever lies
            outside what the profile was fitted to.
    """

    engine: Engine
    clock: Clock
    ledger: MemoryLedger
    spec: ModelSpec
    special_token_ids: frozenset[int]
    model: LoadedModel | None
    max_model_len: int
    pool_facts: dict[str, Any]
    config: EngineConfig
    simulator: SimulatedRunner | None = None
    simulation_facts: dict[str, Any] | None = None
    gpu_memory: GpuMemory | None = None
    outside: Callable[[dict[str, np.ndarray]], list[str]] | None = None


def target_device(name: str) -> str:
    """`cpu` or `cuda`, of `engine.device`. Raises ConfigError where there is no such device."""
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise ConfigError("engine.device=cuda, and this machine has no CUDA device; use auto or cpu")
    return ("cuda" if available else "cpu") if name == "auto" else name


def overlaps(config: EngineConfig, auto: bool) -> bool:
    """Whether steps are planned while others run, of `engine.overlap`; `auto`: what that means here."""
    return auto if config.overlap == "auto" else bool(config.overlap)


def pool_facts(allocator: KVAllocator, spec: ModelSpec, runner_facts: dict[str, Any]) -> dict[str, Any]:
    """What the manifest says of the pool."""
    slots = allocator.num_blocks * allocator.block_size
    pages = {}
    if hasattr(allocator, "num_pages"):
        names = ("num_pages", "page_tokens", "page_bytes", "kv_tensors", "page_chosen")
        pages = {"pages": {name: getattr(allocator, name) for name in names}}
    levels = {"host_blocks": allocator.num_host_blocks} if allocator.levels else {}
    return (
        pages
        | levels
        | {
            "num_blocks": allocator.num_blocks,
            "block_size": allocator.block_size,
            "num_slots": slots,
            "bytes": slots * spec.kv_bytes_per_token,
            "runner": runner_facts,
        }
    )


def pool_blocks(
    config: RunConfig, spec: ModelSpec, *, num_slots: int | None = None, available: int | None = None
) -> int:
    """Usable blocks of the pool: what section `kv_cache` states, else `num_slots`, or `available` bytes.

    Raises:
        ConfigError: the pool cannot hold one block.
    """
    size = config.kv_cache
    return blocks_for_budget(
        check_int("allocator.block_size", config.allocator.need("block_size"), 1),
        spec.kv_bytes_per_token,
        num_blocks=size.num_blocks,
        num_slots=size.num_slots if num_slots is None else num_slots,
        memory_gib=size.memory_gib,
        available_bytes=available,
    )


def _say_chosen_pages(allocator: KVAllocator) -> None:
    """A line on stderr where the pool's size, and not the config, decided how large a page is."""
    if getattr(allocator, "page_chosen", False):
        size, tokens, count = (getattr(allocator, name) for name in ("page_bytes", "page_tokens", "num_pages"))
        pages = "one block" if size is None else f"{size // 1024:,} KiB"
        print(
            f"allocator.page_bytes=null: {count:,} pages of {pages} ({tokens:,} tokens), to fit the pool; a GPU maps "
            f"{CUDA_PAGE_BYTES // 1024:,} KiB",
            file=sys.stderr,
        )


def make_strategy(
    config: RunConfig, num_blocks: int, max_model_len: int, spec: ModelSpec, device: str = "cpu"
) -> Strategy:
    """The config's strategy, afresh.

    Pages whose size the config leaves open are chosen by the allocator, but on a GPU, which maps one size.
    """
    options: dict[str, Any] = {}
    if device == "cuda" and config.allocator.options.get("page_bytes", 0) is None:
        options["page_bytes"] = CUDA_PAGE_BYTES
    options |= _level_options(config, spec)
    return Strategy.of(
        config.allocator, config.scheduler, num_blocks=num_blocks, max_model_len=max_model_len,
        kv_bytes_per_token=spec.kv_bytes_per_token, **options,
    )  # fmt: skip


def _level_options(config: RunConfig, spec: ModelSpec) -> dict[str, Any]:
    """Options of the allocator's level below the pool, of `kv_cache.host_gib`.

    Raises:
        ConfigError: the allocator has no prefix cache, or the level holds no block.
    """
    host_gib = config.kv_cache.host_gib
    if not host_gib:
        return {}
    if "eviction" not in config.allocator.options:
        raise ConfigError(
            f"kv_cache.host_gib={host_gib} keeps what a prefix cache evicts, and this allocator has none; use "
            "allocator=paged_prefix or radix, or allocator.swap_gib for preempted requests alone"
        )
    block_bytes = spec.kv_bytes_per_token * check_int("allocator.block_size", config.allocator.need("block_size"), 1)
    num_blocks = int(host_gib * 2**30) // block_bytes
    if not num_blocks:
        raise ConfigError(
            f"kv_cache.host_gib={host_gib} holds no block of {block_bytes} bytes; raise it to at least "
            f"{math.ceil(block_bytes / 2**30 * 1e6) / 1e6:.6f}"
        )
    return {"host_blocks": num_blocks, "load": config.kv_cache.load}


def first_strategy(
    config: RunConfig, num_blocks: int, max_model_len: int, spec: ModelSpec, device: str = "cpu"
) -> Strategy:
    """The strategy of an engine that is being built; raises ConfigError where it does not fit the model."""
    strategy = make_strategy(config, num_blocks, max_model_len, spec, device)
    _say_chosen_pages(strategy.allocator)
    _check_window(strategy.allocator, spec, config.parallel.pipeline_parallel_size)
    if config.sampling.beams:
        strategy.scheduler.check_search(config.sampling.beams)
    return strategy


def _check_window(allocator: KVAllocator, spec: ModelSpec, stages: int) -> None:
    """A window narrower than the model's would free KV that the model still reads."""
    window = getattr(allocator, "sliding_window", None)
    if window is not None and stages > 1:
        raise ConfigError(
            f"allocator.sliding_window={window} cannot be combined with parallel.pipeline_parallel_size={stages}: a "
            "stage does not know what the layers of the others see; leave one out"
        )
    if window is not None and (spec.sliding_window is None or window < spec.sliding_window):
        needs = "sees its whole context" if spec.sliding_window is None else f"sees {spec.sliding_window} tokens"
        raise ConfigError(
            f"allocator.sliding_window={window} frees KV that model {spec.name!r} still reads: it {needs}; set it to "
            f"{'null' if spec.sliding_window is None else f'at least {spec.sliding_window}'}"
        )


def sizes_of(config: RunConfig) -> ModelSizes:
    """The sizes of the model that `config` names, from its config.json alone. Raises ModelError."""
    model = config.model
    return model_sizes(
        path=model.path,
        shape=model.shape,
        dtype=config.engine.dtype,
        trust_remote_code=model.trust_remote_code,
        name=cast(str | None, model.name),
        drawn=model.quantization if model.load_format == "dummy" or model.quantization in MADE else None,
    )


def resolve_max_model_len(config: EngineConfig, spec: ModelSpec) -> int:
    """Longest request: the config's, or the model's own. Raises ConfigError when it is over the model's."""
    if config.max_model_len is None:
        return spec.max_model_len
    if config.max_model_len > spec.max_model_len:
        raise ConfigError(
            f"engine.max_model_len={config.max_model_len} is over the {spec.max_model_len} positions of model "
            f"{spec.name!r}{f' ({spec.limited_by})' if spec.limited_by else ''}; lower it to at most that"
        )
    return config.max_model_len
