"""Attention by the CPU's compiled kernels against dense attention in fp64, and the reference as judge of the judge."""

import itertools

import pytest
import torch
from attention_cases import dense_attention, make_case, make_contiguous, run_backend

from kvarena.engine.attention import cpu_backend
from kvarena.engine.attention.cpu_backend import CpuBackend

ROWS = [(99, 1), (0, 40), (12, 30), (0, 1), (250, 1), (64, 3), (640, 1), (1100, 1), (600, 70)]
SINKS = torch.tensor([0.5, -1.0, 3.0, 0.0])
OPTIONS = {
    "plain": {},
    "window": {"sliding_window": 24},
    "window of one": {"sliding_window": 1},
    "wide window": {"sliding_window": 4096},
    "window of two chunks": {"sliding_window": 700},
    "softcap": {"softcap": 5.0},
    "softcap, sinks and window": {"softcap": 5.0, "sinks": SINKS, "sliding_window": 40},
    "sinks": {"sinks": SINKS},
}
BOUNDS = {torch.float32: 2e-5, torch.bfloat16: 0.03, torch.float16: 0.004}


def error(case, *, contiguous=False, **options):
    options = {"scale": 0.3} | options
    got = run_backend(CpuBackend(case.pool, contiguous=contiguous), case, **options)
    assert got.dtype == case.q.dtype
    assert got.shape == case.q.shape
    return (got.double() - dense_attention(case, **options)).abs().max().item()


@pytest.mark.parametrize("block_size", [1, 3, 16, 256])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_equals_dense_attention(options, block_size):
    assert error(make_case(ROWS, block_size=block_size), **options) < 2e-5


@pytest.mark.parametrize("block_size", [1, 16, 50])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_contiguous_regions_are_read_without_their_table(options, block_size):
    case = make_case(ROWS, block_size=block_size)
    make_contiguous(case, block_size)
    assert error(case, contiguous=True, **options) < 2e-5


# Query heads, KV heads and head size; a few here, every pairing in `make test-all`, because each is compiled.
HEADS = [(4, 2, 32), (12, 12, 80), (16, 2, 128), (3, 1, 256), (5, 1, 96)]
OTHERS = [(8, 1, 64), (6, 2, 40), (32, 8, 128), (8, 8, 192), (2, 2, 16), (71, 1, 64), (10, 5, 8)]
FEW = [(HEADS[0], torch.bfloat16), (HEADS[1], torch.float16), (HEADS[3], torch.float32)]
ALL = [pair for pair in itertools.product(HEADS + OTHERS, BOUNDS) if pair not in FEW]


@pytest.mark.parametrize(
    ("heads", "dtype"), [*FEW, *(pytest.param(*pair, marks=pytest.mark.slow) for pair in ALL)], ids=str
)
def test_head_layouts_and_dtypes(heads, dtype):
    num_heads, num_kv_heads, head_dim = heads
    case = make_case(ROWS, num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim, dtype=dtype)
    sinks = torch.linspace(-1, 2, num_heads)
    # Values are about 1: the bound is a few units in the last place of the output.
    for options in ({}, {"softcap": 5.0, "sliding_window": 40, "sinks": sinks}):
        assert error(case, scale=0.1, **options) < BOUNDS[dtype]


def test_neither_threads_nor_neighbours_change_a_bit(monkeypatch):
    case = make_case(ROWS)
    one = run_backend(CpuBackend(case.pool), case, scale=0.3)
    for threads in (2, 3, 7):
        monkeypatch.setattr(cpu_backend, "most_threads", lambda threads=threads: threads)
        assert torch.equal(run_backend(CpuBackend(case.pool), case, scale=0.3), one)
    alone = make_case(ROWS)
    row = ROWS.index((1100, 1))
    meta, token = alone.meta, int(alone.meta.host_query_start_loc[row])
    meta.seq_lens, meta.block_table = meta.seq_lens[row : row + 1], meta.block_table[row : row + 1]
    meta.host_seq_lens = meta.host_seq_lens[row : row + 1]
    meta.query_start_loc = torch.tensor([0, 1], dtype=torch.int32)
    meta.host_query_start_loc, meta.max_query_len = meta.query_start_loc.numpy(), 1
    meta.slot_mapping = meta.slot_mapping[token : token + 1]
    alone.q, alone.k, alone.v = (part[token : token + 1] for part in (alone.q, alone.k, alone.v))
    assert torch.equal(run_backend(CpuBackend(alone.pool), alone, scale=0.3)[0], one[token])


def test_queries_of_a_transformers_layer_lie_by_heads():
    case = make_case(ROWS)
    expected = run_backend(CpuBackend(case.pool), case, scale=0.3)
    case.q = case.q.transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(run_backend(CpuBackend(case.pool), case, scale=0.3), expected)


def test_large_scores_do_not_overflow_and_nan_is_not_hidden():
    case = make_case([(700, 1), (0, 20)])
    assert error(case, scale=60.0) < 2e-4
    keys, _ = case.pool.slots(1)
    keys[case.meta.slot_mapping[0]] = torch.nan
    case.k[0] = torch.nan
    got = run_backend(CpuBackend(case.pool), case, scale=0.3)
    assert got[0].isnan().all()
    assert got[1:].isfinite().all()
