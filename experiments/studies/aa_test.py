"""Cells that differ in nothing, run and judged like a sweep's: whatever is decided about them is false.

    every cell once a round, in the order of a sweep --> the verdicts of a comparison --> how many decide
                                                      --> the spread over rounds --> the smallest effect that shows

The rate of false verdicts is the rule's promise (reports/comparing/verdicts.py), kept or not on this machine at this
time. The smallest effect is what the machine allows: a difference below it is not shown by so many rounds.
"""

from __future__ import annotations

import json
import math
import string
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from kvarena.engine.checks import check_int, require
from kvarena.engine.errors import ConfigError
from kvarena.experiments.settings.run_order import order
from kvarena.experiments.studies.base import Chart, Findings, Series
from kvarena.experiments.studies.cells import CellRunner
from kvarena.experiments.studies.claims import Claim, Verdict
from kvarena.reports.comparing.verdicts import LEVEL, POWER, THROUGHPUT, compare_cells, shares, smallest_effect
from kvarena.reports.comparing.verdicts import Verdict as Answer
from kvarena.reports.reading.names import MANIFEST_FILE

LATENCIES = {"ttft_seconds": "median TTFT", "tpot_seconds": "median TPOT", "e2e_seconds": "median E2E latency"}
NAMES = {THROUGHPUT: "output tokens/s"} | LATENCIES
FALSE_VERDICTS = "verdicts that see a difference"
SMALLEST = "smallest difference that shows"
LARGEST = 10.0  # a ratio; a smallest difference above it is not a number that means something


@dataclass(frozen=True)
class AATestStudy:
    """Runs identical cells in rounds and asks the comparison's rule which of them differ.

    Args:
        num_cells: 2 to 26.
        rounds: at least 2.

    Raises:
        ConfigError: out of range.
    """

    num_cells: int
    rounds: int

    def __post_init__(self) -> None:
        check_int("study.num_cells", self.num_cells, 2, len(string.ascii_uppercase))
        require(self.rounds >= 2, "study.rounds", self.rounds, "at least 2: one run each has no interval")

    def run(self, cells: CellRunner) -> Findings:
        """See `Study.run`."""
        runs: dict[tuple[int, int], _Run] = {}
        for repeat in range(self.rounds):
            for cell in order(self.num_cells, repeat):
                summary = cells.run(f"{string.ascii_uppercase[cell]}-r{repeat}", [f"sweep.round={repeat}"])
                if summary["simulation"]:
                    raise ConfigError("experiment=aa_test measures noise, and a simulated run has none: runner=torch")
                runs[cell, repeat] = _Run.of(summary, cells.folders[-1])
        metrics = {name: self._table(runs, name) for name in NAMES}
        answers = compare_cells(
            metrics, probes=self._table(runs, "probe"), positions=self._table(runs, "start")
        )  # fmt: skip
        return self._findings(metrics, answers, self._table(runs, "share"))

    def _table(self, runs: dict[tuple[int, int], _Run], name: str) -> np.ndarray:
        """[cells, rounds] of one number; NaN where a run has none."""
        rows = [[runs[cell, repeat].numbers[name] for repeat in range(self.rounds)] for cell in range(self.num_cells)]
        return np.array(rows, dtype=float)

    def _findings(self, metrics: dict[str, np.ndarray], answers: list[Answer], share: np.ndarray) -> Findings:
        decided = [answer for answer in answers if answer.is_decided]
        undecided = [answer for answer in answers if answer.verdict.startswith("not decided")]
        effects = smallest_effects(metrics, answers)
        if THROUGHPUT not in effects:
            raise ConfigError(
                "experiment=aa_test has no two rounds in which every cell finished a request; ask for less"
            )
        effect = effects[THROUGHPUT]
        seen = f"is {100 * (effect - 1):.1f} %" if effect <= LARGEST else f"is more than a factor of {LARGEST:g}"
        return Findings(
            title="Identical cells against each other",
            headline=(
                f"{len(decided)} of {len(answers)} verdicts about {self.num_cells} identical cells in {self.rounds} "
                f"rounds are false and see a difference; the smallest one in {NAMES[THROUGHPUT]} that this machine "
                f"shows in so many rounds {seen}."
            ),
            source="this machine, and the rule of our comparisons (reports/comparing/verdicts.py)",
            claims=[
                Claim(FALSE_VERDICTS, "", None, float(len(decided)), "0 are right", Verdict.MEASURED,
                      note=f"of {len(answers)}; {len(undecided)} are not decided for the machine's sake"),
                *(_smallest(name, effect, self.rounds) for name, effect in effects.items()),
            ],
            charts=[_chart(metrics[THROUGHPUT])],
            notes=[
                "The cells run the same config on the same requests, each once a round in an order that changes, and "
                f"are judged like a sweep's: at most {LEVEL:.0%} of such reports should hold any false verdict.",
                f"Smallest difference: the rule decides it in {POWER:.0%} of reports with so many cells, metrics and "
                "rounds, at the spread of the ratio between two cells from round to round that these runs had.",
                f"The process had {_percent(np.nanmin(share))} to {_percent(np.nanmax(share))} of a processor while it "
                "was measured.",
            ],
        )  # fmt: skip


