"""The reference backend against dense attention in fp64."""

import pytest
import torch
from attention_cases import dense_attention, make_case, make_contiguous, run_backend

from kvarena.engine.attention import decode_tiles, prefill_groups, reference
from kvarena.engine.attention.reference import ReferenceBackend

DECODE = [(99, 1), (0, 1), (16, 1), (15, 1), (300, 1), (63, 1), (64, 1)]
PREFILL = [(0, 5), (0, 70), (0, 2), (0, 33)]
CHUNKS = [(40, 9), (0, 70), (16, 16), (130, 2), (7, 64)]
MIXED = [(99, 1), (0, 40), (12, 30), (0, 1), (250, 1), (64, 3)]
BATCHES = {"decode": DECODE, "prefill": PREFILL, "chunks": CHUNKS, "mixed": MIXED}
OPTIONS = {
    "plain": {},
    "window": {"sliding_window": 24},
    "window of one": {"sliding_window": 1},
    "wide window": {"sliding_window": 4096},
    "softcap": {"softcap": 5.0},
    "softcap and window": {"softcap": 5.0, "sliding_window": 40},
    "sinks": {"sinks": torch.tensor([0.5, -1.0, 3.0, 0.0])},
    "sinks and window": {"sinks": torch.tensor([0.5, -1.0, 3.0, 0.0]), "sliding_window": 24},
}


def error(case, *, contiguous=False, **options):
    options = {"scale": 0.3} | options
    got = run_backend(ReferenceBackend(case.pool, contiguous=contiguous), case, **options)
    assert got.dtype == case.q.dtype
    assert got.shape == case.q.shape
    return (got.double() - dense_attention(case, **options)).abs().max().item()


@pytest.fixture(autouse=True, params=[0, 10**6], ids=["tiles", "groups"])
def few_tokens(request, monkeypatch):
    """Both ways in which decode rows are done."""
    monkeypatch.setattr(reference, "FEW_TOKENS", request.param)


@pytest.mark.parametrize("block_size", [1, 3, 16, 256])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES.keys())
def test_equals_dense_attention(batch, options, block_size):
    assert error(make_case(batch, block_size=block_size), **options) < 2e-5


@pytest.mark.parametrize("heads", [(1, 1, 16), (8, 1, 64), (12, 12, 8), (10, 5, 16), (16, 8, 24)])
@pytest.mark.parametrize("options", [{}, {"softcap": 5.0, "sliding_window": 40}], ids=["plain", "softcap"])
def test_head_layouts(heads, options):
    num_heads, num_kv_heads, head_dim = heads
    case = make_case(MIXED, num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim)
    assert error(case, **options) < 2e-5


@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 0.03), (torch.float16, 0.004)])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_half_precision(dtype, bound, options):
    # Values are about 1: the bound is a few units in the last place of the output.
    assert error(make_case(MIXED, dtype=dtype), **options) < bound


def test_many_passes_and_pieces(monkeypatch):
    """Batches that exceed the working-set limits are done in parts, with the same result."""
    monkeypatch.setattr(decode_tiles, "PASS_BYTES", 3 * 64 * 64 * 4)
    monkeypatch.setattr(prefill_groups, "MASK_PAIRS", 500)
    for options in OPTIONS.values():
        assert error(make_case(MIXED + CHUNKS + DECODE), **options) < 2e-5


@pytest.mark.parametrize("block_size", [1, 16, 50])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES.keys())
def test_contiguous_regions_are_read_without_their_table(batch, options, block_size):
    case = make_case(batch, block_size=block_size)
    make_contiguous(case, block_size)
    assert error(case, contiguous=True, **options) < 2e-5


def test_large_scores_do_not_overflow():
    case = make_case(MIXED)
    case.q *= 100
    assert error(case, scale=1.0) < 1e-3  # scores of several thousand, in fp32


def test_few_groups_whatever_the_batch():
    rows = [(0, 2 + 7 * i % 400) for i in range(100)]
    case = make_case(rows, num_heads=2, num_kv_heads=1, head_dim=8)
    backend = ReferenceBackend(case.pool)
    run_backend(backend, case, scale=1.0)
    [groups] = case.meta.prepared.groups.values()
    assert len(groups) <= 25


def test_only_the_new_tokens_slots_are_written():
    case = make_case(MIXED)
    before = case.pool.data.clone()
    ReferenceBackend(case.pool).write_kv(case.k, case.v, 1, case.meta)
    changed = (case.pool.data != before).any(-1).any(-1)  # [2, layers, slots]
    assert not changed[:, 0].any()
    slots = case.meta.slot_mapping
    assert changed[:, 1].sum() == 2 * len(slots)
    assert torch.equal(case.pool.slots(1)[0][slots], case.k)
    assert torch.equal(case.pool.slots(1)[1][slots], case.v)


def test_plans_are_made_once_per_step_not_per_layer(monkeypatch):
    case = make_case(MIXED)
    backend = ReferenceBackend(case.pool)
    run_backend(backend, case, scale=1.0)
    monkeypatch.setattr(decode_tiles, "plan_tiles", None)
    monkeypatch.setattr("kvarena.engine.attention.reference.plan_tiles", None)
    monkeypatch.setattr("kvarena.engine.attention.reference.plan_groups", None)
    backend.attend(case.q, 0, case.meta, scale=1.0)
