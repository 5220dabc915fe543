"""Verdicts from repeats: how often they are false under noise and drift, how often they decide, and odd inputs."""

import itertools
import math
from collections import Counter

import numpy as np
import pytest

from kvarena.experiments.correctness.verdict_rates import METRICS, Setting, count_false, count_right
from kvarena.experiments.settings.run_order import order
from kvarena.reports.comparing.verdicts import (
    FASTEST,
    HIGHER,
    LEVEL,
    LOWER,
    MACHINE_CHANGED,
    NO_PAIR,
    ONE_ORDER,
    ONE_RUN,
    ONE_SEED,
    SAME,
    THROUGHPUT,
    Question,
    Ratios,
    compare_cells,
    decide,
    holm,
    shares,
    smallest_effect,
)

DRIFTS = [("none", 0.0), ("linear", 0.005), ("linear", 0.02), ("step", 0.02), ("large step", 0.02), ("walk", 0.02)]


def _ask(values, **of_ratios):
    return decide([Question("it", THROUGHPUT, [Ratios(np.array(values, dtype=float), **of_ratios)])])[0]


@pytest.mark.parametrize("num_cells", range(1, 13))
def test_order_is_balanced(num_cells):
    """In each two blocks every pair runs in both orders; over the whole design every place and follower is equal."""
    blocks = [order(num_cells, block) for block in range(num_cells if num_cells % 2 == 0 else 2 * num_cells)]
    assert all(sorted(block) == list(range(num_cells)) for block in blocks)
    assert all(second == first[::-1] for first, second in zip(blocks[::2], blocks[1::2], strict=True))
    places = Counter((cell, place) for block in blocks for place, cell in enumerate(block))
    followers = Counter(pair for block in blocks for pair in itertools.pairwise(block))
    assert len(set(places.values())) == 1
    assert num_cells == 1 or (len(followers) == num_cells * (num_cells - 1) and len(set(followers.values())) == 1)


SIZES = [(2, 2), (2, 5), (3, 3), (12, 2), (12, 6)]
# One metric and all of them in turn; both for every drift and size with the slow tests.
TURNS = [(*drift, *size, (1, len(METRICS))[(i + j) % 2])
         for i, drift in enumerate(DRIFTS) for j, size in enumerate(SIZES)]  # fmt: skip
OTHERS = [(*one[:-1], 1 if one[-1] > 1 else len(METRICS)) for one in TURNS]


@pytest.mark.parametrize(
    ("drift", "size", "num_cells", "num_rounds", "num_metrics"),
    [*TURNS, *(pytest.param(*one, marks=pytest.mark.slow) for one in OTHERS)],
)
def test_equal_cells_are_rarely_told_apart(drift, size, num_cells, num_rounds, num_metrics):
    """Seeds in the order a a a b b b told them apart in 54 to 100 % of reports under 1 % of drift a run."""
    setting = Setting(drift, size, num_cells, num_rounds, num_metrics=num_metrics)
    assert count_false(setting, 100, seed=0) <= 8


@pytest.mark.parametrize("num_seeds, num_rounds", [(2, 1), (2, 6), (3, 2), (5, 1)])
def test_rounds_of_one_seed_count_once(num_seeds, num_rounds):
    """Each cell has an effect of its own in each seed: counted as repeats, rounds would tell equals apart."""
    assert count_false(Setting("linear", 0.01, 3, num_rounds, num_seeds), 100, seed=0) <= 8


@pytest.mark.parametrize("num_metrics", [1, len(METRICS)])
def test_a_difference_of_five_percent_is_found_in_five_rounds(num_metrics):
    setting = Setting("none", 0.0, 2, 5, num_metrics=num_metrics, effect=math.log(1.05))
    assert count_right(setting, 200, seed=0) >= 180


def test_one_pair_has_no_interval_and_no_verdict():
    answer = _ask([5.0])
    assert (answer.verdict, answer.interval, answer.p, answer.p_holm) == (ONE_RUN, None, None, None)
    assert answer.ratio == pytest.approx(5)
    assert _ask([]).verdict == _ask([np.nan, np.inf, 0.0]).verdict == NO_PAIR


def test_rounds_of_a_simulated_seed_are_one_run():
    assert _ask([1.5, 1.5], is_simulated=True).verdict == ONE_SEED
    assert _ask([1.5, 1.5], is_simulated=True).repeats == 1
    assert _ask([1.5, 1.5, 1.6, 1.6], seeds=[0, 0, 1, 1], is_simulated=True).repeats == 2


def test_two_rounds_that_agree_to_the_last_bit():
    assert _ask([1.0, 1.0]).verdict == SAME
    assert _ask([1.0, 1.0]).interval == pytest.approx((1, 1))
    assert _ask([1.0 + 1e-15, 1.0 + 2e-15]).verdict == SAME
    assert _ask([0.9, 0.9]).verdict == LOWER


