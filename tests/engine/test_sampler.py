"""The sampler: every parameter acts, and a request's tokens depend on nothing but its own logits and stream."""

import numpy as np
import pytest
import torch

from kvarena.engine.errors import EngineError, RequestError
from kvarena.engine.request import Request, SamplingParams
from kvarena.engine.runner.request_rows import RequestRows
from kvarena.engine.sampling.sampler import Sampler
from kvarena.engine.sampling.state import check_sampling

V = 64
SAMPLE = Sampler()


def request(name="r", *, prompt=(1, 2, 3), output=(), eos=(), **sampling):
    req = Request(name, list(prompt), SamplingParams(**sampling), eos_token_ids=frozenset(eos))
    req.output_token_ids += output
    return req


def sample(logits, requests, engine_seed=0, **kwargs):
    state = RequestRows(logits.shape[1], "cpu", engine_seed)
    return SAMPLE(logits, state.batch(requests, **kwargs)).tolist()


def random_logits(rows, vocab=V, seed=0, scale=2.0):
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * scale


def draws(logits, num_draws, **sampling):
    """`num_draws` tokens of one request at successive output positions, on the same logits [V]."""
    requests = [request(f"r{i}", seed=7, max_tokens=num_draws, **sampling) for i in range(num_draws)]
    rows = logits.expand(num_draws, -1)
    return sample(rows, requests, num_outputs=range(num_draws))


# Greedy


def test_greedy_takes_the_largest_logit_and_among_equals_the_lowest_id():
    logits = torch.zeros(3, V)
    logits[1, [40, 9, 63]] = 5.0
    logits[2, V - 1] = 1e-3
    assert sample(logits, [request(str(i)) for i in range(3)]) == [0, 9, V - 1]


def test_greedy_rows_are_not_disturbed_by_random_ones():
    logits = random_logits(6)
    mixed = [request(str(i), temperature=float(i % 2) * 3, seed=i) for i in range(6)]
    tokens = sample(logits, mixed)
    assert tokens[::2] == logits.argmax(-1)[::2].tolist()
    assert tokens[1::2] != logits.argmax(-1)[1::2].tolist()


def test_a_greedy_batch_builds_no_tensors():
    batch = RequestRows(V, "cpu").batch([request("a"), request("b", top_k=3, top_p=0.5)])
    tensors = (batch.keys, batch.temperature, batch.top_k, batch.penalties, batch.bias, batch.barred)
    assert all(tensor is None for tensor in tensors) and not batch.edits_logits and not batch.num_top


def test_logits_are_not_modified():
    logits = random_logits(2)
    before = logits.clone()
    sample(logits, [request("a", temperature=1, logit_bias={3: 5.0}, repetition_penalty=2.0), request("b", top_k=2)])
    assert torch.equal(logits, before)


# Streams


def test_a_seeded_request_gives_the_same_tokens_in_any_batch_at_any_row():
    logits = random_logits(8)
    settings = [
        {},
        {"top_k": 5},
        {"top_p": 0.7},
        {"min_p": 0.1},
        {"top_k": 9, "top_p": 0.9, "repetition_penalty": 1.3},
        {"temperature": 0.0},
        {"logit_bias": {4: 2.0}},
        {"presence_penalty": 1.0},
    ]
    requests = [
        request(str(i), **({"temperature": 1.5, "seed": i} | extra), output=[i, 4]) for i, extra in enumerate(settings)
    ]
    alone = [sample(logits[i : i + 1], [requests[i]])[0] for i in range(8)]
    generator = np.random.default_rng(0)
    for _ in range(5):
        order = generator.permutation(8)[: generator.integers(2, 9)].tolist()
        assert sample(logits[order], [requests[i] for i in order]) == [alone[i] for i in order]


def test_the_stream_follows_seed_and_position_and_not_the_request_id():
    logits = torch.zeros(1, 4096)
    tokens = {
        (name, seed, position): sample(logits, [request(name, temperature=1.0, seed=seed)], num_outputs=[position])[0]
        for name in "ab"
        for seed in (0, 1, -1, 2**70)
        for position in (0, 1, 500)
    }
    assert all(tokens["a", seed, position] == tokens["b", seed, position] for _, seed, position in tokens)
    assert len(set(tokens.values())) == 12


def test_the_position_is_the_number_of_output_tokens_unless_given():
    logits = torch.zeros(1, 4096)
    grown = request(temperature=1.0, seed=3, output=[5, 6])
    assert sample(logits, [grown]) == sample(logits, [request(temperature=1.0, seed=3)], num_outputs=[2])
    assert sample(logits, [grown]) != sample(logits, [request(temperature=1.0, seed=3)])


def test_without_a_seed_the_stream_follows_engine_seed_and_request_id():
    logits = torch.zeros(1, 4096)

    def token(name, engine_seed):
        return sample(logits, [request(name, temperature=1.0)], engine_seed=engine_seed)[0]

    assert token("a", 0) == token("a", 0)
    assert len({token("a", 0), token("b", 0), token("a", 1), token("b", 1)}) == 4


# Numbers


