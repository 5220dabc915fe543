"""The fused runner with the draw in its decode steps, interpreted: tokens and log-probabilities of the plain one."""

import pytest
import torch
from checkpoints import random_prompts, write_checkpoint
from fused_helpers import LateReference, make_pool, run

from kvarena.engine.fusions.detect import fuse
from kvarena.engine.fusions.ops import TorchOps
from kvarena.engine.models import load_model
from kvarena.engine.request import Request, SamplingParams
from kvarena.engine.runner import fused_runner
from kvarena.engine.runner.fused_runner import FusedRunner
from kvarena.engine.runner.torch_runner import TorchRunner

PROMPTS = random_prompts((5, 13, 3, 9))
NUM_BLOCKS, BLOCK_SIZE = 30, 4
KINDS = {
    "filtered": ({"top_p": 0.9}, {}, {"top_k": 20, "top_p": 0.95}, {"temperature": 0.0, "top_p": 0.5}),
    "edited": ({"top_p": 0.9}, {"repetition_penalty": 1.3, "top_k": 9}, {"logit_bias": {7: 3.0}, "min_p": 0.1}, {}),
    "all edited": ({"min_tokens": 3}, {"presence_penalty": 0.5, "frequency_penalty": 0.2, "top_p": 0.8}),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return load_model(write_checkpoint(tmp_path_factory.mktemp("llama"), "llama"))


@pytest.fixture(autouse=True)
def drawn_here(monkeypatch):
    monkeypatch.setattr(fused_runner, "draws_on", lambda device: True)


def requests_of(kind):
    settings = KINDS[kind]
    return [
        Request(f"r{i}", list(prompt), SamplingParams(
            **({"temperature": 0.8, "seed": i, "max_tokens": 5} | settings[i % len(settings)])
        ))
        for i, prompt in enumerate(PROMPTS)
    ]  # fmt: skip


def make_fused(model, **options):
    pool = make_pool(model, NUM_BLOCKS, BLOCK_SIZE)
    return FusedRunner(model, pool, LateReference(pool), fuse(model, TorchOps(), 128), max_num_seqs=4,
                       max_model_len=128, mixed_tokens=16, **options)  # fmt: skip


@pytest.mark.parametrize(("kind", "overlap"), [("filtered", True), ("edited", True), ("all edited", False)])
def test_same_tokens_as_the_plain_runner(model, kind, overlap):
    expected = run(TorchRunner(model, make_pool(model, NUM_BLOCKS, BLOCK_SIZE)), requests_of(kind), overlap=False)
    assert len({token for tokens in expected for token in tokens}) > 8
    assert run(make_fused(model), requests_of(kind), overlap=overlap) == expected


def test_decode_steps_end_their_draw_only_where_somebody_filters(model, monkeypatch):
    runner = make_fused(model)
    ends = []
    monkeypatch.setattr(runner._draw, "end", lambda *args, of=runner._draw.end: ends.append(1) or of(*args))
    monkeypatch.setattr(runner._sampler, "_race", lambda *args: pytest.fail("the sampler drew"))
    run(runner, [Request("a", [1, 2], SamplingParams(temperature=0.5, max_tokens=4))], overlap=True)
    assert not ends
    runner.warm_up(1, 1)
    assert len(ends) == 1
    ends.clear()
    run(runner, [Request("b", [1, 2], SamplingParams(temperature=0.5, top_p=0.5, max_tokens=4))], overlap=True)
    assert len(ends) == 3
    runner.warm_up(4, 4)
    assert len(ends) == 3 + 2  # batches of 2 and 4: that of 1 has been compiled


def test_log_probabilities_come_with_the_drawn_tokens(model):
    """Of a request beside one that wants none; they are of the token that was drawn from the edited logits."""
    logits = torch.randn(2, model.spec.vocab_size, generator=torch.Generator().manual_seed(1))
    asked = [
        Request("a", [1, 2], SamplingParams(temperature=0.8, seed=1, top_p=0.9, logprobs=3, logit_bias={5: 4.0})),
        Request("b", [3, 4], SamplingParams(temperature=0.8, seed=2, top_k=4)),
    ]
    found = []
    for runner in (make_fused(model), TorchRunner(model, make_pool(model, NUM_BLOCKS, BLOCK_SIZE))):
        rows = runner._rows.of(asked)
        stops = runner._rows.columns["num_prompt"][rows]
        with torch.inference_mode():
            tokens, logprobs = runner._pick(asked, rows, stops, logits).result()
        assert runner._rows.last_tokens[rows].tolist() == tokens
        assert logprobs[1] is None and logprobs[0].token_id == tokens[0]
        found.append((tokens, [token for token, _ in logprobs[0].top], logprobs[0].rank))
        assert logprobs[0].logprob == pytest.approx(
            float((logits[0] + 4.0 * torch.eye(len(logits[0]))[5]).log_softmax(-1)[tokens[0]]), abs=1e-5
        )
    assert found[0] == found[1]


def test_recorded_scores_are_those_of_the_sampler(model):
    """Filtered tokens' scores are the sampler's; rows that only draw have the draw's."""
    logits = torch.randn(3, model.spec.vocab_size, generator=torch.Generator().manual_seed(1))
    kinds = ({"top_p": 0.7}, {}, {"temperature": 0.0})
    asked = [Request(str(i), [1], SamplingParams(**({"temperature": 0.8, "seed": i} | kind)))
             for i, kind in enumerate(kinds)]  # fmt: skip
    found = []
    for runner in (make_fused(model, num_scores=4),
                   TorchRunner(model, make_pool(model, NUM_BLOCKS, BLOCK_SIZE), num_scores=4)):  # fmt: skip
        rows = runner._rows.of(asked)
        with torch.inference_mode():
            picked = runner._pick(asked, rows, runner._rows.columns["num_prompt"][rows], logits)
        scores = picked.scores()
        assert picked.result()[0] == scores.token_ids[:, 0].tolist()
        found.append(scores)
    assert (found[0].token_ids == found[1].token_ids).all()
    assert abs(found[0].values - found[1].values).max() < 1e-4