def test_blocks_without_a_value_are_left_out():
    answer = _ask([1.1, np.nan, 1.11, 1.1, 1.105])
    assert (answer.repeats, answer.verdict) == (4, HIGHER)
    metrics = {THROUGHPUT: np.array([[100.0, 101, 99], [150, 151, np.nan], [200, 199, 201]])}
    answers = compare_cells(metrics | {"tpot_seconds": np.full((3, 3), np.nan)})
    assert [answer.repeats for answer in answers] == [2, 3, 0, 0, 2]
    assert [answer.verdict for answer in answers[2:4]] == [NO_PAIR, NO_PAIR]


def test_a_baseline_that_failed_leaves_nothing_to_compare():
    answers = compare_cells({THROUGHPUT: np.array([[np.nan] * 3, [5.0, 5.1, 5.2], [7.0, 7.1, 7.2]])})
    assert [answer.verdict for answer in answers] == [NO_PAIR] * 3


def test_seeds_of_different_length_count_once_each():
    answer = _ask([1.2, 1.2, 1.2, 1.3], seeds=["a", "a", "a", "b"])
    assert (answer.repeats, answer.unit) == (2, "seeds")
    assert answer.ratio == pytest.approx((1.2 * 1.3) ** 0.5)


def test_a_machine_that_changed_by_more_than_the_effect_decides_nothing():
    values = [1.10, 1.101, 1.102, 1.099, 1.1]
    assert _ask(values).verdict == HIGHER
    assert _ask(values, machine=np.full(5, 1.05)).verdict == HIGHER
    assert _ask(values, machine=np.full(5, 0.8)).verdict == MACHINE_CHANGED
    assert _ask(values, machine=np.array([np.nan, 1.3, np.nan, 1.3, np.nan])).verdict == MACHINE_CHANGED
    assert _ask(values, machine=np.full(5, np.nan)).verdict == HIGHER


def test_cells_that_never_changed_places_are_not_told_apart():
    """The runs of a, and then those of b: a drift looks like a difference."""
    values = [1.10, 1.101, 1.102, 1.099, 1.1]
    assert _ask(values, positions=np.full(5, 60.0)).verdict == ONE_ORDER
    assert _ask(values, positions=np.full(5, -60.0)).verdict == ONE_ORDER
    assert _ask(values, positions=np.array([60.0, -60, 60, 60, 60])).verdict == HIGHER
    assert _ask(values, positions=np.array([60.0, np.nan, 60, 60, 60])).verdict == HIGHER
    assert _ask(values, positions=np.full(5, 60.0), seeds=range(5), is_simulated=True).verdict == HIGHER


def test_the_fastest_must_exceed_every_other_cell():
    rng = np.random.default_rng(0)

    def fastest(*speeds):
        noise = rng.normal(0, 0.01, (len(speeds), 6))
        answer = compare_cells({THROUGHPUT: np.array(speeds)[:, None] * np.exp(noise)})[-1]
        assert answer.metric == FASTEST
        return answer

    assert fastest(100, 150, 200).verdict == HIGHER
    assert fastest(100, 150, 200).key == (2, 1)
    assert fastest(100, 200, 200).verdict == SAME
    assert fastest(100, 200, 200).p_holm > LEVEL


def test_holm_with_equal_weights_is_holm():
    assert holm([0.01, 0.04, 0.03], np.full(3, 1 / 3)) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([], np.empty(0)) == []
    assert holm([0.9, 0.8], np.full(2, 0.5)) == [1.0, 1.0]


def test_half_of_the_level_is_throughputs():
    assert shares([THROUGHPUT, "ttft_seconds", "e2e_seconds"]).tolist() == [0.5, 0.25, 0.25]
    assert shares([THROUGHPUT, FASTEST]).tolist() == [0.5, 0.5]
    assert shares(["ttft_seconds"]).tolist() == [1.0]


def test_twelve_cells_six_rounds_three_seeds():
    rng = np.random.default_rng(1)
    values = np.exp(rng.normal(0, 0.01, (12, 18)))
    values[3] *= 2
    answers = compare_cells(dict.fromkeys(METRICS, values), np.repeat([0, 1, 2], 6).tolist())
    assert len(answers) == 11 * 4 + 1
    assert all(answer.repeats == 3 for answer in answers)
    assert {answer.key[0] for answer in answers if answer.is_decided and answer.metric == "e2e_seconds"} <= {3}


def test_smallest_effect_is_what_ninety_percent_find():
    sd = 0.01 * 2**0.5
    effect = smallest_effect(sd, 5)
    assert 1.02 < effect < 1.05
    found = count_right(Setting("none", 0.0, 2, 5, effect=math.log(effect)), 400, seed=2)
    assert found / 400 == pytest.approx(0.9, abs=0.045)  # three standard errors
    assert smallest_effect(sd, 2) > smallest_effect(sd, 3) > effect > smallest_effect(sd, 10)
