"""The CUDA kernels for Hopper: which launch serves what, that they compile without spills, and their products."""

from itertools import islice
from types import SimpleNamespace

import pytest
import torch

from kvarena.engine.fusions import hopper_products
from kvarena.engine.fusions.hopper_products import HopperProducts
from kvarena.engine.fusions.ops import Linear, Norm, Product
from kvarena.engine.fusions.triton_ops import TritonOps
from kvarena.engine.kernels import hopper as module
from kvarena.engine.kernels.experts.grouped import launch_constants
from kvarena.engine.kernels.gemm import dense
from kvarena.engine.kernels.gemm.stream import StreamGemm, StreamTile, row_bucket, stream_tile
from kvarena.engine.kernels.gemm.table import GemmTable
from kvarena.engine.kernels.gemm.wide import WideGemm, WideTile, wide_tile
from kvarena.engine.kernels.hopper import (
    SHARED_BYTES,
    compile_source,
    kept_cubin,
    kernel_source,
    load_hopper_kernels,
    nvrtc_major,
)

H100 = 132
# Columns (of gate and up together), depth, gated; Llama-3.1-8B's and Qwen3-0.6B's.
PRODUCTS = (
    (6144, 4096, False), (4096, 4096, False), (28672, 4096, True), (4096, 14336, False),
    (4096, 1024, False), (1024, 2048, False), (6144, 1024, True), (1024, 3072, False),
)  # fmt: skip
ROWS = (1, 5, 8, 16, 31, 32, 33, 64, 65, 100, 128, 130, 200, 256)
needs_hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="wgmma is Hopper's"
)


def tiles():
    """Every stream launch of the two models: rows, columns, depth, gated, normed, tile."""
    for num_cols, depth, glu in PRODUCTS:
        for num_rows in ROWS:
            for norm in (True,) if glu else (False, True):
                tile = stream_tile(num_rows, num_cols, depth, H100, norm=norm, glu=glu)
                if tile is not None:
                    yield num_rows, num_cols, depth, glu, norm, tile


