"""What the host sends for a step: a few integers per request or token, and the block-table entries that changed.

Of a decode step:

    pinned   | tokens | positions | rows | temperatures | keys, low | keys, high |  indices ... | values ... |
                 each [capacity], one request per column                            changed table entries

All of it goes to the device in one asynchronous copy. Block tables and last tokens stay there, a row per request.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from kvarena.engine.kernels.step import scatter_words

NUM_FIELDS = 6
# Pinned buffers in turn: with one step running and one being prepared, the third is free without waiting.
_NUM_BUFFERS = 3
_MAX_CHANGES = 1 << 16


class TableMirror:
    """What the device's block tables hold, so that only changes are sent. Free of torch.

    Args:
        num_rows: rows of the device's table.
        width: its columns.
    """

    def __init__(self, num_rows: int, width: int) -> None:
        self.width = width
        self.indices: list[int] = []
        self.values: list[int] = []
        self._sent: list[Sequence[int]] = [()] * num_rows

    def update(self, row: int, table: Sequence[int]) -> None:
        """Note what must be sent so that the device's row equals `table`, which may change in any way."""
        sent = self._sent[row]
        if sent == table:
            return
        if len(table) > self.width:
            table = table[: self.width]
        # The common change is a block more.
        kept = len(sent)
        if not (isinstance(table, list) and kept < len(table) and table[:kept] == sent):
            kept = 0
        start = row * self.width
        self.indices.extend(range(start + kept, start + len(table)))
        self.values.extend(table[kept:])
        self._sent[row] = table if isinstance(table, (range, tuple)) else list(table)

    def take(self) -> tuple[list[int], list[int]]:
        """Flat indices and values to send, each index once; forgets them."""
        indices, values = self.indices, self.values
        self.indices, self.values = [], []
        return indices, values


class WordSender:
    """Sends a step's integers, and changes of the device's block tables.

    Args:
        num_words: most integers of a step.
        tables: int32 [num_rows, width] on the device; written.

    Attributes:
        sent: int32 [num_words, rounded up] on the device, at a fixed address.
    """

    def __init__(self, num_words: int, tables: Tensor) -> None:
        # A multiple of four, so that what follows is aligned for wide loads.
        self._num_words = -(-num_words // 4) * 4
        self._tables = tables
        size = self._num_words + 2 * _MAX_CHANGES
        self._device = torch.zeros(size, dtype=torch.int32, device=tables.device)
        self.sent = self._device[: self._num_words]
        self._on_gpu = tables.is_cuda
        self._buffers = [torch.zeros(size, dtype=torch.int32, pin_memory=self._on_gpu) for _ in range(_NUM_BUFFERS)]
        self._arrays = [buffer.numpy() for buffer in self._buffers]
        self._copied = [torch.cuda.Event() for _ in range(_NUM_BUFFERS)] if self._on_gpu else []
        self._turn = 0

    def send_words(self, words: np.ndarray, indices: Sequence[int], values: Sequence[int]) -> None:
        """Send a step's integers and table changes.

        Args:
            words: int32 [n], n <= num_words; words beyond n become undefined.
            indices, values: entries of the flattened tables to change.
        """
        begin = self._num_words
        # More changes than fit in one copy come when many requests start to decode at once.
        while len(indices) > _MAX_CHANGES:
            self._send_changes(indices[:_MAX_CHANGES], values[:_MAX_CHANGES])
            indices, values = indices[_MAX_CHANGES:], values[_MAX_CHANGES:]
        turn = self._next()
        array = self._arrays[turn]
        array[: len(words)] = words
        count = len(indices)
        # Even halves, so that the values are aligned for wide loads.
        half = -(-count // 4) * 4
        array[begin : begin + count] = indices
        array[begin + half : begin + half + count] = values
        self._copy(turn, 0, begin + 2 * half)
        if count:
            self._apply(count, half)

    def _send_changes(self, indices: Sequence[int], values: Sequence[int]) -> None:
        turn = self._next()
        begin, count = self._num_words, len(indices)
        self._arrays[turn][begin : begin + count] = indices
        self._arrays[turn][begin + count : begin + 2 * count] = values
        self._copy(turn, begin, begin + 2 * count)
        self._apply(count, count)

    def _apply(self, count: int, half: int) -> None:
        begin = self._num_words
        pairs = self._device[begin : begin + 2 * half].view(2, half)[:, :count]
        scatter_words(self._tables.view(-1), pairs)

    def _next(self) -> int:
        self._turn = (self._turn + 1) % _NUM_BUFFERS
        if self._on_gpu:
            self._copied[self._turn].synchronize()
        return self._turn

    def _copy(self, turn: int, begin: int, end: int) -> None:
        self._device[begin:end].copy_(self._buffers[turn][begin:end], non_blocking=True)
        if self._on_gpu:
            self._copied[turn].record()


class DecodeSender(WordSender):
    """Sends a decode step's fields.

    Args:
        capacity: most requests of a step.
        tables: int32 [num_rows, width] on the device; written.

    Attributes:
        fields: int32 [NUM_FIELDS, capacity] on the device, at a fixed address.
    """

    def __init__(self, capacity: int, tables: Tensor) -> None:
        self.capacity = -(-capacity // 4) * 4
        super().__init__(NUM_FIELDS * self.capacity, tables)
        self.fields = self.sent.view(NUM_FIELDS, self.capacity)
        self._host_fields = np.zeros((NUM_FIELDS, self.capacity), dtype=np.int32)

    def send(self, fields: np.ndarray, indices: Sequence[int], values: Sequence[int]) -> None:
        """Send a step's fields and table changes.

        Args:
            fields: int32 [NUM_FIELDS, n], n <= capacity; columns beyond n keep what they held.
            indices, values: entries of the flattened tables to change.
        """
        self._host_fields[:, : fields.shape[1]] = fields
        self.send_words(self._host_fields.reshape(-1), indices, values)
