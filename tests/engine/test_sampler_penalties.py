"""Penalties: the formulae, the incremental counts, and tokens that the host has not seen."""

import pytest
import torch
from transformers import RepetitionPenaltyLogitsProcessor

from kvarena.engine.errors import EngineError
from kvarena.engine.request import Request, SamplingParams
from kvarena.engine.runner.request_rows import RequestRows
from kvarena.engine.sampling.sampler import Sampler

V = 32
SAMPLE = Sampler()
LOGITS = torch.randn(4, V, generator=torch.Generator().manual_seed(2)) * 3


def request(name, prompt=(1, 2), output=(), **sampling):
    req = Request(name, list(prompt), SamplingParams(max_tokens=100, **sampling))
    req.output_token_ids += output
    return req


def edited(logits, requests, **kwargs):
    """The logits after bias and penalties, read from the full list of log-probabilities up to a constant per row."""
    batch = RequestRows(V, "cpu").batch(requests, **kwargs)
    return SAMPLE._edit(logits.clone(), batch)


def test_repetition_penalty_matches_transformers():
    req = request("a", prompt=[3, 4, 4], output=[9, 3], repetition_penalty=1.7)
    wanted = RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor([[3, 4, 4, 9, 3]]), LOGITS[:1].clone())
    torch.testing.assert_close(edited(LOGITS[:1], [req]), wanted)
    assert not torch.equal(wanted, LOGITS[:1])


def test_presence_and_frequency_count_the_output_alone():
    req = request("a", prompt=[3, 4], output=[9, 9, 7], presence_penalty=0.5, frequency_penalty=0.25)
    wanted = LOGITS[:1].clone()
    wanted[0, 9] -= 0.5 + 2 * 0.25
    wanted[0, 7] -= 0.5 + 0.25
    torch.testing.assert_close(edited(LOGITS[:1], [req]), wanted)


@pytest.mark.parametrize("name", ["presence_penalty", "frequency_penalty"])
def test_each_additive_penalty_acts_alone(name):
    req = request("a", output=[9, 9], **{name: 2.0})
    lowered = LOGITS[0, 9] - edited(LOGITS[:1], [req])[0, 9]
    assert lowered == pytest.approx(2.0 if name == "presence_penalty" else 4.0, abs=1e-5)


def test_all_three_apply_repetition_first_and_only_to_their_rows():
    req = request("b", output=[5], repetition_penalty=2.0, presence_penalty=1.0, frequency_penalty=0.5)
    result = edited(LOGITS, [request("a"), req, request("c"), request("d", logit_bias={0: 1.5})])
    wanted = LOGITS.clone()
    for token in (1, 2, 5):
        wanted[1, token] = wanted[1, token] / 2 if wanted[1, token] > 0 else wanted[1, token] * 2
    wanted[1, 5] -= 1.5
    wanted[3, 0] += 1.5
    torch.testing.assert_close(result, wanted)


def test_negative_penalties_raise_a_token():
    req = request("a", output=[9], presence_penalty=-2.0, frequency_penalty=-2.0)
    assert edited(LOGITS[:1], [req])[0, 9] == pytest.approx(float(LOGITS[0, 9]) + 4, abs=1e-5)


def test_incremental_counts_equal_counts_from_nothing():
    generator = torch.Generator().manual_seed(3)
    state = RequestRows(V, "cpu")
    live = {}
    for step in range(40):
        if step % 5 == 0:
            name = f"r{step}"
            live[name] = request(
                name,
                prompt=torch.randint(0, V, (4,), generator=generator).tolist(),
                repetition_penalty=1.3,
                frequency_penalty=0.5,
            )
        if step % 7 == 6:
            name = next(iter(live))
            del live[name]
            state.release([name])
        members = [req for i, req in enumerate(live.values()) if (i + step) % 3]
        if not members:
            continue
        logits = torch.randn(len(members), V, generator=generator)
        kept = SAMPLE._edit(logits.clone(), state.batch(members))
        torch.testing.assert_close(kept, edited(logits, members))
        for req in members:
            req.output_token_ids += torch.randint(0, V, (1 + step % 2,), generator=generator).tolist()


def test_a_token_that_the_host_has_not_seen_counts_once():
    """Under overlap a token is counted when it is on the device, and not again when the host learns of it."""
    state = RequestRows(V, "cpu")
    req, other = request("a", frequency_penalty=1.0), request("b", presence_penalty=1.0, output=[3])
    truth = request("a", frequency_penalty=1.0)
    logits = LOGITS[:2]
    for step, token in enumerate([7, 7, 4, 7, 2]):
        pending = torch.tensor([truth.output_token_ids[-1] if step else -1, -1])
        batch = state.batch([req, other], num_outputs=[step, 1], pending_token_ids=pending)
        torch.testing.assert_close(SAMPLE._edit(logits.clone(), batch), edited(logits, [truth, other]))
        # The host is one token behind the device.
        req.output_token_ids[:] = truth.output_token_ids
        truth.output_token_ids.append(token)


def test_unseen_tokens_must_be_passed_on():
    req = request("a", frequency_penalty=1.0)
    with pytest.raises(EngineError, match="not passed on"):
        RequestRows(V, "cpu").batch([req], num_outputs=[1])
    with pytest.raises(EngineError, match="'a'"):
        RequestRows(V, "cpu").batch([req], num_outputs=[2], pending_token_ids=torch.tensor([3]))


def test_counts_start_over_when_the_output_shrinks():
    state = RequestRows(V, "cpu")
    req = request("a", output=[5, 6, 7], frequency_penalty=1.0)
    state.batch([req])
    req.output_token_ids[:] = [5]
    torch.testing.assert_close(SAMPLE._edit(LOGITS[:1].clone(), state.batch([req])), edited(LOGITS[:1], [req]))
