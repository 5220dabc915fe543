"""Grouped products of a prompt's experts on Hopper, bound by arithmetic: one walk over the tiles of all experts.

    x [T, H] -> gather -> rows by expert [T * k, H]   |expert 0      |expert 1   |expert 3            |...
                                                      | 256  | 256 |.| 256   |...
    w [E * R, K], all experts' rows in one map        an item times 256 rows of its expert's matrix is a tile

A program is a multiprocessor's for the whole launch: it takes every so-manieth tile from the list of items that the
sort made, so one grid computes any routing, and fetches the next tile's operands while it writes the last one's sums.
Rows that are side by side are fetched by the tensor memory accelerator, as the weights are; those behind an item's end
are multiplied and not stored. With many rows an expert the two programs of a cluster share the tile of weights, with
fewer the rows. The kernel is that of the wide gated product (wide_gemm.cu), with which it has its pace in common.
"""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvarena.engine.kernels.common import await_previous, launch_options, next_power_of_2
from kvarena.engine.kernels.experts.routing import Routing
from kvarena.engine.kernels.gemm.wide import PROGRAM_ROWS, STEP_COLS, WideTile
from kvarena.engine.kernels.hopper import HopperKernels, Kernel

# By the mean pairs of an expert: beyond the first it is this kernel, beyond the second a cluster shares weights.
FEWEST_ROWS, FEW_ROWS = 31, 128
# Items of an expert that are computed side by side: so their rows and so many tiles of weights stay in the cache.
SPAN_ITEMS = 8
_TILE = WideTile(256, 2)


class GroupedTile(NamedTuple):
    """Shape of both products' launches.

    Attributes:
        share_x: a cluster's programs have the same 128 rows of x and neighbouring columns; else the same columns and
            128 rows each.
    """

    share_x: bool

    @property
    def rows(self) -> int:
        """Pairs of an item."""
        return PROGRAM_ROWS if self.share_x else PROGRAM_ROWS * _TILE.cluster


def grouped_tile(num_pairs: int, num_experts: int) -> GroupedTile | None:
    """The launch by how many pairs an expert has when the routing is balanced; None where they are few."""
    mean = num_pairs / num_experts
    return GroupedTile(share_x=mean <= FEW_ROWS) if mean > FEWEST_ROWS else None


