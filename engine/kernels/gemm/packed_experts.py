"""Products of experts with packed weights, one launch for all of them: each row of x with the weight of its expert.

    top_k_index [T, k] -> slots: pairs of token and choice, sorted by expert, each expert's filled up to whole blocks
                          experts: the expert of each block; the launch has one size for T tokens, whatever the routing
    y[slot] = x[slot // k] @ dequantised(weight of the slot's expert).T

Nothing waits for the device, so that a CUDA graph can hold it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvarena.engine.kernels import INTERPRET
from kvarena.engine.kernels.common import await_previous, dot, launch_options
from kvarena.engine.kernels.gemm.packed import load_codes, packed_tile


class ExpertBlocks(NamedTuple):
    """Which slots each program of a launch takes.

    Attributes:
        slots: int32 [blocks * rows], slots sorted by expert; the number of slots where there is none.
        experts: int32 [blocks], the expert of each block; the number of experts where there is none.
        rows: of a block.
    """

    slots: Tensor
    experts: Tensor
    rows: int


def expert_blocks(top_k_index: Tensor, num_experts: int, rows: int) -> ExpertBlocks:
    """Sort the pairs of token and choice by expert.

    Args:
        top_k_index: int [T, k], each token's experts.
        num_experts: of the layer.
        rows: of a block.
    """
    flat = top_k_index.flatten()
    count = len(flat)
    num_blocks = min(count, (count + num_experts * (rows - 1)) // rows)
    order = torch.argsort(flat, stable=True)
    chosen = flat[order]
    counts = torch.zeros(num_experts, dtype=torch.int64, device=flat.device).scatter_add_(
        0, chosen, torch.ones_like(chosen)
    )
    padded = (counts + rows - 1) // rows * rows
    ends = padded.cumsum(0)
    # From a slot's place among all to its place among those of whole blocks.
    shift = (ends - padded) - (counts.cumsum(0) - counts)
    places = torch.arange(count, device=flat.device) + shift[chosen]
    slots = torch.full((num_blocks * rows,), count, dtype=torch.int32, device=flat.device)
    slots[places] = order.int()
    starts = torch.arange(num_blocks, device=flat.device) * rows
    return ExpertBlocks(slots, torch.searchsorted(ends, starts, right=True).int(), rows)


@triton.jit(do_not_specialize=["num_slots"])
def packed_experts_kernel(  # type: ignore[no-untyped-def]
    x_ptr, codes_ptr, scales_ptr, zeros_ptr, order_ptr, slots_ptr, experts_ptr, y_ptr, num_slots, num_experts, N, K,
    stride_x, stride_codes, stride_y, num_groups, group_size, TOP_K: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BITS: tl.constexpr, HAS_ZEROS: tl.constexpr,
    HAS_ORDER: tl.constexpr, EVEN_K: tl.constexpr, UPCAST: tl.constexpr, STAGES: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One tile of y. The grid is (tiles of BN columns, blocks)."""
    await_previous(OVERLAP)
    expert = tl.load(experts_ptr + tl.program_id(1)).to(tl.int64)
    if expert < num_experts:
        cols = tl.program_id(0) * BN + tl.arange(0, BN)
        slots = tl.load(slots_ptr + tl.program_id(1) * BM + tl.arange(0, BM))
        safe = tl.minimum(cols, N - 1)
        codes_row = codes_ptr + (expert * N + safe.to(tl.int64))[:, None] * stride_codes
        x_row = x_ptr + (slots // TOP_K).to(tl.int64)[:, None] * stride_x
        inside = (slots < num_slots)[:, None]
        ks = tl.arange(0, BK)
        acc = tl.zeros((BM, BN), tl.float32)
        for k in tl.range(0, K, BK, num_stages=STAGES):
            codes = load_codes(codes_row, k, BN, BK, BITS, K, not EVEN_K)
            places = k + ks
            if HAS_ORDER:
                places = tl.load(order_ptr + expert * K + k + ks, mask=k + ks < K, other=0)
            x = tl.load(x_row + places[None, :], mask=inside & (k + ks < K)[None, :], other=0.0)
            at = (expert * num_groups + k // group_size) * N + safe
            if HAS_ZEROS:
                codes = codes.to(tl.int32) - tl.load(zeros_ptr + at).to(tl.int32)[:, None]
            elif BITS == 4:
                codes = codes - 8
            if UPCAST:
                part = dot(x, tl.trans(codes.to(tl.float32)), True)
            else:
                part = tl.dot(x, tl.trans(codes.to(x.dtype)))
            acc += part * tl.load(scales_ptr + at).to(tl.float32)[None, :]
        out = y_ptr + slots.to(tl.int64)[:, None] * stride_y + cols[None, :]
        tl.store(out, acc.to(y_ptr.dtype.element_ty), mask=inside & (cols < N)[None, :])


def packed_experts(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    order: Tensor | None,
    group_size: int,
    blocks: ExpertBlocks,
    *,
    num_slots: int,
    top_k: int,
) -> Tensor:
    """Each slot's row of x times the weight of its expert.

    Args:
        x: [num_slots / top_k, K], rows contiguous: slot i reads row i // top_k.
        codes: [E, N, K/8] int32, or [E, N, K] of 8 bits; see `packed_gemm`.
        scales: [E, G, N].
        zeros: [E, G, N], or None.
        order: int32 [E, K], the input of each column of codes (act-order), or None.
        group_size: see `packed_gemm`.
        blocks: from `expert_blocks`.
        num_slots: pairs of token and choice.
        top_k: slots that read one row of x.

    Returns:
        [num_slots, N] in x's dtype.
    """
    num_experts, num_cols = codes.shape[:2]
    num_inputs = x.shape[1]
    tile = packed_tile(blocks.rows, num_inputs, group_size)
    assert tile is not None, f"no launch for groups of {group_size} of {num_inputs} inputs"
    out = x.new_empty(num_slots, num_cols)
    packed_experts_kernel[(triton.cdiv(num_cols, tile.cols), len(blocks.experts))](
        x, codes, scales, scales if zeros is None else zeros, scales if order is None else order, blocks.slots,
        blocks.experts, out, num_slots, num_experts, num_cols, num_inputs, x.stride(0), codes.stride(1),
        out.stride(0), scales.shape[1], group_size, TOP_K=top_k,
        BM=blocks.rows, BN=tile.cols, BK=tile.depth, BITS=4 if codes.dtype == torch.int32 else 8,
        HAS_ZEROS=zeros is not None, HAS_ORDER=order is not None, EVEN_K=num_inputs % tile.depth == 0,
        UPCAST=INTERPRET or x.dtype == torch.float32, STAGES=tile.num_stages, num_warps=tile.num_warps,
        num_stages=tile.num_stages, **launch_options(),
    )  # fmt: skip
    return out
