"""The prefix cache: what is found, what is evicted first, and what is never confused."""

from __future__ import annotations

import pytest
from allocator_machine import make_request

from kvarena.allocators.prefix import PrefixCachingAllocator
from kvarena.engine.contract import QueueHead
from kvarena.engine.errors import ConfigError, EngineError
from kvarena.engine.ledger import check_usage
from kvarena.engine.request import Request

BLOCK = 4
# Python hashes integers modulo 2**61 - 1, so these two tokens, and tuples of them, have equal hashes.
COLLISION = 2**61 - 1


def make(num_blocks: int = 20, block_size: int = BLOCK) -> PrefixCachingAllocator:
    return PrefixCachingAllocator(num_blocks=num_blocks, block_size=block_size, max_model_len=64, eviction="lru")


def compute(alloc: PrefixCachingAllocator, name: str, tokens: list[int], salt: str = "") -> Request:
    """Admit a request with its hit, compute it all, publish it."""
    req = make_request(name, tokens, salt=salt)
    hit = alloc.match_prefix(req)
    assert alloc.allocate(req, len(tokens), hit)
    req.num_computed_tokens = len(tokens)
    alloc.commit(req)
    return req


def hit(alloc: PrefixCachingAllocator, tokens: list[int], salt: str = "") -> int:
    return alloc.match_prefix(make_request("probe", tokens, salt=salt))


def test_what_was_found_for_other_tokens_of_a_request_is_forgotten() -> None:
    """A beam that was looked for, ran, and took another one's tokens over."""
    alloc = make()
    one, two = compute(alloc, "one", list(range(9))), compute(alloc, "two", [*range(4), 30, 31, 32, 33, 34])
    beam = make_request("beam", list(range(4)))
    beam.output_token_ids += [4, 5, 6, 7, 8]
    assert alloc.match_prefix(beam) == 8 and alloc.allocate(beam, 9, 8)
    assert list(alloc.block_table(beam))[:2] == list(alloc.block_table(one))[:2]
    alloc.free(beam)
    beam.output_token_ids[:] = [30, 31, 32, 33, 34]
    assert alloc.match_prefix(beam) == 8 and alloc.allocate(beam, 9, 8)
    assert list(alloc.block_table(beam))[:2] == list(alloc.block_table(two))[:2]


def test_full_blocks_are_shared_and_counted_once() -> None:
    alloc = make()
    a = compute(alloc, "a", list(range(10)))
    b = compute(alloc, "b", [*range(8), 90, 91])
    assert list(alloc.block_table(a))[:2] == list(alloc.block_table(b))[:2]
    usage = alloc.usage()
    check_usage(usage)
    assert (usage.owned, usage.computed, usage.shared_saved) == (16, 12, 8)
    alloc.free(a)
    assert alloc.usage().shared_saved == 0 and alloc.usage().owned == 12
    alloc.free(b)
    assert alloc.usage().cached == 8 and alloc.usage().free == 72


def test_a_hit_never_covers_the_whole_prompt() -> None:
    alloc = make()
    compute(alloc, "a", list(range(8)))
    assert hit(alloc, list(range(8))) == 4
    assert hit(alloc, list(range(9))) == 8


def test_only_computed_and_known_tokens_are_published() -> None:
    alloc = make()
    req = make_request("a", list(range(10)))
    assert alloc.allocate(req, 10)
    req.num_computed_tokens = 7
    alloc.commit(req)
    assert hit(alloc, list(range(20))) == 4
    req.num_computed_tokens = 12  # two tokens are on the device, unknown here
    assert alloc.allocate(req, 12)
    alloc.commit(req)
    assert hit(alloc, list(range(20))) == 8
    req.output_token_ids += [10, 11]
    alloc.commit(req)
    assert hit(alloc, list(range(20))) == 12


def test_hits_whose_tokens_the_scheduler_has_not_counted_yet() -> None:
    alloc = make()
    for name in "abc":
        compute(alloc, name, [*range(12), 40])
    req = make_request("d", [*range(12), 41])
    assert alloc.allocate(req, 13, alloc.match_prefix(req))
    usage = alloc.usage()
    check_usage(usage)
    assert usage.computed == 12 + 3
    req.num_computed_tokens = 13
    assert alloc.usage().computed == 12 + 4


def test_salts_keep_tenants_apart() -> None:
    alloc = make()
    compute(alloc, "a", list(range(8)), salt="alice")
    assert hit(alloc, list(range(9)), salt="alice") == 8
    assert hit(alloc, list(range(9)), salt="bob") == hit(alloc, list(range(9))) == 0


def test_equal_hashes_are_not_equal_tokens() -> None:
    alloc = make()
    tokens = list(range(1, 9))
    twin = [token + COLLISION for token in tokens]
    assert hash(tuple(tokens)) == hash(tuple(twin))
    compute(alloc, "a", tokens)
    assert hit(alloc, [*twin, 9]) == 0
    compute(alloc, "b", twin)
    assert hit(alloc, [*twin, 9]) == hit(alloc, [*tokens, 9]) == 8
    assert hit(alloc, [*tokens[:4], *twin[4:], 9]) == 4


