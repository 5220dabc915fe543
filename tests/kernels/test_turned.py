"""The product of queries, keys and values that turns and stores them: the kernel's text on a CPU, which launches there
are, what the fused layer makes of it, and the kernel on a GPU."""

import struct

import pytest
import torch
from on_host import OnHost

from kvarena.engine.fusions import hopper_products
from kvarena.engine.fusions.hopper_products import HopperProducts
from kvarena.engine.fusions.ops import Angles, HeadNorms, Heads, HeadSlots, Linear, Norm, TorchOps, rms_norm
from kvarena.engine.fusions.packed_ops import PackedOps
from kvarena.engine.fusions.reducing_ops import ReducingOps
from kvarena.engine.fusions.triton_ops import TritonOps
from kvarena.engine.kernels.gemm import turned
from kvarena.engine.kernels.gemm.stream import StreamTile, row_bucket
from kvarena.engine.kernels.gemm.table import GemmTable
from kvarena.engine.kernels.gemm.turned import HeadsToStore, TurnedGemm, constants_of, turned_tile, turned_tiles
from kvarena.engine.kernels.hopper import SHARED_BYTES, compile_source, kernel_source, load_hopper_kernels, nvrtc_major

H200 = 132
needs_hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="wgmma is Hopper's"
)


class Case:
    """Random operands of a layer's projections: heads of 128, slots in no order."""

    def __init__(self, num_rows, depth, heads, *, normed, device="cpu"):
        torch.manual_seed(num_rows)
        kind = {"device": device, "dtype": torch.bfloat16}
        num_heads, num_kv_heads = heads
        self.heads = Heads(num_heads, num_kv_heads, 128)
        self.x = torch.randn(num_rows, depth, **kind)
        self.weight = torch.randn((num_heads + 2 * num_kv_heads) * 128, depth, **kind) / depth**0.5
        self.norm = Norm(torch.rand(depth, **kind) + 0.5, 1e-5)
        norms = [Norm(torch.rand(128, **kind) + 0.5, 1e-6) for _ in range(2)]
        self.norms = HeadNorms(*norms) if normed else None
        # Of a table of both, as `FusedDecoder.angles` has them: rows are 128 apart.
        both = torch.randn(num_rows, 64, device=device).mul(3)
        both = torch.cat((both.cos(), both.sin()), 1)
        self.angles = Angles(both[:, :64], both[:, 64:])
        self.slots = torch.randperm(2 * num_rows + 5, device=device)[:num_rows]
        self.pool = torch.full((2, 2 * num_rows + 5, num_kv_heads, 128), 768.0, **kind)

    def to_store(self, pool):
        q, k = (None, None) if self.norms is None else self.norms
        return HeadsToStore(
            self.heads.num_heads, *self.angles, self.slots, *pool, *(None if n is None else n.weight for n in (q, k)),
            0.0 if q is None else q.eps,
        )  # fmt: skip

    def head_slots(self, pool):
        return HeadSlots(self.heads, self.norms, self.angles, self.slots, tuple(pool))

    def expected(self, *, fused_norm, norm_first=True):
        """Queries and the pool, in float64 but for the rounding of the product and of a norm that comes before."""
        x = self.x.double()
        if fused_norm:
            x = x * torch.rsqrt(x.square().mean(1, keepdim=True) + self.norm.eps) * self.norm.weight.double()
        elif norm_first:
            x = rms_norm(self.x, self.norm).double()
        qkv = (x @ self.weight.double().t()).bfloat16()
        pool = self.pool.double()
        norms = None if self.norms is None else HeadNorms(*(Norm(n.weight.double(), n.eps) for n in self.norms))
        angles = Angles(*(a.double() for a in self.angles))
        q = TorchOps().rope_store(qkv.double(), self.heads, norms, angles, self.slots, tuple(pool))
        return q, pool


