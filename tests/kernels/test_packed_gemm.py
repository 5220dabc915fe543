"""The product with a packed weight against float64, in Triton's interpreter and, where there is one, on a GPU."""

from itertools import product

import pytest
import torch
from cards import few_on_a_card
from packed_checkpoints import quantise

from kvarena.engine.kernels.gemm.packed import PackedTile, packed_gemm, packed_tile
from kvarena.engine.kernels.gemm.packed_experts import expert_blocks, packed_experts
from kvarena.engine.quantization import products
from kvarena.engine.quantization.products import PackedProduct, PlainProduct, TritonProduct
from kvarena.engine.quantization.weight import PackedWeight, join, pack_codes, unpack_codes

NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
# Groups of inputs, symmetric, act-order.
PACKINGS = list(product((32, 64, 128, -1), (False, True), (False, True)))
DEVICES = ["cpu", pytest.param("cuda", marks=(pytest.mark.gpu, NO_GPU))]


def packed(weight, group_size, *, symmetric=False, act_order=False, device="cpu"):
    """A weight in 4 bits, and what it stands for in float64."""
    q = quantise(weight, group_size, symmetric=symmetric, act_order=act_order)
    order = torch.argsort(q.groups, stable=True)
    codes = pack_codes(q.codes[order].t().contiguous().to(torch.uint8))
    size = weight.shape[1] if group_size == -1 else group_size
    made = PackedWeight(
        codes.to(device), q.scales.to(device), None if symmetric else q.zeros.to(torch.uint8).to(device),
        order.int().to(device) if act_order else None, size,
    )  # fmt: skip
    return made, q.weight.to(device)


def error(got, want):
    return float((got.double() - want).norm() / want.norm())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("group_size", "symmetric", "act_order"), few_on_a_card(PACKINGS, PACKINGS[1::5]))
def test_products_equal_float64_of_the_dequantised_weight(group_size, symmetric, act_order, device):
    torch.manual_seed(0)
    num_inputs = 200 if group_size == -1 else 256  # a tile of inputs is not full where one group holds all
    weight, exact = packed(
        torch.randn(40, num_inputs), group_size, symmetric=symmetric, act_order=act_order, device=device
    )
    assert error(weight.dequantize(), exact) < 1e-6
    for num_rows in (1, 33):
        x = torch.randn(num_rows, num_inputs, device=device)
        bias, residual = torch.randn(40, device=device), torch.randn(num_rows, 40, device=device)
        want = x.double() @ exact.t() + bias.double() + residual.double()
        got = TritonProduct(weight)(x, bias, residual, residual)
        assert got is residual
        assert error(got, want) < 1e-6


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("dtype", "bar"), [(torch.float16, 5e-4), (torch.bfloat16, 4e-3)])
def test_sixteen_bits_round_the_result_alone(dtype, bar, device):
    """No weight is rounded to 16 bits: the error is that of storing y, whatever the scales are."""
    torch.manual_seed(1)
    weight, exact = packed(torch.randn(64, 256), 64, device=device)
    x = torch.randn(70, 256, device=device).to(dtype)
    want = x.double() @ exact.t()
    assert error(TritonProduct(weight)(x, None, None, None), want) < bar
    assert bar / 5 < error(want.to(dtype), want) < bar


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("codes", ["int8", "fp8"])
def test_eight_bits(codes, device):
    torch.manual_seed(2)
    x, scales = torch.randn(3, 96, device=device), torch.rand(1, 24, device=device).half()
    if codes == "fp8":
        values, zeros = torch.randn(24, 96, device=device).to(torch.float8_e4m3fn), None
    else:
        values = torch.randint(-128, 128, (24, 96), dtype=torch.int8, device=device)
        zeros = torch.randint(-128, 128, (1, 24), dtype=torch.int8, device=device)
    weight = PackedWeight(values, scales, zeros, None, 96)
    exact = (values.double() - (0 if zeros is None else zeros.double().t())) * scales.double().t()
    assert error(weight.dequantize(), exact) < 1e-6
    assert error(TritonProduct(weight)(x, None, None, None), x.double() @ exact.t()) < 1e-6


def test_strided_rows_and_every_launch():
    torch.manual_seed(3)
    weight, exact = packed(torch.randn(40, 128), 32)
    x = torch.randn(130, 2, 128)[:, 1]
    for num_rows in (1, 17, 40, 130):
        tile = packed_tile(num_rows, 128, 32)
        out = torch.full((num_rows, 48), torch.nan)[:, :40]
        got = packed_gemm(x[:num_rows], weight.codes, weight.scales, weight.zeros, 32, out=out, tile=tile)
        assert got is out
        assert error(out, x[:num_rows].double() @ exact.t()) < 1e-6
    assert packed_gemm(x[:0], weight.codes, weight.scales, weight.zeros, 32).shape == (0, 40)


