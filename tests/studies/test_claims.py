"""A published number holds when ours meets it, interval and all; what cannot fail is a check and is not counted."""

import math
from dataclasses import asdict, replace

import pytest

from kvarena.experiments.studies.claims import (
    Kind,
    Mean,
    Verdict,
    at_least,
    at_most,
    between,
    check,
    compared,
    counted,
    fitted,
    judge,
    measured,
    near,
    not_run,
    up_to,
    within,
)
from kvarena.reports.pages.study_claims import tally, verdict_line


def seeds(value: float, half: float) -> Mean:
    return Mean(value, value - half, value + half)


@pytest.mark.parametrize(
    ("ours", "verdict"),
    [
        (seeds(24.0, 1.0), Verdict.HOLDS),
        (seeds(22.86, 1.56), Verdict.NOT_DECIDED),  # the mean is inside by 0.05, the interval is not
        (seeds(22.7, 1.56), Verdict.NOT_DECIDED),  # outside by as little
        (seeds(20.0, 1.5), Verdict.DIFFERS),
        (Mean(24.0, None, None), Verdict.NOT_DECIDED),  # one seed
        (24.0, Verdict.HOLDS),  # an exact number
        (22.0, Verdict.DIFFERS),
    ],
)
def test_the_interval_decides(ours, verdict):
    claim = near("batch", "", 30.42, ours, 0.25)
    assert claim.verdict is verdict and claim.kind is Kind.VALUE
    assert ("one seed" in claim.note) == (ours == Mean(24.0, None, None))


def test_up_to_is_the_upper_end_of_what_was_found():
    """A gain far below "up to 22 times" is no reproduction of it, and one that is a little above is."""
    assert up_to("gain", "", 22.0, seeds(8.25, 0.5), 0.25).verdict is Verdict.LESS
    assert up_to("gain", "", 2.6, seeds(2.8, 0.1), 0.25).verdict is Verdict.HOLDS
    assert up_to("gain", "", 2.6, seeds(4.0, 0.1), 0.25).verdict is Verdict.MORE
    assert up_to("gain", "", 22.0, seeds(16.5, 2.0), 0.25).verdict is Verdict.NOT_DECIDED
    unknown = up_to("gain", "", 1.23, None, 0.25)
    assert unknown.verdict is Verdict.NOT_COMPARABLE and unknown.kind is Kind.UP_TO


def test_ranges_and_bounds():
    assert between("x", "", 1.7, 2.7, seeds(2.0, 0.2)).verdict is Verdict.HOLDS
    outside = between("x", "", 1.7, 2.7, seeds(2.9, 0.1), beside=seeds(2.0, 0.1))
    assert (outside.verdict, outside.stated, outside.stated_least) == (Verdict.DIFFERS, 2.7, 1.7)
    assert (outside.beside, outside.beside_low) == (2.0, 1.9)
    assert between("x", "", 1.7, 2.7, None).verdict is Verdict.NOT_COMPARABLE
    assert at_least("rate", "", 2.0, 1.9).verdict is Verdict.DIFFERS
    assert at_most("gap", "s", 2.0, seeds(1.95, 0.1)).verdict is Verdict.NOT_DECIDED
    assert within("share", "%", 0.0, seeds(0.1, 0.05), 5.0).verdict is Verdict.HOLDS
    assert judge(math.nan, 0.0, 1.0) is Verdict.DIFFERS


def test_only_published_numbers_that_something_is_held_against_are_counted():
    claims = [
        within("a", "%", 20.4, seeds(25.0, 0.1), 5.0),
        within("b", "%", 20.4, seeds(26.0, 0.1), 5.0),
        within("c", "%", 20.4, seeds(25.3, 0.5), 5.0),
        up_to("d", "", 22.0, seeds(8.0, 0.1), 0.25),
        not_run("e", "%", 44.3, "not offered"),
        fitted("f", "", 132.44, seeds(132.0, 1.0)),
        measured("g", "%", 50.0),
        compared("h", seeds(2.0, 0.1)),
        check(between("not judged", "", 1.7, 2.7, None)),
        check(at_most("i", "", 65_536, 36_018.0)),
        check(at_least("j", "", 1.0, 0.5)),
    ]
    assert counted(claims, "bars are met") == "1 of 4 bars are met (1 not decided, 1 not comparable)"
    line, good = verdict_line([asdict(claim) for claim in claims])
    assert (line, good) == (
        "1 of 4 published numbers hold, 1 not decided, 1 not comparable; 1 of 2 checks pass, 1 not comparable.",
        False,
    )
    counts = tally([asdict(claim) for claim in claims])
    assert counts == {
        "num_claims": 11, "num_judged": 4, "num_holding": 1, "num_differing": 2, "num_not_decided": 1,
        "num_not_comparable": 1, "num_checks": 2, "num_passing": 1, "num_failing": 1, "num_checks_not_decided": 0,
        "num_checks_not_comparable": 1, "num_not_judged": 3,
    }  # fmt: skip
    assert [claim.verdict for claim in claims[-2:]] == [Verdict.PASSES, Verdict.FAILS]
    assert compared("k", seeds(1.0, 0.1)).verdict is Verdict.SAME
    assert compared("l", Mean(2.0, None, None)).verdict is Verdict.MEASURED


def test_what_is_not_comparable_neither_holds_nor_fails():
    held, lost = within("a", "%", 20.0, 20.0, 5.0), not_run("b", "%", 44.3, "not offered")
    unmade = check(between("c", "", 1.7, 2.7, None))

    def said(*claims):
        return verdict_line([asdict(claim) for claim in claims])

    assert said(held, lost) == ("1 of 1 published numbers hold, 1 not comparable.", True)
    assert said(lost) == ("No published number is judged, 1 not comparable.", True)
    assert said(unmade) == ("No check is decided, 1 not comparable.", True)
    assert said(measured("d", "", 1.0)) is None
    parts = ("num_judged", "num_not_comparable", "num_checks", "num_checks_not_decided", "num_checks_not_comparable")
    for verdict in list(Verdict)[:6]:  # of a comparison: none is lost, and none is counted twice
        for claim in (replace(held, verdict=verdict), check(replace(held, verdict=verdict))):
            counts = tally([asdict(claim)])
            assert sum(counts[part] for part in parts) == 1
            assert counts["num_judged"] == sum(counts[f"num_{of}"] for of in ("holding", "differing", "not_decided"))
            assert counts["num_checks"] == counts["num_passing"] + counts["num_failing"]


def test_a_share_has_no_interval_beyond_its_ends():
    assert Mean(93.0, 81.0, 105.0).clipped(0.0, 100.0) == (93.0, 81.0, 100.0)
    assert Mean(0.9, -1.0, 2.7).clipped(0.0, 100.0).low == 0
    assert Mean(0.9, None, None).clipped(0.0, 100.0) == (0.9, None, None)
