"""Skinny GEMM on Hopper whose weights are on their way before its input is there: y = x @ w.T for few rows of x.

    w [N, K]   | 64 or 128 rows |  columns -> | -> |     a program: its rows of w over one part of K, fetched ahead into
    x [M, K]   | 8 to 64 rows   |                        as much shared memory as it may have

A small product is over in a few microseconds, of which its launch, the first fetch's way to memory and back, and the
end of the kernel before it are most. This one is launched as soon as all programs of the kernel before it have begun,
and fetches weights, which depend on nothing, into all of its shared memory; only then it waits for that kernel's
results. The weights are the tall operand of the tensor cores' product (w @ x.T), so 1 to 8 rows of x fill its narrow
side. Parts of K are a cluster's programs, which send their sums to the first one's shared memory; it adds them in a
fixed order. More than 64 rows of x are shared out to several programs, which is worth it for small products, of all
whose programs the device holds at once. What the neighbours of a projection do is folded in, as in `gemm.py`: the norm
before it (its weight is applied to x in shared memory, its factor to the sum), silu(gate) * up, the residual.
"""

from __future__ import annotations

import ctypes
from typing import NamedTuple

from torch import Tensor

from kvarena.engine.kernels.hopper import SHARED_BYTES, HopperKernels, Kernel

MOST_ROWS = 256
THREADS, BLOCK_ROWS, BOX_COLS = 160, 64, 64
# Rows of x that a kernel is compiled for.
_ROW_BUCKETS = (8, 16, 32, 64)
# Beyond it only small products are worth it, whose K is short where a norm comes before.
_ONE_TILE_ROWS, _SHORT_DEPTH = _ROW_BUCKETS[-1], 2048
# A norm of more rows costs every program more than a launch of its own.
MOST_NORM_ROWS = 32
# One row by more than this is multiplied and added as fast without the tensor cores, by the kernel of `gemm.py`.
_MOST_BYTES_OF_ONE_ROW = 64 * 2**20
# Of the barriers, of sums of squares, and of the alignment of the tiles.
_RESERVED_BYTES = 4096
FEWEST_STAGES = 3


