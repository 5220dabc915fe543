"""Paged attention of one query per request, where requests begin with the same blocks: these are read once.

An item is a part of one or more rows' contexts, for one KV head (`kvarena.engine.sharing.reads`). The query heads of
all its rows that share the KV head are the rows of one matrix product: of one request they are few and go through a
narrow tile, of many they fill a wide one. Every row's parts leave their sums in memory, and the item that ends last of
a row's merges them, in the order of the parts.

    queue            items x KV heads, those of many rows first, with single rows' items strewn in
    program 0   3 7 12 ...        programs stay and take the next of the queue, so that a plan may have any number of
    program 1   1 5 8 ...         items: the grid, and with it a captured graph, is the same; or every so-manieth item

The products of wide items and the reads of single rows' items need different parts of the device; side by side they
hide behind each other. After Hydragen (Juravsky et al., 2024) and FlashInfer's cascade (Ye et al., 2024), which launch
them one after the other.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvarena.engine.kernels.attention.base import AttentionCall
from kvarena.engine.kernels.attention.config import SharedConfig
from kvarena.engine.kernels.attention.decode import DecodeScratch, _merge, merge_width
from kvarena.engine.kernels.common import (
    VARYING,
    await_previous,
    cap_scores,
    dot,
    exponent_scale,
    launch_options,
    load_tile,
    next_power_of_2,
    tile_blocks,
    tile_slots,
)

# Views into one buffer, of which nothing is known but where it begins.
VIEWS = ["head_ptr", "places_ptr", "cells_ptr", "parts_ptr"]
SHARED_VARYING = VARYING | {
    "do_not_specialize": [*VARYING["do_not_specialize"], "num_kv_heads"],
    "do_not_specialize_on_alignment": [*VARYING["do_not_specialize_on_alignment"], *VIEWS],
}


@triton.jit(**SHARED_VARYING)
def shared_decode_kernel(  # type: ignore[no-untyped-def]
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    items_ptr,  # int32 [items, ITEM_FIELDS]: first row, number of rows, begin, end, part
    query_loc_ptr,
    seq_lens_ptr,
    table_ptr,
    sinks_ptr,
    partial_ptr,  # fp32 [cells, KV heads, GROUP, HEAD_DIM]
    stats_ptr,  # fp32 [cells, KV heads, 2, GROUP]: running maximum and sum
    counters_ptr,  # int32 [rows, KV heads]
    queue_ptr,  # int32: work items taken, programs that have ended
    head_ptr,  # int32: how many items there are
    places_ptr,  # int32 [rows]: of the rows in order, their places in the batch
    cells_ptr,  # int32 [rows]: the cell of each one's first part
    parts_ptr,  # int32 [rows]: how many parts it has
    num_kv_heads,
    capacity,  # noqa: ARG001 - every attention kernel has it
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
    NARROW: tl.constexpr,
    MIDDLE: tl.constexpr,
    WIDE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    SLOT: tl.constexpr,
    STRIDE_SLOT: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    NARROW_TILE: tl.constexpr,
    MERGE: tl.constexpr,
    QUEUE: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SINKS: tl.constexpr,
    CONTIGUOUS: tl.constexpr,
    UPCAST: tl.constexpr,
    STAGES: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Items as long as there are any; see the module's docstring and `shared_decode_attention`."""
    tl.static_assert(not CONTIGUOUS, "regions have no block in common")
    num_work = tl.load(head_ptr) * num_kv_heads
    await_previous(OVERLAP)
    work = tl.program_id(0)
    while work < num_work:
        following = work + tl.num_programs(0)
        if QUEUE:
            following = tl.num_programs(0) + tl.atomic_add(queue_ptr, 1, sem="relaxed")
        item = items_ptr + work // num_kv_heads * 5
        kv_head = work % num_kv_heads
        first = tl.load(item)
        count = tl.load(item + 1)
        begin = tl.load(item + 2)
        end = tl.load(item + 3)
        part = tl.load(item + 4)
        if count * GROUP <= NARROW:
            _attend(
                q_ptr, k_ptr, v_ptr, out_ptr, query_loc_ptr, seq_lens_ptr, table_ptr, sinks_ptr, partial_ptr, stats_ptr,
                counters_ptr, places_ptr, cells_ptr, parts_ptr, num_kv_heads, scale, softcap, stride_q_row,
                stride_q_head, stride_out_row, stride_out_head, stride_head, stride_table, kv_head, first, count, begin,
                end, part, GROUP, GROUP_PAD, NARROW, HEAD_DIM, DIM_PAD, SLOT, STRIDE_SLOT, BLOCK_SIZE, NARROW_TILE,
                MERGE, WINDOW, SOFTCAP, SINKS, UPCAST, STAGES, True,
            )  # fmt: skip
        elif count * GROUP <= MIDDLE:
            _attend(
                q_ptr, k_ptr, v_ptr, out_ptr, query_loc_ptr, seq_lens_ptr, table_ptr, sinks_ptr, partial_ptr, stats_ptr,
                counters_ptr, places_ptr, cells_ptr, parts_ptr, num_kv_heads, scale, softcap, stride_q_row,
                stride_q_head, stride_out_row, stride_out_head, stride_head, stride_table, kv_head, first, count, begin,
                end, part, GROUP, GROUP_PAD, MIDDLE, HEAD_DIM, DIM_PAD, SLOT, STRIDE_SLOT, BLOCK_SIZE, TILE,
                MERGE, WINDOW, SOFTCAP, SINKS, UPCAST, STAGES, False,
            )  # fmt: skip
        else:
            if WIDE > MIDDLE:
                _attend(
                    q_ptr, k_ptr, v_ptr, out_ptr, query_loc_ptr, seq_lens_ptr, table_ptr, sinks_ptr, partial_ptr,
                    stats_ptr, counters_ptr, places_ptr, cells_ptr, parts_ptr, num_kv_heads, scale, softcap,
                    stride_q_row, stride_q_head, stride_out_row, stride_out_head, stride_head, stride_table, kv_head,
                    first, count, begin, end, part, GROUP, GROUP_PAD, WIDE, HEAD_DIM, DIM_PAD, SLOT, STRIDE_SLOT,
                    BLOCK_SIZE, TILE, MERGE, WINDOW, SOFTCAP, SINKS, UPCAST, STAGES, False,
                )  # fmt: skip
        work = following
    # Every program has taken its last item when the last one comes here.
    if QUEUE:  # noqa: SIM102 - of both conditions together one would be known too late
        if tl.atomic_add(queue_ptr + 1, 1, sem="acq_rel") == tl.num_programs(0) - 1:
            tl.store(queue_ptr, 0)
            tl.store(queue_ptr + 1, 0)


