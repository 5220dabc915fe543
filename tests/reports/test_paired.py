"""Paired ratios: the interval against brute-force resampling, its coverage, and the verdicts."""

import numpy as np
import pytest

from reports.paired import HIGHER, LOWER, SAME, TOO_FEW, bootstrap_median, paired_ratio


@pytest.mark.parametrize("count", [9, 10, 57, 200])
def test_bootstrap_equals_resampling(count):
    rng = np.random.default_rng(count)
    values = rng.lognormal(size=count)
    num_resamples = 100_000 if count < 100 else 20_000
    resamples = np.median(rng.choice(values, (num_resamples, count)), axis=1)
    expected = np.percentile(resamples, [2.5, 97.5])
    low, high = bootstrap_median(values, num_resamples)
    spread = values.std()
    assert low == pytest.approx(expected[0], abs=0.02 * spread)
    assert high == pytest.approx(expected[1], abs=0.02 * spread)


def test_bootstrap_covers_the_true_median():
    rng = np.random.default_rng(1)
    hits = 0
    for _ in range(300):
        low, high = bootstrap_median(rng.exponential(size=61), num_resamples=1000)
        hits += low <= np.log(2) <= high
    assert 0.90 <= hits / 300 <= 0.99


def test_bootstrap_of_a_million_is_fast_and_tight():
    values = np.random.default_rng(2).normal(5, 1, 1_000_000)
    low, high = bootstrap_median(values)
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
