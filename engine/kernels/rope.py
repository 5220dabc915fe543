"""Rotary embedding of queries and keys and the store of keys and values, in one launch.

Optionally the per-head RMS norm of queries and keys before it (Qwen3). A program does one token. The embedding pairs
element i with element i + rotary_dim / 2 ("rotate half"; RoFormer, Su et al., 2021, in GPT-NeoX's layout); elements
from rotary_dim on pass through.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from kvarena.engine.kernels.common import await_previous, launch_options, next_power_of_2


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
    HEADS: tl.constexpr,
    HEADS_PAD: tl.constexpr,
    KV_HEADS: tl.constexpr,
    KV_HEADS_PAD: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    HALF: tl.constexpr,
    HALF_PAD: tl.constexpr,
    NORM: tl.constexpr,
    TURN_KEYS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One token; see `rope_store`."""
    token = tl.program_id(0).to(tl.int64)
    # Of the step's inputs, which were there before the layer's first kernel.
    slot = tl.load(slots_ptr + token)
    await_previous(OVERLAP)
    # Everything is loaded before anything is stored, or each load would wait for the store before it.
    heads = tl.arange(0, HEADS_PAD)
    kv_heads = tl.arange(0, KV_HEADS_PAD)
    dims = tl.arange(0, DIM_PAD)
    queries = q_ptr + token * stride_q_row + heads * stride_q_head
    new_keys = k_ptr + token * stride_k_row + kv_heads * stride_k_head
    q1, q2, q_rest = _load(queries, heads < HEADS, HEAD_DIM, DIM_PAD, HALF, HALF_PAD)
    k1, k2, k_rest = _load(new_keys, kv_heads < KV_HEADS, HEAD_DIM, DIM_PAD, HALF, HALF_PAD)
    cos_row, sin_row = cos_ptr + token * stride_cos, sin_ptr + token * stride_cos
    q_cos, q_sin = _row(cos_row, q1, HALF, HALF_PAD), _row(sin_row, q1, HALF, HALF_PAD)
    k_cos, k_sin = _row(cos_row, k1, HALF, HALF_PAD), _row(sin_row, k1, HALF, HALF_PAD)
    exists = (kv_heads < KV_HEADS)[:, None] & (dims < HEAD_DIM)[None, :]
    v = tl.load(v_ptr + token * stride_v_row + kv_heads[:, None] * stride_v_head + dims[None, :], mask=exists)
    dtype: tl.constexpr = keys_ptr.dtype.element_ty
    if NORM:
        q1, q2, q_rest = _norm(q1, q2, q_rest, q_norm_ptr, epsilon, dtype, HEAD_DIM, DIM_PAD, HALF, HALF_PAD)
        k1, k2, k_rest = _norm(k1, k2, k_rest, k_norm_ptr, epsilon, dtype, HEAD_DIM, DIM_PAD, HALF, HALF_PAD)
    q1, q2 = q1 * q_cos - q2 * q_sin, q2 * q_cos + q1 * q_sin
    k1, k2 = k1 * k_cos - k2 * k_sin, k2 * k_cos + k1 * k_sin

    target = slot * stride_slot + kv_heads * HEAD_DIM
    tl.store(values_ptr + target[:, None] + dims[None, :], v.to(dtype), mask=exists)
    turned = out_ptr + token * stride_out_row + heads * stride_out_head
    _store(turned, heads < HEADS, q1, q2, q_rest, HEAD_DIM, DIM_PAD, HALF, HALF_PAD)
    _store(keys_ptr + target, kv_heads < KV_HEADS, k1, k2, k_rest, HEAD_DIM, DIM_PAD, HALF, HALF_PAD)
    if TURN_KEYS:
        _store(new_keys, kv_heads < KV_HEADS, k1, k2, k_rest, HEAD_DIM, DIM_PAD, HALF, HALF_PAD)


@triton.jit
def _load(  # type: ignore[no-untyped-def]
    heads, exists, HEAD_DIM: tl.constexpr, DIM_PAD: tl.constexpr, HALF: tl.constexpr, HALF_PAD: tl.constexpr
):
    """Both halves of what is rotated of some heads, and the rest; `heads` point to their first elements."""
    half = tl.arange(0, HALF_PAD)
    mask = exists[:, None] & (half < HALF)[None, :]
    x1 = tl.load(heads[:, None] + half[None, :], mask=mask, other=0.0).to(tl.float32)
    x2 = tl.load(heads[:, None] + HALF + half[None, :], mask=mask, other=0.0).to(tl.float32)
    rest = x1
    if HEAD_DIM > 2 * HALF:
        dims = tl.arange(0, DIM_PAD)
        mask = exists[:, None] & ((dims >= 2 * HALF) & (dims < HEAD_DIM))[None, :]
        rest = tl.load(heads[:, None] + dims[None, :], mask=mask, other=0.0).to(tl.float32)
    return x1, x2, rest


