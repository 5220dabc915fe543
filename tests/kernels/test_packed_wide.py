"""Products of many rows with weights of 4 bits on Hopper: how they are cut, that they compile, and their results."""

from itertools import islice, pairwise, product

import pytest
import torch
from torch.nn import functional as F

from kvarena.engine.kernels.gemm.packed_stream import StreamWeight, chunk_bytes, pack_stream, takes
from kvarena.engine.kernels.gemm.packed_wide import (
    FEWEST_ROWS,
    PackedWideGemm,
    PackedWideTile,
    WideShape,
    clusters_at_once,
    constants_of,
    fitting_rows,
    packed_wide_tile,
    plan_of,
)
from kvarena.engine.kernels.hopper import SHARED_BYTES, compile_source, kernel_source, load_hopper_kernels, nvrtc_major

H100 = 132
needs_hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="wgmma is Hopper's"
)
# Llama-3.1-8B's, Qwen2.5-7B's, and small ones whose last block or tile is not full: rows of w, columns, gated.
PRODUCTS = (
    (28672, 4096, True), (4096, 14336, False), (6144, 4096, False), (4096, 4096, False), (37888, 3584, True),
    (3584, 18944, False), (200, 1024, False), (384, 1024, True), (1000, 2048, False), (64, 256, False),
)  # fmt: skip
ROWS = (65, 100, 128, 130, 200, 256, 300, 512, 1000, 2048, 8192)
# Each way to cut: whole tiles, tiles with a shared block, rows by cluster, parts of K, even shares of all steps.
TILES = (
    PackedWideTile(128, 2, 4), PackedWideTile(64, 2, 3, 4), PackedWideTile(256, 1, 2, 2),
    PackedWideTile(128, 1, 2, 2, 2), PackedWideTile(128, 2, 3, 1, 2), PackedWideTile(96, 1, 2),
    PackedWideTile(256, 1, 2, 2, 4),
    PackedWideTile(128, 2, 4, 1, 4), PackedWideTile(160, 1, 2, 4), PackedWideTile(224, 1, 2, 2),
    PackedWideTile(256, 1, 2, 2, even=True), PackedWideTile(128, 1, 2, 2, even=True),
    PackedWideTile(224, 1, 2, 2, even=True), PackedWideTile(128, 2, 4, 2, even=True),
)  # fmt: skip