@pytest.fixture(scope="module")
def on_host(tmp_path_factory):
    """Runs launches of the kernel on a CPU."""
    shared = (
        (r"__shared__ float squares\[CK\]", "auto* squares = shared_array<float[2 * BX]>(512); //"),
        (r"__shared__ float head_squares\[4\]", "auto* head_squares = shared_array<float[BX]>(3072); //"),
    )
    programs = OnHost(tmp_path_factory.mktemp("host"), "stream_gemm", "stream_on_host_main.cpp", shared)

    def run(case, y, pool, tile, *, mode="STORE", turns=True):
        num_rows, depth = case.x.shape
        constants = constants_of(tile, num_rows, depth, has_norms=case.norms is not None) | {"MODE": mode}
        constants |= {"TURNS": int(turns), "STAGES": min(3, constants["STAGES"])}
        constants |= {"THREADS": 160, "MULTIPLYING": 128, "CLUSTER": tile.parts, "AT_ONCE": tile.parts}
        row_tiles = -(-num_rows // row_bucket(num_rows))
        steps = depth // (64 * tile.boxes * tile.parts)
        count = len(case.weight) // 128 * row_tiles * tile.parts
        sizes = (count, num_rows, y[0].numel(), len(case.weight), depth, steps, row_tiles, pool.shape[1],
                 case.heads.num_heads, case.heads.num_kv_heads)  # fmt: skip
        norms = torch.ones(2, 128).bfloat16() if case.norms is None else torch.stack([n.weight for n in case.norms])
        angles = torch.cat(case.angles, 1)
        tensors = [case.x, case.weight, y, case.norm.weight, norms, angles, case.slots, pool]
        raw = [tensor.contiguous().view(torch.uint8).numpy().tobytes() for tensor in tensors]
        eps = case.norm.eps if case.norms is None else case.norms.q.eps
        wrote = programs(constants, struct.pack("10if", *sizes, eps) + b"".join(raw))
        read = torch.frombuffer(wrote, dtype=torch.bfloat16)
        y.copy_(read[: y.numel()].view(y.shape))
        pool.copy_(read[y.numel() :].view(pool.shape))

    return run


# Rows, depth, heads of queries and of keys, head norms, tile: rings that go round, parts of K, more rows than a tile's.
CASES = [
    (3, 512, (2, 1), True, StreamTile(2, 2, 2, 1, True)),
    (1, 256, (1, 1), False, StreamTile(2, 1, 1, 1, True)),
    (20, 512, (1, 1), True, StreamTile(2, 2, 1, 1, True)),
    (40, 256, (1, 1), True, StreamTile(2, 1, 2, 1, False)),
    (70, 256, (1, 1), False, StreamTile(2, 1, 1, 2, False)),
]


@pytest.mark.parametrize("cases", [CASES[:1], pytest.param(CASES[1:], marks=pytest.mark.slow)], ids=["one", "others"])
def test_the_kernels_text_on_a_cpu(on_host, cases):
    """Every wait ends; queries, keys and values are the two launches', and no other slot is written."""
    for num_rows, depth, heads, normed, tile in cases:
        case = Case(num_rows, depth, heads, normed=normed)
        case.norm = Norm(case.norm.weight, 1e-5 if case.norms is None else case.norms.q.eps)
        q, pool = case.expected(fused_norm=tile.fuse_norm, norm_first=False)
        y, written = torch.full((num_rows, heads[0] * 128), 512.0, dtype=torch.bfloat16), case.pool.clone()
        on_host(case, y, written, tile)
        for got, expected in ((y.view(q.shape), q), (written, pool)):
            # A sum at the edge of two bf16 may be rounded to the other one: then all that comes of it is so far off.
            torch.testing.assert_close(got.double(), expected, rtol=2**-6, atol=2e-2)
            assert (got.double() - expected).norm() <= 4e-3 * expected.norm()
        untouched = torch.ones(len(written[0]), dtype=torch.bool)
        untouched[case.slots] = False
        assert (written[:, untouched] == 768.0).all()


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["STORE", "ADD"])
def test_the_stream_gemm_without_it_on_a_cpu(on_host, mode):
    case, tile = Case(5, 512, (1, 1), normed=False), StreamTile(2, 2, 2, 1, True)
    expected = rms_norm(case.x.double(), case.norm) @ case.weight.double().t()
    y = torch.randn(5, len(case.weight)).bfloat16()
    expected += y.double() if mode == "ADD" else 0
    on_host(case, y, case.pool.clone(), tile, mode=mode, turns=False)
    assert (y.double() - expected).norm() <= 4e-3 * expected.norm()


