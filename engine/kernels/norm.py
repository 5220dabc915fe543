"""Residual addition and RMS norm in one launch (RMSNorm; Zhang and Sennrich, 2019)."""

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
    await_previous(OVERLAP)
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, SIZE_PAD)
    exists = at < SIZE
    x = tl.load(x_ptr + row * stride_x + at, mask=exists, other=0.0).to(tl.float32)
    if ADD:
        residual = residual_ptr + row * stride_residual + at
        x += tl.load(residual, mask=exists, other=0.0).to(tl.float32)
        # The sum is kept in the residual's precision, and that rounded sum is what is normed.
        rounded = x.to(residual_ptr.dtype.element_ty)
        tl.store(residual, rounded, mask=exists)
        x = rounded.to(tl.float32)
    factor = 1.0 / tl.sqrt(tl.sum(x * x, 0) / SIZE + epsilon)
    weight = tl.load(weight_ptr + at, mask=exists, other=0.0).to(tl.float32)
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
