"""The radix tree: edges split and grow, paths are locked, leaves are evicted by age."""

from __future__ import annotations

import pytest
from allocator_machine import make_request

from kvarena.allocators.radix import RadixAllocator
from kvarena.allocators.radix_tree import RadixNode
from kvarena.engine.contract import BlockCopy, CopyKind
from kvarena.engine.errors import ConfigError, EngineError
from kvarena.engine.ledger import check_usage
from kvarena.engine.request import Request

BLOCK = 4


def make(num_blocks: int = 20) -> RadixAllocator:
    return RadixAllocator(num_blocks=num_blocks, block_size=BLOCK, max_model_len=64, eviction="lru")


def compute(alloc: RadixAllocator, name: str, tokens: list[int], salt: str = "") -> Request:
    req = make_request(name, tokens, salt=salt)
    found = alloc.match_prefix(req)
    assert alloc.allocate(req, len(tokens), found)
    req.num_computed_tokens = len(tokens)
    alloc.commit(req)
    return req


def hit(alloc: RadixAllocator, tokens: list[int], salt: str = "") -> int:
    return alloc.match_prefix(make_request("probe", tokens, salt=salt))


def shape(node: RadixNode) -> dict:
    """Blocks per edge and locks, as a nested dict."""
    return {(len(c.blocks), c.num_locks, *c.tokens[:1]): shape(c) for c in node.children.values()}


def test_edges_split_where_requests_part() -> None:
    alloc = make()
    compute(alloc, "a", [1] * 12)
    assert shape(alloc._index.root) == {(3, 1, 1): {}}
    assert hit(alloc, [1] * 8 + [2] * 9) == 8
    assert shape(alloc._index.root) == {(3, 1, 1): {}}  # matching changes nothing
    b = compute(alloc, "b", [1] * 8 + [2] * 8)
    assert shape(alloc._index.root) == {(2, 2, 1): {(1, 1, 1): {}, (2, 1, 2): {}}}
    usage = alloc.usage()
    check_usage(usage)
    assert (usage.owned, usage.computed, usage.shared_saved) == (20, 20, 8)
    alloc.free(b)
    assert shape(alloc._index.root) == {(2, 1, 1): {(1, 1, 1): {}, (2, 0, 2): {}}}
    assert alloc.usage().cached == 8 and alloc.usage().shared_saved == 0


def test_a_growing_request_lengthens_its_own_edge() -> None:
    alloc = make()
    a = compute(alloc, "a", [1] * 4)
    for length in (8, 12, 16):
        a.output_token_ids += [2] * 4
        assert alloc.allocate(a, length)
        a.num_computed_tokens = length
        alloc.commit(a)
    assert shape(alloc._index.root) == {(4, 1, 1): {}}
    assert hit(alloc, [1] * 4 + [2] * 13) == 16


def test_an_edge_that_two_stand_on_does_not_grow() -> None:
    alloc = make()
    a = compute(alloc, "a", [1] * 5)
    compute(alloc, "b", [1] * 5)
    a.output_token_ids += [2] * 3
    assert alloc.allocate(a, 8)
    a.num_computed_tokens = 8
    alloc.commit(a)
    assert shape(alloc._index.root) == {(1, 2, 1): {(1, 1, 1): {}}}


def test_duplicates_merge_at_commit() -> None:
    alloc = make(num_blocks=6)
    a, b = make_request("a", [1] * 9), make_request("b", [1] * 9)
    assert alloc.allocate(a, 9) and alloc.allocate(b, 9) and alloc.num_free_blocks == 0
    for req in (a, b):
        req.num_computed_tokens = 9
        alloc.commit(req)
    assert list(alloc.block_table(a))[:2] == list(alloc.block_table(b))[:2]
    assert alloc.num_free_blocks == 2 and alloc.usage().shared_saved == 8
    alloc.free(a)
    assert hit(alloc, [1] * 10) == 8 and alloc.usage().cached == 0
    alloc.free(b)
    assert alloc.usage().cached == 8


def test_locked_paths_survive_and_leaves_go_by_age_tail_first() -> None:
    alloc = make(num_blocks=7)
    keeper = compute(alloc, "keeper", [1] * 4)
    alloc.free(compute(alloc, "old", [1] * 4 + [2] * 8))
    alloc.free(compute(alloc, "new", [3] * 12))
    assert alloc.num_free_blocks == 6 and alloc.usage().cached == 20
    probes = ([1] * 5, [1] * 4 + [2] * 9, [3] * 13)
    filler = make_request("f", [9] * 24)
    for num_tokens, want in ((4, (4, 12, 12)), (8, (4, 8, 12)), (12, (4, 4, 12)), (16, (4, 4, 8)), (24, (4, 4, 0))):
        assert alloc.allocate(filler, num_tokens)
        assert tuple(hit(alloc, probe) for probe in probes) == want
    assert not alloc.allocate(filler, 25)
    alloc.free(keeper)
    assert alloc.allocate(filler, 25) and hit(alloc, [1] * 5) == 0


