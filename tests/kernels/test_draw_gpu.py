"""The draw on a GPU: kept sets against the sorted definition in float64, tokens against the sampler, frequencies."""

import functools

import numpy as np
import pytest
import torch
from draw_cases import make_logits, packed, settings
from scipy import stats

from kvarena.engine.kernels.drawing import CHOOSE, DONE, HARD, PIVOT, REJECTED, DrawScratch
from kvarena.engine.kernels.filtered import check_drawn, draw_chosen
from kvarena.engine.kernels.penalties import penalize_rows
from kvarena.engine.kernels.sample import draw_tokens
from kvarena.engine.kernels.threshold import settle
from kvarena.engine.request import Request, SamplingParams
from kvarena.engine.runner.draw import Draw
from kvarena.engine.runner.request_rows import RequestRows
from kvarena.engine.sampling.sampler import Sampler
from kvarena.engine.sampling.streams import log_exponentials
from kvarena.engine.sampling.transfer import to_device

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
SHAPES = [(1, 151_936), (32, 151_936), (256, 151_936), (512, 128_256), (512, 32_000), (7, 50_257)]
DTYPES = [torch.bfloat16, torch.float32]
ROWS_AT_ONCE = 64


class Sorted:
    """The definition, of all rows of [N, V] logits on the device: sorted, in float64.

    Attributes:
        order: int64 [N, V].
        counts: int64 [N], tokens kept.
        is_close: bool [N], one more or less would be within 1e-6 of top_p.
    """

    def __init__(self, logits, params):
        device, width = logits.device, logits.shape[1]
        columns = {
            name: torch.tensor([float(getattr(one, name)) for one in params], device=device)[:, None]
            for name in ("temperature", "top_k", "top_p", "min_p")
        }
        self.order, counts, close = [], [], []
        for at in range(0, len(logits), ROWS_AT_ONCE):
            some = slice(at, at + ROWS_AT_ONCE)
            temperature, top_k, top_p, min_p = (column[some].double() for column in columns.values())
            values, order = logits[some].double().sort(dim=-1, descending=True, stable=True)
            scaled = (values - values[:, :1]) / temperature.clamp_min(1e-6)
            place = torch.arange(width, device=device)
            inside = (place < top_k) | (top_k == 0)
            mass = scaled.exp() * inside
            reached = mass.cumsum(-1) / mass.sum(-1, keepdim=True) - top_p
            before = torch.cat([reached.new_full((len(values), 1), -1.0), reached[:, :-1]], dim=1)
            kept = inside & ((before < 0) | (top_p == 1)) & ((scaled >= min_p.float().log()) | (min_p == 0))
            count = torch.where(temperature[:, 0] == 0, 1, kept.sum(-1))
            near = (reached.abs() < 1e-6) & (abs(place - count[:, None]) < 3) & (top_p < 1)
            self.order.append(order)
            counts.append(count)
            close.append(near.any(-1) & (temperature[:, 0] > 0))
        self.order = torch.cat(self.order)
        self.counts, self.is_close = torch.cat(counts), torch.cat(close)

    def kept(self):
        """Bool [N, V] by token."""
        place = torch.arange(self.order.shape[1], device=self.order.device)
        return torch.empty_like(self.order, dtype=torch.bool).scatter_(
            1, self.order, place < self.counts[:, None]
        )  # fmt: skip


def make(num_rows, vocab_size, dtype, seed=0):
    logits, params = make_logits(num_rows, vocab_size, dtype, seed, "cuda"), settings(num_rows)
    scratch = DrawScratch(num_rows, "cuda")
    last = torch.zeros(num_rows + 1, dtype=torch.int64, device="cuda")
    out = torch.full((num_rows,), -9, device="cuda")
    return logits, params, (logits, packed(params, vocab_size, "cuda"), last, out, scratch)


def raced(logits, params, kept):
    """The best and the second best score of each row among the kept tokens, in float64, and the best one's token."""
    keys = packed(params, logits.shape[1], "cuda")[2:4].T.contiguous()
    temperature = torch.tensor([one.temperature for one in params], device="cuda")[:, None]
    best = []
    for at in range(0, len(logits), ROWS_AT_ONCE):
        some = slice(at, at + ROWS_AT_ONCE)
        scaled = logits[some].double() / temperature[some].clamp_min(1e-6)
        scores = scaled - log_exponentials(keys[some], logits.shape[1]).double() * (temperature[some] > 0)
        best.append(scores.masked_fill(~kept[some], -torch.inf).topk(2, dim=-1))
    values, tokens = torch.cat([one.values for one in best]), torch.cat([one.indices for one in best])
    return tokens[:, 0], values[:, 0] - values[:, 1]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("num_rows", "vocab_size"), SHAPES)