def test_there_is_a_launch_where_one_was_measured(monkeypatch):
    assert turned_tile(8, 4095, 1024) is None
    tile = StreamTile(2, 2, 2, 1, True)
    monkeypatch.setattr(turned, "MEASURED", {(4096, 1024): {8: tile, 64: tile}})
    found = [turned_tile(rows, 4096, 1024) for rows in (1, 2, 8, 9, 16, 33, 64, 65, 300)]
    assert found == [None, tile, tile, None, None, tile, tile, None, None]
    assert turned_tile(8, 6144, 4096) is None


@pytest.mark.parametrize(("num_cols", "depth"), [(6144, 4096), (4096, 1024)])
def test_launches_to_choose_from_are_one_round_and_fit(num_cols, depth):
    for num_rows in (1, 16, 32, 64):
        tiles = turned_tiles(num_rows, num_cols, depth, H200)
        assert len(tiles) >= 2 and any(tile.fuse_norm for tile in tiles) == (num_rows <= 32)
        for tile in tiles:
            stages = tile.num_stages(num_rows, depth)
            held = stages * tile.stage_bytes(num_rows) + tile.rest_bytes(num_rows, depth) + 4096
            assert held * tile.per_sm <= SHARED_BYTES
    assert turned_tiles(256, num_cols, depth, H200) and not turned_tiles(256, 3 * num_cols, depth, H200)
    assert not turned_tiles(257, 4096, 1024, H200) and not turned_tiles(8, 4096 + 64, 1024, H200)
    for num_rows, tiles in turned.MEASURED.get((num_cols, depth), {}).items():
        assert tiles in turned_tiles(num_rows, num_cols, depth, H200)


@pytest.mark.parametrize("every", [25, pytest.param(1, marks=pytest.mark.slow)], ids=["some", "all"])
def test_every_launch_compiles_without_spills(every):
    nvrtc = pytest.importorskip("cuda.bindings.nvrtc", reason="needs pip install 'kvarena[gpu]'")
    try:
        nvrtc_major(nvrtc)
    except OSError as error:
        pytest.skip(str(error))
    found = {}
    for num_cols, depth, normed in ((4096, 1024, True), (6144, 4096, False)):
        for num_rows in (1, 16, 32, 64, 256):
            for tile in turned_tiles(num_rows, num_cols, depth, H200):
                constants = constants_of(tile, num_rows, depth, has_norms=normed) | {"MODE": "STORE"}
                found[tuple(constants.values())] = constants
    for constants in list(found.values())[::every]:
        _, said = compile_source(nvrtc, kernel_source("stream_gemm", constants, constants["BX"]))
        assert " 0 bytes spill stores, 0 bytes spill loads" in said and "warning" not in said, (constants, said)
    assert len(found) > 30


def test_which_heads_fit():
    case = Case(3, 256, (2, 1), normed=True)
    good = case.to_store(case.pool)
    assert good.fit() and Case(3, 256, (2, 1), normed=False).to_store(case.pool).fit()
    assert not good._replace(keys=good.keys.float()).fit()
    assert not good._replace(keys=case.pool[0, ..., :64], values=case.pool[1, ..., :64]).fit(), "heads of 64"
    assert not good._replace(cos=good.cos[:, :32], sin=good.sin[:, :32]).fit(), "half of a head is turned"
    assert not good._replace(q_norm=good.q_norm.float()).fit()
    assert not good._replace(q_norm=None).fit()
    strided = torch.empty(2, 11, 4, 1, 128, dtype=torch.bfloat16)[:, :, 1]
    assert good._replace(keys=strided[0], values=strided[1]).fit(), "a layer of a mapped pool"


def reducing(ops):
    class NoRanks:
        def sum(self, x):
            return x

        def add_norm(self, x, residual, norm):
            return None

    return ReducingOps(ops, NoRanks())