def weight_of(num_outputs, num_inputs, glu, groups=1):
    """A weight without storage."""
    chunks = torch.empty(-(-num_outputs // 64), num_inputs // 128, chunk_bytes(groups) // 4, device="meta")
    return StreamWeight(chunks, (num_outputs, num_inputs), groups, glu)


def shape_of(num_rows, weight):
    return WideShape(num_rows, *weight.chunks.shape[:2], weight.groups, weight.glu)


def tasks(tile, numbers):
    """What the kernel's `task_of` gives: first block and first row of every program, by task."""
    *_, row_tiles, col_tiles, row_group, _, _ = numbers
    for index in range(row_tiles * col_tiles):
        group, rest = divmod(index, row_group * col_tiles)
        before = group * row_group
        wide = min(row_group, row_tiles - before)
        for mate in range(tile.share):
            yield (rest // wide * tile.share + mate) * tile.blocks, (before + rest % wide) * tile.rows


@pytest.mark.parametrize(("num_outputs", "num_inputs", "glu"), PRODUCTS)
def test_every_block_meets_every_row_once(num_outputs, num_inputs, glu):
    weight = weight_of(num_outputs, num_inputs, glu)
    blocks = len(weight.chunks)
    for num_rows in ROWS:
        tile = packed_wide_tile(num_rows, weight, H100, glu=weight.glu)
        ways = [tile, *(one for one in TILES if one.fits(shape_of(num_rows, weight)))]
        for way in ways:
            plan = plan_of(way, num_rows, weight, num_outputs, num_outputs, clusters_at_once(H100, way.cluster))
            seen = set()
            for first, row in tasks(way, plan.numbers):
                for block in range(first, first + way.blocks):
                    assert (block, row) not in seen, (way, "a result is written twice")
                    seen.add((block, row))
            expected = {(block, row) for block in range(blocks) for row in range(0, num_rows, way.rows)}
            assert expected <= seen, way
            steps, row_tiles, col_tiles = plan.numbers[3], *plan.numbers[5:7]
            assert 1 <= plan.clusters <= row_tiles * col_tiles * (steps if way.even else 1), way
            assert way.parts == 1 or plan.clusters == row_tiles * col_tiles, "parts of K meet once"


@pytest.mark.parametrize("num_rows", [130, 256, 2048])
def test_even_shares_are_equal_and_leave_nothing_out(num_rows):
    """As the kernel's `Walk` has them: every step of every tile is one cluster's."""
    for made in PRODUCTS:
        weight, tile = weight_of(*made), PackedWideTile(128, 1, 2, 2, even=True)
        plan = plan_of(tile, num_rows, weight, 8, 8, 66)
        steps, row_tiles, col_tiles = plan.numbers[3], *plan.numbers[5:7]
        share, more = plan.numbers[-2:]
        begins = [cluster * share + min(cluster, more) for cluster in range(plan.clusters + 1)]
        assert begins[0] == 0 and begins[-1] == row_tiles * col_tiles * steps
        sizes = {end - begin for begin, end in pairwise(begins)}
        assert min(sizes) >= 1 and max(sizes) - min(sizes) <= 1
        assert plan.clusters == min(66, begins[-1])


def test_launches_of_a_models_products():
    """Those that were fastest of 146 settings on an H200, as far as they were among them: even shares were not."""
    picked = {
        num_rows: [packed_wide_tile(num_rows, weight_of(*made), H100, glu=made[2]) for made in PRODUCTS[:4]]
        for num_rows in (65, 128, 256, 512, 2048)
    }
    whole, even = PackedWideTile(256, 1, 2, share=2), PackedWideTile(256, 1, 2, share=2, even=True)
    two, four = PackedWideTile(96, 1, 2, 2, 2), PackedWideTile(128, 1, 2, 2, 2)
    assert picked[65] == [PackedWideTile(96, 2, 4, share=2), two, two, two]
    assert picked[128] == [PackedWideTile(128, 2, 4, share=2), four, four, four]
    assert picked[256] == [whole, even, PackedWideTile(128, 2, 3, parts=2), PackedWideTile(128, 1, 2, parts=2)]
    assert picked[512] == [whole, even, even, PackedWideTile(128, 1, 2, share=2)]
    assert picked[2048] == [whole] * 4


def test_tiles_have_as_few_rows_as_take_all():
    assert [fitting_rows(count) for count in (33, 65, 129, 161, 200, 256, 257, 300, 600, 8192)] == [
        64, 96, 160, 192, 224, 256, 160, 160, 224, 256,
    ]  # fmt: skip
    assert [fitting_rows(count, 128) for count in (96, 129, 192, 200, 300)] == [96, 96, 96, 128, 128]
    gate_up = weight_of(28672, 4096, True)
    assert [packed_wide_tile(count, gate_up, H100, glu=True).rows for count in (136, 168, 200, 232)] == [
        160,
        192,
        224,
        256,
    ]


def test_no_launch_leaves_much_of_the_device_idle():
    """Of a large model's products: a cluster's steps, of 128 rows of w and 256 of x, beside an equal share of all."""
    for made, num_rows in product(PRODUCTS[:4], (160, 256, 300, 512, 768, 1000, 1300, 2048, 8192)):
        weight = weight_of(*made)
        tile = packed_wide_tile(num_rows, weight, H100, glu=made[2])
        plan = plan_of(tile, num_rows, weight, 8, 8, clusters_at_once(H100, tile.cluster))
        steps, row_tiles, col_tiles = plan.numbers[3], *plan.numbers[5:7]
        longest = plan.numbers[-2] + 1 if tile.even else -(-row_tiles * col_tiles // plan.clusters) * steps
        work = longest * tile.blocks * tile.rows
        assert work <= 1.4 * len(weight.chunks) * (made[1] // 128) * row_tiles * tile.rows / H100, (
            made,
            num_rows,
            tile,
        )


def test_few_rows_have_no_wide_tile():
    assert packed_wide_tile(FEWEST_ROWS - 1, weight_of(4096, 4096, False), H100) is None
    assert packed_wide_tile(FEWEST_ROWS, weight_of(4096, 4096, False), H100) is not None


def test_tiles_that_the_kernel_cannot_be_compiled_for_do_not_fit():
    plain, gated = shape_of(256, weight_of(4096, 4096, False)), shape_of(256, weight_of(28672, 4096, True))
    for tile, why in (
        (PackedWideTile(100, 1, 2), "no whole turns"), (PackedWideTile(256, 2, 4), "too many sums"),
        (PackedWideTile(128, 1, 1), "a shared block alone"), (PackedWideTile(96, 2, 3), "half of 96 rows"),
        (PackedWideTile(128, 2, 2), "too few blocks"), (PackedWideTile(128, 2, 4, 1, 2, True), "K is cut in two ways"),
        (PackedWideTile(96, 1, 2, 1, 4), "slices of 3 places"),
        (PackedWideTile(128, 2, 3, 2, even=True), "a shared block"), (PackedWideTile(128, 1, 2, even=True), "alone"),
    ):  # fmt: skip
        assert not tile.fits(plain), why
    assert PackedWideTile(128, 2, 3, 1, 2).fits(plain)
    assert PackedWideTile(160, 1, 2, 1, 2).fits(plain)
    assert not PackedWideTile(160, 1, 2, 1, 2).fits(gated), "slices of 10 places, by turns of 4"
    assert PackedWideTile(256, 1, 2, 1, 4).fits(plain)
    assert not PackedWideTile(256, 1, 2, 1, 4).fits(gated), "registers"
    assert not PackedWideTile(128, 1, 2, 1, 2).fits(plain._replace(chunks=23)), "an odd number of steps"


def test_every_product_has_a_launch_that_fits():
    for made, num_rows, groups in product(PRODUCTS, (FEWEST_ROWS, *ROWS), (1, 2, 4)):
        weight = weight_of(*made, groups)
        tile = packed_wide_tile(num_rows, weight, H100, glu=made[2])
        held = tile.num_stages(groups) * tile.stage_bytes(groups) + tile.swap_bytes + 1024
        assert held + 16 * tile.num_stages(groups) <= SHARED_BYTES, tile
        assert tile.num_stages(groups) >= 3, tile


def sources():
    """Every kernel that the products ask for, and every way to cut, once each."""
    seen = set()
    for (num_outputs, num_inputs, glu), groups in product(PRODUCTS, (1, 4, 2)):
        weight = weight_of(num_outputs, num_inputs, glu, groups)
        picked = [packed_wide_tile(num_rows, weight, H100, glu=weight.glu) for num_rows in ROWS]
        for tile in (*TILES, *picked):
            if not tile.fits(shape_of(256, weight)):
                continue
            for mode in ("GLU",) if glu else ("ADD", "STORE"):
                constants = constants_of(tile, groups, mode)
                if (key := tuple(constants.values())) not in seen:
                    seen.add(key)
                    yield constants, tile.rows


@pytest.mark.parametrize("step", [60, pytest.param(1, marks=pytest.mark.slow)], ids=["some", "all"])
def test_every_launch_compiles_without_spills(step):
    nvrtc = pytest.importorskip("cuda.bindings.nvrtc", reason="needs pip install 'kvarena[gpu]'")
    try:
        nvrtc_major(nvrtc)
    except OSError as error:
        pytest.skip(str(error))
    count = 0
    for constants, cols in islice(sources(), None, None, step):
        cubin, said = compile_source(nvrtc, kernel_source("wide_packed", constants, cols))
        assert cubin.startswith(b"\x7fELF")
        assert " 0 bytes spill stores, 0 bytes spill loads" in said, (constants, said)
        assert "warning" not in said, (constants, said)
        assert "serialized" not in said, (constants, said)
        count += 1
    assert count >= 3


@pytest.fixture(scope="module")
def on_card():
    """The kernel for this card, the launches of all tests compiled at once."""
    gemm = PackedWideGemm(load_hopper_kernels("cuda"))
    shapes = [shape_of(256, weight_of(*made)) for made in SMALL]
    gemm.prepare(
        (tile, groups_of(group_size), mode, half)
        for tile, settings in SETTINGS
        for (group_size, _, half), shape, mode in product(settings, shapes, ("STORE", "ADD", "GLU"))
        if tile.fits(shape) and shape.glu == (mode == "GLU")
    )
    return gemm


# Outputs, inputs, gated; groups of inputs, symmetric, float16. Every tile with one setting, two of them with all.
SMALL = ((200, 1024, False), (1088, 1024, False), (640, 1024, True))
GROUPS = ((128, False, False), (64, False, False), (32, True, False), (1024, False, False), (128, False, True))
SETTINGS = [(tile, GROUPS if tile in (TILES[3], TILES[12]) else GROUPS[:1]) for tile in TILES]


def groups_of(group_size):
    return max(1, 128 // group_size)


def operands(num_outputs, num_inputs, group_size, *, symmetric=False):
    """Codes, scales, zeros on the GPU, and the weight in float64."""
    torch.manual_seed(group_size)
    groups = num_inputs // group_size
    codes = torch.randint(0, 16, (num_outputs, num_inputs), dtype=torch.uint8, device="cuda")
    scales = ((torch.rand(groups, num_outputs, device="cuda") + 0.5) * 0.2 * num_inputs**-0.5).half()
    zeros = None if symmetric else torch.randint(0, 16, (groups, num_outputs), dtype=torch.uint8, device="cuda")
    middle = 8.0 if zeros is None else zeros.double().t().repeat_interleave(group_size, 1)
    return codes, scales, zeros, (codes.double() - middle) * scales.double().t().repeat_interleave(group_size, 1)


def check_on_card(gemm, tiles, made, group_size, symmetric, half):
    """Against float64, where nothing else may be written; launches overlapped or not give the same."""
    num_outputs, num_inputs, glu = made
    dtype = torch.float16 if half else torch.bfloat16
    codes, scales, zeros, plain = operands(num_outputs, num_inputs, group_size, symmetric=symmetric)
    weight = pack_stream(codes, scales, zeros, group_size, glu=glu)
    num_cols = num_outputs // 2 if glu else num_outputs
    for num_rows in (65, 256, 300, 1000):
        x = torch.randn(num_rows, num_inputs, device="cuda", dtype=dtype)
        held = torch.randn(num_rows, num_cols, device="cuda", dtype=dtype)
        y = x.double() @ plain.t()
        if glu:
            y = F.silu(y[:, :num_cols]) * y[:, num_cols:]
        room = torch.full((num_rows + 4, num_cols + 16), float("nan"), device="cuda", dtype=dtype)
        out = room[:num_rows, 8 : num_cols + 8]
        for tile, add in product(tiles, (False,) if glu else (False, True)):
            if not tile.fits(shape_of(num_rows, weight)):
                continue
            results = []
            for overlap in (True, False):
                out.copy_(held if add else torch.full_like(held, float("nan")))
                gemm(x, weight, tile, residual=out if add else None, out=out, glu=glu, overlap=overlap)
                results.append(out.clone())
            expected = y + held.double() if add else y
            assert (results[0].double() - expected).norm() <= 4e-3 * expected.norm(), (tile, num_rows, add)
            assert torch.equal(*results), (tile, num_rows, add)
            out.fill_(float("nan"))
            assert room.isnan().all(), "nothing beyond the results is written"


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize("made", SMALL, ids=str)
@pytest.mark.parametrize(("group_size", "symmetric", "half"), GROUPS)
def test_products(on_card, group_size, symmetric, half, made):
    assert takes(*made[:2], group_size, made[1] // group_size, glu=made[2])
    tiles = [tile for tile, settings in SETTINGS if (group_size, symmetric, half) in settings]
    check_on_card(on_card, tiles, made, group_size, symmetric, half)


@pytest.mark.gpu
@pytest.mark.slow
@needs_hopper
@pytest.mark.parametrize("made", SMALL, ids=str)
@pytest.mark.parametrize(("group_size", "symmetric", "half"), GROUPS)
def test_products_by_every_tile(on_card, group_size, symmetric, half, made):
    check_on_card(on_card, TILES, made, group_size, symmetric, half)


@pytest.mark.gpu
@needs_hopper
def test_even_shares_may_follow_one_another(on_card):
    """Launches that overlap hand their sums on through the same memory."""
    (codes, scales, zeros, _), tile = operands(1024, 4096, 128), PackedWideTile(256, 1, 2, 2, even=True)
    weight = pack_stream(codes, scales, zeros, 128, glu=False)
    x = torch.randn(256, 4096, device="cuda", dtype=torch.bfloat16)
    alone = on_card(x, weight, tile, overlap=False)
    graph, results = torch.cuda.CUDAGraph(), []
    with torch.cuda.graph(graph):
        results += [on_card(x, weight, tile) for _ in range(20)]
    for _ in range(5):
        graph.replay()
        assert all(torch.equal(result, alone) for result in results)


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize("num_rows", [65, 130, 256, 1000])
def test_products_of_a_models_shapes(on_card, num_rows):
    count = torch.cuda.get_device_properties(0).multi_processor_count
    launches = [(made, packed_wide_tile(num_rows, weight_of(*made), count, glu=made[2])) for made in PRODUCTS[:4]]
    on_card.prepare((tile, 1, "GLU" if made[2] else "STORE", False) for made, tile in launches)
    for (num_outputs, num_inputs, glu), tile in launches:
        codes, scales, zeros, plain = operands(num_outputs, num_inputs, 128)
        weight = pack_stream(codes, scales, zeros, 128, glu=glu)
        x = torch.randn(num_rows, num_inputs, device="cuda", dtype=torch.bfloat16)
        y = x.double() @ plain.t()
        if glu:
            gate, up = y.chunk(2, dim=1)
            y = F.silu(gate) * up
        got = on_card(x, weight, tile, glu=glu)
        assert (got.double() - y).norm() <= 4e-3 * y.norm(), (num_outputs, tile)
