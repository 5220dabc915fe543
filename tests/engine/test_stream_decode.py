"""The decode kernel for Hopper whose programs stay: when it is used, that it compiles, and attention in float64."""

import numpy as np
import pytest
import torch
from attention_cases import dense_attention, make_case, make_contiguous, poison, run_backend

from kvarena.engine.attention import triton_backend
from kvarena.engine.attention.triton_backend import TritonBackend
from kvarena.engine.kernels.attention.base import AttentionCall
from kvarena.engine.kernels.attention.stream_decode import StreamDecode, launch_constants, streams
from kvarena.engine.kernels.hopper import SHARED_BYTES, compile_source, kernel_source, nvrtc_major

DEVICE = "cuda"
needs_hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
    reason="the tensor memory accelerator is Hopper's",
)
SCALE = 128**-0.5
# Context before the step, new tokens: a row alone, many short ones, a long one among them, rows that end with a block.
BATCHES = {
    "one": [(700, 1)],
    "first tokens": [(0, 1), (1, 1), (15, 1), (16, 1), (63, 1), (64, 1)],
    "mixed": [(99, 1), (0, 40), (12, 30), (650, 1), (64, 3), (2047, 1)],
    "many": [(int(n), 1) for n in np.random.default_rng(0).integers(0, 900, 150)],
    "a long one": [(31, 1)] * 40 + [(9000, 1)],
}


@pytest.fixture
def any_rows(monkeypatch):
    """Small batches go to the kernel too, which the other one does faster."""
    monkeypatch.setattr(triton_backend, "FEWEST_ROWS", 1)


def test_pools_that_it_takes():
    assert streams(128, 4, 16) and streams(128, 8, 64) and streams(128, 1, 256)
    assert not streams(64, 4, 16), "another head size"
    assert not streams(128, 9, 16), "more query heads than a product is wide"
    assert not streams(128, 4, 1) and not streams(128, 4, 24), "blocks that 16 tokens do not divide"
    assert not streams(128, 4, 16, torch.float32)


def test_layers_that_it_takes():
    stream = StreamDecode(None)
    q, pool = torch.zeros(2, 8, 128, dtype=torch.bfloat16), torch.zeros(64, 3, 2, 128, dtype=torch.bfloat16)
    keys = pool[:, 0].contiguous()
    plain = AttentionCall(q, keys, keys, q, q, q, q, 16, SCALE)
    assert stream.takes(plain)
    assert not stream.takes(plain._replace(sliding_window=100))
    assert not stream.takes(plain._replace(softcap=5.0))
    assert not stream.takes(plain._replace(sinks=q))
    assert not stream.takes(plain._replace(keys=pool[:, 0])), "layers of a virtual pool, between which nothing may be"
    assert not stream.takes(plain._replace(values=pool[:, 1]))
    assert not stream.takes(plain._replace(q=q.float()))
    assert not stream.takes(plain._replace(q=torch.zeros(2, 8, 130, dtype=torch.bfloat16)[:, :, 1:129])), (
        "at odd addresses"
    )
    apart = torch.zeros(2, 8 * 128 + 1, dtype=torch.bfloat16)[:, 1:].view(2, 8, 128)
    assert not stream.takes(plain._replace(q=apart)), "rows an odd number of elements apart"


@pytest.mark.parametrize("groups", [(4, 7), pytest.param(range(1, 9), marks=pytest.mark.slow)], ids=["two", "all"])
def test_it_compiles_without_spills_and_fits_twice(groups):
    nvrtc = pytest.importorskip("cuda.bindings.nvrtc", reason="needs pip install 'kvarena[gpu]'")
    try:
        nvrtc_major(nvrtc)
    except OSError as error:
        pytest.skip(str(error))
    for group in groups:
        constants, shared_bytes = launch_constants(group, 16, contiguous=group % 2 == 0)
        cubin, said = compile_source(nvrtc, kernel_source("stream_decode", constants))
        assert cubin.startswith(b"\x7fELF")
        assert " 0 bytes spill stores, 0 bytes spill loads" in said, (constants, said)
        assert "warning" not in said, (constants, said)
        # A program's own kilobyte, and what it declares beside its dynamic part.
        assert 2 * (shared_bytes + 1024 + 1024) <= SHARED_BYTES + 1024, group


