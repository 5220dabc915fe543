"""Numbers of a source beside ours, and what each comparison came to.

    Kind.VALUE  met within a tolerance      }
    Kind.RANGE  lies between two numbers    }  published by the source: these are counted
    Kind.UP_TO  the source's best: our best }
                reaches near it             }
    Kind.BOUND  at most, or at least        }
    Kind.CHECK  what must come out so (theorems, limits of our own): apart from the claims
    Kind.FITTED what a parameter was fitted to: shows the fit, proves nothing
    Kind.OURS   a number that nobody stated

A verdict takes the interval into account: it is "not decided" when the interval holds both values that meet the claim
and values that do not, and when there is no interval because one seed ran.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from typing import Any, NamedTuple

import numpy as np

from kvarena.reports.analysis.intervals import StudentMean
from kvarena.reports.pages.study_claims import apart, tally


class Kind(StrEnum):
    """What sort of number a claim holds (see the module)."""

    VALUE = "value"
    RANGE = "range"
    UP_TO = "up to"
    BOUND = "bound"
    CHECK = "check"
    FITTED = "fitted"
    OURS = "ours"


class Verdict(StrEnum):
    """What a claim came to."""

    HOLDS = "holds"
    DIFFERS = "differs"
    LESS = "less than stated"
    MORE = "more than stated"
    NOT_DECIDED = "not decided"
    NOT_COMPARABLE = "not comparable"
    # Of checks.
    PASSES = "passes"
    FAILS = "fails"
    # Of numbers that nobody stated: measured, or compared with another of ours.
    MEASURED = "measured"
    HIGHER = "higher"
    LOWER = "lower"
    SAME = "no significant difference"


class Mean(NamedTuple):
    """A mean over seeds and its 95 % interval by Student's t; of one seed the interval is None."""

    value: float
    low: float | None
    high: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> Mean:
        """Mean of one value per seed."""
        if len(values) < 2:
            return cls(float(np.mean(values)), None, None)
        mean = StudentMean.of(values)
        return cls(mean.value, *mean.interval)

    @classmethod
    def of_ratios(cls, ours: Sequence[float], theirs: Sequence[float]) -> Mean:
        """Mean of the ratios, seed by seed."""
        return cls.of([one / other for one, other in zip(ours, theirs, strict=True)])

    def scaled(self, factor: float) -> Mean:
        """In another unit."""
        low = None if self.low is None else factor * self.low
        high = None if self.high is None else factor * self.high
        return Mean(factor * self.value, low, high)

    def clipped(self, least: float, most: float) -> Mean:
        """With an interval that ends where the quantity does (a share's at 0 and 100 %)."""
        low = None if self.low is None else max(self.low, least)
        high = None if self.high is None else min(self.high, most)
        return Mean(self.value, low, high)


Number = Mean | float


