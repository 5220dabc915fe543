"""Device functions and host helpers that several kernels share."""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl

from kvarena.engine.kernels import INTERPRET

# What differs from step to step must not make Triton compile a kernel anew: whether these are multiples of 16.
VARYING = {
    "do_not_specialize": ["capacity", "stride_table"],
    "do_not_specialize_on_alignment": ["items_ptr", "query_loc_ptr", "seq_lens_ptr", "table_ptr"],
}


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least `n`."""
    return 1 << (n - 1).bit_length()


@lru_cache(maxsize=1)
def overlaps_launches() -> bool:
    """Whether the device can launch a kernel while the one before it runs (programmatic dependent launch: Hopper)."""
    return not INTERPRET and torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)


def launch_options(overlap: bool | None = None) -> dict[str, bool]:
    """Arguments of a launch of a kernel that begins with `await_previous`.

    Args:
        overlap: whether it may be launched early; None: where the device can do that.
    """
    # The interpreter does not know the option.
    return (
        {"OVERLAP": True, "launch_pdl": True}
        if overlap or (overlap is None and overlaps_launches())
        else {"OVERLAP": False}
    )


@triton.jit
def await_previous(OVERLAP: tl.constexpr):  # type: ignore[no-untyped-def]
    """Wait for the kernel before this one, whose end this one's launch overlaps; then let the next be launched.

    What the kernel before writes may only be read, and what it reads may only be written, after it; so it comes first
    in a kernel, but for loads of what was complete when that kernel began. Saves the latency of a launch, about a
    microsecond.
    """
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def dot(a, b, UPCAST: tl.constexpr):  # type: ignore[no-untyped-def]
    """a @ b, accumulated in float32; float32 operands are not rounded to tf32."""
    if UPCAST:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


def slot_type(keys: torch.Tensor) -> tl.dtype:
    """What a slot and the offset of its elements fit into: shorter integers take fewer instructions.

    A layer of a virtual pool is a strided view, so its elements say less than the distance from its first to its last.
    """
    return tl.int32 if keys.shape[0] * keys.stride(0) < 2**31 else tl.int64


@triton.jit
def cap_scores(scores, scale, softcap, SOFTCAP: tl.constexpr):  # type: ignore[no-untyped-def]
    """Raw products, soft-capped if asked: what is left to do is in `exponent_scale`."""
    if SOFTCAP:
        # tanh(x) = 2 sigmoid(2x) - 1: libdevice's tanh does not run in the interpreter.
        return softcap * (2.0 / (1.0 + tl.exp2(-2.0 * 1.4426950408889634 * scale / softcap * scores)) - 1.0)
    else:  # noqa: RET505 - as in `region_start`
        return scores


@triton.jit
def exponent_scale(scale, SOFTCAP: tl.constexpr):  # type: ignore[no-untyped-def]
    """Factor from what `cap_scores` gives to powers of two: folded into the exponent, it costs nothing."""
    if SOFTCAP:
        return 1.4426950408889634
    else:  # noqa: RET505 - as in `region_start`
        return scale * 1.4426950408889634


@triton.jit
def load_tile(  # type: ignore[no-untyped-def]
    base,
    slots,
    inside,
    STRIDE_SLOT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Rows `slots` of one head of the pool, [tokens, DIM_PAD]; zeros where not `inside` or beyond HEAD_DIM."""
    dims = tl.arange(0, DIM_PAD)
    pointers = base + slots[:, None] * STRIDE_SLOT + dims[None, :]
    if MASKED:
        if DIM_PAD != HEAD_DIM:
            return tl.load(pointers, mask=inside[:, None] & (dims[None, :] < HEAD_DIM), other=0.0)
        return tl.load(pointers, mask=inside[:, None], other=0.0)
    if DIM_PAD != HEAD_DIM:
        return tl.load(pointers, mask=dims[None, :] < HEAD_DIM, other=0.0)
    return tl.load(pointers)


@triton.jit
def region_start(table_row, BLOCK_SIZE: tl.constexpr, CONTIGUOUS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The first slot of a contiguous request; 0 for others, whose table is read tile by tile."""
    if CONTIGUOUS:
        return tl.load(table_row).to(tl.int64) * BLOCK_SIZE
    else:  # noqa: RET505 - both branches of a compile-time if are compiled unless one is the else
        return 0


@triton.jit
def tile_blocks(  # type: ignore[no-untyped-def]
    table_row, start, end, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr, CONTIGUOUS: tl.constexpr
):
    """Block ids of the tile at `start`, a multiple of TILE: one if no tile crosses a block's end, else one a token.

    To be read a tile ahead: a load of keys whose address comes from another load of the same tile would wait for it,
    and Triton would split its pipeline stages between the two. Beyond `end` it is block 0.
    """
    if CONTIGUOUS:
        return 0
    elif BLOCK_SIZE % TILE == 0:  # noqa: RET505
        return tl.load(table_row + start // BLOCK_SIZE, mask=start < end, other=0)
    else:
        positions = start + tl.arange(0, TILE)
        return tl.load(table_row + positions // BLOCK_SIZE, mask=positions < end, other=0)


@triton.jit
def tile_slots(  # type: ignore[no-untyped-def]
    blocks,
    first_slot,
    start,
    SLOT: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    CONTIGUOUS: tl.constexpr,
):
    """Slots of the tile at `start`, as integers of type SLOT: in its `blocks`, or of a contiguous request from its
    `first_slot`."""
    if CONTIGUOUS:
        return first_slot.to(SLOT) + start + tl.arange(0, TILE)
    elif BLOCK_SIZE % TILE == 0:  # noqa: RET505
        return blocks.to(SLOT) * BLOCK_SIZE + start % BLOCK_SIZE + tl.arange(0, TILE)
    else:
        return blocks.to(SLOT) * BLOCK_SIZE + (start + tl.arange(0, TILE)) % BLOCK_SIZE
