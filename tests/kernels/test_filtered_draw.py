"""Top-k, top-p and min-p in Triton's interpreter, against the sorted definition in float64 and the sampler."""

import pytest
import torch
from draw_cases import kept_of, make_logits, packed, sampled, settings
from scipy import stats

from kvarena.engine.kernels import filtered
from kvarena.engine.kernels.drawing import CHOOSE, DONE, HARD, PIVOT, REJECTED, DrawScratch, ordered
from kvarena.engine.kernels.filtered import check_drawn, draw_chosen, draw_filtered
from kvarena.engine.kernels.penalties import penalize_rows
from kvarena.engine.kernels.sample import draw_tokens
from kvarena.engine.kernels.threshold import settle
from kvarena.engine.request import SamplingParams
from kvarena.engine.sampling import transforms
from kvarena.engine.sampling.batch import Penalties, Rows
from kvarena.engine.sampling.params import SKIPPED, TOP_K


class Drawing:
    """Some rows and all that their draw needs."""

    def __init__(self, logits, params, num_programs=8):
        self.logits, self.settings, self.num_programs = logits, params, num_programs
        self.params = packed(params, logits.shape[1])
        self.last, self.out = torch.full((len(logits) + 1,), -7), torch.full((len(logits),), -9)
        self.scratch = DrawScratch(len(logits), "cpu")
        self.all = (logits, self.params, self.last, self.out, self.scratch)

    def begin(self):
        draw_tokens(*self.all, self.num_programs)
        return self.scratch.states.tolist()

    def run(self):
        self.begin()
        draw_filtered(*self.all, self.num_programs)
        assert not self.scratch.states.any() and not self.scratch.arrived.any()
        assert (self.scratch.groups == -(1 << 31)).all()
        return self.out.tolist()


def sharp_rows(logits, params):
    """Rows whose kept tokens no rounding decides."""
    return [not (one.temperature and kept_of(row, one).is_close) for row, one in zip(logits, params, strict=True)]


@pytest.mark.parametrize(("num_rows", "vocab_size", "dtype", "num_programs"), [
    (14, 3000, torch.bfloat16, 8),
    (14, 3000, torch.float32, 100),
    pytest.param(5, 32_000, torch.bfloat16, 20, marks=pytest.mark.slow),
    pytest.param(5, 151_936, torch.bfloat16, 600, marks=pytest.mark.slow),
    pytest.param(42, 32_000, torch.float32, 100, marks=pytest.mark.slow),
])  # fmt: skip
def test_tokens_are_the_sampler_s(num_rows, vocab_size, dtype, num_programs):
    logits, params = make_logits(num_rows, vocab_size, dtype), settings(num_rows)
    found = Drawing(logits, params, num_programs).run()
    sharp = sharp_rows(logits, params)
    assert sum(sharp) >= num_rows - 1
    wanted = sampled(logits, params)
    assert [one for one, is_sharp in zip(found, sharp, strict=True) if is_sharp] == [
        one for one, is_sharp in zip(wanted, sharp, strict=True) if is_sharp
    ]


def test_every_way_leads_to_the_same_token():
    """The search alone, and each number of checks before it."""
    logits, params = make_logits(14, 3000, torch.bfloat16, seed=3), settings(14)
    wanted = Drawing(logits, params).run()
    searched = Drawing(logits, params)
    states = searched.begin()
    assert {DONE, PIVOT, CHOOSE, HARD} == set(states)
    searched.scratch.states[searched.scratch.states != DONE] = HARD
    settle(*searched.all)
    assert searched.out.tolist() == wanted
    checked = Drawing(logits, params)
    checked.begin()
    check_drawn(*checked.all, 8)
    assert REJECTED in checked.scratch.states
    draw_chosen(*checked.all)
    settle(*checked.all)
    assert checked.out.tolist() == wanted


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float32, marks=pytest.mark.slow)])
def test_the_last_kept_token_is_kept_and_the_next_one_is_not(dtype):
    params = [one for one in settings(28) if one.temperature and not one.top_k and (one.top_p < 1 or one.min_p)]
    logits = make_logits(len(params), 3000, dtype, seed=7)
    kept = [kept_of(row, one) for row, one in zip(logits, params, strict=True)]
    for place, wanted in ((-1, DONE), (0, REJECTED)):
        drawing = Drawing(logits, params)
        drawing.begin()
        pivots = [int(one.order[min(one.count + place, 2999)]) for one in kept]
        drawing.scratch.pivots[:] = torch.tensor(pivots)
        drawing.scratch.states[:] = PIVOT
        check_drawn(*drawing.all, 20)
        finite = logits.gather(1, drawing.scratch.pivots.long()[:, None])[:, 0].isfinite().tolist()
        checked = [i for i, one in enumerate(kept) if not one.is_close and finite[i] and one.count + place < 3000]
        assert len(checked) >= len(params) - 3
        assert [drawing.scratch.states[i] for i in checked] == [wanted] * len(checked)


