"""How much of a GPU's memory is left for the KV pool: the largest step is run once, and its peak is measured."""

from __future__ import annotations

import numpy as np
import torch

from engine.attention.base import packed_metadata
from engine.attention.hook import attention_context
from engine.attention.null import NullBackend
from engine.errors import ConfigError, EngineError
from engine.models.spec import LoadedModel


def available_kv_bytes(
    model: LoadedModel, *, gpu_memory_utilization: float, max_num_batched_tokens: int, max_num_seqs: int
) -> int:
    """Bytes that `gpu_memory_utilization` of the GPU's memory leaves beside weights, activations and other processes.

    Call it before the pool is made. May be negative, when the weights alone are too large.

    Args:
        model: on a CUDA device.
        gpu_memory_utilization: share of the device's whole memory, in (0, 1].
        max_num_batched_tokens: most tokens of a step.
        max_num_seqs: most requests of a step: so many rows of logits.

    Raises:
        ConfigError: the model is not on a GPU.
        EngineError: the largest step does not fit; names the setting to lower.
    """
    device = model.device
    if device.type != "cuda":
        raise ConfigError(
            "engine.gpu_memory_utilization sizes the KV pool on a GPU only; set kv_cache.num_slots, "
            "kv_cache.num_blocks or kv_cache.memory_gib"
        )
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    try:
        run_largest_step(model, max_num_batched_tokens, max_num_seqs)
        torch.cuda.synchronize(device)
    except torch.OutOfMemoryError as error:
        raise EngineError(
            f"a step of {max_num_batched_tokens} tokens does not fit beside the weights; lower "
            "scheduler.max_num_batched_tokens or scheduler.max_num_seqs"
        ) from error
    peak = torch.cuda.max_memory_allocated(device)
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    others = total - free - torch.cuda.memory_reserved(device)
    return int(total * gpu_memory_utilization) - others - peak


def run_largest_step(model: LoadedModel, num_tokens: int, max_num_seqs: int) -> None:
    """Run a forward of `num_tokens` tokens and turn its logits into fp32 probabilities, as the sampler may."""
    longest = min(num_tokens, model.spec.max_model_len)
    lens = [longest] * (num_tokens // longest) + ([num_tokens % longest] if num_tokens % longest else [])
    # Nothing reads or writes KV here: one block of the length of the longest sequence serves all.
    meta = packed_metadata(lens, np.zeros((len(lens), 1), dtype=np.int32), longest, model.device)
    ids = torch.zeros(num_tokens, dtype=torch.int64, device=model.device)
    positions = torch.cat([torch.arange(n, device=model.device) for n in lens])
    wanted = torch.arange(min(num_tokens, max_num_seqs), device=model.device)
    with torch.inference_mode(), attention_context(meta, NullBackend()):
        logits = model.logits(ids, positions, wanted).float()
        logits.softmax(-1)
