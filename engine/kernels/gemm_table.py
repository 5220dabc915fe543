"""Which launches of the skinny GEMM serve which product: a fixed table, so that no start-up waits for a search.

`MEASURED` holds what a search on one H200 found (`python -m experiments.bench_gemm`); other shapes go by rules of
thumb drawn from it, and to the library beyond 32 rows.
"""

from __future__ import annotations

import json
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

    @classmethod
    def from_json(
        cls, text: str, max_rows: int = ROW_BUCKETS[-1], num_multiprocessors: int = 132, *, pdl: bool = False
    ) -> GemmTable:
        """A table of the products that `dump_table` wrote, on top of the measured ones."""
        found = {Product(*key): None if value is None else GemmConfig(*value) for key, value in json.loads(text)}
        return cls(max_rows, num_multiprocessors, {**MEASURED, **found}, pdl=pdl)

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
        if depth % 64 or num_rows > 32:
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


def dump_table(found: Mapping[Product, GemmConfig | None]) -> str:
    """Products and their launches as JSON, one a line."""
    lines = [json.dumps([list(key), None if value is None else list(value)]) for key, value in found.items()]
    return "[\n" + ",\n".join(lines) + "\n]\n"
