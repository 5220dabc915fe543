"""Products of many rows of x with weights of 4 bits on Hopper, bound by arithmetic: for many rows.

    w [N, K]  in chunks of 64 rows x 128 columns (packed_stream.py)  | a program: 2 to 4 of them by 64 to 256 rows of x;
    x [M, K]  rows x 128 columns -> | -> |                           | two warpgroups multiply, a third one fetches

A code that is unpacked into shared memory is written once and read by each warpgroup, which is more than that memory
bears beside the rows of x. So the weights are the tall operand of the tensor cores' product, from registers: a
warpgroup unpacks the codes of its 64 rows of w, 64 columns at a time, while the tensor cores multiply those before, and
only x is read from shared memory. A weight is (code - zero) * scale, rounded once to 16 bits.

A launch fills the device by how it is cut:

    rows     x's rows in tiles of the least multiple of 32 that takes them in as few tiles
    even     each cluster has the same number of steps of all tiles, so it may begin in the middle of one and end in the
             middle of another; those that end in one tile exchange its sums through the L2 cache, a slice each
    parts    the parts of K of a cluster send each other the sums of their slices
    share    programs of a cluster with the same rows of x fetch a share of them each, for all

A tile of an odd number of blocks shares its last one between both warpgroups, each with half of the columns. Results
are turned in registers, since the product is w @ x.T.

Source: shares of steps that begin and end within tiles are stream-K (Osama et al., PPoPP 2023). The rest is ours.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from kvarena.engine.kernels.gemm.packed_stream import COLS, StreamWeight, chunk_bytes
from kvarena.engine.kernels.hopper import SHARED_BYTES, HopperKernels, Kernel, kernel_source

FEWEST_ROWS = 33
_THREADS = 384
_RESERVED_BYTES = 2048  # of the barriers, and of the alignment of the tiles
_FEWEST_STAGES = 3
_MOST_SUMS = 128 * 256  # of a program
_LEAST_TILE_ROWS = 64  # below it a warpgroup unpacks weights for longer than it multiplies
# Rows of x that programs read at the same time should stay in the L2 cache.
_ROW_GROUP_BYTES = 24 * 2**20
# Multiprocessors that may form a cluster of more than two come by sixteens, less what a chip lacks.
_NEIGHBOURS, _LACKING = 16, 8
# Where less of a round is filled, smaller tiles are faster, but for so many chunks along K.
_DEEP_CHUNKS, _FEW = 64, 0.6
# Where less of all rounds is filled, it is worth an exchange of sums to fill them.
_FULL = 0.75


class WideShape(NamedTuple):
    """Of a product: rows of x; blocks of the weight, chunks of a block, groups of a chunk; whether it is gated."""

    num_rows: int
    blocks: int
    chunks: int
    groups: int
    glu: bool


class PackedWideTile(NamedTuple):
    """Shape of a launch.

    Attributes:
        rows: of x per program, a multiple of 32.
        units: blocks of 64 rows of w that a warpgroup has sums for; `units * rows` is at most 256.
        blocks: of a program's tile: 2 * units, or one less, which takes two units.
        share: programs of a cluster that have the same rows of x; 1, 2 or 4.
        parts: of K; 1, 2 or 4. Together at most 8 programs in a cluster.
        even: clusters have equal shares of all tiles' steps; of two that share rows, without parts and shared blocks.
    """

    rows: int
    units: int
    blocks: int
    share: int = 1
    parts: int = 1
    even: bool = False

    @property
    def shared(self) -> bool:
        """Whether a tile's last block is both warpgroups'."""
        return self.blocks < 2 * self.units

    @property
    def swap_bytes(self) -> int:
        """Where the warpgroups exchange sums of a block that both have."""
        return 128 * self.rows if self.shared else 0

    @property
    def cluster(self) -> int:
        """Programs."""
        return self.share * self.parts

    def stage_bytes(self, groups: int) -> int:
        """Of one step's rows of x and chunks of `groups` groups."""
        num_bytes = 2 * COLS * self.rows + self.blocks * chunk_bytes(groups)
        return -(-num_bytes // 1024) * 1024

    def num_stages(self, groups: int) -> int:
        """Steps that are fetched ahead."""
        return (SHARED_BYTES - _RESERVED_BYTES - self.swap_bytes) // self.stage_bytes(groups)

    def fits(self, shape: WideShape) -> bool:
        """Whether the kernel can be compiled so."""
        turn = 4 if shape.glu else 2
        # Places of a warpgroup: 8 rows of x by its rows of w.
        places = self.blocks * self.rows // 16
        runs = {turn, 4} if self.shared else {turn}
        return (
            self.rows % 32 == 0
            and self.units * self.rows <= 256
            and self.blocks in (2 * self.units - 1, 2 * self.units)
            and not (self.shared and (self.units == 1 or self.rows % 64))
            and not (self.even and (self.shared or (self.parts, self.share) != (1, 2)))
            # The registers do not hold all of it.
            and not (shape.glu and self.parts > 2 and self.units * self.rows == 256)
            and self.rows // self.share % 8 == 0
            and shape.chunks % self.parts == 0
            and all(places % (self.parts * run) == 0 for run in runs)
            and self.num_stages(shape.groups) >= _FEWEST_STAGES
        )

    def col_tiles(self, num_blocks: int) -> int:
        """Tiles of a cluster for so many blocks of w."""
        return -(-num_blocks // (self.blocks * self.share))


def clusters_at_once(num_multiprocessors: int, cluster: int) -> int:
    """How many of `cluster` programs a device holds, at one program a multiprocessor."""
    if cluster > 2:
        num_multiprocessors = num_multiprocessors // _NEIGHBOURS * _NEIGHBOURS - _LACKING
    return num_multiprocessors // cluster


def packed_wide_tile(
    num_rows: int, weight: StreamWeight, num_multiprocessors: int, *, glu: bool = False
) -> PackedWideTile | None:
    """The launch for x of `num_rows` rows by `weight`, by measurements of Llama-3.1-8B's products (docs/gpu.md).

    Args:
        num_rows: of x.
        weight: what x is multiplied by.
        num_multiprocessors: of the device.
        glu: silu(gate) * up comes after.

    Returns:
        None for fewer than `FEWEST_ROWS` rows, and where no launch fits.
    """
    if num_rows < FEWEST_ROWS:
        return None
    blocks, chunks = weight.chunks.shape[:2]
    shape = WideShape(num_rows, blocks, chunks, weight.groups, glu)
    for tile in _tiles(shape, num_multiprocessors):
        tasks = tile.col_tiles(blocks) * -(-num_rows // tile.rows)
        held = clusters_at_once(num_multiprocessors, tile.cluster)
        # Parts of K exchange sums where the next tile's stages would be.
        if tile.fits(shape) and (tile.parts == 1 or tasks <= held):
            return tile
    return None


def _tiles(shape: WideShape, num_multiprocessors: int) -> Iterator[PackedWideTile]:
    """Launches to take, the best first; the last ones take anything."""
    rows, num_rows = fitting_rows(shape.num_rows), shape.num_rows
    many, deep = shape.blocks >= 2 * num_multiprocessors, shape.chunks >= _DEEP_CHUNKS
    if num_rows <= 128:
        yield PackedWideTile(rows, 2, 4, share=2) if many else PackedWideTile(rows, 1, 2, share=2, parts=2)
    else:
        usual = PackedWideTile(rows, 1, 2, share=2)
        tasks = usual.col_tiles(shape.blocks) * -(-num_rows // rows)
        filled = tasks / clusters_at_once(num_multiprocessors, 2)
        if num_rows <= 256 and filled < _FEW:
            if deep:
                yield usual._replace(even=True)
            yield PackedWideTile(fitting_rows(num_rows, 128), 1, 2, parts=2)
            yield PackedWideTile(128, 2, 3, parts=2)
        if filled < _FEW and not deep:
            yield PackedWideTile(128, 1, 2, share=2)
        if filled < _FULL * math.ceil(filled):
            yield usual._replace(even=True)
        yield usual
    for share in (2, 1):
        yield PackedWideTile(fitting_rows(num_rows, 128), 1, 2, share=share)


def fitting_rows(num_rows: int, most: int = 256) -> int:
    """Rows of x a tile, the fewest that take `num_rows` in as few tiles of at most `most` as there may be."""
    tiles = -(-num_rows // most)
    return max(_LEAST_TILE_ROWS, -(-num_rows // (tiles * 32)) * 32)


class PackedWideGemm:
    """Launches the kernel.

    Args:
        kernels: of the device where the operands live.
    """

    def __init__(self, kernels: HopperKernels) -> None:
        self._kernels = kernels
        self._compiled: dict[tuple[object, ...], Kernel] = {}
        # What programs of even launches exchange, and how many have: all launches are on one stream.
        programs = kernels.num_multiprocessors
        self._sums = torch.empty(programs, 2, _MOST_SUMS, dtype=torch.float32, device=kernels.device)
        self._counters = torch.zeros(programs, 2, dtype=torch.int32, device=kernels.device)

    def __call__(
        self,
        x: Tensor,
        weight: StreamWeight,
        tile: PackedWideTile,
        *,
        residual: Tensor | None = None,
        out: Tensor | None = None,
        glu: bool = False,
        overlap: bool = True,
    ) -> Tensor:
        """x @ weight.T [-> silu(gate) * up] [+ residual].

        Args:
            x: [M, K] bfloat16 or float16, as all that follow, rows contiguous, a multiple of 16 bytes apart.
            weight: on the same device.
            tile: from `packed_wide_tile`, or another one that fits.
            residual: [M, N], rows as far apart as those of `out`; may be `out` itself. Not with `glu`.
            out: [M, N], rows contiguous, a multiple of 16 bytes apart; written. Allocated if None.
            glu: the activation comes after: of a weight that is packed so. Without it the columns of such a weight's
                product take turns as its rows do.
            overlap: launch it while the kernel before it runs.

        Returns:
            `out`.
        """
        num_rows = len(x)
        num_cols = weight.shape[0] // 2 if glu else weight.shape[0]
        if out is None:
            out = x.new_empty(num_rows, num_cols)
        mode = "GLU" if glu else "STORE" if residual is None else "ADD"
        kernel = self._kernel(tile, weight.groups, mode, half=x.dtype == torch.float16)
        plan = plan_of(tile, num_rows, weight, num_cols, out.stride(0), kernel.clusters_at_once)
        addresses = (None if t is None else t.data_ptr() for t in (weight.chunks, out, residual))
        exchange = (ctypes.c_void_p * 2)(self._sums.data_ptr(), self._counters.data_ptr())
        self._kernels.launch(
            kernel, plan.clusters * tile.cluster, self._kernels.matrix_map(x, tile.rows // tile.share),
            *map(ctypes.c_void_p, addresses), exchange, (ctypes.c_int * len(plan.numbers))(*plan.numbers),
            overlap=overlap,
        )  # fmt: skip
        return out

    def prepare(self, launches: Iterable[tuple[PackedWideTile, int, str, bool]]) -> None:
        """Compile what these launches need, several kernels at a time: tile, and as of `constants_of`."""
        made = [(constants_of(tile, groups, mode, half=half), tile.rows) for tile, groups, mode, half in launches]
        self._kernels.prepare(
            kernel_source("wide_packed", constants, rows)
            for constants, rows in made
            if tuple(constants.values()) not in self._compiled
        )

    def _kernel(self, tile: PackedWideTile, groups: int, mode: str, *, half: bool) -> Kernel:
        constants = constants_of(tile, groups, mode, half=half)
        key = tuple(constants.values())
        if key not in self._compiled:
            shared_bytes = 1024 + tile.num_stages(groups) * tile.stage_bytes(groups) + tile.swap_bytes
            self._compiled[key] = self._kernels.compile(
                "wide_packed", constants, tile.rows, threads=_THREADS, shared_bytes=shared_bytes, cluster=tile.cluster
            )
        return self._compiled[key]


def constants_of(tile: PackedWideTile, groups: int, mode: str, *, half: bool = False) -> dict[str, object]:
    """What is put in front of the kernel's text. `mode`: STORE, ADD or GLU; `half`: of float16."""
    return {
        "BN": tile.rows, "UNITS": tile.units, "SHARED": int(tile.shared), "CW": tile.share, "CK": tile.parts,
        "EVEN": int(tile.even), "GROUPS": groups, "STAGES": tile.num_stages(groups), "MODE": mode, "PACKED": 1,
        "FLOAT16": int(half),
    }  # fmt: skip


class Plan(NamedTuple):
    """How a launch's tiles are shared out.

    Attributes:
        clusters: of the grid.
        numbers: the kernel's `Plan`.
    """

    clusters: int
    numbers: tuple[int, ...]


def plan_of(tile: PackedWideTile, num_rows: int, weight: StreamWeight, num_cols: int, stride: int, held: int) -> Plan:
    """The plan where the device holds `held` clusters at a time."""
    blocks, chunks = weight.chunks.shape[:2]
    row_tiles, col_tiles = -(-num_rows // tile.rows), tile.col_tiles(blocks)
    tasks = row_tiles * col_tiles
    row_group = min(row_tiles, max(1, _ROW_GROUP_BYTES // (2 * COLS * chunks * tile.rows)))
    steps = chunks // tile.parts
    if tile.even:
        clusters = min(held, tasks * steps)
    elif tile.parts > 1:  # these exchange sums where the next tile's stages would be
        clusters = tasks
    else:  # as many tiles for each as for the busiest
        clusters = -(-tasks // -(-tasks // held))
    share, more = divmod(tasks * steps, clusters)
    return Plan(clusters, (num_rows, num_cols, stride, steps, blocks, row_tiles, col_tiles, row_group, share, more))
