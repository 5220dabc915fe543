"""How much load each strategy sustains under a service-level objective (section `slo`), by bisection.

    bracket: double or halve the start rate until one end is sustained and the other is not
    bisect:  try the geometric middle, until high / low <= 1 + tolerance; the capacity is low
    repeat:  once per seed, the same seeds for every strategy, so that capacities are compared seed by seed

A rate is sustained when the objective is met by its rule, `slo.rule` (reports/analysis/slo.py). Requests that arrive in
the first quarter of the arrivals' time are not counted: an overloaded engine looks well while its queue is short.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from kvarena.engine.checks import check_number
from kvarena.engine.errors import ConfigError, EngineError
from kvarena.experiments.studies.base import Chart, Findings, Series
from kvarena.experiments.studies.cells import CellRunner
from kvarena.experiments.studies.claims import Claim, Mean, compared, measured
from kvarena.reports.analysis.latency import request_latencies
from kvarena.reports.analysis.slo import deciding_share, goal_text, is_met, kept_limits, slo_limits, slo_rule
from kvarena.reports.reading.files import read_run

RAMP = 0.25  # of the arrivals' time
MAX_DOUBLINGS = 12
LATENCY = "normalized_latency_seconds_per_token"
NO_LIMIT = "experiment=capacity needs a limit: set slo.ttft, slo.tpot or slo.e2e, or slo=mlperf_..."
CELL = ("arrival=poisson", "driver.record=summary", "report.pages=false", "report.kv_map=false")


class Trial(NamedTuple):
    """One run at one rate.

    Attributes:
        rate: requests per second.
        attainment: share of requests that the rule holds against its target, in [0, 1]: of good ones, or under
            `slo.rule=percentiles` of those within the worst limit.
        latency: mean normalised latency in seconds per token; NaN when no request finished.
        sustained: whether the objective is met.
    """

    rate: float
    attainment: float
    latency: float
    sustained: bool


def bisect_capacity(attempt: Callable[[float], bool], start: float, tolerance: float) -> float:
    """The highest rate found to be sustained; one higher by at most `tolerance` of it is not.

    Args:
        attempt: whether a rate is sustained.
        start: the first rate.
        tolerance: relative width of the bracket at which to stop, above 0.

    Raises:
        EngineError: no end of the bracket was found within 12 doublings or halvings.
    """
    low = high = start
    if attempt(start):
        for _ in range(MAX_DOUBLINGS):
            low, high = high, 2 * high
            if not attempt(high):
                break
        else:
            raise EngineError(f"even {high:g} requests/s are sustained; raise study.start_rate or tighten the slo")
    else:
        for _ in range(MAX_DOUBLINGS):
            high, low = low, low / 2
            if attempt(low):
                break
        else:
            raise EngineError(
                f"not even {low:g} requests/s are sustained; loosen the slo (slo.ttft, slo.tpot, slo.e2e)"
            )
    while high > low * (1 + tolerance):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if attempt(middle) else (low, middle)
    return low


@dataclass(frozen=True)
class CapacityStudy:
    """Args:
    strategies: name -> overrides of its cells, as on the command line. The others are compared with the first.
    seeds: of the workload; one bisection each.
    duration: seconds of arrivals in every run.
    start_rate: requests per second that are tried first.
    tolerance: relative width of the bracket at which a bisection stops.
    curve: further rates for the figures, as multiples of the capacity.

    Raises:
        ConfigError: no strategy or seed, or a number out of range.
    """

    strategies: Mapping[str, Sequence[str]]
    seeds: Sequence[int]
    duration: float
    start_rate: float
    tolerance: float
    curve: Sequence[float]

    def __post_init__(self) -> None:
        if not self.strategies or not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ConfigError("study.strategies and study.seeds must name at least one each, and no seed twice")
        for key in ("duration", "start_rate", "tolerance"):
            check_number(f"study.{key}", getattr(self, key), above=True)
        for place, factor in enumerate(self.curve):
            check_number(f"study.curve[{place}]", factor, above=True)

    def run(self, cells: CellRunner) -> Findings:
        """See `Study.run`."""
        for overrides in self.strategies.values():
            if not cells.config([*CELL, *overrides]).slo.limits:
                raise ConfigError(NO_LIMIT)
        trials: dict[str, dict[float, list[Trial]]] = {}
        capacities: dict[str, list[float]] = {}
        for name in self.strategies:
            found = trials.setdefault(name, {})
            capacities[name] = [self._bisect(cells, name, seed, found) for seed in self.seeds]
            middle = float(np.mean(capacities[name]))
            for factor in self.curve:
                for seed in self.seeds:
                    self._try(cells, name, middle * factor, seed, found)
        manifest = read_run(cells.folders[-1]).manifest
        target = float(manifest["config"]["slo"]["attainment"])
        goal = goal_text(manifest)
        means = {name: Mean.of(values) for name, values in capacities.items()}
        rates = ", ".join(f"{name} {mean.value:.3g}" for name, mean in means.items())
        return Findings(
            title="Capacity: the load that each strategy sustains",
            headline=f"Requests per second with {goal}: {rates}.",
            source="this project's own measurement; DistServe (OSDI'24) calls this quantity goodput",
            claims=[
                *(measured(name, "requests/s", mean) for name, mean in means.items()),
                *self._compared(capacities),
            ],
            charts=_charts(trials, target, len(self.seeds)),
            notes=[
                f"Capacity: the highest Poisson rate found to be sustained, by bisection down to a bracket of "
                f"{self.tolerance:.0%}, mean over seeds {', '.join(map(str, self.seeds))}. Interval: 95 %, Student's t "
                "over seeds; it does not hold the bracket's width.",
                f"Every run has {self.duration:g} s of arrivals; counted are the requests that arrive after the first "
                "quarter of that time, rejected and failed ones too.",
                "Ratios are taken seed by seed, each seed with the same requests for every strategy; significant where "
                "the interval leaves out 1.",
                "The figures show the rates that every seed was run at: the mean over seeds, bands their range.",
            ],
        )

    def _bisect(self, cells: CellRunner, name: str, seed: int, found: dict[float, list[Trial]]) -> float:
        return bisect_capacity(
            lambda rate: self._try(cells, name, rate, seed, found).sustained, self.start_rate, self.tolerance
        )

    def _try(self, cells: CellRunner, name: str, rate: float, seed: int, found: dict[float, list[Trial]]) -> Trial:
        label = "".join(letter if letter.isalnum() else "-" for letter in name)
        load = [f"arrival.rate={rate!r}", f"workload.num_requests={max(20, round(rate * self.duration))}"]
        cells.run(f"{label}-{rate:.4f}-seed{seed}", [*CELL, *load, f"workload.seed={seed}", *self.strategies[name]])
        run = read_run(cells.folders[-1])
        limits = slo_limits(run.manifest)
        arrival = run.requests["arrival_time"]
        counted = arrival >= RAMP * arrival.max()
        latency = request_latencies(run)[LATENCY][counted]
        finished = latency[~np.isnan(latency)]
        rule, target = slo_rule(run.manifest), float(run.manifest["config"]["slo"]["attainment"])
        kept = {key: one[counted] for key, one in kept_limits(run, limits).items()}
        mean = float(finished.mean()) if len(finished) else float("nan")
        trial = Trial(rate, deciding_share(kept, rule), mean, bool(is_met(kept, target, rule)))
        found.setdefault(rate, []).append(trial)
        return trial

    def _compared(self, capacities: dict[str, list[float]]) -> list[Claim]:
        base, *others = capacities
        return [compared(f"{name} / {base}", Mean.of_ratios(capacities[name], capacities[base])) for name in others]


def _charts(every: dict[str, dict[float, list[Trial]]], target: float, num_seeds: int) -> list[Chart]:
    # Seeds differ more than neighbouring rates do: a line through rates of different seeds would jump between them.
    trials = {
        name: {rate: tried for rate, tried in found.items() if len(tried) == num_seeds} for name, found in every.items()
    }
    good = [_series(name, found, lambda trial: 100 * trial.attainment) for name, found in trials.items()]
    slow = [_series(name, found, lambda trial: 1e3 * trial.latency) for name, found in trials.items()]
    return [
        Chart("attainment", "lines", "rate (requests/s)", "requests within the limits (%)",
              "Share of the requests that the objective counts (slo.rule) against the rate; dotted: the target of "
              f"{target:.0%}. A strategy's capacity is where its line falls below it.", good,
              y_mark=100 * target, y_mark_name="target"),
        Chart("latency", "lines", "rate (requests/s)", "mean normalised latency (ms/token)",
              "Latency against the rate: the knee is where a line leaves its floor.", slow, log_y=True),
    ]  # fmt: skip


def _series(name: str, found: dict[float, list[Trial]], value: Callable[[Trial], float]) -> Series:
    points = [(rate, [value(trial) for trial in found[rate]]) for rate in sorted(found)]
    points = [(rate, values) for rate, values in points if not np.isnan(values).any()]
    return Series(
        name,
        [rate for rate, _ in points],
        [float(np.mean(values)) for _, values in points],
        low=[min(values) for _, values in points],
        high=[max(values) for _, values in points],
    )
