"""Rotary embedding of queries and keys and the store of keys and values, in one launch.

Optionally the per-head RMS norm of queries and keys before it (Qwen3). A program does one token and one KV
head with its query heads. The embedding pairs element i with element i + rotary_dim / 2 ("rotate half"; RoFormer, Su
et al., 2021, in GPT-NeoX's layout); elements from rotary_dim on pass through.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.common import next_power_of_2


@triton.jit
def rope_store_kernel(  # type: ignore[no-untyped-def]
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    keys_ptr,
    values_ptr,
    slots_ptr,
    cos_ptr,
    sin_ptr,
    q_norm_ptr,
    k_norm_ptr,
    epsilon,
    stride_q_row,
    stride_q_head,
    stride_k_row,
    stride_k_head,
    stride_v_row,
    stride_v_head,
    stride_out_row,
    stride_out_head,
    stride_slot,
    stride_cos,
    GROUP: tl.constexpr,
    GROUP_PAD: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    HALF: tl.constexpr,
    HALF_PAD: tl.constexpr,
    NORM: tl.constexpr,
):
    """One token and one KV head with its query heads; see `rope_store`."""
    token = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1)
    half = tl.arange(0, HALF_PAD)
    in_half = half < HALF
    cos = tl.load(cos_ptr + token * stride_cos + half, mask=in_half, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + token * stride_cos + half, mask=in_half, other=0.0).to(tl.float32)

    group = tl.arange(0, GROUP_PAD)
    heads = kv_head * GROUP + group
    is_head = group < GROUP
    _rotate(
        q_ptr + token * stride_q_row + heads * stride_q_head,
        out_ptr + token * stride_out_row + heads * stride_out_head,
        is_head,
        q_norm_ptr,
        epsilon,
        cos,
        sin,
        HEAD_DIM,
        DIM_PAD,
        HALF,
        HALF_PAD,
        NORM,
    )
    slot = tl.load(slots_ptr + token)
    target = slot * stride_slot + kv_head * HEAD_DIM
    one = tl.arange(0, 1)
    _rotate(
        k_ptr + token * stride_k_row + kv_head * stride_k_head + one,
        keys_ptr + target + one,
        one < 1,
        k_norm_ptr,
        epsilon,
        cos,
        sin,
        HEAD_DIM,
        DIM_PAD,
        HALF,
        HALF_PAD,
        NORM,
    )
    dims = tl.arange(0, DIM_PAD)
    v = tl.load(v_ptr + token * stride_v_row + kv_head * stride_v_head + dims, mask=dims < HEAD_DIM)
    tl.store(values_ptr + target + dims, v.to(values_ptr.dtype.element_ty), mask=dims < HEAD_DIM)


@triton.jit
def _round(x, dtype: tl.constexpr):  # type: ignore[no-untyped-def]
    return x.to(dtype).to(tl.float32)


@triton.jit
def _rotate(  # type: ignore[no-untyped-def]
    sources,
    targets,
    exists,
    norm_ptr,
    epsilon,
    cos,
    sin,
    HEAD_DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    HALF: tl.constexpr,
    HALF_PAD: tl.constexpr,
    NORM: tl.constexpr,
):
    """Norm, rotate and copy some heads. `sources` and `targets` point to each head's first element."""
    half = tl.arange(0, HALF_PAD)
    mask = exists[:, None] & (half < HALF)[None, :]
    x1 = tl.load(sources[:, None] + half[None, :], mask=mask, other=0.0).to(tl.float32)
    x2 = tl.load(sources[:, None] + HALF + half[None, :], mask=mask, other=0.0).to(tl.float32)
    dtype: tl.constexpr = targets.dtype.element_ty
    if HEAD_DIM > 2 * HALF:
        dims = tl.arange(0, DIM_PAD)
        rest_mask = exists[:, None] & ((dims >= 2 * HALF) & (dims < HEAD_DIM))[None, :]
        rest = tl.load(sources[:, None] + dims[None, :], mask=rest_mask, other=0.0).to(tl.float32)
    if NORM:
        squares = tl.sum(x1 * x1, 1) + tl.sum(x2 * x2, 1)
        if HEAD_DIM > 2 * HALF:
            squares += tl.sum(rest * rest, 1)
        factor = 1.0 / tl.sqrt(squares / HEAD_DIM + epsilon)
        w1 = tl.load(norm_ptr + half, mask=half < HALF, other=0.0).to(tl.float32)
        w2 = tl.load(norm_ptr + HALF + half, mask=half < HALF, other=0.0).to(tl.float32)
        # Rounded before the weight and after it, as transformers' norm modules do.
        x1 = _round(_round(x1 * factor[:, None], dtype) * w1[None, :], dtype)
        x2 = _round(_round(x2 * factor[:, None], dtype) * w2[None, :], dtype)
        if HEAD_DIM > 2 * HALF:
            w = tl.load(norm_ptr + dims, mask=dims < HEAD_DIM, other=0.0).to(tl.float32)
            rest = _round(rest * factor[:, None], dtype) * w[None, :]
    tl.store(targets[:, None] + half[None, :], (x1 * cos[None, :] - x2 * sin[None, :]).to(dtype), mask=mask)
    tl.store(targets[:, None] + HALF + half[None, :], (x2 * cos[None, :] + x1 * sin[None, :]).to(dtype), mask=mask)
    if HEAD_DIM > 2 * HALF:
        tl.store(targets[:, None] + dims[None, :], rest.to(dtype), mask=rest_mask)


def rope_store(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    *,
    cos: Tensor,
    sin: Tensor,
    rotary_dim: int,
    keys: Tensor,
    values: Tensor,
    slot_mapping: Tensor,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    epsilon: float = 1e-6,
) -> None:
    """Rotate `q` into `out`, rotate `k` into its slots, copy `v` into its slots.

    Args:
        q, out: [T, num_heads, head_dim]; `out` may be `q` itself.
        k, v: [T, num_kv_heads, head_dim]; views into one packed projection will do.
        cos, sin: [T, >= rotary_dim / 2], the angle of each pair at each token's position.
        rotary_dim: how many leading elements of a head are rotated.
        keys, values: a layer of the pool by slot, [num_slots, num_kv_heads, head_dim], contiguous.
        slot_mapping: int64 [T].
        q_norm, k_norm: [head_dim] weights of an RMS norm over each head before the rotation; both or none.
        epsilon: of that norm.
    """
    num_tokens, num_heads, head_dim = q.shape
    num_kv_heads = k.shape[1]
    if num_tokens == 0:
        return
    group = num_heads // num_kv_heads
    rope_store_kernel[(num_tokens, num_kv_heads)](
        q,
        k,
        v,
        out,
        keys,
        values,
        slot_mapping,
        cos,
        sin,
        q if q_norm is None else q_norm,
        q if k_norm is None else k_norm,
        epsilon,
        q.stride(0),
        q.stride(1),
        k.stride(0),
        k.stride(1),
        v.stride(0),
        v.stride(1),
        out.stride(0),
        out.stride(1),
        keys.stride(0),
        cos.stride(0),
        GROUP=group,
        GROUP_PAD=next_power_of_2(group),
        HEAD_DIM=head_dim,
        DIM_PAD=next_power_of_2(head_dim),
        HALF=rotary_dim // 2,
        HALF_PAD=next_power_of_2(rotary_dim // 2),
        NORM=q_norm is not None,
        num_warps=1 if group * head_dim <= 1024 else 4,
    )
