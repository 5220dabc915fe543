"""The grouped product of a prompt's experts: the kernel's own text on a CPU, and on a GPU, against float64."""

import re
import shutil
import struct
import subprocess
from importlib import resources
from itertools import product
from pathlib import Path

import pytest
import torch
from cards import few_on_a_card
from on_host import host_text

from kvarena.engine.kernels.experts import grouped as module
from kvarena.engine.kernels.experts import layer
from kvarena.engine.kernels.experts.grouped import (
    FEW_ROWS,
    FEWEST_ROWS,
    SPAN_ITEMS,
    GroupedGemm,
    GroupedTile,
    column_tiles,
    gather_rows,
    grouped_tile,
)
from kvarena.engine.kernels.experts.layer import run_experts
from kvarena.engine.kernels.experts.products import MANY_ROWS
from kvarena.engine.kernels.experts.routing import route
from kvarena.engine.kernels.hopper import load_hopper_kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TILES = [GroupedTile(share_x=False), GroupedTile(share_x=True)]
IDS = ["shared weights", "shared rows"]
needs_hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="wgmma is Hopper's"
)
MAIN = Path(__file__).with_name("hopper_on_host_main.cpp")


def routing_of(counts, tile, *, padding=0, seed=0, span_items=SPAN_ITEMS, device=DEVICE):
    """A routing with so many tokens for each expert, one expert a token, shuffled; and so many that are padding."""
    g = torch.Generator().manual_seed(seed)
    chosen = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    chosen = torch.cat([chosen, torch.zeros(padding, dtype=torch.long)])
    slots = torch.cat([torch.ones(len(chosen) - padding), torch.zeros(padding)]).long()
    mixed = torch.randperm(len(chosen), generator=g)
    logits = torch.randn(len(chosen), len(counts), generator=g).scatter(1, chosen[mixed][:, None], 9.0)
    num_read = torch.zeros(1, dtype=torch.int32, device=device)
    routing = route(
        logits.to(device), slots[mixed].to(device), 1, len(counts), 1, renormalize=False, tile_rows=tile.rows,
        num_read=num_read, span_items=span_items,
    )  # fmt: skip
    assert int(num_read) == sum(count > 0 for count in counts)
    return routing


def exact(x, weight, routing, *, glu):
    """In float64, of a row of x for each pair; the rows of the result by expert, without a gate times their weights."""
    order = routing.order[routing.order >= 0].long()
    experts, counts = routing.ids.flatten()[order].unique_consecutive(return_counts=True)
    parts = zip(order.split(counts.tolist()), experts.tolist(), strict=True)
    sums = torch.cat([x[pairs].double() @ weight[expert].double().t() for pairs, expert in parts])
    if not glu:
        return sums * routing.weights.flatten()[order][:, None].double()
    gate, up = sums.chunk(2, dim=1)
    return torch.nn.functional.silu(gate) * up


def by_pair(rows, order):
    """Rows by expert in the order of pairs."""
    out = torch.zeros_like(rows)
    out[order] = rows[: len(order)]
    return out


