"""Paged blocks: forks and their copies, swap copies, the sliding window."""

from __future__ import annotations

from typing import Any

import pytest
from allocator_machine import make_request

from kvarena.allocators.paged import PagedAllocator
from kvarena.allocators.prefix import PrefixCachingAllocator
from kvarena.allocators.radix import RadixAllocator
from kvarena.engine.contract import NULL_BLOCK, BlockCopy, CopyKind
from kvarena.engine.errors import ConfigError
from kvarena.engine.ledger import check_usage
from kvarena.engine.request import Request


def make(num_blocks: int = 20, block_size: int = 4, **options: Any) -> PagedAllocator:
    return PagedAllocator(num_blocks=num_blocks, block_size=block_size, max_model_len=64, **options)


def admit(alloc: PagedAllocator, name: str, length: int, computed: int | None = None) -> Request:
    req = make_request(name, list(range(length)))
    assert alloc.allocate(req, length)
    req.num_computed_tokens = length if computed is None else computed
    return req


def table(alloc: PagedAllocator, req: Request) -> list[int]:
    return list(alloc.block_table(req))


def test_allocation_is_all_or_nothing() -> None:
    alloc = make(num_blocks=4)
    req = admit(alloc, "a", 9)
    assert req.num_slots == 12 and len(table(alloc, req)) == 3
    assert not alloc.allocate(req, 17) and req.num_slots == 12
    assert not alloc.allocate(make_request("b", [1] * 5), 5)
    assert alloc.allocate(req, 16) and alloc.num_free_blocks == 0


@pytest.mark.parametrize("block_size", [1, 7, 16, 256])
def test_any_block_size(block_size: int) -> None:
    alloc = PagedAllocator(num_blocks=300, block_size=block_size, max_model_len=512)
    req = make_request("a", [1] * 257)
    assert alloc.allocate(req, 257)
    assert req.num_slots == len(table(alloc, req)) * block_size >= 257 > req.num_slots - block_size


# ---- fork


@pytest.mark.parametrize("cls", [PagedAllocator, PrefixCachingAllocator])
def test_a_child_shares_full_blocks_and_gets_a_copy_of_the_one_that_it_writes(cls: type[PagedAllocator]) -> None:
    alloc = cls(num_blocks=20, block_size=4, max_model_len=64)
    parent = admit(alloc, "parent", 10)
    before = table(alloc, parent)
    child = make_request("child", parent.prompt_token_ids)
    assert alloc.fork(parent, child)
    assert child.num_computed_tokens == 9 and child.num_slots == parent.num_slots == 12
    assert table(alloc, parent) == before and table(alloc, child)[:2] == before[:2]
    assert alloc.drain_copies() == [BlockCopy(CopyKind.DEVICE, before[2], table(alloc, child)[2])]
    assert table(alloc, child)[2] not in before and len(table(alloc, child)) == 3
    usage = alloc.usage()
    check_usage(usage)
    assert (usage.owned, usage.computed, usage.shared_saved) == (16, 11, 8)
    assert alloc.allocate(child, 13) and alloc.allocate(parent, 12)
    assert alloc.drain_copies() == [] and table(alloc, parent) == before


