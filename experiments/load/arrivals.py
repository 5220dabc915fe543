"""When requests arrive: an open-loop schedule that is a function of a seed, or a closed loop of users.

Drawn intervals are never rescaled to hit a duration: that would take the variance out of the counts. A run of N
requests at rate r therefore lasts N/r seconds only on average. Second 0 is the start of the run; the first request
comes after the first interval (at 0 for `constant`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from kvarena.engine.checks import check_choice, check_int, check_number
from kvarena.engine.errors import ConfigError
from kvarena.experiments.workloads.parts.base import WorkloadItem
from kvarena.experiments.workloads.parts.seeds import Purpose, generator

FloatArray = NDArray[np.float64]


class Arrival(ABC):
    """A rule for the arrival times of a workload's requests."""

    @abstractmethod
    def times(self, items: Sequence[WorkloadItem], seed: int) -> FloatArray | None:
        """Arrival times in seconds since the start of the run, one per item, in the items' order and non-decreasing.

        Args:
            items: the workload's requests.
            seed: of the drawn intervals; the same seed gives the same times.

        Returns:
            float64 array, or None when arrivals depend on the engine's answers (ClosedLoopArrival).

        Raises:
            ConfigError: the workload does not fit the arrival (a trace without times).
        """


class AllAtOnceArrival(Arrival):
    """Every request at second 0: offline throughput."""

    def times(self, items: Sequence[WorkloadItem], seed: int) -> FloatArray:  # noqa: ARG002
        """Zeros."""
        return np.zeros(len(items))


class ConstantArrival(Arrival):
    """Request i at i / rate.

    Args:
        rate: requests per second, above 0.
    """

    def __init__(self, rate: float) -> None:
        self.rate = check_number("arrival.rate", rate, above=True)

    def times(self, items: Sequence[WorkloadItem], seed: int) -> FloatArray:  # noqa: ARG002
        """Evenly spaced times."""
        return np.arange(len(items)) / self.rate


class GammaArrival(Arrival):
    """A renewal process with gamma-distributed intervals of mean 1 / rate.

    Args:
        rate: requests per second, above 0.
        burstiness: the gamma's shape; the intervals' coefficient of variation is 1 / sqrt(burstiness). 1 is Poisson,
            below 1 is burstier, above 1 is more regular.
    """

    def __init__(self, rate: float, burstiness: float) -> None:
        self.rate = check_number("arrival.rate", rate, above=True)
        self.burstiness = check_number("arrival.burstiness", burstiness, above=True)

    def times(self, items: Sequence[WorkloadItem], seed: int) -> FloatArray:
        """Cumulated gamma intervals."""
        rng = generator(seed, Purpose.ARRIVALS)
        scale = 1 / (self.rate * self.burstiness)
        return np.cumsum(rng.gamma(self.burstiness, scale, size=len(items)))


class _RateArrival(Arrival):
    """A Poisson process whose rate varies: unit-rate arrivals, mapped through the inverse of the cumulated rate.

    With L(t) the integral of the rate over [0, t], the k-th arrival is at the inverse of L at E_k, where the E_k are
    the arrivals of a Poisson process of rate 1 (time rescaling).
    """

    def times(self, items: Sequence[WorkloadItem], seed: int) -> FloatArray:
        """Arrival times of the process."""
        unit = np.cumsum(generator(seed, Purpose.ARRIVALS).exponential(size=len(items)))
        return self._invert(unit, generator(seed, Purpose.ARRIVALS, 1))

    @abstractmethod
    def _invert(self, unit: FloatArray, rng: np.random.Generator) -> FloatArray:
        """The times at which the cumulated rate reaches `unit`; `rng` is for the rate's own randomness."""


class PoissonArrival(_RateArrival):
    """Independent exponential intervals of mean 1 / rate.

    Args:
        rate: requests per second, above 0.
    """

    def __init__(self, rate: float) -> None:
        self.rate = check_number("arrival.rate", rate, above=True)

    def _invert(self, unit: FloatArray, rng: np.random.Generator) -> FloatArray:  # noqa: ARG002
        return unit / self.rate


