"""The two claims that this project starts from, measured on a real model.

1. Paged allocation keeps over 90 % of KV memory in use where contiguous reservation keeps at most 60 %.
2. Continuous batching keeps the device busy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from experiments.studies.base import Chart, Claim, Findings, Series, at_least, at_most
from experiments.studies.cells import CellRunner
from experiments.studies.memory_use import MemoryUse, memory_use
from reports.style import CLASS_LOOKS
from reports.windows import DEFINITION, ROOM

SOURCE = "a guide to serving with vLLM; PagedAttention (Kwon et al., SOSP 2023), sections 1 and 2"


@dataclass(frozen=True)
class SeedClaimsStudy:
    """Runs contiguous and paged allocation under static and continuous batching on one workload.

    Args:
        least_paged: least share of the pool in token states under paged allocation, percent.
        most_contiguous: most under contiguous reservation, percent.
        least_busy: least share of the batch's places that compute under continuous batching, percent.
    """

    least_paged: float = 90.0
    most_contiguous: float = 60.0
    least_busy: float = 90.0

    def run(self, cells: CellRunner) -> Findings:
        """See `Study.run`."""
        summaries: dict[str, dict[str, Any]] = {}
        uses: dict[str, MemoryUse] = {}
        for name, allocator, scheduler in (
            ("contiguous-static", "contiguous", "static"),
            ("contiguous-continuous", "contiguous", "continuous"),
            ("oracle-continuous", "orca_oracle", "continuous"),
            ("paged-continuous", "paged", "continuous"),
        ):
            summaries[name] = cells.run(name, [f"allocator={allocator}", f"scheduler={scheduler}"])
            uses[name] = memory_use(cells.folders[-1])
        lanes = uses["contiguous-continuous"].largest_batch
        busy = {name: 100 * uses[name].batch.value / lanes for name in ("contiguous-static", "contiguous-continuous")}
        rates = {name: summary["output_tokens_per_second"] for name, summary in summaries.items()}
        paged, contiguous = uses["paged-continuous"], uses["contiguous-continuous"]
        return Findings(
            title="The two claims that kvarena starts from",
            headline=(
                f"Paged allocation keeps {paged.token_states.value:.1f} % of KV memory in use where contiguous "
                f"reservation keeps {contiguous.token_states.value:.1f} %; of the places of a full batch, continuous "
                f"batching keeps {busy['contiguous-continuous']:.0f} % computing and static batching "
                f"{busy['contiguous-static']:.0f} %. Together they give "
                f"{rates['paged-continuous'] / rates['contiguous-static']:.1f} times the throughput."
            ),
            source=SOURCE,
            claims=[
                *self._memory_claims(uses),
                *self._busy_claims(uses, lanes),
                at_least(
                    "output tokens/s, continuous over static batching (contiguous)",
                    "times",
                    1.0,
                    rates["contiguous-continuous"] / rates["contiguous-static"],
                    note="more is better; no value stated",
                ),
            ],
            charts=[_split_chart(uses), _rate_chart(rates)],
            differences=[
                "The model has 1M parameters and runs on a CPU, so a step's time depends less on its batch than on a "
                "GPU: the shares of memory carry over, the ratio of throughputs does not.",
                "Lengths are drawn from ShareGPT's published distribution, cut at 2,048 tokens; all requests are there "
                "at the start.",
            ],
            notes=[
                f"Shares of memory are means over step time {ROOM.phrase}. {DEFINITION}",
                "Intervals are 95 %, by the method of batch means over ten stretches of the window.",
                f"The pool holds {lanes} reservations of the longest request, so a full batch has {lanes} places. A "
                "place computes while a request in it has a token to compute; a static batch keeps the places of "
                "requests that have ended.",
            ],
        )

    def _memory_claims(self, uses: dict[str, MemoryUse]) -> list[Claim]:
        def interval(name: str) -> dict[str, Any]:
            share = uses[name].token_states
            return {"ours": share.value, "low": share.low, "high": share.high}

        return [
            at_least("KV memory in use, paged", "%", self.least_paged, **interval("paged-continuous")),
            at_most("KV memory in use, contiguous, longest length reserved", "%", self.most_contiguous,
                    **interval("contiguous-continuous")),
            at_most("KV memory in use, contiguous, true length reserved", "%", self.most_contiguous,
                    **interval("oracle-continuous"), note="the best that a reservation can do: it knows the future"),
        ]  # fmt: skip

    def _busy_claims(self, uses: dict[str, MemoryUse], lanes: int) -> list[Claim]:
        def share(name: str) -> dict[str, Any]:
            value, low, high = (100 * x / lanes for x in uses[name].batch)
            return {"ours": value, "low": low, "high": min(high, 100.0)}

        return [
            at_least("batch places that compute, continuous", "%", self.least_busy, **share("contiguous-continuous"),
                     note="the guide says “busy”; 90 % is our reading"),
            at_most("batch places that compute, static", "%", self.least_busy, **share("contiguous-static")),
        ]  # fmt: skip


LABELS = {
    "contiguous-static": "contiguous × static",
    "contiguous-continuous": "contiguous × continuous",
    "oracle-continuous": "orca_oracle × continuous",
    "paged-continuous": "paged × continuous",
}


def _split_chart(uses: dict[str, MemoryUse]) -> Chart:
    names: Sequence[str] = [LABELS[name] for name in uses]
    series = [
        Series(look.label, names, [use.shares[key] for use in uses.values()])
        for key, look in CLASS_LOOKS.items()
        if any(use.shares[key] > 0 for use in uses.values())
    ]
    caption = f"Mean split of KV memory {ROOM.phrase}."
    return Chart("kv_split", "stacked", "mean share of the KV pool (%)", "", caption, series)


def _rate_chart(rates: dict[str, float]) -> Chart:
    series = [Series("output tokens/s", [LABELS[name] for name in rates], list(rates.values()))]
    caption = "Output throughput of the same requests on the same model."
    return Chart("throughput", "bars", "", "output tokens per second", caption, series)
