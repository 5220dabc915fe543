"""PagedAttention, Figure 15: how much KV memory parallel samples save by sharing their prompt, and beams theirs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from kvarena.engine.classes import OWNED
from kvarena.engine.errors import ConfigError
from kvarena.experiments.studies.base import Chart, Findings, Series, mean_series
from kvarena.experiments.studies.cells import CellRunner
from kvarena.experiments.studies.claims import Claim, Mean, between, counted, measured, near
from kvarena.experiments.studies.orca import DIFFERENCES, STEADY, Load, run_system, seeds_text, steady
from kvarena.experiments.studies.papers.published import BEAM_SAVED, FIGURE_15_SOURCE, SAMPLING_SAVED
from kvarena.reports.analysis.memory import step_spans, weighted_mean
from kvarena.reports.reading.files import read_run

NEAR = 0.25  # of the paper's value: our limit, the paper states none


class _Half(NamedTuple):
    """One half of the figure.

    Attributes:
        setting: what makes requests of a prompt: how many.
        label: of the cells' folders.
        words, one: what they are, and a number of them in a claim; `axis` of the chart, `shared` of its caption.
        stated: the paper's savings in percent, by workload and number.
    """

    setting: str
    label: str
    words: str
    one: str
    axis: str
    shared: str
    stated: dict[str, dict[int, float]]


HALVES = (
    _Half(
        "sampling.n",
        "n",
        "samples",
        "{} samples",
        "parallel samples",
        "the prompt among parallel samples",
        SAMPLING_SAVED,
    ),
    _Half("sampling.beams", "beams", "beams", "beam search of {}", "beam width", "blocks among beams", BEAM_SAVED),
)


@dataclass(frozen=True)
class PaperFig15Study:
    """Args:
    num_samples: parallel samples of a prompt, as in the paper.
    beam_widths: of beam searches, as in the paper.
    rates: workload -> samples or beams started per second; requests per second are that over their number.
    num_requests: workload -> prompts of each cell with samples.
    beam_requests: workload -> prompts of each cell with beams.
    seeds: of the workload.

    Raises:
        ConfigError: no seed.
    """

    num_samples: Sequence[int]
    beam_widths: Sequence[int]
    rates: dict[str, float]
    num_requests: dict[str, int]
    beam_requests: dict[str, int]
    seeds: Sequence[int]

    def __post_init__(self) -> None:
        if not self.seeds:
            raise ConfigError("study.seeds must name at least one seed")

    def run(self, cells: CellRunner) -> Findings:
        """See `Study.run`."""
        found = [
            (half, workload, {n: self._saved(cells, half, workload, n) for n in numbers})
            for half, numbers in zip(HALVES, (self.num_samples, self.beam_widths), strict=True)
            for workload in (self.rates if numbers else ())
        ]
        claims = [_claim(half, name, n, mean) for half, name, of in found for n, mean in of.items()]
        shares = "; ".join(
            f"{', '.join(map(str, of))} {half.words}, {name}: {', '.join(f'{m.value:.1f} %' for m in of.values())}"
            for half, name, of in found
        )
        return Findings(
            title="PagedAttention, Figure 15: memory saved by sharing blocks",
            headline=f"{counted(claims, 'savings are as the paper’s')}. {shares}.",
            source=FIGURE_15_SOURCE,
            claims=claims,
            charts=[_chart(half, name, of) for half, name, of in found],
            differences=[
                *DIFFERENCES,
                "The paper's text gives ShareGPT's savings as 16.2 to 30.5 % of samples and 44.3 to 66.3 % of beams: "
                "read here as of 2 and of 6.",
                "Which beams go on is decided by the real search on drawn log-probabilities, fitted to the demo "
                "model's beams and to none of the paper's numbers (docs/simulator.md, Beams). OPT-13B's own are not "
                "computed.",
                "All samples and beams of a prompt have one output length here; the paper's end where their text ends.",
            ],
            notes=[
                f"That a value within {NEAR:.0%} of the paper's holds is our limit; the paper states none.",
                "Saved: blocks that sharing saves over the blocks that requests would own without it, the paper's "
                f"definition; mean over step time, {STEADY}. {seeds_text(self.seeds)}",
                "Blocks of 16 tokens. The last, partly filled block of a prompt is copied when its samples write into "
                "it, and whole blocks are shared to the end. A beam that dies gives its blocks back at once, and its "
                "heir forks the beam that goes on: whole blocks are shared, the partly filled one is copied.",
            ],
        )

    def _saved(self, cells: CellRunner, half: _Half, workload: str, num: int) -> Mean:
        prompts = self.num_requests if half is HALVES[0] else self.beam_requests
        load = Load(workload, self.rates[workload] / num, prompts[workload])
        values = []
        for seed in self.seeds:
            run_system(cells, "vLLM", load, f"{half.setting}={num}", seed=seed, label=f"{half.label}{num}")
            run = read_run(cells.folders[-1])
            steps, window = run.steps, steady(run)
            owned = np.sum([steps[name] for name in OWNED], axis=0)
            without = owned + steps["shared_saved"]
            share = 100 * steps["shared_saved"] / np.maximum(without, 1)
            values.append(weighted_mean(share[window], step_spans(steps).weight[window]) or 0.0)
        return Mean.of(values)


def _claim(half: _Half, workload: str, num: int, mean: Mean) -> Claim:
    quantity = f"{workload}, {half.one.format(num)}: memory saved"
    of = half.stated[workload]
    stated = of.get(num)
    if stated is not None:
        note = "an end of the paper's range" if workload == "sharegpt" else ""
        return near(quantity, "%", stated, mean, NEAR, note=note)
    if workload == "sharegpt" and 2 < num < 6:
        return between(quantity, "%", of[2], of[6], mean, note="the paper states the ends alone")
    return measured(quantity, "%", mean, note="not stated")


def _chart(half: _Half, workload: str, saved: dict[int, Mean]) -> Chart:
    names = [str(n) for n in saved]
    ours = mean_series("kvarena", names, list(saved.values()))
    paper = Series("paper", names, [half.stated[workload].get(n) for n in saved])
    caption = f"KV memory saved by sharing {half.shared}, {workload}."
    if unstated := [name for name, value in zip(names, paper.y, strict=True) if value is None]:
        caption += f" The paper's text gives no value for {', '.join(unstated)}."
    name = f"saved_{workload}" if half is HALVES[0] else f"saved_{half.label}_{workload}"
    return Chart(name, "bars", half.axis, "memory saved (%)", caption, [paper, ours])