class RampArrival(_RateArrival):
    """A Poisson process whose rate goes linearly from `start_rate` to `end_rate`, and stays there.

    Args:
        start_rate: requests per second at second 0, at least 0.
        end_rate: requests per second from `duration` on, above 0.
        duration: seconds of the ramp, above 0.
    """

    def __init__(self, start_rate: float, end_rate: float, duration: float) -> None:
        self.start_rate = check_number("arrival.start_rate", start_rate)
        self.end_rate = check_number("arrival.end_rate", end_rate, above=True)
        self.duration = check_number("arrival.duration", duration, above=True)

    def _invert(self, unit: FloatArray, rng: np.random.Generator) -> FloatArray:  # noqa: ARG002
        slope = (self.end_rate - self.start_rate) / self.duration
        total = (self.start_rate + self.end_rate) / 2 * self.duration
        on_ramp = np.minimum(unit, total)
        # The root of start_rate * t + slope * t^2 / 2 = unit, in the form that also holds for a slope of 0. A falling
        # ramp's discriminant is end_rate^2 at its end; the bound keeps rounding from making it less.
        root = np.sqrt(np.maximum(self.start_rate**2 + 2 * slope * on_ramp, 0.0))
        return 2 * on_ramp / (self.start_rate + root) + (unit - on_ramp) / self.end_rate


class OnOffArrival(_RateArrival):
    """A Poisson process that switches between two rates; it starts with the first (a Markov-modulated process).

    Args:
        on_rate: requests per second while on, above 0.
        off_rate: requests per second while off, at least 0.
        on_duration: mean seconds of an on phase, above 0.
        off_duration: mean seconds of an off phase, above 0.
        phases: `exponential` draws the phases' durations, `fixed` takes the means.
    """

    def __init__(
        self, on_rate: float, off_rate: float, on_duration: float, off_duration: float, phases: str = "exponential"
    ) -> None:
        self.on_rate = check_number("arrival.on_rate", on_rate, above=True)
        self.off_rate = check_number("arrival.off_rate", off_rate)
        self.on_duration = check_number("arrival.on_duration", on_duration, above=True)
        self.off_duration = check_number("arrival.off_duration", off_duration, above=True)
        self.phases = check_choice("arrival.phases", phases, ("exponential", "fixed"))

    @property
    def mean_rate(self) -> float:
        """Requests per second in the long run."""
        on = self.on_rate * self.on_duration
        return (on + self.off_rate * self.off_duration) / (self.on_duration + self.off_duration)

    def _invert(self, unit: FloatArray, rng: np.random.Generator) -> FloatArray:
        means = np.array([self.on_duration, self.off_duration])
        rates = np.array([self.on_rate, self.off_rate])
        cycles = 16
        durations = np.empty((0, 2))
        while not len(durations) or (durations * rates).sum() < unit[-1]:
            scale = rng.exponential(size=(cycles, 2)) if self.phases == "exponential" else np.ones((cycles, 2))
            durations = np.concatenate([durations, scale * means])
            cycles *= 2
        starts = np.concatenate([[0.0], np.cumsum(durations)])
        reached = np.concatenate([[0.0], np.cumsum(durations * rates)])
        # side="left": the phase in which the cumulated rate passes `unit`, which is never one of rate 0.
        phase = np.searchsorted(reached, unit, side="left") - 1
        return np.asarray(starts[phase] + (unit - reached[phase]) / rates[phase % 2])


class TraceArrival(Arrival):
    """The workload's own times, replayed.

    Args:
        speed: above 0; 2 replays twice as fast, so at twice the rate.
    """

    def __init__(self, speed: float = 1.0) -> None:
        self.speed = check_number("arrival.speed", speed, above=True)

    def times(self, items: Sequence[WorkloadItem], seed: int) -> FloatArray:  # noqa: ARG002
        """The items' times over the speed. Raises ConfigError when an item has none."""
        stated = [item.arrival_time for item in items if item.arrival_time is not None]
        if len(stated) < len(items):
            raise ConfigError(
                "arrival=trace needs a workload with times, and this one states none; take workload=azure_trace or "
                "another trace, or arrival=poisson"
            )
        return np.array(stated, dtype=np.float64) / self.speed


class ClosedLoopArrival(Arrival):
    """N users, each sending the next request when the last one was answered. The driver runs the loop.

    Args:
        num_users: requests in flight at most, at least 1.
        think_time: seconds between an answer and the user's next request, at least 0.
    """

    def __init__(self, num_users: int, think_time: float = 0.0) -> None:
        self.num_users = check_int("arrival.num_users", num_users, 1)
        self.think_time = check_number("arrival.think_time", think_time)

    def times(self, items: Sequence[WorkloadItem], seed: int) -> None:  # noqa: ARG002
        """None: arrivals follow the answers."""
        return
