"""Storing new keys and values in the pool, and reading tokens' keys and values back side by side."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from kvarena.engine.kernels.common import await_previous, launch_options, next_power_of_2


@triton.jit
def store_kv_kernel(  # type: ignore[no-untyped-def]
    k_ptr,
    v_ptr,
    keys_ptr,
    values_ptr,
    slots_ptr,
    stride_k_row,
    stride_k_head,
    stride_v_row,
    stride_v_head,
    stride_slot,
    HEADS: tl.constexpr,
    HEADS_PAD: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    GATHER: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One token; see `store_kv`, and with GATHER `gather_kv`."""
    await_previous(OVERLAP)
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + token)
    heads = tl.arange(0, HEADS_PAD)[:, None]
    dims = tl.arange(0, DIM_PAD)[None, :]
    exists = (heads < HEADS) & (dims < HEAD_DIM)
    in_pool = slot * stride_slot + heads * HEAD_DIM + dims
    k_new = k_ptr + token * stride_k_row + heads * stride_k_head + dims
    v_new = v_ptr + token * stride_v_row + heads * stride_v_head + dims
    if GATHER:
        k = tl.load(keys_ptr + in_pool, mask=exists)
        v = tl.load(values_ptr + in_pool, mask=exists)
        tl.store(k_new, k, mask=exists)
        tl.store(v_new, v, mask=exists)
    else:
        k = tl.load(k_new, mask=exists)
        v = tl.load(v_new, mask=exists)
        tl.store(keys_ptr + in_pool, k, mask=exists)
        tl.store(values_ptr + in_pool, v, mask=exists)


def store_kv(k: Tensor, v: Tensor, keys: Tensor, values: Tensor, slot_mapping: Tensor) -> None:
    """Write each token's keys and values to its slot.

    Args:
        k, v: [T, num_kv_heads, head_dim]; a head's elements lie side by side.
        keys, values: a layer of the pool by slot, [num_slots, num_kv_heads, head_dim], contiguous.
        slot_mapping: int64 [T].
    """
    _copy(k, v, keys, values, slot_mapping, gather=False)


def gather_kv(k: Tensor, v: Tensor, keys: Tensor, values: Tensor, slot_mapping: Tensor) -> None:
    """Read each token's keys and values from its slot: the reverse of `store_kv`, with the same arguments."""
    _copy(k, v, keys, values, slot_mapping, gather=True)


def _copy(k: Tensor, v: Tensor, keys: Tensor, values: Tensor, slot_mapping: Tensor, *, gather: bool) -> None:
    num_tokens, num_heads, head_dim = k.shape
    if num_tokens == 0:
        return
    store_kv_kernel[(num_tokens,)](
        k,
        v,
        keys,
        values,
        slot_mapping,
        k.stride(0),
        k.stride(1),
        v.stride(0),
        v.stride(1),
        keys.stride(0),
        HEADS=num_heads,
        HEADS_PAD=next_power_of_2(num_heads),
        HEAD_DIM=head_dim,
        DIM_PAD=next_power_of_2(head_dim),
        GATHER=gather,
        num_warps=4 if num_heads * head_dim >= 512 else 1,
        **launch_options(),
    )
