"""Queries, keys and values of few rows in one launch: norm -> x @ w.T -> head norms -> rotation -> queries; keys and
values into their slots of the pool. The stream GEMM (stream.py), a head of 128 rows of w to a program:

    thread    rows i and i + 64 of a head, whose sums are the pair that the rotation turns
    program   a head's norm, over four warps; of a cluster the first one, which has all parts of K

The rotation is no launch of its own then, and the attention may be launched while the product runs. Rounded where the
two launches round.
"""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import torch
from torch import Tensor

from kvarena.engine.kernels.gemm.stream import (
    BLOCK_ROWS,
    BOX_COLS,
    FEWEST_STAGES,
    MOST_NORM_ROWS,
    MOST_ROWS,
    THREADS,
    StreamTile,
    row_bucket,
)
from kvarena.engine.kernels.hopper import HopperKernels, Kernel

HEAD_DIM = 128
ROW_BUCKETS = (1, 8, 16, 32, 64, 128, 192, 256)
# By rows and columns of w, and by the most rows of x: where the launch is faster than the product and the rotation, as
# `kvarena benchmark layer_gemm` measures it (an H200, commit 8daa3f5).
MEASURED: dict[tuple[int, int], dict[int, StreamTile]] = {
    (6144, 4096): {
        1: StreamTile(blocks=2, boxes=2, parts=2, per_sm=1, fuse_norm=True),
        8: StreamTile(blocks=2, boxes=2, parts=2, per_sm=1, fuse_norm=True),
        16: StreamTile(blocks=2, boxes=1, parts=2, per_sm=1, fuse_norm=True),
        32: StreamTile(blocks=2, boxes=2, parts=2, per_sm=1, fuse_norm=True),
    },
    (4096, 1024): {
        1: StreamTile(blocks=2, boxes=2, parts=2, per_sm=1, fuse_norm=True),
        8: StreamTile(blocks=2, boxes=1, parts=4, per_sm=2, fuse_norm=True),
        16: StreamTile(blocks=2, boxes=2, parts=2, per_sm=1, fuse_norm=True),
        32: StreamTile(blocks=2, boxes=2, parts=2, per_sm=1, fuse_norm=True),
    },
}


