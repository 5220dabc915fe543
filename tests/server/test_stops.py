"""Stop strings are found across joins, are never leaked, and hold nothing back in vain."""

from __future__ import annotations

import random

import pytest

from kvarena.engine.server.text.stops import StopMatcher


def _feed(stops, pieces, include=False):
    matcher = StopMatcher(stops, include)
    shown = []
    for piece in pieces:
        shown.append(matcher.add(piece))
        if matcher.matched is not None:
            return shown, matcher.matched
    shown.append(matcher.flush())
    return shown, None


def test_a_stop_across_three_tokens_is_never_shown():
    shown, matched = _feed(["END"], ["abc E", "N", "D tail"])
    assert "".join(shown) == "abc "
    assert matched == "END"


def test_include_keeps_the_stop_and_nothing_after_it():
    shown, _ = _feed(["END"], ["abc EN", "D tail"], include=True)
    assert "".join(shown) == "abc END"


def test_only_a_possible_beginning_is_held():
    assert _feed(["END"], ["abcE", "x"])[0] == ["abc", "Ex", ""]
    assert _feed(["\n\n"], ["line\n", "next"])[0] == ["line", "\nnext", ""]


def test_the_stop_that_is_complete_first_wins():
    assert _feed(["bcd", "c"], ["abcd"])[1] == "c"
    assert "".join(_feed(["c", "bcd"], ["abcd"])[0]) == "ab"


def test_the_held_tail_is_shown_at_the_end():
    shown, matched = _feed(["<stop>"], ["text <st"])
    assert "".join(shown) == "text <st"
    assert matched is None


@pytest.mark.parametrize("seed", range(20))
def test_any_cut_gives_what_the_whole_text_gives(seed):
    rng = random.Random(seed)
    text = "".join(rng.choice("ab") for _ in range(60))
    stops = ["".join(rng.choice("ab") for _ in range(rng.randint(3, 7))) for _ in range(3)]
    ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    expected = text[: min(ends)[1]] if ends else text
    pieces, at = [], 0
    while at < len(text):
        size = rng.randint(1, 4)
        pieces.append(text[at : at + size])
        at += size
    shown, matched = _feed(stops, pieces)
    assert "".join(shown) == expected
    assert (matched is not None) == bool(ends)
