"""The CUDA kernels for Hopper beside those they replace, for `engine/kernels/gemm/stream.py` and `wide_gemm.py`.

    kvarena benchmark hopper [--rows 1,16,32,64] [--product 6144,4096 ...] [--search]

A product is rows of w, columns of w, and what is around it: `norm` before it, a `residual` added, or `glu`, a norm
before and silu(gate) * up after. One JSON line per product and number of rows of x: microseconds of the operation as
the engine does it without these kernels and with them, over enough copies of the weights that the L2 cache holds none,
and the weights' bytes over the time. `--search` also times every stream launch that fits and names the best five.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kvarena.engine.fusions.ops import Linear, Norm
from kvarena.engine.fusions.triton_ops import TritonOps
from kvarena.engine.kernels.gemm.stream import MOST_ROWS, StreamGemm, StreamTile, row_bucket
from kvarena.engine.kernels.gemm.table import GemmTable
from kvarena.engine.kernels.hopper import HopperKernels
from kvarena.experiments.benchmarks.kernels.gemm import RING_BYTES
from kvarena.experiments.gpu.timing import require_cuda, time_launches
from kvarena.experiments.tools import tool_parser

# Llama-3.1-8B's layer, Qwen3-0.6B's, and the gated products of Qwen2.5-7B, Qwen3-8B and Qwen3-4B.
PRODUCTS = (
    "6144,4096,norm", "4096,4096,residual", "28672,4096,glu", "4096,14336,residual",
    "4096,1024,norm", "1024,2048,residual", "6144,1024,glu", "1024,3072,residual",
    "37888,3584,glu", "24576,4096,glu", "19456,2560,glu",
)  # fmt: skip
ROWS = (1, 8, 16, 32, 64, 96, 128, 192, 256)


class Product:
    """One product, with the operations that can do it."""

    def __init__(self, num_rows: int, text: str) -> None:
        cols, depth, self.kind = text.split(",")
        self.num_rows, self.num_cols, self.depth = num_rows, int(cols), int(depth)
        processors = torch.cuda.get_device_properties(0).multi_processor_count
        self.without = TritonOps("cuda", GemmTable(128, processors), hopper=False)
        self.ops = TritonOps("cuda", GemmTable(128, processors))
        copies = max(2, min(48, RING_BYTES // (2 * self.num_cols * self.depth)))
        weights = torch.randn(copies, self.num_cols, self.depth, device="cuda", dtype=torch.bfloat16)
        self.weights = weights.div_(self.depth**0.5).unbind()
        self.x = torch.randn(num_rows, self.depth, device="cuda", dtype=torch.bfloat16)
        self.norm = Norm(torch.rand(self.depth, device="cuda", dtype=torch.bfloat16) + 0.5, 1e-5)
        self.y = torch.zeros(num_rows, self.num_cols, device="cuda", dtype=torch.bfloat16)

    def us(self, ops: TritonOps) -> float:
        """Microseconds of the operation."""
        return time_launches([partial(self._run, ops, Linear(weight, None)) for weight in self.weights], 7, 48)

    def _run(self, ops: TritonOps, linear: Linear) -> None:
        if self.kind == "residual":
            ops.linear_residual(self.x, linear, self.y)
        elif self.kind == "glu":
            ops.norm_glu(self.x, self.norm, linear)
        else:
            ops.norm_linear(self.x, self.norm, linear, self.y)

    def search(self, gemm: StreamGemm, processors: int) -> list[tuple[float, StreamTile]]:
        """Every stream launch of one round and its microseconds, best first."""
        found = []
        glu, normed = self.kind == "glu", self.kind != "residual"
        for tile in map(StreamTile._make, itertools.product((1, 2), (1, 2), (1, 2, 4), (1, 2), (False, True))):
            cols = 128 if glu else 64 * tile.blocks
            row_tiles = -(-self.num_rows // row_bucket(self.num_rows))
            programs = -(-self.num_cols // cols) * row_tiles * tile.parts
            part_cols = 64 * tile.boxes * tile.parts
            few = self.num_rows <= row_bucket(self.num_rows)
            if (glu and tile.blocks == 1) or (tile.fuse_norm and not (normed and few)) or self.depth % part_cols:
                continue
            stages = tile.num_stages(row_bucket(self.num_rows), self.depth)
            if programs > processors * tile.per_sm or stages < min(3, self.depth // part_cols):
                continue
            run = partial(self._stream, gemm, tile, norm_before=normed and not tile.fuse_norm)
            found.append((round(time_launches([partial(run, w) for w in self.weights], 7, 48), 2), tile))
        return sorted(found)

    def _stream(self, gemm: StreamGemm, tile: StreamTile, weight: Tensor, *, norm_before: bool) -> None:
        x = self.ops.norm(self.x, self.norm) if norm_before else self.x
        given: dict[str, Any] = {"norm": self.norm.weight, "eps": self.norm.eps} if tile.fuse_norm else {}
        if self.kind == "glu":
            gemm(x, weight, tile, glu=True, **given)
        else:
            gemm(x, weight, tile, residual=self.y if self.kind == "residual" else None, out=self.y, **given)


def lines(products: list[str], rows: list[int], *, search: bool) -> Iterator[dict[str, Any]]:
    """All lines."""
    processors = torch.cuda.get_device_properties(0).multi_processor_count
    for text, num_rows in itertools.product(products, rows):
        product = Product(num_rows, text)
        without, us = product.us(product.without), product.us(product.ops)
        moved = 2 * product.num_cols * product.depth
        line = {"product": text, "rows": num_rows, "without_us": round(without, 2), "us": round(us, 2)}
        line["tbps"] = round(moved / us / 1e6, 2)
        line["tflops"] = round(moved * num_rows / us / 1e6)
        if search and num_rows <= MOST_ROWS:
            line["best"] = product.search(StreamGemm(HopperKernels("cuda")), processors)[:5]
        yield line


def main(argv: Sequence[str]) -> int:
    """The command line."""
    parser = tool_parser(__name__, __doc__)
    parser.add_argument("--rows", help=f"of x; default {','.join(map(str, ROWS))}")
    parser.add_argument("--product", action="append", help="rows of w,columns of w,norm|residual|glu")
    parser.add_argument("--search", action="store_true", help="every stream launch, too")
    args = parser.parse_args(argv)
    rows = [int(text) for text in args.rows.split(",")] if args.rows else list(ROWS)
    require_cuda()
    for line in lines(args.product or list(PRODUCTS), rows, search=args.search):
        print(json.dumps(line), flush=True)
    return 0