@pytest.mark.parametrize("cls", [PagedAllocator, PrefixCachingAllocator, RadixAllocator])
@pytest.mark.parametrize(("num_shared", "num_full"), [(11, 2), (8, 2), (7, 1), (3, 0)])
def test_a_fork_may_share_any_of_the_positions_that_were_computed(
    cls: type[PagedAllocator], num_shared: int, num_full: int
) -> None:
    """What beams have in common may end in the output, or, of one that comes back, long before its end."""
    alloc = cls(num_blocks=20, block_size=4, max_model_len=64)
    parent = admit(alloc, "parent", 5)
    parent.output_token_ids += [50, 51, 52, 53, 54, 55, 56]
    assert alloc.allocate(parent, 12)
    parent.num_computed_tokens = 11
    child = make_request("child", parent.prompt_token_ids)
    child.output_token_ids += [50, 51, 52, 53, 54, 55, 57]
    assert alloc.forks and alloc.fork(parent, child, num_shared)
    before = table(alloc, parent)
    assert child.num_computed_tokens == num_shared
    assert table(alloc, child)[:num_full] == before[:num_full]
    half = num_shared % 4 > 0
    copies = [BlockCopy(CopyKind.DEVICE, before[num_full], table(alloc, child)[num_full])] if half else []
    assert alloc.drain_copies() == copies and len(table(alloc, child)) == num_full + half
    usage = alloc.usage()
    check_usage(usage)
    assert (usage.computed, usage.shared_saved) == (11 + num_shared - 4 * num_full, 4 * num_full)
    assert not alloc.fork(parent, make_request("early", [0] * 5), 12)  # its last position is not there yet
    alloc.free(parent)
    alloc.free(child)
    assert alloc.usage().owned == 0


def test_a_fork_of_whole_blocks_copies_nothing() -> None:
    alloc = make()
    parent = admit(alloc, "parent", 9)
    child = make_request("child", parent.prompt_token_ids)
    assert alloc.fork(parent, child) and parent.num_slots == 12 and child.num_slots == 8
    assert alloc.allocate(child, 9) and alloc.allocate(parent, 10)
    assert alloc.drain_copies() == []
    assert table(alloc, child)[:2] == table(alloc, parent)[:2] and table(alloc, child)[2] != table(alloc, parent)[2]


def test_a_shared_block_outlives_the_one_that_leaves_first() -> None:
    alloc = make(num_blocks=6)
    parent = admit(alloc, "parent", 9)
    first, second = (make_request(name, parent.prompt_token_ids) for name in ("first", "second"))
    assert alloc.fork(parent, first) and alloc.fork(parent, second)
    shared = table(alloc, parent)[:2]
    alloc.free(parent)
    assert alloc.num_free_blocks == 4 and table(alloc, first) == table(alloc, second) == shared
    alloc.free(second)
    assert alloc.num_free_blocks == 4 and alloc.usage().shared_saved == 0
    alloc.free(first)
    assert alloc.num_free_blocks == 6


@pytest.mark.parametrize("cls", [PagedAllocator, PrefixCachingAllocator])
def test_a_fork_without_room_for_the_copy_changes_nothing(cls: type[PagedAllocator]) -> None:
    alloc = cls(num_blocks=3, block_size=4, max_model_len=64)
    parent = admit(alloc, "parent", 10)
    child = make_request("child", parent.prompt_token_ids)
    before = alloc.usage()
    assert not alloc.fork(parent, child)
    assert alloc.usage() == before and alloc.drain_copies() == [] and child.num_slots == child.num_computed_tokens == 0
    alloc.free(parent)
    whole = admit(alloc, "whole", 9)
    assert alloc.fork(whole, make_request("its child", whole.prompt_token_ids))  # no half block, no room needed


def test_nothing_to_fork() -> None:
    alloc = make()
    child = make_request("child", [1] * 10)
    assert not alloc.fork(make_request("not admitted", [1] * 10), child)
    assert not alloc.fork(admit(alloc, "half", 10, computed=8), child)
    assert not alloc.fork(admit(alloc, "one token", 1), child)
    assert child.num_slots == child.num_computed_tokens == 0


def test_a_copy_for_a_child_that_is_gone_is_dropped() -> None:
    alloc = make()
    parent = admit(alloc, "parent", 10)
    child = make_request("child", parent.prompt_token_ids)
    assert alloc.fork(parent, child)
    alloc.free(child)
    assert alloc.drain_copies() == [] and alloc.usage().owned == 12


@pytest.mark.parametrize(("length", "computed"), [(2, 2), (2, 1), (10, 9)])
def test_a_parent_needs_no_more_than_the_shared_positions(length: int, computed: int) -> None:
    alloc = make()
    parent = admit(alloc, "parent", length, computed)
    child = make_request("child", parent.prompt_token_ids)
    assert alloc.fork(parent, child) and child.num_computed_tokens == length - 1


