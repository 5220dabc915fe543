"""The skinny GEMM against float64, in Triton's interpreter, and the table that picks its launches."""

import itertools

import pytest
import torch
from torch.nn import functional as F

from kvarena.engine.fusions.ops import Angles, HeadNorms, Heads, Linear, Norm, TorchOps, split_heads
from kvarena.engine.fusions.triton_ops import TritonOps
from kvarena.engine.kernels.gemm.glu import GluTile, gated_product, glu_tile
from kvarena.engine.kernels.gemm.skinny import GemmConfig, SkinnyGemm
from kvarena.engine.kernels.gemm.table import GemmTable, Product

EPS = 1e-5


def reference(x, weight, bias, norm, residual, glu):
    x, weight = x.double(), weight.double()
    if norm is not None:
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS) * norm.double()
    y = F.linear(x, weight, None if bias is None else bias.double())
    if glu:
        gate, up = y.chunk(2, dim=-1)
        y = F.silu(gate) * up
    return y if residual is None else y + residual.double()


@pytest.fixture(scope="module")
def gemm():
    return SkinnyGemm("cpu", upcast=True)


@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["half", "every"])
@pytest.mark.parametrize(("num_rows", "use_dot"), [(1, False), (1, True), (5, True), (17, True)])
@pytest.mark.parametrize("split_k", [1, 3])
def test_every_combination_of_what_is_folded_in(gemm, num_rows, use_dot, split_k, every):
    """Half of the combinations, in which any three meet; the others with the other split; all in `make test-all`."""
    torch.manual_seed(0)
    num_cols, depth = 40, 200  # neither fills its tiles
    config = GemmConfig(16, 64, split_k, use_dot=use_dot)
    for combination in itertools.product((False, True), repeat=4):
        if not every and sum(combination) % 2 != (split_k == 3):
            continue
        with_bias, with_norm, with_residual, glu = combination
        x = torch.randn(num_rows, depth)
        weight = torch.randn(num_cols * (1 + glu), depth)
        bias = torch.randn(len(weight)) if with_bias else None
        norm = torch.randn(depth) if with_norm else None
        residual = torch.randn(num_rows, num_cols) if with_residual else None
        out = torch.full((num_rows, num_cols), torch.nan)
        got = gemm(x, weight, config, bias=bias, norm=norm, eps=EPS, residual=residual, glu=glu, out=out)
        expected = reference(x, weight, bias, norm, residual, glu)
        assert got is out
        assert (got - expected).norm() <= 1e-5 * expected.norm(), (with_bias, with_norm, with_residual, glu)


def test_strided_rows_and_a_residual_in_place(gemm):
    torch.manual_seed(1)
    x = torch.randn(3, 2, 128)[:, 1]
    weight = torch.randn(32, 256)[:, 64:192]
    residual = torch.randn(3, 64)[:, :32]
    expected = reference(x, weight, None, None, residual.clone(), False)
    gemm(x, weight, GemmConfig(16, 64, 2), residual=residual, out=residual)
    assert torch.allclose(residual.double(), expected, atol=1e-4)


def test_bfloat16(gemm):
    torch.manual_seed(2)
    x, weight = torch.randn(4, 128).bfloat16(), torch.randn(32, 128).bfloat16()
    expected = reference(x, weight, None, None, None, False)
    got = gemm(x, weight, GemmConfig(16, 64, 2))
    assert got.dtype == torch.bfloat16
    assert (got.double() - expected).norm() <= 1e-2 * expected.norm()


def test_table_prefers_what_was_measured():
    measured = {Product(16, 64, 128, False): GemmConfig(32, 64, 2), Product(32, 64, 128, False): None}
    table = GemmTable(max_rows=64, measured=measured)
    assert table.find(9, 64, 128) == GemmConfig(32, 64, 2)
    assert table.find(30, 64, 128) is None
    assert table.find(65, 64, 128) is None
    assert table.find(33, 4096, 4096) is None
    assert table.find(1, 4096, 100) is None, "a depth that is no multiple of the loop's step goes to the library"


@pytest.mark.parametrize("num_rows", [1, 2, 16, 32])
@pytest.mark.parametrize(("cols", "depth", "glu"), [(6144, 4096, False), (28672, 4096, True), (1024, 3072, False)])
def test_guessed_launches_are_possible(gemm, num_rows, cols, depth, glu):
    config = GemmTable(max_rows=64, measured={}).find(num_rows, cols, depth, glu=glu)
    assert config.use_dot == (num_rows > 1)
    assert gemm.fits(num_rows, cols, config, glu=glu)
    assert depth // config.split_k >= config.block_k


