"""Intervals at 95 %, by scipy: of a mean over repeats (Student's t), of a share of requests (Wilson's).

Studies and benchmarks take them from here too, so that every interval of a report means the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import special

CONFIDENCE = 0.95


class StudentMean(NamedTuple):
    """A mean and what Student's t says of it.

    Attributes:
        value: the mean.
        error: its standard error.
        num: of the values, at least two.
    """

    value: float
    error: float
    num: int

    @classmethod
    def of(cls, values: Sequence[float] | np.ndarray, least_sd: float = 0.0) -> StudentMean:
        """The mean of at least two values; below `least_sd` their spread is the rounding of floats."""
        sd = max(float(np.std(values, ddof=1)), least_sd)
        return cls(float(np.mean(values)), sd / len(values) ** 0.5, len(values))

    @property
    def interval(self) -> tuple[float, float]:
        """Of the mean, at 95 %."""
        half = float(special.stdtrit(self.num - 1, (1 + CONFIDENCE) / 2)) * self.error
        return self.value - half, self.value + half

    @property
    def p(self) -> float:
        """Two-sided, that the mean is 0; the values must differ."""
        return 2 * float(special.stdtr(self.num - 1, -abs(self.value) / self.error))


def wilson(num_good: int, count: int) -> tuple[float, float]:
    """Score interval of a share (Wilson, 1927); unlike a bootstrap's it is no point when all are good."""
    from scipy import stats  # late: it takes a third of a second, and most runs have no objective

    low, high = stats.binomtest(num_good, count).proportion_ci(CONFIDENCE, method="wilson")
    return float(low), float(high)
