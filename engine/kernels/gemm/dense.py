"""Products of 65 to 512 rows of x on Hopper, cut so that all multiprocessors work: y (+)= x @ w.T.

    w [N, K]   |  part 0  |  part 1  |     a program: a tile of w's rows by 128 rows of x over one part of K; two
    x [M, K]   |  part 0  |  part 1  |     warpgroups multiply what one thread of a third one fetches ahead

256 rows by 4,096 columns are 32 tiles of 256 x 128 for 132 multiprocessors. Here the parts of K are programs of their
own, all there at once. Each makes results of one slice of the tile: it leaves the others their slices of its sums in
memory (that is, in the L2 cache) and adds theirs to its own, in the order of the parts: results do not depend on who
comes first. Two programs of a cluster share what they fetch: a tile of w, where each has 128 rows of x of its own,
or the rows of x, where each has a tile of w. The residual is added by who makes the result.

What a launch costs is the longest of four (`predicted_us`): the tensor cores' time, their operands' way through shared
memory, the operands' way from the L2 cache, the weights' way from memory.
"""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import torch
from torch import Tensor

from kvarena.engine.kernels.hopper import SHARED_BYTES, HopperKernels, Kernel

FEWEST_ROWS, MOST_ROWS = 65, 512
ROW_BUCKETS = (96, 128, 192, 256, 384, 512)
PROGRAM_ROWS, STEP_COLS, _THREADS, _MULTIPLYING = 128, 64, 384, 256
_WIDTHS = range(64, 257, 16)
# Of the barriers, and of the alignment of the tiles.
_RESERVED_BYTES = 2048
_FEWEST_STEPS = 4
# Room for what 132 programs exchange, whatever their tile, so that it rarely has to grow.
_FEWEST_SUMS, _FEWEST_FLAGS = 132 * PROGRAM_ROWS * 256, 132 * 8
# Of an H200: cycles a microsecond; bytes a cycle of a multiprocessor's shared memory, and that the L2 cache gives it;
# bytes a microsecond of memory and of the L2 cache. What a launch and its results take beside its steps.
_CYCLES, _SHARED_WIDTH, _L2_WIDTH, _MEMORY, _L2, _AROUND_US, _MEETING_US = 1755, 128, 33, 4.2e6, 5e6, 2.5, 2.0
# How much of the tensor cores' rate steps reach that wait for nothing (the gated product's, gemm/wide.py).
_REACHED = 0.87