@triton.jit
def _attend(  # type: ignore[no-untyped-def]
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    query_loc_ptr,
    seq_lens_ptr,
    table_ptr,
    sinks_ptr,
    partial_ptr,
    stats_ptr,
    counters_ptr,
    places_ptr,
    cells_ptr,
    parts_ptr,
    num_kv_heads,
    scale,
    softcap,
    stride_q_row,
    stride_q_head,
    stride_out_row,
    stride_out_head,
    stride_head,
    stride_table,
    kv_head,
    first,
    count,
    begin,
    end,
    part,
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
    UPCAST: tl.constexpr,
    STAGES: tl.constexpr,
    IS_NARROW: tl.constexpr,
):
    """One item for one KV head in a tile of ROWS query heads. A wide item is a whole part: no tile of it is cut."""
    index = tl.arange(0, ROWS)
    dims = tl.arange(0, DIM_PAD)
    is_row = index // GROUP < count
    heads = kv_head * GROUP + index % GROUP
    rows = tl.load(places_ptr + first + index // GROUP, mask=is_row, other=0)
    table_row = table_ptr + tl.load(places_ptr + first).to(tl.int64) * stride_table
    is_query = is_row[:, None] & (dims < HEAD_DIM)[None, :]
    query_rows = tl.load(query_loc_ptr + rows, mask=is_row, other=0).to(tl.int64)
    if WINDOW > 0:
        first_seen = tl.maximum(tl.load(seq_lens_ptr + rows, mask=is_row, other=0) - WINDOW, 0)
        # What all rows' windows have left takes part in the merges with nothing.
        begin = tl.maximum(begin, tl.min(tl.where(is_row, first_seen, 2147483647)) // TILE * TILE)
    blocks = tile_blocks(table_row, begin, end, BLOCK_SIZE, TILE, False)
    k_base = k_ptr + kv_head * stride_head
    v_base = v_ptr + kv_head * stride_head
    q = tl.load(
        q_ptr + query_rows[:, None] * stride_q_row + heads[:, None] * stride_q_head + dims[None, :],
        mask=is_query,
        other=0.0,
    )
    factor = exponent_scale(scale, SOFTCAP)
    peak = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.full([ROWS], 0.0, tl.float32)
    # Of few rows summed over tokens after the loop: a sum over the warps in every step would cost two barriers.
    totals = tl.full([ROWS, TILE if IS_NARROW else 1], 0.0, tl.float32)
    acc = tl.full([ROWS, DIM_PAD], 0.0, tl.float32)
    for start in tl.range(begin, end, TILE, num_stages=STAGES):
        positions = start + tl.arange(0, TILE)
        inside = positions < end
        slots = tile_slots(blocks, 0, start, SLOT, BLOCK_SIZE, TILE, False)
        blocks = tile_blocks(table_row, start + TILE, end, BLOCK_SIZE, TILE, False)
        k = load_tile(k_base, slots, inside, STRIDE_SLOT, HEAD_DIM, DIM_PAD, IS_NARROW)
        scores = cap_scores(dot(q, tl.trans(k), UPCAST), scale, softcap, SOFTCAP)
        if WINDOW > 0:
            seen = inside[None, :] & (positions[None, :] >= first_seen[:, None])
            scores = tl.where(seen, scores, float("-inf"))
        elif IS_NARROW:
            scores = tl.where(inside[None, :], scores, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, 1))
        anchor = new_peak
        if WINDOW > 0:
            # Some row's window may have left the whole tile.
            anchor = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        shrink = tl.exp2((peak - anchor) * factor)
        weights = tl.exp2(scores * factor - (anchor * factor)[:, None])
        if IS_NARROW:
            totals = totals * shrink[:, None] + weights
        else:
            total = total * shrink + tl.sum(weights, 1)
        v = load_tile(v_base, slots, inside, STRIDE_SLOT, HEAD_DIM, DIM_PAD, IS_NARROW)
        acc = acc * shrink[:, None] + dot(weights.to(v.dtype), v, UPCAST)
        peak = new_peak

    if IS_NARROW:
        total = tl.sum(totals, 1)
    peak = peak * factor
    head = index % GROUP
    cells = tl.load(cells_ptr + first + index // GROUP, mask=is_row, other=0).to(tl.int64) + part
    cells = cells * num_kv_heads + kv_head
    partial = partial_ptr + cells * (GROUP * HEAD_DIM) + head * HEAD_DIM
    tl.store(partial[:, None] + dims[None, :], acc, mask=is_query)
    stats = stats_ptr + cells * (2 * GROUP) + head
    tl.store(stats, peak, mask=is_row)
    tl.store(stats + GROUP, total, mask=is_row)
    # All threads' stores come before this program's arrival, and the last arrival sees everybody's.
    tl.debug_barrier()
    is_first = is_row & (head == 0)
    arrived = tl.atomic_add(counters_ptr + rows * num_kv_heads + kv_head, 1, mask=is_first, sem="acq_rel")
    missing = tl.load(parts_ptr + first + index // GROUP, mask=is_row, other=0) - 1 - arrived
    is_last = tl.where(is_first & (missing == 0), 1, 0)
    tl.debug_barrier()
    if tl.max(is_last) > 0:
        member = 0
        while member < count:
            if tl.max(tl.where(index == member * GROUP, is_last, 0)) > 0:
                row = tl.load(places_ptr + first + member)
                _merge(
                    out_ptr + tl.load(query_loc_ptr + row).to(tl.int64) * stride_out_row,
                    sinks_ptr,
                    partial_ptr,
                    stats_ptr,
                    tl.load(cells_ptr + first + member).to(tl.int64) * num_kv_heads + kv_head,
                    num_kv_heads,
                    tl.load(parts_ptr + first + member),
                    kv_head,
                    stride_out_head,
                    GROUP,
                    GROUP_PAD,
                    HEAD_DIM,
                    DIM_PAD,
                    MERGE,
                    SINKS,
                )
                tl.store(counters_ptr + row * num_kv_heads + kv_head, 0)
            member += 1


class SharedScratch(DecodeScratch):
    """Sums of parts, as in `DecodeScratch` with a cell in place of an item, and the queue.

    Args:
        num_cells, num_rows: for how many parts of all rows together, and batch rows, there is room.
        num_heads, num_kv_heads, head_dim: the model's.
        device: the pool's.
    """

    def __init__(
        self, num_cells: int, num_rows: int, num_heads: int, num_kv_heads: int, head_dim: int, device: torch.device
    ) -> None:
        super().__init__(num_cells, num_rows, num_heads, num_kv_heads, head_dim, device)
        self.queue = torch.zeros(2, dtype=torch.int32, device=device)


def constants_of(config: SharedConfig, group: int, dim_pad: int) -> dict[str, int]:
    """The kernel's own compile-time constants, beside those of every attention kernel."""
    group_pad = next_power_of_2(group)
    narrow = max(16, group_pad)
    middle = max(config.middle, narrow)
    return {
        "GROUP_PAD": group_pad, "NARROW": narrow, "MIDDLE": middle, "WIDE": max(config.wide, middle),
        "NARROW_TILE": config.narrow_tile, "MERGE": merge_width(group_pad, dim_pad, config.num_warps),
        "QUEUE": config.queue,
    }  # fmt: skip


def shared_decode_attention(
    call: AttentionCall,
    *,
    head: Tensor,
    places: Tensor,
    cells: Tensor,
    parts: Tensor,
    items: Tensor,
    scratch: SharedScratch,
    config: SharedConfig,
    num_programs: int,
    overlap: bool | None = None,
) -> None:
    """Attention of decode rows, one query each, whose parts `items` name.

    Args:
        call: what is read and written; a row's query lies at `query_start_loc[row]`. Not of contiguous regions.
        head: int32 [>= 1], the number of items.
        places, cells, parts: int32 [rows], of the rows in the order of the items: their places in the batch, where in
            the scratch their parts begin, and how many these are.
        items: int32 [most items, 5], see `kvarena.engine.kernels.attention.shared_plan`.
        scratch: with room for the cells and rows.
        config: tiles, warps and stages, see `shared_config`.
        num_programs: the grid.
        overlap: see `launch_options`.
    """
    shared_decode_kernel[(num_programs,)](
        **call.arguments(items, len(items), config),
        **constants_of(config, call.group, call.dim_pad),
        partial_ptr=scratch.partial,
        stats_ptr=scratch.stats,
        counters_ptr=scratch.counters,
        queue_ptr=scratch.queue,
        head_ptr=head,
        places_ptr=places,
        cells_ptr=cells,
        parts_ptr=parts,
        num_kv_heads=call.num_kv_heads,
        **launch_options(overlap),
    )
