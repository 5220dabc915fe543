"""The wide gated product of any number of rows: its text on a CPU, which launches there are, and on a GPU."""

import struct

import pytest
import torch
from on_host import OnHost

from kvarena.engine.kernels.gemm import wide
from kvarena.engine.kernels.gemm.wide import WideGemm, WideTile, best_wide_tile, wide_tile
from kvarena.engine.kernels.hopper import load_hopper_kernels

H200 = 132
needs_hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="wgmma is Hopper's"
)


def operands(num_rows, num_cols, depth, device="cpu"):
    torch.manual_seed(num_rows)
    kind = {"device": device, "dtype": torch.bfloat16}
    return torch.randn(num_rows, depth, **kind), torch.randn(2 * num_cols, depth, **kind) / depth**0.5


def exact(x, weight):
    gate, up = (x.double() @ weight.double().t()).chunk(2, dim=1)
    return torch.nn.functional.silu(gate) * up


@pytest.fixture(scope="module")
def on_host(tmp_path_factory):
    """Runs launches of the kernel on a CPU: of narrow tiles, two items beside each other."""
    shared = (
        (r"__shared__ Place places\[[^;]*;", "Place* places = shared_array<Place>(512);"),
        (r"constexpr int BAND = 8;", "constexpr int BAND = 2;"),
    )
    programs = OnHost(tmp_path_factory.mktemp("host"), "wide_gemm", "wide_on_host_main.cpp", shared)

    def run(x, weight, y, tile, *, clusters):
        num_cols, depth = len(weight) // 2, x.shape[1]
        constants = tile.constants() | {"STAGES": 3, "THREADS": 384, "MULTIPLYING": 256}
        constants |= {"CLUSTER": tile.cluster, "AT_ONCE": tile.cluster}
        sizes = (clusters * tile.cluster, len(x), num_cols, -(-2 * num_cols // tile.cols), depth // 64, depth)
        raw = [t.contiguous().view(torch.uint8).numpy().tobytes() for t in (x, weight, y)]
        wrote = programs(constants, struct.pack("6i", *sizes) + b"".join(raw))
        y.copy_(torch.frombuffer(wrote, dtype=torch.bfloat16).view(y.shape))

    return run


# Rows, columns, depth, programs of a cluster, clusters: less than an item, whole bands and a part of one.
CASES = [(1300, 40, 256, 2, 3), (70, 40, 512, 1, 2), (256, 72, 256, 2, 1), (530, 24, 128, 2, 5)]


@pytest.mark.parametrize("cases", [CASES[:1], pytest.param(CASES[1:], marks=pytest.mark.slow)], ids=["one", "others"])
def test_the_kernels_text_on_a_cpu(on_host, cases):
    """Every wait ends, and every element is written with its sum."""
    for num_rows, num_cols, depth, cluster, clusters in cases:
        x, weight = operands(num_rows, num_cols, depth)
        y = torch.full((num_rows, num_cols), torch.nan, dtype=torch.bfloat16)
        on_host(x, weight, y, WideTile(32, cluster), clusters=clusters)
        torch.testing.assert_close(y.double(), exact(x, weight), rtol=2**-7, atol=1e-3)


def test_more_rows_have_a_launch_where_one_was_measured(monkeypatch):
    llama = (28672, 4096)
    monkeypatch.setattr(wide, "MEASURED_FROM", {})
    assert [wide_tile(rows, *llama, H200) is None for rows in (64, 65, 256, 257, 16384)] == [
        True,
        False,
        False,
        True,
        True,
    ]
    monkeypatch.setattr(wide, "MEASURED_FROM", {llama: 1000})
    assert [wide_tile(rows, *llama, H200) is None for rows in (256, 257, 999, 1000, 16384)] == [
        False,
        True,
        True,
        False,
        False,
    ]
    assert wide_tile(16384, 37888, 3584, H200) is None


def test_the_tile_of_many_rows_leaves_no_round_empty():
    assert best_wide_tile(256, 28672, 4096, H200) == WideTile(224, 2), "as of a decode batch"
    for num_rows in (512, 2048, 8192, 16384):
        tile = best_wide_tile(num_rows, 28672, 4096, H200)
        items = -(-num_rows // 256)
        tiles = -(-28672 // tile.cols) * items
        assert tile.cluster == 2 and tiles / (-(-tiles // 66) * 66) > 0.9
    assert best_wide_tile(16384, 6144, 1024, H200) is None, "too short a K"


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize("num_rows", [300, 512, 2500])
def test_on_a_gpu(num_rows):
    kernels = load_hopper_kernels("cuda")
    x, weight = operands(num_rows, 14336, 4096, "cuda")
    tile = best_wide_tile(num_rows, 28672, 4096, kernels.num_multiprocessors)
    results = [WideGemm(kernels)(x, weight, tile, overlap=overlap) for overlap in (True, False)]
    expected = exact(x, weight)
    assert (results[0].double() - expected).norm() <= 5e-3 * expected.norm()
    assert torch.equal(*results)
