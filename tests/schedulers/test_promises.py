"""What each scheduler promises, on the simulated clock; another scheduler breaks the promise on the same load."""

import itertools
import random

import pytest
from scheduler_simulation import prompts_cost_most, request, simulate

from kvarena.engine.request import Request
from kvarena.experiments.recording.step_features import StepFeatures

# ---- chunked: the token budget bounds the time between a running request's tokens

BUDGET, SEQS = 32, 8


def longest_gap(scheduler: str) -> float:
    rng = random.Random(0)
    load = [
        request(f"r{i}", rng.choice([4, 10, 300, 600]), rng.randint(5, 40), arrival_time=rng.uniform(0, 5))
        for i in range(40)
    ]
    run = simulate(scheduler, max_num_seqs=SEQS, max_num_batched_tokens=BUDGET).run(load)
    assert all(req.num_preemptions == 0 for req in load)
    return max(b - a for times in run.token_times.values() for a, b in itertools.pairwise(times))


def test_chunked_bounds_the_gap_between_tokens_by_the_budget():
    longest_step = prompts_cost_most(StepFeatures(BUDGET, SEQS, 0, 0, 0, 1))
    assert longest_gap("chunked") <= longest_step + 1e-9


def test_prefill_first_does_not():
    longest_step = prompts_cost_most(StepFeatures(BUDGET, SEQS, 0, 0, 0, 1))
    assert longest_gap("continuous") > 3 * longest_step


# ---- priority: a lower one never runs while a higher one waits and would fit

NUM_BLOCKS, BLOCK_SIZE = 24, 4


