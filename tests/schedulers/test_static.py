"""The static scheduler: batches by size or wait, reservation of the whole life, and what `retire` means."""

import pytest
from scheduler_simulation import request, simulate

from kvarena.allocators.paged import PagedAllocator
from kvarena.engine.errors import ConfigError
from kvarena.engine.server.engine.pool_view import PoolView


class Promises(PagedAllocator):
    """Promises room for any request."""

    max_request_tokens = 10**6


def batches(run) -> list[list[str]]:
    """Request ids by batch: those whose first token came in the same prefill phase."""
    found: list[list[str]] = []
    seen: set[str] = set()
    for step in run.steps:
        new = [entry.req.request_id for entry in step.plan.scheduled if entry.start == 0]
        if [name for name in new if name not in seen]:
            found.append(new)
        seen.update(new)
    return found


def test_a_batch_starts_when_it_is_full():
    load = [request(f"r{i}", arrival_time=0.1 * i) for i in range(6)]
    run = simulate("static", max_num_seqs=8, batch_size=3, max_wait=100.0).run(load[:3])
    assert batches(run) == [["r0", "r1", "r2"]]
    assert run.steps[0].start_time == pytest.approx(0.2)


def test_a_batch_is_full_at_the_most_that_may_run_and_takes_no_more():
    load = [request(f"r{i}", arrival_time=0.1 * i) for i in range(4)]
    run = simulate("static", max_num_seqs=3, max_wait=100.0).run(load[:3])
    assert run.steps[0].start_time == pytest.approx(0.2)
    load = [request(f"r{i}") for i in range(5)]
    run = simulate("static", max_num_seqs=8, batch_size=3, max_wait=0.5).run(load)
    assert batches(run) == [["r0", "r1", "r2"], ["r3", "r4"]]


def test_it_wakes_for_a_batch_that_fills_and_for_nothing_else():
    scheduler = simulate("static", batch_size=2, max_wait=0.5).engine.scheduler
    assert scheduler.wake_time(0.0) is None
    scheduler.add(request("first", arrival_time=1.0))
    assert scheduler.wake_time(1.0) == pytest.approx(1.5)
    assert scheduler.schedule(1.49).scheduled == []
    assert len(scheduler.schedule(1.5).scheduled) == 1  # the very moment
    scheduler.add(request("second", arrival_time=1.6))
    assert scheduler.wake_time(1.6) is None  # a batch runs


def test_one_that_can_never_run_does_not_end_its_batch():
    scheduler = simulate("static", num_blocks=10, max_wait=0.0).engine.scheduler
    promised, scheduler.allocator = scheduler.allocator, Promises(num_blocks=10, block_size=4, max_model_len=4096)
    assert promised.max_request_tokens == 40
    huge, fits = request("huge", 30, 30), request("fits")
    for req in (huge, fits):
        scheduler.add(req)
    plan = scheduler.schedule(1.0)
    assert plan.rejected == [huge] and plan.admitted == [fits]


def test_a_smaller_batch_starts_after_the_wait():
    load = [request(f"r{i}", arrival_time=1.0 + 0.1 * i) for i in range(2)]
    run = simulate("static", batch_size=3, max_wait=0.5).run(load)
    assert batches(run) == [["r0", "r1"]]
    assert run.steps[0].start_time == pytest.approx(1.5)


def test_nobody_is_admitted_before_the_batch_has_ended():
    long, short, late = request("long", max_tokens=30), request("short", max_tokens=2), request("late")
    late.arrival_time = 0.05
    run = simulate("static", batch_size=2, max_wait=0.0).run([long, short, late])
    assert batches(run) == [["long", "short"], ["late"]]
    assert run.token_times["late"][0] > run.token_times["long"][-1]


@pytest.mark.parametrize("retire", ["hold", "free"])
def test_hold_keeps_a_finished_requests_slots_and_free_gives_them_back(retire):
    long, short = request("long", 4, 30), request("short", 4, 2)
    run = simulate("static", retire=retire, max_wait=0.0).run([long, short])
    whole_life = {"long": 36, "short": 8}  # prompt + max_tokens, in blocks of 4
    owned = [step.usage.owned for step in run.steps]
    assert owned[0] == sum(whole_life.values())
    assert owned[-1] == (sum(whole_life.values()) if retire == "hold" else whole_life["long"])
    assert run.engine.allocator.usage().owned == 0
    held = run.engine.ledger.settle()["held"]
    assert held.max() == (8 if retire == "hold" else 0)


def test_empty_slots_of_held_requests_are_internal_in_the_live_gauges():
    run = simulate("static", max_wait=0.0)
    allocator, scheduler = run.engine.allocator, run.engine.scheduler
    long, short = request("long", 4, 30), request("short", 4, 2)
    view, seen = PoolView(allocator), []

    def look(output):
        classes = view.classes(allocator.usage(), [req for req in (long, short) if not req.is_finished], scheduler.held)
        assert sum(classes.values()) == allocator.usage().total
        if scheduler.held:
            seen.append((list(scheduler.held), classes["internal"]))

    run.run([long, short], on_step=look)
    # Short has slots for 8 tokens and filled its prompt and the first of two; long has 36 for 34.
    assert len(seen) > 20 and all(entry == ([short], 3 + 2) for entry in seen)


def test_the_whole_life_is_reserved_so_nobody_is_preempted():
    load = [request(f"r{i}", 5, 30) for i in range(20)]
    run = simulate("static", num_blocks=30, max_wait=0.0).run(load)
    assert all(req.num_preemptions == 0 and len(req.output_token_ids) == 30 for req in load)
    assert max(len(batch) for batch in batches(run)) == 3  # 9 blocks each


def test_prompts_of_a_batch_are_computed_in_chunks_of_the_budget_before_any_decode():
    load = [request(f"r{i}", 25, 4) for i in range(4)]
    run = simulate("static", max_num_seqs=4, max_num_batched_tokens=20, max_wait=0.0).run(load)
    assert [step.plan.num_new_tokens for step in run.steps[:5]] == [20] * 5
    assert all(len(step.plan.scheduled) == 4 for step in run.steps[5:])


def test_aborting_the_last_of_a_batch_releases_those_that_hold():
    load = [request("short", 4, 1), request("long", 4, 30)]
    run = simulate("static", max_wait=0.0)
    engine = run.engine
    for req in load:
        engine.add(req)
    engine.step()
    assert load[0].is_finished
    assert load[0].num_slots > 0
    assert engine.abort("short") is None  # it ended already
    assert engine.abort("long") is load[1]
    assert engine.allocator.usage().owned == 0
    assert not engine.has_work


def test_an_aborted_request_does_not_hold():
    engine = simulate("static", max_wait=0.0).engine
    load = [request("aborted", 4, 30), request("long", 4, 30)]
    for req in load:
        engine.add(req)
    engine.step()
    engine.abort("aborted")
    assert load[0].num_slots == 0
    assert load[1].num_slots > 0


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"retire": "keep"}, "retire"),
        ({"batch_size": 0}, "batch_size"),
        ({"batch_size": 5, "max_num_seqs": 4}, "batch_size"),
        ({"max_wait": -1.0}, "max_wait"),
    ],
)
def test_bad_options_name_themselves(options, name):
    with pytest.raises(ConfigError, match=f"scheduler.{name}"):
        simulate("static", **options)
