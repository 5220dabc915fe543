"""Every allocator under the state machine of `allocator_machine`."""

from __future__ import annotations

from functools import partial

import pytest
from allocator_machine import MAX_LEN, SETTINGS, AllocatorMachine
from hypothesis.stateful import run_state_machine_as_test

from allocators.contiguous import ContiguousAllocator
from allocators.paged import PagedAllocator
from allocators.prefix import PrefixCachingAllocator
from allocators.radix import RadixAllocator
from allocators.virtual import VirtualAllocator


def audit_pages(machine: AllocatorMachine) -> None:
    """Each physical page backs one region; virtual tables are apart; slots are what is mapped."""
    alloc, live = machine.alloc, machine.live.values()
    assert isinstance(alloc, VirtualAllocator)
    pages = [page for req in live for page in alloc.page_table(req)]
    blocks = [block for req in live for block in alloc.block_table(req)]
    assert len(set(pages)) == len(pages) and set(pages) <= set(range(alloc.num_pages))
    assert len(set(blocks)) == len(blocks) and set(blocks) <= set(range(1, alloc.num_virtual_blocks + 1))
    assert alloc.usage().owned == len(pages) * alloc.page_tokens == sum(req.num_slots for req in live)


VIRTUAL = {"audit_more": audit_pages, "exact_tables": False}
CASES: dict[str, tuple[partial, dict]] = {
    f"{reservation}-{placement}": (
        partial(ContiguousAllocator, num_blocks=27, block_size=4, reservation=reservation, placement=placement),
        {},
    )
    for reservation, placement in [
        ("max", "first_fit"),
        ("pow2", "best_fit"),
        ("oracle", "buddy"),
        ("prompt", "first_fit"),
        ("prompt", "best_fit"),
        ("prompt", "buddy"),
    ]
}
CASES |= {
    "orca": (partial(ContiguousAllocator, num_blocks=90, block_size=1, reservation="pow2", placement="buddy"), {}),
    "paged": (partial(PagedAllocator, num_blocks=17, block_size=4), {}),
    "paged-1": (partial(PagedAllocator, num_blocks=60, block_size=1, swap_blocks=20), {}),
    "paged-swap": (partial(PagedAllocator, num_blocks=13, block_size=4, swap_blocks=9), {}),
    "paged-window": (
        partial(PagedAllocator, num_blocks=14, block_size=4, sliding_window=6, swap_blocks=9),
        {"window": 6},
    ),
    "prefix": (partial(PrefixCachingAllocator, num_blocks=17, block_size=4, swap_blocks=9), {}),
    "radix": (partial(RadixAllocator, num_blocks=17, block_size=4, swap_blocks=9), {}),
    "radix-1": (partial(RadixAllocator, num_blocks=60, block_size=1, swap_blocks=20), {}),
    "virtual": (partial(VirtualAllocator, num_blocks=27, block_size=4, page_tokens=6, max_regions=5), VIRTUAL),
    "virtual-3": (partial(VirtualAllocator, num_blocks=50, block_size=2, page_tokens=3, max_regions=9), VIRTUAL),
    "prefix-1": (partial(PrefixCachingAllocator, num_blocks=60, block_size=1), {}),
}


@pytest.mark.parametrize("name", CASES)
def test_state_machine(name: str) -> None:
    make, attributes = CASES[name]
    make = partial(make, max_model_len=MAX_LEN)
    machine = type(name, (AllocatorMachine,), {"make": staticmethod(make), **attributes})
    run_state_machine_as_test(machine, settings=SETTINGS)
