"""The dense product of many rows: its text on a CPU, which launches there are, that they compile, and on a GPU."""

import struct

import pytest
import torch
from on_host import OnHost

from kvarena.engine.fusions import hopper_products
from kvarena.engine.fusions.hopper_products import HopperProducts
from kvarena.engine.fusions.ops import Linear, Norm, Product, rms_norm
from kvarena.engine.kernels.gemm import dense
from kvarena.engine.kernels.gemm.dense import DenseGemm, DenseTile, dense_tile, dense_tiles, predicted_us
from kvarena.engine.kernels.hopper import SHARED_BYTES, compile_source, kernel_source, load_hopper_kernels, nvrtc_major

# Of an H200: multiprocessors, and clusters of two that it holds.
H200, HELD = 132, 66
# Columns and depth: q, k, v; o; down of Llama-3.1-8B.
PRODUCTS = ((6144, 4096), (4096, 4096), (4096, 14336))
needs_hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="wgmma is Hopper's"
)


def operands(num_rows, num_cols, depth, device="cpu"):
    torch.manual_seed(num_rows + num_cols)
    kind = {"device": device, "dtype": torch.bfloat16}
    return (
        torch.randn(num_rows, depth, **kind), torch.randn(num_cols, depth, **kind) / depth**0.5,
        torch.randn(num_rows, num_cols, **kind),
    )  # fmt: skip


