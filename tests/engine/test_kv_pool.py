"""The KV pool: views, copies in list order, sizing and its error lines."""

import pytest
import torch

from kvarena.engine.contract import BlockCopy, CopyKind
from kvarena.engine.errors import ConfigError, EngineError
from kvarena.engine.pool.kv_pool import GIB, KVPool, blocks_for_budget, independent_runs

DEVICE, OUT, IN = CopyKind.DEVICE, CopyKind.SWAP_OUT, CopyKind.SWAP_IN


def make_pool(num_blocks: int = 6, block_size: int = 2, num_swap_blocks: int = 0) -> KVPool:
    pool = KVPool(
        num_blocks=num_blocks,
        block_size=block_size,
        num_layers=2,
        num_kv_heads=1,
        head_dim=3,
        num_swap_blocks=num_swap_blocks,
    )
    pool.data.copy_(torch.arange(pool.data.numel(), dtype=torch.float32).view_as(pool.data))
    return pool


def test_views_share_memory_and_follow_the_address_formula():
    pool = make_pool(block_size=3)
    keys, values = pool.slots(1)
    keys[4 * 3 + 2] = 7.0
    values[4 * 3 + 1] = 8.0
    assert pool.blocks(1)[0][4, 2].tolist() == [[7.0] * 3]
    assert pool.blocks(1)[1][4, 1].tolist() == [[8.0] * 3]
    assert pool.num_slots == 18
    assert pool.num_bytes == pool.data.numel() * 4


@pytest.mark.parametrize("seed", range(20))
def test_batched_copies_equal_one_by_one(seed):
    generator = torch.Generator().manual_seed(seed)
    kinds = [DEVICE, DEVICE, DEVICE, OUT, IN]
    copies = []
    for _ in range(12):
        kind = kinds[int(torch.randint(5, (1,), generator=generator))]
        src, dst = torch.randint(1, 5, (2,), generator=generator).tolist()
        copies.append(BlockCopy(kind, src, dst))
    batched, single = make_pool(num_swap_blocks=4), make_pool(num_swap_blocks=4)
    batched.apply_copies(copies)
    device = single.data.view(4, 7, 6).transpose(0, 1)  # by block, as in the host pool
    for copy in copies:
        source = single.host.data if copy.kind is IN else device
        destination = single.host.data if copy.kind is OUT else device
        destination[copy.dst] = source[copy.src].clone()
    assert torch.equal(batched.data, single.data)
    assert torch.equal(batched.host.data, single.host.data)


def test_runs_split_only_where_copies_conflict():
    chain = [BlockCopy(DEVICE, 1, 2), BlockCopy(DEVICE, 3, 4), BlockCopy(DEVICE, 2, 5), BlockCopy(DEVICE, 1, 6)]
    assert [run[1:] for run in independent_runs(chain)] == [([1, 3], [2, 4]), ([2, 1], [5, 6])]
    # Overwriting what the run only read is no conflict: all reads come first.
    assert len(list(independent_runs([BlockCopy(DEVICE, 1, 2), BlockCopy(DEVICE, 3, 1)]))) == 1
    assert len(list(independent_runs([BlockCopy(OUT, 1, 2), BlockCopy(OUT, 2, 3)]))) == 1
    assert list(independent_runs([])) == []


def test_bad_copies_are_errors():
    with pytest.raises(EngineError, match=r"block 7, outside 0\.\.6"):
        make_pool().apply_copies([BlockCopy(DEVICE, 1, 7)])
    with pytest.raises(EngineError, match="swap_gib"):
        make_pool().apply_copies([BlockCopy(OUT, 1, 1)])


def test_sizing():
    assert blocks_for_budget(16, 100, num_blocks=5) == 5
    assert blocks_for_budget(16, 100, num_slots=100) == 6
    assert blocks_for_budget(16, 100, memory_gib=1.0) == GIB // 1600 - 1
    assert blocks_for_budget(16, 100, available_bytes=16000) == 9


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ({}, "exactly one of kv_cache.num_blocks"),
        ({"num_blocks": 1, "num_slots": 16}, "exactly one of kv_cache.num_blocks"),
        ({"num_blocks": 0}, "kv_cache.num_blocks=0 .* raise it to at least 1"),
        ({"num_slots": 15}, "kv_cache.num_slots=15 .* raise it to at least 16"),
        ({"memory_gib": 1e-7}, "kv_cache.memory_gib=1e-07 .* raise it to at least 0.0000"),
        ({"available_bytes": -5}, "raise engine.gpu_memory_utilization"),
    ],
)
def test_a_pool_too_small_for_one_block_says_what_to_raise(size, message):
    with pytest.raises(ConfigError, match=message) as error:
        blocks_for_budget(16, 100, **size)
    assert "\n" not in str(error.value)


def test_a_block_without_slots_is_refused():
    with pytest.raises(ConfigError, match="block_size=0 must be an integer of at least 1"):
        blocks_for_budget(0, 100, num_slots=100)


def test_the_memory_gib_that_the_error_names_is_enough():
    with pytest.raises(ConfigError) as error:
        blocks_for_budget(16, 2048, memory_gib=1e-6)
    least = float(str(error.value).rsplit(" ", 1)[1])
    assert blocks_for_budget(16, 2048, memory_gib=least) >= 1


def test_out_of_memory_names_the_setting():
    with pytest.raises(EngineError, match=r"GiB were free; lower kv_cache\.num_blocks"):
        KVPool(num_blocks=2**40, block_size=16, num_layers=2, num_kv_heads=8, head_dim=128)
