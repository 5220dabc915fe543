"""Attention over the KV pool with this project's Triton kernels.

Rows with one new token go to the decode kernel, the others to the prefill kernel: at most two launches a layer. Only
host copies of the step's metadata are read to plan it; nothing waits for the device. With `reserve`, a step's plan
lives in buffers of fixed size and address, which a CUDA graph may capture. On Hopper both have a CUDA kernel for plain
layers. Steps of whole prompts of equal length may go to the library (`kvarena.engine.attention.dense`). Where a step's
metadata say what rows have in common, these go to a kernel that reads it once.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kvarena.engine.attention.base import AttentionMetadata
from kvarena.engine.attention.dense import DensePrompts, library_backend
from kvarena.engine.errors import ConfigError, EngineError
from kvarena.engine.kernels.attention.base import AttentionCall
from kvarena.engine.kernels.attention.config import (
    MANY_ROWS,
    decode_config,
    prefill_config,
    shared_config,
    triton_from,
)
from kvarena.engine.kernels.attention.decode import DecodeScratch, decode_attention
from kvarena.engine.kernels.attention.plan import DECODE_FIELDS, Capacity, Shape, plan_step
from kvarena.engine.kernels.attention.prefill import prefill_attention
from kvarena.engine.kernels.attention.prefill_plan import PREFILL_FIELDS
from kvarena.engine.kernels.attention.shared_plan import SharedDecode, SharedPlan
from kvarena.engine.kernels.attention.stream_decode import FEWEST_ROWS, StreamDecode, streams
from kvarena.engine.kernels.attention.wide_prefill import WidePrefill, fits
from kvarena.engine.kernels.hopper import load_hopper_kernels
from kvarena.engine.kernels.store import gather_kv, store_kv
from kvarena.engine.pool.kv_pool import KVPool
from kvarena.engine.sampling.transfer import copy_to, to_device
from kvarena.engine.sharing.reads import SharedReads


@dataclass(slots=True)
class _Plan:
    """A step's work items on the device.

    Attributes:
        capacity: of the item lists.
        decode: int32 [DECODE_FIELDS * capacity.decode].
        starts: int32 [capacity.starts].
        prefill: int32 [PREFILL_FIELDS * capacity.prefill].
        buffer: both in one.
        scratch: for the decode kernel. A captured graph uses it for as long as the plan lives.
        shape: how the step was cut; its decode configuration is the kernel's.
        is_reserved: True when a graph relies on the buffer's address and the capacity.
        dense: (rows, length) of a step that the library may do.
        fresh: a layer and its new keys and values, as `keep_kv` got them.
        shared: of a step whose decode rows have something in common; there are no other decode items then.
    """

    capacity: Capacity
    decode: Tensor
    starts: Tensor
    prefill: Tensor
    buffer: Tensor
    scratch: DecodeScratch
    shape: Shape
    is_reserved: bool
    dense: tuple[int, int] | None = None
    fresh: tuple[int, Tensor, Tensor] | None = None
    shared: SharedPlan | None = None


class TritonBackend:
    """Attention over `pool` in Triton.

    Args:
        pool: where keys and values live.
        num_heads: query heads of a layer.
        contiguous: the allocator hands out consecutive blocks only: kernels read the first table entry alone. A
            compile-time switch, for the comparison of contiguous and paged kernels.
        use_library: let PyTorch's attention do the steps that it does faster.
        use_hopper: on a Hopper GPU, let the CUDA kernels do the rows that they do faster, if the pool's blocks are for
            them.

    Attributes:
        decode_kernel: `cuda` or `triton`, what decode rows go to where both would do, and from how many rows on another
            one is faster on this card.
        prefill_kernel: the same of rows with several new tokens.

    Raises:
        ConfigError: the head counts do not fit.
    """

    def __init__(
        self,
        pool: KVPool,
        num_heads: int,
        *,
        contiguous: bool = False,
        use_library: bool = True,
        use_hopper: bool = True,
    ) -> None:
        if num_heads % pool.num_kv_heads:
            raise ConfigError(
                f"{num_heads} query heads do not divide among {pool.num_kv_heads} KV heads; the Triton backend needs "
                "equal groups: set kvarena.engine.attention=reference"
            )
        self.pool = pool
        self.num_heads = num_heads
        self.contiguous = contiguous
        self._prefill_config = prefill_config(pool.head_dim, pool.dtype.itemsize, num_heads // pool.num_kv_heads)
        self._num_multiprocessors = _num_multiprocessors(pool.device)
        self._scratch = self._new_scratch(0, 0)
        self._stream, self._wide = _load_hopper(pool, num_heads // pool.num_kv_heads) if use_hopper else (None, None)
        self._triton_from = None if self._stream is None else triton_from(torch.cuda.get_device_name(pool.device))
        self.decode_kernel = "triton" if self._stream is None else "cuda"
        if self._triton_from is not None:
            self.decode_kernel += f", triton from {self._triton_from} rows on"
        self.prefill_kernel = "triton" if self._wide is None else "cuda"
        self._shared = SharedDecode(
            pool,
            num_heads,
            shared_config(pool.head_dim, pool.dtype.itemsize, num_heads // pool.num_kv_heads),
            self._num_multiprocessors,
        )
        self._dense = DensePrompts(library_backend(pool.device, pool.dtype, pool.head_dim) if use_library else None)

    def warm_up(self) -> None:
        """See `KeepingBackend`."""
        self._dense.warm_up(self.num_heads, self.pool)

    @property
    def most_shared_rows(self) -> int:
        """See `SharingBackend`."""
        return self._shared.most_rows

    def can_share(self, reads: SharedReads) -> bool:
        """See `SharingBackend`."""
        return self._shared.fits(reads)

    def shape(self, num_rows: int, *, is_most: bool = False) -> Shape:
        """How steps of `num_rows` decode rows are cut; `is_most`: of at most so many, and mostly fewer."""
        pool = self.pool
        stays = self._stream is not None and num_rows >= FEWEST_ROWS
        if self._triton_from is not None and num_rows >= self._triton_from and not is_most:
            stays = False
        # Of programs that stay all batches are alike; the kernel that does layers of another kind takes their items.
        config = decode_config(pool.head_dim, pool.dtype.itemsize, max(num_rows, MANY_ROWS + 1) if stays else num_rows)
        programs = config.programs_per_sm * self._num_multiprocessors
        queries = self._prefill_config.rows * pool.num_kv_heads // self.num_heads
        prefill = None if self._wide is None else self._wide.programs(pool.num_kv_heads)
        return Shape(config, queries, max(1, programs // pool.num_kv_heads), stays, prefill)

    def reserve(
        self, meta: AttentionMetadata, num_rows: int, num_prefill_tokens: int = 0, *, shares: bool = False
    ) -> None:
        """Give `meta` a plan of fixed size and address, for a CUDA graph; `prepare` then refills it.

        Args:
            meta: the metadata object that every replay uses.
            num_rows: most rows of a step.
            num_prefill_tokens: most new tokens of rows with more than one; 0 for a graph of decode rows alone.
            shares: of steps that come with `reads`, and no others.
        """
        shape = self.shape(num_rows, is_most=num_prefill_tokens > 0)
        prefill = shape.prefill_capacity(num_rows, num_prefill_tokens) if num_prefill_tokens else 0
        capacity = Capacity(shape.decode_capacity(num_rows), prefill, shape.slots_per_head + 1 if shape.stays else 0)
        if shares:
            capacity = Capacity(0, prefill)
        buffer = torch.full((capacity.num_words,), -1, dtype=torch.int32, device=self.pool.device)
        scratch = self._scratch_for(capacity.decode, num_rows)
        meta.prepared = _views(buffer, capacity, scratch, shape, is_reserved=True)
        if shares:
            meta.prepared.shared = self._shared.reserve(num_rows)

    def prepare(self, meta: AttentionMetadata) -> None:
        """Cut the step into work items and send them to the device."""
        reserved = meta.prepared if isinstance(meta.prepared, _Plan) and meta.prepared.is_reserved else None
        if reserved is not None:
            # The kernel's configuration is part of the graph.
            shape = reserved.shape
        else:
            shape = self.shape(int((np.diff(meta.host_query_start_loc) == 1).sum()))
        reads = meta.reads
        if reserved is not None and (reads is None) != (reserved.shared is None):
            raise EngineError("this step's buffers are of steps that share their reads, or of others, and it is not")
        words, capacity = plan_step(
            meta.host_query_start_loc,
            meta.host_seq_lens,
            shape,
            reserved.capacity if reserved else None,
            decodes=reads is None,
        )
        if reserved is not None:
            if reads is not None and reserved.shared is not None:
                self._shared.fill(reserved.shared, reads)
            if len(words):
                copy_to(words, reserved.buffer)
            return
        sent = to_device(words, self.pool.device)
        scratch = self._scratch_for(capacity.decode, len(meta.host_seq_lens))
        plan = _views(sent, capacity, scratch, shape, is_reserved=False)
        plan.dense = self._dense.shape(meta.host_query_start_loc, meta.host_seq_lens)
        if reads is not None:
            plan.shared = self._shared.plan(reads, len(meta.host_seq_lens))
        meta.prepared = plan

    def write_kv(self, k: Tensor, v: Tensor, layer: int, meta: AttentionMetadata) -> None:
        """Store the new tokens' keys and values."""
        keys, values = self.pool.slots(layer)
        store_kv(k, v, keys, values, meta.slot_mapping)
        if self.wants_kv(meta):
            self.keep_kv(k, v, layer, meta)

    def wants_kv(self, meta: AttentionMetadata) -> bool:
        """See `KeepingBackend.wants_kv`: in steps that the library may do."""
        plan: _Plan = meta.prepared
        return plan.dense is not None

    def keep_kv(self, k: Tensor, v: Tensor, layer: int, meta: AttentionMetadata) -> None:
        """See `KeepingBackend.keep_kv`."""
        meta.prepared.fresh = (layer, k, v)

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
        plan: _Plan = meta.prepared
        if scale <= 0:
            raise EngineError(f"the attention of layer {layer} scales its scores by {scale}; it must be positive")
        if plan.dense is not None and softcap is None and sinks is None:
            length = plan.dense[1]
            if sliding_window is None or sliding_window >= length:
                k, v = self._fresh_kv(plan, layer, meta)
                dense = self._dense.attend(q, k, v, plan.dense, scale)
                if dense is not None:
                    return dense
        keys, values = self.pool.slots(layer)
        if q.stride(2) != 1:
            q = q.contiguous()
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        call = AttentionCall(
            q, keys, values, out, meta.query_start_loc, meta.seq_lens, meta.block_table, meta.block_size, scale,
            sliding_window, softcap, sinks, self.contiguous,
        )  # fmt: skip
        decode, prefill, starts = plan.capacity
        if plan.shared is not None:
            self._shared(call, plan.shared)
        elif decode and starts and self._stream is not None and self._stream.takes(call):
            self._stream(call, items=plan.decode, num_items=decode, starts=plan.starts, scratch=plan.scratch)
        elif decode:
            decode_attention(call, items=plan.decode, num_items=decode, scratch=plan.scratch, config=plan.shape.decode)
        if prefill and self._wide is not None and self._wide.takes(call):
            self._wide(call, items=plan.prefill, num_items=prefill)
        elif prefill:
            prefill_attention(call, items=plan.prefill, num_items=prefill, config=self._prefill_config)
        return out

    def _fresh_kv(self, plan: _Plan, layer: int, meta: AttentionMetadata) -> tuple[Tensor, Tensor]:
        """The new tokens' keys and values side by side: as they were handed over, or else read back."""
        fresh, plan.fresh = plan.fresh, None
        if fresh is not None and fresh[0] == layer:
            return fresh[1:]
        keys, values = self.pool.slots(layer)
        k, v = keys.new_empty(2, len(meta.slot_mapping), *keys.shape[1:]).unbind()
        gather_kv(k, v, keys, values, meta.slot_mapping)
        return k, v

    def _scratch_for(self, num_items: int, num_rows: int) -> DecodeScratch:
        """Scratch with room for a plan; plans share it, because launches follow each other."""
        old = self._scratch
        if num_items > old.num_items or num_rows > old.num_rows:
            self._scratch = self._new_scratch(max(num_items, 2 * old.num_items), max(num_rows, 2 * old.num_rows))
        return self._scratch

    def _new_scratch(self, num_items: int, num_rows: int) -> DecodeScratch:
        pool = self.pool
        return DecodeScratch(num_items, num_rows, self.num_heads, pool.num_kv_heads, pool.head_dim, pool.device)


def _views(buffer: Tensor, capacity: Capacity, scratch: DecodeScratch, shape: Shape, *, is_reserved: bool) -> _Plan:
    decode, starts, prefill = buffer.split(
        [DECODE_FIELDS * capacity.decode, capacity.starts, PREFILL_FIELDS * capacity.prefill]
    )
    return _Plan(capacity, decode, starts, prefill, buffer, scratch, shape, is_reserved)


def _load_hopper(pool: KVPool, group: int) -> tuple[StreamDecode | None, WidePrefill | None]:
    """The CUDA kernels for decode and prefill, where the device and the pool's shape are for them."""
    shape = (pool.head_dim, group, pool.block_size, pool.dtype)
    decodes, prefills = streams(*shape), fits(*shape)
    # Of a virtual pool a block's last tokens may not be backed by memory.
    if not (decodes or prefills) or not pool.slots(0)[0].is_contiguous():
        return None, None
    kernels = load_hopper_kernels(pool.device)
    if kernels is None:
        return None, None
    return StreamDecode(kernels) if decodes else None, WidePrefill(kernels) if prefills else None


def _num_multiprocessors(device: torch.device) -> int:
    """Of a GPU; the interpreter runs programs one by one, where a small number still exercises the split."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
