"""The model that a config names, on its device, and how many blocks of KV that leaves room for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from kvarena.engine.checks import check_int
from kvarena.engine.contract import cdiv
from kvarena.engine.models import LoadedModel, load_model
from kvarena.engine.pool.memory_limits import free_bytes
from kvarena.engine.runner.profile import available_kv_bytes
from kvarena.experiments.building.parts import pool_blocks, target_device
from kvarena.experiments.settings.config import RunConfig

if TYPE_CHECKING:
    from kvarena.engine.parallel.groups import Groups

CPU_SLOTS = 32768  # of the pool, where neither the config nor a GPU says how large it is


def load(config: RunConfig, groups: Groups | None = None) -> LoadedModel:
    """The model of section `model`, or a rank's part of it. Raises KvarenaError."""
    model, engine = config.model, config.engine
    options: dict[str, Any] = {
        "path": model.path,
        "shape": model.shape,
        "dtype": engine.dtype,
        "device": target_device(engine.device),
        "load_format": model.load_format,
        "trust_remote_code": model.trust_remote_code,
        "seed": engine.seed,
        "name": cast(str | None, model.name),
        "image_cache_bytes": int(engine.image_cache_mib * 2**20),
        "quantization": model.quantization,
    }
    if groups is None:
        return load_model(**options)
    # Imported here: of a model on one device nothing of it is needed.
    from kvarena.engine.models.parts import load_part

    return load_part(groups, **options)


def num_blocks(config: RunConfig, model: LoadedModel, in_use_before: int, max_model_len: int) -> int:
    """Usable blocks: what the config states, or what a profiling forward leaves of this engine's share of the GPU.

    On a CPU, whose memory is no one's share: `CPU_SLOTS`, or one request of `max_model_len`, as far as half of what is
    free holds it.
    """
    if config.kv_cache.sized_by is not None:
        return pool_blocks(config, model.spec)
    token_bytes = model.spec.kv_bytes_per_token
    block_size = check_int("allocator.block_size", config.allocator.need("block_size"), 1)
    if model.device.type != "cuda":
        # Ranks of a machine without GPUs share its memory.
        share = 1 if model.shard is None else model.shard.layout.world_size
        room = free_bytes(model.device) // 2 // share // token_bytes
        wanted = cdiv(max(CPU_SLOTS, max_model_len), block_size) * block_size
        return pool_blocks(config, model.spec, num_slots=max(min(wanted, room), block_size))
    available = available_kv_bytes(
        model,
        gpu_memory_utilization=config.engine.gpu_memory_utilization,
        max_num_batched_tokens=config.scheduler.need("max_num_batched_tokens"),
        max_num_seqs=config.scheduler.need("max_num_seqs"),
        max_model_len=max_model_len,
        in_use_before=in_use_before,
        block_bytes=block_size * token_bytes,
    )
    return pool_blocks(config, model.spec, available=available)