class DenseTile(NamedTuple):
    """Shape of a launch.

    Attributes:
        cols: rows of w of a program.
        cluster: programs that share fetches; 1 or 2.
        share_x: they share the rows of x, and not a tile of w.
        parts: of K.
        apart: programs with other columns begin at other places of K, so that they do not all read the same of x.
    """

    cols: int
    cluster: int
    share_x: bool
    parts: int
    apart: bool = False

    @property
    def stage_bytes(self) -> int:
        """Of one step's tiles of x and w."""
        return 2 * STEP_COLS * (PROGRAM_ROWS + self.cols)

    @property
    def num_stages(self) -> int:
        """Steps that are fetched ahead."""
        return min(8, (SHARED_BYTES - _RESERVED_BYTES) // self.stage_bytes)

    def clusters(self, num_rows: int, num_cols: int) -> tuple[int, int]:
        """Of a launch: tiles of columns of a cluster, and all clusters."""
        rows = PROGRAM_ROWS * (1 if self.share_x else self.cluster)
        col_tiles = -(-num_cols // (self.cols * (self.cluster if self.share_x else 1)))
        return col_tiles, col_tiles * -(-num_rows // rows) * self.parts

    def constants(self, mode: str) -> dict[str, object]:
        """Of wide_dense.cu, which says what they mean. `mode`: STORE or ADD."""
        return {
            "BN": self.cols, "CM": self.cluster, "SHARE_X": int(self.share_x), "PARTS": self.parts,
            "APART": int(self.apart), "STAGES": self.num_stages, "MODE": mode,
        }  # fmt: skip

    def fits(self, depth: int, num_cols: int) -> bool:
        """Whether there is such a launch for w [num_cols, depth]."""
        steps = depth // STEP_COLS
        return (
            depth % (STEP_COLS * self.parts) == 0
            and steps // self.parts >= _FEWEST_STEPS
            and num_cols % 8 == 0
            and self.cols // 8 % self.parts == 0
        )


# By rows and columns of w, and by the most rows of x: where the launch is faster than the library's product, as
# `kvarena benchmark layer_gemm` measures it (an H200, commit 8daa3f5).
MEASURED: dict[tuple[int, int], dict[int, DenseTile]] = {
    (6144, 4096): {192: DenseTile(cols=192, cluster=2, share_x=False, parts=2)},
    (4096, 4096): {96: DenseTile(cols=128, cluster=2, share_x=True, parts=4)},
    (4096, 14336): {
        96: DenseTile(cols=128, cluster=1, share_x=False, parts=4),
        128: DenseTile(cols=128, cluster=1, share_x=False, parts=4),
    },
    (4096, 1024): {
        96: DenseTile(cols=64, cluster=1, share_x=False, parts=1),
        128: DenseTile(cols=64, cluster=1, share_x=False, parts=1),
    },
}


def dense_tile(num_rows: int, num_cols: int, depth: int) -> DenseTile | None:
    """The launch for x [num_rows, depth] by w [num_cols, depth]; None where the library is as fast."""
    if num_rows < FEWEST_ROWS:
        return None
    tiles = MEASURED.get((num_cols, depth), {})
    return next((tiles.get(bucket) for bucket in ROW_BUCKETS if num_rows <= bucket), None)


def predicted_us(tile: DenseTile, num_rows: int, num_cols: int, depth: int, num_multiprocessors: int = 132) -> float:
    """Microseconds of a launch by the model above, on an H200."""
    programs = tile.clusters(num_rows, num_cols)[1] * tile.cluster
    steps = depth // STEP_COLS // tile.parts
    x_bytes, w_bytes = 2 * STEP_COLS * PROGRAM_ROWS, 2 * STEP_COLS * tile.cols
    busy = min(2, -(-num_rows // 64))  # warpgroups that multiply
    multiply = 2 * busy * tile.cols
    through_shared = (busy * 4 * (2048 + 32 * tile.cols) + x_bytes + w_bytes) / _SHARED_WIDTH
    shared = (x_bytes / tile.cluster, w_bytes) if tile.share_x else (x_bytes, w_bytes / tile.cluster)
    from_l2 = sum(shared) / _L2_WIDTH * min(1.0, programs / num_multiprocessors)
    cycles = max(multiply / _REACHED, through_shared, from_l2)
    rounds = -(-programs // num_multiprocessors)
    us = max(rounds * steps * cycles / _CYCLES, 2 * num_cols * depth / _MEMORY)
    if tile.parts > 1:
        given = 4 * PROGRAM_ROWS * tile.cols * programs * (tile.parts - 1) / tile.parts
        us += _MEETING_US + 2 * given / _L2
    return us + _AROUND_US


def dense_tiles(num_rows: int, num_cols: int, depth: int, held: int) -> list[DenseTile]:
    """Launches to choose from, the one that should be the fastest first.

    Args:
        num_rows, num_cols, depth: of the product.
        held: clusters of two that the device holds at a time.
    """
    if not FEWEST_ROWS <= num_rows <= MOST_ROWS:
        return []
    found = []
    for cluster, share_x in ((2, False), (2, True), (1, False)):
        for parts in (1, 2, 4, 8):
            for cols in _WIDTHS:
                tile = DenseTile(cols, cluster, share_x, parts)
                programs = tile.clusters(num_rows, num_cols)[1] * cluster
                # All parts of a tile must be there at once, and of those that are as fast the others are slower.
                at_once = programs <= 2 * held
                needless = cluster == 2 and not share_x and num_rows <= PROGRAM_ROWS
                if tile.fits(depth, num_cols) and (parts == 1 or at_once) and not needless:
                    found += [tile, tile._replace(apart=True)]
    return sorted(found, key=lambda tile: predicted_us(tile, num_rows, num_cols, depth, 2 * held))


class _Exchange(ctypes.Structure):
    """The kernel's struct of that name."""

    _fields_ = (("sums", ctypes.c_void_p), ("flags", ctypes.c_void_p))


class DenseGemm:
    """Launches the kernel. Owns what parts of K exchange: launches must be on one stream.

    Args:
        kernels: of the device where the operands live.
    """

    def __init__(self, kernels: HopperKernels) -> None:
        self._kernels = kernels
        self._compiled: dict[tuple[DenseTile, str], Kernel] = {}
        # Sums and flags; a captured graph writes to those of its time, so what is outgrown stays.
        self._rooms: list[tuple[Tensor, Tensor]] = []

    def __call__(
        self,
        x: Tensor,
        weight: Tensor,
        tile: DenseTile,
        *,
        residual: Tensor | None = None,
        out: Tensor | None = None,
        overlap: bool = True,
    ) -> Tensor:
        """x @ weight.T [+ residual].

        Args:
            x: [M, K] bf16, as all that follow, rows contiguous, a multiple of 16 bytes apart.
            weight: [N, K], contiguous.
            tile: from `dense_tile`.
            residual: [M, N], rows as far apart as those of `out`; may be `out` itself.
            out: [M, N], rows contiguous, a multiple of 16 bytes apart; written. Allocated if None.
            overlap: launch it while the kernel before it runs.

        Returns:
            `out`.
        """
        num_rows, depth = x.shape
        num_cols = len(weight)
        if out is None:
            out = x.new_empty(num_rows, num_cols)
        kernel = self._kernel(tile, "STORE" if residual is None else "ADD")
        col_tiles, clusters = tile.clusters(num_rows, num_cols)
        plan = (num_rows, num_cols, out.stride(0), depth // STEP_COLS // tile.parts, col_tiles)
        addresses = (out.data_ptr(), None if residual is None else residual.data_ptr())
        self._kernels.launch(
            kernel, clusters * tile.cluster, self._kernels.matrix_map(x, 64),
            self._kernels.matrix_map(weight, tile.cols // 2, keep=True), *map(ctypes.c_void_p, addresses),
            self._exchange(tile, clusters * tile.cluster), (ctypes.c_int * len(plan))(*plan), overlap=overlap,
        )  # fmt: skip
        return out

    def _exchange(self, tile: DenseTile, num_programs: int) -> _Exchange:
        """Where parts of so many programs in all meet."""
        if tile.parts == 1:
            return _Exchange(None, None)
        num_sums, num_flags = num_programs * PROGRAM_ROWS * tile.cols, num_programs * tile.parts
        if not self._rooms or num_sums > len(self._rooms[-1][0]) or num_flags > len(self._rooms[-1][1]):
            sums = torch.empty(max(num_sums, _FEWEST_SUMS), device=self._kernels.device)
            flags = torch.zeros(max(num_flags, _FEWEST_FLAGS), dtype=torch.int32, device=self._kernels.device)
            self._rooms.append((sums, flags))
        sums, flags = self._rooms[-1]
        return _Exchange(sums.data_ptr(), flags.data_ptr())

    def _kernel(self, tile: DenseTile, mode: str) -> Kernel:
        if (tile, mode) not in self._compiled:
            self._compiled[tile, mode] = self._kernels.compile(
                "wide_dense", tile.constants(mode), tile.cols, threads=_THREADS,
                shared_bytes=tile.num_stages * tile.stage_bytes + 1024, cluster=tile.cluster,
            )  # fmt: skip
        return self._compiled[tile, mode]
