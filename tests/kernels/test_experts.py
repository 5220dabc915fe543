"""Routing, sort, grouped products and sum of a layer's experts, against float64."""

from itertools import product

import pytest
import torch
from cards import few_on_a_card

from kvarena.engine.kernels.experts import routing as routing_module
from kvarena.engine.kernels.experts.few import RouterSource
from kvarena.engine.kernels.experts.layer import run_experts
from kvarena.engine.kernels.experts.products import MANY_ROWS, TILES, tile_for
from kvarena.engine.kernels.experts.routing import joins, max_items, route
from kvarena.engine.kernels.norm import rms_norm

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
UPCAST = DEVICE == "cpu"
SMALL = TILES[12]
# Of float32 sums; of bf16 two units in the last place for each of three roundings (the interpreter truncates).
BOUND = {torch.float32: 2e-5, torch.bfloat16: 6 * 2.0**-8}


def inputs(tokens, experts, hidden=24, inner=20, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)

    def randn(*size, dtype=dtype):
        return torch.randn(*size, generator=g).to(dtype).to(DEVICE)

    x, residual = randn(tokens, hidden), randn(tokens, hidden)
    # Of logits in bf16 some would be equal, and either choice right.
    logits = randn(tokens, experts, dtype=torch.float32)
    return x, residual, logits, randn(experts, 2 * inner, hidden) * 0.2, randn(experts, hidden, inner)


def exact(x, residual, logits, gate_up, down, top_k, renormalize):
    """In float64; also the experts that are read."""
    probs = logits.double().softmax(-1)
    weights, ids = probs.topk(top_k)
    if renormalize:
        weights = weights / weights.sum(-1, keepdim=True)
    out = residual.double().clone()
    for token, choice in product(range(len(x)), range(top_k)):
        expert = ids[token, choice]
        gate, up = (gate_up[expert].double() @ x[token].double()).chunk(2)
        act = torch.nn.functional.silu(gate) * up
        out[token] += weights[token, choice] * (down[expert].double() @ act)
    return out, ids


def check(tokens, experts, top_k, renormalize, *, tile=None, logits=None, **kind):
    x, residual, drawn, gate_up, down = inputs(tokens, experts, **kind)
    logits = drawn if logits is None else logits.to(DEVICE)
    wanted, ids = exact(x, residual, logits, gate_up, down, top_k, renormalize)
    num_read = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    shared = run_experts(
        residual, x, logits, gate_up, down, None, 0, top_k=top_k, renormalize=renormalize, num_read=num_read,
        upcast=UPCAST, tile=tile,
    )  # fmt: skip
    bound = BOUND[x.dtype]
    torch.testing.assert_close(residual.double(), wanted, rtol=bound, atol=bound * float(wanted.abs().max()))
    assert int(num_read) == len(ids.unique())
    assert shared is None


QUICK = [(4, 1, True), (4, 2, False), (6, 3, True), (8, 4, False), (8, 8, True), (16, 5, True), (12, 6, False),
         (9, 7, True), (128, 8, True)]  # fmt: skip


# Counts by one launch and by two in turn; all by both in `make test-all`.
LAYERS = [
    pytest.param(*one, few_pairs, marks=() if (place + (few_pairs == 0)) % 2 else pytest.mark.slow)
    for place, one in enumerate(few_on_a_card(QUICK, [QUICK[3], QUICK[8]]))
    for few_pairs in (64, 0)
]


@pytest.mark.parametrize(("experts", "top_k", "renormalize", "few_pairs"), LAYERS)
def test_a_layer_equals_float64(monkeypatch, few_pairs, experts, top_k, renormalize):
    monkeypatch.setattr(routing_module, "FEW_PAIRS", few_pairs)
    check(3, experts, top_k, renormalize)


GRID = [(experts, top_k) for experts, top_k in product((4, 7, 8, 16, 60, 64, 128), range(1, 9)) if top_k <= experts]


