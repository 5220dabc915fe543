"""The KV pool for an allocator: one tensor, or on a GPU mapped pages under virtual regions."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from kvarena.engine.contract import KVAllocator
from kvarena.engine.errors import ConfigError, EngineError
from kvarena.engine.models import ModelSpec
from kvarena.engine.pool.kv_pool import KVPool
from kvarena.engine.pool.memory_limits import asked_and_free, is_out_of_memory, size_text
from kvarena.experiments.building.parts import CUDA_PAGE_BYTES
from kvarena.experiments.settings.config import RunnerConfig

KV_TENSORS = 2


def make_pool(config: RunnerConfig, allocator: KVAllocator, spec: ModelSpec, device: str, sized_by: str) -> KVPool:
    """Memory for all block ids of `allocator`; `sized_by`: the setting that says how large it is, for errors.

    Raises:
        ConfigError: a virtual allocator's pages cannot be mapped on this device, or the kernels cannot read them.
        EngineError: the memory cannot be had.
    """
    shape: dict[str, Any] = {
        "num_blocks": allocator.num_virtual_blocks,
        "block_size": allocator.block_size,
        "num_layers": spec.num_layers,
        "num_kv_heads": spec.num_kv_heads,
        "head_dim": spec.head_dim,
        "dtype": spec.dtype,
        "device": device,
        "num_swap_blocks": allocator.num_host_blocks,
        "sized_by": sized_by,
    }
    if device != "cuda" or allocator.num_virtual_blocks == allocator.num_blocks:
        # On a CPU the tensor is as large as the virtual space: the system maps its pages when they are touched.
        return KVPool(**shape, num_backed_blocks=allocator.num_blocks)
    # Imported here: CUDA's binding is not needed, and may not be there, without a GPU.
    from kvarena.engine.pool.virtual_pool import VirtualKVPool

    if config.attention == "reference":
        raise ConfigError(
            "runner.attention=reference reads whole blocks, and memory behind a virtual region may end inside one; set "
            "runner.attention=triton, or allocator=contiguous"
        )
    page_bytes, kv_tensors = (getattr(allocator, name, None) for name in ("page_bytes", "kv_tensors"))
    if page_bytes is None or kv_tensors != KV_TENSORS:
        raise ConfigError(
            "on a GPU a virtual region's keys and its values are mapped page by page: set allocator.page_tokens=null, "
            f"allocator.kv_tensors={KV_TENSORS} and allocator.page_bytes={CUDA_PAGE_BYTES}"
        )
    return VirtualKVPool(num_pages=allocator.num_pages, page_bytes=page_bytes, **shape)  # type: ignore[attr-defined]


@contextmanager
def room_beside_pool(max_num_seqs: int, pool: KVPool, max_model_len: int) -> Iterator[None]:
    """Around what a runner makes for itself: tables, logits, CUDA graphs.

    Raises:
        EngineError: the pool has left no memory for it; says what was asked for, what was free and what to lower.
    """
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise EngineError(
            f"the KV pool of {size_text(pool.num_bytes)} leaves no room on {pool.device} for the runner's tables and "
            f"graphs: {asked_and_free(error, pool.device)}; lower {pool.sized_by}, "
            f"scheduler.max_num_seqs={max_num_seqs} or engine.max_model_len={max_model_len}"
        ) from error
