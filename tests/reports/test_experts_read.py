"""How many experts steps read: what is expected, and the skew that a measured routing had."""

import numpy as np
import pytest

from kvarena.reports.analysis.experts import MAX_SKEW, ExpertLoad, measured_skew


@pytest.mark.parametrize(("experts", "top_k"), [(8, 2), (128, 8), (4, 4), (3, 1)])
def test_a_balanced_routing_reads_what_the_formula_says(experts, top_k):
    load = ExpertLoad(1, experts, top_k)
    for tokens in (0, 1, 2, 7, 64, 1000):
        assert load.read(tokens) == pytest.approx(experts * (1 - (1 - top_k / experts) ** tokens))
    assert load.read(1) == pytest.approx(top_k)


def test_a_skewed_routing_reads_fewer_but_never_fewer_than_one_token_takes():
    for skew in (0.5, 1.0, 3.9):
        load, balanced = ExpertLoad(2, 16, 4, skew), ExpertLoad(2, 16, 4)
        read = [load.read(tokens) for tokens in (1, 2, 8, 64)]
        assert read[0] == pytest.approx(4)
        assert read == sorted(read) and read[-1] <= 16
        assert all(got < balanced.read(tokens) for got, tokens in zip(read[1:], (2, 8, 64), strict=True))


def test_drawn_routings_are_as_expected():
    """By Zipf's law without replacement: a little more even than the law's own shares, which is the model's error."""
    rng = np.random.default_rng(0)
    weights = np.arange(1, 17) ** -0.8
    gumbel = rng.gumbel(size=(400, 8, 16)) + np.log(weights)  # the k largest are k draws without replacement
    chosen = np.argsort(-gumbel, axis=2)[:, :, :2]
    read = np.mean([len(np.unique(step)) for step in chosen])
    assert ExpertLoad(1, 16, 2, 0.8).read(8) == pytest.approx(read, rel=0.02)


def test_the_skew_of_a_routing_is_found_again():
    tokens = np.array([1, 2, 4, 8, 8, 16, 32])
    for skew in (0.0, 0.3, 1.2):
        load = ExpertLoad(4, 64, 6, skew)
        read = np.array([load.read(int(count)) for count in tokens])
        assert measured_skew(tokens, read, ExpertLoad(4, 64, 6)) == pytest.approx(skew, abs=0.01)


def test_a_skew_that_cannot_be_told_is_none():
    load = ExpertLoad(1, 8, 2)
    assert measured_skew(np.array([1, 1]), np.array([2.0, 2.0]), load) == 0.0
    assert measured_skew(np.array([], dtype=int), np.array([]), load) == 0.0
    assert measured_skew(np.array([4]), np.array([8.0]), load) == 0.0
    assert measured_skew(np.array([64]), np.array([2.0]), load) == MAX_SKEW
