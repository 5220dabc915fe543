"""Strict priorities: nobody loses its slots in vain, and nobody urgent waits for slots that would come free."""

import pytest
from scheduler_simulation import request

from kvarena.engine.contract import KVAllocator
from kvarena.experiments.settings.strategies import build_allocator, build_scheduler

MAX_LEN = 64


def running(allocator: KVAllocator, *load, **options):
    """A priority scheduler after one step in which all of `load` was admitted."""
    scheduler = build_scheduler("priority", allocator, max_model_len=MAX_LEN, watermark=0.0, **options)
    for req in load:
        scheduler.add(req)
    plan = scheduler.schedule(0.0)
    assert set(plan.admitted) == set(load)
    scheduler.update(plan, [1] * len(plan.scheduled))
    return scheduler


def paged(num_blocks: int) -> KVAllocator:
    return build_allocator("paged", num_blocks=num_blocks, block_size=4, max_model_len=MAX_LEN)


def test_nobody_is_preempted_for_a_request_that_would_not_fit_even_then():
    urgent, low = request("urgent", 21, 4, priority=0), request("low", 7, 4, priority=5)
    scheduler = running(paged(10), urgent, low)  # 24 and 8 of 40 slots
    head = request("head", 17, 4, priority=1)  # 8 free ones and low's 8 are not enough
    scheduler.add(head)
    plan = scheduler.schedule(0.0)
    assert scheduler.head() is head
    assert plan.preempted == [] and low in scheduler.decoding and low.num_preemptions == 0


@pytest.mark.parametrize("num_prompt", [15, 16])
def test_a_request_that_just_fits_takes_the_slots_of_a_less_urgent_one(num_prompt):
    urgent, low = request("urgent", 21, 4, priority=0), request("low", 7, 4, priority=5)
    scheduler = running(paged(10), urgent, low)
    head = request("head", num_prompt, 4, priority=1)
    scheduler.add(head)
    plan = scheduler.schedule(0.0)
    assert plan.preempted == [low] and plan.admitted == [head]


def test_what_a_buddy_rounded_up_comes_free_with_its_region():
    """A region of 10 slots keeps 16: the ledger calls 6 of them external, and the head gets all 16."""
    pool = build_allocator("orca_oracle", num_blocks=16, max_model_len=MAX_LEN)
    low = request("low", 8, 2, priority=5)
    scheduler = running(pool, low)
    usage = pool.usage()
    assert (usage.owned, usage.external, usage.free) == (10, 6, 0)
    head = request("head", 12, 4, priority=0)
    scheduler.add(head)
    plan = scheduler.schedule(0.0)
    assert plan.preempted == [low] and plan.admitted == [head]


def test_cached_blocks_count_as_free_ones():
    pool = build_allocator("paged_prefix", num_blocks=10, block_size=4, max_model_len=MAX_LEN)
    gone, low = request("gone", 24, 1), request("low", 7, 8, priority=5)
    gone.prompt_token_ids[0] = 2
    scheduler = running(pool, gone, low)
    assert (pool.usage().cached, pool.usage().free) == (24, 8)
    head = request("head", 39, 1, priority=1)
    scheduler.add(head)
    plan = scheduler.schedule(0.0)
    assert plan.preempted == [low] and plan.admitted == [head]


def test_the_least_urgent_goes_first_and_no_more_than_are_needed():
    load = [request(name, 7, 4, priority=priority) for name, priority in (("a", 3), ("b", 9), ("c", 9), ("d", 5))]
    scheduler = running(paged(8), *load)
    head = request("head", 8, 4, priority=1)
    scheduler.add(head)
    plan = scheduler.schedule(0.0)
    assert plan.preempted == [load[2]] and plan.admitted == [head]  # of the two at 9 whoever arrived last


def test_equals_do_not_preempt_each_other():
    load = [request(name, 15, 4, priority=2) for name in "ab"]
    scheduler = running(paged(8), *load)
    scheduler.add(request("head", 8, 4, priority=2))
    assert scheduler.schedule(0.0).preempted == []


def test_a_full_batch_gives_a_place_to_the_more_urgent():
    load = [request(name, 4, 8, priority=4) for name in "ab"]
    scheduler = running(paged(30), *load, max_num_seqs=2)
    head = request("head", 4, 4, priority=1)
    scheduler.add(head)
    plan = scheduler.schedule(0.0)
    assert plan.preempted == [load[1]] and plan.admitted == [head] and scheduler.num_running == 2


def test_a_full_batch_keeps_its_place_when_the_more_urgent_would_not_fit_even_so():
    urgent, low = request("urgent", 21, 4, priority=0), request("low", 7, 4, priority=5)
    scheduler = running(paged(10), urgent, low, max_num_seqs=2)
    scheduler.add(request("head", 17, 4, priority=1))
    assert scheduler.schedule(0.0).preempted == []


def test_the_reserve_of_the_pool_is_nobody_s_to_take_by_preemption():
    """The head would fit into the victim's slots, and not be admitted all the same: 4 of 40 slots stay free."""
    urgent, low = request("urgent", 19, 4, priority=0), request("low", 7, 4, priority=5)
    scheduler = build_scheduler("priority", paged(10), max_model_len=MAX_LEN, watermark=0.1)
    for req in (urgent, low):
        scheduler.add(req)
    scheduler.update(plan := scheduler.schedule(0.0), [1] * len(plan.scheduled))
    assert set(plan.admitted) == {urgent, low}
    scheduler.add(request("head", 17, 4, priority=1))  # 20 slots: as many as are free, with the 8 of `low`
    assert scheduler.schedule(0.0).preempted == []


def test_nobody_is_preempted_for_a_request_whose_last_token_is_still_on_its_way():
    """It cannot be admitted before the step in flight ends, whatever comes free."""
    urgent, low = request("urgent", 7, 8, priority=0), request("low", 7, 8, priority=5)
    scheduler = running(paged(10), urgent, low)
    in_flight = scheduler.schedule(0.0)
    scheduler.preempt(urgent, plan := scheduler.schedule(0.0))
    assert urgent.num_pending_tokens and scheduler.head() is urgent
    plan = scheduler.schedule(0.0)
    assert low not in plan.preempted and low.num_preemptions == 0
    scheduler.update(in_flight, [1, 1])
