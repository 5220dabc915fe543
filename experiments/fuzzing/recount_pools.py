"""What nobody owns, recounted: the free blocks by their ids, and what the head of the queue can make of them.

One class per geometry: blocks anywhere, regions of consecutive blocks, regions of mapped pages. Each states for
itself, from configured options, what admission asks for, and uses neither the allocators' counters nor their code. Of
an allocator with a rule of its own (a class that is not of this project and writes `slots_to_admit`, `has_hole` or
`region_extent`) the rule is taken as said.
"""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from itertools import groupby
from math import ceil, floor
from typing import Any, NamedTuple

from kvarena.allocators.contiguous import ContiguousAllocator
from kvarena.allocators.paged import PagedAllocator
from kvarena.allocators.prefix import PrefixCachingAllocator
from kvarena.allocators.radix import RadixAllocator
from kvarena.engine.contract import NULL_BLOCK, KVAllocator
from kvarena.engine.errors import EngineError
from kvarena.engine.request import Request, RequestStatus
from kvarena.schedulers.base import Scheduler


class Owner(NamedTuple):
    """A request that has a block table: its blocks, positions that hold KV, and positions that its blocks hold."""

    req: Request
    table: list[int]
    num_filled: int
    num_slots: int


class Unowned(NamedTuple):
    """Slots that nobody owns, by class."""

    external: int
    shortage: int
    cached: int
    free: int


def split(lost: int, cached: int, free: int, need: int | None, lies_well: bool) -> Unowned:
    """All free slots go to one class. `need`: slots that the head takes; None: nobody waits."""
    if need is not None and need > free + cached:
        return Unowned(lost, free, cached, 0)
    if need is not None and not lies_well:
        return Unowned(lost + free, 0, cached, 0)
    return Unowned(lost, 0, cached, free)


