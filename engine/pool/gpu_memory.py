"""What a run holds of its GPU's memory, by part. Measured around the steps, never during one.

    device  | context | weights | KV pool | workspace | graphs | activations | other |
            |<---------------------------- peak ---------------------------->|

    weights      parameters and buffers of the model, each storage once
    KV pool      the pool's tensor; or, where pages are mapped into reserved addresses, its physical pages
    image cache  encoded tiles of images (`engine.image_cache_mib`), of models that read images
    workspace    what the runner keeps: tables, logits, plans of the kernels, cuBLAS's own
    graphs       the private pool of the CUDA graphs: the activations of captured steps
    activations  the most that steps held at once on top of all that (those without a graph)
    context      in use before the model was loaded: the CUDA context, and other processes on the same device
    other        the rest: what torch's allocator keeps without using it, kernels' code, the driver's part of graphs

The parts add up to the peak by construction: `other` is the remainder.
"""

from __future__ import annotations

import gc
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from kvarena.engine.pool.kv_pool import KVPool

PARTS = (
    "weights_bytes", "pool_bytes", "image_cache_bytes", "workspace_bytes", "graphs_bytes", "activations_bytes",
    "context_bytes", "other_bytes",
)  # fmt: skip
NO_GPU = dict.fromkeys((*PARTS, "peak_gpu_bytes"))


@dataclass(frozen=True)
class Reading:
    """The state of a device's memory, in bytes.

    Attributes:
        allocated: in tensors of torch's allocator, outside the graphs' pools.
        peak_allocated: the most that was allocated at once since the peak was reset, the graphs' pools included.
        all_allocated: the same now.
        peak_reserved: the most that torch's allocator held since the peak was reset.
        graphs: what it holds for graphs.
        outside: in use on the device beside what torch's allocator holds.
    """

    allocated: int
    peak_allocated: int
    all_allocated: int
    peak_reserved: int
    graphs: int
    outside: int


def memory_parts(
    context: int, weights: int, pool: int, pool_in_torch: int, before: Reading, after: Reading, image_cache: int = 0
) -> dict[str, int]:
    """The parts, which add up to `peak_gpu_bytes`.

    Args:
        context: in use on the device before the model was loaded.
        weights: bytes of the model.
        pool: bytes of the KV pool.
        pool_in_torch: what of these torch's allocator gave.
        before: when the first step was about to run, with the peak of what was reserved until then.
        after: when the last one had run; its peaks are those of the steps.
        image_cache: bytes for encoded tiles.
    """
    # A graph that is captured while steps run allocates its pool then: that is the graphs', not the steps'.
    captured = max(0, after.graphs - before.graphs)
    parts = {
        "weights_bytes": weights,
        "pool_bytes": pool,
        "image_cache_bytes": image_cache,
        "workspace_bytes": max(0, before.allocated - weights - pool_in_torch - image_cache),
        "graphs_bytes": after.graphs,
        "activations_bytes": max(0, after.peak_allocated - before.all_allocated - captured),
        "context_bytes": context,
    }
    peak = max(before.peak_reserved, after.peak_reserved) + max(before.outside, after.outside)
    return parts | {"other_bytes": peak - sum(parts.values()), "peak_gpu_bytes": peak}


def storage_bytes(tensors: Iterable[torch.Tensor], device: torch.device) -> int:
    """Bytes behind `tensors` on `device`; views of one storage count once."""
    storages = (tensor.untyped_storage() for tensor in tensors if tensor.device.type == device.type)
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


class GpuMemory:
    """Follows one engine on one GPU, from before its model is loaded to after its last step.

    Make it first; then call `set_pool`, `begin` when everything is warm, and `parts` after the last step.

    Args:
        device: a CUDA device.
        context: what was in use before this process loaded its first model, where another `GpuMemory` measured it.

    Attributes:
        context: bytes in use on the device before the model was loaded.
    """

    def __init__(self, device: torch.device, context: int | None = None) -> None:
        self._device = device
        gc.collect()  # of the cell before, in a sweep
        torch.cuda.init()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        self.context = self._outside() if context is None else context
        self._weights = self._pool = self._pool_in_torch = self._image_cache = 0
        self._before: Reading | None = None

    def _outside(self) -> int:
        free, total = torch.cuda.mem_get_info(self._device)
        return total - free - torch.cuda.memory_reserved(self._device)

    def set_pool(self, pool: KVPool, in_torch: int) -> None:
        """The pool of the steps; `in_torch`: bytes of it that torch's allocator gave (0 where pages are mapped)."""
        self._pool, self._pool_in_torch = pool.num_bytes, in_torch

    def begin(self, modules: Iterable[torch.nn.Module], image_cache: int = 0) -> None:
        """The next step is the first that counts.

        Args:
            modules: the model as it runs, and its vision tower.
            image_cache: bytes for encoded tiles.
        """
        torch.cuda.synchronize(self._device)
        tensors = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
        self._weights, self._image_cache = storage_bytes(tensors, self._device), image_cache
        self._before = self._read()
        torch.cuda.reset_peak_memory_stats(self._device)

    def parts(self) -> dict[str, int]:
        """See `memory_parts`. Waits for the device."""
        if self._before is None:
            raise RuntimeError("GpuMemory.begin was not called")
        torch.cuda.synchronize(self._device)
        return memory_parts(
            self.context, self._weights, self._pool, self._pool_in_torch, self._before, self._read(), self._image_cache
        )

    def _read(self) -> Reading:
        index = torch.cuda.current_device() if self._device.index is None else self._device.index
        segments = [seg for seg in torch.cuda.memory_snapshot() if seg["device"] == index]
        own = [seg for seg in segments if not is_private(seg)]
        stats = torch.cuda.memory_stats(self._device)
        return Reading(
            allocated=sum(seg["allocated_size"] for seg in own),
            peak_allocated=stats["allocated_bytes.all.peak"],
            all_allocated=stats["allocated_bytes.all.current"],
            peak_reserved=stats["reserved_bytes.all.peak"],
            graphs=sum(seg["total_size"] for seg in segments if is_private(seg)),
            outside=self._outside(),
        )


def is_private(segment: Mapping[str, Any]) -> bool:
    """Whether a segment of `torch.cuda.memory_snapshot` belongs to the pool of a CUDA graph."""
    return tuple(segment.get("segment_pool_id", (0, 0))) != (0, 0)
