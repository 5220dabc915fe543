"""Searches launches of the skinny GEMM on a GPU, against the library's GEMM and the copy's bandwidth.

    kvarena benchmark gemm --out gemm.json [--shape llama-3.1-8b --shape qwen3-0.6b]

Every product of a decode forward is timed with what is folded into it (norm, residual, silu(gate) * up), over enough
copies of the weights that the L2 cache holds none. The library's time includes the kernels that the fold replaces.
`--out` gets a table that `GemmTable.from_json` reads; a product in which the library wins is null there. One JSON line
per product; those that did not fit into `--seconds` are left out and named in the last line.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from kvarena.engine.kernels.activation import gated
from kvarena.engine.kernels.gemm.skinny import GemmConfig, SkinnyGemm
from kvarena.engine.kernels.gemm.table import ROW_BUCKETS, GemmTable, Product, dump_table
from kvarena.engine.kernels.norm import rms_norm
from kvarena.experiments.gpu.floors import SHAPES, shape_of
from kvarena.experiments.gpu.timing import copy_bandwidth, require_cuda, time_launches
from kvarena.experiments.tools import tool_parser

RING_BYTES = 400 * 2**20
EPS = 1e-5
# A launch must beat the library by this much to be taken: less is noise.
MARGIN = 0.98


class Case(NamedTuple):
    """A product and what comes with it in the forward: a norm before, or a residual after."""

    name: str
    product: Product
    has_norm: bool


def cases(shape: dict[str, Any], num_rows: int) -> Iterator[Case]:
    """Products of a shape's decode forward, those that move the most bytes first."""
    hidden, inner, head_dim = shape["hidden_size"], shape["intermediate_size"], shape["head_dim"]
    heads, kv_heads = shape["num_attention_heads"], shape["num_key_value_heads"]
    yield Case("gate_up", Product(num_rows, 2 * inner, hidden, True), True)
    yield Case("down", Product(num_rows, hidden, inner, False), False)
    yield Case("qkv", Product(num_rows, (heads + 2 * kv_heads) * head_dim, hidden, False), True)
    yield Case("o", Product(num_rows, hidden, heads * head_dim, False), False)
    yield Case("head", Product(num_rows, shape["vocab_size"], hidden, False), True)