@triton.jit
def _row(pointer, like, SIZE: tl.constexpr, SIZE_PAD: tl.constexpr):  # type: ignore[no-untyped-def]
    """A row of SIZE elements, once for every row of `like`: loaded where it is used, because one copy would have to
    travel through shared memory."""
    at = tl.arange(0, SIZE_PAD)[None, :] + tl.zeros([like.shape[0], 1], tl.int32)
    return tl.load(pointer + at, mask=at < SIZE, other=0.0).to(tl.float32)


@triton.jit
def _round(x, dtype: tl.constexpr):  # type: ignore[no-untyped-def]
    return x.to(dtype).to(tl.float32)


@triton.jit
def _norm(  # type: ignore[no-untyped-def]
    x1,
    x2,
    rest,
    weight_ptr,
    epsilon,
    dtype: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    HALF: tl.constexpr,
    HALF_PAD: tl.constexpr,
):
    """RMS norm of each head. Rounded before the weight and after it, as transformers' norm modules do."""
    squares = tl.sum(x1 * x1 + x2 * x2, 1)
    if HEAD_DIM > 2 * HALF:
        squares += tl.sum(rest * rest, 1)
    factor = 1.0 / tl.sqrt(squares / HEAD_DIM + epsilon)
    w1, w2 = _row(weight_ptr, x1, HALF, HALF_PAD), _row(weight_ptr + HALF, x2, HALF, HALF_PAD)
    x1 = _round(_round(x1 * factor[:, None], dtype) * w1, dtype)
    x2 = _round(_round(x2 * factor[:, None], dtype) * w2, dtype)
    if HEAD_DIM > 2 * HALF:
        rest = _round(rest * factor[:, None], dtype) * _row(weight_ptr, rest, HEAD_DIM, DIM_PAD)
    return x1, x2, rest


@triton.jit
def _store(  # type: ignore[no-untyped-def]
    heads,
    exists,
    x1,
    x2,
    rest,
    HEAD_DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    HALF: tl.constexpr,
    HALF_PAD: tl.constexpr,
):
    """The reverse of `_load`."""
    dtype: tl.constexpr = heads.dtype.element_ty
    half = tl.arange(0, HALF_PAD)
    mask = exists[:, None] & (half < HALF)[None, :]
    tl.store(heads[:, None] + half[None, :], x1.to(dtype), mask=mask)
    tl.store(heads[:, None] + HALF + half[None, :], x2.to(dtype), mask=mask)
    if HEAD_DIM > 2 * HALF:
        dims = tl.arange(0, DIM_PAD)
        mask = exists[:, None] & ((dims >= 2 * HALF) & (dims < HEAD_DIM))[None, :]
        tl.store(heads[:, None] + dims[None, :], rest.to(dtype), mask=mask)


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
    turn_keys: bool = False,
) -> None:
    """Rotate `q` into `out`, rotate `k` into its slots, copy `v` into its slots.

    In bfloat16 a norm rounds before its weight and after it, as transformers' modules do, and the rotation once, where
    transformers rounds both products too.

    Args:
        q, out: [T, num_heads, head_dim]; `out` may be `q` itself.
        k, v: [T, num_kv_heads, head_dim]; views into one packed projection will do.
        cos, sin: [T, >= rotary_dim / 2], the angle of each pair at each token's position.
        rotary_dim: how many leading elements of a head are rotated.
        keys, values: a layer of the pool by slot, [num_slots, num_kv_heads, head_dim], contiguous.
        slot_mapping: int64 [T].
        q_norm, k_norm: [head_dim] weights of an RMS norm over each head before the rotation; both or none.
        epsilon: of that norm.
        turn_keys: rotate `k` in place too, for an attention that reads it beside the pool.
    """
    num_tokens, num_heads, head_dim = q.shape
    num_kv_heads = k.shape[1]
    if num_tokens == 0:
        return
    heads_pad, half_pad = next_power_of_2(num_heads), next_power_of_2(rotary_dim // 2)
    rope_store_kernel[(num_tokens,)](
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
        HEADS=num_heads,
        HEADS_PAD=heads_pad,
        KV_HEADS=num_kv_heads,
        KV_HEADS_PAD=next_power_of_2(num_kv_heads),
        HEAD_DIM=head_dim,
        DIM_PAD=next_power_of_2(head_dim),
        HALF=rotary_dim // 2,
        HALF_PAD=half_pad,
        NORM=q_norm is not None,
        TURN_KEYS=turn_keys,
        # At least 16 pairs a thread: eight elements of 2 bytes make a load of 16 bytes.
        num_warps=min(8, max(1, heads_pad * half_pad // 512)),
        **launch_options(),
    )
