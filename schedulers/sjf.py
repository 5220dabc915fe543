"""Shortest job first, with ageing, over continuous batching."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

from engine.plan import KVAllocator
from engine.request import Request
from schedulers.chunked import ChunkedScheduler
from schedulers.lifecycle import require

PREDICTORS = ("oracle", "lognormal")


def oracle_length(req: Request) -> float:
    """The true output length where the workload knows it, else the most that it can be."""
    return req.sampling.max_tokens if req.oracle_output_len is None else req.oracle_output_len


def lognormal_length(seed: int, sigma: float) -> Callable[[Request], float]:
    """A predictor that is off by a factor exp(N(0, sigma^2)), drawn once per request id from a stream of its own."""

    def predict(req: Request) -> float:
        return oracle_length(req) * math.exp(random.Random(f"{seed}:{req.request_id}").gauss(0.0, sigma))

    return predict


class SJFScheduler(ChunkedScheduler):
    """The shortest predicted output first; decodes and chunks as chunked prefill does.

    A request that has waited for `t` seconds counts as `ageing * t` tokens shorter, so one of length L can be
    overtaken only by those that arrive within L / ageing seconds after it, and nobody starves. (All grow younger at
    the same rate, so the order in the queue never changes: the key is L + ageing * arrival time.)

    Args:
        allocator: who owns which slots.
        max_model_len: most tokens of one request, prompt and output.
        max_num_seqs: most requests that run at once.
        max_num_batched_tokens: most new tokens in one step.
        watermark: see `Scheduler`.
        preemption: see `Scheduler`.
        victim: see `Scheduler`.
        predictor: `oracle` (the true length) or `lognormal` (the true length times a lognormal error).
        sigma: standard deviation of the logarithm of the error; 0.5 is off by a factor of 1.65 either way.
        seed: of the errors.
        ageing: tokens per second of waiting, above 0.

    Raises:
        ConfigError: an option out of range.
    """

    def __init__(
        self,
        allocator: KVAllocator,
        *,
        max_model_len: int,
        max_num_seqs: int = 256,
        max_num_batched_tokens: int = 2048,
        watermark: float = 0.01,
        preemption: str = "recompute",
        victim: str = "last_arrived",
        predictor: str = "oracle",
        sigma: float = 0.5,
        seed: int = 0,
        ageing: float = 1.0,
    ) -> None:
        super().__init__(
            allocator,
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            watermark=watermark,
            preemption=preemption,
            victim=victim,
        )
        require(predictor in PREDICTORS, "scheduler.predictor", predictor, f"one of {', '.join(PREDICTORS)}")
        require(0 <= sigma < math.inf, "scheduler.sigma", sigma, "a number of at least 0")
        require(0 < ageing < math.inf, "scheduler.ageing", ageing, "above 0, or long requests could starve")
        self.ageing = ageing
        self.predict = oracle_length if predictor == "oracle" else lognormal_length(seed, sigma)

    def order_key(self, req: Request) -> float:
        """Predicted length, less what waiting is worth."""
        return self.predict(req) + self.ageing * req.arrival_time
