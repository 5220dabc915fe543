"""Prefill on Hopper: the kernel's own text on a CPU, that it compiles, and on a GPU, against float64."""

import re
import shutil
import struct
import subprocess
from importlib import resources
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from attention_cases import dense_attention, make_case, make_contiguous, poison, run_backend

from kvarena.engine.attention.triton_backend import TritonBackend
from kvarena.engine.kernels.attention.base import AttentionCall
from kvarena.engine.kernels.attention.prefill import prefill_attention
from kvarena.engine.kernels.attention.prefill_plan import PREFILL_FIELDS, Programs, prefill_items
from kvarena.engine.kernels.attention.wide_prefill import (
    ROWS,
    TILE,
    PrefillTile,
    WidePrefill,
    box_tokens,
    fits,
    launch_constants,
)
from kvarena.engine.kernels.hopper import SHARED_BYTES, compile_source, kernel_source, nvrtc_major
from tests.kernels.on_host import host_text

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FOLDER = Path(__file__).parents[1] / "kernels"
needs_hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="wgmma is Hopper's"
)
SCALE = 128**-0.5


def make(rows, *, group=4, heads=1, block_size=16, contiguous=False):
    case = make_case(
        rows, block_size=block_size, num_heads=group * heads, num_kv_heads=heads, head_dim=128, dtype=torch.bfloat16,
        device=DEVICE,
    )  # fmt: skip
    keys, values = case.pool.slots(1)
    keys[case.meta.slot_mapping], values[case.meta.slot_mapping] = case.k, case.v
    poison(case, block_size)
    if contiguous:
        make_contiguous(case, block_size)
    return case


