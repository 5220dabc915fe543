"""Runs an engine's runner a little before anything counts, so that lazy initialisation is over by then."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from kvarena.engine.clock import Clock, WallClock
from kvarena.engine.contract import StepScheduler, StepTimes
from kvarena.engine.core import run_to_completion
from kvarena.engine.errors import RequestRejected
from kvarena.engine.model_runner import ModelRunner
from kvarena.engine.request import Request, SamplingParams
from kvarena.engine.runner.fused_runner import FusedRunner
from kvarena.experiments.building.build import EngineParts
from kvarena.experiments.building.parts import make_strategy
from kvarena.experiments.building.pools import room_beside_pool
from kvarena.experiments.building.timing import Limits, StepTimer, time_steps
from kvarena.experiments.settings.config import RunConfig
from kvarena.experiments.settings.strategies import Strategy, make_part

NUM_REQUESTS = 8
PROMPT_TOKENS = 24
OUTPUT_TOKENS = 8
# What clients of a server ask for most: each kind of sampling has code of its own.
SERVED = (
    SamplingParams(), SamplingParams(temperature=0.7), SamplingParams(temperature=0.7, top_p=0.9),
    SamplingParams(temperature=0.7, top_p=0.9, repetition_penalty=1.1, logprobs=1),
)  # fmt: skip


class Reach(NamedTuple):
    """The largest step that can come.

    Attributes:
        rows: most requests of a step.
        tokens: most new tokens of one.
    """

    rows: int
    tokens: int

    @classmethod
    def of(
        cls, config: RunConfig, parts: EngineParts, requests: Sequence[Request] = (), num_users: int | None = None
    ) -> Reach:
        """What settings, pool and load leave possible.

        Args:
            config: what `parts` was built from.
            parts: an engine.
            requests: all that will come; none: nobody knows.
            num_users: most of them that are asked at once; None: any number.
        """
        allocator = parts.engine.allocator
        rows, tokens = (config.scheduler.need(key) for key in ("max_num_seqs", "max_num_batched_tokens"))
        # Whoever shares its prompt, or gives back what slid out of a window, still owns a block of its own.
        room = allocator.num_blocks
        if requests:
            rows = min(rows, len(requests), len(requests) if num_users is None else num_users)
            if not allocator.reads_tokens and allocator.sliding_window is None and config.sampling.num_sequences == 1:
                room = min(room, allocator.max_requests(min(req.num_prompt_tokens for req in requests)))
            # A preempted request computes its output again with its prompt.
            tokens = min(tokens, rows * max(req.max_total_tokens for req in requests))
        return cls(max(1, min(rows, room)), tokens)


class WarmUp(NamedTuple):
    """What a warm-up took.

    Attributes:
        seconds: in all.
        num_shapes: shapes of steps that were captured, or run once where nothing is captured.
        shape_seconds: of `seconds`, for these.
    """

    seconds: float
    num_shapes: int = 0
    shape_seconds: float = 0.0

    @property
    def facts(self) -> dict[str, Any]:
        """What the manifest says of it."""
        return {
            "warmup_time": self.seconds,
            "captures": {"num_shapes": self.num_shapes, "seconds": self.shape_seconds},
        }


def warm_up(
    config: RunConfig, parts: EngineParts, samplings: Sequence[SamplingParams], reach: Reach | None = None
) -> WarmUp:
    """Run a few requests on a strategy of their own, with the same runner and pool.

    On a GPU kernels are compiled, graphs of the steps captured that can come (a graph is otherwise captured when its
    batch size first comes up, which delays that step by tens of milliseconds each time), and a prompt of a whole step's
    token budget run. What a runner captured for an engine before this one stays. The engine's own allocator knows
    nothing of it, so its prefix cache stays cold.

    Args:
        config: what `parts` was built from.
        parts: an idle engine.
        samplings: how the requests pick their tokens, in turn; their lengths are set here.
        reach: the largest step that can come; None: what settings and pool allow.
    """
    clock = WallClock()
    reach = Reach.of(config, parts) if reach is None else reach
    longest, num_shapes, shape_seconds = PROMPT_TOKENS, 0, 0.0
    if isinstance(parts.engine.runner, FusedRunner):
        max_num_seqs = config.scheduler.need("max_num_seqs")
        with room_beside_pool(max_num_seqs, parts.engine.runner.pool, parts.max_model_len):
            num_shapes = parts.engine.runner.warm_up(*reach)
        if parts.engine.runner.pool.device.type == "cuda":
            torch.cuda.synchronize()
        shape_seconds = clock.now()
        longest = reach.tokens
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
    engine = strategy.engine(parts.engine.runner, clock, overlap=parts.engine.overlap)
    room = min(parts.max_model_len, strategy.allocator.max_request_tokens) - OUTPUT_TOKENS
    num_requests = min(NUM_REQUESTS, max(reach.rows, len(samplings)))
    prompt_lens = [min(length, room) for length in [*[PROMPT_TOKENS] * (num_requests - 1), longest]]
    requests = [
        Request(f"warm-up-{i}", [i + 1] * prompt_len, replace(samplings[i % len(samplings)], max_tokens=OUTPUT_TOKENS))
        for i, prompt_len in enumerate(prompt_lens)
        if prompt_len > 0
    ]
    run_to_completion(engine, requests)
    return WarmUp(clock.now(), num_shapes, shape_seconds)


def tell_step_times(config: RunConfig, parts: EngineParts) -> StepTimes | None:
    """Time some steps where the scheduler plans by what steps take and was not told; returns what it goes by.

    Args:
        config: what `parts` was built from.
        parts: an idle engine.
    """
    scheduler, simulator = parts.engine.scheduler, parts.simulator
    if scheduler.wants_step_times:
        rows, tokens = (config.scheduler.need(key) for key in ("max_num_seqs", "max_num_batched_tokens"))
        device = "cpu" if parts.model is None else parts.model.device.type
        blocks = parts.pool_facts["num_blocks"]
        allocator = make_strategy(config, blocks, parts.max_model_len, parts.spec, device).allocator
        runner: ModelRunner = parts.engine.runner
        clock: Clock = WallClock()
        if simulator is not None:
            runner, clock = simulator.twin()
        padded = runner.padded_sizes if isinstance(runner, FusedRunner) else []
        limits = Limits(rows, tokens, min(parts.max_model_len, allocator.max_request_tokens), padded)
        timer = StepTimer(runner, allocator, clock, overlap=parts.engine.overlap)
        scheduler.set_step_times(time_steps(timer, limits))
    return getattr(scheduler, "step_times", None)


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
            client_id=req.client_id, kind=req.kind, cache_salt=req.cache_salt, oracle_output_len=1,
        )  # fmt: skip
        # A prompt that this engine cannot run is rejected in the measured run too, and recorded there.
        with contextlib.suppress(RequestRejected):
            engine.add(copy)
    run_to_completion(engine, ())
    return parts.clock.now() - start
