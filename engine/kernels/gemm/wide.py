"""silu(x @ gate.T) * (x @ up.T) for the rows of a large decode batch, or a prompt's, on Hopper, bound by arithmetic.

    w [2 * N, K]   | gate rows |  64 columns -> | -> |      a program: 112 rows of gate and the same of up for 128 rows
                   | up rows   |                            of x; two warpgroups multiply what one thread of a third
    x [M, K]       | 128 rows  |                            one fetches ahead

A library's tiles of 128 or 256 columns fill 132 multiprocessors one and a half times, which takes as long as twice.
Here the tile is what divides the columns into as many programs as there are multiprocessors: 28,672 rows of w are 128
tiles of 224, no power of two, so the kernel is CUDA C++. A gate's sum and its up value's lie in one thread's registers,
and the activation costs no pass of its own. With more than 128 rows of x the two programs of a cluster take the same
rows of w, and each fetches one half for both. More than 256 rows are items of 256, up to eight of which take a tile of
w one beside the other.
"""

from __future__ import annotations

import ctypes
from typing import NamedTuple

from torch import Tensor

from kvarena.engine.kernels.hopper import SHARED_BYTES, HopperKernels, Kernel

FEWEST_ROWS, MOST_ROWS = 65, 256
PROGRAM_ROWS, STEP_COLS, _THREADS = 128, 64, 384
# Fewer columns make tiles too narrow to be bound by arithmetic, more do not fit into the registers.
_WIDTHS = range(176, 257, 16)
# A tile is worth it where so much of all rounds' multiprocessors work, and K is long enough to hide a tile's end.
_LEAST_SHARE, _LEAST_DEPTH = 0.85, 2048
# Of the barriers, and of the alignment of the tiles.
_RESERVED_BYTES = 2048
# By rows and columns of w: from how many rows of x beyond MOST_ROWS on it is faster than the library's product and the
# pass behind it, as `kvarena benchmark layer_gemm` measures it.
MEASURED_FROM: dict[tuple[int, int], int] = {}


class WideTile(NamedTuple):
    """Shape of a launch.

    Attributes:
        cols: rows of w per program, half of them gate's.
        cluster: programs that share them, each with 128 rows of x.
    """

    cols: int
    cluster: int

    @property
    def stage_bytes(self) -> int:
        """Of one step's tiles of x and w."""
        return 2 * STEP_COLS * (PROGRAM_ROWS + self.cols)

    @property
    def num_stages(self) -> int:
        """Steps that are fetched ahead."""
        return (SHARED_BYTES - _RESERVED_BYTES) // self.stage_bytes

    def compile(
        self, kernels: HopperKernels, *, glu: bool = True, grouped: bool = False, share_x: bool = False
    ) -> Kernel:
        """The kernel of this shape; see `constants`."""
        constants = self.constants(glu=glu, grouped=grouped, share_x=share_x)
        return kernels.compile(
            "wide_gemm", constants, self.cols, threads=_THREADS,
            shared_bytes=self.num_stages * self.stage_bytes + 1024, cluster=self.cluster,
        )  # fmt: skip

    def constants(self, *, glu: bool = True, grouped: bool = False, share_x: bool = False) -> dict[str, int]:
        """Of wide_gemm.cu, which says what they mean."""
        kind = {"GLU": int(glu), "GROUPED": int(grouped), "SHARE_X": int(share_x)}
        return {"BN": self.cols, "CM": self.cluster, "STAGES": self.num_stages} | kind


def wide_tile(num_rows: int, num_cols: int, depth: int, num_multiprocessors: int) -> WideTile | None:
    """The launch for x [num_rows, depth] by w [num_cols, depth]; None where no tile fills the device well, and of more
    than `MOST_ROWS` rows where none was measured."""
    if num_rows > MOST_ROWS and num_rows < MEASURED_FROM.get((num_cols, depth), num_rows + 1):
        return None
    return best_wide_tile(num_rows, num_cols, depth, num_multiprocessors)


def best_wide_tile(num_rows: int, num_cols: int, depth: int, num_multiprocessors: int) -> WideTile | None:
    """The same of any number of rows, whatever was measured."""
    if num_rows < FEWEST_ROWS or depth < _LEAST_DEPTH or depth % STEP_COLS or num_cols % 16:
        return None
    cluster = min(2, -(-num_rows // PROGRAM_ROWS))
    clusters = num_multiprocessors // cluster
    items = -(-num_rows // (PROGRAM_ROWS * cluster))

    def rounds(cols: int) -> int:
        return -(-(-(-num_cols // cols) * items) // clusters)

    cols = min(_WIDTHS, key=lambda cols: (rounds(cols) * cols, -cols))
    share = num_cols * items / (rounds(cols) * cols * clusters)
    return WideTile(cols, cluster) if share >= _LEAST_SHARE else None


class WideGemm:
    """Launches the kernel.

    Args:
        kernels: of the device where the operands live.
    """

    def __init__(self, kernels: HopperKernels) -> None:
        self._kernels = kernels
        self._compiled: dict[WideTile, Kernel] = {}

    def __call__(self, x: Tensor, weight: Tensor, tile: WideTile, *, overlap: bool = True) -> Tensor:
        """silu(x @ gate.T) * (x @ up.T).

        Args:
            x: [M, K] bf16, rows contiguous.
            weight: [2 * N, K] bf16, contiguous, gate's rows first.
            tile: from `wide_tile`.
            overlap: launch it while the kernel before it runs.

        Returns:
            [M, N] bf16.
        """
        num_rows, depth = x.shape
        num_cols = len(weight) // 2
        out = x.new_empty(num_rows, num_cols)
        kernel = self._kernel(tile)
        num_tiles = -(-len(weight) // tile.cols)
        tiles = num_tiles * -(-num_rows // (PROGRAM_ROWS * tile.cluster))
        # As many tiles for each cluster as for the busiest.
        clusters = -(-tiles // -(-tiles // kernel.clusters_at_once))
        self._kernels.launch(
            kernel, clusters * tile.cluster, self._kernels.matrix_map(x, 64),
            self._kernels.matrix_map(weight, tile.cols // 2, keep=True),
            *map(ctypes.c_void_p, (out.data_ptr(), None, None, None)),
            *map(ctypes.c_int, (0, num_rows, num_cols, out.stride(0), num_tiles, depth // STEP_COLS)), overlap=overlap,
        )  # fmt: skip
        return out

    def _kernel(self, tile: WideTile) -> Kernel:
        if tile not in self._compiled:
            self._compiled[tile] = tile.compile(self._kernels)
        return self._compiled[tile]
