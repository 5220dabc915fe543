"""The intervals of reports against the formulas that they had before scipy made them, and what they say in words."""

import numpy as np
import pytest

from kvarena.experiments.studies.claims import Mean
from kvarena.reports.analysis.intervals import StudentMean, wilson
from kvarena.reports.drawing.format import DASH, interval, percent


def by_hand(num_good: int, count: int) -> tuple[float, float]:
    z2 = 1.959964**2
    share = num_good / count
    center = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = (z2 * (share * (1 - share) / count + z2 / (4 * count**2))) ** 0.5 / (1 + z2 / count)
    return max(0.0, center - half), min(1.0, center + half)


@pytest.mark.parametrize("count", [1, 2, 10, 997, 1_000_000])
def test_wilsons_interval_is_the_formula(count):
    for num_good in {0, 1, count // 3, count - 1, count}:
        assert wilson(num_good, count) == pytest.approx(by_hand(num_good, count), rel=1e-7, abs=1e-7)


# Two-sided 5 % points of Student's t, from its printed tables.
@pytest.mark.parametrize(("count", "point"), [(2, 12.7062), (3, 4.30265), (5, 2.7764), (10, 2.2622), (31, 2.0423)])
def test_students_interval_is_the_tables(count, point):
    values = np.random.default_rng(count).normal(1.0, 0.1, count)
    error = values.std(ddof=1) / count**0.5
    low, high = StudentMean.of(values).interval
    assert ((high - low) / 2 / error, (high + low) / 2) == pytest.approx((point, values.mean()), abs=6e-5)
    assert Mean.of(list(values)) == pytest.approx((values.mean(), low, high), rel=1e-12)


def test_p_is_that_of_the_interval():
    """At the end of the interval of the mean, p is 5 %."""
    values = np.array([1.0, 2.0, 4.0, 3.0])
    low, _ = StudentMean.of(values).interval
    assert StudentMean.of(values - low).p == pytest.approx(0.05)
    assert StudentMean.of(np.ones(3), 1e-9).p < 1e-12
    assert StudentMean.of(np.ones(3)).interval == (1.0, 1.0)


def test_the_text_of_an_interval():
    assert interval((1.299, 1.38)) == "[1.30, 1.38]"
    assert interval((0.5, 0.75), percent) == "[50.0 %, 75.0 %]"
    assert interval(None) == interval((None, None)) == DASH
