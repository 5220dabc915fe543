"""Store, rotary embedding, norm and activation kernels against float64."""

import pytest
import torch

from kvarena.engine.kernels.activation import gated
from kvarena.engine.kernels.norm import layer_norm, rms_norm
from kvarena.engine.kernels.patches import patch_rows
from kvarena.engine.kernels.rope import rope_store
from kvarena.engine.kernels.store import gather_kv, store_kv

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Two units in the last place: norms round twice, and the interpreter truncates where the GPU rounds.
ULP = {torch.float32: 1e-5, torch.bfloat16: 2.0**-6}


def randn(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(DEVICE)


def assert_close(got, wanted):
    bound = ULP[got.dtype]
    torch.testing.assert_close(got.double(), wanted, rtol=bound, atol=bound)


def rotate(x, cos, sin, rotary_dim):
    """Rotate-half embedding in float64."""
    half = rotary_dim // 2
    x1, x2, rest = x[..., :half], x[..., half:rotary_dim], x[..., rotary_dim:]
    cos, sin = cos.double()[:, None, :half], sin.double()[:, None, :half]
    return torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin, rest], -1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "dim"), [(1, 8), (2, 64), (5, 24)])
def test_store_writes_each_token_to_its_slot(heads, dim, dtype):
    k, v = randn(6, heads, dim, dtype=dtype), randn(heads, 6, dim, dtype=dtype, seed=1).transpose(0, 1)
    keys, values = randn(20, heads, dim, dtype=dtype, seed=2), randn(20, heads, dim, dtype=dtype, seed=3)
    before = keys.clone()
    slots = torch.tensor([3, 19, 0, 7, 8, 1], device=DEVICE)
    store_kv(k, v, keys, values, slots)
    assert torch.equal(keys[slots], k) and torch.equal(values[slots], v)
    others = [i for i in range(20) if i not in slots.tolist()]
    assert torch.equal(keys[others], before[others])
    store_kv(k[:0], v[:0], keys, values, slots[:0])
    back = torch.empty_like(k), torch.empty_like(v.transpose(0, 1)).transpose(0, 1)
    gather_kv(*back, keys, values, slots)
    assert torch.equal(back[0], k) and torch.equal(back[1], v)


def rope_bound(x, cos, sin, rotary_dim, norm, dtype):
    """How far from the exact `rotate(x)` roundings may lead.

    One rounding is at most u times its result. A norm's two (before its weight and after it) reach both terms of
    x1 cos - x2 sin, which may cancel, so they count by the terms and not by the difference; the last one counts by
    the result. The GPU rounds to nearest (u = 2^-8 in bfloat16); the interpreter truncates (u = 2^-7).
    """
    unit = 2e-6
    if dtype == torch.bfloat16:
        unit = 2.0**-8 if DEVICE == "cuda" else 2.0**-7
    half = rotary_dim // 2
    x1, x2, rest = x[..., :half].abs(), x[..., half:rotary_dim].abs(), x[..., rotary_dim:].abs()
    c, s = (part.double().abs()[:, None, :half] for part in (cos, sin))
    terms = torch.cat([x1 * c + x2 * s, x2 * c + x1 * s, rest], -1)
    # 2 %: products of roundings, and what float32 adds in between.
    return 1.02 * unit * ((2 if norm else 0) * terms + rotate(x, cos, sin, rotary_dim).abs()) + 1e-6 * terms + 1e-7


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "rotary_dim"), [(4, 2, 32, 32), (6, 2, 24, 24), (3, 3, 16, 8), (8, 1, 80, 32)]
)
def test_rope_store(heads, kv_heads, dim, rotary_dim, norm, dtype):
    tokens = 5
    packed = randn(tokens, (heads + 2 * kv_heads) * dim, dtype=dtype)
    q, k, v = (
        part.view(tokens, -1, dim) for part in packed.split([heads * dim, kv_heads * dim, kv_heads * dim], dim=-1)
    )
    angles = randn(tokens, rotary_dim, seed=4) * 3
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    q_norm, k_norm = (randn(dim, dtype=dtype, seed=seed) for seed in (5, 6))
    keys, values = (torch.zeros(9, kv_heads, dim, dtype=dtype, device=DEVICE) for _ in range(2))
    slots = torch.tensor([8, 2, 3, 1, 5], device=DEVICE)
    out = torch.full((tokens, heads, dim), torch.nan, dtype=dtype, device=DEVICE)

    def wanted(x, weight):
        x = x.double()
        if norm:
            x = x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * weight.double()
        return rotate(x, cos, sin, rotary_dim), rope_bound(x, cos, sin, rotary_dim, norm, dtype)

    (wanted_q, bound_q), (wanted_k, bound_k) = wanted(q, q_norm), wanted(k, k_norm)
    old_k = k.clone()
    norms = {"q_norm": q_norm, "k_norm": k_norm, "epsilon": 1e-5} if norm else {}
    rope_store(
        q,
        k,
        v,
        out,
        cos=cos,
        sin=sin,
        rotary_dim=rotary_dim,
        keys=keys,
        values=values,
        slot_mapping=slots,
        **norms,
    )
    assert ((out.double() - wanted_q).abs() <= bound_q).all()
    assert ((keys[slots].double() - wanted_k).abs() <= bound_k).all()
    assert torch.equal(values[slots], v)
    assert not keys[[0, 4, 6, 7]].any() and not values[[0, 4, 6, 7]].any()
    assert torch.equal(k, old_k)


