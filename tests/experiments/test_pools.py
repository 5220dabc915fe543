"""Which pool an allocator gets, and which settings a virtual one refuses on a GPU."""

from __future__ import annotations

import functools
import sys
from typing import Any

import pytest
import torch

from kvarena.allocators.paged import PagedAllocator
from kvarena.allocators.virtual import VirtualAllocator
from kvarena.engine.errors import ConfigError
from kvarena.engine.models import ModelSpec
from kvarena.engine.pool.kv_pool import KVPool
from kvarena.experiments.building import pools
from kvarena.experiments.settings.compose import load_run
from kvarena.experiments.settings.config import RunnerConfig

make_pool = functools.partial(pools.make_pool, sized_by="kv_cache.num_blocks")
SPEC = ModelSpec("small", 2, 2, 64, 8, 64, torch.float32, frozenset(), None, 0)


def config(*overrides: str) -> RunnerConfig:
    return load_run(overrides).runner


def virtual(**options: Any) -> VirtualAllocator:
    return VirtualAllocator(
        num_blocks=1024, block_size=16, max_model_len=64, kv_bytes_per_token=2048, max_regions=4, **options
    )


def test_on_a_cpu_the_tensor_is_as_large_as_the_virtual_space():
    allocator = virtual()
    pool = make_pool(config(), allocator, SPEC, "cpu")
    assert type(pool) is KVPool
    assert pool.num_blocks == allocator.num_virtual_blocks


def test_physical_blocks_get_a_plain_pool():
    pool = make_pool(config(), PagedAllocator(num_blocks=5, block_size=16, max_model_len=64), SPEC, "cpu")
    assert pool.num_blocks == 5


@pytest.mark.parametrize(
    ("overrides", "options", "message"),
    [
        (["runner.attention=reference"], {}, "runner.attention=reference reads whole blocks"),
        ([], {"page_tokens": 64}, "set allocator.page_tokens=null"),
        ([], {"kv_tensors": 4}, "allocator.kv_tensors=2"),
    ],
)
def test_what_cannot_be_mapped_is_refused_before_the_gpu_is_asked(overrides, options, message):
    with pytest.raises(ConfigError, match=message):
        make_pool(config(*overrides), virtual(**options), SPEC, "cuda")


def test_a_missing_binding_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)  # as if it were not installed
    with pytest.raises(ConfigError, match=r"pip install 'kvarena\[gpu\]'"):
        make_pool(config(), virtual(), SPEC, "cuda")
