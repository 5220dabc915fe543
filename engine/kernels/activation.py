"""The gated activation: silu(gate) * up, of gate and up projections that lie side by side."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from kvarena.engine.kernels.common import await_previous, launch_options, next_power_of_2


@triton.jit
def gated_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    out_ptr,
    stride_x,
    stride_out,
    SIZE: tl.constexpr,
    TILE: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One row's TILE elements."""
    await_previous(OVERLAP)
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * TILE + tl.arange(0, TILE)
    exists = at < SIZE
    gate = tl.load(x_ptr + row * stride_x + at, mask=exists, other=0.0).to(tl.float32)
    up = tl.load(x_ptr + row * stride_x + SIZE + at, mask=exists, other=0.0).to(tl.float32)
    result = gate / (1.0 + tl.exp2(-1.4426950408889634 * gate)) * up
    tl.store(out_ptr + row * stride_out + at, result.to(out_ptr.dtype.element_ty), mask=exists)


def gated(x: Tensor, out: Tensor | None = None) -> Tensor:
    """silu(x[:, :size]) * x[:, size:], computed in float32 (SwiGLU; Shazeer, 2020).

    Args:
        x: [T, 2 * size]; rows may be strided.
        out: [T, size] to write into.

    Returns:
        [T, size] in x's dtype.
    """
    num_rows, size = x.shape[0], x.shape[1] // 2
    if out is None:
        out = x.new_empty(num_rows, size)
    if num_rows == 0:
        return out
    tile = min(2048, next_power_of_2(size))
    gated_kernel[(num_rows, triton.cdiv(size, tile))](
        x,
        out,
        x.stride(0),
        out.stride(0),
        SIZE=size,
        TILE=tile,
        num_warps=max(1, tile // 512),
        **launch_options(),
    )
    return out
