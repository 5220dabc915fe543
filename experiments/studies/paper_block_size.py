"""PagedAttention, Figure 18: what the block size costs, end to end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from experiments.studies.base import Chart, Claim, Findings, Series, Verdict, at_least, at_most
from experiments.studies.cells import CellRunner
from experiments.studies.orca import DIFFERENCES, Load, run_system
from experiments.studies.published import BLOCK_SIZE_SOURCE, GOOD_BLOCK_SIZES

METRIC = "normalized_latency_seconds_per_token"


@dataclass(frozen=True)
class PaperBlockSizeStudy:
    """Args:
    block_sizes: in slots; at least those that the paper calls good (`published.GOOD_BLOCK_SIZES`).
    rates: workload -> requests per second, at which memory is scarce.
    num_requests: workload -> how many arrive.
    near: a block size is as good as the best if its latency is at most so many times the best's.
    """

    block_sizes: Sequence[int]
    rates: dict[str, float]
    num_requests: dict[str, int]
    near: float

    def run(self, cells: CellRunner) -> Findings:
        """See `Study.run`."""
        found: dict[str, dict[int, dict[str, Any]]] = {}
        for workload in GOOD_BLOCK_SIZES:
            load = Load(workload, self.rates[workload], self.num_requests[workload])
            found[workload] = {
                size: run_system(cells, "vLLM", load, f"allocator.block_size={size}", label=f"block{size}")
                for size in self.block_sizes
            }
        ratios = {workload: _against_best(of) for workload, of in found.items()}
        claims = [claim for workload in found for claim in self._claims(workload, ratios[workload], found[workload])]
        held = sum(claim.verdict is Verdict.HOLDS for claim in claims)
        judged = sum(claim.verdict is not Verdict.NOT_COMPARABLE for claim in claims)
        good = " and ".join(
            f"{name} at block sizes {', '.join(str(size) for size, ratio in of.items() if ratio <= self.near)}"
            for name, of in ratios.items()
        )
        return Findings(
            title="PagedAttention, Figure 18: the block size",
            headline=f"{held} of {judged} statements hold. Within {self.near:g} times the best: {good}.",
            source=BLOCK_SIZE_SOURCE,
            claims=claims,
            charts=[self._latency_chart(found), _batch_chart(found)],
            differences=[
                *DIFFERENCES,
                "The simulated kernel reads KV at one speed whatever the block size. So what large blocks cost (slots "
                "that nobody else can use) is shown here, and what small blocks cost (a slow kernel) is not: sizes "
                "below the good ones are drawn, and not judged.",
                "The paper fixes a rate and does not state it in its text; ours are those at which memory is scarce "
                "in the simulator: " + ", ".join(f"{name} {rate:g} requests/s" for name, rate in self.rates.items())
                + ". With memory to spare the block size makes no difference here.",
            ],
            notes=[
                "Latency is the mean of (end - scheduled arrival) / output length over all requests, as in the paper's "
                f"figures. “As good as the best”: at most {self.near:g} times the least mean (our reading)."
            ],
        )  # fmt: skip

    def _claims(self, workload: str, ratios: dict[int, float], found: dict[int, dict[str, Any]]) -> list[Claim]:
        least, most = GOOD_BLOCK_SIZES[workload]
        claims = []
        for size, ratio in ratios.items():
            latency = found[size][METRIC]["mean"]
            quantity = f"{workload}, block size {size}: latency against the best"
            note = f"{latency:.3f} s/token, {found[size]['num_preemptions']:,} preemptions"
            if size < least:
                unit, of = "times", "not judged: the kernel's cost"
                claims.append(Claim(quantity, unit, None, ratio, of, Verdict.NOT_COMPARABLE, note=note))
            elif size <= most:
                claims.append(at_most(quantity, "times", self.near, ratio, note=f"paper: good; {note}"))
            else:
                claims.append(at_least(quantity, "times", self.near, ratio, note=f"paper: worse; {note}"))
        return claims

    def _latency_chart(self, found: dict[str, dict[int, dict[str, Any]]]) -> Chart:
        return Chart(
            "latency", "lines", "block size (slots)", "normalised latency (s/token)",
            "Mean normalised latency by block size. The paper: ShareGPT is best from 16 to 128, Alpaca at 16 and 32.",
            [
                Series(
                    f"{name}, {self.rates[name]:g} requests/s",
                    [float(size) for size in of],
                    [summary[METRIC]["mean"] for summary in of.values()],
                )
                for name, of in found.items()
            ],
            log_x=True,
            log_y=True,
        )  # fmt: skip


def _against_best(found: dict[int, dict[str, Any]]) -> dict[int, float]:
    best = min(summary[METRIC]["mean"] for summary in found.values())
    return {size: summary[METRIC]["mean"] / best for size, summary in found.items()}


def _batch_chart(found: dict[str, dict[int, dict[str, Any]]]) -> Chart:
    series = [
        Series(name, [float(size) for size in of], [summary["batch_size_mean"] for summary in of.values()])
        for name, of in found.items()
    ]
    caption = "Why: mean number of requests in a step. The longer a block, the fewer requests have one."
    return Chart("batch", "lines", "block size (slots)", "requests in a step", caption, series, log_x=True)
