"""What each router promises, by states that say what it may know."""

from dataclasses import dataclass, field

import pytest

from kvarena.engine.errors import ConfigError
from kvarena.engine.request import Request, SamplingParams
from kvarena.experiments.settings.strategies import strategy_names
from kvarena.routers.kv_exact import KVExactRouter
from kvarena.routers.least_kv import LeastKVRouter
from kvarena.routers.power_of_two import PowerOfTwoRouter
from kvarena.routers.prefix_affinity import PrefixAffinityRouter
from kvarena.routers.round_robin import RoundRobinRouter


@dataclass
class State:
    num_slots: int = 1000
    num_sent: int = 0
    num_open: int = 0
    num_owned_slots: int = 0
    num_queued_tokens: int = 0
    num_tokens_to_compute: int = 0
    hits: dict[str, int] = field(default_factory=dict)

    def cached_tokens(self, req: Request) -> int:
        return self.hits.get(req.request_id, 0)


def request(name: str = "r", prompt: list[int] | None = None) -> Request:
    return Request(name, prompt or [1] * 100, SamplingParams(max_tokens=4))


def test_every_file_of_conf_makes_a_router():
    assert strategy_names("router") == [
        "kv_exact", "least_kv", "none", "power_of_two", "prefix_affinity", "round_robin",
    ]  # fmt: skip


def test_round_robin_looks_at_nothing():
    router, states = RoundRobinRouter(num_replicas=3), [State(num_open=9), State(), State()]
    assert [router.route(request(), states) for _ in range(6)] == [0, 1, 2, 0, 1, 2]


def test_least_kv_counts_what_is_owned_and_what_waits():
    router = LeastKVRouter(num_replicas=3)
    assert router.route(request(), [State(num_owned_slots=50), State(num_queued_tokens=60), State(num_sent=9)]) == 2
    assert router.route(request(), [State(num_owned_slots=50), State(num_queued_tokens=60), State(1000, 0, 0, 70)]) == 0


def test_least_kv_does_not_send_all_to_the_first_of_idle_replicas():
    assert LeastKVRouter(num_replicas=2).route(request(), [State(num_sent=3), State(num_sent=2)]) == 1


def test_power_of_two_never_takes_the_worst_of_three_and_keeps_its_draws():
    states = [State(num_open=5), State(num_open=1), State(num_open=3)]
    chosen = [PowerOfTwoRouter(num_replicas=3, seed=1).route(request(), states) for _ in range(1)]
    routers = [PowerOfTwoRouter(num_replicas=3, seed=7) for _ in range(2)]
    both = [[router.route(request(), states) for _ in range(200)] for router in routers]
    assert both[0] == both[1]
    assert 0 not in both[0] + chosen  # the most loaded loses every pair that it is in
    assert 0.2 < both[0].count(2) / 200 < 0.5  # drawn without the best in one of three pairs
    assert PowerOfTwoRouter(num_replicas=1).route(request(), states[:1]) == 0


def test_affinity_follows_the_prefix_and_spreads_what_is_new():
    router, states = PrefixAffinityRouter(num_replicas=2, block_size=10), [State(), State()]
    one, other = list(range(100)), list(range(500, 600))
    assert [router.route(request(prompt=prompt), states) for prompt in (one, other)] == [0, 1]
    assert router.route(request(prompt=[*other, 1, 2, 3]), states) == 1
    assert router.route(request(prompt=[*one[:60], *range(900, 940)]), states) == 0
    # Less than half of the prompt is known: it goes to whoever knows the least.
    assert router.route(request(prompt=[*one[:40], *range(700, 760)]), states) == 1


def test_affinity_gives_way_to_the_load():
    router, prompt = PrefixAffinityRouter(num_replicas=2, block_size=10, balance_abs=4), list(range(100))
    assert router.route(request(prompt=prompt), [State(), State()]) == 0
    assert router.route(request(prompt=prompt), [State(num_open=4), State()]) == 0
    assert router.route(request(prompt=prompt), [State(num_open=15), State(num_open=10)]) == 0  # 1.5 times is even
    assert router.route(request(prompt=prompt), [State(num_open=5), State()]) == 1


def test_affinity_forgets_the_least_recent_prompt_from_its_end():
    router, states = PrefixAffinityRouter(num_replicas=2, block_size=10, max_blocks=20), [State(), State()]
    prompts = [list(range(start, start + 100)) for start in (0, 1000, 2000)]
    assert [router.route(request(prompt=prompt), states) for prompt in prompts[:2]] == [0, 1]
    router.route(request(prompt=prompts[2][:50]), [State(num_open=50), State()])  # five blocks of the oldest are gone
    assert router._known(0, list(router._prefixes(request(prompt=prompts[0])))) == 5
    assert router._num_known == [5, 15]


def test_kv_exact_weighs_hits_against_load():
    router = KVExactRouter(num_replicas=2)
    hit = {"r": 80}
    assert router.route(request(), [State(), State(hits=hit)]) == 1
    assert router.route(request(), [State(), State(hits=hit, num_owned_slots=79)]) == 1
    assert router.route(request(), [State(), State(hits=hit, num_owned_slots=81)]) == 0
    assert router.route(request(), [State(), State(hits=hit, num_tokens_to_compute=81)]) == 0
    blind = KVExactRouter(num_replicas=2, overlap_weight=0.0)
    assert blind.route(request(), [State(), State(hits=hit, num_owned_slots=1)]) == 0


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: RoundRobinRouter(num_replicas=0), "router.num_replicas=0 must be an integer in [1, 1024]"),
        (lambda: PowerOfTwoRouter(num_replicas=2, seed=-1), "router.seed=-1"),
        (lambda: PrefixAffinityRouter(num_replicas=2, match=1.5), "router.match=1.5 must be in [0, 1]"),
        (lambda: PrefixAffinityRouter(num_replicas=2, balance_rel=0.5), "router.balance_rel=0.5 must be at least 1"),
        (lambda: KVExactRouter(num_replicas=2, overlap_weight=-1), "router.overlap_weight=-1 must be at least 0"),
    ],
)
def test_options_out_of_range_are_a_line(make, words):
    with pytest.raises(ConfigError) as error:
        make()
    assert str(error.value).startswith(words.split(" must")[0]) and words in str(error.value)