@pytest.fixture(scope="module")
def on_host(tmp_path_factory):
    """Runs launches of the kernel on a CPU."""
    programs = OnHost(tmp_path_factory.mktemp("host"), "wide_dense", "dense_on_host_main.cpp")

    def run(x, weight, y, tile, *, mode):
        col_tiles, clusters = tile.clusters(len(x), len(weight))
        count, depth = clusters * tile.cluster, x.shape[1]
        at_once = tile.cluster * tile.parts
        constants = tile.constants(mode) | {"STAGES": 3, "THREADS": 384, "MULTIPLYING": 256}
        constants |= {"CLUSTER": tile.cluster, "AT_ONCE": at_once}
        sizes = (count, len(weight), depth, count * 128 * tile.cols, count * tile.parts)
        plan = (len(x), len(weight), y.stride(0), depth // 64 // tile.parts, col_tiles)
        raw = [t.contiguous().view(torch.uint8).numpy().tobytes() for t in (x, weight, y)]
        wrote = programs(constants, struct.pack("10i", *sizes, *plan) + b"".join(raw))
        y.copy_(torch.frombuffer(wrote, dtype=torch.bfloat16).view(y.shape))

    return run


# Rows, columns, depth, tile: parts, shared fetches, columns and rows that fill no tile, rings that go round.
CASES = [
    (200, 72, 512, DenseTile(32, 2, False, 2, apart=True), "ADD"),
    (70, 48, 256, DenseTile(48, 1, False, 1), "STORE"),
    (130, 104, 512, DenseTile(48, 2, True, 2, apart=True), "ADD"),
    (260, 64, 1024, DenseTile(64, 2, False, 4), "STORE"),
    (90, 80, 320, DenseTile(32, 1, False, 1, apart=True), "ADD"),
]


@pytest.mark.parametrize("cases", [CASES[:1], pytest.param(CASES[1:], marks=pytest.mark.slow)], ids=["one", "others"])
def test_the_kernels_text_on_a_cpu(on_host, cases):
    """Every wait ends, every element is written with its sum, and flags are down again."""
    for num_rows, num_cols, depth, tile, mode in cases:
        x, weight, y = operands(num_rows, num_cols, depth)
        expected = x.double() @ weight.double().t() + (y.double() if mode == "ADD" else 0)
        on_host(x, weight, y, tile, mode=mode)
        torch.testing.assert_close(y.double(), expected, rtol=2**-8, atol=1e-3)


def test_there_is_a_launch_where_one_was_measured(monkeypatch):
    assert dense_tile(256, 4095, 4096) is None
    tile = DenseTile(192, 2, False, 2)
    monkeypatch.setattr(dense, "MEASURED", {(6144, 4096): {128: tile, 256: tile}})
    found = [dense_tile(rows, 6144, 4096) for rows in (64, 65, 96, 97, 128, 129, 192, 193, 256, 257, 600)]
    assert found == [None, None, None, tile, tile, None, None, tile, tile, None, None]
    assert dense_tile(256, 4096, 4096) is None


@pytest.mark.parametrize(("num_cols", "depth"), PRODUCTS)
def test_launches_to_choose_from_fill_the_device(num_cols, depth):
    for num_rows in (65, 128, 192, 256, 512):
        tiles = dense_tiles(num_rows, num_cols, depth, HELD)
        us = [predicted_us(tile, num_rows, num_cols, depth) for tile in tiles]
        assert us == sorted(us) and len(tiles) > 10
        best = tiles[0]
        programs = best.clusters(num_rows, num_cols)[1] * best.cluster
        assert programs >= 0.8 * H200 or us[0] < 1.2 * 2 * num_cols * depth / 4.2e6 + 6
        for tile in tiles:
            assert tile.num_stages >= 4 and tile.num_stages * tile.stage_bytes + 2048 <= SHARED_BYTES
            assert tile.parts == 1 or tile.clusters(num_rows, num_cols)[1] * tile.cluster <= 2 * HELD
    assert not dense_tiles(64, num_cols, depth, HELD) and not dense_tiles(513, num_cols, depth, HELD)
    for num_rows, tile in dense.MEASURED.get((num_cols, depth), {}).items():
        assert tile in dense_tiles(num_rows, num_cols, depth, HELD)


def test_what_a_launch_should_cost():
    """256 rows of q, k, v: 128 programs instead of 96, each with half of K."""
    whole, halves = DenseTile(128, 2, False, 1), DenseTile(192, 2, False, 2)
    assert whole.clusters(256, 6144) == (48, 48) and halves.clusters(256, 6144) == (32, 64)
    assert predicted_us(halves, 256, 6144, 4096) < 24 < predicted_us(whole, 256, 6144, 4096)
    assert DenseTile(256, 2, False, 4) == dense_tiles(256, 4096, 14336, HELD)[0]


@pytest.mark.parametrize("every", [60, pytest.param(8, marks=pytest.mark.slow)], ids=["some", "many"])
def test_every_launch_compiles_without_spills(every):
    nvrtc = pytest.importorskip("cuda.bindings.nvrtc", reason="needs pip install 'kvarena[gpu]'")
    try:
        nvrtc_major(nvrtc)
    except OSError as error:
        pytest.skip(str(error))
    tiles = {t for rows in (128, 256) for cols, depth in PRODUCTS for t in dense_tiles(rows, cols, depth, HELD)}
    for tile in sorted(tiles)[::every]:
        for mode in ("STORE", "ADD"):
            text = kernel_source("wide_dense", tile.constants(mode), tile.cols)
            _, said = compile_source(nvrtc, text)
            assert " 0 bytes spill stores, 0 bytes spill loads" in said and "warning" not in said, (tile, said)


def test_products_go_to_it_where_it_was_measured(monkeypatch):
    calls = []

    class Dense:
        def __init__(self, kernels):
            pass

        def __call__(self, x, weight, tile, *, residual, out):
            calls.append((x, tile, residual, out))
            return x

    class Kernels:
        num_multiprocessors = H200

    monkeypatch.setattr(hopper_products, "load_hopper_kernels", lambda device: Kernels())
    monkeypatch.setattr(hopper_products, "DenseGemm", Dense)
    monkeypatch.setattr(hopper_products, "rms_norm", lambda x, weight, eps: rms_norm(x, Norm(weight, eps)))
    products, tile = HopperProducts("cuda"), DenseTile(64, 2, False, 2)
    x, weight, y = operands(300, 2048, 512)
    norm = Norm(torch.rand(512).bfloat16(), 1e-5)
    assert products(Product(x, Linear(weight, None), residual=y, out=y)) is None, "nothing was measured"
    monkeypatch.setattr(dense, "MEASURED", {(2048, 512): {384: tile}})
    assert products(Product(x, Linear(weight, None), residual=y, out=y)) is x
    assert products(Product(x, Linear(weight, None), norm)) is not None
    assert calls[0] == (x, tile, y, y) and calls[1][1:] == (tile, None, None)
    assert torch.equal(calls[1][0], rms_norm(x, norm))
    assert products(Product(x, Linear(weight, None), norm, glu=True)) is None
    assert products(Product(x[:200], Linear(weight, None))) is None
    apart = torch.zeros(300, 2052, dtype=torch.bfloat16)[:, :2048]
    assert products(Product(x, Linear(weight, None), out=apart)) is None, "rows that are no multiple of 16 bytes apart"
    assert len(calls) == 2


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize("num_rows", [65, 128, 200, 384])
@pytest.mark.parametrize(("num_cols", "depth"), [*PRODUCTS, (2568, 1024)])
def test_on_a_gpu(num_rows, num_cols, depth):
    kernels = load_hopper_kernels("cuda")
    gemm = DenseGemm(kernels)
    x, weight, y = operands(num_rows, num_cols, depth, "cuda")
    plain = x.double() @ weight.double().t()
    for tile in dense_tiles(num_rows, num_cols, depth, kernels.num_multiprocessors // 2)[:2]:
        results = []
        for overlap in (True, False, True):
            out = y.clone()
            got = gemm(x, weight, tile, residual=out, out=out, overlap=overlap)
            assert got is out
            results.append((gemm(x, weight, tile, overlap=overlap), out))
        for one, two, three, expected in zip(*results, (plain, plain + y.double()), strict=True):
            assert torch.equal(one, two) and torch.equal(one, three), tile
            assert (one.double() - expected).norm() <= 5e-3 * expected.norm(), tile
