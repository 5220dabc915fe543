"""Weights of 4 bits in the Hopper kernel's layout: the layout here, the kernel on a GPU, and what uses it."""

from itertools import product

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from kvarena.engine.fusions.ops import Linear, Norm, TorchOps
from kvarena.engine.fusions.packed_ops import PackedOps
from kvarena.engine.kernels.gemm.packed_stream import (
    PackedStreamGemm,
    PackedStreamLaunch,
    PackedStreamTile,
    StreamWeight,
    pack_stream,
    packed_stream_tile,
    takes,
)
from kvarena.engine.kernels.hopper import SHARED_BYTES, compile_source, kernel_source, load_hopper_kernels, nvrtc_major
from kvarena.engine.quantization import hopper
from kvarena.engine.quantization.linear import PackedLinear, PackedProjection, prepare_products
from kvarena.engine.quantization.products import PackedProduct
from kvarena.engine.quantization.weight import PackedWeight, pack_codes
from kvarena.engine.runner.step_graphs import decode_buckets

H200 = 132
# Outputs, inputs, gated: Llama-3.1-8B's and Qwen3-0.6B's.
SHAPES = (
    (28672, 4096, True), (4096, 14336, False), (6144, 4096, False), (4096, 4096, False),
    (6144, 1024, True), (1024, 3072, False), (4096, 1024, False), (1024, 2048, False),
)  # fmt: skip
needs_hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="wgmma is Hopper's"
)


def draw(num_outputs, num_inputs, group_size, *, symmetric=False, dtype=torch.float16, device="cpu"):
    """Codes, scales and zeros, and the weight that they stand for in float64."""
    groups = num_inputs // group_size
    codes = torch.randint(0, 16, (num_outputs, num_inputs), dtype=torch.uint8, device=device)
    scales = ((torch.rand(groups, num_outputs, device=device) + 0.5) * num_inputs**-0.5 / 4).to(dtype)
    zeros = None if symmetric else torch.randint(0, 16, (groups, num_outputs), dtype=torch.uint8, device=device)
    shift = 8.0 if zeros is None else zeros.double().t().repeat_interleave(group_size, 1)
    exact = (codes.double() - shift) * scales.double().t().repeat_interleave(group_size, 1)
    return codes, scales, zeros, exact


def error(got, want):
    return float((got.double() - want).norm() / want.norm())


