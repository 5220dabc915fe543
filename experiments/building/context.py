"""Whether a pool holds the longest request that a server allows, and what would do where it does not."""

from __future__ import annotations

import math

import torch

from kvarena.engine.contract import KVAllocator, cdiv
from kvarena.engine.errors import ConfigError
from kvarena.engine.models import ModelSpec
from kvarena.engine.pool.gpu_memory import GpuMemory
from kvarena.engine.runner.profile import SETTING, card_memory
from kvarena.experiments.settings.config import EngineConfig, KVCacheConfig


def check_context_fits(
    engine: EngineConfig,
    size: KVCacheConfig,
    allocator: KVAllocator,
    spec: ModelSpec,
    max_model_len: int,
    memory: GpuMemory | None,
) -> None:
    """See that an empty pool holds a request of `max_model_len` tokens.

    Args:
        engine: section `engine`.
        size: section `kv_cache`.
        allocator: over the empty pool.
        spec: the model's.
        max_model_len: longest prompt + output.
        memory: follows the GPU; None where there is none.

    Raises:
        ConfigError: it does not; says what would fit, and what else would help.
    """
    fits = allocator.max_request_tokens
    if fits >= max_model_len:
        return
    by = size.sized_by
    named = by or (SETTING if memory is not None else "this machine's memory")
    ways = [f"set engine.max_model_len={fits}"] if fits > 1 else []
    larger = _larger_pool(engine, by, allocator, spec, max_model_len, memory)
    if larger is not None:
        ways.append(f"raise the pool to {larger}")
    if spec.dtype is torch.float32 and 2 * fits >= max_model_len and by in (None, "kv_cache.memory_gib"):
        ways.append("set engine.dtype=bfloat16")
    raise ConfigError(
        f"the KV pool, sized by {named}, holds requests of at most {fits} tokens, and {spec.name} would be served with "
        f"{max_model_len}; " + (", or ".join(ways) or "take a smaller model")
    )


def _larger_pool(
    engine: EngineConfig,
    by: str | None,
    allocator: KVAllocator,
    spec: ModelSpec,
    max_model_len: int,
    memory: GpuMemory | None,
) -> str | None:
    """The setting of a pool that is large enough, now sized `by`; None where there may be none."""
    block_size = allocator.block_size
    num_blocks = cdiv(max_model_len, block_size)
    if allocator.max_request_tokens < allocator.num_blocks * block_size:
        # A request gets a region, of which a pool's size says little: what the pool falls short by, as a factor.
        num_blocks = cdiv(allocator.num_blocks * max_model_len, max(1, allocator.max_request_tokens))
        num_blocks = 1 << (num_blocks - 1).bit_length()
    block_bytes = block_size * spec.kv_bytes_per_token
    if by == "kv_cache.num_blocks":
        return f"{by}={num_blocks}"
    if by == "kv_cache.num_slots":
        return f"{by}={num_blocks * block_size}"
    if by == "kv_cache.memory_gib":
        return f"{by}={math.ceil((num_blocks + 1) * block_bytes / 2**30 * 1e4) / 1e4:g}"
    if memory is None:
        return None
    card = card_memory(torch.device("cuda"), memory.context)
    missing = (num_blocks - allocator.num_blocks + 1) * block_bytes
    needed = math.ceil(100 * (engine.gpu_memory_utilization + missing / card.total)) / 100
    return f"{SETTING}={needed:g}" if needed <= card.largest_share else None
