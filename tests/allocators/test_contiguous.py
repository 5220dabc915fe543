"""Contiguous regions: what each reservation reserves, and what the ledger calls external and shortage."""

from __future__ import annotations

import pytest
from allocator_machine import make_request

from kvarena.allocators.contiguous import ContiguousAllocator
from kvarena.engine.contract import QueueHead
from kvarena.engine.errors import ConfigError


def make(reservation: str = "max", placement: str = "first_fit", num_blocks: int = 100, block_size: int = 1):
    return ContiguousAllocator(
        num_blocks=num_blocks,
        block_size=block_size,
        max_model_len=64,
        reservation=reservation,
        placement=placement,
    )


@pytest.mark.parametrize(
    ("reservation", "oracle", "want"),
    [
        ("max", 25, 64),
        ("pow2", 25, 10 + 32),  # the paper's own example: 25 -> 32
        ("pow2", 32, 10 + 32),
        ("pow2", 1, 10 + 1),
        ("pow2", None, 10 + 64 - 10),  # max_tokens 40 -> 64, capped at max_model_len
        ("oracle", 25, 35),
        ("oracle", None, 50),
        ("prompt", 25, 10),
    ],
)
def test_reservations(reservation: str, oracle: int | None, want: int) -> None:
    alloc = make(reservation)
    req = make_request("a", [1] * 10, max_tokens=40, oracle=oracle)
    assert alloc.allocate(req, 4)
    assert req.num_slots == want == len(alloc.block_table(req))


def test_a_reservation_is_never_below_what_is_asked_for_nor_above_the_pool() -> None:
    alloc = make("oracle")
    req = make_request("a", [1] * 10, max_tokens=40, oracle=2)
    assert alloc.allocate(req, 30) and req.num_slots == 30
    small = make("max", num_blocks=20)
    req = make_request("b", [1] * 10)
    assert small.max_request_tokens == 20 and small.allocate(req, 4) and req.num_slots == 20


def test_a_region_does_not_grow() -> None:
    alloc = make("prompt", block_size=4)
    req = make_request("a", [1] * 10)
    assert alloc.allocate(req, 10) and req.num_slots == 12
    assert alloc.allocate(req, 12)
    assert not alloc.allocate(req, 13)
    assert req.num_slots == 12 and list(alloc.block_table(req)) == [1, 2, 3]


def head_of(prompt: int, oracle: int) -> QueueHead:
    return QueueHead(make_request("h", [1] * prompt, max_tokens=99, oracle=oracle), prompt)


@pytest.mark.parametrize("placement", ["first_fit", "best_fit"])
def test_all_free_slots_are_of_one_class_by_the_head_of_the_queue(placement: str) -> None:
    alloc = make("oracle", placement)
    a, b, c = (make_request(name, [1] * 10, oracle=20) for name in "abc")
    for req in (a, b, c):
        assert alloc.allocate(req, 10)
    alloc.free(b)  # holes of 30 and 10
    assert alloc.usage().free == 40  # nobody waits
    for oracle, want in ((20, (0, 0, 40)), (21, (40, 0, 0)), (30, (40, 0, 0)), (31, (0, 40, 0))):
        usage = alloc.usage(head_of(10, oracle))
        assert usage.owned == 60 and (usage.external, usage.shortage, usage.free) == want


def test_the_need_is_what_admission_asks_for() -> None:
    """A static batch and `preemption=none` ask for prompt + max_tokens, whatever the reservation says."""
    alloc = make("prompt", num_blocks=40)
    assert alloc.allocate(make_request("a", [1] * 20), 20)
    head = make_request("h", [1] * 10, max_tokens=20)
    assert alloc.usage(QueueHead(head, 10)).free == 20
    assert alloc.usage(QueueHead(head, 30)).shortage == 20


def test_external_counts_what_a_buddy_rounds_up() -> None:
    alloc = make("oracle", "buddy", num_blocks=64)
    a = make_request("a", [1] * 10, oracle=10)
    assert alloc.allocate(a, 10)
    usage = alloc.usage()
    assert (usage.owned, usage.external, usage.free) == (20, 12, 32)
    # 18 round up to 32, which is there; 33 are more than all that is free, whatever they round up to.
    for oracle, want in ((8, (12, 0, 32)), (22, (12, 0, 32)), (23, (12, 32, 0))):
        usage = alloc.usage(head_of(10, oracle))
        assert (usage.external, usage.shortage, usage.free) == want
    b = make_request("b", [1] * 4, oracle=4)
    assert alloc.allocate(b, 4)  # 8 of the 32: 24 are left, the largest hole is 16
    assert alloc.usage(head_of(10, 10)).external == 12 + 24
    alloc.free(a)
    alloc.free(b)
    assert alloc.usage(head_of(10, 30)).free == 64


def test_seven_orca_max_requests_fit_the_papers_pool() -> None:
    """OPT-13B in the paper: 15.7K slots of 2048-token reservations hold 7 requests, 8.9% of the pool is left over."""
    alloc = ContiguousAllocator(
        num_blocks=15_700, block_size=1, max_model_len=2048, reservation="max", placement="buddy"
    )
    admitted = sum(alloc.allocate(make_request(str(i), [1] * 100), 100) for i in range(20))
    usage = alloc.usage(QueueHead(make_request("head", [1]), 1))
    assert admitted == 7
    assert 0.085 < usage.shortage / usage.total < 0.09 and usage.external == usage.free == 0


def test_bad_options_name_the_choices() -> None:
    with pytest.raises(ConfigError, match=r"allocator\.reservation=half must be one of max, pow2, oracle, prompt"):
        make("half")
    with pytest.raises(ConfigError, match=r"allocator\.placement=worst_fit must be one of first_fit"):
        make(placement="worst_fit")
