"""Attention that reads common blocks once, against dense attention in float64; without a GPU interpreted."""

import pytest
import torch
from shared_cases import exact, reader, tree_case

from kvarena.engine.kernels.attention.config import SharedConfig, shared_config
from kvarena.engine.kernels.attention.shared_plan import SharedDecode
from kvarena.engine.sharing.reads import ReadRules

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = SharedConfig(32, 16, 32, 64, num_warps=4, num_stages=2, programs_per_sm=1)
RULES = ReadRules(least_part=32, most_parts=8)


def attend(case, config=SMALL, *, reserved=False, rules=RULES, multiprocessors=2):
    """What the kernel gives, and the step's items."""
    decode = SharedDecode(case.pool, case.call.q.shape[1], config, multiprocessors)
    rows = torch.arange(len(case.tables)).numpy()
    reads = reader(case, decode.most_rows, rules=rules)(rows, case.seq_lens)
    assert reads is not None and decode.fits(reads)
    if reserved:
        plan = decode.reserve(len(rows) + 3)
        decode.fill(plan, reads)
    else:
        plan = decode.plan(reads, len(rows))
    decode(case.call, plan)
    assert not plan.scratch.counters.any() and not plan.scratch.queue.any(), "ready for the next launch"
    return case.call.out.clone(), reads


def error(case, *args, **options):
    return (attend(case, *args, **options)[0].double().cpu() - exact(case)).abs().max().item()


# Prefixes of prefixes, a fork that ends within a part, two groups and a row alone; ragged.
TREE = [(8, [0, 1, 2, 3, 4, 5, 6, 7, 8]), (3, [9, 10]), (4, [0, 1, 2, 3, 4]), (2, [0, 1]), (1, [4, 5])]
OWN = [5, 16, 1, 40, 33, 2, 17, 64, 8, 30, 1, 70]


@pytest.mark.parametrize(
    "options",
    [{}, {"sliding_window": 40}, {"softcap": 5.0}, {"sinks": torch.linspace(-1.0, 3.0, 4, device=DEVICE)}],
    ids=["plain", "window", "softcap", "sinks"],
)
def test_equals_attention_row_by_row(options):
    case = tree_case(TREE, OWN, num_heads=4, num_kv_heads=1, device=DEVICE, **options)
    got, reads = attend(case)
    assert (got.double().cpu() - exact(case)).abs().max() < 2e-5
    assert {1, 2, 5, 9} <= set(reads.num_rows.tolist()), "each size of tile has something to do"


def test_a_plan_of_fixed_address_gives_the_same_bits_every_time():
    """Whoever takes which item, and by a queue or in turn."""
    case = tree_case(TREE, OWN, num_heads=4, num_kv_heads=1, device=DEVICE)
    first, _ = attend(case)
    assert torch.equal(attend(case, SMALL._replace(queue=False), reserved=True, multiprocessors=5)[0], first)


@pytest.mark.parametrize("heads", [(3, 1, 24), (2, 2, 16), (14, 2, 32)])
def test_head_layouts(heads):
    num_heads, num_kv_heads, head_dim = heads
    case = tree_case(
        [(4, list(range(12)))], [3] * 12, num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim,
        device=DEVICE,
    )  # fmt: skip
    assert error(case, shared_config(head_dim, 4, num_heads // num_kv_heads)) < 2e-5


def test_bf16_is_no_further_off_than_row_by_row():
    case = tree_case([(8, list(range(9)))], [20] * 9, dtype=torch.bfloat16, device=DEVICE)
    assert error(case) < 0.03


@pytest.mark.slow
@pytest.mark.parametrize("num_rows", [1, 2, 7, 32, 256])
@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_any_number_of_rows_and_depth(num_rows, depth):
    """Beside a row of its own; each prefix within a prefix is of half as many rows."""
    prefixes = [(2 * (5 - level), list(range(max(1, num_rows >> level)))) for level in range(depth)]
    own = [1 + 11 * row % 67 for row in range(num_rows + 1)]
    case = tree_case(prefixes, own, num_heads=4, num_kv_heads=1, device=DEVICE)
    rules = RULES._replace(most_parts=64)
    if num_rows == 1:
        assert reader(case, rules=rules)(torch.arange(2).numpy(), case.seq_lens) is None
    else:
        assert error(case, rules=rules) < 2e-5