@pytest.mark.slow
@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize(("experts", "top_k"), GRID)
def test_every_count_of_experts(experts, top_k, renormalize):
    """In both types, but of many experts: there the interpreter's time goes into the sort, which sees no type."""
    check(17, experts, top_k, renormalize, seed=top_k)
    if experts <= 16:
        check(2, experts, top_k, renormalize, dtype=torch.bfloat16, seed=top_k)


@pytest.mark.parametrize("tile", [SMALL, TILES[96], MANY_ROWS], ids=lambda tile: f"{tile.rows} rows")
def test_bfloat16_in_every_orientation(tile):
    check(5, 4, 2, True, tile=tile, dtype=torch.bfloat16, hidden=32, inner=48)


@pytest.mark.parametrize("tile", [SMALL, MANY_ROWS], ids=["few rows", "many rows"])
def test_all_tokens_to_one_expert(tile):
    """Its pairs take several items where a tile is small; all other experts are empty."""
    tokens = 2 * SMALL.rows + 3
    logits = torch.full((tokens, 5), -4.0)
    logits[:, 3] = 4.0
    check(tokens, 5, 1, False, tile=tile, logits=logits + 0.01 * torch.randn(tokens, 5))


def test_sizes_that_no_tile_divides():
    check(3, 4, 2, True, hidden=137, inner=70)


def test_padding_gets_no_expert_and_changes_nothing():
    """Tokens whose slot is in the null block: a graph's bucket beyond the step's own."""
    x, residual, logits, gate_up, down = inputs(6, 8)
    wanted, ids = exact(x[:2], residual[:2], logits[:2], gate_up, down, 2, True)
    slots = torch.tensor([4, 9, 0, 3, 0, 1], device=DEVICE)
    before, num_read = residual.clone(), torch.full((1,), -1, dtype=torch.int32, device=DEVICE)
    options = {"top_k": 2, "renormalize": True, "num_read": num_read, "upcast": UPCAST}
    x[2:] = torch.nan  # what padding holds is nobody's business
    run_experts(residual, x, logits, gate_up, down, slots, 4, **options)
    torch.testing.assert_close(residual[:2].double(), wanted, rtol=2e-5, atol=2e-5)
    assert torch.equal(residual[2:], before[2:])
    assert int(num_read) == len(ids.unique())
    run_experts(residual, x, logits, gate_up, down, torch.zeros_like(slots), 4, **options)
    assert int(num_read) == 0 and torch.equal(residual[2:], before[2:])