def test_a_tile_of_inputs_lies_in_one_group():
    for num_rows in (1, 32, 64, 1000):
        for group_size in (32, 64, 96, 128, 160):
            assert group_size % packed_tile(num_rows, 4096, group_size).depth == 0
        assert isinstance(packed_tile(num_rows, 4096, 4096), PackedTile)
        assert packed_tile(num_rows, 4096, 24) is None


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize(("num_tokens", "rows"), [(1, 16), (9, 16), (40, 32)])
def test_each_slot_meets_the_weight_of_its_expert(num_tokens, rows, act_order, device):
    torch.manual_seed(6)
    num_experts, top_k = 5, 2
    experts = [packed(torch.randn(24, 64), 32, act_order=act_order, device=device) for _ in range(num_experts)]
    scores = torch.randn(num_tokens, num_experts, device=device)
    scores[:, 3] = -9  # one that nobody chooses
    chosen = scores.topk(top_k).indices
    blocks = expert_blocks(chosen, num_experts, rows)
    x = torch.randn(num_tokens, 64, device=device)
    fields = [
        None if getattr(experts[0][0], name) is None else torch.stack([getattr(w, name) for w, _ in experts])
        for name in ("codes", "scales", "zeros", "order")
    ]
    got = packed_experts(x, *fields, 32, blocks, num_slots=chosen.numel(), top_k=top_k)
    exact = torch.stack([weight for _, weight in experts])[chosen.flatten()]
    want = torch.einsum("snk,sk->sn", exact, x.double().repeat_interleave(top_k, 0))
    assert error(got, want) < 1e-6
    assert len(blocks.experts) <= chosen.numel()
    again = packed_experts(x.repeat_interleave(top_k, 0), *fields, 32, blocks, num_slots=chosen.numel(), top_k=1)
    assert torch.equal(again, got)


def test_weights_of_one_input_join_and_others_do_not():
    torch.manual_seed(4)
    (a, wa), (b, wb) = packed(torch.randn(16, 64), 32), packed(torch.randn(24, 64), 32, symmetric=True)
    both = join([a, b])
    assert both.shape == (40, 64)
    assert error(both.dequantize(), torch.cat([wa, wb])) < 1e-6
    assert error(both.select_rows(slice(8, 30)).dequantize(), torch.cat([wa, wb])[8:30]) < 1e-6
    rows = torch.tensor([39, 0, 5])
    assert error(both.select_rows(rows).dequantize(), torch.cat([wa, wb])[rows]) < 1e-6
    ordered, _ = packed(torch.randn(16, 64), 32, act_order=True)
    wider, _ = packed(torch.randn(16, 64), 64)
    for other in (ordered, wider):
        assert join([a, other]) is None
    assert b.without_zeros() is b and a.without_zeros().zeros is not None


def test_packed_weights_take_the_bytes_that_are_said():
    weight, _ = packed(torch.randn(64, 256), 32)
    assert weight.num_bytes == 64 * 256 // 2 + 2 * 64 * 8 + 64 * 8
    made = PackedProduct(weight)
    assert made.num_bytes == weight.num_bytes
    assert made.kernel == "Plain"
    assert made.settle(torch.float16) is None
    assert made.kernel == "Plain"  # a CPU has no kernel for it
    assert isinstance(made._product, PlainProduct)


def test_codes_are_packed_and_unpacked_alike():
    codes = torch.arange(64, dtype=torch.uint8).view(2, 32) % 16
    words = pack_codes(codes)
    assert words.shape == (2, 4)
    assert int(words[0, 0]) & 0xFFFFFFFF == 0x76543210
    assert torch.equal(unpack_codes(words), codes)


@pytest.mark.gpu
@NO_GPU
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("group_size", "symmetric", "act_order"), few_on_a_card(PACKINGS, PACKINGS[9:10]))
def test_humming_products_equal_float64(group_size, symmetric, act_order, dtype, monkeypatch):
    pytest.importorskip("humming")
    monkeypatch.setattr(products, "hopper_product", lambda *_, **__: None)  # on Hopper, ours comes first
    torch.manual_seed(5)
    weight, exact = packed(
        torch.randn(512, 1024) * 0.02, group_size, symmetric=symmetric, act_order=act_order, device="cuda"
    )
    made = PackedProduct(weight)
    assert made.settle(dtype) is None
    assert made.kernel == "Humming"
    for num_rows in (1, 8, 64):
        x = torch.randn(num_rows, 1024, device="cuda", dtype=dtype)
        assert error(made(x), x.double() @ exact.t()) < 0.01