@pytest.fixture(scope="module")
def on_host(tmp_path_factory):
    """Compiles the kernel for a CPU and runs launches of it."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++")
    folder, programs = tmp_path_factory.mktemp("host"), {}
    text = resources.files("kvarena.engine.kernels").joinpath("wide_gemm.cu").read_text()
    text, count = re.subn(r'asm volatile\("wgmma[^"]*wait_group[^"]*(\d);".*?\);', r"wait_for_products(\1);", text)
    assert count == 2
    text = re.sub(r'asm volatile\((?:[^;"]|"[^"]*")*\);', ";", text)
    text = text.replace("extern __shared__ char raw[];", "char* raw = shared_array<char>(1024);")
    text = text.replace("__shared__ u64 barriers[2 * STAGES];", "u64* barriers = shared_array<u64>(0);")
    text, count = re.subn(r"__shared__ Place places\[[^;]*\];", "Place* places = shared_array<Place>(512);", text)
    assert count == 1 and "__shared__" not in text and "asm" not in text.replace("atom", "")

    def run(x, weight, num_cols, routing, factors, out, tile, *, glu, num_clusters):
        # Narrow tiles of few columns: all that matters is the same, and the CPU has less to do.
        constants = {"BN": 32, "CM": 2, "STAGES": 3, "GLU": int(glu), "GROUPED": 1, "SHARE_X": int(tile.share_x)}
        key = tuple(constants.values())
        if key not in programs:
            defines = "".join(f"#define {name} {value}\n" for name, value in constants.items())
            source = folder / f"{len(programs)}.cpp"
            source.write_text(defines + host_text("hopper_on_host.cpp") + text + MAIN.read_text())
            programs[key] = source.with_suffix("")
            command = [compiler, "-std=c++17", "-O1", "-w", source, "-o", programs[key]]
            subprocess.run(command, check=True, capture_output=True, text=True)
        num_items, depth = routing.items.shape[1], x.shape[1]
        num_tiles = column_tiles(num_cols, tile, glu=glu)
        sizes = (num_clusters, num_items, len(x), num_cols, num_tiles, -(-depth // 64), depth, weight[:, :, 0].numel(),
                 len(out))  # fmt: skip
        tensors = [x, weight, out, routing.items, routing.order, factors]
        raw = [tensor.contiguous().view(torch.uint8).numpy().tobytes() for tensor in tensors]
        (folder / "in").write_bytes(struct.pack("9i", *sizes) + b"".join(raw))
        ran = subprocess.run(
            [programs[key], folder / "in", folder / "out"], capture_output=True, text=True, check=False
        )
        assert ran.returncode == 0, ran.stderr
        read = torch.frombuffer(bytearray((folder / "out").read_bytes()), dtype=torch.bfloat16)
        out.copy_(read.view(out.shape))

    return run


# Rows of experts: none, one, a warpgroup's, a program's, an item's and one more, more than a span's.
COUNTS = [0, 1, 64, 65, 0, 128, 129, 256, 600, 0]
# Columns, which no tile divides, and depths: of fewer steps than the ring, of as many, of more, which no step divides.
# Clusters: their last round has half as many tiles as there are, which are halved, and other numbers.
CASES = [(40, 72, [3, 0, 140], 4), (48, 136, COUNTS, 5), (40, 456, [70, 290], 5), (40, 72, [0, 0], 3)]
VARIANTS = [(glu, tile) for glu in (True, False) for tile in TILES]


@pytest.mark.skipif(DEVICE == "cuda", reason="of a CPU")
@pytest.mark.parametrize(
    ("variants", "cases"), [(VARIANTS[:1], CASES[:1]), pytest.param(VARIANTS, CASES, marks=pytest.mark.slow)],
    ids=["one", "all"],
)  # fmt: skip
def test_the_kernels_text_on_a_cpu(on_host, monkeypatch, variants, cases):
    """Every wait ends, every element that exists is written once with the right sum, and no other."""
    monkeypatch.setattr(module, "_TILE", module.WideTile(32, 2))
    for (glu, tile), (num_cols, depth, counts, clusters) in product(variants, cases):
        routing = routing_of(counts, tile, padding=5, seed=depth, span_items=2)
        g = torch.Generator().manual_seed(depth)
        num_rows = len(routing.order)
        x = torch.randn(num_rows, depth, generator=g).bfloat16()
        weight = torch.randn(len(counts), num_cols * (2 if glu else 1), depth, generator=g).bfloat16() / depth**0.5
        rows, factors = gather_rows(x, routing)
        computed = sum(counts)
        rows[computed:] = torch.nan  # behind the last row, and not to be read for any other
        out = torch.full((num_rows, num_cols), 768.0, dtype=torch.bfloat16)
        on_host(rows, weight, num_cols, routing, factors, out, tile, glu=glu, num_clusters=clusters)
        order = routing.order[:computed].long()
        got = out[:computed] if glu else out[order]
        if computed:
            expected = exact(x, weight, routing, glu=glu)
            torch.testing.assert_close(got.double(), expected, rtol=2**-8, atol=1e-3)
        rest = torch.ones(num_rows, dtype=torch.bool)
        rest[torch.arange(computed) if glu else order] = False
        assert rest.sum() == 5 and (out[rest] == 768.0).all()


def test_which_launch_serves_how_many_rows():
    assert grouped_tile(8 * FEWEST_ROWS, 8) is None
    assert grouped_tile(8 * FEWEST_ROWS + 1, 8) == GroupedTile(share_x=True)
    assert grouped_tile(8 * FEW_ROWS, 8).rows == 128
    assert grouped_tile(4096, 8) == GroupedTile(share_x=False)
    assert grouped_tile(4096, 8).rows == 256
    assert [column_tiles(14336, tile, glu=True) for tile in TILES] == [112, 56]
    assert [column_tiles(4096, tile, glu=False) for tile in TILES] == [16, 8]
    assert column_tiles(300, TILES[1], glu=False) == 1 and column_tiles(513, TILES[1], glu=False) == 2


def test_operands_that_are_left_to_other_kernels():
    x, gate_up, down = (torch.zeros(size, dtype=torch.bfloat16) for size in ((3, 64), (2, 48, 64), (2, 64, 24)))
    assert GroupedGemm.takes(x, gate_up, down)
    assert not GroupedGemm.takes(x.half(), gate_up.half(), down.half())
    assert not GroupedGemm.takes(x, gate_up[:, ::2], down)
    assert not GroupedGemm.takes(x[:, :60], gate_up[:, :, :60].contiguous(), down[:, :60].contiguous())


@pytest.mark.parametrize(("share_x", "tokens"), [(False, 40), (True, 70)])
def test_a_layer_with_the_grouped_products_is_the_other_one(monkeypatch, share_x, tokens):
    """What `run_experts` hands to them and makes of their results; the products themselves by torch."""
    experts, top_k, hidden, inner = 5, 2, 48, 24
    g = torch.Generator().manual_seed(tokens)
    kind = {"dtype": torch.bfloat16, "device": DEVICE}
    x, gate_up, down, residual = (
        torch.randn(size, generator=g).to(**kind)
        for size in ((tokens, hidden), (experts, 2 * inner, hidden), (experts, hidden, inner), (tokens, hidden))
    )
    logits = torch.randn(tokens, experts, generator=g).to(DEVICE)
    slots = torch.tensor([0 if i % 9 == 4 else 1 for i in range(tokens)], device=DEVICE)

    class ByTorch:
        takes = staticmethod(GroupedGemm.takes)

        def gate_up(self, rows, weight, routing, out, tile):
            self.rows, order = tile.rows, routing.order[routing.order >= 0].long()
            out[: len(order)] = exact(by_pair(rows, order), weight, routing, glu=True).to(out.dtype)

        def down(self, act, weight, routing, factors, out, tile):
            order = routing.order[routing.order >= 0].long()
            assert torch.equal(factors[: len(order)], routing.weights.flatten()[order])
            out[order] = exact(by_pair(act, order), weight, routing, glu=False).to(out.dtype)

    by_torch, sums, read = ByTorch(), [], []
    monkeypatch.setattr(layer, "grouped_tile", lambda pairs, experts: GroupedTile(share_x))
    for grouped in (None, by_torch):
        out, num_read = residual.clone(), torch.zeros(1, dtype=torch.int32, device=DEVICE)
        run_experts(
            out, x, logits, gate_up, down, slots, 1, top_k=top_k, renormalize=True, num_read=num_read,
            upcast=DEVICE == "cpu", grouped=grouped,
        )  # fmt: skip
        sums.append(out.float())
        read.append(int(num_read))
    assert by_torch.rows == (128 if share_x else 256) and read[0] == read[1] == experts
    assert (sums[0] - sums[1]).norm() <= 1e-2 * (sums[0] - residual.float()).norm()
    assert torch.equal(sums[1][slots == 0], residual[slots == 0].float())


# Tokens of each of 16 experts, for one shape of the sort; hidden and inner sizes, the last of which no tile and no step
# divides.
UNEVEN = [0, 1, 64, 65, 127, 128, 129, 0, 255, 256, 257, 384, 385, 700, 2500, 0]
COUNTED = {"uneven": UNEVEN, "even": [128] * 12 + [0] * 4, "one": [2049] + [0] * 15, "few": [0, 3] + [0] * 14}
SIZES = [(256, 384), (1024, 768), (2048, 1408), (1000, 712)]


@pytest.fixture(scope="module")
def on_card():
    """The kernel for this card."""
    return GroupedGemm(load_hopper_kernels("cuda"))


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize("tile", TILES, ids=IDS)
@pytest.mark.parametrize(("hidden", "inner"), few_on_a_card(SIZES, SIZES[3:]))
@pytest.mark.parametrize("counts", COUNTED.values(), ids=COUNTED)
def test_products_on_a_gpu(on_card, tile, hidden, inner, counts):
    """Outputs are poisoned, and so is what lies behind the last row that is computed."""
    gemm, padding = on_card, 7
    torch.manual_seed(hidden)
    kind = {"dtype": torch.bfloat16, "device": "cuda"}
    num_rows, computed = sum(counts) + padding, sum(counts)
    x, act = torch.randn(num_rows, hidden, **kind), torch.randn(num_rows, inner, **kind)
    gate_up = torch.randn(len(counts), 2 * inner, hidden, **kind) / hidden**0.5
    down = torch.randn(len(counts), hidden, inner, **kind) / inner**0.5
    results = []
    for overlap in (True, False):
        routing = routing_of(counts, tile, padding=padding)
        rows, factors = gather_rows(x, routing)
        order = routing.order[:computed].long()
        assert torch.equal(rows[:computed], x[order])
        assert torch.equal(factors[:computed], routing.weights.flatten()[order])
        rows[computed:], act[computed:], factors[computed:] = torch.nan, torch.nan, torch.nan
        y, pairs = torch.full((num_rows, inner), 768.0, **kind), torch.full((num_rows, hidden), 768.0, **kind)
        gemm.gate_up(rows, gate_up, routing, y, tile, overlap=overlap)
        gemm.down(act, down, routing, factors, pairs, tile, overlap=overlap)
        results.append((y, pairs))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)
    expected = exact(x, gate_up, routing, glu=True)
    assert (y[:computed] - expected).norm() <= 5e-3 * expected.norm()
    torch.testing.assert_close(y[:computed].double(), expected, rtol=2**-7, atol=1e-3)
    expected = exact(by_pair(act, order), down, routing, glu=False)
    torch.testing.assert_close(pairs[order].double(), expected, rtol=2**-7, atol=1e-3)
    rest = torch.ones(num_rows, dtype=torch.bool, device="cuda")
    rest[order] = False
    assert (y[computed:] == 768.0).all() and (pairs[rest] == 768.0).all() and int(rest.sum()) == padding


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize("tile", TILES, ids=IDS)
def test_a_graph_replays_any_routing(on_card, tile):
    """Captured once, launches overlapped, replayed with other logits and more padding."""
    tokens, experts, top_k, hidden, inner = 1024, 8, 2, 1024, 768
    torch.manual_seed(0)
    kind = {"dtype": torch.bfloat16, "device": "cuda"}
    x, residual = torch.randn(tokens, hidden, **kind), torch.zeros(tokens, hidden, **kind)
    gate_up = torch.randn(experts, 2 * inner, hidden, **kind) / hidden**0.5
    down = torch.randn(experts, hidden, inner, **kind) / inner**0.5
    logits, slots = torch.zeros(tokens, experts, device="cuda"), torch.ones(tokens, dtype=torch.long, device="cuda")
    num_read = torch.zeros(1, dtype=torch.int32, device="cuda")

    def run(out, tile):
        run_experts(
            out, x, logits, gate_up, down, slots, 1, top_k=top_k, renormalize=True, num_read=num_read, upcast=False,
            grouped=on_card, tile=tile,
        )  # fmt: skip

    run(residual, tile)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        residual.zero_()
        run(residual, tile)
        run(residual, tile)
    for skew, first_padding in ((0.0, tokens), (1.0, 900), (30.0, 77), (3.0, 0)):
        logits.normal_()
        logits[:, 3] += skew
        logits[:, 5] -= skew
        slots.fill_(1)[first_padding:] = 0
        for _ in range(5):
            graph.replay()
        wanted = torch.zeros_like(residual)
        run(wanted, MANY_ROWS)
        wanted = 2 * wanted.double()
        assert (residual.double() - wanted).norm() <= 1e-2 * wanted.norm(), skew
        assert not residual[first_padding:].any()