def hopper_case(rows, *, group=4, heads=2, block_size=16):
    case = make_case(
        rows, block_size=block_size, num_heads=group * heads, num_kv_heads=heads, head_dim=128, dtype=torch.bfloat16,
        device=DEVICE,
    )  # fmt: skip
    poison(case, block_size)
    return case


def error(case, **options):
    backend = TritonBackend(case.pool, case.q.shape[1], **options)
    assert backend._stream is not None
    calls = []
    run = backend._stream.__class__.__call__
    backend._stream = type("Counted", (StreamDecode,), {"__call__": lambda *a, **k: calls.append(1) or run(*a, **k)})(
        backend._stream._kernels
    )
    got = run_backend(backend, case, scale=SCALE)
    again = run_backend(backend, case, scale=SCALE)
    assert len(calls) == 2
    assert torch.equal(got, again), "sums in a fixed order"
    assert not backend._scratch.counters.any(), "the arrival counters must be ready for the next launch"
    return (got.double().cpu() - dense_attention(case, scale=SCALE)).abs().max().item()


@pytest.mark.gpu
@needs_hopper
@pytest.mark.usefixtures("any_rows")
@pytest.mark.parametrize("group", [1, 2, 3, 4, 5, 7, 8])
@pytest.mark.parametrize("batch", list(BATCHES))
def test_equals_dense_attention(batch, group):
    assert error(hopper_case(BATCHES[batch], group=group)) < 0.02


@pytest.mark.gpu
@needs_hopper
@pytest.mark.usefixtures("any_rows")
@pytest.mark.parametrize("block_size", [32, 48, 256])
def test_block_sizes(block_size):
    assert error(hopper_case(BATCHES["many"], block_size=block_size)) < 0.02


@pytest.mark.gpu
@needs_hopper
@pytest.mark.usefixtures("any_rows")
@pytest.mark.parametrize("heads", [1, 8, 40])
def test_heads(heads):
    assert error(hopper_case(BATCHES["mixed"], heads=heads, group=2)) < 0.02


@pytest.mark.gpu
@needs_hopper
@pytest.mark.usefixtures("any_rows")
def test_contiguous_regions_are_read_without_their_table():
    case = hopper_case(BATCHES["many"])
    make_contiguous(case, 16)
    assert error(case, contiguous=True) < 0.02


@pytest.mark.gpu
@needs_hopper
@pytest.mark.usefixtures("any_rows")
def test_the_other_kernel_takes_its_items():
    case = hopper_case(BATCHES["a long one"])
    backend = TritonBackend(case.pool, case.q.shape[1])
    options = {"scale": SCALE, "sliding_window": 50}
    got = run_backend(backend, case, **options)
    assert case.meta.prepared.capacity.starts
    assert (got.double().cpu() - dense_attention(case, **options)).abs().max() < 0.02


@pytest.mark.gpu
@needs_hopper
@pytest.mark.usefixtures("any_rows")
def test_launched_early_it_sees_what_the_kernel_before_it_stores():
    """A graph of many stores and attentions, each on the results of the one before, against launches one by one."""
    case = hopper_case([(int(n), 1) for n in np.random.default_rng(1).integers(0, 300, 64)], heads=8)
    backend = TritonBackend(case.pool, case.q.shape[1])
    backend.reserve(case.meta, len(case.meta.host_seq_lens))
    backend.prepare(case.meta)
    k, v = case.k.clone(), case.v.clone()

    def chain(wait):
        x = case.q
        for _ in range(40):
            backend.write_kv(x[:, ::4], -x[:, 1::4], 1, case.meta)
            x = backend.attend(x, 1, case.meta, scale=SCALE)
            if wait:
                torch.cuda.synchronize()
        backend.write_kv(k, v, 1, case.meta)
        return x

    expected = chain(wait=True)
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        chain(wait=False)
        with torch.cuda.graph(graph, stream=stream):
            got = chain(wait=False)
    for _ in range(5):
        got.fill_(torch.nan)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(got, expected)


@pytest.mark.gpu
@needs_hopper
def test_few_rows_stay_with_the_other_kernel():
    pool = hopper_case([(1, 1)]).pool
    backend = TritonBackend(pool, 8)
    assert backend.decode_kernel.startswith("cuda")
    assert backend.shape(triton_backend.FEWEST_ROWS).stays and not backend.shape(triton_backend.FEWEST_ROWS - 1).stays
    alone = TritonBackend(pool, 8, use_hopper=False)
    assert alone.decode_kernel == "triton" and not alone.shape(64).stays
