"""On a GPU: memory is mapped and given back as the driver tells it, and tokens are those of a plain pool."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from checkpoints import random_prompts

from kvarena.allocators.virtual import VirtualAllocator
from kvarena.engine.attention.triton_backend import TritonBackend
from kvarena.engine.clock import WallClock
from kvarena.engine.contract import ScheduledRequest, StepPlan
from kvarena.engine.core import Engine, run_to_completion
from kvarena.engine.errors import EngineError
from kvarena.engine.models import LoadedModel, load_model
from kvarena.engine.pool.kv_pool import KVPool
from kvarena.engine.pool.virtual_pool import VirtualKVPool
from kvarena.engine.request import Request, SamplingParams
from kvarena.engine.runner.torch_runner import TorchRunner
from kvarena.schedulers.continuous import ContinuousScheduler

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
PAGE = 2 * 2**20
# 8 layers of 8 heads of 128 in fp32: 32 KiB a token among the keys, 64 tokens a page.
SHAPE = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 512,
    "max_position_embeddings": 2048,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
MAX_LEN = 1024


@pytest.fixture(scope="module")
def bindings():
    return pytest.importorskip("cuda.bindings.driver")


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    model = load_model(shape=SHAPE, device="cuda", load_format="dummy")
    generator = torch.Generator("cuda").manual_seed(0)
    for parameter in model.module.parameters():
        if parameter.dim() > 1:
            # Else the logits of random weights are all but equal, and a comparison of tokens would test rounding.
            parameter.data.normal_(std=0.1, generator=generator)
    return model


def make_allocator(model: LoadedModel, num_slots: int, max_regions: int = 64) -> VirtualAllocator:
    return VirtualAllocator(
        num_blocks=num_slots // 16,
        block_size=16,
        max_model_len=MAX_LEN,
        kv_bytes_per_token=model.spec.kv_bytes_per_token,
        page_bytes=PAGE,
        max_regions=max_regions,
    )


def pool_for(allocator: VirtualAllocator, model: LoadedModel) -> VirtualKVPool:
    return VirtualKVPool(
        num_pages=allocator.num_pages, page_bytes=PAGE, num_blocks=allocator.num_virtual_blocks, **shape_of(model)
    )


def shape_of(model: LoadedModel) -> dict[str, Any]:
    spec = model.spec
    return {
        "block_size": 16,
        "num_layers": spec.num_layers,
        "num_kv_heads": spec.num_kv_heads,
        "head_dim": spec.head_dim,
        "dtype": spec.dtype,
        "device": "cuda",
    }


def run(model, pool, allocator, *, overlap, contiguous):
    scheduler = ContinuousScheduler(allocator, max_model_len=MAX_LEN, watermark=0.0)
    runner = TorchRunner(model, pool, TritonBackend(pool, 16, contiguous=contiguous))
    engine = Engine(scheduler, allocator, runner, WallClock(), overlap=overlap)
    prompts = random_prompts((5, 300, 64, 9, 128, 63, 65, 500), vocab_size=512)
    requests = [
        Request(f"r{i}", list(prompt), SamplingParams(max_tokens=40 + 20 * i)) for i, prompt in enumerate(prompts)
    ]
    run_to_completion(engine, requests)
    return [req.output_token_ids for req in requests], sum(req.num_preemptions for req in requests)


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("contiguous", [True, False], ids=["contiguous kernel", "paged kernel"])
def test_greedy_tokens_are_those_of_a_plain_pool(bindings, model, overlap, contiguous):
    # 1,134 tokens of prompts alone in 20 pages of 64: requests wait, lose their pages and start over.
    plain, virtual = (make_allocator(model, 1280, max_regions=8) for _ in range(2))
    plain_pool = KVPool(num_blocks=plain.num_virtual_blocks, **shape_of(model))
    want, _ = run(model, plain_pool, plain, overlap=overlap, contiguous=contiguous)
    pool = pool_for(virtual, model)
    tokens, num_preemptions = run(model, pool, virtual, overlap=overlap, contiguous=contiguous)
    assert tokens == want
    assert len({token for row in tokens for token in row}) > 20
    assert num_preemptions > 0 and pool.pages.num_unmapped > 0


def is_mapped(bindings, address: int) -> bool:
    error, handle = bindings.cuMemRetainAllocationHandle(address)
    if error == bindings.CUresult.CUDA_SUCCESS:
        bindings.cuMemRelease(handle)
        return True
    assert error == bindings.CUresult.CUDA_ERROR_INVALID_VALUE, error
    return False


def test_the_driver_sees_what_is_mapped(bindings, model):
    allocator = make_allocator(model, 64 * 16)
    pool = pool_for(allocator, model)
    plane = pool.data.stride(0) * pool.dtype.itemsize
    a, b = (Request(name, [2] * 60, SamplingParams(max_tokens=900)) for name in "ab")

    def step(*requests: Request) -> None:
        pool.begin_step(StepPlan(scheduled=[ScheduledRequest(req, 0, 1) for req in requests]), allocator)

    def mapped(req_start: int) -> list[bool]:
        first = pool.data.data_ptr() + req_start * 16 * 32 * 1024
        both = [[is_mapped(bindings, first + part * plane + i * PAGE) for i in range(16)] for part in range(2)]
        assert both[0] == both[1]
        return both[0]

    assert allocator.allocate(a, 65)
    start = allocator.block_table(a)[0]
    assert sum(mapped(start)) == 0
    step(a)
    assert mapped(start) == [True] * 2 + [False] * 14
    assert allocator.allocate(a, 300)
    step(a)
    assert sum(mapped(start)) == 5
    allocator.free(a)
    pool.release(["a"])
    assert sum(mapped(start)) == 5  # for the next one here, until others want them
    keep = Request("keep", [2], SamplingParams(max_tokens=900))
    assert allocator.allocate(keep, 1)  # takes the region of a
    step(keep)
    assert allocator.allocate(b, 64 * 15)
    step(keep, b)
    assert sum(mapped(allocator.block_table(b)[0])) == 15
    assert mapped(start) == [True] + [False] * 15
    # What is mapped can be written and read, from the first to the last slot.
    first, last = allocator.block_table(b)[0] * 16, allocator.block_table(b)[0] * 16 + b.num_slots - 1
    for layer in range(8):
        for view in pool.slots(layer):
            view[first], view[last] = layer + 1, layer + 2
    for layer in range(8):
        for view in pool.slots(layer):
            assert (view[first] == layer + 1).all() and (view[last] == layer + 2).all()


def test_physical_memory_is_that_of_the_pages(bindings, model):
    torch.cuda.synchronize()
    gc.collect()
    torch.cuda.empty_cache()
    pool_for(make_allocator(model, 64 * 16), model)  # whatever the driver allocates once
    gc.collect()
    before, total = torch.cuda.mem_get_info()
    allocator = make_allocator(model, 64 * 64, max_regions=4096)
    pool = pool_for(allocator, model)
    after, _ = torch.cuda.mem_get_info()
    assert pool.num_bytes == 2 * (64 + 1) * PAGE
    assert abs(before - after - pool.num_bytes) <= 4 * PAGE
    assert pool.data.numel() * pool.dtype.itemsize > total  # more than the GPU has, were it not virtual
    del pool
    gc.collect()
    assert torch.cuda.mem_get_info()[0] >= before - 2 * PAGE


def test_more_pages_than_the_gpu_has_is_one_line(bindings, model):
    before, total = torch.cuda.mem_get_info()
    allocator = make_allocator(model, (total // PAGE // 2 + 64) * 64)
    with pytest.raises(EngineError, match=r"CUDA_ERROR_OUT_OF_MEMORY.*lower kv_cache"):
        pool_for(allocator, model)
    gc.collect()
    assert torch.cuda.mem_get_info()[0] >= before - 8 * PAGE


def test_the_main_job_builds_it(bindings):
    pytest.importorskip("hydra")
    from kvarena.experiments.building.build import build_engine
    from kvarena.experiments.settings.compose import load_run

    parts = build_engine(
        load_run(
            [
                "allocator=virtual",
                "model=qwen3-0.6b-shape",
                "engine.dtype=bfloat16",
                "kv_cache.num_slots=8192",
                "runner.layout=contiguous",
                "engine.overlap=true",
            ]
        )
    )
    requests = [Request(f"r{i}", [7 + i] * 50 * (i + 1), SamplingParams(max_tokens=30)) for i in range(8)]
    run_to_completion(parts.engine, requests)
    assert all(len(req.output_token_ids) == 30 for req in requests)
    assert parts.engine.runner.pool.pages.num_mapped > 20  # type: ignore[attr-defined]
