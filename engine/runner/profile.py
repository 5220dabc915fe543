"""How much of a GPU's memory is left for the KV pool: the largest step is run once, and its peak is measured.

    total   | context, other processes |          free, before this engine loads anything           |
            |<-- in_use_before ------->|
    share   |<----- gpu_memory_utilization of the total, for this engine: ----->|
            | weights, largest step | libraries |           KV pool            |

The share is this engine's own, whatever other processes hold: two engines with 0.4 each run side by side. What they
hold only bounds what the card can still give.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from kvarena.engine.attention.base import packed_metadata
from kvarena.engine.attention.hook import attention_context
from kvarena.engine.attention.null import NullBackend
from kvarena.engine.errors import ConfigError, EngineError
from kvarena.engine.models.spec import LoadedModel
from kvarena.engine.pool.memory_limits import asked_and_free, is_out_of_memory, size_text

# What libraries load into a GPU beside torch's allocator, at most; another engine that starts meanwhile is none of it.
LIBRARY_BYTES = 2**30
# No pool takes a card's last memory: it is mapped in pages, and graphs and workspaces come after it.
KEPT_FREE = 2**30
SETTING = "engine.gpu_memory_utilization"


@dataclass(frozen=True)
class CardMemory:
    """A GPU's memory as one engine sees it, in bytes.

    Attributes:
        total: of the card.
        in_use_before: by this process's context and by other processes, before the model was loaded.
        in_use_now: the same when the largest step has run: all but what torch's allocator holds here.
        weights: of the model.
        peak: what torch's allocator held at most, the weights among it.
    """

    total: int
    in_use_before: int
    in_use_now: int = 0
    weights: int = 0
    peak: int = 0

    @property
    def largest_share(self) -> float:
        """The largest share that the card could give before the model was loaded, in hundredths."""
        return math.floor(100 * (self.total - self.in_use_before - KEPT_FREE) / self.total) / 100

    def check_share(self, share: float) -> None:
        """Refuse a share that the card cannot give. The context of this process is no reason to: it is in no share.

        Raises:
            ConfigError: says what is asked for, what is free, and the share that would start.
        """
        asked, free = int(self.total * share), self.total - self.in_use_before
        if asked > free + LIBRARY_BYTES:
            raise ConfigError(
                f"{SETTING}={share:g} asks for {size_text(asked)} of the GPU's {size_text(self.total)}, and "
                f"{size_text(free)} are free; end what holds the rest, or {self._lower()}"
            )

    def kv_bytes(self, share: float, block_bytes: int, dtype: torch.dtype) -> int:
        """What `share` leaves for the KV pool.

        Args:
            share: of the card's memory, for this engine, in (0, 1].
            block_bytes: of one block: the pool needs room for two.
            dtype: of weights and KV.

        Raises:
            ConfigError: not even one block fits, or the card has less left than the share leaves.
        """
        libraries = min(max(0, self.in_use_now - self.in_use_before), LIBRARY_BYTES)
        own = self.peak + libraries
        left = int(self.total * share) - own
        if left < 2 * block_bytes:
            raise ConfigError(self._too_small(share, own, block_bytes, dtype))
        free = self.total - self.in_use_now - self.peak
        if left > free + LIBRARY_BYTES or free < 2 * block_bytes + KEPT_FREE:
            raise ConfigError(
                f"{SETTING}={share:g} leaves {size_text(left)} for KV, and other processes have left "
                f"{size_text(max(0, free))} of the GPU's {size_text(self.total)}; end them, or lower it"
            )
        return min(left, free - KEPT_FREE)

    def _lower(self) -> str:
        return f"lower it to at most {self.largest_share:g}" if self.largest_share > 0 else "wait for them"

    def _too_small(self, share: float, own: int, block_bytes: int, dtype: torch.dtype) -> str:
        needed = math.ceil(100 * (own + 2 * block_bytes) / self.total) / 100
        short = own + 2 * block_bytes - int(self.total * share)
        ways = [f"raise it to at least {needed:g}"] if needed <= self.largest_share else []
        # A step of half as many tokens needs about half the memory beside the weights.
        if (self.peak - self.weights) // 2 > short:
            ways.append("lower scheduler.max_num_batched_tokens")
        if dtype is torch.float32 and self.weights // 2 > short:
            ways.append("set engine.dtype=bfloat16")
        return (
            f"{SETTING}={share:g} gives this engine {size_text(int(self.total * share))} of the GPU's "
            f"{size_text(self.total)}; weights take {size_text(self.weights)}, the largest step "
            f"{size_text(own - self.weights)}, and one block of KV {size_text(2 * block_bytes)}; "
            + (", or ".join(ways) or "take a smaller model or a larger GPU")
        )


def card_memory(device: torch.device, in_use_before: int) -> CardMemory:
    """What can be said before a model is loaded. `in_use_before`: see `CardMemory`."""
    return CardMemory(torch.cuda.mem_get_info(device)[1], in_use_before)


def available_kv_bytes(
    model: LoadedModel,
    *,
    gpu_memory_utilization: float,
    max_num_batched_tokens: int,
    max_num_seqs: int,
    max_model_len: int,
    in_use_before: int,
    block_bytes: int,
) -> int:
    """Bytes that this engine's share of the GPU's memory leaves beside its weights and activations.

    Call it before the pool is made.

    Args:
        model: on a CUDA device.
        gpu_memory_utilization: share of the device's whole memory for this engine, in (0, 1].
        max_num_batched_tokens: most tokens of a step.
        max_num_seqs: most requests of a step: so many rows of logits.
        max_model_len: longest context, which bounds an image.
        in_use_before: bytes in use on the device before the model was loaded (`GpuMemory.context`).
        block_bytes: of one block of KV.

    Raises:
        ConfigError: the model is not on a GPU, or the share leaves no room.
        EngineError: the largest step does not fit; names the setting to lower.
    """
    device = model.device
    if device.type != "cuda":
        raise ConfigError(
            f"{SETTING} sizes the KV pool on a GPU only; set kv_cache.num_slots, kv_cache.num_blocks or "
            "kv_cache.memory_gib"
        )
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    weights = torch.cuda.memory_allocated(device)
    try:
        run_largest_step(model, max_num_batched_tokens, max_num_seqs)
        if model.images is not None:
            model.images.run_largest(max_model_len)
        torch.cuda.synchronize(device)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise EngineError(
            f"a step of {max_num_batched_tokens} tokens does not fit beside {size_text(weights)} of weights: "
            f"{asked_and_free(error, device)}; lower scheduler.max_num_batched_tokens or scheduler.max_num_seqs"
        ) from error
    peak = torch.cuda.max_memory_allocated(device)
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    now = total - free - torch.cuda.memory_reserved(device)
    card = CardMemory(total, in_use_before, now, weights, peak)
    return card.kv_bytes(gpu_memory_utilization, block_bytes, model.spec.dtype)


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
