"""Paged attention of one query per request (decode).

Work is cut into items: a chunk of one request's context, for one KV head; the query heads that share the KV head are
the rows of one small matrix product. A request of one chunk is finished by its item. Of several chunks, the item that
finishes last merges the partial results in the same launch: no second kernel, and a request that is not split pays
nothing. The counters return to zero by themselves, so a launch may be replayed from a CUDA graph.

    grid = (KV heads, items)       items: row     0 0 0 1 2 2 -1 -1      -1: padding, exits at once
                                          chunk   0 1 2 0 0 1            and the tokens that it covers

Split-KV decoding: Flash-Decoding (Dao et al., 2023); the merge by the last arrival is stream-K's fix-up.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvarena.engine.kernels.attention.base import AttentionCall
from kvarena.engine.kernels.attention.config import DecodeConfig
from kvarena.engine.kernels.common import (
    VARYING,
    await_previous,
    cap_scores,
    dot,
    exponent_scale,
    launch_options,
    load_tile,
    next_power_of_2,
    region_start,
    tile_blocks,
    tile_slots,
)


@triton.jit(**VARYING)
def decode_kernel(  # type: ignore[no-untyped-def]
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    items_ptr,  # int32: the items' rows, begins, ends, chunk numbers, and chunks of their row
    query_loc_ptr,
    seq_lens_ptr,
    table_ptr,
    sinks_ptr,
    partial_ptr,  # fp32 [items, KV heads, GROUP, HEAD_DIM]
    stats_ptr,  # fp32 [items, KV heads, 2, GROUP]: running maximum and sum
    counters_ptr,  # int32 [rows, KV heads]
    capacity,
    scale,
    softcap,
    stride_q_row,
    stride_q_head,
    stride_out_row,
    stride_out_head,
    stride_head,
    stride_table,
    GROUP: tl.constexpr,
    GROUP_PAD: tl.constexpr,
    ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    SLOT: tl.constexpr,
    STRIDE_SLOT: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    MERGE: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SINKS: tl.constexpr,
    CONTIGUOUS: tl.constexpr,
    UPCAST: tl.constexpr,
    STAGES: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One item for one KV head; see the module's docstring and `decode_attention`."""
    kv_head = tl.program_id(0)
    num_kv_heads = tl.num_programs(0)
    item = tl.program_id(1)
    # A step's inputs were there before the layer's first kernel. All before the branch: one wait for memory, not two.
    row = tl.load(items_ptr + item)
    begin = tl.load(items_ptr + capacity + item)
    end = tl.load(items_ptr + 2 * capacity + item)
    chunk = tl.load(items_ptr + 3 * capacity + item)
    num_chunks = tl.load(items_ptr + 4 * capacity + item)
    if row < 0:
        await_previous(OVERLAP)
        return
    first_seen = 0
    if WINDOW > 0:
        first_seen = tl.maximum(tl.load(seq_lens_ptr + row) - WINDOW, 0)
        # A chunk that the window has left takes part in the merge with nothing.
        begin = tl.maximum(begin, first_seen // TILE * TILE)
    table_row = table_ptr + row.to(tl.int64) * stride_table
    first_slot = region_start(table_row, BLOCK_SIZE, CONTIGUOUS)
    blocks = tile_blocks(table_row, begin, end, BLOCK_SIZE, TILE, CONTIGUOUS)
    k_base = k_ptr + kv_head * stride_head
    v_base = v_ptr + kv_head * stride_head
    query_row = tl.load(query_loc_ptr + row).to(tl.int64)
    await_previous(OVERLAP)

    group = tl.arange(0, ROWS)
    dims = tl.arange(0, DIM_PAD)
    heads = kv_head * GROUP + group
    is_query = (group[:, None] < GROUP) & (dims[None, :] < HEAD_DIM)
    q = tl.load(
        q_ptr + query_row * stride_q_row + heads[:, None] * stride_q_head + dims[None, :], mask=is_query, other=0.0
    )

    factor = exponent_scale(scale, SOFTCAP)
    peak = tl.full([ROWS], float("-inf"), tl.float32)
    # Summed over tokens after the loop: a sum over the warps in every step would cost two barriers.
    totals = tl.full([ROWS, TILE], 0.0, tl.float32)
    acc = tl.full([ROWS, DIM_PAD], 0.0, tl.float32)
    for start in tl.range(begin, end, TILE, num_stages=STAGES):
        positions = start + tl.arange(0, TILE)
        inside = positions < end
        slots = tile_slots(blocks, first_slot, start, SLOT, BLOCK_SIZE, TILE, CONTIGUOUS)
        blocks = tile_blocks(table_row, start + TILE, end, BLOCK_SIZE, TILE, CONTIGUOUS)
        k = load_tile(k_base, slots, inside, STRIDE_SLOT, HEAD_DIM, DIM_PAD, True)
        scores = cap_scores(dot(q, tl.trans(k), UPCAST), scale, softcap, SOFTCAP)
        seen = inside
        if WINDOW > 0:
            seen = seen & (positions >= first_seen)
        # Every tile holds a position that is seen, so the maximum is finite.
        scores = tl.where(seen[None, :], scores, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, 1))
        shrink = tl.exp2((peak - new_peak) * factor)
        weights = tl.exp2(scores * factor - (new_peak * factor)[:, None])
        totals = totals * shrink[:, None] + weights
        v = load_tile(v_base, slots, inside, STRIDE_SLOT, HEAD_DIM, DIM_PAD, True)
        acc = acc * shrink[:, None] + dot(weights.to(v.dtype), v, UPCAST)
        peak = new_peak

    total = tl.sum(totals, 1)
    peak = peak * factor
    out_base = out_ptr + query_row * stride_out_row
    if num_chunks == 1:
        if SINKS:
            sink = tl.load(sinks_ptr + heads, mask=group < GROUP, other=0.0).to(tl.float32) * 1.4426950408889634
            total += tl.exp2(sink - peak)
        out = acc / total[:, None]
        tl.store(
            out_base + heads[:, None] * stride_out_head + dims[None, :], out.to(out_ptr.dtype.element_ty), mask=is_query
        )
        return

    cell = item.to(tl.int64) * num_kv_heads + kv_head
    tl.store(partial_ptr + cell * (GROUP * HEAD_DIM) + group[:, None] * HEAD_DIM + dims[None, :], acc, mask=is_query)
    tl.store(stats_ptr + cell * (2 * GROUP) + group, peak, mask=group < GROUP)
    tl.store(stats_ptr + cell * (2 * GROUP) + GROUP + group, total, mask=group < GROUP)
    # All threads' stores come before this program's arrival, and the last arrival sees everybody's.
    tl.debug_barrier()
    counter = counters_ptr + row * num_kv_heads + kv_head
    arrived = tl.atomic_add(counter, 1, sem="acq_rel")
    if arrived == num_chunks - 1:
        _merge(
            out_base,
            sinks_ptr,
            partial_ptr,
            stats_ptr,
            cell - chunk.to(tl.int64) * num_kv_heads,  # the row's items are consecutive
            num_kv_heads,
            num_chunks,
            kv_head,
            stride_out_head,
            GROUP,
            GROUP_PAD,
            HEAD_DIM,
            DIM_PAD,
            MERGE,
            SINKS,
        )
        tl.store(counter, 0)