def test_stream_launches_are_one_round_and_fit_into_shared_memory():
    found = list(tiles())
    assert len(found) > 80
    for num_rows, num_cols, depth, glu, norm, tile in found:
        row_tiles = -(-num_rows // 64)
        programs = -(-num_cols // (128 if glu else 64 * tile.blocks)) * row_tiles * tile.parts
        assert programs <= H100 * tile.per_sm
        stages = tile.num_stages(num_rows, depth)
        assert stages >= min(3, depth // (64 * tile.boxes * tile.parts))
        held = stages * tile.stage_bytes(num_rows) + tile.rest_bytes(num_rows, depth) + 4096
        assert held * tile.per_sm <= SHARED_BYTES
        assert norm or not tile.fuse_norm


def test_products_that_other_kernels_do_as_fast_have_no_stream_launch():
    assert stream_tile(65, 4096, 4096, H100) is None, "more programs than fit at once"
    assert stream_tile(257, 1024, 2048, H100) is None, "too many rows"
    assert stream_tile(100, 2048, 4096, H100, norm=True) is None, "a long K, many rows and a norm"
    assert stream_tile(100, 6144, 1024, H100, norm=True, glu=True) is None, "the gated product of one wave"
    assert stream_tile(200, 6144, 1024, H100, norm=True, glu=True) is not None
    assert stream_tile(1, 28672, 4096, H100, norm=True, glu=True) is None, "one row, bound by memory alone"
    assert stream_tile(1, 19456, 2560, H100, norm=True, glu=True) is None, "likewise"
    assert stream_tile(1, 6144, 1024, H100, norm=True, glu=True) is not None
    assert stream_tile(2, 28672, 4096, H100, norm=True, glu=True) is not None
    assert stream_tile(40, 6144, 1024, H100, norm=True, glu=True) is None, "the gated product of one wave"
    assert stream_tile(8, 128256, 4096, H100, norm=True) is None, "more programs than fit at once"
    assert stream_tile(8, 4096, 4000, H100) is None, "a depth that is no multiple of a step"
    assert stream_tile(8, 4100, 4096, H100) is None, "columns that are no multiple of 16 bytes"


def test_wide_tiles_divide_the_columns_by_the_multiprocessors():
    assert wide_tile(256, 28672, 4096, H100) == WideTile(224, 2), "64 of 66 clusters, two tiles each"
    assert wide_tile(128, 28672, 4096, H100) == WideTile(224, 1), "128 programs, one tile each"
    assert wide_tile(64, 28672, 4096, H100) is None
    assert wide_tile(257, 28672, 4096, H100) is None
    assert wide_tile(256, 6144, 1024, H100) is None, "too short a K"
    assert wide_tile(256, 14336, 4096, H100) == WideTile(224, 2), "one tile for each of 64 clusters"
    assert wide_tile(256, 16384, 3072, H100) == WideTile(256, 2)
    assert wide_tile(128, 16384, 3072, H100) is None, "the best tile leaves a fifth of the device idle"
    for tile in (wide_tile(256, 28672, 4096, H100), wide_tile(200, 37888, 3584, H100)):
        assert tile.num_stages >= 4


def test_there_are_none_without_a_gpu():
    assert load_hopper_kernels("cpu") is None


def sources():
    """The kernels of every launch of the two models, once each."""
    wide = {wide_tile(num_rows, 28672, 4096, H100) for num_rows in (65, 129)}
    for tile in wide:
        yield "wide_gemm", tile.constants(), tile.cols
    for constants in launch_constants():
        yield "wide_gemm", constants, constants["BN"]
    seen = set()
    for num_rows, _, depth, glu, norm, tile in tiles():
        rows = row_bucket(num_rows)
        mode = "GLU" if glu else "STORE" if norm else "ADD"
        constants = {
            "BX": rows, "RB": tile.blocks, "KS": tile.boxes, "CK": tile.parts,
            "STAGES": tile.num_stages(num_rows, depth), "MODE": mode, "NORM": int(tile.fuse_norm),
            "PACKED": 0, "PER_SM": tile.per_sm,
        }  # fmt: skip
        if (key := tuple(constants.values())) not in seen:
            seen.add(key)
            yield "stream_gemm", constants, rows


@pytest.mark.parametrize("step", [12, pytest.param(1, marks=pytest.mark.slow)], ids=["some", "all"])
def test_every_launch_compiles_without_spills(step):
    nvrtc = pytest.importorskip("cuda.bindings.nvrtc", reason="needs pip install 'kvarena[gpu]'")
    try:
        nvrtc_major(nvrtc)
    except OSError as error:
        pytest.skip(str(error))
    count = 0
    for name, constants, cols in islice(sources(), None, None, step):
        cubin, said = compile_source(nvrtc, kernel_source(name, constants, cols))
        assert cubin.startswith(b"\x7fELF")
        assert " 0 bytes spill stores, 0 bytes spill loads" in said, (constants, said)
        assert "warning" not in said, (constants, said)
        count += 1
    assert count > 20 // step


def test_what_was_compiled_is_compiled_once(monkeypatch, tmp_path):
    """For each text and each version of the compiler, in whatever process."""
    compiled, version = [], [0, 13, 0]
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(module, "compile_source", lambda nvrtc, text: (compiled.append(text) or text.encode(), ""))
    nvrtc = SimpleNamespace(nvrtcVersion=lambda: tuple(version))
    for text in ("one", "other", "one", "other"):
        assert kept_cubin(nvrtc, text) == text.encode()
    assert compiled == ["one", "other"]
    version[2] = 1
    assert kept_cubin(nvrtc, "one") == b"one"
    assert compiled == ["one", "other", "one"]


def reference(x, weight, *, norm=None, residual=None, glu=False):
    """In float64."""
    x = x.double() if norm is None else _normed(x, norm)
    y = x @ weight.double().t()
    if glu:
        gate, up = y.chunk(2, dim=1)
        y = torch.nn.functional.silu(gate) * up
    return y if residual is None else y + residual.double()


def operands(num_rows, num_cols, depth, device="cuda"):
    torch.manual_seed(num_rows)
    x = torch.randn(num_rows, depth, device=device, dtype=torch.bfloat16)
    weight = torch.randn(num_cols, depth, device=device, dtype=torch.bfloat16) / depth**0.5
    norm = Norm(torch.rand(depth, device=device, dtype=torch.bfloat16) + 0.5, 1e-5)
    return x, weight, norm


@pytest.fixture
def products(monkeypatch):
    """`HopperProducts` of an H100 whose kernels are stand-ins in float64, and which of them were called."""
    called = []

    class Stream:
        def __init__(self, kernels):
            pass

        def __call__(self, x, weight, tile, *, norm, eps, residual, glu, out):
            called.append(("stream", tile))
            assert (norm is not None) <= tile.fuse_norm
            folded = None if norm is None else Norm(norm, eps)
            return reference(x, weight, norm=folded, residual=residual, glu=glu)

    class Wide:
        def __init__(self, kernels):
            pass

        def __call__(self, x, weight, tile):
            called.append(("wide", tile))
            return reference(x, weight, glu=True)

    class Kernels:
        num_multiprocessors = H100

    monkeypatch.setattr(hopper_products, "load_hopper_kernels", lambda device: Kernels())
    monkeypatch.setattr(dense, "MEASURED", {})  # its own tests ask which product it takes first
    monkeypatch.setattr(hopper_products, "StreamGemm", Stream)
    monkeypatch.setattr(hopper_products, "WideGemm", Wide)
    monkeypatch.setattr(hopper_products, "rms_norm", lambda x, weight, eps: _normed(x, Norm(weight, eps)).to(x.dtype))
    return HopperProducts("cuda"), called


def _normed(x, norm):
    return x.double() * torch.rsqrt(x.double().square().mean(1, keepdim=True) + norm.eps) * norm.weight.double()


def test_each_product_goes_with_its_neighbours_to_the_kernel_that_is_fastest(products):
    find, called = products
    for num_rows, num_cols, depth, kind, kernel in (
        (1, 1024, 2048, "residual", "stream"), (64, 1024, 2048, "residual", "stream"),
        (65, 1024, 2048, "residual", "stream"), (256, 1024, 2048, "residual", "stream"),
        (257, 1024, 2048, "residual", None), (16, 4096, 1024, "norm", "stream"), (48, 4096, 1024, "norm", "stream"),
        (96, 4096, 1024, "norm", "stream"), (96, 6144, 4096, "norm", None),
        (32, 6144, 1024, "glu", "stream"), (40, 6144, 1024, "glu", None), (200, 6144, 1024, "glu", "stream"),
        (64, 14336, 2048, "glu", "stream"), (100, 14336, 2048, "glu", None), (200, 14336, 2048, "glu", "wide"),
        (300, 14336, 2048, "glu", None), (200, 14336, 2048, "normed glu", "wide"),
        (200, 6144, 1024, "normed glu", "stream"),
    ):  # fmt: skip
        called.clear()
        x, weight, norm = operands(num_rows, num_cols, depth, device="cpu")
        held = torch.randn(num_rows, num_cols, dtype=torch.bfloat16) if kind == "residual" else None
        is_glu, norm = "glu" in kind, None if kind == "normed glu" else norm  # normed by whoever added up over ranks
        around = {"residual": held, "out": held} if kind == "residual" else {"norm": norm, "glu": is_glu}
        y = find(Product(x, Linear(weight, None), **around))
        assert [name for name, _ in called] == ([] if kernel is None else [kernel]), (num_rows, kind)
        assert (y is None) == (kernel is None)
        if y is not None:
            expected = reference(x, weight, norm=around.get("norm"), residual=held, glu=is_glu)
            assert (y - expected).norm() <= 1e-2 * expected.norm()


def test_other_operands_are_left_to_other_kernels(products):
    find, called = products
    x, weight, norm = operands(8, 4096, 1024, device="cpu")
    assert find(Product(x.half(), Linear(weight.half(), None), norm)) is None
    assert find(Product(x, Linear(weight, torch.zeros(4096, dtype=torch.bfloat16)), norm)) is None
    assert find(Product(x, Linear(weight, None), Norm(norm.weight.float(), norm.eps))) is None
    apart = torch.zeros(8, 1028, dtype=torch.bfloat16)[:, :1024]
    assert find(Product(apart, Linear(weight, None))) is None, "rows that are no multiple of 16 bytes apart"
    assert not called


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize("num_rows", ROWS)
def test_stream_products(num_rows):
    gemm = StreamGemm(load_hopper_kernels("cuda"))
    for rows, num_cols, depth, glu, with_norm, tile in tiles():
        if rows != num_rows:
            continue
        x, weight, norm = operands(num_rows, num_cols, depth)
        norm = norm if tile.fuse_norm else None
        held = None if glu or with_norm else torch.randn(num_rows, num_cols, device="cuda", dtype=torch.bfloat16)
        expected = reference(x, weight, norm=norm, residual=held, glu=glu)
        given = {} if norm is None else {"norm": norm.weight, "eps": norm.eps}
        results = []
        for overlap in (True, False):
            out = None if held is None else held.clone()
            results.append(gemm(x, weight, tile, residual=out, glu=glu, out=out, overlap=overlap, **given))
        assert (results[0].double() - expected).norm() <= 5e-3 * expected.norm(), tile
        assert torch.equal(*results), tile


@pytest.mark.gpu
@needs_hopper
def test_stream_products_of_columns_that_fill_no_tile():
    gemm = StreamGemm(load_hopper_kernels("cuda"))
    for glu, num_cols in ((False, 4048), (True, 2 * 4048)):
        x, weight, _ = operands(7, num_cols, 1024)
        tile = StreamTile(2, 1, 2, 1)
        out = torch.full((7, 4048 + 16), 3.0, device="cuda", dtype=torch.bfloat16)
        gemm(x, weight, tile, glu=glu, out=out[:, :4048])
        expected = reference(x, weight, glu=glu)
        assert (out[:, :4048].double() - expected).norm() <= 5e-3 * expected.norm()
        assert (out[:, 4048:] == 3.0).all(), "columns beyond the last are not touched"


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize("num_rows", [65, 100, 128, 129, 192, 250, 256])
@pytest.mark.parametrize(("num_cols", "depth"), [(28672, 4096), (37888, 3584), (27648, 5120)])
def test_wide_products(num_rows, num_cols, depth):
    tile = wide_tile(num_rows, num_cols, depth, torch.cuda.get_device_properties(0).multi_processor_count)
    if tile is None:
        pytest.skip("the library fills this GPU as well")
    gemm = WideGemm(load_hopper_kernels("cuda"))
    x, weight, _ = operands(num_rows, num_cols, depth)
    results = [gemm(x, weight, tile, overlap=overlap) for overlap in (True, False)]
    expected = reference(x, weight, glu=True)
    assert (results[0].double() - expected).norm() <= 5e-3 * expected.norm()
    assert torch.equal(*results)


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize("num_rows", [1, 3, 16, 32, 48, 64, 96, 200, 256])
@pytest.mark.parametrize(("hidden", "inner", "heads"), [(4096, 14336, 6144), (1024, 3072, 4096)])
def test_a_layers_products_are_those_of_the_other_kernels(num_rows, hidden, inner, heads):
    """In a CUDA graph, launches overlapped, each on the results of the one before."""
    multiprocessors = torch.cuda.get_device_properties(0).multi_processor_count
    x, qkv, norm = operands(num_rows, heads, hidden)
    o, gate_up, down = (
        Linear(torch.randn(shape, device="cuda", dtype=torch.bfloat16) / shape[1] ** 0.5, None)
        for shape in ((hidden, hidden), (2 * inner, hidden), (hidden, inner))
    )
    results = []
    for hopper in (True, False):
        ops = TritonOps("cuda", GemmTable(128, multiprocessors), hopper=hopper)

        def layer(ops=ops):
            stream = x.clone()
            projected = ops.norm_linear(stream, norm, Linear(qkv, None))
            stream = ops.linear_residual(projected[:, :hidden].contiguous(), o, stream)
            return projected, ops.linear_residual(ops.norm_glu(stream, norm, gate_up), down, stream)

        layer()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = layer()
        for _ in range(20):
            graph.replay()
        results.append([one.double() for one in out])
    for got, expected in zip(*results, strict=True):
        assert (got - expected).norm() <= 1e-2 * expected.norm()
