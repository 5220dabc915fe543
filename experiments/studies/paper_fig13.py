"""PagedAttention, Figure 13: how many requests four systems batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from experiments.studies.base import Chart, Claim, Findings, Series, Verdict, near
from experiments.studies.cells import CellRunner
from experiments.studies.memory_use import Mean
from experiments.studies.orca import DIFFERENCES, SYSTEMS, Load, mean_batch, run_system
from experiments.studies.published import FIGURE_13, FIGURE_13_SOURCE

TOLERANCE = 0.25  # of the paper's value: our limit, the paper states none


@dataclass(frozen=True)
class PaperFig13Study:
    """Args:
    num_requests: of the ShareGPT and of the Alpaca trace.
    """

    num_requests: Sequence[int] = (400, 2400)

    def run(self, cells: CellRunner) -> Findings:
        """See `Study.run`."""
        claims: list[Claim] = []
        charts: list[Chart] = []
        for ((workload, rate), stated), count in zip(FIGURE_13.items(), self.num_requests, strict=True):
            batches: dict[str, Mean] = {}
            for system in SYSTEMS:
                run_system(cells, system, Load(workload, rate, count))
                batches[system] = mean_batch(cells)
            claims += [_claim(workload, system, stated[system], batch) for system, batch in batches.items()]
            charts.append(_chart(workload, rate, stated, batches))
        close = sum(claim.verdict is Verdict.HOLDS for claim in claims)
        return Findings(
            title="PagedAttention, Figure 13: how many requests run together",
            headline=f"{close} of {len(claims)} mean batches lie within {TOLERANCE:.0%} (a limit of ours) of the "
            "paper's.",
            source=FIGURE_13_SOURCE,
            claims=claims,
            charts=charts,
            differences=[
                *DIFFERENCES,
                "A system that is not short of memory batches what arrives while a request is served: the faster the "
                "steps, the smaller the batch. So vLLM's bars depend on the step times, and Orca (Max)'s on memory "
                "alone.",
            ],
            notes=[
                "Mean number of requests in a step, weighted by step time, between a quarter and the whole of the "
                "arrivals' time, so without ramp and drain. Intervals are 95 %, by batch means.",
                f"That a value within {TOLERANCE:.0%} of the paper's holds is our limit; the paper gives neither a "
                "tolerance nor an interval.",
            ],
        )


def _claim(workload: str, system: str, stated: float, batch: Mean) -> Claim:
    quantity = f"{workload}, {system}: mean batch"
    note = f"the limit of {TOLERANCE:.0%} is ours"
    return near(quantity, "", stated, batch.value, TOLERANCE, low=batch.low, high=batch.high, note=note)


def _chart(workload: str, rate: float, stated: dict[str, float], batches: dict[str, Mean]) -> Chart:
    names = list(batches)
    ours = Series(
        "kvarena", names, [batch.value for batch in batches.values()],
        low=[batch.low for batch in batches.values()], high=[batch.high for batch in batches.values()],
    )  # fmt: skip
    paper = Series("paper", names, [stated[name] for name in names])
    caption = f"Mean number of batched requests, {workload} at {rate:g} requests/s."
    return Chart(f"batch_{workload}", "bars", "", "requests in a step", caption, [paper, ours])
