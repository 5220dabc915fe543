"""PagedAttention, Figure 12: normalised latency against request rate, and the load that each system sustains."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from engine.errors import ConfigError
from experiments.studies.base import Chart, Claim, Findings, Series, between, up_to
from experiments.studies.cells import CellRunner
from experiments.studies.curves import Curve, highest_below
from experiments.studies.orca import DIFFERENCES, FASTER_TRANSFORMER, SYSTEMS, Load, run_system
from experiments.studies.published import FIGURE_12_SOURCE, SUSTAINED_RATIOS

METRIC = "normalized_latency_seconds_per_token"


@dataclass(frozen=True)
class PaperFig12Study:
    """Args:
    rates: requests per second, rising. A system's curve ends at the first rate above every limit.
    duration: seconds of arrivals at every rate; the paper's traces last an hour.
    limit: mean normalised latency up to which a rate counts as sustained, in seconds per token.
    other_limits: the same ratios are printed for these.

    Raises:
        ConfigError: fewer than two rates, rates that do not rise, or a limit out of range.
    """

    rates: Sequence[float]
    duration: float
    limit: float
    other_limits: Sequence[float]

    def __post_init__(self) -> None:
        rates = list(self.rates)
        if len(rates) < 2 or rates != sorted(set(rates)) or rates[0] <= 0:
            raise ConfigError(f"study.rates={rates} must be at least two rates above 0 that rise")
        if self.duration <= 0 or self.limit <= 0 or any(limit <= 0 for limit in self.other_limits):
            raise ConfigError(
                f"study.duration={self.duration}, study.limit={self.limit} and "
                f"study.other_limits={list(self.other_limits)} must be above 0"
            )

    @property
    def _highest_limit(self) -> float:
        return max(self.limit, *self.other_limits)

    def run(self, cells: CellRunner) -> Findings:
        """See `Study.run`."""
        curves = {system: self._curve(cells, system) for system in (*SYSTEMS, FASTER_TRANSFORMER)}
        sustained = {system: highest_below(curve, self.limit) for system, curve in curves.items()}
        claims = [self._claim(system, sustained) for system in SUSTAINED_RATIOS]
        loads = ", ".join(f"{system} {_load(rate)}" for system, rate in sustained.items())
        return Findings(
            title="PagedAttention, Figure 12: how much load each system sustains",
            headline=f"Requests per second at a mean of {self.limit:g} s per output token: {loads}.",
            source=FIGURE_12_SOURCE,
            claims=claims,
            charts=[self._chart(curves)],
            differences=[
                *DIFFERENCES,
                "The paper's ranges are over three sizes of OPT and read off the curves “at similar latencies”; ours "
                "is one size, OPT-13B, at one stated latency.",
                "FasterTransformer is the static scheduler over reservations of the longest length; finished requests "
                "hold their slots until the batch ends, and no padding is computed, which favours it.",
            ],
            notes=[
                "Normalised latency: mean over requests of (end - scheduled arrival) / output length, over all "
                f"requests that arrive in {self.duration:,.0f} s. Above its capacity a system's queue grows as long as "
                "requests arrive, so the curve's steep part depends on that duration, and its foot hardly.",
                f"Sustained: where the curve crosses {self.limit:g} s per token, by linear interpolation between "
                f"rates; that limit is ours. {self._sensitivity(curves)}",
            ],
        )

    def _curve(self, cells: CellRunner, system: str) -> Curve:
        rates: list[float] = []
        values: list[float] = []
        for rate in self.rates:
            load = Load("sharegpt", rate, max(1, round(rate * self.duration)))
            rates.append(rate)
            values.append(run_system(cells, system, load)[METRIC]["mean"])
            if values[-1] > self._highest_limit:
                break
        return Curve(rates, values)

    def _claim(self, system: str, sustained: dict[str, float | None]) -> Claim:
        least, most = SUSTAINED_RATIOS[system]
        ours, theirs = sustained["vLLM"], sustained[system]
        ratio = ours / theirs if ours and theirs else None
        stated = f"paper: {least:g} to {most:g} times" if least > 1 else f"paper: up to {most:g} times"
        note = f"{stated}; {_load(ours)} against {_load(theirs)} requests/s"
        quantity = f"load that vLLM sustains, against {system}"
        if least == 1:
            return up_to(quantity, "", most, ratio, note=note)
        return between(quantity, "", least, most, ratio, note=note)

    def _sensitivity(self, curves: dict[str, Curve]) -> str:
        parts = []
        for limit in self.other_limits:
            rates = {system: highest_below(curve, limit) for system, curve in curves.items()}
            ours = rates["vLLM"]
            ratios = [f"{system} {ours / rate:.2f}" for system in SUSTAINED_RATIOS if (rate := rates[system]) and ours]
            parts.append(f"At {limit:g} s per token vLLM would sustain these multiples: {', '.join(ratios) or 'none'}.")
        return " ".join(parts)

    def _chart(self, curves: dict[str, Curve]) -> Chart:
        return Chart(
            name="normalised_latency",
            kind="lines",
            x_label="request rate (requests/s)",
            y_label="normalised latency (s/token)",
            caption=f"Mean normalised latency, ShareGPT, OPT-13B on one simulated A100; {self.duration / 60:g} minutes "
            f"of arrivals per point. The dotted line is the limit of {self.limit:g} s per token.",
            series=[Series(system, curve.x, curve.y) for system, curve in curves.items()],
            y_limit=self._highest_limit * 1.1,
            y_mark=self.limit,
        )


def _load(rate: float | None) -> str:
    return "beyond the rates tried" if rate is None else f"{rate:.2f}"