@dataclass(frozen=True)
class _Run:
    """The numbers of one run that the rule asks for; NaN where there is none."""

    numbers: dict[str, float]

    @classmethod
    def of(cls, summary: dict[str, Any], folder: Path) -> _Run:
        manifest = json.loads((folder / MANIFEST_FILE).read_text())
        contention = manifest["contention"] or {}
        probe = contention.get("probe")
        numbers = {name: summary[name]["p50"] for name in LATENCIES} | {
            THROUGHPUT: summary[THROUGHPUT],
            "probe": math.sqrt(probe["before"] * probe["after"]) if probe else None,
            "share": contention.get("processor_share"),
            "start": datetime.fromisoformat(manifest["run"]["ended"]).timestamp() - manifest["run"]["wall_time"],
        }
        return cls({name: math.nan if value is None else float(value) for name, value in numbers.items()})


def smallest_effects(metrics: dict[str, np.ndarray], answers: Sequence[Answer]) -> dict[str, float]:
    """The smallest ratio above 1 of each metric that the rule would decide, by the spread of these identical cells.

    What a whole round or a whole cell has in common is taken off; what is left makes a ratio's spread, from all cells.

    Args:
        metrics: [cells, rounds] of each.
        answers: the rule's, whose number and metrics say how strict it must be.
    """
    part = dict(zip([answer.metric for answer in answers], shares([answer.metric for answer in answers]), strict=True))
    effects = {}
    for name, values in metrics.items():
        logs = np.log(values[:, np.isfinite(values).all(axis=0)])
        num_cells, num_rounds = logs.shape
        if num_rounds < 2:
            continue
        left = logs - logs.mean(axis=0) - logs.mean(axis=1, keepdims=True) + logs.mean()
        variance = float((left**2).sum()) / ((num_cells - 1) * (num_rounds - 1))
        effects[name] = smallest_effect(math.sqrt(2 * variance), values.shape[1], part[name])
    return effects


def _smallest(name: str, effect: float, rounds: int) -> Claim:
    """A smallest difference in percent; none where it would be a factor that says nothing but that."""
    ours: float | None = 100 * (effect - 1)
    note = f"{rounds} rounds"
    if effect > LARGEST:
        ours, note = None, f"{rounds} rounds; more than a factor of {LARGEST:g}: too few rounds, or too much noise"
    return Claim(f"{SMALLEST}: {NAMES[name]}", "%", None, ours, "less is better", Verdict.MEASURED, note=note)


def _chart(values: np.ndarray) -> Chart:
    rounds = [float(repeat) for repeat in range(values.shape[1])]
    lines = [
        Series(string.ascii_uppercase[cell], rounds, [None if math.isnan(value) else float(value) for value in row])
        for cell, row in enumerate(values)
    ]
    return Chart(
        "throughput", "lines", "round", NAMES[THROUGHPUT], "What each of the identical cells did in each round.", lines
    )


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"
