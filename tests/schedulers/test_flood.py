"""A client that floods, and one that does not, on a simulated clock: each is a key, as --clients-by key has it."""

import random

from scheduler_simulation import request, simulate

from kvarena.experiments.settings import defaults

defaults.register()  # of conf/scheduler's interpolations


def waits(scheduler, flood):
    """Seconds to the first token of a steady client's requests, beside another one that sends `flood` times as many."""
    steady = [request(f"s{i}", client_id="key 0", arrival_time=0.2 * i) for i in range(40)]
    other = [request(f"f{i}", client_id="key 1", arrival_time=0.2 * i / flood) for i in range(40 * flood)]
    made = simulate(scheduler, max_num_seqs=8, max_num_batched_tokens=256).run([*steady, *other])
    return sorted(made.token_times[req.request_id][0] - req.arrival_time for req in steady)


def test_one_that_floods_leaves_another_what_it_had():
    """On a simulated clock: in order of arrival the steady client waits with the flood, under VTC it does not."""
    before, fair, in_order = waits("fair", 1), waits("fair", 30), waits("chunked", 30)
    assert fair[-1] < 0.25 * in_order[-1]
    assert fair[len(fair) // 2] < before[len(before) // 2] + 0.2  # a place among eight that run, and no queue


def uneven(times: float, credit: float, seed: int) -> tuple[float, int]:
    """A client that offers half of the capacity as a Poisson process, beside one that offers `times` as much.

    Seconds in which 99 % of the first one's requests have their first token, and how many tokens it gets.
    """
    seats, num_in, num_out, end = 8, 16, 48, 40.0

    def seconds(features):
        return 0.02 + 0.0005 * features.num_decode_requests + 0.0002 * features.num_prefill_tokens

    capacity = seats / (num_out * (0.02 + 0.0005 * seats) + seats * num_in * 0.0002)

    def load(name, rate):
        source, at = random.Random(f"{name} {seed}"), 0.0
        while (at := at + source.expovariate(rate)) < end:
            yield request(f"{name}{at}", num_in, num_out, client_id=name, arrival_time=at)

    steady, other = list(load("s", capacity / 2)), list(load("f", times * capacity / 2))
    options = {"max_num_seqs": seats, "max_num_batched_tokens": 256, "step_time": seconds, "credit": credit}
    made = simulate("fair", **options).run([*steady, *other], until=end)
    first = {name: at[0] for name, at in made.token_times.items() if at}
    waits = sorted(first.get(req.request_id, end) - req.arrival_time for req in steady)
    return waits[int(0.99 * len(waits))], sum(len(made.token_times.get(req.request_id, ())) for req in steady)


def test_a_credit_lets_an_uneven_client_have_its_share_beside_a_flood():
    """Without one, each moment in which nothing of it waits is the flood's for good."""
    for seed in (2, 3):
        _, alone = uneven(1, 16384.0, seed)
        (wait, tokens), (without, fewer) = uneven(10, 16384.0, seed), uneven(10, 0.0, seed)
        assert wait < 0.8 * without
        assert fewer < tokens and tokens > 0.95 * alone
