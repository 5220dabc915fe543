"""Products with weights of 4 bits on Hopper: the stream GEMM (stream.py) whose weights are unpacked on their way.

    w [N, K]  -> chunks of 64 rows x 128 columns, one after another along K:  | 4 KiB of codes | scales and zeros |

A chunk is what one step of a program takes, in one fetch. Its codes lie as the threads of the tensor cores' product
want them: each thread's 16 bytes are its 32 values of 64 columns. They become values of 16 bits in registers, exactly:
code minus zero point. Each group's sum is multiplied by its scale in float32, so no weight is rounded. The rows of a
gate and of its up value take turns of 8, so that a thread holds both.

Source: the order of codes in a word follows Marlin (Frantar et al., 2024): two codes become two values by one
instruction. The rest is ours.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kvarena.engine.kernels.gemm.stream import row_bucket
from kvarena.engine.kernels.hopper import SHARED_BYTES, HopperKernels, Kernel, kernel_source

ROWS, COLS = 64, 128  # of a chunk
MOST_ROWS = 256
_CODE_WORDS = ROWS * COLS // 8
_THREADS, _BOX_COLS, _BOXES = 160, 64, 2
_RESERVED_BYTES = 4096
_MOST_NORM_ROWS = 32
_FEWEST_STAGES = 3
_ZERO_BITS = 15  # of a scale's float32, which hold its zero point instead
_MIDDLE = 8


class PackedStreamTile(NamedTuple):
    """Shape of a launch.

    Attributes:
        blocks: 64 rows of w each per program.
        parts: of K; programs of a cluster.
        per_sm: programs that a multiprocessor is to hold at a time.
        fuse_norm: where a norm comes before, take it into the launch.
    """

    blocks: int
    parts: int
    per_sm: int
    fuse_norm: bool = False

    def stage_bytes(self, num_rows: int, groups: int) -> int:
        """Of one step's rows of x and chunks of `groups` groups."""
        num_bytes = 2 * COLS * row_bucket(num_rows) + self.blocks * chunk_bytes(groups)
        return -(-num_bytes // 1024) * 1024

    def rest_bytes(self, num_rows: int, depth: int) -> int:
        """Of the other parts' sums and the norm's weights."""
        sums = 4 * (self.parts - 1) * ROWS * self.blocks * row_bucket(num_rows)
        return sums + (2 * depth // self.parts if self.fuse_norm else 0)

    def num_stages(self, num_rows: int, depth: int, groups: int) -> int:
        """Steps that are fetched ahead."""
        room = SHARED_BYTES // self.per_sm - _RESERVED_BYTES - self.rest_bytes(num_rows, depth)
        return min(room // self.stage_bytes(num_rows, groups), depth // (COLS * self.parts))


def chunk_bytes(groups: int) -> int:
    """Of a chunk whose columns are in so many groups."""
    return 4 * (_CODE_WORDS + ROWS * groups)


class StreamWeight(NamedTuple):
    """A weight of 4 bits in the kernel's layout.

    Attributes:
        chunks: int32 [N / 64 rounded up, K / 128, words of a chunk].
        shape: N, K.
        groups: in a chunk: 1, 2 or 4.
        glu: the rows are a gate's and its up value's, turn by turn.
    """

    chunks: Tensor
    shape: tuple[int, int]
    groups: int
    glu: bool

    @property
    def num_bytes(self) -> int:
        """Memory that it takes."""
        return self.chunks.numel() * 4


def takes(num_outputs: int, num_inputs: int, group_size: int, num_groups: int, *, glu: bool) -> bool:
    """Whether a weight fits into whole chunks."""
    fits = group_size in (32, 64) or group_size % COLS == 0 or num_groups == 1
    return fits and num_inputs % COLS == 0 and num_outputs % (2 * ROWS if glu else 8) == 0


def pack_stream(codes: Tensor, scales: Tensor, zeros: Tensor | None, group_size: int, *, glu: bool) -> StreamWeight:
    """A weight in the kernel's layout.

    Args:
        codes: uint8 [N, K], of 4 bits. `takes` says which sizes.
        scales: float [G, N]. Kept to 20 bits of a float32, which holds 16-bit ones exactly.
        zeros: uint8 [G, N]; None: 8 everywhere.
        group_size: inputs of a group.
        glu: the first half of the rows is gate's.
    """
    num_outputs, num_inputs = codes.shape
    pairs = scales.float().t().contiguous().view(torch.int32) & ~_ZERO_BITS  # [N, G]
    pairs |= _MIDDLE if zeros is None else zeros.t().to(torch.int32)
    if glu:
        # 8 rows of gate's, their 8 of up's, the next 8 of gate's, ...
        order = torch.arange(num_outputs, device=codes.device).view(2, -1, 8).transpose(0, 1).flatten()
        codes, pairs = codes[order], pairs[order]
    missing = -num_outputs % ROWS
    if missing:
        codes = torch.cat((codes, codes.new_full((missing, num_inputs), _MIDDLE)))
        pairs = torch.cat((pairs, pairs.new_full((missing, pairs.shape[1]), _MIDDLE)))
    groups = max(1, COLS // group_size) if len(scales) > 1 else 1
    # The group of each chunk's columns: large groups span several chunks.
    starts = torch.arange(num_inputs // COLS * groups, device=codes.device) * (COLS // groups)
    spread = pairs[:, starts // group_size if len(scales) > 1 else starts * 0]
    # Rows (block, warp, half of 8, row) and columns (chunk, box, step of 16, half of 8, pair, which of it).
    cut = codes.view(-1, 4, 2, 8, num_inputs // COLS, 2, 4, 2, 4, 2)
    # A thread is (warp, row, pair); its words are steps; in a word the lowest bits are (half of rows), then of columns.
    order8 = cut.permute(0, 4, 5, 1, 3, 8, 6, 9, 7, 2).flatten(-3)
    both = order8[..., 0::2] | (order8[..., 1::2] << 4)
    words = both.contiguous().view(torch.int32).view(len(codes) // ROWS, num_inputs // COLS, _CODE_WORDS)
    tail = spread.view(-1, ROWS, num_inputs // COLS, groups).permute(0, 2, 3, 1).flatten(2)
    return StreamWeight(torch.cat((words, tail), dim=2), (num_outputs, num_inputs), groups, glu)


def packed_stream_tile(
    num_rows: int, weight: StreamWeight, num_multiprocessors: int, *, norm: bool = False
) -> PackedStreamTile | None:
    """The launch for x of `num_rows` rows by `weight`; None where no launch fits.

    Args:
        num_rows: of x.
        weight: what x is multiplied by.
        num_multiprocessors: of the device. All programs must be there at once where K is cut into parts.
        norm: an RMS norm comes before.
    """
    if not 1 <= num_rows <= MOST_ROWS:
        return None
    columns, chunks = weight.chunks.shape[:2]
    row_tiles = -(-num_rows // ROWS)
    many = columns * row_tiles >= 2 * num_multiprocessors
    if num_rows <= 8 or (num_rows <= 16 and (norm or many)):
        # Blocks share what x costs, and a program's steps are short.
        blocks, programs, wanted = 4 if many else 2, 2, 2 if norm else 3
    else:
        blocks, programs = 1, 3 if num_rows <= 16 else 2 if num_rows <= 32 or many else 1
        wanted = programs
    fuse_norm = norm and num_rows <= _MOST_NORM_ROWS
    for per_sm in range(wanted, 0, -1):
        for parts in (8, 4, 2, 1):
            tile = PackedStreamTile(blocks, parts, per_sm, fuse_norm)
            count = -(-columns // blocks) * row_tiles * parts
            # Clusters must all be there at once, and a program's steps be worth its start.
            if parts > 1 and (count > min(programs, per_sm) * num_multiprocessors or chunks % (2 * parts)):
                continue
            if tile.num_stages(num_rows, weight.shape[1], weight.groups) >= min(_FEWEST_STAGES, chunks // parts):
                return tile
    return None


class PackedStreamLaunch(NamedTuple):
    """What a kernel is compiled for.

    Attributes:
        tile: shape of the launch.
        num_rows, depth: of x.
        groups: of a chunk of the weight.
        mode: STORE, ADD or GLU.
        half: of float16, else of bfloat16.
    """

    tile: PackedStreamTile
    num_rows: int
    depth: int
    groups: int
    mode: str
    half: bool = False

    @property
    def num_stages(self) -> int:
        """See `PackedStreamTile.num_stages`."""
        return self.tile.num_stages(self.num_rows, self.depth, self.groups)

    @property
    def shared_bytes(self) -> int:
        """Of a program."""
        rows, tile = row_bucket(self.num_rows), self.tile
        return 1024 + self.num_stages * tile.stage_bytes(rows, self.groups) + tile.rest_bytes(rows, self.depth)

    @property
    def key(self) -> tuple[object, ...]:
        """Of its kernel."""
        return (*self.constants().values(), self.shared_bytes)

    def constants(self) -> dict[str, Any]:
        """What is put in front of stream_gemm.cu."""
        tile = self.tile
        return {
            "BX": row_bucket(self.num_rows), "RB": tile.blocks, "KS": _BOXES, "CK": tile.parts,
            "STAGES": self.num_stages, "MODE": self.mode, "NORM": int(tile.fuse_norm), "PACKED": 1,
            "GROUPS": self.groups, "PER_SM": tile.per_sm, "FLOAT16": int(self.half),
        }  # fmt: skip


class PackedStreamGemm:
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
        weight: StreamWeight,
        tile: PackedStreamTile,
        *,
        norm: Tensor | None = None,
        eps: float = 0.0,
        residual: Tensor | None = None,
        out: Tensor | None = None,
        glu: bool = False,
        overlap: bool = True,
    ) -> Tensor:
        """[norm ->] x @ weight.T [-> silu(gate) * up] [+ residual].

        Args:
            x: [M, K] bfloat16 or float16, as all that follow, rows contiguous, 1 <= M <= MOST_ROWS.
            weight: on the same device.
            tile: from `packed_stream_tile`.
            norm: [K], weight of an RMS norm of x with `eps`; `tile.fuse_norm` says whether it may be given.
            residual: [M, N], rows as far apart as those of `out`; may be `out` itself. Not with `glu`.
            out: [M, N], rows contiguous; written. Allocated if None.
            glu: the activation comes after: of a weight that is packed so. Without it the columns of such a weight's
                product take turns as its rows do.
            overlap: launch it while the kernel before it runs.

        Returns:
            `out`.
        """
        num_rows, depth = x.shape
        num_cols = weight.shape[0] // 2 if glu else weight.shape[0]
        if out is None:
            out = x.new_empty(num_rows, num_cols)
        mode = "GLU" if glu else "STORE" if residual is None else "ADD"
        kernel = self._kernel(
            PackedStreamLaunch(tile, num_rows, depth, weight.groups, mode, half=x.dtype == torch.float16)
        )
        addresses = (None if t is None else t.data_ptr() for t in (weight.chunks, out, residual, norm))
        blocks, chunks = weight.chunks.shape[:2]
        row_tiles = -(-num_rows // row_bucket(num_rows))
        self._kernels.launch(
            kernel, -(-blocks // tile.blocks) * row_tiles * tile.parts,
            self._kernels.matrix_map(x, row_bucket(num_rows)), *map(ctypes.c_void_p, addresses),
            *map(ctypes.c_int, (num_rows, num_cols, out.stride(0), chunks // tile.parts, row_tiles)),
            ctypes.c_float(eps), overlap=overlap,
        )  # fmt: skip
        return out

    def prepare(self, launches: Iterable[PackedStreamLaunch]) -> None:
        """Compile what these launches need, several kernels at a time."""
        made = [launch.constants() for launch in launches if launch.key not in self._compiled]
        self._kernels.prepare(kernel_source("stream_gemm", one, one["BX"]) for one in made)

    def _kernel(self, launch: PackedStreamLaunch) -> Kernel:
        if launch.key not in self._compiled:
            constants = launch.constants()
            self._compiled[launch.key] = self._kernels.compile(
                "stream_gemm", constants, constants["BX"], threads=_THREADS, shared_bytes=launch.shared_bytes,
                cluster=launch.tile.parts,
            )  # fmt: skip
        return self._compiled[launch.key]