def test_bfloat16_logits_are_computed_on_in_float32():
    logits = random_logits(16).bfloat16()
    requests = [request(str(i), temperature=0.7, top_p=0.9, seed=i, logit_bias={1: 0.3}) for i in range(16)]
    assert sample(logits, requests) == sample(logits.float(), requests)
    penalised = [request(str(i), frequency_penalty=0.001, output=[int(logits[i].argmax())]) for i in range(16)]
    tied = torch.full((16, V), 0.0).bfloat16()
    tied.scatter_(1, logits.argmax(-1, keepdim=True), 0.0)
    # In bfloat16 0.001 would vanish against larger logits: here it must break the tie.
    shifted = sample(tied + 8, penalised)
    assert all(token != req.output_token_ids[0] for token, req in zip(shifted, penalised, strict=True))


@pytest.mark.parametrize("temperature", [1e-30, 1e-8, 1e30])
def test_extreme_temperatures_stay_finite(temperature):
    logits = random_logits(4, scale=1e4)
    tokens = sample(logits, [request(str(i), temperature=temperature) for i in range(4)])
    if temperature < 1:
        assert tokens == logits.argmax(-1).tolist()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_unusable_logits_name_the_request(value, temperature):
    logits = random_logits(3)
    logits[1, 5] = value
    requests = [request(name, temperature=temperature) for name in ("first", "second", "third")]
    sampled = SAMPLE(logits, RequestRows(V, "cpu").batch(requests))
    assert ((sampled.token_ids >= 0) & (sampled.token_ids < V)).all()
    with pytest.raises(EngineError, match=r"'second'") as error:
        sampled.tolist()
    assert "first" not in str(error.value) and "third" not in str(error.value)


# Parameters


def test_logit_bias_moves_a_token():
    logits = random_logits(2)
    bias = {17: 100.0, 3: -100.0}
    assert sample(logits, [request("a", logit_bias=bias), request("b")]) == [17, int(logits[1].argmax())]
    banned = int(logits[0].argmax())
    assert sample(logits[:1], [request(logit_bias={banned: -100.0})]) != [banned]


def test_min_tokens_bars_stop_tokens_until_enough_exist():
    logits = torch.zeros(1, V)
    logits[0, 9], logits[0, 11], logits[0, 30] = 5.0, 4.0, 3.0
    common = {"eos": [9], "stop_token_ids": (11,), "min_tokens": 2, "max_tokens": 8}
    assert sample(logits, [request(**common)]) == [30]
    assert sample(logits, [request(output=[1], **common)]) == [30]
    assert sample(logits, [request(output=[1, 1], **common)]) == [9]
    # Under overlap the host may not have seen the second token yet.
    assert sample(logits, [request(output=[1], **common)], num_outputs=[2]) == [9]
    assert sample(logits, [request(**common, ignore_eos=True)]) == [9]


def test_allowed_tokens_bars_the_rest():
    logits = random_logits(2)
    allowed = torch.zeros(2, V, dtype=torch.bool)
    allowed[0, [4, 8]] = True
    allowed[1, 6] = True
    tokens = sample(logits, [request("a"), request("b", temperature=5.0)], allowed_tokens=allowed)
    assert tokens == [4 if logits[0, 4] > logits[0, 8] else 8, 6]
    allowed[1] = False
    with pytest.raises(EngineError, match="'b'"):
        sample(logits, [request("a"), request("b", temperature=5.0)], allowed_tokens=allowed)


@pytest.mark.parametrize(
    ("params", "name"),
    [
        ({"logit_bias": {V: 1.0}}, "logit_bias"),
        ({"logit_bias": {-1: 1.0}}, "logit_bias"),
        ({"stop_token_ids": (V + 3,)}, "stop_token_ids"),
        ({"logprobs": V + 1}, "logprobs"),
    ],
)
def test_ids_outside_the_vocabulary_are_refused(params, name):
    with pytest.raises(RequestError, match=name) as error:
        check_sampling(SamplingParams(**params), V)
    assert error.value.param == name
    with pytest.raises(RequestError):
        sample(torch.zeros(1, V), [request(**params)])


# State between steps


def test_batches_follow_the_requests_as_they_come_and_go():
    state = RequestRows(V, "cpu")
    a, b, c = (request(name, temperature=1.0, seed=i, top_k=4 + i) for i, name in enumerate("abc"))
    logits = random_logits(3)
    for members in ([a, b], [a, b], [b, a], [c], [a, c, b], [b]):
        rows = logits[: len(members)]
        assert SAMPLE(rows, state.batch(members)).tolist() == sample(rows, members)
        for req in members:
            req.output_token_ids.append(1)


def test_a_released_request_leaves_nothing_behind():
    state = RequestRows(V, "cpu")
    logits = torch.zeros(1, V)
    state.batch([request("same", frequency_penalty=2.0, output=[0, 0])])
    state.release(["same", "never seen"])
    again = request("same", frequency_penalty=2.0, output=[5])
    assert SAMPLE(logits, state.batch([again])).tolist() == [0]
    assert state._rows.keys() == {"same"}