# ---- swap


def test_swap_in_takes_the_last_free_blocks() -> None:
    alloc = make(num_blocks=3, swap_blocks=2)
    req = admit(alloc, "a", 8)
    assert alloc.swap_out(req)
    admit(alloc, "b", 4)
    assert alloc.swap_in(req) and alloc.num_free_blocks == 0


def test_swap_out_and_in_copy_the_computed_blocks_in_order() -> None:
    alloc = make(num_blocks=6, swap_blocks=3)
    req = admit(alloc, "a", 16, computed=9)
    device = table(alloc, req)
    assert alloc.swap_out(req)
    assert req.num_slots == 0 and alloc.num_free_blocks == 6
    out = alloc.drain_copies()
    assert [c[:2] for c in out] == [(CopyKind.SWAP_OUT, block) for block in device[:3]]
    host = [copy.dst for copy in out]
    assert sorted(host) == [0, 1, 2]
    assert alloc.swap_in(req) and req.num_slots == 12
    assert alloc.drain_copies() == [
        BlockCopy(CopyKind.SWAP_IN, h, d) for h, d in zip(host, table(alloc, req), strict=True)
    ]


def test_swap_says_no_without_room_or_without_anything_to_save() -> None:
    alloc = make(num_blocks=6, swap_blocks=2)
    assert not alloc.swap_out(make_request("unknown", [1]))
    a = admit(alloc, "a", 12)
    assert not alloc.swap_out(a) and len(table(alloc, a)) == 3
    b = admit(alloc, "b", 4, computed=0)
    assert not alloc.swap_out(b)
    a.num_computed_tokens = 8
    assert alloc.swap_out(a)
    c = admit(alloc, "c", 20)
    assert not alloc.swap_in(a) and not alloc.swap_in(b)
    alloc.free(c)
    assert alloc.swap_in(a)


def test_a_host_block_is_handed_out_again_at_once_and_its_copies_stay_in_order() -> None:
    alloc = make(num_blocks=6, swap_blocks=2)
    a, b = admit(alloc, "a", 8), admit(alloc, "b", 8)
    assert alloc.swap_out(a)
    alloc.drain_copies()
    assert alloc.swap_in(a) and alloc.swap_out(b)
    copies = alloc.drain_copies()
    assert [copy.kind for copy in copies] == [CopyKind.SWAP_IN] * 2 + [CopyKind.SWAP_OUT] * 2
    assert {copy.src for copy in copies[:2]} == {copy.dst for copy in copies[2:]}  # read before they are written


def test_free_of_a_swapped_request_gives_host_blocks_back() -> None:
    alloc = make(num_blocks=6, swap_blocks=2)
    for name in "abc":
        req = admit(alloc, name, 8)
        assert alloc.swap_out(req)
        alloc.free(req)
        alloc.drain_copies()
        assert not alloc.swap_in(req)


def test_copies_for_a_request_that_is_gone_are_dropped() -> None:
    """Swapped in, then no room for the next token: the freed blocks get new owners before the copies are made."""
    alloc = make(num_blocks=2, swap_blocks=4)
    a, b = admit(alloc, "a", 4), admit(alloc, "b", 4)
    assert alloc.swap_out(a) and alloc.swap_out(b)
    alloc.drain_copies()
    assert alloc.swap_in(a)
    alloc.free(a)
    assert alloc.swap_in(b)
    (copy,) = alloc.drain_copies()
    assert copy.dst == table(alloc, b)[0]


def test_a_cancelled_copy_that_another_one_reads_is_kept() -> None:
    alloc = make(num_blocks=6, swap_blocks=4)
    parent = admit(alloc, "parent", 6)
    assert alloc.swap_out(parent)
    alloc.drain_copies()
    assert alloc.swap_in(parent)
    child = make_request("child", parent.prompt_token_ids)
    assert alloc.fork(parent, child) and alloc.allocate(child, 6)
    source = table(alloc, parent)[1]
    alloc.free(parent)
    kinds = [(copy.kind, copy.dst) for copy in alloc.drain_copies()]
    assert kinds == [
        (CopyKind.SWAP_IN, table(alloc, child)[0]),
        (CopyKind.SWAP_IN, source),
        (CopyKind.DEVICE, table(alloc, child)[1]),
    ]


