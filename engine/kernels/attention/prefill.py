"""Paged attention of several queries per request: whole prompts, chunks of prompts, prompts after a cached prefix.

One launch takes any mixture of them. A program computes a block of a request's queries for one KV head; the query
heads that share the KV head are rows of the same matrix product:

    rows of the product     q0h0 q0h1 q0h2 q0h3  q1h0 q1h1 ...         (4 query heads per KV head)
    grid = (KV heads, items)       items: row      0 0 0 1 2 -1        -1: padding, exits at once
                                          block    2 1 0 0 0           late blocks first: they read the most
                                          part     0 0 0 0 0           others than the first exit: it does them all

The softmax is computed in one pass over the keys (Milakov and Gimelshein, 2018; FlashAttention, Dao et al., 2022).
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from kvarena.engine.kernels.attention.base import AttentionCall
from kvarena.engine.kernels.attention.config import PrefillConfig
from kvarena.engine.kernels.common import (
    VARYING,
    await_previous,
    cap_scores,
    dot,
    exponent_scale,
    launch_options,
    load_tile,
    region_start,
    tile_blocks,
    tile_slots,
)


@triton.jit(**VARYING)
def prefill_kernel(  # type: ignore[no-untyped-def]
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    items_ptr,  # int32: the items' rows, their query blocks, and their parts
    query_loc_ptr,
    seq_lens_ptr,
    table_ptr,
    sinks_ptr,
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
    QUERIES: tl.constexpr,
    ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    SLOT: tl.constexpr,
    STRIDE_SLOT: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SINKS: tl.constexpr,
    CONTIGUOUS: tl.constexpr,
    UPCAST: tl.constexpr,
    STAGES: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One item for one KV head; see the module's docstring and `prefill_attention`."""
    await_previous(OVERLAP)
    kv_head = tl.program_id(0)
    item = tl.program_id(1)
    row = tl.load(items_ptr + item)
    # An item is cut into parts for the kernel of wide_prefill.py.
    if (row < 0) | (tl.load(items_ptr + 2 * capacity + item) > 0):
        return
    block = tl.load(items_ptr + capacity + item)
    query_begin = tl.load(query_loc_ptr + row)
    num_queries = tl.load(query_loc_ptr + row + 1) - query_begin
    seq_len = tl.load(seq_lens_ptr + row)

    index = tl.arange(0, ROWS)
    query = block * QUERIES + index // GROUP
    heads = kv_head * GROUP + index % GROUP
    is_query = (query < num_queries) & (index < QUERIES * GROUP)
    dims = tl.arange(0, DIM_PAD)
    in_head = dims[None, :] < HEAD_DIM
    # Position of the block's first query, and of each row's query.
    first_position = seq_len - num_queries + block * QUERIES
    query_position = seq_len - num_queries + query
    query_row = (query_begin + query).to(tl.int64)
    q_pointers = q_ptr + query_row[:, None] * stride_q_row + heads[:, None] * stride_q_head + dims[None, :]
    q = tl.load(q_pointers, mask=is_query[:, None] & in_head, other=0.0)
    table_row = table_ptr + row.to(tl.int64) * stride_table
    first_slot = region_start(table_row, BLOCK_SIZE, CONTIGUOUS)
    k_base = k_ptr + kv_head * stride_head
    v_base = v_ptr + kv_head * stride_head

    factor = exponent_scale(scale, SOFTCAP)
    peak = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.full([ROWS], 0.0, tl.float32)
    acc = tl.full([ROWS, DIM_PAD], 0.0, tl.float32)
    end = tl.minimum(first_position + QUERIES, seq_len)
    # Tiles that every query of the block sees in full need no mask.
    edge = (first_position + 1) // TILE * TILE
    if WINDOW > 0:
        edge = tl.maximum(first_position - WINDOW + 1, 0) // TILE * TILE
    edge_blocks = tile_blocks(table_row, edge, end, BLOCK_SIZE, TILE, CONTIGUOUS)
    if WINDOW == 0:
        blocks = tile_blocks(table_row, 0, end, BLOCK_SIZE, TILE, CONTIGUOUS)
        for start in tl.range(0, edge, TILE, num_stages=STAGES):
            slots = tile_slots(blocks, first_slot, start, SLOT, BLOCK_SIZE, TILE, CONTIGUOUS)
            blocks = tile_blocks(table_row, start + TILE, end, BLOCK_SIZE, TILE, CONTIGUOUS)
            k = load_tile(k_base, slots, slots >= 0, STRIDE_SLOT, HEAD_DIM, DIM_PAD, False)
            scores = cap_scores(dot(q, tl.trans(k), UPCAST), scale, softcap, SOFTCAP)
            new_peak = tl.maximum(peak, tl.max(scores, 1))
            shrink = tl.exp2((peak - new_peak) * factor)
            weights = tl.exp2(scores * factor - (new_peak * factor)[:, None])
            total = total * shrink + tl.sum(weights, 1)
            v = load_tile(v_base, slots, slots >= 0, STRIDE_SLOT, HEAD_DIM, DIM_PAD, False)
            acc = acc * shrink[:, None] + dot(weights.to(v.dtype), v, UPCAST)
            peak = new_peak
    blocks = edge_blocks
    for start in tl.range(edge, end, TILE, num_stages=STAGES):
        positions = start + tl.arange(0, TILE)
        inside = positions < end
        slots = tile_slots(blocks, first_slot, start, SLOT, BLOCK_SIZE, TILE, CONTIGUOUS)
        blocks = tile_blocks(table_row, start + TILE, end, BLOCK_SIZE, TILE, CONTIGUOUS)
        k = load_tile(k_base, slots, inside, STRIDE_SLOT, HEAD_DIM, DIM_PAD, True)
        scores = cap_scores(dot(q, tl.trans(k), UPCAST), scale, softcap, SOFTCAP)
        # Keys beyond the end are zeros, and only rows without a query see them.
        seen = positions[None, :] <= query_position[:, None]
        if WINDOW > 0:
            seen = seen & (positions[None, :] > query_position[:, None] - WINDOW)
        scores = tl.where(seen, scores, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, 1))
        # A query may see nothing of a window's first tiles.
        anchor = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        shrink = tl.exp2((peak - anchor) * factor)
        weights = tl.exp2(scores * factor - (anchor * factor)[:, None])
        total = total * shrink + tl.sum(weights, 1)
        v = load_tile(v_base, slots, inside, STRIDE_SLOT, HEAD_DIM, DIM_PAD, True)
        acc = acc * shrink[:, None] + dot(weights.to(v.dtype), v, UPCAST)
        peak = new_peak

    if SINKS:
        sink = tl.load(sinks_ptr + heads, mask=is_query, other=0.0).to(tl.float32) * 1.4426950408889634
        total += tl.exp2(sink - tl.where(is_query, peak * factor, 0.0))
    out = acc / tl.where(is_query, total, 1.0)[:, None]
    tl.store(
        out_ptr + query_row[:, None] * stride_out_row + heads[:, None] * stride_out_head + dims[None, :],
        out.to(out_ptr.dtype.element_ty),
        mask=is_query[:, None] & in_head,
    )


def prefill_attention(call: AttentionCall, *, items: Tensor, num_items: int, config: PrefillConfig) -> None:
    """Causal attention of the queries that `items` name over their contexts.

    Args:
        call: what is read and written.
        items: int32 [PREFILL_FIELDS * num_items], see `kvarena.engine.kernels.attention.prefill_plan`; blocks of
            `config.rows // group` queries.
        num_items: the grid's second dimension; padding items have row -1.
        config: rows, tile, warps and stages, see `prefill_config`.
    """
    prefill_kernel[(call.num_kv_heads, num_items)](
        **call.arguments(items, num_items, config),
        QUERIES=config.rows // call.group,
        ROWS=config.rows,
        **launch_options(),
    )
