"""Repeats folded: a contender is one cell of the grid with all the runs that repeat it (other seeds, other rounds)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from kvarena.reports.analysis.latency import describe
from kvarena.reports.comparing.cells import Cell, is_seed
from kvarena.reports.reading.files import RunFiles

LARGEST, SMALLEST, COUNTS = ("max",), ("min",), ("count",)  # of what `describe` answers


@dataclass(eq=False)
class Contender:
    """A row of every table and figure.

    Attributes:
        runs: its repeats, in the order of the sweep; at least one.
        label: their common name.
        settings: the settings that differ between contenders; seeds are among them only where nothing was repeated.
        baseline: whom it is compared with; itself for the baseline; None where no run has a partner.
        unpaired: why there is none.
    """

    runs: list[Cell]
    label: str
    settings: dict[str, Any]
    baseline: Contender | None = None
    unpaired: str | None = None
    _partners: dict[int, list[tuple[Cell, Cell]]] = field(default_factory=dict, repr=False)

    @cached_property
    def summary(self) -> dict[str, Any]:
        """What `summarize` answers, folded over its runs."""
        return fold([run.summary for run in self.runs])

    @property
    def run(self) -> RunFiles:
        """The first repeat's files, for what is drawn of one run alone."""
        return self.runs[0].run

    @property
    def folder(self) -> str:
        """The first repeat's folder."""
        return self.runs[0].folder

    @property
    def is_simulated(self) -> bool:
        """Whether its times are a virtual clock's."""
        return self.runs[0].is_simulated

    @property
    def is_baseline(self) -> bool:
        """True when it is compared with itself."""
        return self.baseline is self

    @property
    def strategy(self) -> tuple[str, ...]:
        """See `Cell.strategy`."""
        return self.runs[0].strategy

    @property
    def conditions(self) -> dict[str, Any]:
        """See `Cell.conditions`; without seeds that were folded."""
        return {key: value for key, value in self.runs[0].conditions.items() if key in self.settings}

    def latencies(self, metric: str) -> np.ndarray:
        """A latency of all requests of all repeats."""
        return np.concatenate([run.latencies[metric] for run in self.runs])

    def pairs(self, other: Contender) -> list[tuple[Cell, Cell]]:
        """Its runs and the other's of the same seeds and round, in the order of its runs."""
        if id(other) not in self._partners:
            by_block = {run.block: run for run in other.runs}
            chosen = {id(run): run.baseline for run in self.runs if run.baseline in other.runs}
            found = [(run, chosen.get(id(run)) or by_block.get(run.block)) for run in self.runs]
            self._partners[id(other)] = [(run, partner) for run, partner in found if partner is not None]
        return self._partners[id(other)]


def contenders(cells: Sequence[Cell]) -> list[Contender]:
    """The cells folded, in the order in which each is first seen."""
    groups: dict[Any, list[Cell]] = {}
    for cell in cells:
        groups.setdefault(cell.contender, []).append(cell)
    is_folded = any(len(group) > 1 for group in groups.values())
    result: list[Contender] = []
    of_run: dict[int, Contender] = {}
    for group in groups.values():
        settings = {key: value for key, value in group[0].settings.items() if not (is_folded and is_seed(key))}
        result.append(Contender(group, group[0].label, settings))
        of_run |= {id(cell): result[-1] for cell in group}
    for contender in result:
        paired = next((run for run in contender.runs if run.baseline is not None), None)
        if paired is None:
            contender.unpaired = contender.runs[0].unpaired
        else:
            contender.baseline = of_run[id(paired.baseline)]
    return result


def fold(summaries: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Summaries of repeats as one: numbers are means over the repeats that have them, `max` is the largest and `min`
    the smallest, a `count` is the sum, what is true or false must be true in all, and text must be the same in all.
    Seeds and rounds are names: a list of them where they differ.
    """
    if len(summaries) == 1:
        return summaries[0]
    keys = dict.fromkeys(key for summary in summaries for key in summary)
    return {key: _fold(key, [summary.get(key) for summary in summaries]) for key in keys}


def _fold(key: str, values: list[Any]) -> Any:
    known = [value for value in values if value is not None]
    if not known or "_ci95_" in key:  # an interval over the requests of one run is none over repeats
        return None
    if all(isinstance(value, dict) for value in known):
        return fold(known)
    if all(isinstance(value, bool) for value in known):
        return all(known)
    if is_seed(key) or key == "round":
        names = list(dict.fromkeys(known))
        return names[0] if len(names) == 1 else names
    if all(isinstance(value, int | float) and not isinstance(value, bool) for value in known):
        if key in LARGEST or key.endswith("_max"):
            return max(known)
        if key in SMALLEST:
            return min(known)
        if key in COUNTS:
            return sum(known)
        mean = sum(known) / len(known)
        return known[0] if len(set(known)) == 1 else mean
    return known[0] if all(value == known[0] for value in known) else None


def spread(values: Sequence[float | None]) -> dict[str, Any]:
    """Count, mean, smallest and largest of the values that there are."""
    stats = describe(np.array(values, dtype=float))
    return {name: stats[name] for name in ("count", "mean", "min", "max")}
