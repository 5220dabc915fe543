"""Log-probabilities: after penalties and bias, before temperature; only for rows that asked."""

import pytest
import torch

from kvarena.engine.request import Request, SamplingParams
from kvarena.engine.runner.request_rows import RequestRows
from kvarena.engine.sampling.sampler import Sampler

V = 40
LOGITS = torch.randn(3, V, generator=torch.Generator().manual_seed(5))


def run(logits, *params, **kwargs):
    requests = [Request(str(i), [1, 2], p, eos_token_ids=frozenset([9])) for i, p in enumerate(params)]
    return Sampler()(logits, RequestRows(V, "cpu").batch(requests, **kwargs)).start_copy().result()


def test_none_are_returned_unless_asked_for():
    assert run(LOGITS[:1], SamplingParams())[1] is None


def test_they_are_the_log_softmax_before_temperature():
    tokens, logprobs = run(
        LOGITS, SamplingParams(logprobs=3), SamplingParams(), SamplingParams(temperature=3.0, top_k=30, logprobs=5)
    )
    assert logprobs[1] is None
    for row, num_top in ((0, 3), (2, 5)):
        wanted = LOGITS[row].log_softmax(-1)
        found = logprobs[row]
        assert found.token_id == tokens[row]
        assert found.logprob == pytest.approx(float(wanted[tokens[row]]), abs=1e-5)
        assert found.rank == int((wanted > wanted[tokens[row]]).sum()) + 1
        assert [token for token, _ in found.top] == wanted.topk(num_top).indices.tolist()
        assert [value for _, value in found.top] == pytest.approx(wanted.topk(num_top).values.tolist(), abs=1e-5)
    assert logprobs[0].rank == 1


def test_rows_may_name_the_tokens_instead():
    """In their order, whatever their rank, and the sampled one behind them; rows beside them are as they were."""
    both = SamplingParams(logprobs=7, logprob_token_ids=(31, 3), min_tokens=1)
    tokens, logprobs = run(LOGITS, SamplingParams(logprobs=2), both, SamplingParams(logprobs=0, logprob_token_ids=(9,)))
    _, alone = run(LOGITS[:1], SamplingParams(logprobs=2))
    assert logprobs[0] == alone[0]
    for row, named in ((1, (31, 3)), (2, (9,))):
        wanted = LOGITS[row].clone()
        if row == 1:
            wanted[9] = -torch.inf  # min_tokens bars the end
        wanted = wanted.log_softmax(-1)
        shown = [token for token, _ in logprobs[row].top]
        assert shown == [*named, *([] if tokens[row] in named else [tokens[row]])]
        assert [value for _, value in logprobs[row].top] == pytest.approx([float(wanted[t]) for t in shown], abs=1e-5)
    barred = SamplingParams(logprobs=0, logprob_token_ids=(9,), min_tokens=1)
    assert run(LOGITS[:1], barred)[1][0].top[0] == (9, -torch.inf)  # it was asked for


def test_zero_asks_for_the_sampled_token_alone():
    _, logprobs = run(LOGITS[:2], SamplingParams(logprobs=0), SamplingParams(logprobs=2))
    assert logprobs[0].top == () and len(logprobs[1].top) == 2


def test_bias_and_penalties_are_in_them():
    _, (found,) = run(LOGITS[:1], SamplingParams(logprobs=1, logit_bias={4: 3.0}, repetition_penalty=2.0))
    wanted = LOGITS[0].clone()
    wanted[4] += 3.0
    for token in (1, 2):
        wanted[token] = wanted[token] / 2 if wanted[token] > 0 else wanted[token] * 2
    best = wanted.log_softmax(-1).max(0)
    assert found.top[0][0] == int(best.indices)
    assert found.top[0][1] == pytest.approx(float(best.values), abs=1e-5)


def test_barred_tokens_are_no_alternatives():
    _, (found,) = run(LOGITS[:1], SamplingParams(logprobs=V, min_tokens=1))
    assert len(found.top) == V - 1
    assert 9 not in dict(found.top)


def test_bfloat16_logits_give_float32_log_probabilities():
    _, (found,) = run(LOGITS[:1].bfloat16(), SamplingParams(logprobs=V))
    assert sum(torch.tensor([value for _, value in found.top]).exp()) == pytest.approx(1.0, abs=1e-5)
