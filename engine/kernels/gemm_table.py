"""Which launches of the skinny GEMM serve which product: a fixed table, so that no start-up waits for a search.

`MEASURED` holds what a search on one H200 found (`experiments/bench_engine.py --sections gemm`); other shapes go by
rules of thumb drawn from it. Beyond `max_rows` the library's GEMM is at least as fast.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from engine.kernels.gemm import GemmConfig

# Row counts are looked up by the smallest bucket that holds them.
ROW_BUCKETS = (1, 16, 32, 64, 128)


class Product(NamedTuple):
    """A product's shape: rows of x (a bucket), rows and columns of w, and whether w is a gate and up pair."""

    num_rows: int
    num_cols: int
    depth: int
    glu: bool


MEASURED: dict[Product, GemmConfig | None] = {}


class GemmTable:
    """Looks up launches.

    Args:
        max_rows: most rows of x.
        num_multiprocessors: of the device; launches should fill them.
        measured: known products; None there sends a product to the library.
        pdl: overlap each launch's start with the kernel before.
    """

    def __init__(
        self,
        max_rows: int = 64,
        num_multiprocessors: int = 132,
        measured: Mapping[Product, GemmConfig | None] = MEASURED,
        *,
        pdl: bool = False,
    ) -> None:
        self._max_rows = max_rows
        self._num_multiprocessors = num_multiprocessors
        self._measured = measured
        self._pdl = pdl
        self._found: dict[Product, GemmConfig | None] = {}

    def find(self, num_rows: int, num_cols: int, depth: int, *, glu: bool = False) -> GemmConfig | None:
        """The launch for x [num_rows, depth] by w [num_cols, depth]; None: use the library."""
        if num_rows > self._max_rows:
            return None
        bucket = next((bucket for bucket in ROW_BUCKETS if num_rows <= bucket), None)
        if bucket is None:
            return None
        product = Product(bucket, num_cols, depth, glu)
        if product not in self._found:
            config = self._measured[product] if product in self._measured else self._guess(product)
            if config is not None and self._pdl:
                config = config._replace(pdl=True)
            self._found[product] = config
        return self._found[product]

    def _guess(self, product: Product) -> GemmConfig | None:
        num_rows, num_cols, depth, glu = product
        if depth % 64:
            return None
        outputs = num_cols // 2 if glu else num_cols
        if num_rows == 1:
            block_n = next((n for n in (16, 8) if outputs // n >= 2 * self._num_multiprocessors), 4)
            block_n = max(2, block_n // 2) if glu else block_n
            return GemmConfig(block_n, min(512, depth), num_warps=4, num_stages=1, use_dot=False, fuse_norm=True)
        block_k = 128 if depth % 128 == 0 else 64
        tiles = -(-outputs // 64)
        split_k = 1
        # Enough programs for two on each multiprocessor, as long as each has some columns to stream.
        while tiles * split_k < 2 * self._num_multiprocessors and depth // (2 * split_k) >= 2 * block_k:
            split_k *= 2
        stages = 3 if glu else 4
        return GemmConfig(64, block_k, split_k, num_warps=4, num_stages=stages, fuse_norm=num_rows <= 16)
