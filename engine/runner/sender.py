"""What the host sends for a step: its integers, and the block-table entries that changed, in one asynchronous copy:

pinned    words of the step | indices ... | values ... |
                            | changed table entries   |
"""

from __future__ import annotations

import numpy as np
import torch

from kvarena.engine.kernels.step import scatter_words
from kvarena.engine.runner.request_rows import RequestRows

# Pinned buffers in turn: with one step running and one being prepared, the third is free without waiting.
_NUM_BUFFERS = 3
_MAX_CHANGES = 1 << 16


class WordSender:
    """Sends a step's words, and brings the device's block tables up to date.

    Args:
        num_words: most words of a step.
        rows: whose `device_tables` are written.

    Attributes:
        sent: int32 [num_words] on the device, at a fixed address.
    """

    def __init__(self, num_words: int, rows: RequestRows) -> None:
        self._rows = rows
        device = rows.device_tables.device
        size = _aligned(num_words) + 2 * _MAX_CHANGES
        self._device = torch.zeros(size, dtype=torch.int32, device=device)
        self.sent = self._device[:num_words]
        self._on_gpu = device.type == "cuda"
        self._buffers = [torch.zeros(size, dtype=torch.int32, pin_memory=self._on_gpu) for _ in range(_NUM_BUFFERS)]
        self._arrays = [buffer.numpy() for buffer in self._buffers]
        self._copied = [torch.cuda.Event() for _ in range(_NUM_BUFFERS)] if self._on_gpu else []
        self._turn = 0

    def send(self, words: np.ndarray) -> None:
        """Send a step's words, int32 [n <= num_words]; words beyond n become undefined."""
        indices, values = self._rows.tables.take_changes()
        # More changes than fit in one copy come when many requests start to decode at once.
        while len(indices) > _MAX_CHANGES:
            self._send(words, indices[:_MAX_CHANGES], values[:_MAX_CHANGES])
            indices, values = indices[_MAX_CHANGES:], values[_MAX_CHANGES:]
        self._send(words, indices, values)

    def _send(self, words: np.ndarray, indices: list[int], values: list[int]) -> None:
        self._turn = (self._turn + 1) % _NUM_BUFFERS
        if self._on_gpu:
            self._copied[self._turn].synchronize()
        array = self._arrays[self._turn]
        count, begin = len(indices), _aligned(len(words))
        half = _aligned(count)
        array[: len(words)] = words
        array[begin : begin + count] = indices
        array[begin + half : begin + half + count] = values
        end = begin + 2 * half
        self._device[:end].copy_(self._buffers[self._turn][:end], non_blocking=True)
        if self._on_gpu:
            self._copied[self._turn].record()
        if count:
            scatter_words(self._rows.device_tables.view(-1), self._device[begin:end].view(2, half)[:, :count])


def _aligned(count: int) -> int:
    """Rounded up, so that what follows is aligned for wide loads."""
    return -(-count // 4) * 4
