"""Product with a packed weight: y = x @ dequantised(w).T, for few rows of x and for many.

    codes [N, K/8] int32: tile BN x BK/8 -> 8 codes each -> minus zero points, exact in 16 bits
    x     [M, K]:         tile BM x BK                    -> dot, times the group's scales, added up in float32

A tile's inputs lie in one group, so that scales multiply sums: no weight is rounded to 16 bits, and the result is the
exact product of x with (codes - zeros) * scales but for the sums' rounding. Written as a judge of other kernels, and
for GPUs that those do not know.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvarena.engine.kernels import INTERPRET
from kvarena.engine.kernels.common import await_previous, dot, launch_options

_DEPTHS = (128, 64, 32, 16)  # the product takes at least 16 inputs at once


class PackedTile(NamedTuple):
    """Shape of a launch: rows of x and of the weight a program, inputs a step of its loop, and the compiler's."""

    rows: int
    cols: int
    depth: int
    num_warps: int
    num_stages: int


def packed_tile(num_rows: int, num_inputs: int, group_size: int) -> PackedTile | None:
    """The launch for `num_rows` of x; None where no tile of inputs lies in one group.

    Few rows: narrow programs, so that all multiprocessors read weights. Many: square ones.
    """
    fitting = _DEPTHS if group_size >= num_inputs else [depth for depth in _DEPTHS if group_size % depth == 0]
    if not fitting:
        return None
    depth = fitting[0]
    if num_rows <= 32:
        return PackedTile(16 if num_rows <= 16 else 32, 32, depth, 4, 4)
    if num_rows <= 64:
        return PackedTile(64, 64, min(depth, 64), 4, 4)
    return PackedTile(128, 128, min(depth, 64), 8, 3)


@triton.jit
def load_codes(  # type: ignore[no-untyped-def]
    codes_row, k, BN: tl.constexpr, BK: tl.constexpr, BITS: tl.constexpr, K, MASKED: tl.constexpr
):
    """Codes [BN, BK] of inputs k, k + 1, ...: integers of 32 bits, or floats of 8 bits as they are."""
    if BITS == 4:
        words = k // 8 + tl.arange(0, BK // 8)
        if MASKED:
            packed = tl.load(codes_row + words[None, :], mask=(words * 8 < K)[None, :], other=0)
        else:
            packed = tl.load(codes_row + words[None, :])
        shifts = 4 * tl.arange(0, 8)
        return tl.reshape((packed[:, :, None] >> shifts[None, None, :]) & 15, (BN, BK))
    else:  # noqa: RET505 - both branches of a compile-time if are compiled unless one is the else
        ks = k + tl.arange(0, BK)
        if MASKED:
            return tl.load(codes_row + ks[None, :], mask=(ks < K)[None, :], other=0.0)
        return tl.load(codes_row + ks[None, :])


@triton.jit(do_not_specialize=["M"])
def packed_gemm_kernel(  # type: ignore[no-untyped-def]
    x_ptr, codes_ptr, scales_ptr, zeros_ptr, bias_ptr, res_ptr, y_ptr, M, N, K, stride_x, stride_codes, stride_y,
    stride_res, group_size,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BITS: tl.constexpr, HAS_ZEROS: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_RES: tl.constexpr, EVEN_K: tl.constexpr,
    UPCAST: tl.constexpr, STAGES: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One tile of y. The grid is (tiles of BN columns, tiles of BM rows)."""
    cols = tl.program_id(0) * BN + tl.arange(0, BN)
    rows = tl.program_id(1) * BM + tl.arange(0, BM)
    # Rows of the weight past N are clamped, not masked: they read something valid that is never stored.
    safe = tl.minimum(cols, N - 1)
    codes_row = codes_ptr + safe.to(tl.int64)[:, None] * stride_codes
    x_row = x_ptr + rows.to(tl.int64)[:, None] * stride_x
    inside = (rows < M)[:, None]
    ks = tl.arange(0, BK)
    acc = tl.zeros((BM, BN), tl.float32)
    await_previous(OVERLAP)
    for k in tl.range(0, K, BK, num_stages=STAGES):
        codes = load_codes(codes_row, k, BN, BK, BITS, K, not EVEN_K)
        if EVEN_K:
            x = tl.load(x_row + (k + ks)[None, :], mask=inside, other=0.0)
        else:
            x = tl.load(x_row + (k + ks)[None, :], mask=inside & (k + ks < K)[None, :], other=0.0)
        at = (k // group_size) * N + safe
        if HAS_ZEROS:
            codes = codes.to(tl.int32) - tl.load(zeros_ptr + at).to(tl.int32)[:, None]
        elif BITS == 4:
            codes = codes - 8
        # Integers and floats of 8 bits are exact in 16. (The interpreter makes nonsense of integers as bfloat16.)
        if UPCAST:
            part = dot(x, tl.trans(codes.to(tl.float32)), True)
        else:
            part = tl.dot(x, tl.trans(codes.to(x.dtype)))
        acc += part * tl.load(scales_ptr + at).to(tl.float32)[None, :]
    if HAS_BIAS:
        acc += tl.load(bias_ptr + safe).to(tl.float32)[None, :]
    keep = inside & (cols < N)[None, :]
    if HAS_RES:
        acc += tl.load(res_ptr + rows[:, None] * stride_res + cols[None, :], mask=keep, other=0.0).to(tl.float32)
    out = y_ptr + rows.to(tl.int64)[:, None] * stride_y + cols[None, :]
    tl.store(out, acc.to(y_ptr.dtype.element_ty), mask=keep)


def packed_gemm(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    group_size: int,
    *,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    out: Tensor | None = None,
    tile: PackedTile | None = None,
) -> Tensor:
    """x @ ((codes - zeros) * scales).T + bias + residual.

    Args:
        x: [M, K], rows contiguous.
        codes: int32 [N, K/8], eight codes of 4 bits, the first input's lowest; or int8 or float8 [N, K].
        scales: float [G, N].
        zeros: uint8 or int8 [G, N]; None: 8 of 4 bits, 0 of 8.
        group_size: inputs of a group; `packed_tile` must know a launch for it.
        bias: [N].
        residual: [M, N]; may be `out` itself.
        out: [M, N] to write into.
        tile: the launch; None: `packed_tile`'s.

    Returns:
        [M, N] in x's dtype.
    """
    (num_rows, num_inputs), num_cols = x.shape, codes.shape[0]
    if out is None:
        out = x.new_empty(num_rows, num_cols)
    if num_rows == 0:
        return out
    tile = tile or packed_tile(num_rows, num_inputs, group_size)
    assert tile is not None, f"no launch for groups of {group_size} of {num_inputs} inputs"
    bits = 4 if codes.dtype == torch.int32 else 8
    packed_gemm_kernel[(triton.cdiv(num_cols, tile.cols), triton.cdiv(num_rows, tile.rows))](
        x, codes, scales, scales if zeros is None else zeros, scales if bias is None else bias,
        out if residual is None else residual, out, num_rows, num_cols, num_inputs, x.stride(0), codes.stride(0),
        out.stride(0), 0 if residual is None else residual.stride(0), group_size,
        BM=tile.rows, BN=tile.cols, BK=tile.depth, BITS=bits, HAS_ZEROS=zeros is not None,
        HAS_BIAS=bias is not None, HAS_RES=residual is not None,
        EVEN_K=num_inputs % tile.depth == 0, UPCAST=INTERPRET or x.dtype == torch.float32, STAGES=tile.num_stages,
        num_warps=tile.num_warps, num_stages=tile.num_stages, **launch_options(),
    )  # fmt: skip
    return out