def candidates(case: Case) -> Iterator[GemmConfig]:
    """Launches worth a try; the norm is left out of those that may do without it in a first round."""
    num_rows, num_cols, depth, glu = case.product
    outputs = num_cols // 2 if glu else num_cols
    if num_rows == 1:
        vectors = [
            (4, 512, 4, 1), (8, 512, 4, 1), (16, 512, 4, 1), (8, 1024, 4, 1), (4, 1024, 4, 1), (8, 512, 4, 3),
            (16, 256, 4, 4), (16, 512, 8, 1), (4, 1024, 4, 3), (2, 1024, 2, 1),
        ]  # fmt: skip
        for block_n, block_k, warps, stages in vectors:
            for split_k in (1, 2, 4):
                filled = -(-outputs // block_n) * split_k
                if block_k * split_k <= depth and (split_k == 1 or filled < 1100):
                    yield GemmConfig(block_n, block_k, split_k, warps, stages, use_dot=False, fuse_norm=case.has_norm)
    tiles = [(64, 128, 4, 4), (64, 64, 4, 6), (64, 256, 4, 3), (128, 64, 4, 4), (32, 128, 4, 4), (128, 128, 8, 3)]
    if num_rows >= 64:
        tiles = [(64, 128, 4, 3), (64, 64, 4, 5), (128, 64, 4, 4), (128, 64, 8, 4), (128, 128, 8, 3)]
    for block_n, block_k, warps, stages in tiles:
        shared = stages * block_k * 2 * (block_n * (1 + glu) + max(16, num_rows))
        if shared > 220 * 1024 or depth % block_k:
            continue
        programs = -(-outputs // block_n)
        splits = [k for k in (1, 2, 4, 8, 16) if depth % (k * block_k) == 0 and (k == 1 or programs * k < 700)]
        # Too few programs leave the card empty.
        for split_k in [k for k in splits if programs * k > 100] or splits[-1:]:
            yield GemmConfig(block_n, block_k, split_k, warps, stages)


class Bench:
    """Operands of one case, and its launches."""

    def __init__(self, case: Case, gemm: SkinnyGemm) -> None:
        num_rows, num_cols, depth, glu = case.product
        self.case, self.gemm = case, gemm
        copies = max(1, min(64, RING_BYTES // (2 * num_cols * depth)))

        def normal(*size: int) -> Tensor:
            return torch.randn(*size, device="cuda", dtype=torch.bfloat16)

        self.weights = [normal(num_cols, depth) / depth**0.5 for _ in range(copies)]
        self.x = normal(num_rows, depth)
        self.norm = 1 + 0.1 * normal(depth) if case.has_norm else None
        self.residual = None if case.has_norm else normal(num_rows, num_cols)
        self.out = normal(num_rows, num_cols // (1 + glu))

    def library(self, weight: Tensor) -> Tensor:
        """The product with the kernels around it, through the library's GEMM."""
        if self.residual is not None:
            return self.out.addmm_(self.x, weight.t())
        y = F.linear(rms_norm(self.x, self.norm, EPS) if self.norm is not None else self.x, weight)
        return gated(y) if self.case.product.glu else y

    def skinny(self, weight: Tensor, config: GemmConfig) -> Tensor:
        """The same through the skinny GEMM, in place in the residual where there is one."""
        x, norm = self.x, self.norm
        if norm is not None and not config.fuse_norm:
            x, norm = rms_norm(x, norm, EPS), None
        residual = None if self.residual is None else self.out
        glu = self.case.product.glu
        return self.gemm(x, weight, config, norm=norm, eps=EPS, residual=residual, glu=glu, out=self.out)

    def error(self, config: GemmConfig) -> float:
        """Relative difference from float64."""
        x, weight = self.x.double(), self.weights[0].double()
        if self.norm is not None:
            x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS) * self.norm.double()
        expected = x @ weight.t()
        if self.case.product.glu:
            gate, up = expected.chunk(2, dim=-1)
            expected = F.silu(gate) * up
        if self.residual is not None:
            self.out.copy_(self.residual)
            expected = expected + self.residual.double()
        else:
            self.out.fill_(torch.nan)
        got = self.skinny(self.weights[0], config)
        return float((got.double() - expected).norm() / expected.norm())

    def microseconds(self, run: Callable[[Tensor], Tensor]) -> float:
        """Of one call, over the ring of weights."""
        return time_launches([partial(run, weight) for weight in self.weights], repeats=7, min_launches=8)


def search(case: Case, gemm: SkinnyGemm, workers: ThreadPoolExecutor) -> tuple[dict[str, Any], GemmConfig | None]:
    """Time one case; returns its line, and the winner (None: the library)."""
    bench = Bench(case, gemm)
    num_rows, num_cols, depth, glu = case.product
    configs = [c for c in candidates(case) if gemm.fits(num_rows, num_cols // (1 + glu), c, glu=glu)]
    failures: dict[str, str] = {}

    def compile_one(config: GemmConfig) -> GemmConfig | None:
        try:
            bench.skinny(bench.weights[0], config)
        except Exception as error:  # a launch that the compiler or the device refuses is not a candidate
            failures[str(tuple(config))] = f"{type(error).__name__}: {error}"[:200]
            return None
        return config

    def run_all(configs: list[GemmConfig]) -> list[tuple[float, GemmConfig]]:
        # Compiling is most of the time, and half of it runs outside of Python.
        compiled = [config for config in workers.map(compile_one, configs) if config is not None]
        torch.cuda.synchronize()
        return sorted((bench.microseconds(partial(bench.skinny, config=config)), config) for config in compiled)

    library = bench.microseconds(bench.library)
    timed = run_all(configs)
    if case.has_norm and num_rows <= 32:
        best = [config._replace(fuse_norm=True) for _, config in timed[:3] if not config.fuse_norm]
        timed = sorted(timed + run_all(best))
    num_tried = len(timed)
    timed = [(us, config) for us, config in timed if us < 1.3 * timed[0][0]]
    right = [(us, config, error) for us, config in timed if (error := bench.error(config)) < 2e-2]
    num_bytes = 2 * num_cols * depth
    line: dict[str, Any] = {
        "section": "gemm", "name": case.name, **case.product._asdict(), "library_us": round(library, 2),
        "library_tbps": round(num_bytes / library / 1e6, 3), "tried": num_tried,
    }  # fmt: skip
    if right:
        us, config, error = right[0]
        line |= {"us": round(us, 2), "tbps": round(num_bytes / us / 1e6, 3), "error": error, "config": tuple(config)}
        line["next"] = [(round(us, 2), tuple(config)) for us, config, _ in right[1:4]]
    if len(right) < len(timed):
        line["wrong"] = len(timed) - len(right)
    if failures:
        line["failures"] = failures
    return line, right[0][1] if right and right[0][0] < MARGIN * library else None


def main(argv: Sequence[str]) -> int:
    """The command line."""
    parser = tool_parser(__name__, __doc__)
    parser.add_argument("--shape", action="append", choices=SHAPES, help="default: all of them")
    parser.add_argument("--rows", type=int, action="append", choices=ROW_BUCKETS, help="default: all")
    parser.add_argument("--seconds", type=float, default=150.0, help="after so long no product is begun")
    parser.add_argument("--out", type=Path, required=True, help="a file that gets the table")
    args = parser.parse_args(argv)
    device = require_cuda()
    shapes = args.shape or SHAPES
    gemm = SkinnyGemm(device)
    found: dict[Product, GemmConfig | None] = {}
    left_out = []
    start = time.perf_counter()
    print(json.dumps({"section": "ceiling", "copy_tbps": round(copy_bandwidth() / 1e12, 3)}), flush=True)
    with ThreadPoolExecutor(8) as workers:
        for num_rows in args.rows or (1, 32, 16, 64, 128):
            for case in (case for name in shapes for case in cases(shape_of(name), num_rows)):
                if case.product in found:
                    continue
                if time.perf_counter() - start > args.seconds:
                    left_out.append((case.name, *case.product))
                    continue
                try:
                    line, found[case.product] = search(case, gemm, workers)
                except Exception as error:  # one case that fails must not cost the others; its line says so
                    line = {"section": "gemm", "name": case.name, **case.product._asdict(), "failed": repr(error)[:300]}
                print(json.dumps(line), flush=True)
                args.out.write_text(dump_table(found))
    assert GemmTable.from_json(args.out.read_text()) is not None
    print(json.dumps({"section": "gemm", "seconds": round(time.perf_counter() - start, 1), "left_out": left_out}))
    return 0
