"""The grouped product of a prompt's experts: the kernel's own text on a CPU, and on a GPU, against float64."""

import re
import shutil
import struct
import subprocess
from importlib import resources
from pathlib import Path

import pytest
import torch

from kvarena.engine.kernels.experts import grouped as module
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
from kvarena.engine.kernels.experts.routing import max_items, route
from kvarena.engine.kernels.hopper import load_hopper_kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TILES = [GroupedTile(share_x=False), GroupedTile(share_x=True)]
IDS = ["shared weights", "shared rows"]
needs_hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="wgmma is Hopper's"
)
HOST = Path(__file__).with_name("hopper_on_host.cpp"), Path(__file__).with_name("hopper_on_host_main.cpp")


def routing_of(counts, tile, *, padding=0, seed=0, device=DEVICE):
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
        num_read=num_read, span_items=SPAN_ITEMS,
    )  # fmt: skip
    assert int(num_read) == sum(count > 0 for count in counts)
    return routing


def exact(x, weight, routing, *, glu):
    """In float64, of rows of `x` by token: by expert with the gate, else by token times the router's weight."""
    ids, order = routing.ids.flatten(), routing.order[routing.order >= 0].long()
    sums = torch.stack([weight[int(ids[pair])].double() @ x[pair].double() for pair in order])
    if not glu:
        return sums * routing.weights.flatten()[order][:, None].double()
    gate, up = sums.chunk(2, dim=1)
    return torch.nn.functional.silu(gate) * up


@pytest.fixture(scope="module")
def on_host(tmp_path_factory):
    """Compiles the kernel for a CPU and runs launches of it."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++")
    folder, programs = tmp_path_factory.mktemp("host"), {}
    text = resources.files("kvarena.engine.kernels").joinpath("wide_gemm.cu").read_text()
    text = re.sub(r'asm volatile\((?:[^;"]|"[^"]*")*\);', "", text)
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
            source.write_text(defines + HOST[0].read_text() + text + HOST[1].read_text())
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
        ran = subprocess.run([programs[key], folder / "in", folder / "out"], capture_output=True, text=True, check=False)
        assert ran.returncode == 0, ran.stderr
        read = torch.frombuffer(bytearray((folder / "out").read_bytes()), dtype=torch.bfloat16)
        out.copy_(read.view(out.shape))

    return run


# Of a small tile's rows: none, one, a warpgroup's, a program's, an item's and one more, several items and a rest.
COUNTS = [0, 1, 64, 65, 0, 128, 129, 256, 300, 0]
# Of few columns that no tile divides; a depth of less than the ring, and one that no step divides.
CASES = [(48, 136), (40, 456)]


@pytest.mark.skipif(DEVICE == "cuda", reason="of a CPU")
@pytest.mark.parametrize("tile", TILES, ids=IDS)
@pytest.mark.parametrize("glu", [True, False], ids=["gate and up", "down"])
def test_the_kernels_text_on_a_cpu(on_host, monkeypatch, tile, glu):
    """Every wait ends, every element that exists is written once with the right sum, and no other."""
    monkeypatch.setattr(module, "_TILE", module.WideTile(32, 2))
    for number, (num_cols, depth) in enumerate(CASES):
        counts = COUNTS if number == 0 else [3, 0, 140]
        routing = routing_of(counts, tile, padding=5, seed=number)
        g = torch.Generator().manual_seed(number)
        num_rows = len(routing.order)
        x = torch.randn(num_rows, depth, generator=g).bfloat16()
        weight = torch.randn(len(counts), num_cols * (2 if glu else 1), depth, generator=g).bfloat16() / depth**0.5
        rows, factors = gather_rows(x, routing)
        computed = sum(counts)
        rows[computed:] = torch.nan  # behind the last row, and not to be read for any other
        out = torch.full((num_rows, num_cols), 777.0, dtype=torch.bfloat16)
        on_host(rows, weight, num_cols, routing, factors, out, tile, glu=glu, num_clusters=2 + number)
        order = routing.order[:computed].long()
        got = out[:computed] if glu else out[order]
        expected = exact(x, weight, routing, glu=glu)
        torch.testing.assert_close(got.double(), expected, rtol=2**-8, atol=1e-3)
        rest = torch.ones(num_rows, dtype=torch.bool)
        rest[torch.arange(computed) if glu else order] = False
        assert rest.sum() == 5 and (out[rest] == 777.0).all()
