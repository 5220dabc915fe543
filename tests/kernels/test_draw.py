"""The draw and the decode-input kernels, in Triton's interpreter, against the sampler and plain torch."""

import numpy as np
import pytest
import torch

from kvarena.engine.kernels import step
from kvarena.engine.kernels.all_reduce import PeerMemory, best_token
from kvarena.engine.kernels.drawing import DrawScratch
from kvarena.engine.kernels.sample import draw_parts, draw_scores, draw_tokens
from kvarena.engine.ranks.runners import best_of_parts
from kvarena.engine.sampling.streams import log_exponentials, stream_keys

VOCAB = 3000


def make_params(temperatures, seeds, positions, rows=None):
    keys = stream_keys(np.array(seeds, dtype=np.uint64), np.array(positions))
    rows = np.arange(len(temperatures)) if rows is None else np.array(rows)
    bits = np.array([temperatures, [1.0] * len(rows), [-np.inf] * len(rows)], dtype=np.float32).view(np.int32)
    params = np.stack([rows.astype(np.int32), bits[0], keys[:, 0], keys[:, 1], 0 * bits[0], bits[1], bits[2]])
    return torch.from_numpy(params), torch.from_numpy(keys)


@pytest.mark.parametrize("num_programs", [1, 8, 1000])
def test_draw_equals_the_race(num_programs):
    torch.manual_seed(0)
    logits = 3 * torch.randn(4, VOCAB)
    temperatures = [0.0, 0.6, 1.0, 1e-9]
    params, keys = make_params(temperatures, [1, 2, 3, 4], [0, 5, 6, 7], rows=[3, 0, 2, 5])
    last, out = torch.full((6,), -7), torch.full((4,), -7)
    scratch = DrawScratch(4, "cpu")
    draw_tokens(logits, params, last, out, scratch, num_programs)
    raced = (logits[1:3] / torch.tensor([[0.6], [1.0]]) - log_exponentials(keys[1:3], VOCAB)).argmax(-1)
    expected = torch.stack([logits[0].argmax(), *raced, logits[3].argmax()])
    assert out.tolist() == expected.tolist()
    assert last.tolist() == [int(raced[0]), -7, int(raced[1]), int(expected[0]), -7, int(expected[3])]
    assert scratch.arrived.sum() == 0


def test_equal_logits_give_the_lowest_token_and_bad_ones_none():
    logits = torch.zeros(4, VOCAB)
    logits[0, [2100, 700, 2900]] = 1.0
    logits[1, 2999] = torch.nan
    logits[2] = -torch.inf
    logits[3, 5] = torch.inf
    params, _ = make_params([0, 0.5, 0.5, 0], [1, 2, 3, 4], [0, 0, 0, 0])
    last, out = torch.full((4,), -7), torch.full((4,), -7)
    draw_tokens(logits, params, last, out, DrawScratch(4, "cpu"), 100)
    assert out.tolist() == [700, -1, -1, -1]
    assert last.tolist() == [700, 0, 0, 0]


def test_a_request_draws_the_same_in_any_batch():
    torch.manual_seed(1)
    logits = torch.randn(3, VOCAB)
    params, _ = make_params([0.9, 0.9, 0.9], [8, 9, 10], [3, 4, 5])
    outs = []
    for pick in ([0, 1, 2], [2, 0], [1]):
        out = torch.zeros(len(pick), dtype=torch.int64)
        draw_tokens(logits[pick], params[:, pick].contiguous(), torch.zeros(3, dtype=torch.int64), out,
                    DrawScratch(3, "cpu"), 7 * len(pick))  # fmt: skip
        outs.append(dict(zip(pick, out.tolist(), strict=True)))
    assert all(outs[0][i] == token for other in outs for i, token in other.items())


def test_expand_kernel_equals_torch():
    torch.manual_seed(2)
    tables = torch.randint(1, 50, (6, 40), dtype=torch.int32)
    sent = torch.tensor([[-1, 4, -1, 9], [100, 0, 639, 9], [3, 0, 5, 9], [9, 9, 9, 9]], dtype=torch.int32)
    last = torch.arange(6) * 10
    expected, got = (step.StepBuffers(4, 4, 40, torch.device("cpu")) for _ in range(2))
    step.expand_decode(sent, last, tables, expected, 3, 16)
    step.expand_kernel[(3,)](
        sent, last, tables, got.ids, got.positions, got.slots, got.seq_lens, got.block_table,
        sent.stride(0), tables.stride(0), got.block_table.stride(0), BLOCK_SIZE=16, CHUNK=8,
    )  # fmt: skip
    assert expected.ids.tolist() == [30, 4, 50, 0]
    for name in ("ids", "positions", "slots", "seq_lens"):
        assert torch.equal(getattr(got, name), getattr(expected, name)), name
    for i, blocks in enumerate((7, 1, 40)):
        assert torch.equal(got.block_table[i, :blocks], expected.block_table[i, :blocks])


