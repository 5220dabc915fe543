"""silu(x @ gate.T) * (x @ up.T) in one launch of one wave: for products whose launches cost more than their work.

    w [2 * N, K]    | gate rows | up rows |      one program: 8 gate rows, their 8 up rows, the next 8 gate rows, ...
                       '--8--'     '--8--'       fetched as one tile by the tensor memory accelerator (TMA)

So a thread of the tensor cores' result holds a gate and its up value side by side, and the activation costs no exchange
between threads. The products of a small model's gate and up projections with 9 to 256 rows fit into one wave of
programs, one tile each; larger ones are bound by their weights or by arithmetic, which the library does as fast.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
from triton.tools.tensor_descriptor import TensorDescriptor

from kvarena.engine.kernels.common import launch_options

# Rows of a gate, and of its up, that lie side by side in a tile: half of what one instruction's tile has.
_PAIRED = 8
# Fewer rows go to the skinny GEMM, which folds the norm in as well.
_FEWEST_ROWS, _MOST_ROWS = 9, 256


class GluTile(NamedTuple):
    """Shape of a launch.

    Attributes:
        rows: of x per program; 64 at least, which the tensor cores compute anyway.
        cols: rows of w per program, gate and up together.
        depth: columns per step of the loop.
        num_warps, num_stages: of the compiler.
    """

    rows: int
    cols: int
    depth: int
    num_warps: int
    num_stages: int

    @property
    def programs_per_sm(self) -> int:
        """Programs that a multiprocessor holds at a time."""
        return _SHARED_BYTES // (2 * self.num_stages * self.depth * (self.rows + self.cols))


# By the most rows that they serve; the best or nearly so of 28 to 65 on one H100.
_TILES = {
    64: GluTile(64, 64, 128, num_warps=4, num_stages=4),
    128: GluTile(128, 64, 128, num_warps=4, num_stages=4),
    192: GluTile(64, 128, 64, num_warps=4, num_stages=4),
    256: GluTile(128, 64, 64, num_warps=4, num_stages=4),
}
# Shared memory of a Hopper multiprocessor, which bounds how many programs it holds at a time.
_SHARED_BYTES = 227 * 1024


@triton.jit(do_not_specialize=["M"])
def glu_kernel(  # type: ignore[no-untyped-def]
    x_desc, w_desc, y_ptr, M, N, stride_y,
    STEPS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr, PAIRED: tl.constexpr,
    UPCAST: tl.constexpr, STAGES: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One tile of y [M, N]; the grid is (tiles of COLS // 2 columns, tiles of ROWS rows)."""
    half: tl.constexpr = COLS // 2
    first_col = tl.program_id(0) * half
    first_row = tl.program_id(1) * ROWS
    if OVERLAP:
        gdc_wait()
    acc = tl.zeros((ROWS, COLS), tl.float32)
    for step in tl.range(0, STEPS, num_stages=STAGES):
        x = x_desc.load([first_row, step * DEPTH])
        w = tl.reshape(w_desc.load([first_col // PAIRED, 0, 0, step * DEPTH]), (COLS, DEPTH))
        if UPCAST:
            acc = tl.dot(x.to(tl.float32), tl.trans(w.to(tl.float32)), acc, input_precision="ieee")
        else:
            acc = tl.dot(x, tl.trans(w), acc)
    if OVERLAP:
        gdc_launch_dependents()
    pairs = tl.permute(tl.reshape(acc, (ROWS, half // PAIRED, 2, PAIRED)), (0, 1, 3, 2))
    gate, up = tl.split(pairs)
    out = tl.reshape(gate / (1.0 + tl.exp2(-1.4426950408889634 * gate)) * up, (ROWS, half))
    rows = first_row + tl.arange(0, ROWS)
    cols = first_col + tl.arange(0, half)
    keep = (rows < M)[:, None] & (cols < N)[None, :]
    y = y_ptr + rows.to(tl.int64)[:, None] * stride_y + cols[None, :]
    tl.store(y, out.to(y_ptr.dtype.element_ty), mask=keep)


def glu_tile(num_rows: int, num_cols: int, depth: int, num_multiprocessors: int) -> GluTile | None:
    """The launch for x [num_rows, depth] by w [num_cols, depth]; None where it does not fit into one wave."""
    if not _FEWEST_ROWS <= num_rows <= _MOST_ROWS or num_cols % (2 * _PAIRED):
        return None
    tile = next(tile for most, tile in _TILES.items() if num_rows <= most)
    programs = triton.cdiv(num_cols, tile.cols) * triton.cdiv(num_rows, tile.rows)
    is_one_wave = programs <= num_multiprocessors * tile.programs_per_sm
    return tile if depth % tile.depth == 0 and is_one_wave else None


def gated_product(x: Tensor, weight: Tensor, tile: GluTile, *, upcast: bool = False) -> Tensor:
    """silu(x @ gate.T) * (x @ up.T).

    Args:
        x: [M, K], contiguous, 16 bits an element.
        weight: [2 * N, K], contiguous: the gate's rows, then up's.
        tile: from `glu_tile`.
        upcast: see `SkinnyGemm`.

    Returns:
        [M, N] in x's dtype.
    """
    num_rows, depth = x.shape
    num_cols = len(weight) // 2
    out = x.new_empty(num_rows, num_cols)
    x_desc = TensorDescriptor.from_tensor(x, [tile.rows, tile.depth])
    w_desc = TensorDescriptor(
        weight,
        [num_cols // _PAIRED, 2, _PAIRED, depth],
        [_PAIRED * depth, num_cols * depth, depth, 1],
        [tile.cols // (2 * _PAIRED), 2, _PAIRED, tile.depth],
    )
    grid = (triton.cdiv(num_cols, tile.cols // 2), triton.cdiv(num_rows, tile.rows))
    glu_kernel[grid](
        x_desc, w_desc, out, num_rows, num_cols, out.stride(0),
        STEPS=depth // tile.depth, ROWS=tile.rows, COLS=tile.cols, DEPTH=tile.depth, PAIRED=_PAIRED, UPCAST=upcast,
        STAGES=tile.num_stages, num_warps=tile.num_warps, num_stages=tile.num_stages, **launch_options(),
    )  # fmt: skip
    return out