class BlockPool:
    """Blocks anywhere, perhaps shared, cached, swapped out or slid out of a window."""

    def __init__(self, allocator: KVAllocator, scheduler: Scheduler, options: Mapping[str, Any]) -> None:
        self._allocator, self._scheduler = allocator, scheduler
        self._size = allocator.block_size
        self._ids = set(range(1, allocator.num_blocks + 1))
        self._window: int | None = options.get("sliding_window")
        self._forks = type(allocator).fork is not KVAllocator.fork
        self._swapped: dict[Request, int] = {}  # blocks that had slid out of the window before
        # Block -> whose tokens, and which of its full blocks: of a beam, whose tokens may change, these themselves.
        self._contents: dict[int, tuple[Request | tuple[str, list[int]], int]] = {}

    def owner(self, req: Request, table: list[int]) -> Owner:
        """Take a table in."""
        num_filled = req.num_computed_tokens
        if num_filled > len(table) * self._size:
            raise EngineError(f"request {req.request_id!r} has filled {num_filled} slots of {len(table)} blocks")
        if self._allocator.reads_tokens:
            # What comes up for a request may be cached before a step shows it filled: it is preempted in between.
            num_known = req.num_tokens if req in self._scheduler.loading else num_filled
            for i in range(num_known // self._size):
                known = req if req.search is None else (req.cache_salt, req.identities(0, (i + 1) * self._size))
                self._contents[table[i]] = known, i
        return Owner(req, table, num_filled, len(table) * self._size)

    def left(self, req: Request, table: list[int]) -> None:
        """`req` gave its blocks back; its last table tells what a swap had to carry."""
        self._swapped[req] = _leading_nulls(table)

    def unowned(self, owners: list[Owner]) -> Unowned:
        """Split what no table names."""
        taken = {block for owner in owners for block in owner.table} - {NULL_BLOCK}
        landing = set(self._allocator.landing_blocks())
        if landing & taken:
            raise EngineError(f"blocks are owned while copies of others are still to arrive: {sorted(landing & taken)}")
        taken |= landing
        cached = set(self._allocator.cached_blocks())
        if not taken <= self._ids or not cached <= self._ids or taken & cached:
            raise EngineError(f"blocks outside the pool, or owned and cached: {sorted(taken)}, {sorted(cached)}")
        free = len(self._ids) - len(taken) - len(cached)
        size = self._size
        if says_itself(self._allocator, "slots_to_admit", "has_hole"):
            return split_as_said(self._allocator, self._scheduler, 0, len(cached) * size, free * size)
        need = self._need(cached, free + len(cached))
        return split(0, len(cached) * size, free * size, None if need is None else need * size, lies_well=True)

    def _need(self, cached: set[int], available: int) -> int | None:
        """Blocks that the head's admission takes."""
        head = self._scheduler.head()
        if head is None:
            return None
        need = ceil(tokens_to_admit(head, self._scheduler) / self._size)
        if head.status is RequestStatus.SWAPPED:
            return need - self._swapped[head]
        parent, num_shared = self._shared(head)
        if parent is not None and self._forks and self._scheduler.shares_prompts:
            nulls = _leading_nulls(list(self._allocator.block_table(parent)))
            needed_from = 0 if self._window is None else max(0, num_shared - self._window + 1) // self._size
            if num_shared >= 1 and nulls <= needed_from:
                return need - num_shared // self._size
        if need <= available:  # it fits without a hit
            return need
        num_hits = self._allocator.match_prefix(head) // self._size
        return need - sum(not self._is_cached(head, i, cached) for i in range(num_hits))

    def _shared(self, head: Request) -> tuple[Request | None, int]:
        """The running request that the head would fork, and how many of its positions."""
        if head.search is None:
            parent = head.parent if head.parent in self._scheduler.decoding else None
            return parent, head.num_prompt_tokens - 1
        tokens, found = head.token_ids(0, head.num_tokens), [(0, 0, head)]
        for req in [*self._scheduler.decoding, *self._scheduler.holding]:
            if req.search is head.search:
                pairs = zip(tokens, req.token_ids(0, req.num_tokens), strict=False)
                common = next((i for i, (one, two) in enumerate(pairs) if one != two), len(tokens))
                found.append((min(common, req.num_computed_tokens, len(tokens) - 1), -req.beam, req))
        num_shared, _, parent = max(found, key=lambda one: one[:2])
        return (parent, num_shared) if num_shared else (None, 0)

    def _is_cached(self, head: Request, index: int, cached: set[int]) -> bool:
        """Whether the head's full block number `index` is found in a block that no request owns."""
        wanted = head.cache_salt, head.identities(0, (index + 1) * self._size)
        for block in cached:
            known, i = self._contents[block]
            if isinstance(known, Request):
                known = known.cache_salt, known.identities(0, (i + 1) * self._size)
            if i == index and known == wanted:
                return True
        return False


class RegionPool:
    """One run of consecutive blocks per request, in holes or in a buddy system."""

    def __init__(self, allocator: KVAllocator, scheduler: Scheduler, options: Mapping[str, Any]) -> None:
        self._allocator, self._scheduler = allocator, scheduler
        self._size, self._num_blocks = allocator.block_size, allocator.num_blocks
        self._buddy = options.get("placement") == "buddy"
        self._reservation = options.get("reservation", "prompt")

    def owner(self, req: Request, table: list[int]) -> Owner:
        """Take a table in."""
        if table != list(range(table[0], table[0] + len(table))):
            raise EngineError(f"request {req.request_id!r} owns a region in pieces: {table}")
        return Owner(req, table, req.num_computed_tokens, len(table) * self._size)

    def left(self, req: Request, table: list[int]) -> None:
        """Nothing to remember."""

    def unowned(self, owners: list[Owner]) -> Unowned:
        """Split what no region covers; what a buddy region covers beyond its blocks is lost."""
        free = set(range(1, self._num_blocks + 1))
        lost = 0
        for owner in owners:
            extent = self._extent(len(owner.table))
            region = set(range(owner.table[0], owner.table[0] + extent))
            if not region <= free:
                raise EngineError(f"the region of request {owner.req.request_id!r} is not its own: {owner.table}")
            free -= region
            lost += extent - len(owner.table)
        size = self._size
        if says_itself(self._allocator, "slots_to_admit", "has_hole"):
            return split_as_said(self._allocator, self._scheduler, lost * size, 0, len(free) * size)
        head = self._scheduler.head()
        need = None if head is None else self._need(head)
        lies_well = need is None or self._fits(free, need)
        return split(lost * size, 0, len(free) * size, None if need is None else need * size, lies_well)

    def _extent(self, num_blocks: int) -> int:
        if says_itself(self._allocator, "region_extent"):
            return self._allocator.region_extent(num_blocks)
        extent = 1
        while extent < num_blocks:
            extent *= 2
        return extent if self._buddy else num_blocks

    def _need(self, head: Request) -> int:
        asked = tokens_to_admit(head, self._scheduler)
        output = head.sampling.max_tokens if head.oracle_output_len is None else head.oracle_output_len
        wanted = {
            "max": self._scheduler.max_model_len,
            "pow2": head.num_prompt_tokens + next(2**i for i in range(64) if 2**i >= output),
            "oracle": head.num_prompt_tokens + output,
            "prompt": head.num_tokens,
        }[self._reservation]
        largest = max(2**i for i in range(64) if 2**i <= self._num_blocks) if self._buddy else self._num_blocks
        return ceil(max(asked, min(wanted, self._scheduler.max_model_len, largest * self._size)) / self._size)

    def _fits(self, free: set[int], need: int) -> bool:
        if self._buddy:
            extent = self._extent(need)
            starts = range(1, self._num_blocks + 2 - extent, extent)
            return any(all(start + i in free for i in range(extent)) for start in starts)
        runs = (len(list(run)) for _, run in groupby(enumerate(sorted(free)), lambda pair: pair[1] - pair[0]))
        return max(runs, default=0) >= need


class PagePool:
    """Regions of virtual memory with whole pages mapped from the front."""

    def __init__(self, allocator: KVAllocator, scheduler: Scheduler, options: Mapping[str, Any]) -> None:
        self._scheduler = scheduler
        self._num_slots = allocator.num_blocks * allocator.block_size
        self._size = allocator.block_size
        self._max_regions: int = options["max_regions"]
        tokens, token_bytes = options["page_tokens"], getattr(allocator, "kv_bytes_per_token", 0)
        if tokens is None and token_bytes:
            self._page = Fraction(options["page_bytes"] * options["kv_tensors"], token_bytes)
        else:
            self._page = Fraction(tokens or self._size)  # tokens of a page

    def owner(self, req: Request, table: list[int]) -> Owner:
        """Take a table in: the promised slots must be whole pages, and the table must reach them all."""
        num_slots = req.num_slots
        if floor(self._pages(num_slots) * self._page) != num_slots or len(table) != ceil(num_slots / self._size):
            raise EngineError(
                f"request {req.request_id!r} has {num_slots} slots in {len(table)} blocks: not whole pages"
            )
        return Owner(req, table, req.num_computed_tokens, num_slots)

    def left(self, req: Request, table: list[int]) -> None:
        """Nothing to remember."""

    def _pages(self, num_slots: int) -> int:
        return ceil(num_slots / self._page)

    def unowned(self, owners: list[Owner]) -> Unowned:
        """Split the pages that nobody mapped; what holds no whole token is lost."""
        num_pages = floor(self._num_slots / self._page) - sum(self._pages(owner.num_slots) for owner in owners)
        free = floor(num_pages * self._page)
        lost = self._num_slots - free - sum(owner.num_slots for owner in owners)
        head = self._scheduler.head()
        need = None if head is None else tokens_to_admit(head, self._scheduler)
        if need is not None and (need > free) != (self._pages(need) > num_pages):
            raise EngineError(f"{need} tokens and {num_pages} pages of {self._page} disagree on whether they fit")
        return split(lost, 0, free, need, lies_well=len(owners) < self._max_regions)


Pool = BlockPool | RegionPool | PagePool


def pool_of(allocator: KVAllocator, scheduler: Scheduler, options: Mapping[str, Any]) -> Pool:
    """The geometry of an allocator, by its options."""
    kind: type[Pool] = PagePool if "page_tokens" in options else RegionPool if allocator.contiguous else BlockPool
    return kind(allocator, scheduler, options)


def tokens_to_admit(head: Request, scheduler: Scheduler) -> int:
    """Positions that admission asks for: all that the head may ever have where nobody is preempted."""
    if scheduler.preemption == "none":
        return head.num_prompt_tokens + head.sampling.max_tokens
    return head.num_prompt_tokens + len(head.output_token_ids)


def says_itself(allocator: KVAllocator, *rules: str) -> bool:
    """Whether a class that nothing here knows the rules of writes one of them."""
    known = (KVAllocator, PagedAllocator, PrefixCachingAllocator, RadixAllocator, ContiguousAllocator)
    owners = [next(cls for cls in type(allocator).__mro__ if rule in vars(cls)) for rule in rules]
    return not all(owner in known for owner in owners)


def split_as_said(allocator: KVAllocator, scheduler: Scheduler, lost: int, cached: int, free: int) -> Unowned:
    """Split by what the allocator says of the head of the queue."""
    head = scheduler.queue_head()
    if head is None:
        return split(lost, cached, free, None, lies_well=True)
    return split(lost, cached, free, allocator.slots_to_admit(head), allocator.has_hole(head))


def _leading_nulls(table: list[int]) -> int:
    return next((i for i, block in enumerate(table) if block != NULL_BLOCK), len(table))
