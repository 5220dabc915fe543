"""The wide product of weights of 4 bits: the kernel's own text on a CPU, against float64."""

import re
import shutil
import struct
import subprocess
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
import torch
from on_host import host_text
from torch.nn import functional as F

from kvarena.engine.kernels.gemm.packed_stream import pack_stream
from kvarena.engine.kernels.gemm.packed_wide import PackedWideTile, WideShape, constants_of, plan_of

HERE = Path(__file__).parent
UNPACK = """
static void unpack(u32 codes, const Rows& rows, u32 (&a)[4]) {
  for (int i = 0; i < 4; ++i) {
    a[i] = 0;
    for (int at = 0; at < 32; at += 16) {
      const float v = int(codes >> (4 * i + at) & 15) - int(rows.zeros[i % 2] >> at & 15);
      const float low = widen(rows.low[i % 2] >> at & 0xFFFF), high = widen(rows.high[i % 2] >> at & 0xFFFF);
      a[i] |= (narrow(v * high + widen(narrow(v * low))) & 0xFFFF) << at;
    }
  }
}
"""


def on_cpu(text):
    """The kernel's text without what only a GPU has."""
    begin, end = text.index("__device__ __forceinline__ void unpack("), text.index("// A warpgroup's sums of a tile.")
    text = text[:begin] + UNPACK + text[end:]
    both = 'asm volatile("bar.sync 1, 256;\\nbar.sync 1, 256;" ::: "memory");'
    assert both in text
    text = text.replace(both, "bar_sync(); bar_sync();")
    text = text.replace('asm volatile("bar.sync 1, 256;" ::: "memory");', "bar_sync();")
    text = text.replace("extern __shared__ char raw[];", "char* raw = shared_array<char>(1024);")
    text = text.replace("__shared__ u64 barriers[2 * STAGES];", "u64* barriers = shared_array<u64>(0);")
    text = re.sub(r'asm volatile\((?:[^;"]|"[^"]*")*\);', ";", text)
    assert "__shared__" not in text and "asm" not in text
    return text


