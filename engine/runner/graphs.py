"""CUDA graphs of the decode forward, one per batch-size bucket, in one shared memory pool.

A step of n requests runs in the smallest bucket that holds n. Entries beyond n stand for the null row: context length
1, their KV goes to the null block, and their logits are not looked at. A bucket's first step runs as it is, which
compiles what it needs, and is then captured; so a server answers at once and no start-up waits for captures.

    host      fields, attention plan --copy-->  device
    graph     expand inputs -> embedding -> layers -> logits [bucket, V]
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from kvarena.engine.attention.base import AttentionBackend, AttentionMetadata
from kvarena.engine.errors import EngineError
from kvarena.engine.kernels.step import DecodeBuffers, expand_decode


class Forward(Protocol):
    """A model's forward over a flattened batch whose metadata is prepared."""

    def __call__(
        self,
        input_ids: Tensor,
        positions: Tensor,
        meta: AttentionMetadata,
        *,
        out: Tensor | None = None,
        all_rows: bool = False,
    ) -> Tensor:
        """Logits [N, V] of `meta.logits_indices`, or with `all_rows` of every token in order; into `out` if given."""
        ...


@runtime_checkable
class ReservingBackend(AttentionBackend, Protocol):
    """An attention backend whose plan can live at a fixed address."""

    def reserve(self, meta: AttentionMetadata, num_rows: int, num_prefill_tokens: int = 0) -> None:
        """Give `meta` a plan of fixed size and address, which `prepare` then fills.

        Args:
            meta: of every step that the plan serves.
            num_rows: most requests of a step.
            num_prefill_tokens: most new tokens of requests with more than one.
        """
        ...


def batch_buckets(max_batch: int) -> list[int]:
    """Batch sizes that get a graph: powers of two up to 8, every 8 up to 256, every 32 beyond, and `max_batch`."""
    sizes = [1, 2, 4, *range(8, min(max_batch, 256) + 1, 8), *range(288, max_batch + 1, 32), max_batch]
    return sorted({size for size in sizes if size <= max_batch})


class GraphCapture:
    """Captures CUDA graphs into one memory pool. They must run one at a time, in stream order."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream()

    def __call__(self, run: Callable[[], None], what: str) -> torch.cuda.CUDAGraph:
        """Capture what `run` launches; it must have run before, so that nothing is left to compile.

        Raises:
            EngineError: `what`, as the message calls it, cannot be captured.
            torch.OutOfMemoryError: no memory for its buffers.
        """
        graph = torch.cuda.CUDAGraph()
        self._stream.wait_stream(torch.cuda.current_stream())
        # Not `torch.cuda.graph`, which waits for the device and collects garbage first: the step is still running.
        with torch.cuda.stream(self._stream):
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                run()
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                raise EngineError(
                    f"{what} cannot be captured in a CUDA graph ({str(error).splitlines()[0]}); set runner.graphs=false"
                ) from error
            finally:
                graph.capture_end()
        torch.cuda.current_stream().wait_stream(self._stream)
        return graph


class DecodeGraphs:
    """Runs decode forwards at fixed addresses, captured where that is possible.

    Args:
        forward: the model.
        backend: attention, prepared here.
        sent: int32 [fields, capacity] on the device: tokens, positions and rows in its first three rows.
        last_tokens: int64 [num_rows], each row's last token.
        tables: int32 [num_rows, width].
        logits: [most requests of a step, V], written.
        block_size: slots per block.
        capture: captures the graphs; None runs every step without one (the same kernels, launched one by one).
    """

    def __init__(
        self,
        forward: Forward,
        backend: ReservingBackend,
        sent: Tensor,
        last_tokens: Tensor,
        tables: Tensor,
        logits: Tensor,
        block_size: int,
        *,
        capture: GraphCapture | None,
    ) -> None:
        max_batch = len(logits)
        self.buckets = batch_buckets(max_batch)
        self._forward = forward
        self._backend = backend
        self._sent = sent
        self._last_tokens = last_tokens
        self._tables = tables
        self._logits = logits
        self._block_size = block_size
        self._buffers = DecodeBuffers(max_batch, tables.shape[1], tables.device)
        self._loc = torch.arange(max_batch + 1, dtype=torch.int32, device=tables.device)
        self._host_loc = np.arange(max_batch + 1, dtype=np.int32)
        self._indices = torch.arange(max_batch, device=tables.device)
        self._metas: dict[int, AttentionMetadata] = {}
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self._capture = capture
        # The largest first: what the backend reserves for it serves the others, and never moves.
        self._meta(self.buckets[-1])

    def bucket(self, count: int) -> int:
        """The smallest bucket that holds `count` requests."""
        return self.buckets[bisect_left(self.buckets, count)]

    def run(self, seq_lens: np.ndarray) -> Tensor:
        """Run the step whose fields have been sent.

        Args:
            seq_lens: int32 [bucket], context lengths, 1 for the entries that pad the batch.

        Returns:
            [bucket, V]; overwritten by the next step.
        """
        bucket = len(seq_lens)
        meta = self._meta(bucket)
        meta.host_seq_lens = seq_lens
        meta.max_seq_len = int(seq_lens.max())
        self._backend.prepare(meta)
        captured = self._graphs.get(bucket)
        if captured is not None:
            captured.replay()
        else:
            self._run(bucket, meta)
            if self._capture is not None:
                what = f"the decode forward for {bucket} requests"
                self._graphs[bucket] = self._capture(lambda: self._run(bucket, meta), what)
        return self._logits[:bucket]

    def _run(self, bucket: int, meta: AttentionMetadata) -> None:
        buffers = self._buffers
        expand_decode(self._sent, self._last_tokens, self._tables, buffers, bucket, self._block_size)
        self._forward(buffers.ids[:bucket], buffers.positions[:bucket], meta, out=self._logits[:bucket], all_rows=True)

    def _meta(self, bucket: int) -> AttentionMetadata:
        meta = self._metas.get(bucket)
        if meta is None:
            buffers = self._buffers
            meta = self._metas[bucket] = AttentionMetadata(
                query_start_loc=self._loc[: bucket + 1],
                seq_lens=buffers.seq_lens[:bucket],
                slot_mapping=buffers.slots[:bucket],
                block_table=buffers.block_table[:bucket],
                logits_indices=self._indices[:bucket],
                max_query_len=1,
                max_seq_len=1,
                block_size=self._block_size,
                host_query_start_loc=self._host_loc[: bucket + 1],
                host_seq_lens=self._host_loc[:0],
            )
            self._backend.reserve(meta, bucket)
        return meta
