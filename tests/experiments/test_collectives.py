"""A model on several simulated cards: what one card's share takes, and what the cards lose to one another."""

import pytest

from kvarena.engine.errors import ConfigError
from kvarena.experiments.building.build import build_engine
from kvarena.experiments.building.parts import sizes_of
from kvarena.experiments.recording.step_features import StepFeatures
from kvarena.experiments.settings.compose import load_run
from kvarena.experiments.simulation.collectives import AllReduce, Collectives, ParallelStepTime, Ranks
from kvarena.experiments.simulation.profiles import load_profile

LLAMA = ["runner=simulated", "model=llama-3.1-8b-shape", "engine.dtype=bfloat16", "kv_cache.num_slots=null"]
EXCHANGE = Collectives("a test", {2: AllReduce([100.0, 1000.0], [1e-6, 1e-5])}, send_latency=1e-5, send_bandwidth=1e9)


def decode(requests: int, kv: int = 1024) -> StepFeatures:
    return StepFeatures(0, requests, requests * kv, 0, 0, 0)


def sizes():
    return sizes_of(load_run(LLAMA))


def test_an_all_reduce_is_linear_in_the_logarithms_and_flat_below_its_table():
    reduce = AllReduce([100.0, 1000.0], [1e-6, 1e-5])
    assert reduce(0) == 0 and reduce(7) == 1e-6
    assert reduce(100 * 10**0.5) == pytest.approx(1e-6 * 10**0.5)
    assert reduce(10_000) == pytest.approx(1e-4)


def test_a_layer_adds_up_twice_over_its_ranks():
    share = lambda features: 1e-3 * features.num_tokens  # noqa: E731
    step = ParallelStepTime(share, Ranks(2, 1), num_layers=10, row_bytes=100, collectives=EXCHANGE)
    assert step(decode(10)) == pytest.approx(10e-3 + 2 * 10 * 1e-5)


def test_stages_work_on_as_many_batches_as_there_are():
    """Eight requests over four stages: each batch of two passes four stages, one after the other."""
    share = lambda features: 1e-3 + 1e-4 * features.num_tokens  # noqa: E731
    step = ParallelStepTime(share, Ranks(1, 4), num_layers=8, row_bytes=1000, collectives=EXCHANGE)
    assert step(decode(8)) == pytest.approx(4 * (1e-3 + 2e-4 + 1e-5 + 2 * 1000 / 1e9))
    assert step(decode(1)) == pytest.approx(4 * (1e-3 + 1e-4 + 1e-5 + 1000 / 1e9))  # nothing to split: stages idle


@pytest.mark.parametrize("name", ["h200", "h200-tables"])
def test_more_cards_are_faster_and_never_as_much_as_they_are_more(name):
    profile = load_profile(name)
    for features in (decode(1), decode(256), StepFeatures(4096, 0, 4096, 4096 * 4097 // 2, 0, 1, 4096)):
        one, two, four = (profile.step_time(sizes(), 16, 0.0, Ranks(tp, 1))(features) for tp in (1, 2, 4))
        assert one > two > four and one / two < 2.02 and two / four < 2.02


def test_the_pool_has_what_the_weights_leave_of_all_cards():
    slots = [
        build_engine(load_run([*LLAMA, "runner.profile=h200", *more])).pool_facts["num_slots"]
        for more in ([], ["parallel.tensor_parallel_size=2"], ["parallel.pipeline_parallel_size=2"])
    ]
    weights, kv = sizes().weight_bytes, 131072
    assert slots[0] == pytest.approx((141e9 * 0.9 - weights) / kv, rel=1e-3)
    assert slots[1] == slots[2] == pytest.approx((2 * 141e9 * 0.9 - weights) / kv, rel=1e-3)


def test_kv_heads_beyond_their_number_are_kept_twice():
    small = ["runner=simulated", "model=llama-3.1-8b-shape", "engine.dtype=bfloat16", "kv_cache.num_slots=null",
             "model.shape.num_key_value_heads=2", "runner.profile=h200"]  # fmt: skip
    two, eight = (
        build_engine(load_run([*small, f"parallel.tensor_parallel_size={tp}"])).pool_facts["num_slots"] for tp in (2, 8)
    )
    weights, kv = sizes_of(load_run(small)).weight_bytes, 32768
    assert two == pytest.approx((2 * 141e9 * 0.9 - weights) / kv, rel=1e-3)
    assert eight == pytest.approx((8 * 141e9 * 0.9 - weights) / kv * 2 / 8, rel=1e-3)


def test_a_model_that_one_card_cannot_hold_fits_on_two():
    large = ["runner=simulated", "model=llama-3.1-70b-shape", "engine.dtype=bfloat16", "kv_cache.num_slots=null"]
    with pytest.raises(ConfigError, match=r"141\.\d GB of weights, which do not fit .* more of them"):
        build_engine(load_run(large))
    parts = build_engine(load_run([*large, "parallel.tensor_parallel_size=2"]))
    assert parts.simulation_facts["ranks"] == {"tensor": 2, "pipeline": 1}


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("parallel.tensor_parallel_size=3",), "tensor_parallel_size=3 does not divide the 32 heads"),
        (("parallel.pipeline_parallel_size=5",), "pipeline_parallel_size=5 does not divide the 32 layers"),
        (("parallel.tensor_parallel_size=16",), "tensor_parallel_size=16: runner.profile knows all-reduces of 2, 4, 8"),
        (("runner.profile=h100", "parallel.tensor_parallel_size=2"), "says nothing of what 2 cards take"),
        (("runner.profile=h200-llama-3.1-8b-overlap", "engine.overlap=true", "parallel.tensor_parallel_size=2",
          "kv_cache.num_slots=1000"), "was measured on one card, and 2 are asked for"),
        (("parallel.tensor_parallel_size=0",), "parallel.tensor_parallel_size=0"),
    ],
)  # fmt: skip
def test_ranks_that_do_not_fit_are_a_line(overrides, words):
    with pytest.raises(ConfigError) as error:
        build_engine(load_run([*LLAMA, *overrides]))
    assert words in str(error.value)


@pytest.mark.parametrize(
    "broken", [([2.0, 1.0], [1.0, 1.0]), ([1.0], [1.0]), ([1.0, 2.0], [1.0]), ([1.0, 2.0], [0.0, 1.0])]
)
def test_a_broken_table_is_a_line(broken):
    with pytest.raises(ConfigError, match=r"profile\.collectives\.all_reduce"):
        AllReduce(*broken)
