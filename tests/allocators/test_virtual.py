"""Virtual contiguity: page sizes from the model, regions, and physical accounting."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from allocator_machine import make_request

from kvarena.allocators.contiguous import ContiguousAllocator
from kvarena.allocators.virtual import VirtualAllocator
from kvarena.engine.contract import QueueHead
from kvarena.engine.errors import ConfigError

KIB = 1024


def make(num_blocks: int = 32, block_size: int = 4, **options: Any) -> VirtualAllocator:
    return VirtualAllocator(num_blocks=num_blocks, block_size=block_size, max_model_len=64, **options)


@pytest.mark.parametrize(
    ("page_bytes", "kv_tensors", "want"),
    [
        # Llama-3-8B in 16 bits: 8 KV heads of 128, 32 layers, 128 KiB a token. The paper's Table: 1024 and 32.
        (2048 * KIB, 64, 1024),
        (64 * KIB, 64, 32),
        (2048 * KIB, 2, 32),
        (64 * KIB, 2, 1),  # one token, exactly
    ],
)
def test_page_tokens_depend_on_the_model(page_bytes: int, kv_tensors: int, want: int) -> None:
    alloc = make(num_blocks=1000, kv_bytes_per_token=128 * KIB, page_bytes=page_bytes, kv_tensors=kv_tensors)
    assert alloc.page_tokens == want
    assert alloc.num_pages == 4000 // want


@pytest.mark.parametrize(
    ("num_blocks", "token_bytes", "page_bytes", "num_pages"),
    [
        (1024, 2 * KIB, 128 * KIB, 128),  # the demo model in its default pool: 2 MiB would be 8 pages
        (1023, 2 * KIB, 64 * KIB, 255),
        (512, 2 * KIB, 64 * KIB, 128),
        (511, 2 * KIB, None, 511),  # not 128 of the smallest: one block each
        (100_000, 128 * KIB, 2048 * KIB, 50_000),
        (64, 256 * KIB, 1024 * KIB, 128),
        (8, 128 * KIB, 64 * KIB, 128),  # one token a page
        (64, 0, None, 64),
    ],
)
def test_pages_are_chosen_to_fit_the_pool(
    num_blocks: int, token_bytes: int, page_bytes: int | None, num_pages: int
) -> None:
    alloc = make(num_blocks=num_blocks, block_size=16, kv_bytes_per_token=token_bytes)
    assert (alloc.page_bytes, alloc.num_pages) == (page_bytes, num_pages) and alloc.page_chosen
    given = make(num_blocks=num_blocks, block_size=16, kv_bytes_per_token=token_bytes, page_tokens=16)
    assert not given.page_chosen


def test_a_token_may_lie_across_two_pages() -> None:
    # Qwen3-0.6B in 16 bits: 56 KiB a token in each tensor, 36 4/7 tokens in a page of 2 MiB.
    alloc = make(num_blocks=64, block_size=4, kv_bytes_per_token=112 * KIB, page_bytes=2048 * KIB)
    assert (alloc.page_tokens, alloc.num_pages) == (36, 7)
    req, other = (make_request(name, [1] * 60) for name in "ab")
    sizes = []
    for num_tokens in (36, 37, 64):
        assert alloc.allocate(req, num_tokens)
        sizes.append(req.num_slots)
    assert sizes == [36, 73, 73]
    assert not alloc.allocate(make_request("c", [1] * 60), 36 * 7)
    assert alloc.allocate(other, 1)
    assert [alloc.block_table(r)[0] * 4 * 56 * KIB % (2048 * KIB) for r in (req, other)] == [0, 0]
    usage = alloc.usage()
    assert (usage.total, usage.owned, usage.free, usage.external) == (256, 73 + 36, 146, 1)
    assert alloc.max_request_tokens == 256
    alloc.free(req)
    alloc.free(other)
    assert alloc.usage().free == 256


def test_pages_are_mapped_on_demand_and_unmapped_together() -> None:
    alloc = make(page_tokens=8)
    req = make_request("a", [1] * 20)
    assert alloc.num_pages == 16 and alloc.allocate(req, 3)
    assert req.num_slots == 8 and list(alloc.block_table(req)) == [2, 3]
    assert alloc.allocate(req, 8) and req.num_slots == 8
    assert alloc.allocate(req, 17) and req.num_slots == 24 and list(alloc.block_table(req)) == [2, 3, 4, 5, 6, 7]
    assert alloc.usage().owned == 24 and alloc.usage().free == 104
    alloc.free(req)
    alloc.free(req)
    assert req.num_slots == 0 and alloc.usage().free == 128


def test_regions_start_at_whole_blocks_and_pages_and_never_overlap() -> None:
    alloc = make(page_tokens=6, max_regions=3)
    reqs = [make_request(str(i), [1] * 60) for i in range(3)]
    assert all(alloc.allocate(req, 30) for req in reqs)
    starts = sorted(alloc.block_table(req)[0] * 4 for req in reqs)
    assert all(start % 12 == 0 for start in starts)
    assert all(b - a >= 64 for a, b in pairwise(starts))
    assert max(max(alloc.block_table(req)) for req in reqs) <= alloc.num_virtual_blocks


def test_all_or_nothing_when_pages_or_regions_run_out() -> None:
    alloc = make(num_blocks=8, page_tokens=8, max_regions=2)
    a, b, c = (make_request(name, [1] * 20) for name in "abc")
    assert alloc.allocate(a, 9) and not alloc.allocate(b, 17)
    assert alloc.allocate(b, 8) and not alloc.allocate(c, 1)  # one page is free, no region is
    usage = alloc.usage(QueueHead(c, 8))
    assert (usage.owned, usage.external, usage.shortage, usage.free) == (24, 8, 0, 0)
    usage = alloc.usage(QueueHead(c, 9))
    assert (usage.owned, usage.external, usage.shortage, usage.free) == (24, 0, 8, 0)
    assert alloc.usage().free == 8
    assert not alloc.allocate(a, 65) and a.num_slots == 16
    alloc.free(b)
    assert alloc.allocate(c, 16)


def test_slots_beyond_the_last_whole_page_are_external() -> None:
    alloc = make(num_blocks=5, page_tokens=8)
    usage = alloc.usage()
    assert (usage.total, usage.external, usage.free) == (20, 4, 16)
    assert alloc.max_request_tokens == 16
    assert make(num_blocks=100, page_tokens=8).max_request_tokens == 64


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"page_bytes": 4096}, r"allocator\.page_bytes=4096 must be an integer in \[65536, 2097152\]"),
        ({"page_tokens": 0}, r"allocator\.page_tokens=0 must be an integer of at least 1"),
        ({"max_regions": 0}, r"allocator\.max_regions=0 must be an integer of at least 1"),
        ({"page_tokens": 129}, "a KV pool of 128 tokens is smaller than one page of 129"),
        ({"page_bytes": 65536, "kv_bytes_per_token": 2**20}, "too small for one token of 1048576 bytes in 2 tensors"),
        ({"sliding_window": 8}, "pages are mapped from the front of a region"),
    ],
)
def test_bad_options(options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make(**options)


def test_contiguous_refuses_a_window_too() -> None:
    with pytest.raises(ConfigError, match="the head of a region cannot be given back"):
        ContiguousAllocator(num_blocks=9, block_size=4, max_model_len=64, sliding_window=8)
