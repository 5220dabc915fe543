"""Paired ratios: how often the interval misses, and the verdicts."""

import numpy as np
import pytest
from scipy import stats

from reports.paired import HIGHER, LOWER, MIN_PAIRS, SAME, TOO_FEW, median_interval, paired_ratio


@pytest.mark.parametrize("count", [6, 7, 8, 9, 10, 15, 20, 30, 100])
@pytest.mark.parametrize("draw", ["lognormal", "exponential", "standard_t"])
def test_equal_runs_are_told_apart_in_no_more_than_five_percent(count, draw):
    """A bootstrap's interval found a difference between equals in 6 to 13 % of samples this small."""
    rng = np.random.default_rng(count)
    num_samples = 4000
    noise = rng.standard_t(2, (num_samples, count)) / 10 if draw == "standard_t" else getattr(rng, draw)(
        size=(num_samples, count)
    )  # fmt: skip
    centered = {"lognormal": noise, "exponential": noise / np.log(2), "standard_t": np.exp(noise)}[draw]
    ones = np.ones(count)
    wrong = sum(paired_ratio(ratios, ones)["verdict"] != SAME for ratios in centered)
    assert wrong / num_samples <= 0.05 + 0.007  # two standard errors of 4,000 samples


@pytest.mark.parametrize("count", [MIN_PAIRS, 7, 9, 20, 57, 400, 10_000])
def test_ranks_are_those_of_the_binomial_distribution(count):
    low, high = median_interval(np.random.default_rng(0).permutation(count).astype(float))
    rank = int(low) + 1
    assert high == count - rank
    assert 2 * stats.binom.cdf(rank - 1, count, 0.5) <= 0.05 < 2 * stats.binom.cdf(rank, count, 0.5)


def test_interval_of_a_million_is_fast_and_tight():
    values = np.random.default_rng(2).normal(5, 1, 1_000_000)
    low, high = median_interval(values)
    assert 4.99 < low < 5 < high < 5.01


def test_verdicts():
    rng = np.random.default_rng(3)
    base = rng.lognormal(size=80)
    assert paired_ratio(base * 0.8, base)["verdict"] == LOWER
    assert paired_ratio(base * 1.2, base)["verdict"] == HIGHER
    noisy = paired_ratio(base * rng.lognormal(0, 0.5, 80), base)
    assert noisy["verdict"] == SAME
    assert noisy["ci95_low"] < 1 < noisy["ci95_high"]
    assert paired_ratio(base, base) == {"count": 80, "median_ratio": 1, "ci95_low": 1, "ci95_high": 1, "verdict": SAME}
    assert paired_ratio(base[:5], base[:5])["verdict"] == TOO_FEW


def test_requests_without_a_value_are_left_out():
    values = np.array([1.0, np.nan, 2.0, 0.0])
    assert paired_ratio(values, np.array([2.0, 1.0, np.nan, 1.0]))["count"] == 1
    assert paired_ratio(values[:0], values[:0])["median_ratio"] is None
