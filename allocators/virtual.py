"""Virtual contiguity: vAttention (Prabhu et al., ASPLOS'25).

Each running request has a region of virtual memory that could hold max_model_len tokens; physical pages are mapped
into it from the front as it grows. The kernel sees one contiguous row per request, the pool is used page by page.

    region 0  | page | page | ................ not mapped ................ |
    region 1  | page | ....................................................|
    region 2  | (no request: nothing mapped)                               |

Block ids are virtual and go up to `num_virtual_blocks`; memory is accounted in physical pages. Which page backs which
part of a region is the business of who maps them (`kvarena.engine.pool.virtual_pool` on a GPU): it maps as many pages,
counted from the start of a region, as hold the request's `num_slots`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from kvarena.allocators.blocks import BlockPool
from kvarena.engine.contract import KVAllocator, KVUsage, QueueHead, cdiv, check_int
from kvarena.engine.errors import ConfigError
from kvarena.engine.request import Request

KIB = 1024
LARGEST_PAGE, SMALLEST_PAGE = 2048 * KIB, 64 * KIB
MIN_PAGES = 128  # of a pool whose page size is not given


class VirtualAllocator(KVAllocator):
    """Contiguous virtual regions over physical pages that are mapped on demand.

    A page holds page_bytes * kv_tensors / kv_bytes_per_token tokens. That need not be a whole number: a token may lie
    across two pages. The empty rest of a request's last page is internal fragmentation, as in the last block of a paged
    one. What never holds a whole token (the pool beyond its last page, the rest of a page that holds a part of one) is
    external fragmentation; so are all free pages while they would do for the head of the queue and no region is free.

    Args:
        page_bytes: size of a physical page, 64 KiB to 2 MiB. (CUDA maps 2 MiB; the paper's driver also less.) None: the
            largest of 2 MiB, 1 MiB, ... 64 KiB of which the pool has at least 128; where it has not, one block.
        kv_tensors: tensors that a token's KV is spread over, each mapped by pages of its own: 2 for K and V with all
            layers side by side (the paper's tensor slicing), 2 * num_layers for tensors per layer.
        page_tokens: tokens in a page, in place of the above. None: by `page_bytes`, or one block where
            `kv_bytes_per_token` is 0.
        max_regions: requests that can own a region at the same time.
        pool: see KVAllocator; num_blocks is physical.

    Attributes:
        num_virtual_blocks: the largest block id.
        num_pages: pages of the pool, each of `page_bytes` in each of `kv_tensors` tensors.
        page_tokens: whole tokens in a page.
        page_bytes: as given or chosen; None where pages are counted in tokens.
        kv_tensors: as given; None where `page_tokens` is given in its place.
        page_chosen: neither size was given, and the pool decided.
    """

    contiguous = True
    no_window = "pages are mapped from the front of a region, and stay until it is given back"

    def __init__(
        self,
        *,
        page_bytes: int | None = None,
        kv_tensors: int = 2,
        page_tokens: int | None = None,
        max_regions: int = 256,
        **pool: Any,
    ) -> None:
        super().__init__(**pool)
        num_blocks, block_size = self.num_blocks, self.block_size
        check_int("allocator.kv_tensors", kv_tensors, 1)
        self.kv_tensors = None if page_tokens is not None else kv_tensors
        self.page_chosen = page_tokens is None and page_bytes is None
        if self.page_chosen:
            page_bytes = self._largest_page(kv_tensors)
            page_tokens = block_size if page_bytes is None else None
        self.page_bytes = None if page_tokens is not None else page_bytes
        # Tokens per page as a fraction: `_page_size / _slot_size`.
        self._page_size, self._slot_size = self._sizes(page_bytes, kv_tensors, page_tokens)
        self.page_tokens = self._num_slots_in(1)
        self.num_pages = num_blocks * block_size * self._slot_size // self._page_size
        if not self.num_pages:
            raise ConfigError(
                f"a KV pool of {num_blocks * block_size} tokens is smaller than one page of "
                f"{self._page_size / self._slot_size:g}; lower allocator.page_bytes or allocator.page_tokens, or raise "
                "kv_cache.num_blocks"
            )
        check_int("allocator.max_regions", max_regions, 1)
        # Regions begin at a whole number of blocks and of pages; the null block has such a unit to itself.
        unit = math.lcm(block_size, self._page_size // math.gcd(self._page_size, self._slot_size))
        self._region_tokens = cdiv(self.max_model_len, unit) * unit
        self._first_block = unit // block_size
        self.num_virtual_blocks = self._first_block - 1 + max_regions * self._region_tokens // block_size
        self._num_free_pages = self.num_pages
        self._num_regions = max_regions
        self._free_regions = BlockPool(0, max_regions)
        self._regions: dict[Request, int] = {}  # their numbers

    def _largest_page(self, kv_tensors: int) -> int | None:
        """Bytes of the largest page that leaves the pool `MIN_PAGES`; None when the smallest is too large for that."""
        pool_bytes = self.num_blocks * self.block_size * self.kv_bytes_per_token
        page_bytes = LARGEST_PAGE
        while page_bytes >= SMALLEST_PAGE:
            if self.kv_bytes_per_token <= page_bytes * kv_tensors <= pool_bytes // MIN_PAGES:
                return page_bytes
            page_bytes //= 2
        return None

    def _sizes(self, page_bytes: int | None, kv_tensors: int, page_tokens: int | None) -> tuple[int, int]:
        """A page and a token in the same unit; one of the page's two sizes is given."""
        if page_bytes is None or page_tokens is not None:
            return check_int("allocator.page_tokens", self.block_size if page_tokens is None else page_tokens, 1), 1
        check_int("allocator.page_bytes", page_bytes, SMALLEST_PAGE, LARGEST_PAGE)
        if not self.kv_bytes_per_token:
            return self.block_size, 1
        if page_bytes * kv_tensors < self.kv_bytes_per_token:
            raise ConfigError(
                f"allocator.page_bytes={page_bytes} is too small for one token of {self.kv_bytes_per_token} bytes in "
                f"{kv_tensors} tensors; raise it to at least {cdiv(self.kv_bytes_per_token, kv_tensors)}"
            )
        return page_bytes * kv_tensors, self.kv_bytes_per_token

    def _num_slots_in(self, num_pages: int) -> int:
        """Whole tokens in so many pages side by side."""
        return num_pages * self._page_size // self._slot_size

    def _num_pages_of(self, num_tokens: int) -> int:
        """Pages side by side that hold so many tokens."""
        return cdiv(num_tokens * self._slot_size, self._page_size)

    @property
    def max_request_tokens(self) -> int:
        """All pages, or a whole region if that is less."""
        return min(self._num_slots_in(self.num_pages), self._region_tokens)

    def max_requests(self, num_tokens: int) -> int:
        """Whole pages each, and a region."""
        return min(self._num_regions, self.num_pages // self._num_pages_of(num_tokens))

    def allocate(self, req: Request, num_tokens: int, num_cached: int = 0) -> bool:  # noqa: ARG002
        """Take a region at the first call, and the missing pages."""
        num_mapped = self._num_pages_of(req.num_slots)
        need = self._num_pages_of(num_tokens) - num_mapped
        if num_tokens > self._region_tokens or need > self._num_free_pages:
            return False
        if req not in self._regions:
            if not self._free_regions.num_free:
                return False
            # The one given back last: its pages may still be mapped.
            self._regions[req] = self._free_regions.take(1)[0]
        if need > 0:
            self._num_free_pages -= need
            req.num_slots = self._num_slots_in(num_mapped + need)
        return True

    def free(self, req: Request) -> None:
        """Give the region and its pages back. Idempotent."""
        if req in self._regions:
            self._free_regions.give([self._regions.pop(req)])
            self._num_free_pages += self._num_pages_of(req.num_slots)
        req.num_slots = 0

    def block_table(self, req: Request) -> Sequence[int]:
        """The region's block ids as far as it is mapped: a range."""
        start = self._first_block + self._regions[req] * (self._region_tokens // self.block_size)
        return range(start, start + cdiv(req.num_slots, self.block_size))

    def slots_to_admit(self, head: QueueHead) -> int:
        """The head's tokens: the free pages hold them if, and only if, they have as many slots."""
        return head.num_tokens

    def has_hole(self, head: QueueHead) -> bool:  # noqa: ARG002
        """Whether a region is free: pages lie anywhere."""
        return self._free_regions.num_free > 0

    def count(self) -> KVUsage:
        """Raw counts, in physical memory. External: what never holds a whole token."""
        total = self.num_blocks * self.block_size
        owned, unused = sum([req.num_slots for req in self._regions]), self._num_slots_in(self._num_free_pages)
        return KVUsage(
            total=total,
            computed=sum([req.num_computed_tokens for req in self._regions]),
            owned=owned,
            external=total - owned - unused,
            free=unused,
        )