def test_use_makes_a_leaf_young_again() -> None:
    alloc = make(num_blocks=3)
    for token in (1, 2, 3):
        alloc.free(compute(alloc, str(token), [token] * 4))
    alloc.free(compute(alloc, "user", [1] * 5))  # a hit on 1; its fifth token takes the place of 2, the oldest now
    filler = make_request("f", [9] * 8)
    assert alloc.allocate(filler, 8)
    assert [token for token in (1, 2, 3) if hit(alloc, [token] * 5)] == [1]


def test_a_parent_becomes_a_leaf_when_its_children_are_gone() -> None:
    alloc = make(num_blocks=4)
    alloc.free(compute(alloc, "a", [1] * 4 + [2] * 4))
    alloc.free(compute(alloc, "b", [1] * 4 + [3] * 4))
    filler = make_request("f", [9] * 16)
    assert alloc.allocate(filler, 16)
    assert shape(alloc._index.root) == {} and alloc.usage().cached == 0


def test_stale_entries_of_the_eviction_order_do_not_pile_up() -> None:
    alloc = make()
    for i in range(1000):
        alloc.free(compute(alloc, str(i), [1] * 5))
    assert sum(map(len, alloc._index.order._queues)) < 100


def test_fork_shares_through_the_tree_and_copies_the_half_filled_block() -> None:
    alloc = make()
    parent = make_request("parent", list(range(10)))
    assert alloc.allocate(parent, 10)
    parent.num_computed_tokens = 10  # computed, not committed yet
    child = make_request("child", parent.prompt_token_ids)
    assert alloc.fork(parent, child) and child.num_computed_tokens == 9
    mine, theirs = list(alloc.block_table(child)), list(alloc.block_table(parent))
    assert mine[:2] == theirs[:2] and mine[2] != theirs[2]
    assert alloc.drain_copies() == [BlockCopy(CopyKind.DEVICE, theirs[2], mine[2])]
    usage = alloc.usage()
    assert (usage.owned, usage.computed, usage.shared_saved) == (16, 11, 8)
    alloc.free(parent)
    assert alloc.usage().shared_saved == 0 and hit(alloc, list(range(20))) == 8
    alloc.free(child)


def test_fork_of_less_than_a_block_and_without_room() -> None:
    alloc = make(num_blocks=2)
    parent = compute(alloc, "parent", [1] * 3)
    parent.output_token_ids += [2] * 4
    assert alloc.allocate(parent, 7)
    parent.num_computed_tokens = 7
    alloc.commit(parent)
    child = make_request("child", parent.prompt_token_ids)
    before = alloc.usage()
    assert not alloc.fork(parent, child) and alloc.usage() == before
    bigger = make(num_blocks=3)
    parent = compute(bigger, "parent", [1] * 3)
    parent.output_token_ids += [2] * 4
    assert bigger.allocate(parent, 7)
    parent.num_computed_tokens = 7
    bigger.commit(parent)
    assert bigger.fork(parent, child)
    assert shape(bigger._index.root) == {(1, 1, 1): {}}  # the child stands on the root


def test_salts_and_equal_hashes_keep_apart() -> None:
    alloc = make()
    tokens, twin = [1] * 8, [1 + 2**61 - 1] * 8
    assert hash(tuple(tokens)) == hash(tuple(twin))
    compute(alloc, "a", tokens, salt="alice")
    assert hit(alloc, [*tokens, 1], salt="alice") == 8 and hit(alloc, [*tokens, 1]) == 0
    assert hit(alloc, [*twin, 1], salt="alice") == 0
    assert hit(alloc, [*tokens[:4], *twin[:4], 1], salt="alice") == 4


def test_a_stale_answer_of_match_prefix_is_an_error() -> None:
    with pytest.raises(EngineError, match="admitted with 8 cached tokens, but the prefix cache holds 0"):
        make().allocate(make_request("a", [1] * 9), 9, 8)


def test_clear_cache_leaves_a_cold_pool() -> None:
    alloc = make()
    compute(alloc, "a", [1] * 8)
    alloc.free(compute(alloc, "b", [2] * 8))
    alloc.clear_cache()
    assert alloc.usage().cached == 0 and hit(alloc, [2] * 9) == 0 and hit(alloc, [1] * 9) == 8


def test_a_window_is_refused_in_one_line() -> None:
    with pytest.raises(ConfigError, match="a cached prefix must hold all of its tokens"):
        RadixAllocator(num_blocks=20, block_size=4, max_model_len=64, sliding_window=8)