@pytest.mark.parametrize(
    "made",
    [TorchOps, lambda: TritonOps("cpu", upcast=True), lambda: PackedOps(TorchOps()), lambda: reducing(TorchOps())],
    ids=["torch", "triton", "packed", "ranks"],
)
def test_both_operations_are_one_after_the_other_without_the_kernel(made):
    case, ops = Case(3, 64, (2, 1), normed=True), made()
    q, pool = case.expected(fused_norm=False)
    written = case.pool.clone()
    got = ops.norm_heads(case.x, case.norm, Linear(case.weight, None), case.head_slots(written))
    assert got.shape == q.shape
    for one, expected in ((got, q), (written, pool)):
        assert (one.double() - expected).norm() <= 1e-2 * expected.norm()


def test_products_go_to_the_kernel_with_all_that_it_takes(monkeypatch):
    calls = []

    class Turned:
        def __init__(self, kernels):
            pass

        def __call__(self, x, weight, tile, heads, *, norm, eps):
            calls.append((x, tile, norm, eps))
            return heads

    class Kernels:
        num_multiprocessors = H200

    monkeypatch.setattr(hopper_products, "load_hopper_kernels", lambda device: Kernels())
    monkeypatch.setattr(hopper_products, "TurnedGemm", Turned)
    monkeypatch.setattr(hopper_products, "rms_norm", lambda x, weight, eps: rms_norm(x, Norm(weight, eps)))
    case = Case(3, 256, (2, 1), normed=True)
    products, heads = HopperProducts("cuda"), case.to_store(case.pool)
    linear = Linear(case.weight, None)
    assert products.heads(case.x, case.norm, linear, heads) is None, "nothing was measured"
    for fuse_norm in (True, False):
        tile = StreamTile(2, 1, 1, 1, fuse_norm)
        monkeypatch.setattr(turned, "MEASURED", {(512, 256): {8: tile}})
        assert products.heads(case.x, case.norm, linear, heads) == heads
        x, used, norm, eps = calls.pop()
        assert used == tile and (norm is case.norm.weight) == fuse_norm and (eps > 0) == fuse_norm
        assert torch.equal(x, case.x if fuse_norm else rms_norm(case.x, case.norm))
    biased = Linear(case.weight, torch.zeros(512, dtype=torch.bfloat16))
    assert products.heads(case.x, case.norm, biased, heads) is None
    assert products.heads(case.x, case.norm, linear, heads._replace(q_norm=None)) is None
    assert products.heads(case.x.half(), case.norm, linear, heads) is None
    assert not calls


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize("num_rows", [1, 7, 16, 31, 64, 100, 256])
@pytest.mark.parametrize(("heads", "depth", "normed"), [((16, 8), 1024, True), ((32, 8), 4096, False)])
def test_on_a_gpu(num_rows, heads, depth, normed):
    case = Case(num_rows, depth, heads, normed=normed, device="cuda")
    gemm = TurnedGemm(load_hopper_kernels("cuda"))
    ops = TritonOps("cuda", GemmTable(128, torch.cuda.get_device_properties(0).multi_processor_count), hopper=False)
    plain = case.pool.clone()
    q = ops.norm_heads(case.x, case.norm, Linear(case.weight, None), case.head_slots(plain))
    processors = torch.cuda.get_device_properties(0).multi_processor_count
    tiles = turned_tiles(num_rows, len(case.weight), depth, processors)
    for tile in tiles[num_rows % 2 :: 5]:  # each is compiled
        x = case.x if tile.fuse_norm else ops.norm(case.x, case.norm)
        norm, eps = (case.norm.weight, case.norm.eps) if tile.fuse_norm else (None, 0.0)
        results = []
        for overlap in (True, False):
            pool = case.pool.clone()
            got = gemm(x, case.weight, tile, case.to_store(pool), norm=norm, eps=eps, overlap=overlap)
            results.append((got, pool))
        for one, other, expected in zip(*results, (q, plain), strict=True):
            assert torch.equal(one, other), tile
            assert (one.double() - expected.double()).norm() <= 1e-2 * expected.double().norm(), tile
