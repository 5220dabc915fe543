"""Searches the library's GEMM kernels on a GPU, for `engine/kernels/gemm/library.py`.

    kvarena benchmark library_gemm [--product 256,4096,14336,1 ...] [--seconds 15]

For each product (rows of x, rows and columns of w, 1 if added to what y holds): PyTorch's own call with both of its
libraries, then cuBLASLt's suggestions; from the best of those every tile it has, and from the best three then every
cluster and order of tiles. Over enough copies of the weights that the L2 cache holds none. A process for each product,
because the library has kernels that end it. One JSON line per product.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from ctypes import byref, c_int, c_size_t, c_uint32, c_uint64, c_void_p

import torch

from kvarena.engine.errors import KvarenaError
from kvarena.engine.kernels.gemm.library import ATTRIBUTES, Algorithm, Result, load_library_gemm
from kvarena.experiments.benchmarks.kernels.gemm import RING_BYTES
from kvarena.experiments.gpu.timing import require_cuda, time_launches
from kvarena.experiments.tools import tool_parser

PRODUCTS = tuple(
    (rows, cols, depth, added)
    for rows in (256, 192, 128)
    for cols, depth, added in (
        (28672, 4096, 0), (4096, 14336, 1), (6144, 4096, 0), (4096, 4096, 1), (1024, 3072, 1), (1024, 2048, 1)
    )
)  # fmt: skip
# cuBLASLt: of preferences and of what an algorithm can do; clusters of up to four programs; orders of tiles.
_MAX_WORKSPACE, _TILE_IDS = 1, 6
CLUSTERS, SWIZZLES = range(2, 10), range(6)


class Search:
    """One product and its kernels."""

    def __init__(self, rows: int, cols: int, depth: int, added: bool, seconds: float) -> None:
        gemm = load_library_gemm("cuda")
        if gemm is None:
            raise KvarenaError(
                "this benchmark needs libcublasLt of the version that engine/kernels/gemm/library.py names"
            )
        self.gemm, self.added, self.seconds = gemm, added, seconds
        copies = max(1, min(32, RING_BYTES // (2 * cols * depth)))
        normal = torch.randn(copies, cols, depth, device="cuda", dtype=torch.bfloat16)
        self.weights = normal.div_(depth**0.5).unbind()
        self.x = torch.randn(rows, depth, device="cuda", dtype=torch.bfloat16)
        self.y = torch.zeros(rows, cols, device="cuda", dtype=torch.bfloat16)
        self.shape = (rows, cols, depth)
        self.found: dict[Algorithm, float | None] = {}

    def torch_us(self, name: str) -> float:
        """PyTorch's call."""
        torch.backends.cuda.preferred_blas_library(name)
        beta = float(self.added)

        def run(w: torch.Tensor) -> None:
            self.y.addmm_(self.x, w.t(), beta=beta)

        return time_launches([lambda w=w: run(w) for w in self.weights], 7, 8)  # type: ignore[misc]

    def us(self, algorithm: Algorithm) -> float | None:
        """A kernel's time; None if the library refuses it."""
        gemm, x, y = self.gemm, self.x, self.y
        if gemm(x, self.weights[0], y, accumulate=self.added, algorithm=algorithm) is None:
            return None
        calls = [lambda w=w: gemm(x, w, y, accumulate=self.added, algorithm=algorithm) for w in self.weights]
        return time_launches(calls, 5, 8)

    def suggestions(self) -> tuple[list[Algorithm], list[int]]:
        """The library's, and all its tiles."""
        gemm = self.gemm
        desc = gemm.describe(self.shape, (self.x.stride(0), self.weights[0].stride(0), self.y.stride(0)))
        preference, size = c_void_p(), c_uint64(32 * 2**20)
        gemm.call("MatmulPreferenceCreate", byref(preference))
        gemm.call("MatmulPreferenceSetAttribute", preference, c_int(_MAX_WORKSPACE), byref(size), c_size_t(8))
        results, count = (Result * 32)(), c_int()
        gemm.call(
            "MatmulAlgoGetHeuristic", gemm.handle, desc.product, desc.w, desc.x, desc.y, desc.y, preference, c_int(32),
            results, byref(count),
        )  # fmt: skip
        algorithms = []
        for result in results[: count.value]:
            values = {}
            for name in ("splitk", *Algorithm._fields):
                number, kind = ATTRIBUTES[name]
                value, written = kind(), c_size_t()
                size_of = c_size_t(ctypes.sizeof(value))
                gemm.call(
                    "MatmulAlgoConfigGetAttribute", byref(result.algo), number, byref(value), size_of, byref(written)
                )
                values[name] = int(value.value)
            if values.pop("splitk") == 1:
                algorithms.append(Algorithm(**values))
        tiles, written = (c_uint32 * 4096)(), c_size_t()
        size_of = c_size_t(ctypes.sizeof(tiles))
        gemm.call("MatmulAlgoCapGetAttribute", byref(results[0].algo), c_int(_TILE_IDS), tiles, size_of, byref(written))
        return algorithms, list(tiles[: written.value // 4])

    def best(self, count: int) -> list[Algorithm]:
        """The fastest so far."""
        timed = {algorithm: us for algorithm, us in self.found.items() if us is not None}
        return sorted(timed, key=timed.__getitem__)[:count]

    def run(self) -> dict[str, object]:
        """The line."""
        line: dict[str, object] = {"product": (*self.shape, self.added)}
        line |= {name: round(self.torch_us(name), 2) for name in ("cublas", "cublaslt")}
        start = time.perf_counter()
        suggested, tiles = self.suggestions()

        def try_all(algorithms: Iterable[Algorithm]) -> None:
            for algorithm in algorithms:
                if algorithm not in self.found and time.perf_counter() - start < self.seconds:
                    self.found[algorithm] = self.us(algorithm)

        try_all(suggested)
        try_all([one._replace(tile=tile) for one in self.best(2) for tile in tiles])
        try_all(list(_neighbours(self.best(3))))
        line["tried"] = sum(us is not None for us in self.found.values())
        line["best"] = [(round(self.us(one) or 0.0, 2), tuple(one)) for one in self.best(4)]
        return line


def _neighbours(algorithms: list[Algorithm]) -> Iterator[Algorithm]:
    for one in algorithms:
        yield from (one._replace(cluster=cluster, swizzle=swizzle) for cluster in CLUSTERS for swizzle in SWIZZLES)


def main(argv: Sequence[str]) -> int:
    """The command line."""
    parser = tool_parser(__name__, __doc__)
    parser.add_argument("--product", action="append", help="rows,cols,depth,added; default: those of both real shapes")
    parser.add_argument("--seconds", type=float, default=15.0, help="for each product")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    products = [tuple(map(int, text.split(","))) for text in args.product or ()] or list(PRODUCTS)
    require_cuda()
    for rows, cols, depth, added in products:
        if args.one:
            print(json.dumps(Search(rows, cols, depth, bool(added), args.seconds).run()), flush=True)
            continue
        command = [sys.executable, "-m", "kvarena", "benchmark", "library_gemm", "--one"]
        command += ["--seconds", str(args.seconds), "--product", f"{rows},{cols},{depth},{added}"]
        child = subprocess.run(command, capture_output=True, text=True, check=False)
        failed = json.dumps({"product": (rows, cols, depth, added), "error": child.stderr[-300:]})
        print(child.stdout.strip() if child.returncode == 0 else failed, flush=True)
    return 0