class StreamTile(NamedTuple):
    """Shape of a launch.

    Attributes:
        blocks: 64 rows of w each per program; with a gate one is gate's, the other up's.
        boxes: 64 columns each per step.
        parts: of K; programs of a cluster.
        per_sm: programs that a multiprocessor is to hold at a time.
        fuse_norm: where a norm comes before, take it into the launch.
    """

    blocks: int
    boxes: int
    parts: int
    per_sm: int
    fuse_norm: bool = False

    def stage_bytes(self, num_rows: int) -> int:
        """Of one step's tiles of w and x."""
        return 2 * BOX_COLS * self.boxes * (BLOCK_ROWS * self.blocks + row_bucket(num_rows))

    def rest_bytes(self, num_rows: int, depth: int) -> int:
        """Of the other parts' sums and the norm's weights."""
        sums = 4 * (self.parts - 1) * BLOCK_ROWS * self.blocks * row_bucket(num_rows)
        return sums + (2 * depth // self.parts if self.fuse_norm else 0)

    def num_stages(self, num_rows: int, depth: int) -> int:
        """Steps that are fetched ahead."""
        room = SHARED_BYTES // self.per_sm - _RESERVED_BYTES - self.rest_bytes(num_rows, depth)
        return min(room // self.stage_bytes(num_rows), depth // (BOX_COLS * self.boxes * self.parts))


def row_bucket(num_rows: int) -> int:
    """The rows of x that a program of the kernel for `num_rows` takes."""
    return next((bucket for bucket in _ROW_BUCKETS if num_rows <= bucket), _ROW_BUCKETS[-1])


def stream_tile(
    num_rows: int, num_cols: int, depth: int, num_multiprocessors: int, *, norm: bool = False, glu: bool = False
) -> StreamTile | None:
    """The launch for x [num_rows, depth] by w [num_cols, depth], by `benchmarks.kernels.hopper`.

    Args:
        num_rows, num_cols, depth: of the product; with `glu` w holds gate and up.
        num_multiprocessors: of the device. All programs must be there at once.
        norm: an RMS norm comes before.
        glu: silu(gate) * up comes after.

    Returns:
        None where another kernel is as fast.
    """
    if not 1 <= num_rows <= MOST_ROWS or num_cols % 16:
        return None
    if num_rows > _ONE_TILE_ROWS:
        return _tile_of_many_rows(num_rows, num_cols, depth, num_multiprocessors, norm=norm, glu=glu)
    fuse_norm = norm and num_rows <= MOST_NORM_ROWS
    columns = -(-num_cols // (2 * BLOCK_ROWS if glu else BLOCK_ROWS))
    if glu:
        few = 2 * columns <= num_multiprocessors
        if (few and num_rows > MOST_NORM_ROWS) or (num_rows == 1 and 2 * num_cols * depth > _MOST_BYTES_OF_ONE_ROW):
            return None
        tile = StreamTile(2, 2, 2, 1, fuse_norm) if few else StreamTile(2, 1, 1, 2, fuse_norm)
        programs = columns * tile.parts
    elif norm:
        # Two blocks share what it costs to apply the norm to x; of a long K few rows of x are little to apply it to.
        share = fuse_norm and (num_rows > 16 or depth < 2048)
        tile = StreamTile(2, 2, 2, 1, True) if share else StreamTile(1, 2, 1, 1, fuse_norm)
        programs = -(-columns // tile.blocks) * tile.parts
    else:
        parts = next((parts for parts in (4, 2) if columns * parts <= num_multiprocessors), 1)
        tile = StreamTile(1, 2, parts, 1)
        programs = columns * parts
    part_cols = BOX_COLS * tile.boxes * tile.parts
    # A step's stage is given back during the next step: a ring of one would never get there.
    fits = depth % part_cols == 0 and tile.num_stages(num_rows, depth) >= min(FEWEST_STAGES, depth // part_cols)
    return tile if fits and programs <= num_multiprocessors * tile.per_sm else None


def _tile_of_many_rows(
    num_rows: int, num_cols: int, depth: int, num_multiprocessors: int, *, norm: bool, glu: bool
) -> StreamTile | None:
    """The launch for more rows than a program takes."""
    if glu:
        # Fewer rows are as fast in the gated product of one wave.
        tile = StreamTile(2, 1, 1, 2) if num_rows > 2 * _ONE_TILE_ROWS else None
    else:
        tile = StreamTile(1, 1, 1, 2) if norm else StreamTile(1, 2, 2, 1)
    if tile is None or ((norm or glu) and depth >= _SHORT_DEPTH) or depth % (BOX_COLS * tile.boxes * tile.parts):
        return None
    columns = -(-num_cols // (2 * BLOCK_ROWS if glu else BLOCK_ROWS))
    programs = columns * -(-num_rows // _ONE_TILE_ROWS) * tile.parts
    return tile if programs <= num_multiprocessors * tile.per_sm else None


class StreamGemm:
    """Launches the kernel.

    Args:
        kernels: of the device where the operands live.
    """

    def __init__(self, kernels: HopperKernels) -> None:
        self._kernels = kernels
        self._compiled: dict[tuple[object, ...], Kernel] = {}

    def __call__(
        self,
        x: Tensor,
        weight: Tensor,
        tile: StreamTile,
        *,
        norm: Tensor | None = None,
        eps: float = 0.0,
        residual: Tensor | None = None,
        glu: bool = False,
        out: Tensor | None = None,
        overlap: bool = True,
    ) -> Tensor:
        """[norm ->] x @ weight.T [-> silu(gate) * up] [+ residual].

        Args:
            x: [M, K] bf16, rows contiguous, 1 <= M <= MOST_ROWS.
            weight: [N, K] bf16, contiguous; with `glu` [2 * N, K], the gate's rows first.
            tile: from `stream_tile`.
            norm: [K] bf16, weight of an RMS norm of x with `eps`; `tile.fuse_norm` says whether it may be given.
            residual: [M, N] bf16, rows as far apart as those of `out`; may be `out` itself. Not with `glu`.
            glu: see the module.
            out: [M, N] bf16, rows contiguous; written. Allocated if None.
            overlap: launch it while the kernel before it runs.

        Returns:
            `out`.
        """
        num_rows, depth = x.shape
        num_cols = len(weight) // 2 if glu else len(weight)
        if out is None:
            out = x.new_empty(num_rows, num_cols)
        kernel = self._kernel(tile, num_rows, depth, "GLU" if glu else "STORE" if residual is None else "ADD")
        cols = BLOCK_ROWS if glu else BLOCK_ROWS * tile.blocks
        addresses = (None if t is None else t.data_ptr() for t in (out, residual, norm))
        steps = depth // (BOX_COLS * tile.boxes * tile.parts)
        row_tiles = -(-num_rows // row_bucket(num_rows))
        self._kernels.launch(
            kernel, -(-num_cols // cols) * row_tiles * tile.parts, self._kernels.matrix_map(x, row_bucket(num_rows)),
            self._kernels.matrix_map(weight, BLOCK_ROWS, keep=True), *map(ctypes.c_void_p, addresses),
            *map(ctypes.c_int, (num_rows, num_cols, out.stride(0), steps, row_tiles)), ctypes.c_float(eps),
            overlap=overlap,
        )  # fmt: skip
        return out

    def _kernel(self, tile: StreamTile, num_rows: int, depth: int, mode: str) -> Kernel:
        rows, stages = row_bucket(num_rows), tile.num_stages(num_rows, depth)
        shared_bytes = 1024 + stages * tile.stage_bytes(rows) + tile.rest_bytes(rows, depth)
        key = (tile, rows, mode, stages, shared_bytes)
        if key not in self._compiled:
            constants = {
                "BX": rows, "RB": tile.blocks, "KS": tile.boxes, "CK": tile.parts, "STAGES": stages, "MODE": mode,
                "NORM": int(tile.fuse_norm), "PACKED": 0, "PER_SM": tile.per_sm,
            }  # fmt: skip
            self._compiled[key] = self._kernels.compile(
                "stream_gemm", constants, rows, threads=THREADS, shared_bytes=shared_bytes, cluster=tile.parts
            )
        return self._compiled[key]
