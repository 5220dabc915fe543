"""Engines around the fused runner, on the CPU."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from kvarena.allocators.paged import PagedAllocator
from kvarena.engine.attention.base import AttentionMetadata
from kvarena.engine.attention.reference import ReferenceBackend
from kvarena.engine.clock import VirtualClock
from kvarena.engine.core import Engine, run_to_completion
from kvarena.engine.models import LoadedModel
from kvarena.engine.pool.kv_pool import KVPool
from kvarena.engine.request import Request
from kvarena.engine.runner.torch_runner import TorchRunner
from kvarena.schedulers.chunked import ChunkedScheduler


class LateReference(ReferenceBackend):
    """The reference as a backend with reserved plans: it plans at the first layer, when the inputs are expanded."""

    def reserve(self, meta: AttentionMetadata, num_rows: int, num_prefill_tokens: int = 0) -> None:
        meta.prepared = None

    def prepare(self, meta: AttentionMetadata) -> None:
        meta.prepared = None

    def attend(self, q: Tensor, layer: int, meta: AttentionMetadata, **kwargs: Any) -> Tensor:
        if meta.prepared is None:
            super().prepare(meta)
        return super().attend(q, layer, meta, **kwargs)


def make_pool(model: LoadedModel, num_blocks: int, block_size: int) -> KVPool:
    spec = model.spec
    return KVPool.of_model(
        spec,
        num_blocks=num_blocks,
        block_size=block_size,
        dtype=spec.dtype,
        device=model.device,
    )


def run(
    runner: TorchRunner, requests: list[Request], *, overlap: bool, max_num_seqs: int = 4, max_model_len: int = 128
) -> list[list[int]]:
    """Run to the end under the chunked scheduler, in the pool that the runner has; returns the tokens."""
    pool = runner.pool
    allocator = PagedAllocator(num_blocks=pool.num_blocks, block_size=pool.block_size, max_model_len=max_model_len)
    scheduler = ChunkedScheduler(
        allocator, max_model_len=max_model_len, max_num_seqs=max_num_seqs, max_num_batched_tokens=16
    )
    engine = Engine(scheduler, allocator, runner, VirtualClock(), overlap=overlap)
    run_to_completion(engine, requests)
    assert allocator.usage().free == pool.num_slots
    return [req.output_token_ids for req in requests]
