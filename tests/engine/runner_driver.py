"""Drives a runner with plans written by hand: any split of the prompts into chunks, any placement of blocks."""

from __future__ import annotations

import random
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

from kvarena.engine.contract import ScheduledRequest, StepPlan, cdiv
from kvarena.engine.model_runner import StepResult
from kvarena.engine.models import LoadedModel
from kvarena.engine.pool.kv_pool import KVPool
from kvarena.engine.request import Request, SamplingParams
from kvarena.engine.runner.torch_runner import TorchRunner


class ScatteredAllocator:
    """Hands out blocks in random order, one at a time. Only what the runner reads of an allocator."""

    def __init__(self, num_blocks: int, block_size: int, seed: int = 0) -> None:
        self.block_size = block_size
        self.num_blocks = num_blocks
        self._free = list(range(1, num_blocks + 1))
        random.Random(seed).shuffle(self._free)
        self.tables: dict[Request, list[int]] = {}

    def grow(self, req: Request, num_tokens: int) -> None:
        table = self.tables.setdefault(req, [])
        while len(table) < cdiv(num_tokens, self.block_size):
            table.append(self._free.pop())

    def free(self, req: Request) -> None:
        self._free += self.tables.pop(req)

    def block_table(self, req: Request) -> list[int]:
        return self.tables[req]


def make_runner(model: LoadedModel, num_blocks: int, block_size: int, **options: Any) -> TorchRunner:
    spec = model.spec
    pool = KVPool.of_model(
        spec,
        num_blocks=num_blocks,
        block_size=block_size,
        dtype=spec.dtype,
        device=model.device,
    )
    return TorchRunner(model, pool, **options)


def make_requests(prompts: Sequence[Sequence[int]], num_tokens: int, **sampling: Any) -> list[Request]:
    params = SamplingParams(max_tokens=num_tokens, **sampling)
    return [Request(f"r{i}", list(prompt), params) for i, prompt in enumerate(prompts)]


def make_plan(entries: Sequence[tuple[Request, int]], allocator: ScatteredAllocator) -> StepPlan:
    """A plan that computes so many new tokens of each request, which own blocks for them afterwards."""
    plan = StepPlan()
    for req, num_new in entries:
        start = req.num_computed_tokens
        plan.scheduled.append(ScheduledRequest(req, start, num_new))
        req.num_computed_tokens = start + num_new
        allocator.grow(req, req.num_computed_tokens)
        reaches_end = req.num_computed_tokens == req.num_tokens + req.num_pending_tokens
        plan.samples.append(reaches_end)
        req.num_pending_tokens += reaches_end
    return plan


def take_tokens(plan: StepPlan, result: StepResult) -> None:
    for (req, _, _), token in zip(plan.scheduled, result.token_ids, strict=True):
        if token is not None:
            req.output_token_ids.append(token)
            req.num_pending_tokens -= 1


def unfinished(requests: Sequence[Request]) -> list[Request]:
    return [r for r in requests if len(r.output_token_ids) + r.num_pending_tokens < r.sampling.max_tokens]


def generate(
    model: LoadedModel,
    requests: list[Request],
    *,
    block_size: int,
    chunk: int | None = None,
    random_order: int | None = None,
    overlap: bool = False,
) -> SimpleNamespace:
    """Run the requests to their max_tokens.

    Args:
        chunk: at most so many new tokens of a request per step; None takes whole prompts.
        random_order: seed with which each step picks a random part of the requests in random order, so that prefill
            chunks and decodes of all ages share batches.
        overlap: launch each step before the tokens of the one before are taken.
    """
    longest = sum(cdiv(req.max_total_tokens, block_size) for req in requests)
    allocator = ScatteredAllocator(longest + 3, block_size)
    runner = make_runner(model, allocator.num_blocks, block_size)
    rng = random.Random(random_order)
    in_flight, results = None, []
    while (ready := unfinished(requests)) or in_flight is not None:
        if random_order is not None:
            ready = rng.sample(ready, rng.randint(1, len(ready))) if ready else []
        entries = []
        for req in ready:
            left = req.num_tokens + req.num_pending_tokens - req.num_computed_tokens
            limit = left if chunk is None else chunk
            if random_order is not None:
                limit = rng.randint(1, limit)
            entries.append((req, min(left, limit)))
        launched = None
        if entries:
            plan = make_plan(entries, allocator)
            launched = (plan, runner.execute(plan, allocator))
        done, in_flight = (in_flight, launched) if overlap else (launched, None)
        if done is not None:
            result = done[1].result()
            results.append((done[0], result))
            take_tokens(done[0], result)
    return SimpleNamespace(tokens=[r.output_token_ids for r in requests], results=results, runner=runner)
