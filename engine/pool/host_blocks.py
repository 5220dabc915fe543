"""Host memory for swapped blocks and for evicted ones of a prefix cache, and the copies to and from it.

On a GPU the host side is pinned and the transfers run on a stream of their own:

    compute stream   gather blocks -> staging | forward ...                    | staging -> blocks | forward ...
    swap stream               staging -> host (meanwhile)  |  host -> staging -'

A swapped-out block may be written again at once, because the gather reads it first, in stream order. One swap stream
keeps transfers in order, so a host block is never read before it was written.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvarena.engine.errors import EngineError
from kvarena.engine.pool.memory_limits import asked_and_free, free_bytes


class HostBlocks:
    """`num_blocks` + 1 blocks (ids 0..num_blocks) of host memory beside a pool.

    Args:
        rows: the pool as [2 * num_layers, num_pool_blocks, elements of one block in one layer].
        num_blocks: the largest id.

    Raises:
        EngineError: the memory cannot be had.
    """

    def __init__(self, rows: Tensor, num_blocks: int) -> None:
        self._rows = rows
        self._on_gpu = rows.device.type == "cuda"
        # A block is contiguous here, so that it moves in one transfer.
        shape = (num_blocks + 1, rows.shape[0], rows.shape[2])
        asked = torch.Size(shape).numel() * rows.dtype.itemsize
        # The system would promise it, and kill the process that takes it.
        if asked > free_bytes(torch.device("cpu")):
            raise _no_room(MemoryError(), asked)
        try:
            self.data = torch.zeros(shape, dtype=rows.dtype, pin_memory=self._on_gpu)
        except (RuntimeError, MemoryError) as error:
            raise _no_room(error, asked) from error
        self._stream = torch.cuda.Stream(rows.device) if self._on_gpu else None

    def swap_out(self, sources: list[int], destinations: list[int]) -> None:
        """Copy pool blocks `sources` to host blocks `destinations`."""
        staged = self._rows.index_select(1, self._index(sources)).transpose(0, 1).contiguous()
        if self._stream is None:
            self.data[destinations] = staged
            return
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            for block, destination in zip(staged, destinations, strict=True):
                self.data[destination].copy_(block, non_blocking=True)
        staged.record_stream(self._stream)

    def swap_in(self, sources: list[int], destinations: list[int]) -> None:
        """Copy host blocks `sources` to pool blocks `destinations`; later work on the current stream sees them."""
        if self._stream is None:
            staged = self.data[sources]
        else:
            with torch.cuda.stream(self._stream):
                staged = torch.empty(
                    (len(sources), *self.data.shape[1:]), dtype=self.data.dtype, device=self._rows.device
                )
                for block, source in zip(staged, sources, strict=True):
                    block.copy_(self.data[source], non_blocking=True)
            torch.cuda.current_stream().wait_stream(self._stream)
            staged.record_stream(torch.cuda.current_stream())
        self._rows.index_copy_(1, self._index(destinations), staged.transpose(0, 1))

    def _index(self, ids: list[int]) -> Tensor:
        return torch.tensor(ids, device=self._rows.device)


def _no_room(error: BaseException, asked: int) -> EngineError:
    reason = asked_and_free(error, torch.device("cpu"), asked)
    return EngineError(
        f"no host memory for blocks below the KV pool: {reason}; lower kv_cache.host_gib or allocator.swap_gib"
    )