def test_tokens_are_those_of_the_race_among_the_kept(num_rows, vocab_size, dtype):
    logits, params, call = make(num_rows, vocab_size, dtype)
    definition = Sorted(logits, params)
    draw = Draw(num_rows, torch.device("cuda"))
    found = draw(*call[:3])
    wanted, lead = raced(logits, params, definition.kept())
    # The hardware's logarithms are good to 2^-21: closer races may end either way.
    sharp = (lead > 1e-5) & ~definition.is_close
    assert sharp.sum() >= 0.9 * num_rows - 2
    greedy = torch.tensor([one.temperature == 0 for one in params], device="cuda")
    assert torch.equal(found[greedy], definition.order[greedy, 0])
    assert torch.equal(found[sharp], wanted[sharp])
    assert torch.equal(call[2][:num_rows], found)
    again = draw(*call[:3])
    assert torch.equal(again, found)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("num_rows", "vocab_size"), SHAPES)
def test_kept_sets_are_the_definition_s(num_rows, vocab_size, dtype):
    """The last kept token passes the check and the next one does not; cuts are at the last kept token."""
    logits, params, call = make(num_rows, vocab_size, dtype, seed=1)
    scratch = call[4]
    definition = Sorted(logits, params)
    print(f"within 1e-6 of top_p: {int(definition.is_close.sum())} of {num_rows} rows")
    assert definition.is_close.sum() <= 0.1 * num_rows + 1
    draw_tokens(*call, 600)
    torch.cuda.synchronize()
    began = scratch.states.clone()
    checked = torch.tensor([not one.top_k and (one.top_p < 1 or one.min_p > 0) and one.temperature > 0
                            for one in params], device="cuda") & ~definition.is_close  # fmt: skip
    for place, wanted in ((-1, DONE), (0, REJECTED)):
        at = (definition.counts + place).clamp(0, vocab_size - 1)
        pivots = definition.order.gather(1, at[:, None])
        scratch.pivots.copy_(pivots[:, 0])
        scratch.states.fill_(PIVOT)
        check_drawn(*call, 1200)
        judged = checked & logits.gather(1, pivots)[:, 0].isfinite() & (definition.counts + place < vocab_size)
        assert (scratch.states[judged] == wanted).all(), f"{wanted}: {scratch.states[judged].tolist()}"
    last = definition.order.gather(1, definition.counts[:, None] - 1)
    bits = torch.where(logits == 0, 0, logits.float()).view(torch.int32)
    keys = (bits ^ ((bits >> 31) & 0x7FFFFFFF)) >> (16 if dtype == torch.bfloat16 else 0)
    cut = torch.tensor([one.min_p == 0 and (one.top_k > 0 or one.top_p < 1) and one.temperature > 0
                        for one in params], device="cuda") & ~definition.is_close  # fmt: skip
    cut &= logits.gather(1, last)[:, 0].isfinite()
    short = cut & (began == CHOOSE)
    for rows, search in ((short, False), (cut, True)):
        scratch.cuts.fill_(-1)
        scratch.states.copy_(torch.full_like(began, HARD) if search else began)
        if not search:
            check_drawn(*call, 1200)
            draw_chosen(*call)
        settle(*call)
        key, token = scratch.cuts.unbind(1)
        assert torch.equal(key[rows], keys.gather(1, last)[:, 0][rows].long())
        equal = (keys == key[:, None]) & (torch.arange(vocab_size, device="cuda") <= token[:, None])
        behind = torch.where(equal, torch.arange(vocab_size, device="cuda"), -1).amax(-1)
        assert torch.equal(behind[rows], last[:, 0][rows])


def test_graphs_replay_any_settings():
    """One graph, whose rows change what they ask for between replays."""
    _, params, call = make(32, 151_936, torch.bfloat16)
    draw = Draw(32, torch.device("cuda"))
    both = functools.partial(_both, draw, *call[:3])
    both()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        both()
    for turn in range(3):
        turned = params[turn:] + params[:turn]
        call[1].copy_(packed(turned, 151_936, "cuda"))
        graph.replay()
        replayed = draw.tokens.clone()
        assert torch.equal(replayed, draw(*call[:3]))
        assert not draw._scratch.states.any() and not draw._scratch.arrived.any()


def _both(draw, *call):
    draw.begin(*call)
    draw.end(*call)


