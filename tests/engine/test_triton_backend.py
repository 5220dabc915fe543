"""The Triton backend against dense attention in float64; on a GPU if there is one, else in Triton's interpreter."""

import numpy as np
import pytest
import torch
import triton.language as tl
from attention_cases import dense_attention, make_case, make_contiguous, run_backend
from torch.nn.attention import SDPBackend

from kvarena.engine.attention import triton_backend
from kvarena.engine.attention.dense import MIN_LENGTH, DensePrompts
from kvarena.engine.attention.reference import ReferenceBackend
from kvarena.engine.attention.triton_backend import TritonBackend
from kvarena.engine.errors import ConfigError, EngineError
from kvarena.engine.kernels.attention import base as attention
from kvarena.engine.kernels.attention.config import DecodeConfig, decode_config, triton_from
from kvarena.engine.kernels.attention.prefill_plan import Programs
from kvarena.engine.kernels.common import slot_type

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MIXED = [(99, 1), (0, 40), (12, 30), (0, 1), (650, 1), (64, 3)]
SINKS = torch.tensor([0.5, -1.0, 3.0, 0.0], device=DEVICE)


def error(case, *, contiguous=False, **options):
    options = {"scale": 0.3} | options
    backend = TritonBackend(case.pool, case.q.shape[1], contiguous=contiguous)
    got = run_backend(backend, case, **options)
    assert got.dtype == case.q.dtype and got.shape == case.q.shape
    assert not backend._scratch.counters.any(), "the arrival counters must be ready for the next launch"
    return (got.double().cpu() - dense_attention(case, **options)).abs().max().item()


@pytest.mark.parametrize(
    ("block_size", "options"),
    [
        (1, {}),
        (3, {"sliding_window": 24}),
        pytest.param(16, {}, marks=pytest.mark.slow),
        pytest.param(16, {"sliding_window": 1}, marks=pytest.mark.slow),
        (16, {"sliding_window": 300, "sinks": SINKS}),
        pytest.param(16, {"softcap": 5.0}, marks=pytest.mark.slow),
        pytest.param(17, {"sinks": SINKS}, marks=pytest.mark.slow),
        (256, {"softcap": 5.0, "sliding_window": 40}),
    ],
)
def test_equals_dense_attention(block_size, options):
    assert error(make_case(MIXED, block_size=block_size, device=DEVICE), **options) < 2e-5


@pytest.mark.parametrize("heads", [(1, 1, 64), (8, 1, 80), (5, 5, 96), (14, 2, 128), (2, 1, 256), (16, 1, 24)])
def test_head_layouts(heads):
    num_heads, num_kv_heads, head_dim = heads
    rows = [(70, 1), (0, 9), (300, 1), (20, 5)]
    case = make_case(rows, num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim, device=DEVICE)
    assert error(case, scale=head_dim**-0.5) < 2e-5


@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 0.03), (torch.float16, 0.004)])
def test_half_precision(dtype, bound):
    assert error(make_case(MIXED, dtype=dtype, device=DEVICE)) < bound


@pytest.mark.parametrize("options", [pytest.param({}, marks=pytest.mark.slow), {"sliding_window": 50}])
def test_contiguous_regions_are_read_without_their_table(options):
    case = make_case(MIXED, device=DEVICE)
    make_contiguous(case, 16)
    assert error(case, contiguous=True, **options) < 2e-5


@pytest.mark.parametrize("contiguous", [False, True])
def test_slots_of_large_pools_are_wide(contiguous, monkeypatch):
    assert slot_type(torch.empty(2**20, 8, 256, device="meta")) == tl.int64
    assert slot_type(torch.empty(2**20 - 1, 8, 256, device="meta")) == tl.int32
    assert slot_type(torch.empty(2**20 - 1, 9, 256, device="meta")[:, :8]) == tl.int64
    assert slot_type(torch.empty(2**18, 4, 8, 256, device="meta")[:, 1]) == tl.int64  # one of four layers side by side
    monkeypatch.setattr(attention, "slot_type", lambda keys: tl.int64)
    case = make_case([(20, 1), (0, 9)], device=DEVICE)
    if contiguous:
        make_contiguous(case, 16)
    assert error(case, contiguous=contiguous) < 2e-5


