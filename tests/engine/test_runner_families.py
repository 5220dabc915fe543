"""Greedy tokens of the runner equal those of transformers' generate, family by family."""

import pytest
import torch
from checkpoints import FAMILIES, random_prompts, write_checkpoint
from runner_driver import generate, make_requests

from kvarena.engine.attention import reference
from kvarena.engine.models import load_model
from kvarena.experiments.correctness.reference import greedy_reference

PROMPTS = random_prompts((5, 13, 1, 30))
NUM_TOKENS = 12
# Whole prompts; chunks; scattered single-slot blocks; mixed batches of random requests and chunk sizes.
WAYS = {
    "whole": {"block_size": 16},
    "chunks": {"block_size": 3, "chunk": 4},
    "block of one": {"block_size": 1, "chunk": 7},
    "mixed": {"block_size": 3, "chunk": 5, "random_order": 0},
    "overlap": {"block_size": 16, "chunk": 6, "overlap": True},
}


def cells():
    """Every family in mixed batches and in one way more, all ways in turn; all of all in `make test-all`."""
    for place, family in enumerate(FAMILIES):
        others = [name for name in WAYS if name != "mixed"]
        for name, way in WAYS.items():
            quick = name == "mixed" or name == others[place % len(others)]
            yield pytest.param(family, way, id=f"{family}-{name}", marks=() if quick else pytest.mark.slow)


@pytest.fixture(scope="module")
def checkpoint(request, tmp_path_factory):
    directory = write_checkpoint(tmp_path_factory.mktemp(request.param), request.param)
    return load_model(directory), greedy_reference(directory, PROMPTS, NUM_TOKENS)


@pytest.mark.parametrize(("checkpoint", "way"), cells(), indirect=["checkpoint"])
def test_greedy_tokens_equal_transformers(checkpoint, way, monkeypatch):
    model, expected = checkpoint
    if way["block_size"] != 16:
        # These contexts are short: have decode rows done as long ones are.
        monkeypatch.setattr(reference, "FEW_TOKENS", 0)
    # A model that repeats one token would hide most faults.
    assert len({token for tokens in expected for token in tokens}) > 10
    assert generate(model, make_requests(PROMPTS, NUM_TOKENS), **way).tokens == expected


@pytest.mark.parametrize("family", ["llama", "gemma2", "mixtral", "gpt2"])
def test_bfloat16_logits_follow_transformers(family, tmp_path):
    """In bf16 argmaxes may flip: compare log-probabilities of the same tokens, teacher-forced."""
    directory = write_checkpoint(tmp_path, family)
    model = load_model(directory, dtype="bfloat16")
    assert model.spec.dtype == torch.bfloat16
    prompts = random_prompts((40, 25))
    requests = make_requests(prompts, 1, prompt_logprobs=0)
    outcome = generate(model, requests, block_size=16, chunk=11)
    got: list[list[float]] = [[], []]
    for plan, result in outcome.results:
        for entry, rows in zip(plan.scheduled, result.prompt_logprobs, strict=True):
            got[requests.index(entry.req)] += [row.logprob for row in rows]
    original = load_model(directory).module
    original.set_attn_implementation("eager")
    for prompt, values in zip(prompts, got, strict=True):
        ids = torch.tensor([prompt])
        logits = original(input_ids=ids, use_cache=False).logits[0, :-1].log_softmax(-1)
        expected = logits.gather(1, ids[0, 1:, None])[:, 0]
        difference = (torch.tensor(values) - expected).abs()
        assert difference.mean() < 0.15
        assert difference.max() < 1.5
