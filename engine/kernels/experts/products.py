"""Grouped products of experts: each item of the routing is rows of one expert, times a tile of its matrix.

    gate and up   x [T, H]         rows gathered by token   -> silu(gate) * up, [T * k, I] by expert
    down          that [T * k, I]  rows side by side        -> times the router's weight, [T * k, H] by token
    sum           residual [T, H] += the k rows of each token; of few tokens in the launch before it, by the last
                  program of each tile of columns

Programs of one tile of a matrix and neighbouring items of an expert run side by side, so its weights come from memory
once, however many items it has. Of few rows the weights are the tall operand of the tensor cores' product (w @ x.T), as
in the skinny GEMM; of many the rows are.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kvarena.engine.kernels.common import await_previous, launch_options, next_power_of_2
from kvarena.engine.kernels.experts.routing import Routing

_LINE = 128  # bytes that one prefetch brings


class ExpertTile(NamedTuple):
    """Shape of a product's launch.

    Attributes:
        rows: pairs of a program.
        cols: rows of the matrix of a program; of gate and up so many each.
        depth: columns per step of the loop.
        num_warps, num_stages: of the compiler.
        swap: the weights are the tall operand.
    """

    rows: int
    cols: int
    depth: int
    num_warps: int
    num_stages: int
    swap: bool


# By the mean pairs of an expert: up to so many. Chosen by shared memory and registers, not measured on any GPU yet:
# `kvarena benchmark experts --tune` measures the others.
TILES = {
    12: ExpertTile(16, 64, 128, num_warps=4, num_stages=3, swap=True),
    24: ExpertTile(32, 64, 128, num_warps=4, num_stages=3, swap=True),
    96: ExpertTile(64, 64, 128, num_warps=4, num_stages=3, swap=True),
}
MANY_ROWS = ExpertTile(128, 128, 64, num_warps=8, num_stages=3, swap=False)


def tile_for(num_pairs: int, num_experts: int, itemsize: int = 2) -> ExpertTile:
    """The shape of a launch by how many pairs an expert has when the routing is balanced."""
    mean = num_pairs / num_experts
    tile = next((tile for most, tile in TILES.items() if mean <= most), MANY_ROWS)
    # Shared memory holds half as many elements of four bytes.
    return tile if itemsize <= 2 else tile._replace(depth=tile.depth * 2 // itemsize, num_stages=2)


def gate_up_product(
    x: Tensor, weight: Tensor, routing: Routing, out: Tensor, tile: ExpertTile, *, upcast: bool
) -> None:
    """silu(x @ gate.T) * (x @ up.T) of each pair with its expert's matrices.

    Args:
        x: [T, H], rows contiguous.
        weight: [E, 2 * I, H], the gates' rows first.
        routing: of T tokens, with items of `tile.rows`.
        out: [T * k, I], written where `routing.order` has a pair: by expert.
        tile: shape of the launch.
        upcast: see `kvarena.engine.kernels.gemm.skinny.SkinnyGemm`.
    """
    _launch(x, weight, routing, out, weight.shape[1] // 2, tile, glu=True, upcast=upcast)


class SumTarget(NamedTuple):
    """Where the rows of each token are added up.

    Attributes:
        residual: [T, H], added to in place.
        locks: int32, at least as many as tiles of columns; 0 before and after a launch.
    """

    residual: Tensor
    locks: Tensor


def down_product(
    act: Tensor,
    weight: Tensor,
    routing: Routing,
    out: Tensor,
    tile: ExpertTile,
    *,
    upcast: bool,
    target: SumTarget | None = None,
) -> None:
    """weights * (act @ down.T) of each pair; see `gate_up_product`.

    Args:
        act: [T * k, I], by expert.
        weight: [E, H, I].
        routing, tile, upcast: see there.
        out: [T * k, H], written by token, where it has an expert.
        target: what `add_experts` does is done as well.
    """
    _launch(act, weight, routing, out, weight.shape[1], tile, glu=False, upcast=upcast, target=target)


def _launch(
    x: Tensor,
    weight: Tensor,
    routing: Routing,
    out: Tensor,
    num_cols: int,
    tile: ExpertTile,
    *,
    glu: bool,
    upcast: bool,
    target: SumTarget | None = None,
) -> None:
    depth = weight.shape[2]
    items, top_k = routing.items, routing.ids.shape[1]
    step = min(tile.depth, max(16, next_power_of_2(depth)))
    options = launch_options()
    residual, locks = (out, items) if target is None else target
    expert_product_kernel[(items.shape[1], triton.cdiv(num_cols, tile.cols))](
        x, weight, out, routing.order, items, routing.weights, routing.ids, residual, locks, num_cols, depth,
        items.shape[1], len(routing.ids), x.stride(0), weight.stride(0), weight.stride(1), out.stride(0),
        residual.stride(0), EXPERTS=len(weight), SUM=target is not None,
        TOP_K=top_k, ROWS=tile.rows, COLS=tile.cols, DEPTH=step, EVEN_DEPTH=depth % step == 0, GLU=glu, SWAP=tile.swap,
        LINES=max(1, step * weight.element_size() // _LINE), PER_LINE=_LINE // weight.element_size(),
        UPCAST=upcast, STAGES=tile.num_stages, num_warps=tile.num_warps, num_stages=tile.num_stages, **options,
    )  # fmt: skip


@triton.jit
def _multiply(x, w, acc, SWAP: tl.constexpr, UPCAST: tl.constexpr):  # type: ignore[no-untyped-def]
    """acc + x @ w.T, or its transpose."""
    if UPCAST:
        x = x.to(tl.float32)
        w = w.to(tl.float32)
    if SWAP:
        return tl.dot(w, tl.trans(x), acc, input_precision="ieee")
    else:  # noqa: RET505 - both branches of a compile-time if are compiled unless one is the else
        return tl.dot(x, tl.trans(w), acc, input_precision="ieee")


@triton.jit
def _prefetch(pointers):  # type: ignore[no-untyped-def]
    """Bring the lines at `pointers` to the L2 cache."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [pointers], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def _sum_rows(  # type: ignore[no-untyped-def]
    out_ptr, ids_ptr, residual_ptr, lock_ptr, cols, N, num_tokens, stride_out, stride_residual,
    EXPERTS: tl.constexpr, TOP_K: tl.constexpr,
):  # fmt: skip
    """The last program of a tile of columns adds up what all of them have stored, as `add_experts_kernel` does."""
    tl.debug_barrier()
    arrived = tl.atomic_add(lock_ptr, 1, sem="acq_rel", scope="gpu")
    if arrived == tl.num_programs(0) - 1:
        inside = cols < N
        for token in range(num_tokens):
            residual = residual_ptr + token * stride_residual + cols
            total = tl.load(residual, mask=inside, other=0.0).to(tl.float32)
            for i in tl.static_range(TOP_K):
                # Nobody wrote the rows of a token that is padding.
                has_expert = tl.load(ids_ptr + token * TOP_K + i) < EXPERTS
                row = out_ptr + (token * TOP_K + i) * stride_out + cols
                total += tl.load(row, mask=inside & has_expert, other=0.0, cache_modifier=".cg").to(tl.float32)
            tl.store(residual, total.to(residual_ptr.dtype.element_ty), mask=inside)
        tl.atomic_xchg(lock_ptr, 0)


