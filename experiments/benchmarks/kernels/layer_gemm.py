"""Launches of a layer's products on Hopper, for the tables of `turned.py`, `dense.py`, `wide.py` (engine/kernels/gemm).

    kvarena benchmark layer_gemm [--shape llama-3.1-8b ...] [--rows 1,32,256] [--tiles 8] [--product heads ...]

One JSON line per product and number of rows of x: microseconds as the engine does it without these tables and by the
launches that fit, the best first, over enough copies of the weights that the L2 cache holds none. `heads` is norm,
queries, keys and values, rotation and store; `o` and `down` add to what y holds; `qkv` and `head`, the output,
come without their norm. Of the dense product only the `--tiles` launches are timed that should be the fastest;
`predicted_us` is what its model says. `gated` is silu(gate) * up of a prompt's rows. The last line has the tables, as
Python text: launches that are faster by 2 % or more.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch

from kvarena.engine.errors import ConfigError
from kvarena.engine.fusions.ops import Angles, HeadNorms, Heads, HeadSlots, Linear, Norm
from kvarena.engine.fusions.triton_ops import TritonOps
from kvarena.engine.kernels.gemm import dense, turned, wide
from kvarena.engine.kernels.gemm.dense import DenseGemm, DenseTile, dense_tiles, predicted_us
from kvarena.engine.kernels.gemm.stream import StreamTile, row_bucket
from kvarena.engine.kernels.gemm.table import GemmTable
from kvarena.engine.kernels.gemm.turned import HeadsToStore, TurnedGemm, turned_tiles
from kvarena.engine.kernels.gemm.wide import WideGemm, WideTile, best_wide_tile
from kvarena.engine.kernels.hopper import HopperKernels, kernel_source, load_hopper_kernels
from kvarena.experiments.benchmarks.kernels.gemm import RING_BYTES
from kvarena.experiments.gpu.floors import EXPERT_SHAPES, LARGE_SHAPES, SHAPES, shape_of
from kvarena.experiments.gpu.timing import require_cuda, time_launches
from kvarena.experiments.tools import tool_parser

PRODUCTS = ("heads", "qkv", "o", "down", "head", "gated")
PROMPT_ROWS = (512, 1024, 2048, 8192, 16384)
# As much faster as it must be, so that a table does not follow noise.
FASTER = 0.98
# Weights that a measurement reads, about.
_MOVED_BYTES = 6 * 10**9
Line = dict[str, Any]
Launch = Callable[[torch.Tensor], object]


class Layer:
    """A layer's sizes and operands, of random values.

    Args:
        shape: of conf/model.
        kernels: of the GPU.
    """

    def __init__(self, shape: str, kernels: HopperKernels) -> None:
        config = shape_of(shape)
        self.shape, self.kernels = shape, kernels
        self.hidden, self.inner = config["hidden_size"], 0 if shape in EXPERT_SHAPES else config["intermediate_size"]
        self.vocab_size, num_heads = config["vocab_size"], config["num_attention_heads"]
        self.heads = Heads(num_heads, config["num_key_value_heads"], config.get("head_dim", self.hidden // num_heads))
        self.has_norms = config["model_type"].startswith("qwen3")
        processors = kernels.num_multiprocessors
        self.ops = TritonOps("cuda", GemmTable(128, processors))
        self.turned, self.dense, self.wide = TurnedGemm(kernels), DenseGemm(kernels), WideGemm(kernels)
        self._weights: tuple[torch.Tensor, ...] = ()

    def sizes(self, product: str) -> tuple[int, int]:
        """Columns of y and of x."""
        num_heads, num_kv_heads, dim = self.heads
        if product in ("heads", "qkv"):
            return (num_heads + 2 * num_kv_heads) * dim, self.hidden
        if product == "gated":
            return 2 * self.inner, self.hidden
        if product == "head":
            return self.vocab_size, self.hidden
        return self.hidden, num_heads * dim if product == "o" else self.inner

    def time(self, num_cols: int, depth: int, launch: Launch, num_launches: int = 24) -> float:
        """Microseconds of a launch, over copies of the weights; of large ones fewer launches."""
        num_launches = max(4, min(num_launches, _MOVED_BYTES // (2 * num_cols * depth)))
        if not self._weights or self._weights[0].shape != (num_cols, depth):
            self._weights = ()
            copies = max(2, min(48, RING_BYTES // (2 * num_cols * depth)))
            weights = torch.randn(copies, num_cols, depth, device="cuda", dtype=torch.bfloat16)
            self._weights = weights.div_(depth**0.5).unbind()
        return time_launches([partial(launch, weight) for weight in self._weights], 7, num_launches)

    def heads_line(self, num_rows: int) -> Line:
        """Norm, product, rotation and store in two or three launches, and in one or two."""
        num_cols, depth = self.sizes("heads")
        kind: dict[str, Any] = {"device": "cuda", "dtype": torch.bfloat16}
        x, norm = torch.randn(num_rows, depth, **kind), Norm(torch.rand(depth, **kind) + 0.5, 1e-5)
        both = torch.rand(num_rows, self.heads.head_dim, device="cuda")
        half = self.heads.head_dim // 2
        angles = Angles(both[:, :half], both[:, half:])
        keys, values = torch.zeros(2, 4096, self.heads.num_kv_heads, self.heads.head_dim, **kind).unbind()
        slots = torch.randperm(4096, device="cuda")[:num_rows]
        of_head = Norm(torch.rand(self.heads.head_dim, **kind) + 0.5, 1e-6)
        norms = HeadNorms(of_head, of_head) if self.has_norms else None
        to = HeadSlots(self.heads, norms, angles, slots, (keys, values))
        weight = of_head.weight if self.has_norms else None
        store = HeadsToStore(self.heads.num_heads, *angles, slots, keys, values, weight, weight, 1e-6)

        def apart(w: torch.Tensor) -> None:
            self.ops.rope_store(self.ops.norm_linear(x, norm, Linear(w, None)), *to)

        def together(w: torch.Tensor, tile: StreamTile) -> None:
            if tile.fuse_norm:
                self.turned(x, w, tile, store, norm=norm.weight, eps=norm.eps)
            else:
                self.turned(self.ops.norm(x, norm), w, tile, store)

        us = self.time(num_cols, depth, apart)
        tiles = turned_tiles(num_rows, num_cols, depth, self.kernels.num_multiprocessors) if store.fit() else []
        constants = [turned.constants_of(t, num_rows, depth, has_norms=self.has_norms) for t in tiles]
        rows = row_bucket(num_rows)
        self.kernels.prepare(kernel_source("stream_gemm", one | {"MODE": "STORE"}, rows) for one in constants)
        found = sorted((self.time(num_cols, depth, partial(together, tile=tile)), tile) for tile in tiles)
        return _line(us, found)

    def gated_line(self, num_rows: int) -> Line:
        """Gate, up and silu(gate) * up, in two launches and in one."""
        num_cols, depth = self.sizes("gated")
        x = torch.randn(num_rows, depth, device="cuda", dtype=torch.bfloat16)

        def apart(w: torch.Tensor) -> None:
            self.ops.linear_glu(x, Linear(w, None))

        def together(w: torch.Tensor, tile: WideTile) -> None:
            self.wide(x, w, tile)

        us = self.time(num_cols, depth, apart, 4)
        tile = best_wide_tile(num_rows, num_cols, depth, self.kernels.num_multiprocessors)
        found = [] if tile is None else [(self.time(num_cols, depth, partial(together, tile=tile), 4), tile)]
        line = _line(us, found)
        line["tflops"] = round(2 * num_rows * num_cols * depth / min(us, line.get("best_us", us)) / 1e6)
        return line

    def dense_line(self, product: str, num_rows: int, num_tiles: int) -> Line:
        """A product by what the engine takes, and by the dense product."""
        num_cols, depth = self.sizes(product)
        kind: dict[str, Any] = {"device": "cuda", "dtype": torch.bfloat16}
        x, y = torch.randn(num_rows, depth, **kind), torch.zeros(num_rows, num_cols, **kind)
        residual = None if product in ("qkv", "head") else y

        def without(w: torch.Tensor) -> None:
            if residual is None:
                self.ops.linear(x, Linear(w, None), y)
            else:
                self.ops.linear_residual(x, Linear(w, None), residual)

        def by_dense(w: torch.Tensor, tile: DenseTile) -> None:
            self.dense(x, w, tile, residual=residual, out=y)

        us = self.time(num_cols, depth, without)
        tiles = dense_tiles(num_rows, num_cols, depth, self.kernels.num_multiprocessors // 2)[:num_tiles]
        mode = "STORE" if residual is None else "ADD"
        self.kernels.prepare(kernel_source("wide_dense", tile.constants(mode), tile.cols) for tile in tiles)
        found = sorted((self.time(num_cols, depth, partial(by_dense, tile=tile)), tile) for tile in tiles)
        line = _line(us, found)
        line["tflops"] = round(2 * num_rows * num_cols * depth / min(us, line.get("best_us", us)) / 1e6)
        if found:
            line["predicted_us"] = round(predicted_us(found[0][1], num_rows, num_cols, depth), 1)
        return line


def _line(us: float, found: Sequence[tuple[float, tuple[object, ...]]]) -> Line:
    line: Line = {"us": round(us, 2)}
    if found:
        line |= {"best_us": round(found[0][0], 2), "tile": found[0][1]}
        line["others"] = [[round(one, 2), tile] for one, tile in found[1:4]]
    return line


def lines(shapes: list[str], products: list[str], rows: list[int] | None, num_tiles: int) -> Iterator[Line]:
    """All lines."""
    kernels = load_hopper_kernels("cuda")
    if kernels is None:
        raise ConfigError("this benchmark measures kernels of a Hopper GPU, which needs pip install 'kvarena[gpu]'")
    # The engine's own way is what it does without them.
    turned.MEASURED.clear()
    dense.MEASURED.clear()
    wide.MEASURED_FROM.clear()
    tables: dict[str, dict[tuple[int, int], dict[int, object]]] = {"turned": {}, "dense": {}}
    ways: dict[str, tuple[str, tuple[int, ...]]] = {
        "heads": ("turned", turned.ROW_BUCKETS), "gated": ("wide", PROMPT_ROWS)
    }  # fmt: skip
    wide_from: dict[tuple[int, int], int] = {}
    for shape in shapes:
        layer = Layer(shape, kernels)
        for product in products:
            name, buckets = ways.get(product, ("dense", dense.ROW_BUCKETS))
            size = layer.sizes(product)
            if not all(size):
                continue  # a layer whose MLP is experts
            by_dense = partial(layer.dense_line, product, num_tiles=num_tiles)
            run = {"heads": layer.heads_line, "gated": layer.gated_line}.get(product, by_dense)
            for num_rows in rows or buckets:
                line = run(num_rows)
                yield {"shape": shape, "product": product, "rows": num_rows, **line}
                is_faster = line.get("best_us", line["us"]) < FASTER * line["us"]
                if product == "gated" and is_faster:
                    wide_from.setdefault(size, num_rows)
                elif product == "gated":
                    wide_from.pop(size, None)  # from some rows on, and of all more
                elif num_rows in buckets and is_faster:
                    tables[name].setdefault(size, {})[num_rows] = line["tile"]
    yield {"tables": {**{name: repr(table) for name, table in tables.items()}, "wide": repr(wide_from)}}


def main(argv: Sequence[str]) -> int:
    """The command line."""
    parser = tool_parser(__name__, __doc__)
    known = SHAPES + LARGE_SHAPES + EXPERT_SHAPES
    parser.add_argument("--shape", action="append", choices=known, help=f"of the model; default {' and '.join(SHAPES)}")
    parser.add_argument("--product", action="append", choices=PRODUCTS, help="default: all")
    parser.add_argument("--rows", help="of x; default: those of the tables")
    parser.add_argument("--tiles", type=int, default=12, help="launches of the dense product to time")
    args = parser.parse_args(argv)
    rows = [int(text) for text in args.rows.split(",")] if args.rows else None
    require_cuda()
    for line in lines(args.shape or list(SHAPES), args.product or list(PRODUCTS), rows, args.tiles):
        print(json.dumps(line), flush=True)
    return 0
