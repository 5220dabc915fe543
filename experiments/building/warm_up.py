"""Runs an engine's runner a little before anything counts, so that lazy initialisation is over by then."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch

from kvarena.engine.clock import WallClock
from kvarena.engine.contract import StepScheduler
from kvarena.engine.core import run_to_completion
from kvarena.engine.errors import RequestRejected
from kvarena.engine.request import Request, SamplingParams
from kvarena.engine.runner.fused_runner import FusedRunner
from kvarena.experiments.building.build import EngineParts
from kvarena.experiments.building.parts import make_strategy
from kvarena.experiments.building.pools import room_beside_pool
from kvarena.experiments.settings.config import RunConfig
from kvarena.experiments.settings.strategies import Strategy, make_part

NUM_REQUESTS = 8
PROMPT_TOKENS = 24
OUTPUT_TOKENS = 8
# What clients of a server ask for most: each kind of sampling has code of its own.
SERVED = (SamplingParams(), SamplingParams(temperature=0.7), SamplingParams(temperature=0.7, top_p=0.9))


def warm_up(config: RunConfig, parts: EngineParts, samplings: Sequence[SamplingParams]) -> float:
    """Run a few requests on a strategy of their own, with the same runner and pool; returns the seconds it took.

    On a GPU kernels are compiled, decode graphs captured (a graph is otherwise captured when its batch size first comes
    up, which delays that step by tens of milliseconds each time), and a prompt of a whole step's token budget run. The
    engine's own allocator knows nothing of it, so its prefix cache stays cold.

    Args:
        config: what `parts` was built from.
        parts: an idle engine.
        samplings: how the requests pick their tokens, in turn; their lengths are set here.
    """
    clock = WallClock()
    longest = PROMPT_TOKENS
    if isinstance(parts.engine.runner, FusedRunner):
        max_num_seqs = config.scheduler.need("max_num_seqs")
        with room_beside_pool(max_num_seqs, parts.engine.runner.pool, parts.max_model_len):
            parts.engine.runner.warm_up(max_num_seqs)
        longest = config.scheduler.need("max_num_batched_tokens")
        if parts.model is not None and parts.model.images is not None and parts.model.device.type == "cuda":
            with torch.inference_mode():
                parts.model.images.warm_up(parts.max_model_len)
    strategy = make_strategy(
        config,
        parts.pool_facts["num_blocks"],
        parts.max_model_len,
        parts.spec,
        "cpu" if parts.model is None else parts.model.device.type,
    )
    engine = strategy.engine(parts.engine.runner, clock, overlap=parts.config.overlap)
    room = min(parts.max_model_len, strategy.allocator.max_request_tokens) - OUTPUT_TOKENS
    prompt_lens = [min(length, room) for length in [*[PROMPT_TOKENS] * (NUM_REQUESTS - 1), longest]]
    requests = [
        Request(f"warm-up-{i}", [i + 1] * prompt_len, replace(samplings[i % len(samplings)], max_tokens=OUTPUT_TOKENS))
        for i, prompt_len in enumerate(prompt_lens)
        if prompt_len > 0
    ]
    run_to_completion(engine, requests)
    return clock.now()


def warm_cache(config: RunConfig, parts: EngineParts, requests: Iterable[Request]) -> float:
    """Run each prompt once, for one token, with the engine's own allocator; returns the seconds it took.

    The prefix cache then holds what it can of the workload (`driver.cache=warm`). Prompts that the engine rejects are
    left out. Nothing of it is in the ledger, the recorded steps, or the scheduler (what it has served to whom).

    Args:
        config: what `parts` was built from.
        parts: an idle engine.
        requests: the workload; the requests that are run are copies.
    """
    start = parts.clock.now()
    owner = parts.engine
    scheduler = make_part(StepScheduler, config.scheduler, allocator=owner.allocator, max_model_len=parts.max_model_len)
    engine = Strategy(owner.allocator, scheduler).engine(owner.runner, parts.clock, overlap=owner.overlap)
    for req in requests:
        copy = Request(
            f"warm-cache-{req.request_id}", req.prompt_token_ids, replace(req.sampling, max_tokens=1, min_tokens=0),
            client_id=req.client_id, cache_salt=req.cache_salt, oracle_output_len=1,
        )  # fmt: skip
        # A prompt that this engine cannot run is rejected in the measured run too, and recorded there.
        with contextlib.suppress(RequestRejected):
            engine.add(copy)
    run_to_completion(engine, ())
    return parts.clock.now() - start
