"""The CPU's compiled kernels between a layer's products, its draw, and how they are kept on disk."""

import os
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch

from kvarena.engine.cpu import panels, product, simd
from kvarena.engine.cpu.blocks import top_of, weigh
from kvarena.engine.cpu.compiler import kernel
from kvarena.engine.cpu.draw import draw_kernel
from kvarena.engine.cpu.simd import BF16, F16, F32, I64, KINDS, LANES, exp, narrow, pointer, tanh, widen
from kvarena.engine.fusions import cpu_ops
from kvarena.engine.fusions.cpu_ops import CpuOps
from kvarena.engine.fusions.ops import Angles, HeadNorms, Heads, Linear, Norm, TorchOps
from kvarena.engine.fusions.panels import PanelLinear, Panels
from kvarena.engine.sampling.streams import log_exponentials, stream_keys

ROOT = Path(__file__).resolve().parents[2]
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 0.02, torch.float16: 2e-3}


@kernel("3q")
def converted(args):
    """float16 and bfloat16 of each float32, as integers."""
    a = pointer(args, I64)
    x, half, brain = pointer(a[0], F32), pointer(a[1], F16), pointer(a[1] + 2 * a[2], BF16)
    for i in range(a[2]):
        half[i] = narrow(x[i], half[0])
        brain[i] = narrow(x[i], brain[0])


def widened(args):
    a = pointer(args, I64)
    half, brain, out = pointer(a[0], F16), pointer(a[0], BF16), pointer(a[1], F32)
    for i in range(a[2]):
        out[i] = widen(half[i])
        out[a[2] + i] = widen(brain[i])


@kernel("3q")
def functions(args):
    a = pointer(args, I64)
    x, out = pointer(a[0], F32), pointer(a[1], F32)
    for i in range(a[2]):
        out[i] = exp(x[i])
        out[a[2] + i] = tanh(x[i])


@kernel("2q")
def weighed(args):
    a = pointer(args, I64)
    x, out = pointer(a[0], F32), pointer(a[1], F32)
    out[0] = top_of(x, out[0], 64, LANES)
    out[1] = weigh(x, out[0], 64, LANES)


@pytest.mark.parametrize("has_half", [True, False])
def test_sixteen_bit_floats_are_widened_and_rounded_as_torch_does(has_half, monkeypatch):
    raw = torch.arange(2**16, dtype=torch.int32).to(torch.int16)
    wide = torch.empty(2, 2**16)
    monkeypatch.setattr(simd, "HAS_HALF", has_half and simd.HAS_HALF)
    # Two functions, so that neither is read from where the other is kept.
    kernel("3q")(widened if has_half else types.FunctionType(widened.__code__.replace(co_name="otherwise"), globals()))(
        1, raw.data_ptr(), wide.data_ptr(), 2**16
    )
    for got, dtype in zip(wide, (torch.float16, torch.bfloat16), strict=True):
        expected = raw.view(dtype).float()
        assert torch.equal(got.nan_to_num(7.0), expected.nan_to_num(7.0))
        assert torch.equal(got.isnan(), expected.isnan())
    generator = torch.Generator().manual_seed(0)
    random = torch.randint(-(2**31), 2**31, (2**16,), generator=generator).to(torch.int32).view(torch.float32)
    middle = wide[0] + wide[0].roll(-1)  # ties between neighbours
    for x in (random, wide[0], middle / 2, torch.randn(2**16, generator=generator) * 2.0**-14):
        out = torch.empty(2, len(x), dtype=torch.int16)
        converted(1, x.data_ptr(), out.data_ptr(), len(x))
        for got, dtype in zip(out, (torch.float16, torch.bfloat16), strict=True):
            assert torch.equal(got.view(dtype).nan_to_num(7.0), x.to(dtype).nan_to_num(7.0))
            assert torch.equal(got.view(dtype).isnan(), x.isnan())


def test_exponentials_are_good_to_rounding():
    x = torch.cat([torch.linspace(-86, 88, 10001), torch.linspace(-1, 1, 1001)])
    out = torch.empty(2, len(x))
    functions(1, x.data_ptr(), out.data_ptr(), len(x))
    assert (out[0].double() / x.double().exp() - 1).abs().max() < 3e-7
    assert (out[1].double() / x.double().tanh() - 1).nan_to_num(0).abs().max() < 5e-7
    special = torch.tensor([torch.nan, -torch.inf])
    functions(1, special.data_ptr(), out.data_ptr(), 2)
    assert out.view(-1)[0].isnan()
    assert out.view(-1)[1] < 1e-37