class GroupedGemm:
    """Launches the kernel for gate and up, and for down.

    Args:
        kernels: of the device where the operands live.
    """

    def __init__(self, kernels: HopperKernels) -> None:
        self._kernels = kernels
        self._compiled: dict[tuple[GroupedTile, bool], Kernel] = {}

    @staticmethod
    def takes(x: Tensor, gate_up: Tensor, down: Tensor) -> bool:
        """Whether the operands of `gate_up` and `down` are what the kernel reads."""
        plain = x.dtype == gate_up.dtype == down.dtype == torch.bfloat16
        aligned = down.shape[1] % 8 == 0 and down.shape[2] % 8 == 0
        return plain and aligned and gate_up.is_contiguous() and down.is_contiguous()

    def gate_up(
        self, rows: Tensor, weight: Tensor, routing: Routing, out: Tensor, tile: GroupedTile, *, overlap: bool = True
    ) -> None:
        """silu(rows @ gate.T) * (rows @ up.T), each row with its expert's matrices.

        Args:
            rows: [T * k, H] bf16, contiguous, by expert: from `gather_rows`.
            weight: [E, 2 * I, H] bf16, contiguous, the gates' rows first.
            routing: with items of `tile.rows`, in spans of SPAN_ITEMS. Complete before the launch before this began.
            out: [T * k, I] bf16, rows contiguous; written where `routing.order` has a pair.
            tile: shape of the launch.
            overlap: launch it while the kernel before it runs.
        """
        self._launch(rows, weight, weight.shape[1] // 2, routing, None, out, tile, overlap=overlap)

    def down(
        self,
        act: Tensor,
        weight: Tensor,
        routing: Routing,
        factors: Tensor,
        out: Tensor,
        tile: GroupedTile,
        *,
        overlap: bool = True,
    ) -> None:
        """factors * (act @ down.T), row i to row `routing.order[i]`; see `gate_up`.

        Args:
            act: [T * k, I] bf16, contiguous, by expert.
            weight: [E, H, I] bf16, contiguous.
            factors: float32 [T * k], by expert: from `gather_rows`.
            out: [T * k, H] bf16, rows contiguous, written by token, where it has an expert.
        """
        self._launch(act, weight, weight.shape[1], routing, factors, out, tile, overlap=overlap)

    def _launch(
        self,
        x: Tensor,
        weight: Tensor,
        num_cols: int,
        routing: Routing,
        factors: Tensor | None,
        out: Tensor,
        tile: GroupedTile,
        *,
        overlap: bool,
    ) -> None:
        glu = factors is None
        kernel = self._kernel(tile, glu=glu)
        num_items = routing.items.shape[1]
        num_tiles = column_tiles(num_cols, tile, glu=glu)
        clusters = min(kernel.clusters_at_once, num_items * num_tiles)
        addresses = (None if t is None else t.data_ptr() for t in (out, routing.items, routing.order, factors))
        steps = -(-weight.shape[2] // STEP_COLS)
        self._kernels.launch(
            kernel, clusters * _TILE.cluster, self._kernels.matrix_map(x, PROGRAM_ROWS // 2),
            self._kernels.matrix_map(weight.view(-1, weight.shape[2]), _TILE.cols // 2, keep=True),
            *map(ctypes.c_void_p, addresses),
            *map(ctypes.c_int, (num_items, len(x), num_cols, out.stride(0), num_tiles, steps)), overlap=overlap,
        )  # fmt: skip

    def _kernel(self, tile: GroupedTile, *, glu: bool) -> Kernel:
        key = (tile, glu)
        if key not in self._compiled:
            self._compiled[key] = _TILE.compile(self._kernels, glu=glu, grouped=True, share_x=tile.share_x)
        return self._compiled[key]


def column_tiles(num_cols: int, tile: GroupedTile, *, glu: bool) -> int:
    """Tiles of y's columns that an item has, of a cluster each."""
    cols = _TILE.cols // 2 if glu else _TILE.cols
    return -(-num_cols // (cols * (_TILE.cluster if tile.share_x else 1)))


def launch_constants() -> list[dict[str, int]]:
    """The constants of wide_gemm.cu of every launch here."""
    return [
        _TILE.constants(glu=glu, grouped=True, share_x=share_x) for glu in (True, False) for share_x in (True, False)
    ]


def gather_rows(x: Tensor, routing: Routing) -> tuple[Tensor, Tensor]:
    """Each pair's row of x [T, H] and its weight, by expert: [T * k, H], and float32 [T * k]; in one launch.

    Written where `routing.order` has a pair.
    """
    num_pairs, size = len(routing.order), x.shape[1]
    rows = x.new_empty(num_pairs, size)
    factors = torch.empty(num_pairs, dtype=torch.float32, device=x.device)
    tile = min(4096, next_power_of_2(size))
    gather_rows_kernel[(num_pairs, triton.cdiv(size, tile))](
        x, routing.order, routing.weights, rows, factors, x.stride(0),
        TOP_K=routing.ids.shape[1], SIZE=size, TILE=tile, num_warps=max(1, tile // 1024), **launch_options(),
    )  # fmt: skip
    return rows, factors


@triton.jit
def gather_rows_kernel(  # type: ignore[no-untyped-def]
    x_ptr, order_ptr, weights_ptr, rows_ptr, factors_ptr, stride_x,
    TOP_K: tl.constexpr, SIZE: tl.constexpr, TILE: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """TILE elements of one pair."""
    await_previous(OVERLAP)
    row = tl.program_id(0).to(tl.int64)
    pair = tl.load(order_ptr + row)
    if pair >= 0:
        at = tl.program_id(1) * TILE + tl.arange(0, TILE)
        values = tl.load(x_ptr + (pair // TOP_K).to(tl.int64) * stride_x + at, mask=at < SIZE)
        tl.store(rows_ptr + row * SIZE + at, values, mask=at < SIZE)
        if tl.program_id(1) == 0:
            tl.store(factors_ptr + row, tl.load(weights_ptr + pair))
