"""Which launches of the skinny GEMM serve which product: a fixed table, so that no start-up waits for a search.

`MEASURED` holds what a search on one H100 found (`kvarena benchmark gemm`, 128 rows of
the large shape: one H200); other shapes go by rules of thumb drawn from it, and to the library beyond 32 rows.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import NamedTuple

from kvarena.engine.kernels.gemm.glu import GluTile, glu_tile
from kvarena.engine.kernels.gemm.skinny import GemmConfig

# Row counts are looked up by the smallest bucket that holds them.
ROW_BUCKETS = (1, 16, 32, 64, 128)
# Weights of a product that takes tens of microseconds: half of the large shape's gate and up.
_LARGE = 48 * 2**20


class Product(NamedTuple):
    """A product's shape: rows of x (a bucket), rows and columns of w, and whether w is a gate and up pair."""

    num_rows: int
    num_cols: int
    depth: int
    glu: bool


# None: the library was as fast, with the norm or the gate as a launch of its own.
MEASURED: dict[Product, GemmConfig | None] = {
    Product(1, 28672, 4096, True): GemmConfig(4, 1024, num_warps=4, num_stages=3, use_dot=False, fuse_norm=True),
    Product(1, 4096, 14336, False): GemmConfig(8, 512, num_warps=4, num_stages=3, use_dot=False),
    Product(1, 6144, 4096, False): GemmConfig(16, 256, num_warps=4, num_stages=4, use_dot=False, fuse_norm=True),
    Product(1, 4096, 4096, False): GemmConfig(8, 512, num_warps=4, num_stages=3, use_dot=False),
    Product(1, 128256, 4096, False): GemmConfig(4, 1024, num_warps=4, num_stages=3, use_dot=False, fuse_norm=True),
    Product(1, 6144, 1024, True): GemmConfig(8, 512, num_warps=4, num_stages=1, use_dot=False, fuse_norm=True),
    Product(1, 1024, 3072, False): GemmConfig(4, 1024, num_warps=4, num_stages=3, use_dot=False),
    Product(1, 4096, 1024, False): GemmConfig(4, 512, num_warps=4, num_stages=1, use_dot=False, fuse_norm=True),
    Product(1, 1024, 2048, False): GemmConfig(4, 1024, num_warps=4, num_stages=3, use_dot=False),
    Product(1, 151936, 1024, False): GemmConfig(8, 512, num_warps=4, num_stages=3, use_dot=False, fuse_norm=True),
    Product(32, 28672, 4096, True): GemmConfig(64, 128, num_warps=4, num_stages=4),
    Product(32, 4096, 14336, False): GemmConfig(64, 256, split_k=2, num_warps=4, num_stages=3),
    Product(32, 6144, 4096, False): GemmConfig(32, 128, num_warps=4, num_stages=4),
    Product(32, 4096, 4096, False): None,
    Product(32, 128256, 4096, False): GemmConfig(128, 128, num_warps=8, num_stages=3),
    Product(32, 6144, 1024, True): None,
    Product(32, 1024, 3072, False): GemmConfig(64, 256, split_k=4, num_warps=4, num_stages=3),
    Product(32, 4096, 1024, False): GemmConfig(64, 256, split_k=2, num_warps=4, num_stages=3, fuse_norm=True),
    Product(32, 1024, 2048, False): None,
    Product(32, 151936, 1024, False): GemmConfig(128, 128, num_warps=8, num_stages=3),
    Product(16, 28672, 4096, True): GemmConfig(64, 256, num_warps=4, num_stages=3, fuse_norm=True),
    Product(16, 4096, 14336, False): GemmConfig(64, 256, split_k=2, num_warps=4, num_stages=3),
    Product(16, 6144, 4096, False): GemmConfig(32, 128, num_warps=4, num_stages=4),
    Product(16, 4096, 4096, False): GemmConfig(64, 256, split_k=2, num_warps=4, num_stages=3),
    Product(16, 128256, 4096, False): GemmConfig(128, 128, num_warps=8, num_stages=3),
    Product(16, 6144, 1024, True): GemmConfig(64, 64, split_k=4, num_warps=4, num_stages=6, fuse_norm=True),
    Product(16, 1024, 3072, False): GemmConfig(64, 256, split_k=4, num_warps=4, num_stages=3),
    Product(16, 4096, 1024, False): GemmConfig(64, 256, split_k=2, num_warps=4, num_stages=3, fuse_norm=True),
    Product(16, 1024, 2048, False): GemmConfig(64, 256, split_k=8, num_warps=4, num_stages=3),
    Product(16, 151936, 1024, False): GemmConfig(128, 128, num_warps=8, num_stages=3, fuse_norm=True),
    Product(64, 28672, 4096, True): GemmConfig(64, 128, num_warps=4, num_stages=3),
    Product(64, 4096, 14336, False): None,
    Product(64, 6144, 4096, False): None,
    Product(64, 4096, 4096, False): None,
    Product(64, 128256, 4096, False): GemmConfig(128, 128, num_warps=8, num_stages=3),
    Product(64, 6144, 1024, True): None,
    Product(64, 1024, 3072, False): None,
    Product(64, 4096, 1024, False): None,
    Product(64, 1024, 2048, False): None,
    Product(64, 151936, 1024, False): GemmConfig(64, 128, num_warps=4, num_stages=3),
    Product(128, 28672, 4096, True): None,
    Product(128, 4096, 14336, False): None,
    Product(128, 6144, 4096, False): None,
    Product(128, 4096, 4096, False): None,
    Product(128, 128256, 4096, False): None,
    Product(128, 6144, 1024, True): None,
    Product(128, 1024, 3072, False): None,
    Product(128, 4096, 1024, False): None,
    Product(128, 1024, 2048, False): None,
    Product(128, 151936, 1024, False): GemmConfig(128, 128, num_warps=8, num_stages=3),
}