def test_a_rank_s_half_of_a_large_product_is_launched_like_the_whole():
    table = GemmTable(max_rows=64)
    for rows, cols, glu in ((1, 28672, True), (1, 128256, False), (32, 128256, False)):
        assert table.find(rows, cols // 2, 4096, glu=glu) == table.find(rows, cols, 4096, glu=glu)


@pytest.mark.parametrize(
    ("with_table", "num_rows"),
    [(True, 1), (False, 3), (True, 20),
     *(pytest.param(*one, marks=pytest.mark.slow)
       for one in ((False, 1), (True, 3), (False, 20), (True, 70), (False, 70)))],
)  # fmt: skip
def test_ops_equal_torch(num_rows, with_table):
    torch.manual_seed(3)
    table = GemmTable(max_rows=64, measured={}) if with_table else None
    fused, plain = TritonOps("cpu", table, upcast=True), TorchOps()
    hidden, inner, heads = 128, 128, Heads(4, 2, 16)  # with a table, 9 rows and more take the gated product
    norm = Norm(torch.randn(hidden), EPS)
    qkv = Linear(torch.randn(8 * 16, hidden), torch.randn(8 * 16))
    gate_up, down = (
        Linear(torch.randn(2 * inner, hidden), None),
        Linear(torch.randn(hidden, inner), torch.randn(hidden)),
    )
    head_norms = HeadNorms(Norm(torch.randn(16), EPS), Norm(torch.randn(16), EPS))
    residual = torch.randn(num_rows, hidden)
    slots = torch.randperm(80)[:num_rows]
    both = torch.randn(num_rows, 16)
    angles = Angles(both[:, :8], both[:, 8:])
    results = []
    for ops in (fused, plain):
        keys, values = torch.zeros(2, 80, 2, 16)
        stream = residual.clone()
        projected = ops.norm_linear(stream, norm, qkv)
        q = ops.rope_store(projected, heads, head_norms, angles, slots, (keys, values), turn_keys=True)
        turned = split_heads(projected, heads)[1]
        act = ops.norm_glu(stream, norm, gate_up)
        normed = ops.linear_glu(ops.norm(stream, norm), gate_up)
        results.append((q.clone(), turned.clone(), keys, values, act, normed, ops.linear_residual(act, down, stream)))
    for got, expected in zip(*results, strict=True):
        assert torch.allclose(got, expected, rtol=1e-4, atol=1e-3 * float(expected.abs().max()))


@pytest.mark.parametrize(("num_rows", "dtype"), [(9, torch.float32), (40, torch.float32), (40, torch.bfloat16)])
def test_gated_product(num_rows, dtype):
    torch.manual_seed(4)
    x, weight = torch.randn(num_rows, 80).to(dtype), torch.randn(2 * 40, 80).to(dtype)  # 40 columns: a tile and a half
    got = gated_product(x, weight, GluTile(32, 64, 16, num_warps=4, num_stages=2), upcast=True)
    expected = reference(x, weight, None, None, None, True)
    assert got.dtype == dtype
    assert (got - expected).norm() <= (1e-5 if dtype == torch.float32 else 1e-2) * expected.norm()


def test_gated_products_of_one_wave_have_a_tile():
    small, large = (6144, 1024), (28672, 4096)
    for num_rows, programs_per_sm in ((9, 1), (64, 1), (65, 1), (129, 2), (256, 2)):
        tile = glu_tile(num_rows, *small, 132)
        assert tile.programs_per_sm == programs_per_sm
        assert -(-small[0] // tile.cols) * -(-num_rows // tile.rows) <= 132 * programs_per_sm
        assert glu_tile(num_rows, *large, 132) is None, "more than a wave"
    assert glu_tile(8, *small, 132) is None
    assert glu_tile(257, *small, 132) is None
    assert glu_tile(32, 6144, 1000, 132) is None, "a depth that is no multiple of the loop's step"
    assert glu_tile(32, 6152, 1024, 132) is None, "gate rows that do not come in eights"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="tensor cores and the tensor memory accelerator are a GPU's")
@pytest.mark.parametrize("num_rows", [9, 40, 64, 65, 128, 150, 192, 200, 256])
def test_gated_product_on_a_gpu(num_rows):
    torch.manual_seed(5)
    x = torch.randn(num_rows, 1024, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(6144, 1024, device="cuda", dtype=torch.bfloat16) / 32
    tile = glu_tile(num_rows, 6144, 1024, torch.cuda.get_device_properties(0).multi_processor_count)
    if tile is None:
        pytest.skip("not one wave on this GPU")
    expected = reference(x, weight, None, None, None, True)
    got = gated_product(x, weight, tile)
    assert (got - expected).norm() <= 5e-3 * expected.norm()