@pytest.fixture(scope="module")
def on_host(tmp_path_factory):
    """Compiles the kernel for a CPU and runs a launch of it."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++")
    folder, programs = tmp_path_factory.mktemp("host"), {}
    kernel = on_cpu(resources.files("kvarena.engine.kernels").joinpath("wide_packed.cu").read_text())
    texts = [host_text("hopper_on_host.cpp"), kernel, (HERE / "packed_on_host_main.cpp").read_text()]

    def run(x, weight, tile, plan, room, first, mode):
        constants = constants_of(tile, weight.groups, mode) | {"CM": tile.cluster}
        key = tuple(constants.values())
        if key not in programs:
            source = folder / f"{len(programs)}.cpp"
            source.write_text(
                "".join(f"#define {name} {value}\n" for name, value in constants.items()) + "".join(texts)
            )
            programs[key] = source.with_suffix("")
            command = [compiler, "-std=c++17", "-O1", "-w", "-fno-strict-aliasing", source, "-o", programs[key]]
            subprocess.run(command, check=True, capture_output=True, text=True)
        chunks = weight.chunks.contiguous().numpy().tobytes()
        num_places = 2 * plan.clusters * tile.cluster
        num_sums = num_places * tile.units * tile.rows // 8 * 256
        head = (plan.clusters, x.shape[1], *room.shape, first, int(mode == "ADD"), num_sums, num_places, len(chunks))
        launch = struct.pack(f"8iq{len(plan.numbers)}i", *head, *plan.numbers)
        raw = [tensor.view(torch.int16).numpy().tobytes() for tensor in (x, room)]
        (folder / "in").write_bytes(launch.ljust(-(-len(launch) // 8) * 8, b"\0") + raw[0] + chunks + raw[1])
        ran = subprocess.run(
            [programs[key], folder / "in", folder / "out"], capture_output=True, text=True, check=False
        )
        assert ran.returncode == 0, (tile, ran.stderr)
        got = np.frombuffer((folder / "out").read_bytes(), dtype=np.int16).copy()
        return torch.from_numpy(got).view(torch.bfloat16).view(room.shape)

    return run


def check(on_host, tile, num_outputs, num_inputs, num_rows, group_size, mode, held, *, symmetric=False):
    """Every wait ends, every element that exists is written with the right sum, and nothing else."""
    torch.manual_seed(1)
    glu, groups = mode == "GLU", num_inputs // group_size
    codes = torch.randint(0, 16, (num_outputs, num_inputs), dtype=torch.uint8)
    scales = ((torch.rand(groups, num_outputs) + 0.5) * 0.2 * num_inputs**-0.5).half()
    zeros = None if symmetric else torch.randint(0, 16, (groups, num_outputs), dtype=torch.uint8)
    weight = pack_stream(codes, scales, zeros, group_size, glu=glu)
    assert tile.fits(WideShape(num_rows, *weight.chunks.shape[:2], weight.groups, glu))
    middle = 8.0 if zeros is None else zeros.double().t().repeat_interleave(group_size, 1)
    exact = (codes.double() - middle) * scales.double().t().repeat_interleave(group_size, 1)
    num_cols = num_outputs // 2 if glu else num_outputs
    x, old = torch.randn(num_rows, num_inputs).bfloat16(), torch.randn(num_rows, num_cols).bfloat16()
    room = torch.full((num_rows + 3, num_cols + 16), float("nan")).bfloat16()
    inside = slice(num_rows), slice(8, num_cols + 8)
    if mode == "ADD":
        room[inside] = old
    plan = plan_of(tile, num_rows, weight, num_cols, num_cols + 16, held)
    got = on_host(x, weight, tile, plan, room, 8, mode)
    want = x.double() @ exact.t()
    if glu:
        want = F.silu(want[:, :num_cols]) * want[:, num_cols:]
    if mode == "ADD":
        want += old.double()
    assert (got[inside].double() - want).norm() < 4e-3 * want.norm()
    got[inside] = float("nan")
    assert got.isnan().all(), "nothing beyond the results is written"


# Tile, outputs, inputs, rows of x, group, what comes after, clusters at once. Even: tiles of several clusters, clusters
# of several tiles, and as many clusters as there are steps.
EVEN = PackedWideTile(64, 1, 2, 2, 1, True)
QUICK = [(EVEN, 200, 640, 70, 128, "ADD", 3), (PackedWideTile(64, 2, 3, 1, 1), 192, 128, 64, 64, "STORE", 1)]
MANY = [
    (EVEN, 256, 256, 64, 32, "STORE", 4), (EVEN, 128, 1280, 60, 128, "STORE", 7),
    (EVEN, 256, 1536, 64, 128, "ADD", 5), (EVEN, 128, 1280, 60, 128, "GLU", 10), (EVEN, 384, 384, 130, 64, "GLU", 4),
    (PackedWideTile(96, 2, 4, 2, 1, True), 1152, 384, 100, 128, "GLU", 2),
    (PackedWideTile(160, 1, 2, 2, 1, True), 520, 512, 161, 128, "ADD", 5),
    (PackedWideTile(224, 1, 2, 2), 200, 256, 500, 128, "STORE", 1),
    (PackedWideTile(192, 1, 2, 2), 384, 256, 150, 32, "GLU", 1),
    (PackedWideTile(128, 1, 2, 2, 2), 200, 512, 130, 64, "ADD", 1),
    (PackedWideTile(128, 2, 3, 1, 2), 384, 512, 130, 32, "GLU", 1),
    (PackedWideTile(256, 1, 2, 1, 4), 200, 512, 65, 128, "ADD", 1),
    (PackedWideTile(128, 2, 4, 1, 4), 384, 512, 65, 512, "ADD", 1),
    (PackedWideTile(64, 2, 3, 4), 768, 256, 70, 64, "GLU", 1),
    (PackedWideTile(96, 1, 2), 200, 384, 100, 32, "STORE", 2),
    (PackedWideTile(64, 2, 4, 2, 2), 1024, 512, 130, 32, "GLU", 9),
]  # fmt: skip


@pytest.mark.parametrize("case", [*QUICK, *(pytest.param(case, marks=pytest.mark.slow) for case in MANY)], ids=str)
def test_the_packed_kernels_text_on_a_cpu(on_host, case):
    check(on_host, *case)
