"""PagedAttention, Figure 2: how the KV memory of four systems is used."""

from __future__ import annotations

from dataclasses import dataclass

from experiments.studies.base import Chart, Claim, Findings, Series, Verdict, within
from experiments.studies.cells import CellRunner
from experiments.studies.memory_use import MemoryUse, memory_use
from experiments.studies.orca import DIFFERENCES, SYSTEMS, Load, run_system
from reports.paper import FIGURE_2, FIGURE_2_SOURCE
from reports.style import CLASS_LOOKS
from reports.windows import DEFINITION, ROOM

TOLERANCE = 5.0  # points


@dataclass(frozen=True)
class PaperFig2Study:
    """Args:
    rate: requests per second; the paper's Figure 13 has its systems under 2.
    num_requests: how many arrive.
    """

    rate: float = 2.0
    num_requests: int = 400

    def run(self, cells: CellRunner) -> Findings:
        """See `Study.run`."""
        load = Load("sharegpt", self.rate, self.num_requests)
        uses: dict[str, MemoryUse] = {}
        for system in SYSTEMS:
            run_system(cells, system, load)
            uses[system] = memory_use(cells.folders[-1])
        claims = [claim for system in SYSTEMS for claim in _claims(system, uses[system])]
        judged = [claim for claim in claims if claim.verdict is not Verdict.NOT_COMPARABLE]
        close = sum(claim.verdict is Verdict.HOLDS for claim in judged)
        shares = ", ".join(f"{system} {use.shares['token_states']:.1f} %" for system, use in uses.items())
        return Findings(
            title="PagedAttention, Figure 2: where the KV memory goes",
            headline=f"{close} of {len(judged)} segments lie within {TOLERANCE:g} points. Token states: {shares}.",
            source=FIGURE_2_SOURCE,
            claims=claims,
            charts=[_chart(uses)],
            differences=[
                *DIFFERENCES,
                "Which segment is which follows the figure's stacking order; the paper draws what is neither token "
                "state, reservation nor internal fragmentation as “external fragmentation & others”: ours is external "
                "fragmentation, shortage and what is free while a request waits.",
                "Pow2's external part depends on which lengths meet: a buddy region is the prompt and the output's "
                "next power of two, rounded up to a power of two again. With the paper's mean lengths and a lognormal "
                "spread fewer slots are stranded than with its traces.",
            ],
            notes=[
                f"Shares are means over step time {ROOM.phrase}. {DEFINITION}",
                "Intervals are 95 %, by the method of batch means over ten stretches of the window.",
                "The paper does not say which requests its 96.3 % for vLLM is over; ours counts the whole pool, in the "
                "steps in which memory is scarce, so that a lightly loaded pool cannot look wasteful or full.",
            ],
        )


def _claims(system: str, use: MemoryUse) -> list[Claim]:
    claims = []
    for name, stated in FIGURE_2[system].items():
        ours = use.shares[name]
        if name == "external":
            ours += use.shares["shortage"] + use.shares["free"]
        interval = {}
        if name == "token_states":
            interval = {"low": use.token_states.low, "high": use.token_states.high}
        quantity = f"{system}: {CLASS_LOOKS[name].label}"
        claims.append(within(quantity, "%", stated, ours, TOLERANCE, **interval))
    return claims


def _chart(uses: dict[str, MemoryUse]) -> Chart:
    names = [f"{system}, {whose}" for system in uses for whose in ("paper", "ours")]
    series = []
    for key, look in CLASS_LOOKS.items():
        values = [value for system, use in uses.items() for value in (FIGURE_2[system].get(key, 0.0), use.shares[key])]
        if any(values):
            series.append(Series(look.label, names, values))
    caption = (
        f"Mean split of KV memory {ROOM.phrase}, beside the paper's bars. The paper gives no split of vLLM's last "
        "3.7 %."
    )
    return Chart("kv_split", "stacked", "mean share of the KV pool (%)", "", caption, series)