@triton.jit
def _merge(  # type: ignore[no-untyped-def]
    out_base,
    sinks_ptr,
    partial_ptr,
    stats_ptr,
    first_cell,
    stride_cell,
    num_chunks,
    kv_head,
    stride_out_head,
    GROUP: tl.constexpr,
    GROUP_PAD: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    MERGE: tl.constexpr,
    SINKS: tl.constexpr,
):
    """Merge a row's partial results, MERGE chunks at a time, past the L1 cache."""
    group = tl.arange(0, GROUP_PAD)
    dims = tl.arange(0, DIM_PAD)
    is_head = group < GROUP
    peak = tl.full([GROUP_PAD], float("-inf"), tl.float32)
    total = tl.full([GROUP_PAD], 0.0, tl.float32)
    acc = tl.full([GROUP_PAD, DIM_PAD], 0.0, tl.float32)
    for start in range(0, num_chunks, MERGE):
        chunks = start + tl.arange(0, MERGE)
        cells = first_cell + chunks * stride_cell
        exists = (chunks < num_chunks)[:, None] & is_head[None, :]
        stats = stats_ptr + cells[:, None] * (2 * GROUP) + group[None, :]
        peaks = tl.load(stats, mask=exists, other=float("-inf"), cache_modifier=".cg")
        totals = tl.load(stats + GROUP, mask=exists, other=0.0, cache_modifier=".cg")
        parts = tl.load(
            partial_ptr
            + cells[:, None, None] * (GROUP * HEAD_DIM)
            + group[None, :, None] * HEAD_DIM
            + dims[None, None, :],
            mask=exists[:, :, None] & (dims < HEAD_DIM)[None, None, :],
            other=0.0,
            cache_modifier=".cg",
        )
        new_peak = tl.maximum(peak, tl.max(peaks, 0))
        # Padding heads and chunks outside of the window have no finite maximum.
        anchor = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        shrink = tl.exp2(peak - anchor)
        weights = tl.exp2(peaks - anchor[None, :])
        total = total * shrink + tl.sum(totals * weights, 0)
        acc = acc * shrink[:, None] + tl.sum(parts * weights[:, :, None], 0)
        peak = new_peak
    heads = kv_head * GROUP + group
    if SINKS:
        sink = tl.load(sinks_ptr + heads, mask=is_head, other=0.0).to(tl.float32) * 1.4426950408889634
        total += tl.exp2(sink - tl.where(is_head, peak, 0.0))
    out = acc / tl.where(is_head, total, 1.0)[:, None]
    tl.store(
        out_base + heads[:, None] * stride_out_head + dims[None, :],
        out.to(out_base.dtype.element_ty),
        mask=is_head[:, None] & (dims < HEAD_DIM)[None, :],
    )