@pytest.mark.parametrize(
    ("slots", "options"),
    [
        (1, {}),
        (100, {"sliding_window": 100}),
        (3, {"sinks": SINKS}),
        *(pytest.param(slots, {}, marks=pytest.mark.slow) for slots in (3, 100)),
    ],
)
def test_any_split_gives_the_same(slots, options):
    case = make_case([(400, 1), (15, 1), (0, 1), (130, 1)], device=DEVICE)
    backend = TritonBackend(case.pool, 4)
    shape = backend.shape(4)._replace(decode=DecodeConfig(32, 4, 2, 4, min_chunk=32), slots_per_head=slots)
    backend.shape = lambda num_rows: shape
    for _ in range(2):  # the second run relies on what the first left behind
        got = run_backend(backend, case, scale=0.3, **options)
        assert (got.double().cpu() - dense_attention(case, scale=0.3, **options)).abs().max() < 2e-5


def test_a_graph_of_many_rows_keeps_its_kernel_when_few_are_left():
    case = make_case([(300, 1), (7, 1)], dtype=torch.bfloat16, device=DEVICE)
    backend = TritonBackend(case.pool, 4)
    few, many = backend.shape(2), backend.shape(200)
    assert few.decode != many.decode != backend.shape(32).decode
    for rows, shape in ((200, many), (2, few)):
        backend.reserve(case.meta, num_rows=rows)
        got = run_backend(backend, case, scale=0.3)
        assert case.meta.prepared.shape == shape
        assert (got.double().cpu() - dense_attention(case, scale=0.3)).abs().max() < 2e-2
    case.meta.prepared = None
    backend.prepare(case.meta)
    assert case.meta.prepared.shape == few


def test_a_reserved_plan_is_refilled_in_place():
    case = make_case([(40, 1), (7, 1)], device=DEVICE)
    backend = TritonBackend(case.pool, 4)
    backend.reserve(case.meta, num_rows=4)
    address = case.meta.prepared.decode.data_ptr()
    for _ in range(2):
        got = run_backend(backend, case, scale=0.3)
        assert (got.double().cpu() - dense_attention(case, scale=0.3)).abs().max() < 2e-5
    assert case.meta.prepared.decode.data_ptr() == address
    case.meta.host_query_start_loc = np.arange(0, 2 * 9, 9, dtype=np.int32)
    case.meta.host_seq_lens = np.array([9], dtype=np.int32)
    with pytest.raises(EngineError, match="reserved"):
        backend.prepare(case.meta)


def test_agrees_with_the_reference_backend_after_a_store():
    case = make_case([(5, 1), (0, 4)], dtype=torch.bfloat16, device=DEVICE)
    ours = run_backend(TritonBackend(case.pool, 4), case, scale=0.3)
    pool = case.pool.data.clone()
    theirs = run_backend(ReferenceBackend(case.pool), case, scale=0.3)
    assert torch.equal(case.pool.data, pool)
    torch.testing.assert_close(ours, theirs, atol=0.02, rtol=0.02)


def test_transposed_queries_as_transformers_gives_them():
    case = make_case([(5, 1), (0, 4)], device=DEVICE)
    wanted = dense_attention(case, scale=0.3)
    case.q = case.q.transpose(0, 1).contiguous().transpose(0, 1)
    assert (run_backend(TritonBackend(case.pool, 4), case, scale=0.3).double().cpu() - wanted).abs().max() < 2e-5


def test_items_in_parts_are_computed_once():
    case = make_case([(2060, 9), (3, 1)], device=DEVICE)
    backend = TritonBackend(case.pool, 4)
    shape = backend.shape(1)._replace(prefill=Programs(8, 2))
    backend.shape = lambda num_rows: shape
    got = run_backend(backend, case, scale=0.3)
    assert case.meta.prepared.capacity.prefill > 1
    assert (got.double().cpu() - dense_attention(case, scale=0.3)).abs().max() < 2e-5


PROMPTS = [(0, 30), (0, 30)]


def library(backend):
    """Let PyTorch's plain attention stand for cuDNN's where there is no GPU."""
    backend._dense = DensePrompts(SDPBackend.MATH, min_length=20)
    return backend