def test_equal_blocks_after_different_prefixes_are_different_blocks() -> None:
    alloc = make()
    compute(alloc, "a", [1, 1, 1, 1, 5, 6, 7, 8])
    assert hit(alloc, [2, 2, 2, 2, 5, 6, 7, 8, 9]) == 0
    assert hit(alloc, [5, 6, 7, 8, 9]) == 0


def test_eviction_takes_the_least_recently_freed_and_tails_first() -> None:
    alloc = make(num_blocks=6)
    a, b = compute(alloc, "a", [1] * 12), compute(alloc, "b", [2] * 12)
    alloc.free(b)
    alloc.free(a)
    filler = make_request("filler", [9] * 3)
    assert alloc.allocate(filler, 3)
    assert (hit(alloc, [1] * 13), hit(alloc, [2] * 13)) == (12, 8)  # b was freed first, its last block goes first
    assert alloc.allocate(filler, 12)
    assert (hit(alloc, [1] * 13), hit(alloc, [2] * 13)) == (12, 0)
    alloc.free(filler)  # its blocks were never published: they are taken before anything is evicted
    other = make_request("other", [8] * 12)
    assert alloc.allocate(other, 12) and hit(alloc, [1] * 13) == 12


def test_a_hit_takes_a_block_out_of_the_middle_of_the_order() -> None:
    alloc = make(num_blocks=3)
    for token in (1, 2, 3):
        alloc.free(compute(alloc, str(token), [token] * 4))
    user = make_request("user", [2] * 5)
    user_hit = alloc.match_prefix(user)
    assert user_hit == 4 and alloc.allocate(user, 5, user_hit)  # evicts 1, the oldest
    user.num_computed_tokens = 5
    assert [hit(alloc, [token] * 5) for token in (1, 2, 3)] == [0, 4, 4]
    assert not alloc.allocate(make_request("big", [7] * 8), 8)  # only one evictable block is left
    alloc.free(user)
    assert alloc.allocate(make_request("next", [7] * 5), 5)  # the private block, then 3
    assert [hit(alloc, [token] * 5) for token in (2, 3)] == [4, 0]


def test_a_hit_block_is_not_counted_as_room_for_itself() -> None:
    alloc = make(num_blocks=3)
    alloc.free(compute(alloc, "a", [1] * 8))
    req = make_request("b", [1] * 8 + [2] * 8)
    assert alloc.match_prefix(req) == 8
    before = alloc.usage()
    assert not alloc.allocate(req, 16, 8)
    assert alloc.usage() == before and alloc.match_prefix(req) == 8
    assert alloc.allocate(req, 12, 8)


def test_an_evicted_block_is_found_no_more_even_by_one_who_found_it_before() -> None:
    alloc = make(num_blocks=3)
    alloc.free(compute(alloc, "a", [1] * 12))
    waiting = make_request("w", [1] * 13)
    assert alloc.match_prefix(waiting) == 12
    filler = make_request("f", [9] * 8)
    assert alloc.allocate(filler, 8)
    assert alloc.match_prefix(waiting) == 4
    with pytest.raises(EngineError, match="admitted with 12 cached tokens, but the prefix cache holds 4"):
        alloc.allocate(waiting, 13, 12)


def test_a_duplicate_gives_way_to_what_was_published_first() -> None:
    """Two requests compute one prefix at the same time; they go on with one copy."""
    alloc = make(num_blocks=6)
    a, b = make_request("a", [1] * 4), make_request("b", [1] * 4 + [2] * 8)
    assert alloc.allocate(a, 4) and alloc.allocate(b, 12)
    for req in (a, b):
        req.num_computed_tokens = req.num_tokens
        alloc.commit(req)
    assert alloc.block_table(a)[0] == alloc.block_table(b)[0] and alloc.usage().shared_saved == 4
    alloc.free(a)
    assert alloc.usage().cached == 0
    filler = make_request("f", [9] * 12)
    assert alloc.allocate(filler, 12) and not alloc.allocate(make_request("g", [9]), 1)
    assert hit(alloc, [1] * 4 + [2] * 9) == 12
    alloc.free(filler)
    alloc.free(b)
    assert alloc.usage().cached == 12


def test_links_of_evicted_blocks_do_not_pile_up() -> None:
    alloc = make(num_blocks=6)
    for i in range(200):
        alloc.free(compute(alloc, str(i), [i] * 8 + [i + 1] * 8))
    assert len(alloc._index._links) <= 6 and len(alloc._index._published) <= 6


def test_clear_cache_leaves_a_cold_pool() -> None:
    alloc = make()
    a = compute(alloc, "a", [1] * 8)
    alloc.free(compute(alloc, "b", [2] * 8))
    alloc.clear_cache()
    assert alloc.usage().cached == 0 and hit(alloc, [2] * 9) == 0 and hit(alloc, [1] * 9) == 8
    alloc.free(a)


