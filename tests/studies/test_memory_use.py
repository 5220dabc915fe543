"""Means over steps, with intervals that mean what they say."""

import numpy as np
import pytest

from engine.errors import EngineError
from experiments.studies.memory_use import batch_means


def test_intervals_cover_the_mean_as_often_as_they_say():
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(400):
        noise = rng.normal(size=2000)
        series = np.convolve(noise, np.ones(5) / 5, mode="valid") + 7  # neighbours depend on one another
        mean = batch_means(series, np.ones(len(series)))
        covered += mean.low <= 7 <= mean.high
    assert 0.92 <= covered / 400 <= 0.98


def test_steps_count_by_their_time():
    mean = batch_means(np.array([1.0] * 90 + [11.0] * 10), np.array([1.0] * 90 + [9.0] * 10))
    assert mean.value == pytest.approx(6.0)
    assert mean.low < 6 < mean.high


def test_too_few_steps_are_an_error():
    with pytest.raises(EngineError, match="too few"):
        batch_means(np.array([1.0]), np.array([1.0]))