def test_swap_gib_becomes_blocks() -> None:
    alloc = make(swap_gib=1.0, kv_bytes_per_token=2**20)
    assert alloc.num_host_blocks == 256
    with pytest.raises(ConfigError, match=r"set allocator\.swap_blocks instead"):
        make(swap_gib=1.0)
    with pytest.raises(ConfigError, match="set one of them"):
        make(swap_gib=1.0, swap_blocks=3, kv_bytes_per_token=4)
    with pytest.raises(ConfigError, match=r"allocator\.swap_gib=(-1|inf) must be a finite number of at least 0"):
        make(swap_gib=-1)
    with pytest.raises(ConfigError, match="finite"):
        make(swap_gib=float("inf"), kv_bytes_per_token=4)


# ---- sliding window


def test_the_window_keeps_exactly_the_positions_that_the_next_token_sees() -> None:
    alloc = make(block_size=4, sliding_window=6)
    req = admit(alloc, "a", 16, computed=0)
    before = table(alloc, req)
    for computed, num_slid in ((8, 0), (9, 1), (12, 1), (13, 2), (16, 2)):
        # The query at position `computed` sees computed - 5 .. computed.
        req.num_computed_tokens = computed
        alloc.commit(req)
        assert table(alloc, req) == [NULL_BLOCK] * num_slid + before[num_slid:]
        assert alloc.num_free_blocks == 16 + num_slid
        usage = alloc.usage()
        assert (usage.owned, usage.computed) == (16 - 4 * num_slid, computed - 4 * num_slid)
    alloc.free(req)
    assert alloc.num_free_blocks == 20


def test_a_window_survives_swap_and_fork() -> None:
    alloc = make(block_size=4, sliding_window=6, swap_blocks=4)
    req = admit(alloc, "a", 14)
    alloc.commit(req)
    child = make_request("child", req.prompt_token_ids)
    assert alloc.fork(req, child) and table(alloc, child)[:2] == [NULL_BLOCK] * 2
    assert alloc.swap_out(req)
    kinds = [copy.kind for copy in alloc.drain_copies()]
    assert kinds == [CopyKind.DEVICE, CopyKind.SWAP_OUT, CopyKind.SWAP_OUT]
    assert alloc.swap_in(req) and req.num_slots == 16
    assert table(alloc, req)[:2] == [NULL_BLOCK] * 2 and NULL_BLOCK not in table(alloc, req)[2:]
    alloc.free(req)
    alloc.free(child)
    assert alloc.num_free_blocks == 20 and alloc.usage().computed == 0


def test_a_parent_that_slid_past_its_prompt_cannot_be_forked() -> None:
    alloc = make(block_size=4, sliding_window=6)
    req = admit(alloc, "a", 8)
    req.output_token_ids += range(12)
    assert alloc.allocate(req, 20)
    req.num_computed_tokens = 19
    alloc.commit(req)
    assert not alloc.fork(req, make_request("child", req.prompt_token_ids))


# ---- configuration


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_blocks": 0}, r"a KV pool of 0 blocks of 4 tokens holds nothing; raise kv_cache\.num_blocks"),
        ({"block_size": 0}, r"allocator\.block_size=0 must be an integer in \[1, 256\]"),
        ({"block_size": 257}, r"allocator\.block_size=257 must be an integer in \[1, 256\]"),
        ({"block_size": 1.5}, r"allocator\.block_size=1\.5 must be an integer"),
        ({"sliding_window": 0}, r"allocator\.sliding_window=0 must be an integer of at least 1"),
        ({"swap_blocks": -1}, r"allocator\.swap_blocks=-1 must be an integer of at least 0"),
    ],
)
def test_bad_sizes(options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make(**options)