def merge_width(group_pad: int, dim_pad: int, num_warps: int) -> int:
    """Chunks that the merge reads at once: 64 registers a thread."""
    return max(2, min(64, 2048 * num_warps // (group_pad * dim_pad)))


class DecodeScratch:
    """Partial results and arrival counters, kept from launch to launch. Grows when asked to; never shrinks.

    Args:
        num_items, num_rows: for how many items and batch rows there is room.
        num_heads, num_kv_heads, head_dim: the model's.
        device: the pool's.
    """

    def __init__(
        self, num_items: int, num_rows: int, num_heads: int, num_kv_heads: int, head_dim: int, device: torch.device
    ) -> None:
        self.num_items, self.num_rows = num_items, num_rows
        self.partial = torch.empty(num_items, num_heads, head_dim, dtype=torch.float32, device=device)
        self.stats = torch.empty(num_items, 2, num_heads, dtype=torch.float32, device=device)
        self.counters = torch.zeros(num_rows, num_kv_heads, dtype=torch.int32, device=device)


def decode_attention(
    call: AttentionCall,
    *,
    items: Tensor,
    num_items: int,
    scratch: DecodeScratch,
    config: DecodeConfig,
    overlap: bool | None = None,
) -> None:
    """Attention of the rows that `items` name, one query each.

    Args:
        call: what is read and written; a row's query lies at `query_start_loc[row]`.
        items: int32 [5 * num_items], see `kvarena.engine.kernels.attention.plan`; chunks begin at whole tiles of
        `config.tile`. num_items: the grid's second dimension; padding items have row -1.
        scratch: with room for the items and rows.
        config: tile, warps and stages, see `decode_config`; the items were cut for it.
        overlap: see `launch_options`.
    """
    group_pad = next_power_of_2(call.group)
    decode_kernel[(call.num_kv_heads, num_items)](
        **call.arguments(items, num_items, config),
        partial_ptr=scratch.partial,
        stats_ptr=scratch.stats,
        counters_ptr=scratch.counters,
        GROUP_PAD=group_pad,
        ROWS=max(16, group_pad),
        MERGE=merge_width(group_pad, call.dim_pad, config.num_warps),
        **launch_options(overlap),
    )
