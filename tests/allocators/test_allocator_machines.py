"""Every allocator under the state machine of `allocator_machine`."""

from __future__ import annotations

from functools import partial

import pytest
from allocator_machine import MAX_LEN, SETTINGS, AllocatorMachine, registered_cases
from hypothesis.stateful import run_state_machine_as_test

from kvarena.allocators.contiguous import ContiguousAllocator
from kvarena.allocators.paged import PagedAllocator
from kvarena.allocators.prefix import PrefixCachingAllocator
from kvarena.allocators.radix import RadixAllocator
from kvarena.allocators.virtual import VirtualAllocator


def audit_pages(machine: AllocatorMachine) -> None:
    """Virtual tables are apart; slots are what is mapped, and no more than the pages hold."""
    alloc, live = machine.alloc, machine.live.values()
    assert isinstance(alloc, VirtualAllocator)
    blocks = [block for req in live for block in alloc.block_table(req)]
    assert len(set(blocks)) == len(blocks) and set(blocks) <= set(range(1, alloc.num_virtual_blocks + 1))
    usage = alloc.usage()
    assert usage.owned == sum(req.num_slots for req in live)
    assert usage.owned + usage.free <= usage.total < alloc.page_tokens + usage.owned + usage.free + len(live) + 1


VIRTUAL = {"audit_more": audit_pages}
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
    # 4 2/3 tokens a page.
    "virtual-fraction": (
        partial(
            VirtualAllocator,
            num_blocks=30,
            block_size=4,
            kv_bytes_per_token=3 * 2**15,
            page_bytes=7 * 2**16,
            kv_tensors=1,
            max_regions=5,
        ),
        VIRTUAL,
    ),
    "prefix-1": (partial(PrefixCachingAllocator, num_blocks=60, block_size=1), {}),
}
CASES |= registered_cases(known={make.func for make, _ in CASES.values()})


@pytest.mark.parametrize("name", CASES)
def test_state_machine(name: str) -> None:
    make, attributes = CASES[name]
    make = partial(make, max_model_len=MAX_LEN)
    machine = type(name, (AllocatorMachine,), {"make": staticmethod(make), **attributes})
    run_state_machine_as_test(machine, settings=SETTINGS)