def test_preempted_output_is_found_again() -> None:
    alloc = make()
    a = compute(alloc, "a", [1] * 6)
    a.output_token_ids += [7, 8]
    assert alloc.allocate(a, 8)
    a.num_computed_tokens = 8
    alloc.commit(a)
    alloc.free(a)
    a.num_computed_tokens = 0
    a.output_token_ids.append(9)
    assert alloc.match_prefix(a) == 8


def test_a_window_is_refused_in_one_line() -> None:
    with pytest.raises(ConfigError, match="a cached prefix must hold all of its tokens"):
        PrefixCachingAllocator(num_blocks=20, block_size=4, max_model_len=64, sliding_window=8)


def test_a_child_goes_on_in_the_chain_where_its_prompt_ends() -> None:
    alloc = make()
    parent = compute(alloc, "parent", list(range(9)))
    parent.output_token_ids += [50] * 4
    assert alloc.allocate(parent, 13)
    parent.num_computed_tokens = 13
    alloc.commit(parent)  # three blocks deep, and the child branches off at two
    child = make_request("child", parent.prompt_token_ids)
    assert alloc.fork(parent, child)
    child.output_token_ids += [60] * 3
    assert alloc.allocate(child, 12)
    child.num_computed_tokens = 12
    alloc.commit(child)
    assert hit(alloc, [*range(9), 60, 60, 60, 1]) == hit(alloc, [*range(9), 50, 50, 50, 1]) == 12


def test_each_block_is_published_as_soon_as_it_is_full() -> None:
    alloc = make()
    req = compute(alloc, "a", list(range(4)))
    for num_tokens in (4, 8, 12):
        assert hit(alloc, list(range(20))) == num_tokens
        req.output_token_ids += range(num_tokens, num_tokens + 4)
        assert alloc.allocate(req, num_tokens + 4)
        req.num_computed_tokens = num_tokens + 3
        alloc.commit(req)
        assert hit(alloc, list(range(20))) == num_tokens
        req.num_computed_tokens = num_tokens + 4
        alloc.commit(req)


@pytest.mark.parametrize("lives", [True, False])
@pytest.mark.parametrize(("num_tokens", "fits"), [(16, True), (17, False)])
def test_hits_that_were_evictable_are_no_room_for_the_rest(lives: bool, num_tokens: int, fits: bool) -> None:
    """Four blocks, two of them a hit: two are left, whether somebody owns the hit or nobody does."""
    alloc = make(num_blocks=4)
    owner = compute(alloc, "a", list(range(8)))
    if not lives:
        alloc.free(owner)
    req = make_request("b", list(range(num_tokens)))
    before = alloc.usage()
    assert alloc.allocate(req, num_tokens, 8) is fits
    assert fits or (alloc.usage() == before and req.num_slots == 0)
    if fits:
        assert (req.num_slots, req.num_computed_tokens) == (16, 8)  # a hit counts as computed at once
        assert alloc.usage().computed == 8 and alloc.usage().free == 0


@pytest.mark.parametrize(("num_tokens", "slots"), [(8, 4), (9, 4), (12, 4), (13, 8)])
def test_admission_takes_what_the_head_does_not_share(num_tokens: int, slots: int) -> None:
    """The first two blocks are another request's; a hit never covers the last token."""
    alloc = make()
    compute(alloc, "a", list(range(8)))
    head = make_request("head", list(range(num_tokens)))
    assert alloc.slots_to_admit(QueueHead(head, num_tokens)) == slots


def test_blocks_of_prompt_and_output_are_found_again() -> None:
    alloc = make()
    req = compute(alloc, "a", list(range(6)))
    req.output_token_ids += [50, 51, 52]
    assert alloc.allocate(req, 9)
    req.num_computed_tokens = 8
    alloc.commit(req)
    alloc.free(req)
    assert alloc.match_prefix(req) == 8  # the second block has tokens of both
    assert hit(alloc, [*range(6), 50, 60, 61]) == 4


def test_a_fork_publishes_what_it_shares_and_the_child_goes_on_behind_it() -> None:
    """The parent's KV is computed by a step that was planned before: whoever finds it reads it later."""
    alloc = make()
    parent = make_request("parent", list(range(9)))
    assert alloc.allocate(parent, 9)
    parent.num_computed_tokens = 9
    child = make_request("child", parent.prompt_token_ids)
    assert alloc.fork(parent, child) and hit(alloc, list(range(9))) == 8
    child.output_token_ids += [60] * 3
    assert alloc.allocate(child, 12)
    child.num_computed_tokens = 12
    alloc.commit(child)
    assert hit(alloc, [*range(9), 60, 60, 60, 1]) == 12
    alloc.free(parent)
    assert alloc.usage().cached == 0
