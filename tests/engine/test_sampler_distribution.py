"""What is sampled: supports and probabilities against transformers' processors, and the draws' distribution."""

import numpy as np
import pytest
import torch
from scipy import stats
from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from kvarena.engine.request import Request, SamplingParams
from kvarena.engine.runner.request_rows import RequestRows
from kvarena.engine.sampling.sampler import Sampler
from kvarena.engine.sampling.streams import log_exponentials, stream_keys
from kvarena.engine.sampling.transforms import keep_min_p, keep_top_k, keep_top_p

V = 200
LOGITS = torch.randn(5, V, generator=torch.Generator().manual_seed(1)) * 2


@pytest.mark.parametrize("k", [1, 2, 17, V - 1, V])
def test_top_k_matches_transformers(k):
    ours = keep_top_k(LOGITS, torch.full((5,), k), k)
    assert torch.equal(ours, TopKLogitsWarper(k)(None, LOGITS))


def test_top_k_may_differ_by_row():
    ours = keep_top_k(LOGITS, torch.tensor([1, 2, 3, 50, 9]), 50)
    assert ours.isfinite().sum(-1).tolist() == [1, 2, 3, 50, 9]


@pytest.mark.parametrize("p", [1e-6, 0.1, 0.5, 0.9, 0.999])
def test_top_p_matches_transformers(p):
    ours = keep_top_p(LOGITS, torch.full((5,), p))
    assert torch.equal(ours, TopPLogitsWarper(p)(None, LOGITS))


def test_top_p_among_equals_keeps_the_lower_ids():
    kept = keep_top_p(torch.zeros(1, 10), torch.tensor([0.35]))
    assert kept[0].isfinite().nonzero()[:, 0].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("p", [0.0, 0.01, 0.3, 1.0])
def test_min_p_matches_transformers(p):
    ours = keep_min_p(LOGITS, torch.full((5,), p))
    assert torch.equal(ours, MinPLogitsWarper(p)(None, LOGITS))


def draws(logits, num_draws, seed=11, **sampling):
    params = SamplingParams(seed=seed, max_tokens=num_draws, **sampling)
    requests = [Request(str(i), [0], params) for i in range(num_draws)]
    batch = RequestRows(len(logits), "cpu").batch(requests, num_outputs=range(num_draws))
    return torch.tensor(Sampler()(logits.expand(num_draws, -1), batch).tolist())


def assert_follows(tokens, probabilities):
    """Chi-square test of counts against probabilities; the stream is fixed, so it passes always or never."""
    counts = torch.bincount(tokens, minlength=len(probabilities)).double()
    assert (counts[probabilities == 0] == 0).all(), "a token outside the support was drawn"
    expected = probabilities.double() / probabilities.double().sum() * len(tokens)
    common = expected >= 5
    observed = torch.cat([counts[common], counts[~common].sum()[None]])
    wanted = torch.cat([expected[common], expected[~common].sum()[None]])
    if wanted[-1] < 5:
        observed, wanted = observed[:-1], wanted[:-1] * (observed[:-1].sum() / wanted[:-1].sum())
    assert stats.chisquare(observed.numpy(), wanted.numpy()).pvalue > 0.01


@pytest.mark.parametrize(
    ("sampling", "warpers"),
    [
        ({"temperature": 1.0}, []),
        ({"temperature": 0.5}, [TemperatureLogitsWarper(0.5)]),
        ({"temperature": 2.0, "top_k": 9}, [TemperatureLogitsWarper(2.0), TopKLogitsWarper(9)]),
        ({"temperature": 1.5, "top_p": 0.8}, [TemperatureLogitsWarper(1.5), TopPLogitsWarper(0.8)]),
        ({"temperature": 1.5, "min_p": 0.2}, [TemperatureLogitsWarper(1.5), MinPLogitsWarper(0.2)]),
        (
            {"temperature": 1.2, "top_k": 30, "top_p": 0.9, "min_p": 0.02},
            [TemperatureLogitsWarper(1.2), TopKLogitsWarper(30), TopPLogitsWarper(0.9), MinPLogitsWarper(0.02)],
        ),
    ],
)
def test_draws_follow_the_filtered_distribution(sampling, warpers):
    scores = LOGITS[:1]
    for warper in warpers:
        scores = warper(None, scores)
    assert_follows(draws(LOGITS[0], 20_000, **sampling), scores[0].softmax(-1))


def test_draws_are_uniform_over_a_large_vocabulary():
    vocab = 10_000
    tokens = draws(torch.zeros(vocab), 2_000, temperature=1.0)
    buckets = torch.bincount(tokens // 200, minlength=50)
    assert stats.chisquare(buckets.numpy()).pvalue > 0.01
    assert len(tokens.unique()) > 1_750


def test_neighbouring_seeds_and_positions_are_independent():
    seeds = np.repeat(np.arange(64, dtype=np.uint64), 64)
    positions = np.tile(np.arange(64), 64)
    noise = log_exponentials(torch.from_numpy(stream_keys(seeds, positions)), 32).view(64, 64, 32)
    sample = (noise + 0.5772).flatten()
    assert abs(sample.mean()) < 0.01
    assert abs(sample.var() - torch.pi**2 / 6) < 0.03
    for shifted in (noise.roll(1, 0), noise.roll(1, 1), noise.roll(1, 2), noise.transpose(0, 1).roll(1, 0)):
        assert abs(torch.corrcoef(torch.stack([noise.flatten(), shifted.flatten()]))[0, 1]) < 0.01


def test_the_exponentials_are_exponential():
    zero = np.zeros(1, dtype=np.uint64)
    keys = torch.from_numpy(stream_keys(zero, zero))
    values = log_exponentials(keys, 100_000)[0].exp()
    assert stats.kstest(values.numpy(), "expon").pvalue > 0.01