class HeadsToStore(NamedTuple):
    """What becomes of the product's heads.

    Attributes:
        num_heads: of queries; those of keys and values follow.
        cos, sin: float32 [T, 64], the angle of each pair.
        slots: int64 [T].
        keys, values: bf16 [num_slots, num_kv_heads, 128], a slot's heads side by side; written.
        q_norm, k_norm: bf16 [128], weights of an RMS norm over each head before the rotation; both or none.
        eps: of that norm.
    """

    num_heads: int
    cos: Tensor
    sin: Tensor
    slots: Tensor
    keys: Tensor
    values: Tensor
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None
    eps: float = 0.0

    @property
    def num_kv_heads(self) -> int:
        """Of the keys, and of the values."""
        return self.keys.shape[1]

    def fit(self) -> bool:
        """Whether the kernel takes them."""
        tensors = (self.keys, self.values)
        norms = (norm for norm in (self.q_norm, self.k_norm) if norm is not None)
        return (
            all(t.dtype == torch.bfloat16 and t.shape[2] == HEAD_DIM for t in tensors)
            and all(t.stride()[1:] == (HEAD_DIM, 1) and t.stride(0) == self.keys.stride(0) for t in tensors)
            and all(norm.dtype == torch.bfloat16 for norm in norms)
            and (self.q_norm is None) == (self.k_norm is None)
            and all(t.dtype == torch.float32 and t.shape[1] == HEAD_DIM // 2 for t in (self.cos, self.sin))
            and self.cos.stride() == self.sin.stride()
            and self.cos.stride(1) == 1
        )


class _Turn(ctypes.Structure):
    """The kernel's struct of that name."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("slots", "cos", "sin", "q_norm", "k_norm", "keys", "values")),
        ("stride_slot", ctypes.c_longlong), ("stride_angle", ctypes.c_int), ("num_heads", ctypes.c_int),
        ("num_kv_heads", ctypes.c_int), ("eps", ctypes.c_float),
    )  # fmt: skip


def turned_tile(num_rows: int, num_cols: int, depth: int) -> StreamTile | None:
    """The launch for x [num_rows, depth] by w [num_cols, depth]; None where two launches are as fast."""
    tiles = MEASURED.get((num_cols, depth), {})
    return next((tiles.get(bucket) for bucket in ROW_BUCKETS if num_rows <= bucket), None)


def turned_tiles(num_rows: int, num_cols: int, depth: int, num_multiprocessors: int) -> list[StreamTile]:
    """All launches that fit, for `benchmarks.kernels.layer_gemm`; arguments as of `stream_tile`."""
    return [
        tile
        for boxes in (1, 2)
        for parts in (1, 2, 4)
        for per_sm in (1, 2)
        for fuse_norm in (False, True)
        if _fits(tile := StreamTile(2, boxes, parts, per_sm, fuse_norm), num_rows, num_cols, depth, num_multiprocessors)
    ]


def _fits(tile: StreamTile, num_rows: int, num_cols: int, depth: int, num_multiprocessors: int) -> bool:
    if not 1 <= num_rows <= MOST_ROWS or (tile.fuse_norm and num_rows > MOST_NORM_ROWS):
        return False
    part_cols = BOX_COLS * tile.boxes * tile.parts
    programs = num_cols // HEAD_DIM * -(-num_rows // row_bucket(num_rows)) * tile.parts
    if depth % part_cols or num_cols % HEAD_DIM or programs > num_multiprocessors * tile.per_sm:
        return False
    return tile.num_stages(num_rows, depth) >= min(FEWEST_STAGES, depth // part_cols)


class TurnedGemm:
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
        heads: HeadsToStore,
        *,
        norm: Tensor | None = None,
        eps: float = 0.0,
        overlap: bool = True,
    ) -> Tensor:
        """Turned queries of [norm ->] x @ weight.T; its keys and values go to the pool.

        Args:
            x: [T, K] bf16, rows contiguous.
            weight: [N, K] bf16, contiguous: heads of queries, keys, values.
            tile: from `turned_tile`.
            heads: which fit.
            norm: [K] bf16, weight of an RMS norm of x with `eps`; given if `tile.fuse_norm`.
            overlap: launch it while the kernel before it runs.

        Returns:
            bf16 [T, num_heads, 128], contiguous.
        """
        num_rows, depth = x.shape
        out = x.new_empty(num_rows, heads.num_heads, HEAD_DIM)
        kernel = self._kernel(tile, num_rows, depth, has_norms=heads.q_norm is not None)
        tensors = (heads.slots, heads.cos, heads.sin, heads.q_norm, heads.k_norm, heads.keys, heads.values)
        turn = _Turn(
            *(None if t is None else t.data_ptr() for t in tensors), heads.keys.stride(0), heads.cos.stride(0),
            heads.num_heads, heads.num_kv_heads, heads.eps,
        )  # fmt: skip
        row_tiles = -(-num_rows // row_bucket(num_rows))
        steps = depth // (BOX_COLS * tile.boxes * tile.parts)
        addresses = (out.data_ptr(), None, None if norm is None else norm.data_ptr())
        self._kernels.launch(
            kernel, len(weight) // HEAD_DIM * row_tiles * tile.parts, self._kernels.matrix_map(x, row_bucket(num_rows)),
            self._kernels.matrix_map(weight, BLOCK_ROWS, keep=True), *map(ctypes.c_void_p, addresses),
            *map(ctypes.c_int, (num_rows, len(weight), out.stride(0), steps, row_tiles)), ctypes.c_float(eps), turn,
            overlap=overlap,
        )  # fmt: skip
        return out

    def _kernel(self, tile: StreamTile, num_rows: int, depth: int, *, has_norms: bool) -> Kernel:
        constants = constants_of(tile, num_rows, depth, has_norms=has_norms)
        rows = row_bucket(num_rows)
        shared_bytes = 1024 + constants["STAGES"] * tile.stage_bytes(rows) + tile.rest_bytes(rows, depth)
        key = (*constants.values(), shared_bytes)
        if key not in self._compiled:
            self._compiled[key] = self._kernels.compile(
                "stream_gemm", constants | {"MODE": "STORE"}, rows, threads=THREADS, shared_bytes=shared_bytes,
                cluster=tile.parts,
            )  # fmt: skip
        return self._compiled[key]


def constants_of(tile: StreamTile, num_rows: int, depth: int, *, has_norms: bool) -> dict[str, int]:
    """What is put in front of the kernel's text, but for its MODE, which is STORE."""
    return {
        "BX": row_bucket(num_rows), "RB": tile.blocks, "KS": tile.boxes, "CK": tile.parts,
        "STAGES": tile.num_stages(num_rows, depth), "NORM": int(tile.fuse_norm), "PACKED": 0, "PER_SM": tile.per_sm,
        "TURNS": 1, "HEAD_NORM": int(has_norms),
    }  # fmt: skip
