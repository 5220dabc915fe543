"""Every registered allocator: built from its file, at any pool size, with the contract's corner answers."""

from __future__ import annotations

import sys
import time

import pytest
from allocator_machine import check_whole, make_request

from kvarena.engine.contract import KVAllocator, cdiv
from kvarena.experiments.settings.strategies import build_allocator, strategy_names, strategy_options

NAMES = strategy_names("allocator")


def make(name: str, num_blocks: int, max_model_len: int = 64) -> KVAllocator:
    return build_allocator(name, num_blocks=num_blocks, max_model_len=max_model_len)


def test_the_field_is_there() -> None:
    assert set(NAMES) >= {
        "contiguous", "orca_max", "orca_pow2", "orca_oracle", "paged", "paged_prefix", "radix", "virtual",
    }  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_a_life(name: str) -> None:
    alloc = make(name, 256)
    req = make_request("a", [1] * 20)
    assert alloc.match_prefix(req) == 0 and not alloc.swap_in(req)
    alloc.free(req)
    assert alloc.allocate(req, 20)
    assert req.num_slots >= 20 and len(alloc.block_table(req)) >= cdiv(20, alloc.block_size)
    req.num_computed_tokens = 20
    alloc.commit(req)
    usage = alloc.usage()
    assert usage.computed == 20 <= usage.owned == req.num_slots
    alloc.free(req)
    alloc.free(req)
    assert req.num_slots == 0
    check_whole(alloc)
    alloc.clear_cache()  # type: ignore[attr-defined]
    assert alloc.usage().cached == 0


@pytest.mark.parametrize("name", NAMES)
def test_a_pool_of_ten_million_blocks_costs_nothing_to_make(name: str) -> None:
    start = time.process_time()
    alloc = make(name, 10**7, max_model_len=2048)
    req = make_request("a", [1] * 500)
    assert alloc.allocate(req, 500)
    alloc.free(req)
    assert time.process_time() - start < 0.5
    assert sum(sys.getsizeof(part) for part in vars(alloc).values()) < 10_000


@pytest.mark.parametrize("name", NAMES)
def test_the_file_explains_its_options(name: str) -> None:
    options = strategy_options("allocator", name)
    assert options["_target_"].startswith("kvarena.allocators.") and "block_size" in options
