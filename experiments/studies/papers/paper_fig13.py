"""PagedAttention, Figure 13: how many requests four systems batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kvarena.engine.errors import ConfigError
from kvarena.experiments.studies.base import Chart, Findings, Series, mean_series
from kvarena.experiments.studies.cells import CellRunner
from kvarena.experiments.studies.claims import Claim, Mean, counted, fitted, near
from kvarena.experiments.studies.orca import (
    DIFFERENCES,
    FITTED_PROFILE,
    STEADY,
    SYSTEMS,
    Load,
    beside_name,
    mean_batch,
    run_system,
    seeds_text,
)
from kvarena.experiments.studies.papers.published import FIGURE_13, FIGURE_13_SOURCE
from kvarena.reports.reading.files import read_run

TOLERANCE = 0.25  # of the paper's value: our limit, the paper states none
Batches = Mapping[str, Mean]


@dataclass(frozen=True)
class PaperFig13Study:
    """Args:
    num_requests: workload -> how many arrive.
    seeds: of the workload.
    ideal: profile that is run beside the config's; null: none.

    Raises:
        ConfigError: no seed, or not the two workloads of the figure.
    """

    num_requests: Mapping[str, int]
    seeds: Sequence[int]
    ideal: str | None

    def __post_init__(self) -> None:
        if not self.seeds or set(self.num_requests) != {workload for workload, _ in FIGURE_13}:
            raise ConfigError("study needs at least one of seeds, and num_requests of sharegpt and of alpaca")

    def run(self, cells: CellRunner) -> Findings:
        """See `Study.run`."""
        claims: list[Claim] = []
        charts: list[Chart] = []
        for (workload, rate), stated in FIGURE_13.items():
            load = Load(workload, rate, self.num_requests[workload])
            ours = self._batches(cells, load)
            profile = read_run(cells.folders[-1]).manifest["simulation"]["profile"]
            beside = self._batches(cells, load, f"runner.profile={self.ideal}", label="ideal") if self.ideal else {}
            claims += [
                _claim(workload, system, stated[system], batch, beside.get(system), profile)
                for system, batch in ours.items()
            ]
            charts.append(self._chart(load, stated, ours, beside))
        return Findings(
            title="PagedAttention, Figure 13: how many requests run together",
            headline=f"{counted(claims, f'mean batches lie within {TOLERANCE:.0%} of the paper’s, a limit of ours')}.",
            source=FIGURE_13_SOURCE,
            claims=claims,
            charts=charts,
            differences=[
                *DIFFERENCES,
                "A system that is not short of memory batches what arrives while a request is served: the slower the "
                "steps, the larger the batch. vLLM's two bars gave the profile its step times, so they judge nothing; "
                "the ideal card, which is faster, batches less.",
            ],
            notes=[
                f"Mean number of requests in a step, by step time, {STEADY}. {seeds_text(self.seeds)}",
                f"That a value within {TOLERANCE:.0%} of the paper's holds is our limit; the paper gives neither a "
                "tolerance nor an interval. Not decided: the interval holds the limit.",
            ],
            beside=beside_name(self.ideal),
        )

    def _batches(self, cells: CellRunner, load: Load, *overrides: str, label: str = "") -> dict[str, Mean]:
        found: dict[str, Mean] = {}
        for system in SYSTEMS:
            values = []
            for seed in self.seeds:
                run_system(cells, system, load, *overrides, seed=seed, label=label)
                values.append(mean_batch(cells))
            found[system] = Mean.of(values)
        return found

    def _chart(self, load: Load, stated: Mapping[str, float], ours: Batches, beside: Batches) -> Chart:
        names = list(ours)
        paper = Series("paper", names, [stated[name] for name in names])
        series = [paper, mean_series("kvarena", names, [*ours.values()])]
        if beside:
            series.append(mean_series(f"kvarena, {beside_name(self.ideal)}", names, [*beside.values()]))
        caption = f"Mean number of batched requests, {load.workload} at {load.rate:g} requests/s."
        return Chart(f"batch_{load.workload}", "bars", "", "requests in a step", caption, series)


def _claim(
    workload: str, system: str, stated: float, batch: Mean, beside: Mean | None, profile: str
) -> Claim:  # fmt: skip
    quantity = f"{workload}, {system}: mean batch"
    if system == "vLLM" and profile == FITTED_PROFILE:
        return fitted(quantity, "", stated, batch, beside=beside, note="the profile's step time is this bar's")
    return near(quantity, "", stated, batch, TOLERANCE, beside=beside)
