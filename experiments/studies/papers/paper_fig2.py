"""PagedAttention, Figure 2: how the KV memory of four systems is used."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from kvarena.engine.checks import SHARE, require
from kvarena.engine.classes import OWNED
from kvarena.engine.errors import ConfigError, EngineError
from kvarena.experiments.studies.base import Chart, Findings, Series
from kvarena.experiments.studies.cells import CellRunner
from kvarena.experiments.studies.claims import Claim, Mean, counted, measured, within
from kvarena.experiments.studies.memory_use import (
    OTHERS,
    SEGMENTS,
    UNWANTED,
    MemoryUse,
    covered,
    memory_use,
    share_over_seeds,
)
from kvarena.experiments.studies.orca import (
    DIFFERENCES,
    STEADY,
    SYSTEMS,
    Load,
    beside_name,
    run_system,
    seeds_text,
    steady,
)
from kvarena.reports.drawing.paper import FIGURE_2, FIGURE_2_SOURCE
from kvarena.reports.drawing.style import CLASS_LOOKS

TOLERANCE = 5.0  # points
LABELS = {
    **{name: CLASS_LOOKS[name].label for name in OWNED},
    OTHERS: f"{CLASS_LOOKS['external'].label} & others",
    UNWANTED: f"{CLASS_LOOKS['free'].label} while nobody waits",
}
STATED = {
    system: {OTHERS if name == "external" else name: share for name, share in bars.items()}
    for system, bars in FIGURE_2.items()
}
Uses = dict[str, list[MemoryUse]]


@dataclass(frozen=True)
class PaperFig2Study:
    """Args:
    rates: requests per second, rising: the first at which every system is saturated is taken.
    saturated: a system is when a request waits in at least this share of the window, mean over seeds.
    duration: seconds of arrivals.
    seeds: of the workload.
    ideal: profile that is run beside the config's, at the same rate; null: none.

    Raises:
        ConfigError: no rate or seed, rates that do not rise, or a share out of range.
    """

    rates: Sequence[float]
    saturated: float
    duration: float
    seeds: Sequence[int]
    ideal: str | None

    def __post_init__(self) -> None:
        rates = list(self.rates)
        if not rates or rates != sorted(set(rates)) or rates[0] <= 0 or not self.duration > 0 or not self.seeds:
            raise ConfigError(f"study.rates={rates} must rise from above 0, with study.duration above 0 and a seed")
        require(SHARE.holds(self.saturated), "study.saturated", self.saturated, SHARE.words)

    def run(self, cells: CellRunner) -> Findings:
        """See `Study.run`."""
        tried: list[str] = []
        for rate in self.rates:
            uses = self._saturating(cells, rate, tried)
            if uses is not None:
                break
        else:
            raise EngineError(f"study.rates: no rate saturates all four systems ({'; '.join(tried)}); add higher ones")
        beside = self._all(cells, rate, f"runner.profile={self.ideal}", label="ideal") if self.ideal else {}
        claims = [claim for system in SYSTEMS for claim in _claims(system, uses[system], beside.get(system))]
        claims += [claim for system in SYSTEMS for claim in _context(system, uses[system], beside.get(system))]
        shares = ", ".join(f"{system} {_mean(of, 'token_states').value:.1f} %" for system, of in uses.items())
        return Findings(
            title="PagedAttention, Figure 2: where the KV memory goes",
            headline=f"{counted(claims, f'segments lie within {TOLERANCE:g} points of the paper')} at {rate:g} "
            f"requests/s. Token states: {shares}.",
            source=FIGURE_2_SOURCE,
            claims=claims,
            charts=[_chart(uses)],
            differences=[
                *DIFFERENCES,
                "Which segment is which follows the figure's stacking order; the paper draws what is neither token "
                "state, reservation nor internal fragmentation as “external fragmentation & others”: ours is what no "
                "request owns (external fragmentation, shortage, free) while a request waits.",
                "Pow2's external part depends on which lengths meet: a buddy region is the prompt and the output's "
                "next power of two, rounded up to a power of two again. With the paper's mean lengths and a lognormal "
                "spread fewer slots are stranded than with its traces.",
                "The paper does not say which steps its 96.3 % for vLLM is over, nor at which rate.",
            ],
            notes=[
                f"One window for all four: {STEADY}. {covered([use for of in uses.values() for use in of])} lie in it; "
                "each system's share is in the table.",
                f"The rate is the lowest of {', '.join(f'{r:g}' for r in self.rates)} requests/s at which every system "
                f"is saturated: a request waits in at least {self.saturated:.0%} of the window. {'; '.join(tried)}.",
                f"Shares are means over step time. {seeds_text(self.seeds)} {self.duration:,.0f} s of arrivals each.",
            ],
            beside=beside_name(self.ideal),
        )

    def _saturating(self, cells: CellRunner, rate: float, tried: list[str]) -> Uses | None:
        """Uses at `rate`, where all four are saturated. vLLM, which needs most, runs first."""
        uses: Uses = {}
        for system in reversed(SYSTEMS):
            uses[system] = self._system(cells, system, rate)
            waiting = share_over_seeds(uses[system], lambda use: use.waiting_share).value
            if waiting < 100 * self.saturated:
                tried.append(f"at {rate:g} requests/s {system} has a request waiting in {waiting:.0f} % of it")
                return None
        tried.append(f"at {rate:g} requests/s all four are saturated")
        return {system: uses[system] for system in SYSTEMS}

    def _all(self, cells: CellRunner, rate: float, *overrides: str, label: str) -> Uses:
        return {system: self._system(cells, system, rate, *overrides, label=label) for system in SYSTEMS}

    def _system(self, cells: CellRunner, system: str, rate: float, *overrides: str, label: str = "") -> list[MemoryUse]:
        load = Load("sharegpt", rate, max(1, round(rate * self.duration)))
        uses = []
        for seed in self.seeds:
            run_system(cells, system, load, *overrides, seed=seed, label=label)
            uses.append(memory_use(cells.folders[-1], steady))
        return uses


def _segment(use: MemoryUse, name: str) -> float:
    return use.segments[name]


def _mean(uses: list[MemoryUse], segment: str) -> Mean:
    return share_over_seeds(uses, partial(_segment, name=segment))


def _claims(system: str, uses: list[MemoryUse], beside: list[MemoryUse] | None) -> list[Claim]:
    """The published segments."""
    return [
        within(
            f"{system}: {LABELS[segment]}", "%", stated, _mean(uses, segment), TOLERANCE,
            beside=beside and _mean(beside, segment),
        )
        for segment, stated in STATED[system].items()
    ]  # fmt: skip


def _context(system: str, uses: list[MemoryUse], beside: list[MemoryUse] | None) -> list[Claim]:
    """What the paper does not state, and what the window is."""

    def row(name: str, value: Callable[[MemoryUse], float]) -> Claim:
        second = share_over_seeds(beside, value) if beside else None
        return measured(f"{system}: {name}", "%", share_over_seeds(uses, value), beside=second)

    rows = [
        row("part of the run's step time that the window covers", lambda use: use.time_share),
        row("part of the window in which a request waits", lambda use: use.waiting_share),
    ]
    stated = STATED[system]
    return rows + [
        row(LABELS[segment], partial(_segment, name=segment)) for segment in SEGMENTS if segment not in stated
    ]


def _chart(uses: Uses) -> Chart:
    names = [f"{system}, {whose}" for system in uses for whose in ("paper", "ours")]
    series = []
    for segment in SEGMENTS:
        values = [
            value for system, of in uses.items()
            for value in (STATED[system].get(segment, 0.0), _mean(of, segment).value)
        ]  # fmt: skip
        if any(values):
            series.append(Series(LABELS[segment], names, values))
    caption = (
        "Mean split of KV memory while requests arrive, without the first quarter, beside the paper's bars. The paper "
        "gives no split of vLLM's last 3.7 %."
    )
    return Chart("kv_split", "stacked", "mean share of the KV pool (%)", "", caption, series)