def inversions(scheduler: str, **options) -> tuple[int, int]:
    """(steps in which a less urgent request ran while a more urgent one waited and would have fit, preemptions)."""
    rng = random.Random(1)
    load = [
        request(
            f"r{i}", rng.randint(1, 30), rng.randint(1, 40), arrival_time=rng.uniform(0, 8), priority=rng.randint(0, 2)
        )
        for i in range(80)
    ]
    run = simulate(
        scheduler,
        num_blocks=NUM_BLOCKS,
        block_size=BLOCK_SIZE,
        max_num_seqs=6,
        max_num_batched_tokens=16,
        watermark=0.0,
        **options,
    )
    policy, count = run.engine.scheduler, 0
    plan_step = policy.schedule

    def schedule(now: float):
        nonlocal count
        plan = plan_step(now)
        running = [*policy.decoding, *policy.prefilling]
        for head in policy.requests.values():
            lower = [req for req in running if req.priority > head.priority]
            if head in running or not lower:
                continue
            free = policy.allocator.usage().free + sum(req.num_slots for req in lower)
            count += free >= -(-head.num_tokens // BLOCK_SIZE) * BLOCK_SIZE
        return plan

    policy.schedule = schedule
    run.run(load)
    return count, sum(req.num_preemptions for req in load)


@pytest.mark.parametrize("victim", ["last_arrived", "lowest_priority", "most_blocks"])
def test_priority_lets_no_lower_one_run_while_a_higher_one_would_fit(victim):
    count, preemptions = inversions("priority", victim=victim)
    assert count == 0
    assert preemptions > 0


def test_first_come_first_served_does():
    assert inversions("chunked")[0] > 0


def test_priority_without_preemption_orders_the_queue():
    first = request("first", 4, 20, priority=5)
    later = [request(f"p{priority}", 4, 4, priority=priority, arrival_time=0.001) for priority in (3, 1, 2)]
    run = simulate("priority", num_blocks=6, max_num_seqs=1, max_num_batched_tokens=8, preemption="none")
    run.run([first, *later])
    assert run.order == ["first", "p1", "p2", "p3"]
    assert first.num_preemptions == 0


# ---- fair: the service of two backlogged clients differs by a constant

INPUT_WEIGHT, OUTPUT_WEIGHT, LONGEST_PROMPT = 1.0, 2.0, 40


def largest_service_gap(scheduler: str, **options) -> float:
    """Largest |service(a) - service(b)| while both clients have requests in the queue."""
    rng = random.Random(2)
    load = [request(f"a{i}", rng.randint(20, LONGEST_PROMPT), rng.randint(20, 40), client_id="a") for i in range(60)]
    load += [request(f"b{i}", rng.randint(1, 10), rng.randint(1, 10), client_id="b") for i in range(400)]
    service = {"a": 0.0, "b": 0.0}
    seen: set[Request] = set()
    largest = 0.0
    run = simulate(scheduler, num_blocks=NUM_BLOCKS, max_num_seqs=8, max_num_batched_tokens=64, **options)
    policy = run.engine.scheduler

    def on_step(output):
        nonlocal largest
        for entry, token in zip(output.plan.scheduled, output.result.token_ids, strict=True):
            if entry.req not in seen:
                seen.add(entry.req)
                service[entry.req.client_id] += INPUT_WEIGHT * entry.req.num_prompt_tokens
            service[entry.req.client_id] += OUTPUT_WEIGHT * (token is not None)
        waiting = {
            req.client_id
            for req in policy.requests.values()
            if req not in policy.decoding and req not in policy.prefilling
        }
        if waiting == {"a", "b"}:
            largest = max(largest, abs(service["a"] - service["b"]))

    run.run(load, on_step=on_step)
    return largest


VTC_BOUND = 2 * max(INPUT_WEIGHT * LONGEST_PROMPT, OUTPUT_WEIGHT * NUM_BLOCKS * BLOCK_SIZE)


def test_fair_bounds_the_gap_between_backlogged_clients():
    gap = largest_service_gap("fair", input_weight=INPUT_WEIGHT, output_weight=OUTPUT_WEIGHT)
    assert 0 < gap <= VTC_BOUND


def test_first_come_first_served_does_not_bound_the_gap():
    assert largest_service_gap("chunked") > 3 * VTC_BOUND


def test_fair_does_not_let_a_client_claim_the_time_it_was_away():
    early = [request(f"a{i}", 4, 16, client_id="a") for i in range(30)]
    late = [request(f"b{i}", 4, 16, client_id="b", arrival_time=2.0) for i in range(30)]
    run = simulate("fair", max_num_seqs=1, max_num_batched_tokens=8).run(early + late)
    after = [name[0] for name in run.order[run.order.index("b0") :]]
    # Alternating from its first request on; without the lift `b` would catch up on two seconds first.
    assert after[:20].count("b") == pytest.approx(10, abs=1)


def test_a_credit_is_what_a_client_may_claim_of_the_time_it_was_away():
    """And no more: 6 requests of 4 + 2 * 16, whoever it is that comes back; a stranger has none."""

    def turns(**options) -> int:
        early = [request(f"a{i}", 4, 16, client_id="a") for i in range(60)]
        once = [request("b", 4, 1, client_id="b")]
        late = [request(f"b{i}", 4, 16, client_id="b", arrival_time=5.0) for i in range(30)]
        made = simulate("fair", max_num_seqs=1, max_num_batched_tokens=8, **options).run(early + once * known + late)
        after = [name[0] for name in made.order[made.order.index("b0") :]]
        return after[:20].count("b") - 10

    for known in (True, False):
        assert turns() == pytest.approx(0, abs=1)
        assert turns(credit=6 * 36.0) == pytest.approx(3 if known else 0, abs=1)


def test_fair_forgets_clients_that_are_gone_and_decides_the_same(monkeypatch):
    def run() -> tuple[list[str], int]:
        rng = random.Random(4)
        clients = [f"c{i}" for i in range(300)]
        load = []
        for i in range(600):
            client = rng.choice(clients[i // 3 : i // 3 + 40])
            load.append(
                request(f"r{i}", rng.randint(1, 12), rng.randint(1, 12), client_id=client, arrival_time=i * 0.11)
            )
        made = simulate("fair", num_blocks=NUM_BLOCKS, max_num_seqs=4, max_num_batched_tokens=16).run(load)
        return made.order, len(made.engine.scheduler.counters)

    every_order, every_count = run()
    monkeypatch.setattr("kvarena.schedulers.fair.FORGET_ABOVE", 8)
    order, count = run()
    assert order == every_order
    assert every_count > 200
    assert count < 60


# ---- sjf: short requests first, and nobody starves

AGEING = 4.0


def overtakers(scheduler: str, **options) -> list[float]:
    """Arrival times, after the long request's own, of the short requests that began before it did."""
    long = request("long", 4, 80, arrival_time=1.0)
    short = [request(f"s{i}", 4, 8, arrival_time=0.05 * i) for i in range(1200)]  # more than one server can take
    run = simulate(scheduler, max_num_seqs=1, max_num_batched_tokens=8, **options).run([long, *short])
    began = run.order.index("long")
    by_name = {req.request_id: req for req in short}
    return [by_name[name].arrival_time - 1.0 for name in run.order[:began]]


def test_sjf_is_overtaken_only_by_those_who_arrive_within_its_ageing():
    later = overtakers("sjf", ageing=AGEING)
    assert 0 < max(later) <= (80 - 8) / AGEING


def test_sjf_with_hardly_any_ageing_would_starve_it_for_long():
    assert max(overtakers("sjf", ageing=1e-6)) > 2 * 80 / AGEING


def test_sjf_takes_the_shortest_first():
    load = [request(f"len{length}", 4, length) for length in (9, 3, 7, 5)]
    run = simulate("sjf", max_num_seqs=1, max_num_batched_tokens=8).run(load)
    assert run.order == ["len3", "len5", "len7", "len9"]