@pytest.mark.parametrize("kind", [{}, {"top_p": 0.8}, {"top_k": 6, "top_p": 0.9}, {"min_p": 0.2}, {"top_k": 1100}])
def test_draws_follow_the_filtered_distribution(kind):
    count, width = 4096, 2000
    generator = torch.Generator("cuda").manual_seed(5)
    logits = 2 * torch.randn(width, generator=generator, device="cuda")
    logits[:12] = torch.linspace(9, 6, 12, device="cuda")
    draw = Draw(512, torch.device("cuda"))
    found = []
    for at in range(0, count, 512):
        params = [SamplingParams(temperature=1.2, seed=at + i, **kind) for i in range(512)]
        last = torch.zeros(513, dtype=torch.int64, device="cuda")
        found.append(draw(logits.expand(512, -1).contiguous(), packed(params, width, "cuda"), last))
    kept = Sorted(logits[None], params[:1]).kept()[0]
    wanted = (logits.double() / 1.2).masked_fill(~kept, -torch.inf).softmax(0) * count
    counts = torch.bincount(torch.cat(found), minlength=width).double()
    assert (counts[~kept] == 0).all()
    common = wanted >= 5
    observed = torch.cat([counts[common], counts[~common].sum()[None]])
    expected = torch.cat([wanted[common], wanted[~common].sum()[None]])
    if expected[-1] < 5:
        observed, expected = observed[:-1], expected[:-1] * (observed[:-1].sum() / expected[:-1].sum())
    assert stats.chisquare(observed.cpu().numpy(), expected.cpu().numpy()).pvalue > 0.001


@pytest.mark.parametrize("kind", [{"top_p": 0.9}, {"top_k": 20, "top_p": 0.95}])
def test_bad_rows_have_no_token(kind):
    logits = torch.randn(4, 151_936, device="cuda")
    logits[0, 150_000] = torch.nan
    logits[1, 3] = torch.inf
    logits[2] = -torch.inf
    params = [SamplingParams(temperature=1.0, seed=i, **kind) for i in range(4)]
    last = torch.full((4,), 5, device="cuda")
    found = Draw(4, torch.device("cuda"))(logits, packed(params, 151_936, "cuda"), last).tolist()
    assert found[:3] == [-1, -1, -1] and found[3] >= 0
    assert last.tolist() == [0, 0, 0, found[3]]


def test_edits_and_log_probabilities_do_not_wait_for_the_device():
    """Every step of a request with penalties, bias, bars or log-probabilities, its first one among them."""
    width = 32_000
    kinds = (
        {"repetition_penalty": 1.2, "logprobs": 5, "top_p": 0.9}, {"logit_bias": {7: 3.0, 9: -100.0}, "logprobs": 0},
        {"presence_penalty": 0.5, "frequency_penalty": 0.1}, {"min_tokens": 4, "temperature": 0.0},
    )  # fmt: skip
    requests = [
        Request(str(i), [1, 2, 3], SamplingParams(**({"temperature": 0.7, "seed": i} | kind)),
                eos_token_ids=frozenset([2]))
        for i, kind in enumerate(kinds)
    ]  # fmt: skip
    logits = torch.randn(4, width, device="cuda")
    rows, other = RequestRows(width, "cuda"), RequestRows(width, "cpu")
    draw, last = Draw(4, torch.device("cuda")), torch.zeros(64, dtype=torch.int64, device="cuda")
    sampler = Sampler(penalize=penalize_rows)

    def step(count):
        at = rows.of(requests)
        params = to_device(rows.draw_params(at, np.full(4, 3 + count)), torch.device("cuda"))
        pending = last[to_device(at, torch.device("cuda"))] if count else None
        batch = rows.batch(requests, at, num_outputs=[count] * 4, pending_token_ids=pending, draws=False)
        return sampler(logits, batch, lambda edited: draw(edited, params, last)).start_copy()

    step(0).result()
    rows.release([req.request_id for req in requests])
    torch.cuda.set_sync_debug_mode("error")
    try:
        steps = [step(0), step(1)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    tokens, logprobs = steps[0].result()
    wanted, expected = Sampler()(logits.cpu(), other.batch(requests)).start_copy().result()
    assert tokens == wanted
    assert [one.top for one in logprobs[1:2]] == [one.top for one in expected[1:2]]
    assert logprobs[0].rank == expected[0].rank and logprobs[2] is None
    for req, token in zip(requests, tokens, strict=True):
        req.output_token_ids.append(token)
    assert steps[1].result()[0] == Sampler()(logits.cpu(), other.batch(requests)).tolist()