class GemmTable:
    """Looks up launches.

    Args:
        max_rows: most rows of x.
        num_multiprocessors: of the device; launches should fill them.
        measured: known products; None there sends a product to the library.
    """

    def __init__(
        self,
        max_rows: int = 64,
        num_multiprocessors: int = 132,
        measured: Mapping[Product, GemmConfig | None] = MEASURED,
    ) -> None:
        self._max_rows = max_rows
        self._num_multiprocessors = num_multiprocessors
        self._measured = measured
        self._found: dict[Product, GemmConfig | None] = {}

    @classmethod
    def from_json(cls, text: str, max_rows: int = ROW_BUCKETS[-1], num_multiprocessors: int = 132) -> GemmTable:
        """A table of the products that `dump_table` wrote, on top of the measured ones."""
        found = {Product(*key): None if value is None else GemmConfig(*value) for key, value in json.loads(text)}
        return cls(max_rows, num_multiprocessors, {**MEASURED, **found})

    def find(self, num_rows: int, num_cols: int, depth: int, *, glu: bool = False) -> GemmConfig | None:
        """The launch for x [num_rows, depth] by w [num_cols, depth]; None: use the library."""
        if num_rows > self._max_rows:
            return None
        bucket = next((bucket for bucket in ROW_BUCKETS if num_rows <= bucket), None)
        if bucket is None:
            return None
        product = Product(bucket, num_cols, depth, glu)
        if product not in self._found:
            measured = self._measured
            self._found[product] = measured[product] if product in measured else self._guess(product)
        return self._found[product]

    def find_glu(self, num_rows: int, num_cols: int, depth: int) -> GluTile | None:
        """The launch of `gated_product` for x [num_rows, depth] by w [num_cols, depth]; None: see `find`."""
        return glu_tile(num_rows, num_cols, depth, self._num_multiprocessors)

    def _guess(self, product: Product) -> GemmConfig | None:
        num_rows, num_cols, depth, glu = product
        if depth % 64 or num_rows > 32:
            return None
        outputs = num_cols // 2 if glu else num_cols
        is_large = num_cols * depth >= _LARGE and depth >= 4096 and depth % 1024 == 0
        if num_rows == 1 and is_large:  # as of the large ones that were measured
            return GemmConfig(4, 1024, num_warps=4, num_stages=3, use_dot=False, fuse_norm=True)
        if is_large and not glu:
            return GemmConfig(128, 128, num_warps=8, num_stages=3, fuse_norm=False)
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
