"""Blocks that a pool evicts to host memory and has back: the model's tokens are those of a pool that holds all."""

import pytest

from kvarena.engine.clock import VirtualClock
from kvarena.engine.contract import CopyKind
from kvarena.engine.core import run_to_completion
from kvarena.engine.ledger import MemoryLedger
from kvarena.engine.models import load_model
from kvarena.engine.pool.kv_pool import KVPool
from kvarena.engine.request import Request, SamplingParams
from kvarena.engine.runner.torch_runner import TorchRunner
from kvarena.experiments.settings.strategies import Strategy, build_allocator, build_scheduler

SIZE = 4


@pytest.fixture(scope="module")
def model():
    return load_model("models/demo", dtype="float32")


def run(model, allocator, *, num_blocks, overlap=False, **options):
    """Tokens of six conversations in two turns, and the copies of each kind."""
    blocks = build_allocator(allocator, num_blocks=num_blocks, block_size=SIZE, max_model_len=64, **options)
    policy = build_scheduler("chunked", blocks, max_model_len=64, max_num_seqs=4, watermark=0.0, preemption="swap")
    pool = KVPool.of_model(model.spec, num_blocks=num_blocks, block_size=SIZE, dtype=model.spec.dtype, device="cpu")
    if blocks.num_host_blocks:
        pool = KVPool(
            num_blocks=num_blocks, block_size=SIZE, num_layers=model.spec.num_layers, dtype=model.spec.dtype,
            num_kv_heads=model.spec.num_kv_heads, head_dim=model.spec.head_dim, num_swap_blocks=blocks.num_host_blocks,
        )  # fmt: skip
    engine = Strategy(blocks, policy).engine(TorchRunner(model, pool), VirtualClock(), overlap=overlap)
    engine.ledger = MemoryLedger()
    prompts = [[11 * i + k for k in range(18)] for i in range(6)]
    texts, kinds, loaded = [], [], 0
    for _ in range(2):
        requests = [Request(f"r{i}", list(p), SamplingParams(max_tokens=9)) for i, p in enumerate(prompts)]
        outputs = run_to_completion(engine, requests)
        kinds += [copy.kind for output in outputs for copy in output.plan.copies]
        loaded += sum(req.num_loaded_tokens for req in requests)
        texts.append([req.output_token_ids for req in requests])
        prompts = [[*req.token_ids(0, req.num_tokens), 5, 6] for req in requests]
    engine.ledger.settle()
    assert blocks.usage().owned == 0
    return texts, kinds, loaded


@pytest.mark.parametrize(("allocator", "overlap"), [("paged_prefix", False), ("radix", True)])
def test_tokens_are_those_of_a_pool_that_holds_all(model, allocator, overlap):
    wanted, kinds, _ = run(model, "paged", num_blocks=400)
    assert not kinds
    texts, kinds, loaded = run(
        model, allocator, num_blocks=20, overlap=overlap, host_blocks=80, swap_blocks=30, eviction="lru"
    )
    assert texts == wanted
    assert kinds.count(CopyKind.SWAP_OUT) > 20 and loaded > 50
