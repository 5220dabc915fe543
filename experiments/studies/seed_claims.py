"""The two claims that this project starts from, measured on a real model.

1. Paged allocation keeps over 90 % of KV memory in use where contiguous reservation keeps at most 60 %.
2. Continuous batching keeps the device busy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvarena.engine.errors import ConfigError
from kvarena.experiments.studies.base import Chart, Findings, mean_series, split_chart
from kvarena.experiments.studies.cells import CellRunner
from kvarena.experiments.studies.claims import Claim, Mean, at_least, at_most, check, compared, counted, measured
from kvarena.experiments.studies.memory_use import (
    MemoryUse,
    class_shares,
    covered,
    memory_use,
    share_over_seeds,
    waiting,
)
from kvarena.experiments.studies.orca import seeds_text
from kvarena.reports.analysis.windows import DEFINITION, WAITING

SOURCE = "a guide to serving with vLLM; PagedAttention (Kwon et al., SOSP 2023), sections 1 and 2"


Uses = dict[str, list[MemoryUse]]  # one a seed
STRATEGIES = {
    "contiguous-static": ("contiguous", "static"),
    "contiguous-continuous": ("contiguous", "continuous"),
    "oracle-continuous": ("orca_oracle", "continuous"),
    "paged-continuous": ("paged", "continuous"),
}


@dataclass(frozen=True)
class SeedClaimsStudy:
    """Runs contiguous and paged allocation under static and continuous batching on one workload.

    Args:
        least_paged: least share of the pool in token states under paged allocation, percent.
        most_contiguous: most under contiguous reservation, percent.
        least_busy: least share of the batch's places that compute under continuous batching, percent.
        least_window: least part of each run's step time in which a request waits, percent.
        seeds: of the workload.

    Raises:
        ConfigError: no seed.
    """

    least_paged: float
    most_contiguous: float
    least_busy: float
    least_window: float
    seeds: Sequence[int]

    def __post_init__(self) -> None:
        if not self.seeds:
            raise ConfigError("study.seeds must name at least one seed")

    def run(self, cells: CellRunner) -> Findings:
        """See `Study.run`."""
        uses: Uses = {name: [] for name in STRATEGIES}
        rates: dict[str, list[float]] = {name: [] for name in STRATEGIES}
        for seed in self.seeds:  # outermost: what drifts on this machine drifts for all strategies
            for name, (allocator, scheduler) in STRATEGIES.items():
                options = [f"allocator={allocator}", f"scheduler={scheduler}", f"workload.seed={seed}"]
                summary = cells.run(f"{name}-seed{seed}", options)
                uses[name].append(memory_use(cells.folders[-1], waiting, self.least_window))
                rates[name].append(summary["output_tokens_per_second"])
        lanes = max(use.largest_batch for use in uses["contiguous-continuous"])
        claims = [*self._memory_claims(uses), *self._busy_claims(uses, lanes), *_rate_claims(rates)]
        paged, contiguous = (_filled(uses[name]).value for name in ("paged-continuous", "contiguous-continuous"))
        return Findings(
            title="The two claims that kvarena starts from",
            headline=(
                f"{counted(claims, 'stated shares of memory hold')}: paged allocation keeps {paged:.1f} % of KV memory "
                f"in use where contiguous reservation keeps {contiguous:.1f} %. Continuous batching keeps "
                f"{_busy(uses, 'contiguous-continuous', lanes).value:.0f} % of a full batch's places computing, static "
                f"batching {_busy(uses, 'contiguous-static', lanes).value:.0f} %."
            ),
            source=SOURCE,
            claims=claims,
            charts=[_split_chart(uses), _rate_chart(rates)],
            differences=[
                "The model has 1M parameters and runs on a CPU, so a step's time depends less on its batch than on a "
                "GPU: the shares of memory carry over, the ratio of throughputs does not.",
                "Lengths are drawn from ShareGPT's published distribution, without the requests that the longest "
                "length of the engine leaves out; all requests are there at the start.",
            ],
            notes=[
                f"Shares of memory and of places are means over step time {WAITING.phrase}: "
                f"{covered([use for of in uses.values() for use in of])}. {DEFINITION}",
                f"{seeds_text(self.seeds)} Ratios are taken seed by seed; tokens per second are measured on this "
                "machine and hang on what else it does.",
                f"The pool holds {lanes} reservations of the longest request, so a full batch has {lanes} places. A "
                "place computes while a request in it has a token to compute; a static batch keeps the places of "
                "requests that have ended.",
            ],
        )

    def _memory_claims(self, uses: Uses) -> list[Claim]:
        return [
            at_least("KV memory in use, paged", "%", self.least_paged, _filled(uses["paged-continuous"])),
            at_most("KV memory in use, contiguous, longest length reserved", "%", self.most_contiguous,
                    _filled(uses["contiguous-continuous"])),
            at_most("KV memory in use, contiguous, true length reserved", "%", self.most_contiguous,
                    _filled(uses["oracle-continuous"]),
                    note="the best that a reservation can do: it knows the future"),
        ]  # fmt: skip

    def _busy_claims(self, uses: Uses, lanes: int) -> list[Claim]:
        note = "the guide says “busy”; 90 % is our reading"
        quantity = "batch places that compute"
        return [
            check(at_least(f"{quantity}, continuous", "%", self.least_busy,
                           _busy(uses, "contiguous-continuous", lanes), note=note)),
            check(at_most(f"{quantity}, static", "%", self.least_busy, _busy(uses, "contiguous-static", lanes),
                          note=note)),
        ]  # fmt: skip


def _filled(uses: Sequence[MemoryUse]) -> Mean:
    """Share of the pool in token states."""
    return share_over_seeds(uses, lambda use: use.shares["token_states"])


def _busy(uses: Uses, name: str, lanes: int) -> Mean:
    """Share of a full batch's places that compute."""
    return share_over_seeds(uses[name], lambda use: 100 * use.batch / lanes)


def _rate_claims(rates: dict[str, list[float]]) -> list[Claim]:
    return [
        *(measured(f"output tokens/s, {LABELS[name]}", "", Mean.of(of)) for name, of in rates.items()),
        compared("output tokens/s, continuous over static batching (contiguous)",
                 Mean.of_ratios(rates["contiguous-continuous"], rates["contiguous-static"])),
        compared("output tokens/s, paged over contiguous (continuous)",
                 Mean.of_ratios(rates["paged-continuous"], rates["contiguous-continuous"])),
    ]  # fmt: skip


LABELS = {
    "contiguous-static": "contiguous × static",
    "contiguous-continuous": "contiguous × continuous",
    "oracle-continuous": "orca_oracle × continuous",
    "paged-continuous": "paged × continuous",
}


def _split_chart(uses: Uses) -> Chart:
    names = [LABELS[name] for name in uses]
    return split_chart(names, class_shares(uses.values()), f"Mean split of KV memory {WAITING.phrase}.")


def _rate_chart(rates: dict[str, list[float]]) -> Chart:
    means = [Mean.of(of) for of in rates.values()]
    series = [mean_series("output tokens/s", [LABELS[name] for name in rates], means)]
    caption = "Output throughput of the same requests on the same model."
    return Chart("throughput", "bars", "", "output tokens per second", caption, series)