@triton.jit(do_not_specialize=["num_items", "num_tokens"])
def expert_product_kernel(  # type: ignore[no-untyped-def]
    x_ptr, w_ptr, out_ptr, order_ptr, items_ptr, weights_ptr, ids_ptr, residual_ptr, locks_ptr, N, K, num_items,
    num_tokens, stride_x, stride_expert, stride_w, stride_out, stride_residual,
    EXPERTS: tl.constexpr, SUM: tl.constexpr, TOP_K: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    DEPTH: tl.constexpr, EVEN_DEPTH: tl.constexpr, GLU: tl.constexpr, SWAP: tl.constexpr, LINES: tl.constexpr,
    PER_LINE: tl.constexpr, UPCAST: tl.constexpr, STAGES: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One item times COLS rows of its expert's matrix; the grid is (items, tiles of columns of the result)."""
    if OVERLAP and GLU:
        gdc_wait()
    # Of the down product: the routing was complete before the kernel before this one began.
    expert = tl.load(items_ptr + tl.program_id(0))
    cols = tl.program_id(1) * COLS + tl.arange(0, COLS)
    if expert < 0:
        if SUM:
            if OVERLAP:
                gdc_wait()
            _sum_rows(
                out_ptr, ids_ptr, residual_ptr, locks_ptr + tl.program_id(1), cols, N, num_tokens, stride_out,
                stride_residual, EXPERTS, TOP_K,
            )  # fmt: skip
        return
    # Rows past N are clamped, not masked: they read something valid that is never stored.
    matrix = w_ptr + expert.to(tl.int64) * stride_expert
    w_rows = matrix + tl.minimum(cols, N - 1).to(tl.int64) * stride_w
    if OVERLAP and not GLU:
        # So are the weights: their first tile is on its way while the kernel before ends.
        _prefetch(w_rows[:, None] + tl.arange(0, LINES)[None, :] * PER_LINE)
        gdc_wait()
    begin = tl.load(items_ptr + num_items + tl.program_id(0))
    end = tl.load(items_ptr + 2 * num_items + tl.program_id(0))
    rows = begin + tl.arange(0, ROWS)
    exists = rows < end
    pairs = tl.load(order_ptr + rows, mask=exists, other=0)
    ks = tl.arange(0, DEPTH)
    if GLU:
        x_rows = x_ptr + (pairs // TOP_K).to(tl.int64) * stride_x
    else:
        x_rows = x_ptr + rows.to(tl.int64) * stride_x
    x_tile = x_rows[:, None] + ks[None, :]
    w_tile = w_rows[:, None] + ks[None, :]
    up_offset = N.to(tl.int64) * stride_w
    height: tl.constexpr = COLS if SWAP else ROWS
    width: tl.constexpr = ROWS if SWAP else COLS
    acc = tl.zeros((height, width), tl.float32)
    acc_up = tl.zeros((height, width), tl.float32)
    for k in tl.range(0, K, DEPTH, num_stages=STAGES):
        if EVEN_DEPTH:
            x = tl.load(x_tile + k, mask=exists[:, None], other=0.0)
            w = tl.load(w_tile + k)
        else:
            inside = (k + ks < K)[None, :]
            x = tl.load(x_tile + k, mask=exists[:, None] & inside, other=0.0)
            w = tl.load(w_tile + k, mask=inside, other=0.0)
        acc = _multiply(x, w, acc, SWAP, UPCAST)
        if GLU:
            if EVEN_DEPTH:
                up = tl.load(w_tile + up_offset + k)
            else:
                up = tl.load(w_tile + up_offset + k, mask=inside, other=0.0)
            acc_up = _multiply(x, up, acc_up, SWAP, UPCAST)
    if OVERLAP:
        # Not before: the next kernel's programs would take room from this one's.
        gdc_launch_dependents()
    if GLU:
        acc = acc * tl.sigmoid(acc) * acc_up
    if SWAP:
        acc = tl.trans(acc)
    if GLU:
        out_rows = rows
    else:
        acc = acc * tl.load(weights_ptr + pairs, mask=exists, other=0.0)[:, None]
        out_rows = pairs
    keep = exists[:, None] & (cols < N)[None, :]
    out_tile = out_ptr + out_rows.to(tl.int64)[:, None] * stride_out + cols[None, :]
    tl.store(out_tile, acc.to(out_ptr.dtype.element_ty), mask=keep)
    if SUM:
        _sum_rows(
            out_ptr, ids_ptr, residual_ptr, locks_ptr + tl.program_id(1), cols, N, num_tokens, stride_out,
            stride_residual, EXPERTS, TOP_K,
        )  # fmt: skip


def add_experts(pairs: Tensor, routing: Routing, num_experts: int, residual: Tensor) -> None:
    """residual[t] += the sum of token t's rows of `pairs` [T * k, H], in order and in float32; in place."""
    num_tokens, size = residual.shape
    tile = min(2048, next_power_of_2(size))
    add_experts_kernel[(num_tokens, triton.cdiv(size, tile))](
        pairs, routing.ids, residual, residual.stride(0),
        EXPERTS=num_experts, TOP_K=routing.ids.shape[1], SIZE=size, TILE=tile,
        num_warps=max(1, tile // 512), **launch_options(),
    )  # fmt: skip


@triton.jit
def add_experts_kernel(  # type: ignore[no-untyped-def]
    pairs_ptr, ids_ptr, residual_ptr, stride_residual,
    EXPERTS: tl.constexpr, TOP_K: tl.constexpr, SIZE: tl.constexpr, TILE: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """TILE elements of one token."""
    await_previous(OVERLAP)
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * TILE + tl.arange(0, TILE)
    residual = residual_ptr + row * stride_residual + at
    total = tl.load(residual, mask=at < SIZE, other=0.0).to(tl.float32)
    for i in tl.static_range(TOP_K):
        # Nobody wrote the rows of a token that is padding.
        has_expert = tl.load(ids_ptr + row * TOP_K + i) < EXPERTS
        term = tl.load(pairs_ptr + (row * TOP_K + i) * SIZE + at, mask=(at < SIZE) & has_expert, other=0.0)
        total += term.to(tl.float32)
    tl.store(residual, total.to(residual_ptr.dtype.element_ty), mask=at < SIZE)
