"""Host memory below the pool: what goes down, what comes up, whose a block is meanwhile, and what the books say."""

from __future__ import annotations

import pytest
from allocator_machine import make_request

from kvarena.allocators.block_names import block_name, root_digest
from kvarena.allocators.prefix import PrefixCachingAllocator
from kvarena.allocators.radix import RadixAllocator
from kvarena.engine.contract import BlockCopy, CopyKind
from kvarena.engine.copies import arrive_in_order
from kvarena.engine.errors import ConfigError, NotDefined
from kvarena.engine.ledger import check_levels
from kvarena.engine.request import Request

BLOCK = 4
PROMPT = list(range(100, 113))  # three full blocks and a token


def make(kind=PrefixCachingAllocator, **options) -> PrefixCachingAllocator:
    sizes = {"num_blocks": 6, "block_size": BLOCK, "max_model_len": 64, "eviction": "lru", "host_blocks": 8}
    return kind(**sizes | options)


def launch(alloc: PrefixCachingAllocator) -> list[BlockCopy]:
    """A step's copies are made."""
    copies = alloc.drain_copies()
    arrive_in_order(copies)
    return copies


def admit(alloc: PrefixCachingAllocator, name: str, tokens: list[int], salt: str = "") -> tuple[Request, int]:
    """The request, and its tokens that come up."""
    req = make_request(name, tokens, salt=salt)
    assert alloc.allocate(req, len(tokens), alloc.match_prefix(req))
    return req, alloc.load(req)


def compute(alloc: PrefixCachingAllocator, req: Request) -> None:
    req.num_computed_tokens = req.num_tokens
    alloc.commit(req)


def send_down(alloc: PrefixCachingAllocator, tokens: list[int] = PROMPT) -> None:
    """Compute a prompt, and another one that takes the whole pool."""
    req, _ = admit(alloc, "first", tokens)
    compute(alloc, req)
    alloc.free(req)
    other, _ = admit(alloc, "other", [1] * 24)
    launch(alloc)
    alloc.arrive(0.0)
    alloc.free(other)


@pytest.mark.parametrize("kind", [PrefixCachingAllocator, RadixAllocator])
def test_an_evicted_block_goes_down_and_comes_up_for_whoever_has_its_tokens(kind):
    alloc = make(kind)
    req, _ = admit(alloc, "a", PROMPT)
    compute(alloc, req)
    blocks = list(alloc.block_table(req))[:3]
    alloc.free(req)
    other, _ = admit(alloc, "b", [1] * 24)
    down = launch(alloc)
    assert [(copy.kind, copy.src) for copy in down] == [(CopyKind.SWAP_OUT, block) for block in reversed(blocks)]
    assert alloc.levels[0][1:] == (0, 0, 3, 0, 5)  # arriving
    again = make_request("c", PROMPT)
    alloc.free(other)
    assert alloc.allocate(again, len(PROMPT)) and alloc.load(again) == 0  # not found before it is there
    alloc.free(again)
    alloc.arrive(0.0)
    assert alloc.levels[0][1:] == (3, 0, 0, 0, 5) and not alloc.is_moving

    again, num_loading = admit(alloc, "d", PROMPT)
    assert num_loading == 12 and again.num_computed_tokens == 0 and alloc.arrive(0.0) == []
    up = launch(alloc)
    assert [copy.dst for copy in up] == list(alloc.block_table(again))[:3]
    assert [copy.src for copy in up] == [copy.dst for copy in reversed(down)]
    assert alloc.levels[0][1:] == (0, 0, 0, 3, 5)  # leaving
    assert alloc.arrive(0.0) == [again] and again.num_computed_tokens == 12
    assert alloc.levels[0][1:] == (3, 0, 0, 0, 5)
    assert alloc.match_prefix(make_request("e", PROMPT)) == 12  # others share what came up


def test_what_is_down_already_is_not_copied_again():
    alloc = make()
    send_down(alloc)
    req, _ = admit(alloc, "a", PROMPT)
    launch(alloc)
    alloc.arrive(0.0)
    alloc.free(req)
    admit(alloc, "b", [1] * 24)
    assert launch(alloc) == []


def test_other_tokens_and_other_salts_find_nothing():
    alloc = make()
    send_down(alloc)
    for tokens, salt in ((PROMPT[1:], ""), (PROMPT, "salt"), ([*PROMPT[:3], 7, *PROMPT[4:]], "")):
        req, num_loading = admit(alloc, "a", tokens, salt)
        assert num_loading == 0
        alloc.free(req)
    req, num_loading = admit(alloc, "a", [*PROMPT[:8], 7, 7, 7])
    assert num_loading == 8  # as far as they are alike


