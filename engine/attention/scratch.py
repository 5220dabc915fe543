"""Buffers of the reference backend that are kept from layer to layer and step to step: fresh large ones cost page
faults, which would take longer than filling them.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Scratch:
    """Named buffers that grow. What one call got is overwritten by the next with the same name and dtype."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, torch.dtype, torch.device], Tensor] = {}

    def gather(self, name: str, cache: Tensor, blocks: Tensor, dtype: torch.dtype) -> Tensor:
        """Blocks of a layer's keys or values.

        Args:
            name: of the buffer.
            cache: [num_blocks + 1, block_size, num_kv_heads, head_dim], contiguous.
            blocks: int64 [n].
            dtype: of the result.

        Returns:
            [n * block_size, num_kv_heads, head_dim].
        """
        shape = (len(blocks), cache[0].numel())
        rows = self._get(name, shape, cache.dtype, cache.device)
        torch.index_select(cache.view(cache.shape[0], -1), 0, blocks, out=rows)
        if cache.dtype != dtype:
            rows = self._get(name, shape, dtype, cache.device).copy_(rows)
        return rows.view(-1, *cache.shape[2:])

    def _get(self, name: str, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """A buffer of undefined content."""
        size = shape[0] * shape[1]
        buffer = self._buffers.get((name, dtype, device))
        if buffer is None or buffer.numel() < size:
            buffer = torch.empty(size, dtype=dtype, device=device)
            self._buffers[name, dtype, device] = buffer
        return buffer[:size].view(shape)