@pytest.fixture(scope="module")
def on_host(tmp_path_factory):
    """Compiles the kernel for a CPU and runs launches of it."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++")
    folder, programs = tmp_path_factory.mktemp("host"), {}
    text = resources.files("kvarena.engine.kernels").joinpath("wide_prefill.cu").read_text()
    text, count = re.subn(r'asm volatile\("wgmma[^"]*wait_group[^"]*(\d);".*?\);', r"wait_for_products(\1);", text)
    assert count == 4
    text, count = re.subn(r'asm volatile\("wgmma.commit[^;]*;".*?\);', "commit_products();", text)
    assert count == 2
    text = re.sub(r'asm volatile\((?:[^;"]|"[^"]*")*\);', ";", text)
    text = text.replace("extern __shared__ char raw[];", "char* raw = shared_array<char>(1024);")
    text, count = re.subn(r"__shared__ u64 barriers\[[^;]*\];", "u64* barriers = shared_array<u64>(0);", text)
    text = text.replace("__shared__ Place places[1];", "Place* places = shared_array<Place>(512);")
    text = text.replace("__shared__ int arrived[1];", "int* arrived = shared_array<int>(768);")
    assert count == 1 and "__shared__" not in text and "asm" not in text

    def run(case, tile, block_size, *, contiguous, programs_at_once):
        group, heads = case.q.shape[1] // case.pool.num_kv_heads, case.pool.num_kv_heads
        constants = launch_constants(tile, group, block_size, contiguous=contiguous) | {"CM": 1}
        key = tuple(constants.values())
        if key not in programs:
            defines = "".join(f"#define {name} {value}\n" for name, value in constants.items())
            texts = [host_text("hopper_on_host.cpp"), (FOLDER / "prefill_on_host_main.cpp").read_text()]
            source = folder / f"{len(programs)}.cpp"
            source.write_text(defines + texts[0] + text + texts[1])
            programs[key] = source.with_suffix("")
            command = [compiler, "-std=c++17", "-O2", "-w", source, "-o", programs[key]]
            subprocess.run(command, check=True, capture_output=True, text=True)
        meta, (keys, values) = case.meta, case.pool.slots(1)
        lens = torch.from_numpy(meta.host_query_start_loc).diff()
        rows = (lens > 1).nonzero().flatten().numpy()
        columns = prefill_items(
            rows, lens.numpy()[rows], meta.host_seq_lens[rows].astype(np.int64), ROWS // group,
            Programs(programs_at_once, heads),
        )  # fmt: skip
        items = torch.full((len(columns), columns.shape[1] + 2), -1, dtype=torch.int32)
        items[:, :-2] = torch.from_numpy(columns)
        num_cells = (columns[4].max() + 1) * heads
        run.most_parts = columns[3].max()
        out = torch.full_like(case.q, 768.0)
        tensors = [case.q, keys, values, out, items, meta.query_start_loc, meta.seq_lens, meta.block_table]
        sizes = (programs_at_once, items.shape[1], num_cells, len(lens), len(case.q), group * heads, heads,
                 keys.shape[0], meta.block_table.shape[1], case.q.stride(0))  # fmt: skip
        raw = [tensor.contiguous().view(torch.uint8).numpy().tobytes() for tensor in tensors]
        (folder / "in").write_bytes(struct.pack("10if", *sizes, SCALE * 1.4426950408889634) + b"".join(raw))
        ran = subprocess.run(
            [programs[key], folder / "in", folder / "out"], capture_output=True, text=True, check=False
        )
        assert ran.returncode == 0, ran.stderr
        read = torch.frombuffer(bytearray((folder / "out").read_bytes()), dtype=torch.bfloat16)
        return read.view(out.shape)

    return run


def check(case, got):
    """Every query of a request with several is right, and nothing else was written."""
    expected, at = dense_attention(case, scale=SCALE), 0
    for count in torch.from_numpy(case.meta.host_query_start_loc).diff().tolist():
        rows = slice(at, at + count)
        if count > 1:
            torch.testing.assert_close(got[rows].double().cpu(), expected[rows], rtol=2**-7, atol=4e-3)
        else:
            assert (got[rows] == 768.0).all()
        at += count


# (context, new tokens): ends within a block, at its end and at a tile's; one and several items; a decode row between.
ROWS_OF = [(0, 2), (250, 40), (31, 1), (0, 128), (200, 56)]
CASES = {
    "in parts": (PrefillTile(128), {"rows": [(2400, 40), (60, 20)]}),
    "four heads a KV head": (PrefillTile(128), {}),
    "wide tiles": (PrefillTile(), {"group": 2, "heads": 2}),
    "blocks of 48, three stages, no turns": (PrefillTile(128, 3, turns=False), {"group": 7, "block_size": 48}),
    "side by side": (PrefillTile(128), {"group": 1, "contiguous": True}),
    "side by side in wide tiles": (PrefillTile(160), {"group": 16, "contiguous": True}),
}


@pytest.mark.skipif(DEVICE == "cuda", reason="of a CPU")
@pytest.mark.parametrize(
    "names", [[*CASES][:2], pytest.param([*CASES][2:], marks=pytest.mark.slow)], ids=["two", "others"]
)
def test_the_kernels_text_on_a_cpu(on_host, names):
    """Every wait ends, and what no token of a request is, NaN here, gets into no sum."""
    for name in names:
        tile, options = CASES[name]
        case = make(**{"rows": ROWS_OF} | options)
        contiguous = options.get("contiguous", False)
        block_size = options.get("block_size", 16)
        most_parts = []
        for programs_at_once in (2, 5):
            got = on_host(case, tile, block_size, contiguous=contiguous, programs_at_once=programs_at_once)
            check(case, got)
            most_parts.append(on_host.most_parts)
        assert (max(most_parts) > 1) == (name == "in parts")


@pytest.mark.parametrize("tile", [TILE, pytest.param(PrefillTile(128), marks=pytest.mark.slow)])
@pytest.mark.parametrize("groups", [(4,), pytest.param((1, 7), marks=pytest.mark.slow)])
def test_it_compiles_without_spills_and_without_waits_between_products(tile, groups):
    nvrtc = pytest.importorskip("cuda.bindings.nvrtc", reason="needs pip install 'kvarena[gpu]'")
    try:
        nvrtc_major(nvrtc)
    except OSError as error:
        pytest.skip(str(error))
    for group in groups:
        constants = launch_constants(tile, group, 16, contiguous=group == 1)
        cubin, said = compile_source(nvrtc, kernel_source("wide_prefill", constants, tile.tokens))
        assert cubin.startswith(b"\x7fELF")
        assert " 0 bytes spill stores, 0 bytes spill loads" in said, (constants, said)
        assert "warning" not in said and "serialized" not in said, (constants, said)
    assert tile.shared_bytes + 1024 <= SHARED_BYTES


def test_fetches_lie_in_one_block():
    tile = PrefillTile(128)
    assert [box_tokens(tile, size, contiguous=False) for size in (16, 32, 48, 128, 256)] == [16, 32, 16, 128, 128]
    assert box_tokens(TILE, 128, contiguous=False) == 16
    assert box_tokens(TILE, 16, contiguous=True) == 176


def test_what_it_takes():
    assert fits(128, 4, 16) and fits(128, 16, 48)
    assert not fits(64, 4, 16) and not fits(128, 17, 16) and not fits(128, 4, 8) and not fits(128, 4, 1)
    assert not fits(128, 4, 16, torch.float16)
    pool = torch.zeros(64, 2, 2, 128, dtype=torch.bfloat16)
    q, keys, values = torch.zeros(3, 8, 128, dtype=torch.bfloat16), pool[:32, 0].contiguous(), pool[:32, 1].contiguous()
    table = torch.zeros(1, 2, dtype=torch.int32)
    plain = AttentionCall(q, keys, values, torch.empty_like(q), table, table, table, 16, SCALE)
    prefill = WidePrefill(SimpleNamespace(device="cpu", num_multiprocessors=2))
    assert prefill.takes(plain)
    packed = torch.zeros(3, 12, 128, dtype=torch.bfloat16)
    assert prefill.takes(plain._replace(q=packed[:, :8])), "in a packed projection"
    assert not prefill.takes(plain._replace(sliding_window=100))
    assert not prefill.takes(plain._replace(softcap=5.0))
    assert not prefill.takes(plain._replace(sinks=q))
    assert not prefill.takes(plain._replace(keys=pool[:32, 0])), "layers of a virtual pool, between which others are"
    assert not prefill.takes(plain._replace(q=q.float()))
    odd = torch.zeros(3, 8, 132, dtype=torch.bfloat16)[:, :, 4:]
    assert not prefill.takes(plain._replace(q=odd)), "rows that do not begin at a multiple of 16 bytes"


@pytest.mark.skipif(DEVICE == "cuda", reason="with a stand-in for the kernel")
def test_which_layers_go_to_it():
    """Prompts of plain layers, in parts for its programs; windows and decode rows go where they went."""
    case = make([(2300, 30), (40, 1), (0, 3)], group=2, heads=2)
    backend, calls = TritonBackend(case.pool, 4), []
    assert backend.prefill_kernel == "triton" and backend.shape(1).prefill is None

    class StandIn(WidePrefill):
        def __call__(self, call, *, items, num_items, overlap=True):
            calls.append(items.view(PREFILL_FIELDS, num_items)[3].max().item())
            prefill_attention(call, items=items, num_items=num_items, config=backend._prefill_config)

    backend._wide = StandIn(SimpleNamespace(device="cpu", num_multiprocessors=16))
    for options, num_calls in (({}, 1), ({"sliding_window": 100}, 1), ({"softcap": 5.0}, 1), ({}, 2)):
        got = run_backend(backend, case, scale=SCALE, **options)
        expected = dense_attention(case, scale=SCALE, **options)
        torch.testing.assert_close(got.double(), expected, rtol=2**-6, atol=2e-2)
        assert len(calls) == num_calls, options
    assert min(calls) > 1, "one item behind a long context is shared out"


GPU_ROWS = [(0, 700), (3000, 513), (8191, 1), (16, 2), (0, 1), (1000, 24), (40, 900), (127, 129)]
FEW_ROWS = [(20000, 100), (5, 1), (3000, 70)]
GPU_TILES = (TILE, PrefillTile(128, 3), PrefillTile(144, 2, turns=False))


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize(
    ("rows", "options"),
    [
        (GPU_ROWS, {}),
        (GPU_ROWS, {"group": 2}),
        (GPU_ROWS, {"group": 7, "block_size": 48}),
        (GPU_ROWS, {"group": 1, "block_size": 256}),
        (GPU_ROWS, {"group": 16, "heads": 2}),
        (GPU_ROWS, {"contiguous": True}),
        (FEW_ROWS, {}),
        (FEW_ROWS, {"group": 7, "block_size": 48}),
    ],
)
def test_on_a_gpu(rows, options):
    case = make(rows, **({"heads": 4} | options))
    expected = dense_attention(case, scale=SCALE)
    for tile in GPU_TILES:
        backend = TritonBackend(case.pool, case.q.shape[1], contiguous=options.get("contiguous", False))
        assert backend.prefill_kernel == "cuda"
        backend._wide._tile = tile
        results = [run_backend(backend, case, scale=SCALE) for _ in range(2)]
        assert torch.equal(*results) and not backend._wide._counters.any()
        assert rows is GPU_ROWS or case.meta.prepared.prefill.view(PREFILL_FIELDS, -1)[3].max() > 1
        torch.testing.assert_close(results[0].double().cpu(), expected, rtol=2**-7, atol=4e-3)


@pytest.mark.gpu
@needs_hopper
def test_a_graph_replays_other_prompts():
    """Captured with room for more than there is; queries in a packed projection."""
    case = make([(0, 700), (3000, 513), (100, 1)], heads=4)
    packed = torch.cat([case.q, case.q[:, :8]], dim=1)[:, :16]
    backend, plain = TritonBackend(case.pool, 16), TritonBackend(case.pool, 16, use_hopper=False)
    backend.reserve(case.meta, num_rows=3, num_prefill_tokens=4096)
    reserved = case.meta.prepared
    backend.prepare(case.meta)
    backend.attend(packed, 1, case.meta, scale=SCALE)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = backend.attend(packed, 1, case.meta, scale=SCALE)
    for shorter in (0, 300, 2487):
        case.meta.host_seq_lens = np.array([700, 3513 - shorter, 101], dtype=np.int32)
        case.meta.seq_lens.copy_(torch.from_numpy(case.meta.host_seq_lens))
        case.meta.prepared = reserved
        backend.prepare(case.meta)
        got.fill_(torch.nan)
        graph.replay()
        case.meta.prepared = None
        plain.prepare(case.meta)
        expected = plain.attend(packed, 1, case.meta, scale=SCALE)
        torch.testing.assert_close(got, expected, rtol=2**-6, atol=8e-3)