def test_scatter_kernel_equals_torch():
    pairs = torch.stack([torch.randperm(600)[:300], torch.arange(300)]).int()
    expected, got = torch.zeros(2, 600, dtype=torch.int32)
    step.scatter_words(expected, pairs)
    step.scatter_kernel[(2,)](got, pairs, 300, pairs.stride(0), BLOCK=256)
    assert torch.equal(got, expected)


def test_expand_tokens_kernel_equals_torch():
    torch.manual_seed(3)
    tables = torch.randint(1, 50, (6, 40), dtype=torch.int32)
    last = torch.arange(6) * 10
    count = 200
    tokens = torch.randint(-1, 90, (count,), dtype=torch.int32)
    rows = torch.randint(0, 6, (count,), dtype=torch.int32)
    fields = torch.stack([tokens, torch.randint(0, 640, (count,), dtype=torch.int32), rows])
    expected, got = (step.StepBuffers(count + 1, 1, 1, torch.device("cpu")) for _ in range(2))
    step.expand_tokens(fields, last, tables, expected, count, 16)
    step.expand_tokens_kernel[(2,)](
        fields, last, tables, got.ids, got.positions, got.slots, count, fields.stride(0), tables.stride(0),
        BLOCK_SIZE=16, BLOCK=128,
    )  # fmt: skip
    assert (expected.ids[:count][tokens < 0] == rows[tokens < 0] * 10).all()
    for name in ("ids", "positions", "slots"):
        assert torch.equal(getattr(got, name), getattr(expected, name)), name


def test_the_scores_are_what_the_draw_takes_the_largest_of():
    torch.manual_seed(2)
    logits = 3 * torch.randn(4, VOCAB)
    temperatures = [0.0, 0.6, 1.0, 0.2]
    params, keys = make_params(temperatures, [1, 2, 3, 4], [0, 5, 6, 7])
    scores = draw_scores(logits, params)
    out = torch.zeros(4, dtype=torch.int64)
    draw_tokens(logits, params, torch.zeros(4, dtype=torch.int64), out, DrawScratch(4, "cpu"), 100)
    assert scores.argmax(-1).tolist() == out.tolist()
    assert torch.equal(scores[0], logits[0])
    raced = logits[1:] / torch.tensor([[0.6], [1.0], [0.2]]) - log_exponentials(keys[1:], VOCAB)
    torch.testing.assert_close(scores[1:], raced, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("num_programs", [1, 1000])
@pytest.mark.parametrize("num_ranks", [2, 3])
def test_parts_of_a_row_give_the_token_of_the_whole(num_ranks, num_programs):
    """Each rank draws among its columns; bad logits of one rank leave the row without a token on all."""
    torch.manual_seed(2)
    logits = 3 * torch.randn(5, VOCAB)
    logits[2, 2999] = torch.nan
    logits[3, [10, 2500]] = 50.0  # a tie between ranks: the lower token
    logits[4] = -torch.inf
    params, _ = make_params([0.7, 0, 0.7, 0, 0.7], [1, 2, 3, 4, 5], [0, 1, 2, 3, 4])
    last, out = torch.full((5,), -7), torch.zeros(5, dtype=torch.int64)
    draw_tokens(logits, params, last, out, DrawScratch(5, "cpu"), 100)
    width = VOCAB // num_ranks
    parts = [
        draw_parts(logits[:, first : first + width], params, first, DrawScratch(5, "cpu"), num_programs)
        for first in range(0, VOCAB, width)
    ]
    other = torch.full((5,), -7)
    pairs = torch.stack([torch.stack([scores.double(), tokens.double()]) for scores, tokens in parts])
    assert best_of_parts(pairs, params, other).tolist() == out.tolist() and out.tolist()[2:] == [-1, 10, -1]
    assert other.tolist() == last.tolist()
    pages = [torch.zeros(4 * (2 * 5 * 2 + 5 * len(parts)), dtype=torch.uint8) for _ in parts]
    buffers = torch.tensor([page.data_ptr() for page in pages])
    memories = [
        PeerMemory(buffers, buffers + 4 * 2 * 5 * 2, torch.zeros(5, dtype=torch.int32), rank, 5, 2, torch.float32)
        for rank in range(len(parts))
    ]
    for _ in range(3):  # calls that use both halves of the memory, and one of them again
        lasts = [torch.full((5,), -7) for _ in parts]
        for memory, part, there in zip(memories, parts, lasts, strict=True):
            best_token(*part, params, there, memory, parts=(True, False))
        found = [best_token(*part, params, there, memory, parts=(False, True))
                 for memory, part, there in zip(memories, parts, lasts, strict=True)]  # fmt: skip
        assert all(one.tolist() == out.tolist() for one in found)
        assert all(one.tolist() == last.tolist() for one in lasts)
