"""Norms of rows, each in one launch: RMSNorm (Zhang and Sennrich, 2019), layer norm (Ba et al., 2016)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvarena.engine.kernels.common import await_previous, launch_options, next_power_of_2


@triton.jit
def rms_norm_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    residual_ptr,
    weight_ptr,
    out_ptr,
    epsilon,
    stride_x,
    stride_residual,
    stride_out,
    SIZE: tl.constexpr,
    SIZE_PAD: tl.constexpr,
    ADD: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One row; see `rms_norm`."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, SIZE_PAD)
    exists = at < SIZE
    # Of the model, and so on its way before the kernel before has ended.
    weight = tl.load(weight_ptr + at, mask=exists, other=0.0).to(tl.float32)
    await_previous(OVERLAP)
    x = tl.load(x_ptr + row * stride_x + at, mask=exists, other=0.0).to(tl.float32)
    if ADD:
        residual = residual_ptr + row * stride_residual + at
        x += tl.load(residual, mask=exists, other=0.0).to(tl.float32)
        # The sum is kept in the residual's precision, and that rounded sum is what is normed.
        rounded = x.to(residual_ptr.dtype.element_ty)
        tl.store(residual, rounded, mask=exists)
        x = rounded.to(tl.float32)
    factor = 1.0 / tl.sqrt(tl.sum(x * x, 0) / SIZE + epsilon)
    normed = (x * factor).to(out_ptr.dtype.element_ty).to(tl.float32)
    tl.store(out_ptr + row * stride_out + at, (normed * weight).to(out_ptr.dtype.element_ty), mask=exists)


def rms_norm(
    x: Tensor,
    weight: Tensor,
    epsilon: float,
    *,
    residual: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """RMS norm of `x`, or of `x + residual`, row by row; computed in float32.

    Rounded where transformers' modules round: before the weight and after it.

    Args:
        x: [T, size]; rows may be strided.
        weight: [size].
        epsilon: added to the mean square.
        residual: [T, size]; becomes x + residual, in place.
        out: [T, size] to write into; may be `x`.

    Returns:
        [T, size] in x's dtype.
    """
    num_rows, size = x.shape
    if out is None:
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
    if num_rows == 0:
        return out
    padded = next_power_of_2(size)
    rms_norm_kernel[(num_rows,)](
        x,
        x if residual is None else residual,
        weight,
        out,
        epsilon,
        x.stride(0),
        0 if residual is None else residual.stride(0),
        out.stride(0),
        SIZE=size,
        SIZE_PAD=padded,
        ADD=residual is not None,
        num_warps=min(16, max(1, padded // 512)),
        **launch_options(),
    )
    return out


@triton.jit
def layer_norm_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    offset_ptr,
    weight_ptr,
    bias_ptr,
    index_ptr,
    out_ptr,
    epsilon,
    rows_in,
    rows_out,
    stride_x,
    stride_out,
    SIZE: tl.constexpr,
    SIZE_PAD: tl.constexpr,
    PARTS: tl.constexpr,
    GATHER: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One row of the result; see `layer_norm`."""
    await_previous(OVERLAP)
    row = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, PARTS)[:, None]
    col = tl.arange(0, SIZE_PAD)[None, :]
    exists = (part < PARTS) & (col < SIZE)
    source = row + 0 * part
    if GATHER:
        source = row // rows_out * rows_in + tl.load(index_ptr + row % rows_out * PARTS + part)
    x = tl.load(x_ptr + source * stride_x + col, mask=exists, other=0.0).to(tl.float32)
    x += tl.load(offset_ptr + col, mask=col < SIZE, other=0.0)
    mean = tl.sum(tl.sum(x, 1), 0) / (PARTS * SIZE)
    centred = tl.where(exists, x - mean, 0.0)
    factor = 1.0 / tl.sqrt(tl.sum(tl.sum(centred * centred, 1), 0) / (PARTS * SIZE) + epsilon)
    at = part * SIZE + col
    weight = tl.load(weight_ptr + at, mask=exists, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + at, mask=exists, other=0.0).to(tl.float32)
    normed = centred * factor * weight + bias
    tl.store(out_ptr + row * stride_out + at, normed.to(out_ptr.dtype.element_ty), mask=exists)


def layer_norm(
    x: Tensor, offset: Tensor, weight: Tensor, bias: Tensor, epsilon: float, index: Tensor | None = None
) -> Tensor:
    """Layer norm of `x + offset`, or of several of its rows side by side; computed in float32, rounded once.

    Args:
        x: [N, P, size], contiguous.
        offset: float32 [size], added to each row of x.
        weight, bias: [size], or with `index` [parts * size].
        epsilon: added to the variance.
        index: int32 [R, parts]: row r of each of the N is made of its rows index[r], parts a power of two.

    Returns:
        [N * P, size], or with `index` [N * R, parts * size], in x's dtype.
    """
    num, rows_in, size = x.shape
    rows_out, parts = (rows_in, 1) if index is None else index.shape
    out = x.new_empty(num * rows_out, parts * size)
    if not len(out):
        return out
    padded = next_power_of_2(size)
    layer_norm_kernel[(len(out),)](
        x,
        offset,
        weight,
        bias,
        offset if index is None else index,
        out,
        epsilon,
        rows_in,
        rows_out,
        x.stride(1),
        out.stride(0),
        SIZE=size,
        SIZE_PAD=padded,
        PARTS=parts,
        GATHER=index is not None,
        num_warps=min(16, max(1, parts * padded // 512)),
        **launch_options(),
    )
    return out