def test_a_request_that_leaves_while_its_blocks_come_up_leaves_them_to_nobody():
    alloc = make()
    send_down(alloc)
    req, _ = admit(alloc, "a", PROMPT)
    launch(alloc)
    table = list(alloc.block_table(req))
    alloc.free(req)
    assert list(alloc.landing_blocks()) == table[:3] and alloc.usage().owned == 12
    blocked = make_request("b", [1] * 24)
    assert not alloc.allocate(blocked, 24) and alloc.next_arrival() is not None
    assert alloc.arrive(0.0) == [] and alloc.usage().owned == 0 and alloc.next_arrival() is None
    assert alloc.allocate(blocked, 24)


def test_a_load_that_was_not_begun_is_taken_back():
    alloc = make()
    send_down(alloc)
    req, _ = admit(alloc, "a", PROMPT)
    alloc.free(req)
    assert alloc.drain_copies() == [] and alloc.usage().owned == 0 and not alloc.is_moving
    assert alloc.levels[0].cached == 3


def test_transfers_of_a_failed_step_never_arrive():
    alloc = make()
    req, _ = admit(alloc, "a", PROMPT)
    compute(alloc, req)
    alloc.free(req)
    other, _ = admit(alloc, "b", [1] * 24)
    assert alloc.abandon(alloc.drain_copies()) == []
    assert alloc.levels[0].free == 8
    alloc.free(other)
    send_down(alloc)
    req, _ = admit(alloc, "c", PROMPT)
    assert alloc.abandon(alloc.drain_copies()) == [req]
    alloc.free(req)
    assert alloc.usage().owned == 0 and not alloc.is_moving and alloc.levels[0].cached == 3


def test_no_cached_block_pushes_a_swapped_one_out_and_a_swapped_one_pushes_cached_ones():
    alloc = make(num_blocks=12, host_blocks=4, swap_blocks=4)
    send_down_twelve = make_request("long", [5] * 40)
    assert alloc.allocate(send_down_twelve, 40)
    compute(alloc, send_down_twelve)
    alloc.free(send_down_twelve)
    filler, _ = admit(alloc, "filler", [1] * 48)
    launch(alloc)
    alloc.arrive(0.0)
    assert alloc.levels[0].cached == 4  # what was evicted last: the head
    compute(alloc, filler)
    filler.num_computed_tokens = 12
    assert alloc.swap_out(filler) and alloc.levels[0][1:] == (1, 3, 0, 0, 0)
    launch(alloc)
    other, _ = admit(alloc, "other", [2] * 48)
    compute(alloc, other)
    alloc.free(other)
    third, _ = admit(alloc, "third", [3] * 48)
    assert alloc.levels[0].swapped == 3
    third.num_computed_tokens = 8
    assert not alloc.swap_out(third)  # full: it recomputes
    alloc.free(third)
    alloc.free(filler)
    assert alloc.levels[0].swapped == 0


def test_swaps_have_no_more_than_their_share():
    alloc = make(num_blocks=12, host_blocks=8, swap_blocks=2)
    req, _ = admit(alloc, "a", [5] * 12)
    compute(alloc, req)
    assert alloc.levels[0].free == 8 and not alloc.swap_out(req)


def test_a_cleared_level_finds_nothing_and_forgets_what_was_on_its_way():
    alloc = make()
    req, _ = admit(alloc, "a", PROMPT)
    compute(alloc, req)
    alloc.free(req)
    other, _ = admit(alloc, "b", [1] * 24)
    launch(alloc)
    alloc.clear_cache()
    check_levels(alloc.levels)
    assert alloc.levels[0].arriving == 3
    alloc.arrive(0.0)
    assert alloc.levels[0].free == 8
    alloc.free(other)
    assert admit(alloc, "c", PROMPT)[1] == 0


def test_names_frame_their_parts():
    root = root_digest("")
    assert root != root_digest("salt")
    assert block_name(root, 0, [1, 2]).digest != block_name(root, 0, [258]).digest
    image = 1 << 300
    assert block_name(root, 0, [image, 1]).digest != block_name(root, 0, [1, image]).digest
    assert block_name(root, 0, [image]).digest != block_name(root, 0, [image + 1]).digest


def test_never_loads_nothing():
    alloc = make(load="never")
    send_down(alloc)
    assert alloc.levels[0].cached == 3 and admit(alloc, "a", PROMPT)[1] == 0


def test_bad_options_are_one_line():
    with pytest.raises(ConfigError, match=r"swap_blocks\)=9 must be at most kv_cache.host_gib, 8 blocks"):
        make(swap_blocks=9)
    with pytest.raises(NotDefined, match=r"eviction=min .* kv_cache.host_gib adds another"):
        make(eviction="min")
    with pytest.raises(ConfigError, match=r"kv_cache\.load=sometimes must be"):
        make(load="sometimes")
