"""How `kvarena benchmark fairness` judges what a client got."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from kvarena.experiments.benchmarks.tenants import fairness
from kvarena.experiments.benchmarks.tenants.fairness import Offer, got
from kvarena.experiments.load.http_client import Answer

OFFER = Offer("http://x", "k", 5.0, 0.0, 20.0, 3, 8, 4, 100)


def test_arrivals_are_the_same_for_a_seed_and_of_the_rate_that_is_asked():
    many = Offer("http://x", "k", 50.0, 0.0, 200.0, 3, 8, 4, 100).arrivals()
    assert OFFER.arrivals() == OFFER.arrivals() != Offer("http://x", "k", 5.0, 0.0, 20.0, 4, 8, 4, 100).arrivals()
    assert many == sorted(many) and many[-1] < 200.0 and len(many) == pytest.approx(10_000, rel=0.05)
    assert OFFER.prompt(1) == OFFER.prompt(1) != OFFER.prompt(2) and len(OFFER.prompt(1)) == 8


def test_what_counts_is_what_came_within_the_part():
    begin, head = 100.0, 5.0
    early = Answer(start=101.0, chunk_times=[104.0, 106.0], token_ids=[1, 2], status=200)  # half of it counts
    good = Answer(start=110.0, chunk_times=[110.5, 111.0], token_ids=[1, 2, 3, 4], status=200)
    open_still = Answer(start=118.0, status=200)  # has waited for two seconds
    refused = Answer(start=112.0, status=503, error="status 503: full")
    found = got(OFFER, head, [early, good, open_still, refused], begin)
    assert (found.num_sent, found.refused) == (3, {503: 1})
    assert found.waits == pytest.approx([0.5, 2.0])
    assert found.tokens_per_s == pytest.approx((1 + 4) / 15)


@pytest.mark.parametrize(
    ("p99", "tokens", "refused", "met"),
    [(1.3, 95.0, 0, True), (1.31, 100.0, 0, False), (1.0, 94.0, 0, False), (1.0, 100.0, 1, False)],
)
def test_the_bars_are_of_the_median_round(capsys, p99, tokens, refused, met):
    before = {"ttft_p99_s": 1.0, "tokens_per_s": 100.0, "refused": 0}
    wild = {"ttft_p99_s": 9.0, "tokens_per_s": 1.0, "refused": 0}
    flood = {"ttft_p99_s": p99, "tokens_per_s": tokens, "refused": refused}
    options = SimpleNamespace(ttft_bar=1.3, tokens_bar=0.95)
    lines = [before, flood, before, flood, before, wild]
    assert fairness._judge(options, "fair", 1.0, lines) is met
    assert f'"met": {str(met).lower()}' in capsys.readouterr().out