@pytest.mark.parametrize(
    ("is_kept", "window"),
    [(True, 30), (False, None), *(pytest.param(*one, marks=pytest.mark.slow) for one in ((True, None), (False, 30)))],
)
def test_equal_prompts_that_come_again_go_to_the_library(is_kept, window):
    case = make_case(PROMPTS, device=DEVICE)
    backend = library(TritonBackend(case.pool, 4))
    run_backend(backend, case, scale=0.3, sliding_window=window)
    assert case.meta.prepared.dense is None
    for _ in range(2):
        backend.prepare(case.meta)
        assert case.meta.prepared.dense == (2, 30)
        backend.write_kv(case.k, case.v, 1, case.meta)
        if not is_kept:
            case.meta.prepared.fresh = (0, case.k * torch.nan, case.v)  # another layer's: not to be used
        got = backend.attend(case.q, 1, case.meta, scale=0.3, sliding_window=window)
        wanted = dense_attention(case, scale=0.3, sliding_window=window)
        assert (got.double().cpu() - wanted).abs().max() < 2e-5
        assert got.is_contiguous()


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (9, 0),
    reason="cuDNN's attention is used on a Hopper GPU",
)
@pytest.mark.parametrize("is_kept", [True, False])
@pytest.mark.parametrize("count", [1, 3])
def test_equal_prompts_through_cudnn(count, is_kept):
    prompts = [(0, MIN_LENGTH)] * count
    case = make_case(prompts, num_heads=8, num_kv_heads=2, head_dim=128, dtype=torch.bfloat16, device=DEVICE)
    # Views into one packed projection, as the fused layers have them.
    case.q, case.k, case.v = torch.cat([case.q, case.k, case.v], dim=1).split([8, 2, 2], dim=1)
    backend = TritonBackend(case.pool, 8)
    wanted = dense_attention(case, scale=128**-0.5)
    for is_first in (True, False):
        backend.prepare(case.meta)
        assert (case.meta.prepared.dense is None) == is_first
        backend.write_kv(case.k, case.v, 1, case.meta)
        if not is_kept:
            case.meta.prepared.fresh = None
        got = backend.attend(case.q, 1, case.meta, scale=128**-0.5)
        assert got.is_contiguous() and (got.double().cpu() - wanted).abs().max() < 0.03


@pytest.mark.parametrize(
    ("rows", "options"),
    [
        ([(0, 30), (0, 29)], {}),
        ([(0, 30), (30, 1)], {}),
        ([(16, 14), (0, 30)], {}),
        ([(0, 19), (0, 19)], {}),
        (PROMPTS, {"sliding_window": 29}),
        (PROMPTS, {"softcap": 5.0}),
        (PROMPTS, {"sinks": SINKS}),
    ],
)
def test_other_steps_do_not_go_to_the_library(rows, options):
    case = make_case(rows, device=DEVICE)
    backend = library(TritonBackend(case.pool, 4))
    backend.prepare(case.meta)
    backend._dense.attend = None  # calling it would fail
    got = run_backend(backend, case, scale=0.3, **options)
    assert (got.double().cpu() - dense_attention(case, scale=0.3, **options)).abs().max() < 2e-5


def test_a_scale_that_is_not_positive_is_refused():
    case = make_case([(5, 1)], device=DEVICE)
    with pytest.raises(EngineError, match="must be positive"):
        run_backend(TritonBackend(case.pool, 4), case, scale=-0.3)


def test_unequal_groups_are_refused():
    case = make_case([(5, 1)], num_heads=4, num_kv_heads=2, device=DEVICE)
    with pytest.raises(ConfigError, match=r"engine\.attention=reference"):
        TritonBackend(case.pool, 5)


def test_the_kernel_that_decodes_is_chosen_by_card_and_rows():
    """A table that was measured: on an H200 the Triton kernel is faster from 64 rows on, on an H100 it never is."""
    assert [triton_from(card) for card in ("NVIDIA H200", "NVIDIA H100 80GB HBM3", "NVIDIA B200")] == [64, None, None]
    backend = TritonBackend(make_case(MIXED, device=DEVICE).pool, 4, use_hopper=False)
    backend._stream, few = object(), triton_backend.FEWEST_ROWS
    for first, stays in ((None, [False, True, True, True]), (256, [False, True, True, False])):
        backend._triton_from = first
        assert [backend.shape(rows).stays for rows in (few - 1, few, 255, 256)] == stays
        # A graph with prompts has room for 256 decodes, and mostly has fewer.
        assert backend.shape(256, is_most=True).stays
    backend._triton_from = 256
    assert backend.shape(256).decode == decode_config(backend.pool.head_dim, backend.pool.dtype.itemsize, 256)
