"""The virtual pool on memory that is really mapped: the contiguous kernel reads it, and greedy tokens are the same."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from checkpoints import random_prompts, write_checkpoint
from memory_drivers import KIB, FakeDriver, HostDriver

from kvarena.allocators.virtual import VirtualAllocator
from kvarena.engine.attention.base import AttentionBackend
from kvarena.engine.attention.reference import ReferenceBackend
from kvarena.engine.attention.triton_backend import TritonBackend
from kvarena.engine.clock import VirtualClock
from kvarena.engine.contract import BlockCopy, CopyKind, ScheduledRequest, StepPlan
from kvarena.engine.core import Engine, run_to_completion
from kvarena.engine.errors import EngineError
from kvarena.engine.models import LoadedModel, load_model
from kvarena.engine.pool.kv_pool import KVPool
from kvarena.engine.pool.virtual_pool import VirtualKVPool
from kvarena.engine.request import Request, SamplingParams
from kvarena.engine.runner.torch_runner import TorchRunner
from kvarena.schedulers.continuous import ContinuousScheduler

PAGE = 64 * KIB
BLOCK = 4


def make_allocator(kv_bytes_per_token: int, num_slots: int, max_regions: int = 4) -> VirtualAllocator:
    return VirtualAllocator(
        num_blocks=num_slots // BLOCK,
        block_size=BLOCK,
        max_model_len=64,
        kv_bytes_per_token=kv_bytes_per_token,
        page_bytes=PAGE,
        max_regions=max_regions,
    )


def make_pool(allocator: VirtualAllocator, driver: HostDriver | FakeDriver, **shape: Any) -> VirtualKVPool:
    return VirtualKVPool(
        num_pages=allocator.num_pages,
        page_bytes=PAGE,
        driver=driver,
        num_blocks=allocator.num_virtual_blocks,
        block_size=BLOCK,
        **shape,
    )


# 3 layers of 2 heads of 256 in fp32: 6 KiB a token among the keys, 10 2/3 tokens a page.
SHAPE = {"num_layers": 3, "num_kv_heads": 2, "head_dim": 256}
TOKEN_BYTES = 2 * 6 * KIB


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    directory = write_checkpoint(
        tmp_path_factory.mktemp("wide"), "llama", num_attention_heads=2, num_key_value_heads=2, head_dim=256
    )
    return load_model(directory)


def plan_of(*requests: Request, preempted: tuple[Request, ...] = ()) -> StepPlan:
    return StepPlan(scheduled=[ScheduledRequest(req, 0, 1) for req in requests], preempted=list(preempted))


def run(model: LoadedModel, pool: KVPool, backend: AttentionBackend, allocator: VirtualAllocator):
    scheduler = ContinuousScheduler(allocator, max_model_len=64, watermark=0.0)
    engine = Engine(scheduler, allocator, TorchRunner(model, pool, backend), VirtualClock(), overlap=True)
    prompts = random_prompts((5, 21, 1, 9, 12))
    requests = [Request(f"r{i}", list(prompt), SamplingParams(max_tokens=4 + i)) for i, prompt in enumerate(prompts)]
    run_to_completion(engine, requests)
    return [req.output_token_ids for req in requests], sum(req.num_preemptions for req in requests)


def test_greedy_tokens_are_those_of_a_plain_pool(model):
    assert model.spec.kv_bytes_per_token == TOKEN_BYTES
    # Five requests of one to four pages, five pages: they wait, lose their pages and start over.
    plain, virtual = (make_allocator(TOKEN_BYTES, 56) for _ in range(2))
    assert virtual.num_pages == 5
    plain_pool = KVPool(num_blocks=plain.num_virtual_blocks, block_size=BLOCK, **SHAPE)
    want, _ = run(model, plain_pool, ReferenceBackend(plain_pool, contiguous=True), plain)
    driver = HostDriver()
    pool = make_pool(virtual, driver, **SHAPE)
    tokens, num_preemptions = run(model, pool, TritonBackend(pool, 2, contiguous=True), virtual)
    assert tokens == want
    assert num_preemptions > 0 and pool.pages.num_unmapped > 0
    assert virtual.usage().owned == 0
    assert pool.num_bytes == 2 * (5 + 1) * PAGE < pool.data.numel() * 4
    assert driver.num_live == 12
    del pool
    gc.collect()
    assert driver.num_live == 0


def test_pages_follow_the_requests():
    allocator = make_allocator(TOKEN_BYTES, 64)
    driver = FakeDriver()
    driver.tensor = lambda address, num_bytes, on_free: torch.empty(num_bytes, dtype=torch.uint8)  # type: ignore[method-assign]
    pool = make_pool(allocator, driver, **SHAPE)
    a, b = (Request(name, [1] * 30, SamplingParams(max_tokens=30)) for name in "ab")
    assert allocator.allocate(a, 10)
    pool.begin_step(plan_of(a), allocator)
    assert pool.pages.num_mapped == 2  # the null block's and one
    pool.begin_step(plan_of(a), allocator)
    assert pool.pages.num_mapped == 2
    assert allocator.allocate(a, 11) and allocator.allocate(b, 1)
    pool.begin_step(plan_of(a, b), allocator)
    assert pool.pages.num_mapped == 4
    allocator.free(a)
    assert allocator.allocate(b, 64)
    pool.begin_step(plan_of(b, preempted=(a,)), allocator)
    assert pool.pages.num_free == 0 and pool.pages.num_unmapped == 2
    allocator.free(b)
    pool.release(["b", "nobody"])
    pool.release(["b"])
    assert allocator.allocate(a, 30)
    pool.begin_step(plan_of(a), allocator)
    assert pool.pages.num_mapped == 9  # nothing was mapped: the region of b, given back last, still has its pages


def test_bugs_of_an_allocator_are_named():
    allocator = make_allocator(TOKEN_BYTES, 64)
    driver = FakeDriver()
    driver.tensor = lambda address, num_bytes, on_free: torch.empty(num_bytes, dtype=torch.uint8)  # type: ignore[method-assign]
    pool = make_pool(allocator, driver, **SHAPE)
    a, b = (Request(name, [1] * 30, SamplingParams(max_tokens=30)) for name in "ab")
    assert allocator.allocate(a, 4)
    pool.begin_step(plan_of(a), allocator)
    table = allocator.block_table(a)
    with pytest.raises(EngineError, match="'b' got a region that request 'a' is in"):
        pool.begin_step(plan_of(b), type("Fixed", (), {"block_table": lambda self, req: table})())
    with pytest.raises(EngineError, match="'b' got a region that begins inside a page"):
        pool.begin_step(plan_of(b), type("Fixed", (), {"block_table": lambda self, req: [table[0] + 1]})())
    with pytest.raises(EngineError, match="asked to copy blocks"):
        pool.apply_copies([BlockCopy(CopyKind.DEVICE, 1, 2)])


def test_layers_and_slots_lie_apart():
    allocator = make_allocator(TOKEN_BYTES, 64)
    pool = make_pool(allocator, HostDriver(), **SHAPE)
    req = Request("a", [1] * 30, SamplingParams(max_tokens=30))
    assert allocator.allocate(req, 20)
    pool.begin_step(plan_of(req), allocator)
    first = allocator.block_table(req)[0] * BLOCK
    written = {}
    for layer in range(3):
        for part, view in enumerate(pool.slots(layer)):
            for slot in (0, 3, first, first + 10, first + 11, first + 20):  # slot 10 lies across two pages
                value = float(len(written))
                view[slot] = value
                written[layer, part, slot] = value
    for (layer, part, slot), value in written.items():
        assert (pool.slots(layer)[part][slot] == value).all()
        assert (pool.blocks(layer)[part][slot // BLOCK, slot % BLOCK] == value).all()
