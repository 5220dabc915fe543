"""How many requests of one length an empty pool holds: what an allocator says is what it does."""

import pytest
from allocator_machine import make_request

from kvarena.experiments.settings.compose import load_run
from kvarena.experiments.settings.targets import instantiate


@pytest.mark.parametrize("allocator", ["paged", "paged_prefix", "radix", "contiguous", "orca_pow2", "virtual"])
@pytest.mark.parametrize(("num_blocks", "length"), [(100, 1500), (200, 512), (513, 33), (90, 1440), (8, 200)])
def test_as_many_as_are_said(allocator, num_blocks, length):
    cfg = load_run([f"allocator={allocator}", *(["allocator.max_regions=5"] if allocator == "virtual" else [])])
    made = instantiate(cfg.allocator, num_blocks=num_blocks, max_model_len=length, kv_bytes_per_token=2048)
    held = 0
    while made.allocate(make_request(f"r{held}", [held] * (length - 1), max_tokens=1), length):
        held += 1
    assert held == made.max_requests(length)
