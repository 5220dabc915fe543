"""A client that floods, and one that does not, on a simulated clock: each is a key, as --clients-by key has it."""

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