def unpack_stream(weight):
    """The weight of a layout, [N, K] in float64: rows and columns found from the words."""
    (num_outputs, num_inputs), groups = weight.shape, weight.groups
    row, col = torch.arange(num_outputs)[:, None], torch.arange(num_inputs)[None, :]
    at = row
    if weight.glu:
        half = num_outputs // 2
        at = row % half // 8 * 16 + row // half * 8 + row % 8
    chunk, in_row, in_col = weight.chunks[at // 64, col // 128], at % 64, col % 128
    thread = in_row // 16 * 32 + in_row % 8 * 4 + in_col % 8 // 2
    word = chunk.gather(2, ((in_col // 64 * 128 + thread) * 4 + in_col % 64 // 16)[..., None])[..., 0]
    code = word >> 4 * (in_row % 16 // 8 + in_col % 16 // 8 * 2 + in_col % 2 * 4) & 15
    both = chunk.gather(2, (1024 + in_col // (128 // groups) * 64 + in_row)[..., None])[..., 0]
    return (code - (both & 15)).double() * (both & ~15).contiguous().view(torch.float32).double()


GROUPS, DTYPES = (32, 64, 128, 256, 512), (torch.float16, torch.bfloat16)
# Every size plain and gated, the dtypes in turn; all of them with the slow tests.
TURNS = [(size, glu, DTYPES[(i + glu) % 2]) for i, size in enumerate(GROUPS) for glu in (False, True)]
OTHERS = [one for one in product(GROUPS, (False, True), DTYPES) if one not in TURNS]


@pytest.mark.parametrize(
    ("group_size", "glu", "dtype"), [*TURNS, *(pytest.param(*one, marks=pytest.mark.slow) for one in OTHERS)]
)
def test_a_weight_is_unpacked_as_it_was_packed(group_size, glu, dtype):
    torch.manual_seed(0)
    num_outputs = 256 if glu else 200
    codes, scales, zeros, exact = draw(num_outputs, 512, group_size, symmetric=group_size == 64, dtype=dtype)
    assert takes(num_outputs, 512, group_size, len(scales), glu=glu)
    weight = pack_stream(codes, scales, zeros, group_size, glu=glu)
    assert weight.groups == max(1, 128 // group_size)
    assert torch.equal(unpack_stream(weight), exact), "scales of 16 bits are kept exactly"


@pytest.mark.parametrize("group_size", [32, 128])
def test_each_threads_words_are_the_tensor_cores_operand(group_size):
    """What the kernel reads, emulated: fragment i of thread (warp, lane) is rows lane / 4 + 8 (i % 2), columns
    2 (lane % 4) + 8 (i / 2) of 16 rows and 16 columns (PTX, wgmma, operand A in registers)."""
    torch.manual_seed(1)
    codes, scales, zeros, exact = draw(64, 256, group_size)
    weight = pack_stream(codes, scales, zeros, group_size, glu=False)
    chunks, found = weight.chunks.numpy().view(np.uint32), np.zeros((64, 256))
    for chunk, step, thread, i in product(range(2), range(8), range(128), range(4)):
        warp, lane = divmod(thread, 32)
        words = chunks[0, chunk]
        two = int(words[(step // 4 * 128 + thread) * 4 + step % 4]) >> (4 * i) & 0x000F000F
        row, col = 16 * warp + lane // 4 + i % 2 * 8, 128 * chunk + 16 * step + lane % 4 * 2 + i // 2 * 8
        both = words[1024 + 64 * (step * weight.groups // 8) + row]
        scale, zero = float(np.uint32(both & ~np.uint32(15)).view(np.float32)), int(both & 15)
        found[row, col : col + 2] = ((two & 15) - zero) * scale, ((two >> 16) - zero) * scale
    assert np.array_equal(found, exact.numpy())


def test_which_weights_fit():
    assert takes(4096, 4096, 4096, 1, glu=False)
    assert takes(200, 128, 128, 1, glu=False)
    assert not takes(4096, 4000, 32, 125, glu=False), "columns in no whole chunks"
    assert not takes(4096, 3072, 96, 32, glu=False), "a group that ends within a step"
    assert not takes(192, 1024, 128, 8, glu=True), "gate and up in no whole chunks"
    assert not takes(100, 1024, 128, 8, glu=False), "rows of 16-byte multiples"


def launches():
    """Rows of x, outputs, inputs, groups, gated, normed, tile."""
    for (num_outputs, num_inputs, glu), num_rows, groups in product(SHAPES, (1, 8, 16, 32, 33, 64, 200), (1, 2, 4)):
        chunks = torch.empty(-(-num_outputs // 64), num_inputs // 128, 1024 + 64 * groups, device="meta")
        weight = StreamWeight(chunks, (num_outputs, num_inputs), groups, glu)
        for norm in (True,) if glu else (False, True):
            tile = packed_stream_tile(num_rows, weight, H200, norm=norm)
            if tile is not None:
                yield num_rows, num_outputs, num_inputs, groups, glu, norm, tile


def test_launches_fit_into_shared_memory_and_clusters_are_there_at_once():
    found = list(launches())
    assert len(found) == len(SHAPES) * 7 * 3 * 2 - 2 * 7 * 3, "every product has one"
    for num_rows, num_outputs, num_inputs, groups, _, norm, tile in found:
        programs = -(-num_outputs // (64 * tile.blocks)) * -(-num_rows // 64) * tile.parts
        assert tile.parts == 1 or programs <= H200 * tile.per_sm
        assert num_inputs // 128 % tile.parts == 0
        stages = tile.num_stages(num_rows, num_inputs, groups)
        assert stages >= min(2, num_inputs // 128 // tile.parts), "a stage is given back during the next step"
        held = stages * tile.stage_bytes(num_rows, groups) + tile.rest_bytes(num_rows, num_inputs) + 2048
        assert held * tile.per_sm <= SHARED_BYTES
        assert norm or not tile.fuse_norm


@pytest.mark.parametrize("step", [27, pytest.param(1, marks=pytest.mark.slow)], ids=["some", "all"])
def test_every_launch_compiles_without_spills(step):
    nvrtc = pytest.importorskip("cuda.bindings.nvrtc", reason="needs pip install 'kvarena[gpu]'")
    try:
        nvrtc_major(nvrtc)
    except OSError as missing:
        pytest.skip(str(missing))
    sources = {}
    for num_rows, _, num_inputs, groups, glu, norm, tile in launches():
        mode = "GLU" if glu else "STORE" if norm else "ADD"
        constants = PackedStreamLaunch(tile, num_rows, num_inputs, groups, mode, half=bool(groups % 2)).constants()
        sources[tuple(constants.values())] = constants
    for constants in list(sources.values())[::step]:
        _, said = compile_source(nvrtc, kernel_source("stream_gemm", constants, constants["BX"]))
        assert " 0 bytes spill stores, 0 bytes spill loads" in said, (constants, said)
        assert "warning" not in said, (constants, said)
        assert "serialized" not in said, (constants, said)


class EmulatedGemm:
    """The kernel's contract in torch."""

    def __call__(self, x, weight, tile, *, norm=None, eps=0.0, residual=None, out=None, glu=False):
        assert norm is None or tile.fuse_norm
        full = unpack_stream(weight).float()
        x = x.float()
        if norm is not None:
            x = F.rms_norm(x, x.shape[1:], norm.float(), eps)
        y = x @ full.t()
        if glu:
            gate, up = y.chunk(2, dim=1)
            y = F.silu(gate) * up
        elif weight.glu:
            y = y.view(len(y), 2, -1, 8).transpose(1, 2).reshape(y.shape)
        y = y if residual is None else y + residual
        return y if out is None else out.copy_(y)


@pytest.fixture
def device():
    """A device whose kernels are emulated."""
    made = hopper.HopperDevice.__new__(hopper.HopperDevice)
    made.stream = made.wide = EmulatedGemm()
    made.num_multiprocessors = H200
    return made


@pytest.mark.parametrize(
    ("num_rows", "act_order"),
    [(1, False), (40, True), (300, False),
     *(pytest.param(*one, marks=pytest.mark.slow) for one in ((1, True), (40, False), (300, True)))],
)  # fmt: skip
def test_ops_with_a_hopper_product_are_those_of_the_dequantised_weight(device, num_rows, act_order):
    torch.manual_seed(2)
    ops, plain = PackedOps(TorchOps()), TorchOps()
    norm, x = Norm(torch.rand(128) + 0.5, 1e-5), torch.randn(num_rows, 128)
    for gated, with_bias in ((False, False), (False, True), (True, False), (True, True)):
        codes, scales, zeros, _ = draw(128, 128, 32)
        order = torch.randperm(128).int() if act_order else None
        weight = PackedWeight(pack_codes(codes), scales, zeros, order, 32)
        bias = torch.randn(128) if with_bias else None
        made = PackedProduct(weight)
        made.is_gated = gated
        made._product = hopper.HopperProduct(weight, device, gated=gated)
        assert made._product.serves_all_rows
        linear, want = PackedProjection(made, bias), Linear(weight.dequantize(), bias)
        for name, args in (("norm_linear", (norm,)), *((("norm_glu", (norm,)),) if gated else ())):
            got = getattr(ops, name)(x, *args, linear)
            assert torch.allclose(got, getattr(plain, name)(x, *args, want), atol=1e-5), (name, gated, with_bias)
        added, other = torch.ones(num_rows, 128), torch.ones(num_rows, 128)
        assert ops.linear_residual(x, linear, added) is added
        assert torch.allclose(added, plain.linear_residual(x, want, other), atol=1e-5)
    assert made.fused(x[:0], norm, None, None, glu=True).shape == (0, 64)
    assert made(x[:0]).shape == (0, 128)


def test_steps_of_any_rows_have_a_launch_that_is_compiled_ahead():
    for num_outputs, num_inputs, glu in SHAPES[:4]:
        chunks = torch.empty(num_outputs // 64, num_inputs // 128, 1088, device="meta")
        weight, mode = StreamWeight(chunks, (num_outputs, num_inputs), 1, glu), "GLU" if glu else "ADD"

        def kernels(rows, weight=weight, mode=mode):
            for num_rows in rows:
                tile = hopper.hopper_tile(num_rows, weight, H200, norm=weight.glu, glu=weight.glu)
                is_stream = isinstance(tile, PackedStreamTile)
                yield PackedStreamLaunch(tile, num_rows, weight.shape[1], 1, mode).key if is_stream else tile

        ahead = {*kernels((*decode_buckets(256), *hopper.PROMPT_ROWS))}
        assert ahead >= {*kernels(range(1, 9000, 23))}
        assert len(ahead) < 20


@pytest.mark.parametrize(
    ("kind", "act_order"),
    [("gated", False), ("joined", True),
     *(pytest.param(*one, marks=pytest.mark.slow)
       for one in (("gated", True), ("joined", False), ("alone", False), ("alone", True)))],
)  # fmt: skip
def test_what_is_compiled_ahead_is_what_steps_launch(kind, act_order):
    class Noting:
        """Both kernels' contract, without results."""

        def __init__(self):
            self.prepared, self.launched = set(), set()

        def prepare(self, launches):
            self.prepared |= {one.key if isinstance(one, PackedStreamLaunch) else one for one in launches}

        def __call__(self, x, weight, tile, *, norm=None, eps=0.0, residual=None, out=None, glu=False):
            mode, half = "GLU" if glu else "STORE" if residual is None else "ADD", x.dtype == torch.float16
            if isinstance(tile, PackedStreamTile):
                self.launched.add(PackedStreamLaunch(tile, *x.shape, weight.groups, mode, half).key)
            else:
                self.launched.add((tile, weight.groups, mode, half))
            return out

    device = hopper.HopperDevice.__new__(hopper.HopperDevice)
    device.stream, device.wide, device.num_multiprocessors = Noting(), Noting(), H200
    weight = PackedWeight(*(torch.zeros(size, dtype=dtype) for size, dtype in (
        ((1024, 64), torch.int32), ((4, 1024), torch.float16))), None,
        torch.arange(512).int() if act_order else None, 128)  # fmt: skip
    made = PackedProduct(weight)
    made.is_gated = kind == "gated"
    made._product = hopper.HopperProduct(weight, device, gated=made.is_gated)
    layers = torch.nn.ModuleList()
    for rows in (slice(0, 512), slice(512, 1024)) if kind != "alone" else (None,):
        layer = PackedLinear.__new__(PackedLinear)
        torch.nn.Module.__init__(layer)
        layer.share(made, rows)
        layers.append(layer)
    counts = (1, 8, 24, 64, 72, 136, 256, 300)
    prepare_products(layers, torch.float16, counts)
    ops, norm = PackedOps(TorchOps()), Norm(torch.ones(512, dtype=torch.float16), 1e-5)
    for num_rows in counts:
        x, projection = torch.zeros(num_rows, 512, dtype=torch.float16), PackedProjection(made, None)
        if kind == "gated":
            ops.norm_glu(x, norm, projection)
        elif kind == "joined":
            ops.norm_linear(x, norm, projection)
        else:
            ops.linear_residual(x, projection, torch.zeros(num_rows, 1024, dtype=torch.float16))
    for kernel in (device.stream, device.wide):
        assert kernel.prepared == kernel.launched and len(kernel.launched) > 2


def test_a_product_that_differs_is_not_taken(device, monkeypatch):
    codes, scales, zeros, exact = draw(64, 128, 32)
    weight = PackedWeight(pack_codes(codes), scales, zeros, None, 32)
    monkeypatch.setattr(hopper, "_is_for", lambda *_, **__: True)
    monkeypatch.setattr(hopper, "hopper_device", lambda _: device)
    for factor, taken in ((1.0, True), (1.1, False)):
        found = hopper.hopper_product(
            weight, torch.float32, lambda x, *_, f=factor: f * (x @ exact.t().to(x.dtype)), gated=False
        )
        assert (found is not None) is taken


# Groups of inputs, gated, type of x; the second part by the thorough test alone.
SETTINGS = (
    (32, False, torch.bfloat16),
    (64, True, torch.bfloat16),
    (128, False, torch.float16),
    (512, True, torch.bfloat16),
)
ALL_SETTINGS = tuple(product((32, 64, 128, 512), (False, True), (torch.bfloat16, torch.float16)))
TILES = ((1, 2, True), (2, 1, True), (4, 1, False), (1, 4, False))


def launches_on_card(group_size, glu, dtype):
    """Rows of x and launch, of a weight of 1,024 inputs; few programs want more rows of w than a tile has."""
    for num_rows, (blocks, parts, normed) in product((1, 8, 20, 130), TILES):
        tile = PackedStreamTile(blocks, parts, 1, normed and num_rows <= 32)
        mode, half = "GLU" if glu else "ADD", dtype == torch.float16
        yield PackedStreamLaunch(tile, num_rows, 1024, max(1, 128 // group_size), mode, half)


@pytest.fixture(scope="module")
def on_card():
    """The kernel for this card, the launches of the tests compiled at once."""
    gemm = PackedStreamGemm(load_hopper_kernels("cuda"))
    gemm.prepare(launch for setting in SETTINGS for launch in launches_on_card(*setting))
    return gemm


def check_on_card(gemm, group_size, glu, dtype):
    torch.manual_seed(3)
    num_outputs, depth = 384 if glu else 200, 1024
    codes, scales, zeros, exact = draw(num_outputs, depth, group_size, symmetric=group_size == 32, device="cuda")
    weight = pack_stream(codes, scales, zeros, group_size, glu=glu)
    for launch in launches_on_card(group_size, glu, dtype):
        num_rows, tile = launch.num_rows, launch.tile
        x, scale = torch.randn(num_rows, depth, device="cuda", dtype=dtype), torch.rand(depth, device="cuda").to(dtype)
        residual = torch.randn(num_rows, num_outputs, device="cuda", dtype=dtype)
        wide = F.rms_norm(x.double(), (depth,), scale.double(), 1e-5) if tile.fuse_norm else x.double()
        want = wide @ exact.t()
        want = F.silu(want[:, : num_outputs // 2]) * want[:, num_outputs // 2 :] if glu else want + residual.double()
        got = gemm(
            x, weight, tile, norm=scale if tile.fuse_norm else None, eps=1e-5, residual=None if glu else residual,
            out=torch.full_like(want, torch.nan, dtype=dtype), glu=glu,
        )  # fmt: skip
        assert error(got, want) < 5e-3, (num_rows, tile)


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize(("group_size", "glu", "dtype"), SETTINGS)
def test_products_equal_float64(on_card, group_size, glu, dtype):
    check_on_card(on_card, group_size, glu, dtype)


@pytest.mark.gpu
@pytest.mark.slow
@needs_hopper
@pytest.mark.parametrize(("group_size", "glu", "dtype"), ALL_SETTINGS)
def test_products_of_all_settings_equal_float64(on_card, group_size, glu, dtype):
    on_card.prepare(launches_on_card(group_size, glu, dtype))
    check_on_card(on_card, group_size, glu, dtype)


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("act_order", [False, True])
def test_settled_products_equal_float64_for_any_rows(act_order, gated):
    torch.manual_seed(4)
    codes, scales, zeros, exact = draw(512, 1024, 128, device="cuda")
    order = torch.randperm(1024, device="cuda").int() if act_order else None
    weight = PackedWeight(pack_codes(codes), scales, zeros, order, 128)
    if order is not None:
        exact = torch.empty_like(exact).index_copy_(1, order.long(), exact)
    made = PackedProduct(weight)
    made.is_gated = gated
    assert made.settle(torch.bfloat16) is None
    assert made.kernel == "Hopper"
    for num_rows in (1, 65, 200, 1000):
        x = torch.randn(num_rows, 1024, device="cuda", dtype=torch.bfloat16)
        residual = torch.randn(num_rows, 512, device="cuda", dtype=torch.bfloat16)
        want = x.double() @ exact.t() + residual.double()
        assert error(made(x, residual=residual, out=torch.empty_like(residual)), want) < 6e-3, num_rows