@dataclass(frozen=True)
class Claim:
    """One published or promised number beside ours.

    Attributes:
        quantity: what is measured, in words.
        unit: of `stated`, `ours` and `beside`; "" for a pure number.
        stated: the source's value, or the end of its range that is nearer to ours; None where it states none.
        ours: what the cells gave; None where they could not.
        tolerance: when the claim holds, in words.
        verdict: whether it does.
        low, high: 95 % confidence interval of `ours`; None without one.
        note: why it differs, or what is compared; may be empty.
        kind: what sort of number it is.
        stated_least, stated_most: the ends where the source states a range.
        beside: the same quantity under `Findings.beside`; None where it was not measured.
        beside_low, beside_high: its interval.
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
    kind: Kind = Kind.OURS
    stated_least: float | None = None
    stated_most: float | None = None
    beside: float | None = None
    beside_low: float | None = None
    beside_high: float | None = None


def within(quantity: str, unit: str, stated: float, ours: Number, tolerance: float, **more: Any) -> Claim:
    """A value that is met within `tolerance` (same unit).

    Args:
        ours: a mean over seeds, or an exact number (a count over a file).
        more: `note` and `beside` (a Mean or a number).
    """
    of = "points" if unit == "%" else unit
    text = f"within {tolerance:g} {of}".strip()
    return _judged(quantity, unit, stated, ours, (stated - tolerance, stated + tolerance), text, Kind.VALUE, **more)


def near(quantity: str, unit: str, stated: float, ours: Number, share: float, **more: Any) -> Claim:
    """A value that is met within `share` of itself. Arguments as of `within`."""
    zone = (stated * (1 - share), stated * (1 + share))
    return _judged(quantity, unit, stated, ours, zone, f"within {share:.0%}", Kind.VALUE, **more)


def at_least(quantity: str, unit: str, stated: float, ours: Number, **more: Any) -> Claim:
    """A lower bound. Arguments as of `within`."""
    text = f"at least {stated:g} {unit}".strip()
    return _judged(quantity, unit, stated, ours, (stated, math.inf), text, Kind.BOUND, **more)


def at_most(quantity: str, unit: str, stated: float, ours: Number, **more: Any) -> Claim:
    """An upper bound. Arguments as of `within`."""
    text = f"at most {stated:g} {unit}".strip()
    return _judged(quantity, unit, stated, ours, (-math.inf, stated), text, Kind.BOUND, **more)


def between(quantity: str, unit: str, least: float, most: float, ours: Number | None, **more: Any) -> Claim:
    """A range, both ends in it; one that was not measured (None) is not comparable. Arguments as of `within`."""
    text = f"from {least:g} to {most:g} {unit}".strip()
    if ours is None:
        return _unmeasured(quantity, unit, least, text, Kind.RANGE, stated_least=least, stated_most=most, **more)
    value = _as_mean(ours).value
    stated = least if value - least <= most - value else most
    claim = _judged(quantity, unit, stated, ours, (least, most), text, Kind.RANGE, **more)
    return replace(claim, stated_least=least, stated_most=most)


def up_to(quantity: str, unit: str, most: float, ours: Number | None, share: float, **more: Any) -> Claim:
    """The largest gain that a source found ("up to"): reproduced where our largest reaches it within `share`.

    Below that it is "less than stated", above "more than stated". Arguments as of `within`; None was not measured.
    """
    text = f"within {share:.0%} of it"
    if ours is None:
        return _unmeasured(quantity, unit, most, text, Kind.UP_TO, **more)
    claim = _judged(quantity, unit, most, ours, (most * (1 - share), most * (1 + share)), text, Kind.UP_TO, **more)
    if claim.verdict is not Verdict.DIFFERS:
        return claim
    return replace(claim, verdict=Verdict.LESS if _as_mean(ours).value < most else Verdict.MORE)


def check(claim: Claim) -> Claim:
    """The same as a check: what must come out so, or is held against a limit of our own."""
    differing = dict.fromkeys((Verdict.DIFFERS, Verdict.LESS, Verdict.MORE), Verdict.FAILS)
    verdicts = {Verdict.HOLDS: Verdict.PASSES} | differing
    return replace(claim, kind=Kind.CHECK, verdict=verdicts.get(claim.verdict, claim.verdict))


def fitted(quantity: str, unit: str, stated: float, ours: Number, **more: Any) -> Claim:
    """A number that a parameter was fitted to. It is shown beside its source and not judged."""
    mean = _as_mean(ours)
    return Claim(quantity, unit, stated, mean.value, "fitted to it", Verdict.MEASURED, mean.low, mean.high,
                 kind=Kind.FITTED, **_beside(more))  # fmt: skip


def measured(quantity: str, unit: str, ours: Number, **more: Any) -> Claim:
    """A number that nobody stated. Arguments as of `within`."""
    mean = _as_mean(ours)
    return Claim(quantity, unit, None, mean.value, "", Verdict.MEASURED, mean.low, mean.high, **_beside(more))


def compared(quantity: str, ratio: Mean, **more: Any) -> Claim:
    """A ratio to another strategy: higher or lower where its interval leaves out 1. Arguments as of `within`."""
    if ratio.low is None or ratio.high is None:
        verdict = Verdict.MEASURED
    else:
        verdict = Verdict.HIGHER if ratio.low > 1 else Verdict.LOWER if ratio.high < 1 else Verdict.SAME
    return replace(measured(quantity, "", ratio, **more), verdict=verdict)


def counted(claims: Sequence[Claim], what: str) -> str:
    """How many published numbers hold, for a headline: "12 of 15 {what} (1 not decided, 2 not comparable)".

    Those that are not comparable are not among the 15.
    """
    counts = tally([asdict(claim) for claim in claims])
    text = f"{counts['num_holding']} of {counts['num_judged']} {what}"
    others = apart(counts).removeprefix(", ")
    return f"{text} ({others})" if others else text


def not_run(quantity: str, unit: str, stated: float, why: str) -> Claim:
    """A published number that nothing here can be held against."""
    return Claim(quantity, unit, stated, None, "not run", Verdict.NOT_COMPARABLE, note=why, kind=Kind.VALUE)


def _judged(
    quantity: str, unit: str, stated: float, ours: Number, zone: tuple[float, float], tolerance: str, kind: Kind,
    **more: Any,
) -> Claim:  # fmt: skip
    mean = _as_mean(ours)
    claim = Claim(
        quantity, unit, stated, mean.value, tolerance, judge(ours, *zone), mean.low, mean.high, kind=kind,
        **_beside(more),
    )  # fmt: skip
    if claim.verdict is Verdict.NOT_DECIDED and mean.low is None:
        return replace(claim, note="; ".join(filter(None, (claim.note, "one seed: no interval"))))
    return claim


def judge(ours: Number, least: float, most: float) -> Verdict:
    """Whether `ours` lies in [least, most]: an exact number by itself, a mean with its whole interval."""
    if not isinstance(ours, Mean):
        return Verdict.HOLDS if least <= ours <= most else Verdict.DIFFERS
    if ours.low is None or ours.high is None:
        return Verdict.NOT_DECIDED
    if least <= ours.low and ours.high <= most:
        return Verdict.HOLDS
    return Verdict.DIFFERS if ours.high < least or ours.low > most else Verdict.NOT_DECIDED


def _unmeasured(quantity: str, unit: str, stated: float, tolerance: str, kind: Kind, **more: Any) -> Claim:
    return Claim(quantity, unit, stated, None, tolerance, Verdict.NOT_COMPARABLE, kind=kind, **_beside(more))


def _as_mean(number: Number) -> Mean:
    return number if isinstance(number, Mean) else Mean(float(number), None, None)


def _beside(more: dict[str, Any]) -> dict[str, Any]:
    """The fields of `more`, with a mean `beside` as its value and interval."""
    beside = more.pop("beside", None)
    if beside is None:
        return more
    mean = _as_mean(beside)
    return more | {"beside": mean.value, "beside_low": mean.low, "beside_high": mean.high}
