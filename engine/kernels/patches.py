"""From an image's bytes to the operands of a vision tower's convolution, whose stride is its kernel: a product."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from kvarena.engine.kernels.common import await_previous, launch_options, next_power_of_2


@triton.jit
def patch_kernel(  # type: ignore[no-untyped-def]
    tiles_ptr,
    values_ptr,
    out_ptr,
    SIDE: tl.constexpr,
    PATCH: tl.constexpr,
    CHANNELS: tl.constexpr,
    DEPTH: tl.constexpr,
    DEPTH_PAD: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One patch; see `patch_rows`."""
    await_previous(OVERLAP)
    row = tl.program_id(0).to(tl.int64)
    tile, at_y, at_x = row // (SIDE * SIDE), row // SIDE % SIDE, row % SIDE
    at = tl.arange(0, DEPTH_PAD)
    channel, y, x = at // (PATCH * PATCH), at // PATCH % PATCH, at % PATCH
    inside = at < CHANNELS * PATCH * PATCH
    line = (tile * CHANNELS + channel) * (SIDE * PATCH) + at_y * PATCH + y
    byte = tl.load(tiles_ptr + line * (SIDE * PATCH) + at_x * PATCH + x, mask=inside, other=0).to(tl.int32)
    value = tl.load(values_ptr + channel * 256 + byte, mask=inside, other=0.0)
    tl.store(out_ptr + row * DEPTH + at, value.to(out_ptr.dtype.element_ty), mask=at < DEPTH)


def patch_rows(tiles: Tensor, values: Tensor, patch: int, out: Tensor) -> Tensor:
    """Each patch of each tile as a row: channels, their lines, their pixels.

    Args:
        tiles: uint8 [N, channels, S, S], contiguous.
        values: float32 [channels, 256], what each byte of each channel becomes.
        patch: pixels of a patch's side; divides S.
        out: [N, (S / patch)^2, depth], contiguous; written. Columns beyond channels * patch^2 become zeros.

    Returns:
        `out`.
    """
    num, channels, size = tiles.shape[:3]
    side = size // patch
    if num:
        patch_kernel[(num * side * side,)](
            tiles, values, out, SIDE=side, PATCH=patch, CHANNELS=channels, DEPTH=out.shape[2],
            DEPTH_PAD=next_power_of_2(out.shape[2]), num_warps=2, **launch_options(),
        )  # fmt: skip
    return out
