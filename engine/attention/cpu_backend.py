"""Attention over the KV pool on CPUs, by this project's own kernels, straight through the block table.

Requests with one new token go to the decode kernel, the others to the prompts' kernel: at most two calls a layer.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kvarena.engine.attention.base import AttentionMetadata
from kvarena.engine.cpu import decode, prompt
from kvarena.engine.cpu.compiler import most_threads
from kvarena.engine.cpu.simd import KINDS
from kvarena.engine.pool.kv_pool import KVPool


@dataclass(slots=True)
class PreparedStep:
    """A step's split.

    Attributes:
        decode_rows, prompt_rows: int32, requests with one new token and with several.
        decode_chunks: at least as many as the former have together.
        has_parts: one of the former may have several.
    """

    decode_rows: np.ndarray
    prompt_rows: np.ndarray
    decode_chunks: int
    has_parts: bool


class CpuBackend:
    """Attention over `pool`, a pool on a CPU. Scores and sums are in float32, whatever the pool's dtype.

    Args:
        pool: where keys and values live.
        contiguous: the allocator hands out consecutive blocks only: of the block table the first entry alone is read.

    Attributes:
        kind: of the pool's elements.
        layers: addresses of each layer's keys and values, by slot.
    """

    def __init__(self, pool: KVPool, *, contiguous: bool = False) -> None:
        self.pool = pool
        self.contiguous = contiguous
        self.kind = KINDS[pool.dtype]
        self.layers = [tuple(part.data_ptr() for part in pool.slots(layer)) for layer in range(pool.num_layers)]
        self._scratch = torch.empty(0)
        self._every_row = np.arange(0, dtype=np.int32)

    def prepare(self, meta: AttentionMetadata) -> None:
        """Split the batch into decode rows and prompts."""
        lens, num_rows = meta.host_seq_lens, len(meta.host_seq_lens)
        if meta.max_query_len == 1:
            if len(self._every_row) < num_rows:
                self._every_row = np.arange(2 * num_rows, dtype=np.int32)
            rows, prompts = self._every_row[:num_rows], self._every_row[:0]
        else:
            is_decode = np.diff(meta.host_query_start_loc) == 1
            rows, prompts = (np.flatnonzero(kind).astype(np.int32) for kind in (is_decode, ~is_decode))
            lens = lens[rows]
        chunks = -(-lens // decode.CHUNK)
        has_parts = len(lens) > 0 and int(chunks.max()) > 1
        meta.prepared = PreparedStep(rows, prompts, int(chunks.sum()) + num_rows, has_parts)

    def write_kv(self, k: Tensor, v: Tensor, layer: int, meta: AttentionMetadata) -> None:
        """Store the new tokens' keys and values."""
        keys, values = self.pool.slots(layer)
        keys.index_copy_(0, meta.slot_mapping, k.to(keys.dtype))
        values.index_copy_(0, meta.slot_mapping, v.to(values.dtype))

    def attend(
        self,
        q: Tensor,
        layer: int,
        meta: AttentionMetadata,
        *,
        scale: float,
        sliding_window: int | None = None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """See `AttentionBackend.attend`."""
        prepared: PreparedStep = meta.prepared
        heads, dim = q.shape[1:]
        if q.stride(2) != 1 or q.stride(1) != dim:
            q = q.contiguous()
        out = torch.empty(q.shape, dtype=q.dtype)
        pool, threads = self.pool, most_threads()
        sinks = None if sinks is None else sinks.float().contiguous()
        shape = dim, heads // pool.num_kv_heads, KINDS[q.dtype], self.kind
        for rows, is_decode in ((prepared.decode_rows, True), (prepared.prompt_rows, False)):
            if not len(rows):
                continue
            if is_decode:
                kernel = decode.decode_kernel(*shape)
                words = decode.scratch_words(heads, dim, threads, prepared.decode_chunks)
            else:
                kernel, words = prompt.prompt_kernel(*shape), prompt.scratch_words(shape[1], dim, threads)
            if len(self._scratch) < words:
                self._scratch = torch.empty(2 * words)
            arguments = (
                q.data_ptr(), out.data_ptr(), *self.layers[layer], meta.block_table.data_ptr(),
                meta.block_table.stride(0), meta.seq_lens.data_ptr(), meta.query_start_loc.data_ptr(),
                rows.ctypes.data, len(rows), meta.block_size, pool.num_kv_heads, sliding_window or 0, self.contiguous,
                0 if sinks is None else sinks.data_ptr(), self._scratch.data_ptr(), q.stride(0), scale, softcap or 0.0,
            )  # fmt: skip
            kernel(threads, *arguments)
            if is_decode and prepared.has_parts:
                decode.merge_kernel(*shape[:3])(threads, *arguments)
        return out