def test_rope_in_place_and_against_transformers():
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    q, k = randn(3, 4, 16), randn(3, 2, 16, seed=1)
    angles = torch.cat([randn(3, 8, seed=2)] * 2, -1)
    cos, sin = angles.cos(), angles.sin()
    wanted_q, wanted_k = apply_rotary_pos_emb(q.transpose(0, 1)[None], k.transpose(0, 1)[None], cos[None], sin[None])
    keys, values = torch.zeros(2, 3, 2, 16, device=DEVICE)
    slots = torch.arange(3, device=DEVICE)
    rope_store(q, k, k, q, cos=cos, sin=sin, rotary_dim=16, keys=keys, values=values, slot_mapping=slots)
    torch.testing.assert_close(q, wanted_q[0].transpose(0, 1))
    torch.testing.assert_close(keys, wanted_k[0].transpose(0, 1))
    q, v = q.clone(), k.clone()
    rope_store(
        q, k, v, q, cos=cos, sin=sin, rotary_dim=16, keys=keys, values=values, slot_mapping=slots, turn_keys=True
    )
    assert torch.equal(k, keys) and torch.equal(values, v)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [16, 100, 1536])
@pytest.mark.parametrize("add", [False, True])
def test_rms_norm(size, dtype, add):
    x = randn(4, 2 * size, dtype=dtype)[:, :size]
    weight = randn(size, dtype=dtype, seed=1)
    residual = randn(4, size, dtype=dtype, seed=2) if add else None
    total = x + residual if add else x.clone()
    got = rms_norm(x, weight, 1e-5, residual=residual)
    if add:
        assert_close(residual, total.double())
    summed = (residual if add else x).double()
    wanted = summed * (summed.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * weight.double()
    assert got.dtype == dtype
    assert_close(got, wanted)
    assert torch.equal(rms_norm(total, weight, 1e-5, out=total), total)
    assert rms_norm(x[:0], weight, 1e-5).shape == (0, size)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [8, 100, 2500])
def test_gated_activation(size, dtype):
    x = randn(3, 2 * size, dtype=dtype) * 4
    gate, up = x.double().chunk(2, -1)
    got = gated(x)
    assert got.dtype == dtype
    assert_close(got, torch.nn.functional.silu(gate) * up)
    assert gated(x[:0]).shape == (0, size)


def test_activation_of_extreme_values_is_finite():
    x = torch.tensor([[-1e4, 1e4, -90.0, 0.0, 1.0, 1.0, 1.0, 1.0]], device=DEVICE)
    assert gated(x)[0].tolist() == pytest.approx([0.0, 1e4, 0.0, 0.0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("size", "parts"), [(24, None), (32, None), (24, 4), (16, 1)])
def test_layer_norm_of_rows_and_of_neighbours(size, parts, dtype):
    x, offset = randn(2, 5, size, dtype=dtype) + 3, randn(size, seed=1)
    width = size * (parts or 1)
    weight, bias = randn(width, dtype=dtype, seed=2), randn(width, dtype=dtype, seed=3)
    index = None
    rows = x.double() + offset.double()
    if parts is not None:
        index = torch.randint(0, 5, (3, parts), generator=torch.Generator().manual_seed(4), dtype=torch.int32)
        rows = rows[:, index.long()]
        index = index.to(DEVICE)
    wanted = torch.nn.functional.layer_norm(
        rows.reshape(-1, width), (width,), weight.double(), bias.double(), eps=1e-3
    )  # fmt: skip
    got = layer_norm(x, offset, weight, bias, 1e-3, index)
    assert got.dtype == dtype
    assert_close(got, wanted)
    assert layer_norm(x[:0], offset, weight, bias, 1e-3, index).shape == (0, width)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_patch_rows_are_the_operands_of_the_convolution(dtype):
    tiles = torch.randint(0, 256, (2, 3, 12, 12), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    tiles, values = tiles.to(DEVICE), randn(3, 256)
    out = torch.full((2, 9, 56), 7.0, dtype=dtype, device=DEVICE)  # 48 wanted columns
    assert patch_rows(tiles, values, 4, out) is out
    pixels = values[torch.arange(3, device=DEVICE)[:, None, None], tiles.int()]
    wanted = torch.nn.functional.unfold(pixels, 4, stride=4).transpose(1, 2)
    assert_close(out[..., :48].contiguous(), wanted.double())
    assert not out[..., 48:].any()
