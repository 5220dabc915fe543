"""Distributions of lengths. Each draws from a stream in order: the first k of n draws are the first k of any n."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from kvarena.engine.checks import check_int, check_keys, check_number
from kvarena.engine.errors import ConfigError
from kvarena.experiments.workloads.parts.limits import MAX_LENGTH

_MIN_ACCEPTANCE = 1e-3


class LengthDistribution(Protocol):
    """Draws lengths in tokens."""

    def draw(self, rng: np.random.Generator, num: int) -> NDArray[np.int64]:
        """`num` lengths, each at least 1."""
        ...


class FixedLength:
    """Always the same length."""

    def __init__(self, length: int) -> None:
        self.length = length

    @classmethod
    def from_option(cls, key: str, option: Any) -> Self:
        """From a length. Raises ConfigError."""
        return cls(check_int(key, option, 1, MAX_LENGTH))

    def draw(self, rng: np.random.Generator, num: int) -> NDArray[np.int64]:  # noqa: ARG002
        """`num` times the length; `rng` is not used."""
        return np.full(num, self.length, dtype=np.int64)


class UniformLength:
    """Every integer in [low, high] alike. Mean (low + high) / 2."""

    def __init__(self, low: int, high: int) -> None:
        self.low = low
        self.high = high

    @classmethod
    def from_option(cls, key: str, option: Any) -> Self:
        """From {min, max}, both included. Raises ConfigError."""
        option = check_keys(key, option, ("min", "max"))
        low = check_int(f"{key}.min", option["min"], 1, MAX_LENGTH)
        return cls(low, check_int(f"{key}.max", option["max"], low, MAX_LENGTH))

    def draw(self, rng: np.random.Generator, num: int) -> NDArray[np.int64]:
        """`num` lengths."""
        return rng.integers(self.low, self.high, size=num, endpoint=True, dtype=np.int64)


class LognormalLength:
    """A lognormal truncated to [low, high], with a given mean *after* truncation.

    The truncated mean is exp(mu + s^2/2) * [Phi(b - s) - Phi(a - s)] / [Phi(b) - Phi(a)], with a and b the bounds'
    standardised logarithms; it grows with mu, and mu is found by bisection.

    Args:
        mean: of the drawn lengths, in tokens (up to rounding to whole tokens).
        sigma: standard deviation of the logarithm before truncation.
        low: smallest length.
        high: largest length.
        key: the option's name, for messages.

    Raises:
        ConfigError: no truncated lognormal of this sigma and these bounds has this mean.
    """

    def __init__(self, mean: float, sigma: float, low: int, high: int, key: str = "length") -> None:
        self.mean, self.sigma, self.low, self.high = mean, sigma, low, high
        if low == high or sigma == 0:
            raise ConfigError(f"{key}: a lognormal needs max > min and sigma > 0; for one length use workload=fixed")
        self._log_low, self._log_high = math.log(low), math.log(high)
        below, above = self._log_low - 3 * sigma, self._log_high + 3 * sigma
        if not self._truncated_mean(below) < mean < self._truncated_mean(above):
            raise ConfigError(
                f"{key}.mean={mean:g} cannot be reached with sigma={sigma:g} between min={low} and max={high}; widen "
                f"the bounds, or take a mean in ({self._truncated_mean(below):.4g}, {self._truncated_mean(above):.4g})"
            )
        for _ in range(100):
            mu = (below + above) / 2
            if self._truncated_mean(mu) < mean:
                below = mu
            else:
                above = mu
        self.mu = (below + above) / 2
        if self._mass(self.mu, 0.0) < _MIN_ACCEPTANCE:
            raise ConfigError(f"{key}.sigma={sigma:g} is too large for the bounds [{low}, {high}]; lower it")

    @classmethod
    def from_option(cls, key: str, option: Any) -> Self:
        """From {mean, sigma, min, max}. Raises ConfigError."""
        option = check_keys(key, option, ("mean", "sigma", "min", "max"))
        low = check_int(f"{key}.min", option["min"], 1, MAX_LENGTH)
        high = check_int(f"{key}.max", option["max"], low, MAX_LENGTH)
        mean = check_number(f"{key}.mean", option["mean"], 1.0)
        return cls(mean, check_number(f"{key}.sigma", option["sigma"], above=True), low, high, key)

    def _mass(self, mu: float, shift: float) -> float:
        """Phi(b - shift) - Phi(a - shift), taken in the tail where it does not cancel."""
        a = (self._log_low - mu) / self.sigma - shift
        b = (self._log_high - mu) / self.sigma - shift
        if a > 0:
            a, b = -b, -a
        return 0.5 * (math.erfc(-b / math.sqrt(2)) - math.erfc(-a / math.sqrt(2)))

    def _truncated_mean(self, mu: float) -> float:
        return math.exp(mu + self.sigma**2 / 2) * self._mass(mu, self.sigma) / self._mass(mu, 0.0)

    def draw(self, rng: np.random.Generator, num: int) -> NDArray[np.int64]:
        """`num` lengths: normals are drawn in order, and those outside the bounds are passed over."""
        parts: list[NDArray[np.float64]] = []
        missing = num
        while missing > 0:
            logs = self.mu + self.sigma * rng.standard_normal(int(missing / self._mass(self.mu, 0.0)) + 16)
            inside = logs[(logs >= self._log_low) & (logs <= self._log_high)]
            parts.append(inside)
            missing -= len(inside)
        return np.rint(np.exp(np.concatenate(parts)[:num])).astype(np.int64)


class QuantileLength:
    """A distribution given by a table of quantiles, linear in between.

    Args:
        shares: increasing from 0 (the minimum) to 1 (the maximum).
        lengths: the quantile of each share, in tokens.
    """

    def __init__(self, shares: Sequence[float], lengths: Sequence[float]) -> None:
        self._shares = np.array(shares, dtype=np.float64)
        self._lengths = np.array(lengths, dtype=np.float64)

    @property
    def mean(self) -> float:
        """The mean, before rounding to whole tokens."""
        return float(np.trapezoid(self._lengths, self._shares))

    def draw(self, rng: np.random.Generator, num: int) -> NDArray[np.int64]:
        """`num` lengths, by inverse transform."""
        return np.rint(np.interp(rng.random(num), self._shares, self._lengths)).astype(np.int64)
