"""What the vision tower has made, kept by digest in one tensor of a stated size.

    pages     | a | a | b | a | c | ...     of a few rows each; a tile's need not lie side by side
    a tile    (digest, tile) -> its pages, how many rows

The least recently used tile makes room.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import NamedTuple

import torch
from torch import Tensor

Key = tuple[int, int]


class _Kept(NamedTuple):
    pages: list[int]
    num_rows: int


class FeatureCache:
    """Rows of encoded tiles.

    Args:
        num_bytes: at most so many; may be too few for one tile, and nothing is kept.
        page_rows: rows of a page.
        width: elements of a row.
        dtype, device: of them.

    Attributes:
        num_bytes: of the tensor.
        num_rows: that it holds.
    """

    def __init__(self, num_bytes: int, page_rows: int, width: int, dtype: torch.dtype, device: torch.device) -> None:
        num_pages = num_bytes // (page_rows * width * dtype.itemsize)
        self._pages = torch.empty(num_pages, page_rows, width, dtype=dtype, device=device)
        self._page_rows = page_rows
        self.num_bytes = self._pages.numel() * dtype.itemsize
        self.num_rows = num_pages * page_rows
        self._free = list(range(num_pages))
        self._kept: OrderedDict[Key, _Kept] = OrderedDict()

    @property
    def used_bytes(self) -> int:
        """Bytes of the pages that hold something."""
        return self.num_bytes - len(self._free) * (self.num_bytes // max(1, len(self._pages)))

    def find(self, key: Key) -> Tensor | None:
        """The rows of a tile, [n, width], now the most recently used; None: not there."""
        kept = self._kept.get(key)
        if kept is None:
            return None
        self._kept.move_to_end(key)
        if len(kept.pages) == 1:
            return self._pages[kept.pages[0], : kept.num_rows]
        return self._pages[self._index(kept.pages)].flatten(0, 1)[: kept.num_rows]

    def keep(self, key: Key, rows: Tensor) -> None:
        """Take a tile in, [n, width], where the cache is large enough for it."""
        needed, size = -(-len(rows) // self._page_rows), self._page_rows
        if needed > len(self._pages):
            return
        while len(self._free) < needed:
            self._free += self._kept.popitem(last=False)[1].pages
        pages = [self._free.pop() for _ in range(needed)]
        self._kept[key] = _Kept(pages, len(rows))
        full = len(rows) // size
        if full:
            self._pages[self._index(pages[:full])] = rows[: full * size].unflatten(0, (full, size))
        if full < needed:
            self._pages[pages[-1], : len(rows) - full * size] = rows[full * size :]

    def _index(self, pages: list[int]) -> Tensor:
        return torch.tensor(pages, device=self._pages.device)
