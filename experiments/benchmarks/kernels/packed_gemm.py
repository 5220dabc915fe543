"""Times products with packed weights on a GPU: each kernel's, beside 16 bits and the copy's bandwidth.

    kvarena benchmark packed_gemm [--shape llama-3.1-8b] [--rows 1 --rows 256] [--group-size 128] [--tune]

Every product of a decode forward but the output head's, in 4 bits with zero points, with what is around it in a layer
(norm before, silu(gate) * up or residual after), over enough copies of the weights that the L2 cache holds none: by the
stream and the wide kernel for Hopper, the Triton kernel, humming-kernels where it is installed, and in 16 bits as the
engine does it and by the library. Each is compared with float64 first. One JSON line per product and kernel:
microseconds, the packed bytes a second as a share of the copy's, how much faster than the engine's 16 bits, and whether
the engine takes it. With --tune also other launches of the stream and the wide kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from kvarena.engine.errors import EngineError
from kvarena.engine.fusions.ops import Linear, Norm
from kvarena.engine.fusions.triton_ops import TritonOps
from kvarena.engine.kernels.activation import gated
from kvarena.engine.kernels.gemm.packed_stream import (
    MOST_ROWS,
    PackedStreamLaunch,
    PackedStreamTile,
    StreamWeight,
    pack_stream,
    packed_stream_tile,
)
from kvarena.engine.kernels.gemm.packed_wide import (
    FEWEST_ROWS,
    PackedWideTile,
    WideShape,
    clusters_at_once,
    fitting_rows,
    packed_wide_tile,
)
from kvarena.engine.kernels.gemm.table import GemmTable
from kvarena.engine.kernels.norm import rms_norm
from kvarena.engine.quantization.hopper import HopperDevice, hopper_device, hopper_tile
from kvarena.engine.quantization.humming import humming_product
from kvarena.engine.quantization.products import Product, TritonProduct
from kvarena.engine.quantization.weight import PackedWeight, pack_codes, unpack_codes
from kvarena.experiments.benchmarks.kernels.gemm import EPS, RING_BYTES, Case, cases
from kvarena.experiments.gpu.floors import SHAPES, shape_of
from kvarena.experiments.gpu.timing import copy_bandwidth, matmul_flops, require_cuda, time_launches
from kvarena.experiments.tools import say_all, tool_parser

Line = dict[str, Any]
Tile = PackedStreamTile | PackedWideTile
ROWS = (1, 8, 64, 128, 192, 256, 2048)
KERNELS = ("engine", "library", "stream", "wide", "triton", "humming")


def random_packed(num_outputs: int, num_inputs: int, group_size: int, device: torch.device) -> PackedWeight:
    """A weight of 4 bits with zero points whose values have a standard deviation of about 1 / sqrt(inputs)."""
    shape = num_inputs // group_size, num_outputs
    codes = torch.randint(0, 16, (num_outputs, num_inputs), dtype=torch.uint8, device=device)
    scales = (torch.rand(shape, device=device) + 0.5).mul_(0.2 * num_inputs**-0.5).half()
    zeros = torch.randint(6, 10, shape, dtype=torch.uint8, device=device)
    return PackedWeight(pack_codes(codes), scales, zeros, None, group_size)


def stream_tiles(case: Case, weight: StreamWeight, num_multiprocessors: int, *, tune: bool) -> list[PackedStreamTile]:
    """Launches of the stream kernel, the one that it chooses by itself first; none for many rows."""
    num_rows, depth, chunks = case.product.num_rows, weight.shape[1], weight.chunks.shape[1]
    own = packed_stream_tile(num_rows, weight, num_multiprocessors, norm=case.has_norm)
    tiles = [] if own is None else [own]
    row_tiles = -(-num_rows // 64)
    for blocks, parts, per_sm in product((1, 2, 4), (1, 2, 4, 8), (1, 2, 3)) if tune else ():
        tile = PackedStreamTile(blocks, parts, per_sm, case.has_norm and num_rows <= 32)
        programs = -(-len(weight.chunks) // blocks) * row_tiles * parts
        fits = num_rows <= MOST_ROWS and chunks % parts == 0 and (blocks == 1 or num_rows <= 16)
        there = programs <= num_multiprocessors * per_sm if parts > 1 else programs >= num_multiprocessors // 2
        if fits and there and tile.num_stages(num_rows, depth, weight.groups) >= min(3, chunks // parts):
            tiles.append(tile)
    return list(dict.fromkeys(tiles))


def wide_tiles(case: Case, weight: StreamWeight, num_multiprocessors: int, *, tune: bool) -> list[PackedWideTile]:
    """Launches of the wide kernel, the one that it chooses by itself first; none for few rows."""
    num_rows, glu = case.product.num_rows, case.product.glu
    if num_rows < FEWEST_ROWS:
        return []
    blocks, chunks = weight.chunks.shape[:2]
    shape = WideShape(num_rows, blocks, chunks, weight.groups, glu)
    own = packed_wide_tile(num_rows, weight, num_multiprocessors, glu=glu)
    tiles = [] if own is None else [own]
    ways = product((1, 2), ((1, False), (2, False), (1, True))) if tune else ()
    for share, (parts, even) in ways:
        for rows in {fitting_rows(num_rows), fitting_rows(num_rows, 128)}:
            for units, cut in [(2, 4), (2, 3), (1, 2)] if rows <= 128 else [(1, 2)]:
                tile = PackedWideTile(rows, units, cut, share, parts, even)
                tasks = tile.col_tiles(blocks) * -(-num_rows // rows)
                held = clusters_at_once(num_multiprocessors, tile.cluster)
                # Parts meet at once; what leaves two thirds of the device idle is slow.
                if tile.fits(shape) and (even or 3 * tasks >= held) and (parts == 1 or tasks <= held):
                    tiles.append(tile)
    return list(dict.fromkeys(tiles))


class Bench:
    """Operands of one case, and its launches.

    Args:
        case: a product and what is around it.
        group_size: inputs of a group.
        device: a GPU.
    """

    def __init__(self, case: Case, group_size: int, device: torch.device) -> None:
        num_rows, num_cols, depth, glu = case.product
        self.case = case
        count = max(2, min(16, 2 * RING_BYTES // (num_cols * depth)))
        self.packed = [random_packed(num_cols, depth, group_size, device) for _ in range(count)]
        self.x, self.residual = (
            torch.randn(num_rows, width, device=device, dtype=torch.bfloat16) for width in (depth, num_cols)
        )
        self.stream = self.residual.clone()  # grows with each product that is added in place
        self.norm = torch.rand(depth, device=device).add_(0.5).bfloat16()
        self.out = torch.empty(num_rows, num_cols // 2 if glu else num_cols, device=device, dtype=torch.bfloat16)
        self.exact = self._exact(self.packed[0])

    def _exact(self, weight: PackedWeight) -> Tensor:
        x = self.x.double()
        if self.case.has_norm:
            x = F.rms_norm(x, x.shape[1:], self.norm.double(), EPS)
        y = x @ weight.dequantize(torch.float64).t()
        if self.case.product.glu:
            gate, up = y.chunk(2, dim=1)
            return F.silu(gate) * up
        return y if self.case.has_norm else y + self.residual.double()

    def around(self, multiply: Callable[[Tensor], Tensor]) -> Tensor:
        """A bare product with the kernels around it."""
        y = multiply(rms_norm(self.x, self.norm, EPS) if self.case.has_norm else self.x)
        if self.case.product.glu:
            return gated(y)
        return y if self.case.has_norm else y.add_(self.residual)

    def engine(self, ops: TritonOps, weight: Tensor) -> Tensor:
        """In 16 bits, as the fused layers do it."""
        if self.case.product.glu:
            return ops.norm_glu(self.x, Norm(self.norm, EPS), Linear(weight, None))
        if self.case.has_norm:
            return ops.norm_linear(self.x, Norm(self.norm, EPS), Linear(weight, None))
        return ops.linear_residual(self.x, Linear(weight, None), self.stream)

    def hopper(self, device: HopperDevice, tile: Tile, weight: StreamWeight) -> Tensor:
        """By one of the kernels for Hopper."""
        glu, residual = self.case.product.glu, None if self.case.has_norm else self.residual
        if isinstance(tile, PackedStreamTile) and tile.fuse_norm:
            norm = {"norm": self.norm, "eps": EPS}
            return device.stream(self.x, weight, tile, residual=residual, out=self.out, glu=glu, **norm)  # type: ignore[arg-type]
        x = rms_norm(self.x, self.norm, EPS) if self.case.has_norm else self.x
        gemm: Any = device.stream if isinstance(tile, PackedStreamTile) else device.wide
        return gemm(x, weight, tile, residual=residual, out=self.out, glu=glu)

    def ways(
        self, kernels: Sequence[str], *, tune: bool
    ) -> Iterator[tuple[Line, Callable[[], list[Callable[[], Tensor]]]]]:
        """Each kernel's line, and what makes its launches, one for each weight."""
        device = self.x.device
        plain = (weight.dequantize(torch.bfloat16) for weight in self.packed[: max(2, len(self.packed) // 4)])
        if {"engine", "library"} & {*kernels}:
            matrices = list(plain)
            ops = TritonOps(device, GemmTable(), upcast=device.type == "cpu")
            if "engine" in kernels:
                yield {"kernel": "engine, 16 bits"}, lambda: [partial(self.engine, ops, w) for w in matrices]
            if "library" in kernels:
                library = [partial(F.linear, weight=w) for w in matrices]
                yield {"kernel": "library, 16 bits"}, lambda: [partial(self.around, multiply) for multiply in library]
        hopper = hopper_device(device)
        if hopper is not None and {"stream", "wide"} & {*kernels}:
            yield from self._hopper_ways(hopper, kernels, tune=tune)
        if "triton" in kernels:
            yield {"kernel": "triton"}, lambda: [self._call(TritonProduct(weight)) for weight in self.packed]
        if "humming" in kernels:
            yield {"kernel": "humming"}, lambda: [self._call(_humming(weight)) for weight in self.packed]

    def _call(self, packed: Product) -> Callable[[], Tensor]:
        return partial(self.around, lambda x: packed(x, None, None, None))

    def _hopper_ways(
        self, device: HopperDevice, kernels: Sequence[str], *, tune: bool
    ) -> Iterator[tuple[Line, Callable[[], list[Callable[[], Tensor]]]]]:
        glu, count = self.case.product.glu, device.num_multiprocessors
        weights = [pack_stream(unpack_codes(w.codes), w.scales, w.zeros, w.group_size, glu=glu) for w in self.packed]
        taken = hopper_tile(len(self.x), weights[0], count, norm=self.case.has_norm, glu=glu)
        streams = stream_tiles(self.case, weights[0], count, tune=tune) if "stream" in kernels else []
        wides = wide_tiles(self.case, weights[0], count, tune=tune) if "wide" in kernels else []
        # Compiling them one by one would be most of the time.
        mode = "GLU" if glu else "STORE" if self.case.has_norm else "ADD"
        groups, depth = weights[0].groups, weights[0].shape[1]
        device.stream.prepare(PackedStreamLaunch(tile, len(self.x), depth, groups, mode) for tile in streams)
        device.wide.prepare((tile, groups, mode, False) for tile in wides)
        tiles: list[Tile] = [*streams, *wides]
        for tile in tiles:
            name = "stream" if isinstance(tile, PackedStreamTile) else "wide"
            line = {"kernel": name, "tile": tile._asdict(), "taken": tile == taken}
            yield line, lambda tile=tile: [partial(self.hopper, device, tile, w) for w in weights]  # type: ignore[misc]


def _humming(weight: PackedWeight) -> Product:
    made, reason = humming_product(weight, torch.bfloat16, TritonProduct(weight))
    if made is None:
        raise EngineError(reason or "not installed")
    return made


def measure(bench: Bench, kernels: Sequence[str], copy: float, *, tune: bool) -> Iterator[Line]:
    """The lines of one case; `copy`: bytes a second."""
    num_rows, num_cols, depth, _ = bench.case.product
    common = {"section": "packed", "name": bench.case.name, "rows": num_rows, "cols": num_cols, "depth": depth}
    base = None
    for line, make in bench.ways(kernels, tune=tune):
        try:
            calls = make()
            error = float((calls[0]().double() - bench.exact).norm() / bench.exact.norm())
            us = time_launches(calls, min_launches=20 if num_rows <= 512 else 6)
        # Anything: a launch that the device refuses, or a library that is not there, is a line of its own.
        except Exception as failed:
            key = "refused" if line["kernel"] == "humming" or tune else "failed"
            yield common | line | {key: str(failed).partition("\n")[0][:200] or type(failed).__name__}
            continue
        if base is None and line["kernel"] == "engine, 16 bits":
            base = us
        share = bench.packed[0].num_bytes / us * 1e6 / copy
        rates = {"us": round(us, 2), "tflops": round(2 * num_rows * num_cols * depth / us / 1e6, 1)}
        if "16 bits" not in line["kernel"]:
            rates["copy_share"] = round(share, 3)
        if base is not None:
            rates["speedup"] = round(base / us, 3)
        yield common | line | rates | {"error": float(f"{error:.2e}")}


def lines(args: Any) -> Iterator[Line]:
    """All lines."""
    device, copy = require_cuda(), copy_bandwidth()
    kernels = args.kernel or KERNELS
    yield {"section": "ceiling", "copy_tbps": round(copy / 1e12, 3), "matmul_tflops": round(matmul_flops() / 1e12, 1)}
    for num_rows in args.rows or ROWS:
        for case in cases(shape_of(args.shape), num_rows):
            if case.name != "head" and case.name in (args.product or (case.name,)):
                yield from measure(Bench(case, args.group_size, device), kernels, copy, tune=args.tune)


def main(argv: Sequence[str]) -> int:
    """The command line."""
    parser = tool_parser(__name__, __doc__)
    parser.add_argument("--shape", choices=SHAPES, default=SHAPES[0], help="of the model")
    parser.add_argument("--rows", type=int, action="append", help=f"default: {', '.join(map(str, ROWS))}")
    parser.add_argument("--product", action="append", choices=("gate_up", "down", "qkv", "o"), help="default: all")
    parser.add_argument("--kernel", action="append", choices=KERNELS, help="default: all")
    parser.add_argument("--group-size", type=int, default=128, choices=(32, 64, 128), help="inputs that share a scale")
    parser.add_argument("--tune", action="store_true", help="measure other launches of the Hopper kernels too")
    parser.add_argument("--out", type=Path, help="append the lines to this file")
    args = parser.parse_args(argv)
    if args.rows and min(args.rows) < 1:
        parser.error(f"--rows {min(args.rows)} must be at least 1")
    with torch.inference_mode():
        return say_all(lines(args), args.out, failed="failed")
