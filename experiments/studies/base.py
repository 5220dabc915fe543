"""What a study is, and what it finds.

    conf/experiment/NAME.yaml --> a Study --> cells (run folders) --> Findings --> study.json --> report

A study says which cells it needs and what they show. Cells run like any single run (`experiments.studies.cells`), and
the report is made from study.json alone (`reports.study`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from typing import Any, NamedTuple, Protocol

import numpy as np
from scipy import stats

from experiments.studies.cells import CellRunner


class Verdict(StrEnum):
    """What a claim came to."""

    HOLDS = "holds"
    DIFFERS = "differs"
    NOT_COMPARABLE = "not comparable"
    # Of numbers that nobody stated: measured, or compared with another of ours.
    MEASURED = "measured"
    HIGHER = "higher"
    LOWER = "lower"
    SAME = "no significant difference"


@dataclass(frozen=True)
class Claim:
    """One published or promised number beside ours.

    Attributes:
        quantity: what is measured, in words.
        unit: of `stated` and `ours`; "" for a pure number.
        stated: the source's value; None where it states none.
        ours: what the cells gave; None where they could not.
        tolerance: when the claim holds, in words.
        verdict: whether it does.
        low, high: 95 % confidence interval of `ours`; None without one.
        note: why it differs, or what is compared; may be empty.
    """

    quantity: str
    unit: str
    stated: float | None
    ours: float | None
    tolerance: str
    verdict: Verdict
    low: float | None = None
    high: float | None = None
    note: str = ""


def within(quantity: str, unit: str, stated: float, ours: float, tolerance: float, **more: Any) -> Claim:
    """A claim that holds when `ours` lies within `tolerance` (same unit) of `stated`."""
    verdict = Verdict.HOLDS if abs(ours - stated) <= tolerance else Verdict.DIFFERS
    of = "points" if unit == "%" else unit
    return Claim(quantity, unit, stated, ours, f"within {tolerance:g} {of}".strip(), verdict, **more)


def at_least(quantity: str, unit: str, stated: float, ours: float, **more: Any) -> Claim:
    """A claim that holds when `ours` is at least `stated`."""
    verdict = Verdict.HOLDS if ours >= stated else Verdict.DIFFERS
    return Claim(quantity, unit, stated, ours, f"at least {stated:g} {unit or ''}".strip(), verdict, **more)


def at_most(quantity: str, unit: str, stated: float, ours: float, **more: Any) -> Claim:
    """A claim that holds when `ours` is at most `stated`."""
    verdict = Verdict.HOLDS if ours <= stated else Verdict.DIFFERS
    return Claim(quantity, unit, stated, ours, f"at most {stated:g} {unit or ''}".strip(), verdict, **more)


def near(quantity: str, unit: str, stated: float, ours: float, share: float, **more: Any) -> Claim:
    """A claim that holds when `ours` lies within `share` of `stated`."""
    verdict = Verdict.HOLDS if abs(ours - stated) <= share * stated else Verdict.DIFFERS
    return Claim(quantity, unit, stated, ours, f"within {share:.0%}", verdict, **more)


def between(quantity: str, unit: str, least: float, most: float, ours: float | None, **more: Any) -> Claim:
    """A claim that holds when `ours` lies in [least, most]; one that was not measured is not comparable.

    `stated` is the end of the range that is nearer to `ours`.
    """
    unit_text = f" {unit}" if unit else ""
    tolerance = f"from {least:g} to {most:g}{unit_text}"
    if ours is None:
        return Claim(quantity, unit, None, None, tolerance, Verdict.NOT_COMPARABLE, **more)
    stated = least if ours - least <= most - ours else most
    verdict = Verdict.HOLDS if least <= ours <= most else Verdict.DIFFERS
    return Claim(quantity, unit, stated, ours, tolerance, verdict, **more)


def up_to(quantity: str, unit: str, most: float, ours: float | None, **more: Any) -> Claim:
    """A gain stated as "up to `most` times": holds when `ours` is above 1 and at most that."""
    claim = between(quantity, unit, 1.0, most, ours, **more)
    return replace(claim, stated=most, tolerance=f"above 1, up to {most:g}")


class Mean(NamedTuple):
    """A mean over seeds and its 95 % interval by Student's t; of one seed the interval is None."""

    value: float
    low: float | None
    high: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> Mean:
        """Mean of one value per seed."""
        value = float(np.mean(values))
        if len(values) < 2:
            return cls(value, None, None)
        error = float(np.std(values, ddof=1)) / len(values) ** 0.5
        half = float(stats.t.ppf(0.975, len(values) - 1)) * error
        return cls(value, value - half, value + half)


def compared(ratio: Mean) -> Verdict:
    """What a ratio to another strategy came to: significant where its interval leaves out 1."""
    if ratio.low is None or ratio.high is None:
        return Verdict.MEASURED
    return Verdict.HIGHER if ratio.low > 1 else Verdict.LOWER if ratio.high < 1 else Verdict.SAME


@dataclass(frozen=True)
class Series:
    """One line, or one group of bars.

    Attributes:
        name: in the legend.
        x: numbers for lines, labels for bars.
        y: one value for each x; None leaves a gap.
        low, high: a band or error bars around y; empty for none.
    """

    name: str
    x: Sequence[float] | Sequence[str]
    y: Sequence[float | None]
    low: Sequence[float] = ()
    high: Sequence[float] = ()


@dataclass(frozen=True)
class Chart:
    """A figure as data; `reports.study_charts` draws it.

    Attributes:
        name: of its file.
        kind: lines | bars (side by side) | stacked (bars of shares, one series a segment) |
            parity (points, and the line on which x and y are equal).
        x_label, y_label: with units.
        caption: what it shows.
        series: what is drawn.
        log_x, log_y: logarithmic axes.
        y_limit: top of the y axis; None fits the data.
        y_mark: a dotted line across, such as a limit or a bound.
    """

    name: str
    kind: str
    x_label: str
    y_label: str
    caption: str
    series: Sequence[Series]
    log_x: bool = False
    log_y: bool = False
    y_limit: float | None = None
    y_mark: float | None = None


@dataclass(frozen=True)
class Findings:
    """What a study found.

    Attributes:
        title: of the report.
        headline: the answer in one sentence.
        source: where the stated values come from.
        claims: stated values beside ours.
        charts: figures.
        differences: what differs from the source's setting, one sentence each.
        notes: how it was measured, definitions.
    """

    title: str
    headline: str
    source: str
    claims: Sequence[Claim]
    charts: Sequence[Chart] = ()
    differences: Sequence[str] = ()
    notes: Sequence[str] = field(default_factory=tuple)

    def to_json(self) -> dict[str, Any]:
        """As study.json holds it."""
        return asdict(self)


class Study(Protocol):
    """A question that several cells answer. Made by Hydra from the config's section `study`."""

    def run(self, cells: CellRunner) -> Findings:
        """Run the cells it needs and say what they show.

        Raises:
            KvarenaError: a cell is badly set or failed.
        """
        ...
