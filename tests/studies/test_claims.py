"""A published number holds when ours meets it, interval and all; what cannot fail is a check and is not counted."""

import math
from dataclasses import asdict

import pytest

from experiments.studies.claims import (
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
from reports.study_claims import verdict_line


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
    assert counted(claims, "bars are met") == "1 of 4 bars are met (1 not decided)"
    line, good = verdict_line([asdict(claim) for claim in claims])
    assert (line, good) == ("1 of 4 published numbers hold, 1 not decided; 1 of 2 checks pass.", False)
    assert [claim.verdict for claim in claims[-2:]] == [Verdict.PASSES, Verdict.FAILS]
    assert compared("k", seeds(1.0, 0.1)).verdict is Verdict.SAME
    assert compared("l", Mean(2.0, None, None)).verdict is Verdict.MEASURED


def test_a_share_has_no_interval_beyond_its_ends():
    assert Mean(93.0, 81.0, 105.0).clipped(0.0, 100.0) == (93.0, 81.0, 100.0)
    assert Mean(0.9, -1.0, 2.7).clipped(0.0, 100.0).low == 0
    assert Mean(0.9, None, None).clipped(0.0, 100.0) == (0.9, None, None)