@pytest.mark.parametrize(("dtype", "ways"), [
    (torch.bfloat16, "short"),
    (torch.float32, "short"),
    (torch.bfloat16, "search"),
    pytest.param(torch.float32, "search", marks=pytest.mark.slow),
])  # fmt: skip
def test_the_cut_is_the_definition_s(dtype, ways):
    params = [one for one in settings(28) if one.top_k and not one.min_p]
    if ways == "short":
        params = [one for one in params if one.top_k <= 1024]
    logits = make_logits(len(params), 3000, dtype, seed=11)
    drawing = Drawing(logits, params)
    drawing.begin()
    if ways == "search":
        drawing.scratch.states[:] = HARD
    else:
        check_drawn(*drawing.all, 8)
        draw_chosen(*drawing.all)
    settle(*drawing.all)
    shift = 16 if dtype == torch.bfloat16 else 0
    bits = torch.where(logits == 0, 0, logits.float()).view(torch.int32)
    keys = (bits ^ ((bits >> 31) & 0x7FFFFFFF)) >> shift
    for row, one in enumerate(params):
        kept = kept_of(logits[row], one)
        last = int(kept.order[kept.count - 1])
        if kept.is_close or not logits[row, last].isfinite():
            continue
        key, token = drawing.scratch.cuts[row].tolist()
        assert key == keys[row, last], (one, row)
        behind = (keys[row] == key).nonzero()[:, 0]
        assert behind[behind <= token].max() == last, (one, row)


def test_more_equal_logits_than_can_be_collected_are_searched():
    logits = torch.zeros(3, 5000)
    logits[1, 4000] = 1.0
    params = [SamplingParams(temperature=1.0, seed=i, top_k=k) for i, k in enumerate((7, 3, 900))]
    drawing = Drawing(logits, params)
    assert drawing.begin() == [CHOOSE] * 3
    check_drawn(*drawing.all, 8)
    draw_chosen(*drawing.all)
    assert drawing.scratch.states.tolist() == [HARD] * 3
    settle(*drawing.all)
    assert drawing.out.tolist() == sampled(logits, params)
    assert drawing.scratch.cuts[:, 1].tolist() == [6, 1, 899]


def test_bad_rows_have_no_token_and_skipped_ones_are_left_alone():
    logits = torch.randn(8, 2500)
    logits[0, 2400] = torch.nan
    logits[1, 3] = torch.inf
    logits[2] = -torch.inf
    logits[3] = torch.nan
    logits[4, 1:] = -torch.inf
    logits[5, 5:] = -torch.inf
    kinds = [{"top_k": 5}, {"top_p": 0.5}, {"top_k": 3}, {"min_p": 0.1}, {"top_k": 9, "top_p": 0.9}, {"top_k": 9}, {}]
    params = [SamplingParams(temperature=1.0, seed=i, **kind) for i, kind in enumerate([*kinds, {"top_p": 0.9}])]
    drawing = Drawing(logits, params)
    drawing.params[TOP_K, 7] = SKIPPED
    found = drawing.run()
    assert found[:5] == [-1, -1, -1, -1, 0] and found[5] in range(5) and found[7] == -9
    assert drawing.last.tolist() == [0, 0, 0, 0, 0, found[5], found[6], -7, -7]
    assert found[4:7] == sampled(logits[4:7], params[4:7])