@pytest.mark.parametrize("before", [-torch.inf, -60.0, 4.0])
def test_weights_of_a_tile(before):
    """Against float64, with scores that are left out (-inf), far below the largest, and NaN."""
    scores = torch.linspace(-80, 3, 64).roll(17)
    scores[40:] = -torch.inf
    scores[7] = -90.0
    top = max(before, scores.max().item())
    expected = (scores - top).double().exp()
    out, weights = torch.tensor([before, 0.0]), scores.clone()
    weighed(1, weights.data_ptr(), out.data_ptr())
    assert out[0] == top
    assert (weights[40:] == 0).all()
    torch.testing.assert_close(weights.double(), expected, rtol=5e-7, atol=1e-37)
    torch.testing.assert_close(out[1].double(), expected.sum(), rtol=5e-7, atol=0)
    scores[3] = torch.nan
    weighed(1, scores.data_ptr(), out.data_ptr())
    assert scores[3].isnan()
    assert out[1].isnan()


@pytest.mark.parametrize("dtype", KINDS)
def test_norm_and_activation(dtype):
    torch.manual_seed(0)
    x, norm = torch.randn(9, 130).to(dtype), Norm(torch.randn(130).to(dtype), 1e-5)
    ops, torch_ops = CpuOps(dtype, dtype), TorchOps()
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(ops.norm(x, norm), torch_ops.norm(x, norm), rtol=tolerance, atol=tolerance)
    x[0, :3] = torch.tensor([-200.0, -88.5, 200.0])
    torch.testing.assert_close(ops.glu(x), torch_ops.glu(x), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize("turn_keys", [False, True])
@pytest.mark.parametrize("with_norms", [False, True])
def test_rotation_and_store(dtype, turn_keys, with_norms):
    torch.manual_seed(0)
    heads, rows = Heads(4, 2, 24), 5
    qkv = torch.randn(rows, 8 * 24).to(dtype)
    angles = torch.rand(rows, 20) * 6
    table = torch.cat([angles[:, :10].cos(), angles[:, 10:].sin()], dim=1)
    norms = HeadNorms(*(Norm(torch.rand(24).to(dtype) + 0.5, 1e-6) for _ in "qk")) if with_norms else None
    slots, results = torch.tensor([3, 0, 7, 11, 4]), []
    for ops in (CpuOps(dtype, dtype), TorchOps()):
        mine, kv = qkv.clone(), torch.zeros(2, 12, 2, 24, dtype=dtype)
        q = ops.rope_store(
            mine, heads, norms, Angles(table[:, :10], table[:, 10:]), slots, (kv[0], kv[1]), turn_keys=turn_keys
        )
        results.append((q, kv, mine[:, 96:] if turn_keys else kv))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize(("width", "depth"), [(4, 16), (36, 48), (96, 352)])
def test_products_of_few_rows(dtype, width, depth):
    torch.manual_seed(0)
    weight = torch.randn(width, depth).to(dtype)
    for rows in (1, 2, 3, 4, 5, 8, 11, 96):
        x, y = torch.randn(rows, depth), torch.randn(rows, width)
        expected = x.double() @ weight.double().t()
        for adds, threads in ((False, 1), (True, 1), (True, 3)):
            got = y.clone()
            product.product_kernel(KINDS[dtype], adds)(
                threads, x.data_ptr(), weight.data_ptr(), got.data_ptr(), rows, width, depth
            )
            torch.testing.assert_close(got.double(), expected + (y if adds else 0), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(("width", "depth"), [(1, 3), (48, 128), (50, 1027), (145, 2060)])
def test_products_with_panels(width, depth):
    """Against float64; a row's product has the same bits whatever rows and threads it comes with."""
    torch.manual_seed(0)
    weight = torch.randn(width, depth)
    held = Panels.of(weight, panels.WIDTH)
    assert torch.equal(held(torch.arange(width)), weight)
    multiply, alone = panels.panel_kernel(), {}
    for rows in (1, 2, 3, 4, 5, 6, 7, 8, 9, 15, 16, 21):
        x, y = torch.randn(21, depth, generator=torch.Generator().manual_seed(1))[:rows], torch.randn(rows, width)
        expected = x.double() @ weight.double().t()
        for adds, threads in ((False, 1), (True, 1), (False, 3), (True, 3)):
            got = torch.cat([y, torch.full((1, width), 7.0)])  # behind the end nothing is written
            multiply(threads, x.data_ptr(), held.data.data_ptr(), got.data_ptr(), rows, width, depth, adds)
            assert (got[rows] == 7).all()
            torch.testing.assert_close(got[:rows].double(), expected + (y if adds else 0), rtol=1e-5, atol=2e-4)
            if not adds:
                for row in range(rows):
                    assert torch.equal(alone.setdefault(row, got[row]), got[row])


@pytest.mark.parametrize("with_bias", [False, True])
def test_linear_layers_in_panels(with_bias):
    torch.manual_seed(0)
    linear = Linear(torch.randn(50, 36), torch.randn(50) if with_bias else None)
    moved, torch_ops = PanelLinear(Panels.of(linear.weight, panels.WIDTH), linear.bias), TorchOps()
    ops = CpuOps(torch.float32, torch.float32)
    assert moved.out_features == 50
    for rows in (1, 6, 97):
        x, residual = torch.randn(rows, 36), torch.randn(rows, 50)
        near = {"rtol": 2e-5, "atol": 2e-5}
        torch.testing.assert_close(ops.linear(x, moved), torch_ops.linear(x, linear), **near)
        for out in (torch.empty(rows, 50), torch.empty(50, rows).t()):
            assert ops.linear(x, moved, out) is out
            torch.testing.assert_close(out, torch_ops.linear(x, linear), **near)
        got = ops.linear_residual(x, moved, residual.clone())
        torch.testing.assert_close(got, torch_ops.linear_residual(x, linear, residual), **near)


@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize(("width", "depth"), [(36, 48), (36, 44), (30, 48)])  # the last two are the library's
@pytest.mark.parametrize("with_bias", [False, True])
def test_linear_layers(dtype, width, depth, with_bias, monkeypatch):
    """As torch's, with and without an instruction of the processor for products of 16 bits."""
    torch.manual_seed(0)
    linear = Linear(torch.randn(width, depth).to(dtype), torch.randn(width).to(dtype) if with_bias else None)
    for has_product in (False, True):
        monkeypatch.setattr(cpu_ops, "_has_product", lambda dtype, has_product=has_product: has_product)
        ops, torch_ops = CpuOps(dtype, dtype), TorchOps()
        for rows in (1, 6, 97):
            x, residual = torch.randn(rows, depth).to(dtype), torch.randn(rows, width).to(dtype)
            near = {"rtol": 10 * TOLERANCE[dtype], "atol": 10 * TOLERANCE[dtype]}
            torch.testing.assert_close(ops.linear(x, linear), torch_ops.linear(x, linear), **near)
            out = torch.empty(rows, width, dtype=dtype)
            assert ops.linear(x, linear, out) is out
            torch.testing.assert_close(out, torch_ops.linear(x, linear), **near)
            got = ops.linear_residual(x, linear, residual.clone())
            torch.testing.assert_close(got, torch_ops.linear_residual(x, linear, residual), **near)


VOCAB = 3000


def draw(logits, temperatures, seeds, positions, rows, threads=1):
    keys = stream_keys(np.array(seeds, dtype=np.uint64), np.array(positions))
    bits = np.array(temperatures, dtype=np.float32).view(np.int32)
    params = np.ascontiguousarray(np.stack([np.array(rows, np.int32), bits, keys[:, 0], keys[:, 1]]))
    last, out = torch.full((max(rows) + 1,), -7), torch.full((len(logits),), -7)
    draw_kernel(KINDS[logits.dtype])(
        threads, logits.data_ptr(), params.ctypes.data, last.data_ptr(), out.data_ptr(), *logits.shape
    )
    return out, last, torch.from_numpy(keys)


@pytest.mark.parametrize("threads", [1, 3])
def test_draw_equals_the_race(threads):
    torch.manual_seed(0)
    count = 64
    logits = 3 * torch.randn(count, VOCAB)
    temperatures = [0.0, 0.6, 1.0, 20.0] * (count // 4)
    out, last, keys = draw(logits, temperatures, range(count), range(count), list(range(count))[::-1], threads)
    race = (logits - logits.max(-1).values[:, None]) / torch.tensor(temperatures)[:, None] - log_exponentials(
        keys, VOCAB
    )
    greedy = torch.tensor(temperatures) == 0
    assert torch.equal(out, torch.where(greedy, logits.argmax(-1), race.argmax(-1)))
    assert torch.equal(last.flip(0), out)


def test_equal_logits_give_the_lowest_token_and_bad_ones_none():
    logits = torch.zeros(4, VOCAB)
    logits[0, [2100, 700, 2900]] = 1.0
    logits[1, 2999] = torch.nan
    logits[2] = -torch.inf
    logits[3, 5] = torch.inf
    out, last, _ = draw(logits, [0, 0.5, 0.5, 0], [1, 2, 3, 4], [0, 0, 0, 0], [3, 0, 2, 1])
    assert out.tolist() == [700, -1, -1, -1]
    assert last.tolist() == [0, 0, 0, 700]


COMPILES = """
from kvarena.engine.cpu.layers import glu_kernel
from kvarena.engine.cpu.simd import F32
glu_kernel(F32)
"""


def test_kernels_are_compiled_once_and_kept_with_the_user(tmp_path):
    """One line while they are compiled, none when they are read back, and nothing beside the sources."""
    before = set((ROOT / "engine").rglob("*.nb?"))
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    lines = [
        subprocess.run(
            [sys.executable, "-c", COMPILES], env=environment, capture_output=True, text=True, check=True
        ).stderr.splitlines()
        for _ in range(2)
    ]
    assert [len(said) for said in lines] == [1, 0], lines
    assert str(tmp_path) in lines[0][0]
    assert list(tmp_path.rglob("*.nbc"))
    assert set((ROOT / "engine").rglob("*.nb?")) == before