def test_the_gate_of_a_shared_expert_is_the_column_behind():
    logits = torch.randn(3, 5, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    num_read = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    routing = route(logits, None, 0, 4, 2, renormalize=False, tile_rows=16, num_read=num_read)
    torch.testing.assert_close(routing.shared, logits[:, 4].sigmoid())
    torch.testing.assert_close(routing.weights, logits[:, :4].softmax(-1).topk(2).values)


@pytest.mark.parametrize("few_pairs", [64, 0], ids=["one launch", "two launches"])
@pytest.mark.parametrize("seed", range(3))
def test_any_routing_fits_the_grid_of_its_tokens(monkeypatch, few_pairs, seed):
    """The work list of one fixed grid holds every pair once, whatever the routing."""
    monkeypatch.setattr(routing_module, "FEW_PAIRS", few_pairs)
    experts, top_k, rows, tokens = 6, 2, 4, 23
    logits = torch.randn(tokens, experts, generator=torch.Generator().manual_seed(seed)) * 3 * seed
    num_read = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    routing = route(logits.to(DEVICE), None, 0, experts, top_k, renormalize=True, tile_rows=rows, num_read=num_read)
    assert routing.items.shape == (4, max_items(tokens * top_k, experts, rows))
    used = routing.items[:, routing.items[0] >= 0]
    assert (routing.items[0, used.shape[1] :] == -1).all()
    assert used[1].tolist() == [0, *used[2, :-1].tolist()] and int(used[2, -1]) == tokens * top_k
    assert int((used[2] - used[1]).max()) <= rows
    assert sorted(routing.order.tolist()) == list(range(tokens * top_k))
    for expert, begin, end, first in used.t().tolist():
        assert (routing.ids.flatten()[routing.order[begin:end].long()] == expert).all()
        assert used[1, first] == begin


ROUTED = [(1, 8, 128), (8, 8, 60), (21, 2, 6), (3, 3, 4), (64, 1, 2)]


@pytest.mark.parametrize(("tokens", "top_k", "experts"), few_on_a_card(ROUTED, [ROUTED[1]]))
def test_one_launch_routes_few_tokens_as_two_do(monkeypatch, tokens, top_k, experts):
    """With padding, a shared expert's gate, experts of several items, and spans of them."""
    g = torch.Generator().manual_seed(tokens)
    logits = torch.randn(tokens, experts + 1, generator=g).to(DEVICE)
    slots = torch.randint(0, 5, (tokens,), generator=g).to(DEVICE)
    slots[0] = 4
    found = []
    for few_pairs in (64, 0):
        monkeypatch.setattr(routing_module, "FEW_PAIRS", few_pairs)
        num_read = torch.full((1,), -9, dtype=torch.int32, device=DEVICE)
        given = {"renormalize": tokens % 2 == 0, "tile_rows": 4, "num_read": num_read, "span_items": 3}
        found.append([*route(logits, slots, 1, experts, top_k, **given), num_read])
    items, order = found[0][3], found[0][2]
    used = items[0] >= 0
    computed = int((slots >= 1).sum()) * top_k
    assert (order[computed:] == -1).all() and (order[:computed] >= 0).all() and items[2, used].max() == computed
    for one, two in zip(*found, strict=True):
        if one is items:
            assert torch.equal(one[0], two[0])
            one, two = one[:, used], two[:, used]
        torch.testing.assert_close(one, two, rtol=1e-6, atol=0)


JOINED = [(1, 8, 128), (8, 8, 60), (3, 2, 4), (5, 3, 6), (1, 1, 1)]


@pytest.mark.parametrize(("tokens", "top_k", "experts"), few_on_a_card(JOINED, JOINED[:2]))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm_and_router_in_the_launch_that_routes(monkeypatch, dtype, tokens, top_k, experts):
    """What the three launches give: the normed stream, logits and routing; and the next launch can follow."""
    monkeypatch.setattr(routing_module, "MOST_JOINED", 8)
    g = torch.Generator().manual_seed(tokens)
    hidden, has_shared = 72, tokens % 2 == 1
    stream, norm = (torch.randn(n, hidden + 8, generator=g).to(DEVICE, dtype)[:, :hidden] for n in (tokens, 1))
    router = torch.randn(experts + has_shared, hidden, generator=g).to(DEVICE, dtype)
    slots = torch.randint(0, 5, (tokens,), generator=g).to(DEVICE)
    slots[0] = 4
    wanted = rms_norm(stream, norm[0], 1e-5)
    exact_logits = wanted.double() @ router.double().t()
    assert joins(tokens, top_k, experts)
    lock = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    num_read = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    given = {"renormalize": True, "tile_rows": 4, "num_read": num_read, "span_items": 3}
    for _ in range(2):
        x = torch.full((tokens, hidden), torch.nan, device=DEVICE, dtype=dtype)
        logits = torch.full((tokens, len(router)), torch.nan, device=DEVICE, dtype=dtype)
        source = RouterSource(stream, norm[0], 1e-5, router, x, lock)
        found = [*route(logits, slots, 1, experts, top_k, source=source, **given), num_read.clone()]
        assert torch.equal(x, wanted) and int(lock) == 0
        bound = BOUND[dtype]
        torch.testing.assert_close(
            logits.double(), exact_logits, rtol=bound, atol=bound * float(exact_logits.abs().max())
        )
        apart = [*route(logits, slots, 1, experts, top_k, **given), num_read]
        for one, two in zip(found, apart, strict=True):
            if one is None or one is found[3]:
                assert two is None or torch.equal(one[:, one[0] >= 0], two[:, two[0] >= 0])
            else:
                assert torch.equal(one, two)


SUMMED = [(1, 128, 8, torch.bfloat16), (8, 6, 3, torch.float32), (5, 4, 2, torch.bfloat16), (2, 8, 8, torch.float32)]


@pytest.mark.parametrize(("tokens", "experts", "top_k", "dtype"), few_on_a_card(SUMMED, SUMMED[:2]))
def test_the_second_product_adds_its_rows_up(tokens, experts, top_k, dtype):
    """As the launch behind it does, bit by bit; with padding, items that are none, and columns that fill no tile."""
    x, residual, logits, gate_up, down = inputs(tokens, experts, hidden=136, dtype=dtype)
    slots = torch.arange(tokens, device=DEVICE) % 3 + (tokens == 1)
    locks, sums = torch.zeros(8, dtype=torch.int32, device=DEVICE), []
    for given in (None, locks, locks):
        num_read = torch.zeros(1, dtype=torch.int32, device=DEVICE)
        sums.append(residual.clone())
        run_experts(
            sums[-1], x, logits, gate_up, down, slots, 1, top_k=top_k, renormalize=True, num_read=num_read,
            upcast=UPCAST, sum_locks=given,
        )  # fmt: skip
    assert torch.equal(sums[0], sums[1]) and torch.equal(sums[1], sums[2]) and not locks.any()
    assert torch.equal(sums[0][slots < 1], residual[slots < 1]) and not torch.equal(sums[0], residual)


def test_which_tokens_are_few_enough_for_one_launch(monkeypatch):
    assert joins(1, 8, 128) == (routing_module.MOST_JOINED > 0) and not joins(9, 1, 8)
    monkeypatch.setattr(routing_module, "MOST_JOINED", 8)
    assert joins(1, 8, 128) and joins(8, 8, 128) and joins(8, 2, 8)
    assert not joins(9, 2, 8) and not joins(8, 9, 128) and not joins(0, 2, 8) and not joins(8, 2, 1025)


def test_the_bound_on_items_is_reached_and_never_passed():
    for experts, rows, pairs in product((1, 3, 8), (1, 4, 16), (1, 7, 40)):
        even = [pairs // experts + (i < pairs % experts) for i in range(experts)]
        worst = [1] * (min(experts, pairs) - 1)
        for counts in (even, [pairs], [*worst, pairs - len(worst)]):
            assert sum(-(-count // rows) for count in counts) <= max_items(pairs, experts, rows)
    # 56 pairs, of which three experts have one each: 3 + ceil(53 / 16).
    assert max_items(56, 4, 16) == 7


@pytest.mark.filterwarnings("ignore:invalid value")
def test_logits_that_are_no_numbers_lead_nowhere_else():
    """Of one token; the others are as they would be."""
    x, residual, logits, gate_up, down = inputs(3, 5)
    wanted, _ = exact(x, residual, logits, gate_up, down, 2, True)
    logits[1] = torch.nan
    num_read = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    run_experts(
        residual, x, logits, gate_up, down, None, 0, top_k=2, renormalize=True, num_read=num_read, upcast=UPCAST
    )
    torch.testing.assert_close(residual[[0, 2]].double(), wanted[[0, 2]], rtol=2e-5, atol=2e-5)
    assert residual[1].isnan().all()


def test_tiles_grow_with_the_pairs_of_an_expert():
    rows = [tile_for(pairs, 8).rows for pairs in (2, 16, 64, 512, 4096, 65536)]
    assert rows == sorted(rows) and rows[0] == 16 and rows[-1] == 128
    assert tile_for(4096, 8, itemsize=4).depth == MANY_ROWS.depth // 2