@pytest.mark.parametrize("temperature", [1e-5, 1e30])
def test_extreme_temperatures_stay_finite(temperature):
    logits = 1e3 * torch.randn(4, 2000, generator=torch.Generator().manual_seed(4))
    kinds = ({"top_p": 0.9}, {"top_k": 30}, {"min_p": 0.5}, {"top_k": 1500, "top_p": 0.4})
    params = [SamplingParams(temperature=temperature, seed=i, **kind) for i, kind in enumerate(kinds)]
    found = Drawing(logits, params).run()
    if temperature < 1:
        assert found == logits.argmax(-1).tolist()
    else:
        assert all(token in kept_of(row, one).order[: kept_of(row, one).count + 1]
                   for token, row, one in zip(found, logits, params, strict=True))  # fmt: skip


def test_a_request_draws_the_same_in_any_batch():
    logits, params = make_logits(6, 3000, torch.bfloat16, seed=2), settings(6)
    together = Drawing(logits, params, 1).run()
    for i in range(6):
        for num_programs in (1, 3)[i % 2 :]:
            assert Drawing(logits[i : i + 1], params[i : i + 1], num_programs).run() == together[i : i + 1]


@pytest.mark.slow
def test_draws_follow_the_filtered_distribution():
    logits = torch.linspace(3, 0, 40)[torch.randperm(40, generator=torch.Generator().manual_seed(1))]
    count = 500
    for kind in ({"top_p": 0.8}, {"top_k": 6, "top_p": 0.9}):
        params = [SamplingParams(temperature=1.2, seed=i, **kind) for i in range(count)]
        found = torch.tensor(Drawing(logits.expand(count, -1).contiguous(), params).run())
        kept = kept_of(logits, params[0])
        tokens = kept.order[: kept.count]
        wanted = (logits[tokens].double() / 1.2).softmax(0) * count
        counts = torch.bincount(found, minlength=40)[tokens]
        assert counts.sum() == count
        assert stats.chisquare(counts.numpy(), wanted.numpy()).pvalue > 0.01


def test_the_order_of_keys_is_that_of_logits():
    values = torch.tensor([-torch.inf, -1e30, -2.5, -1e-40, -0.0, 0.0, 1e-40, 1e-3, 7.0, 1e30])
    keys = torch.zeros(10, dtype=torch.int32)
    filtered.triton.jit(_keys_kernel)[(1,)](values, keys)
    assert keys.tolist() == sorted(keys.tolist())
    assert keys[4] == keys[5] and len(set(keys.tolist())) == 9


def _keys_kernel(values_ptr, out_ptr):
    at = filtered.tl.arange(0, 16)
    inside = at < 10
    values = filtered.tl.load(values_ptr + at, mask=inside, other=0.0)
    filtered.tl.store(out_ptr + at, ordered(values, 0), mask=inside)


@pytest.mark.parametrize("index", [None, [4, 1, 2]])
def test_penalties_in_one_pass(index):
    generator = torch.Generator().manual_seed(6)
    logits = 3 * torch.randn(5 if index else 3, 2500, generator=generator)
    in_prompt = torch.rand(7, 2500, generator=generator) < 0.2
    counts = torch.randint(-3, 4, (7, 2500), generator=generator, dtype=torch.int32).clamp_min(0)
    factors = torch.tensor([[0.5, -1.0, 0.0], [0.2, 0.0, -0.3], [1.3, 1.0, 0.7]])
    rows = Rows(None if index is None else torch.tensor(index), index or [0, 1, 2])
    penalties = Penalties(rows, *factors, in_prompt, counts, torch.tensor([6, 0, 3]))
    wanted = transforms.penalize_rows(logits.clone(), penalties)
    assert (wanted != logits).any()
    torch.testing.assert_close(penalize_rows(logits.clone(), penalties), wanted, rtol=1e-6, atol=1e-6)
