"""Shortest job first, with ageing, over continuous batching."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

from kvarena.engine.contract import KVAllocator, check_choice, check_number
from kvarena.engine.request import Request
from kvarena.schedulers.chunked import ChunkedScheduler

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
        predictor: `oracle` (the true length) or `lognormal` (the true length times a lognormal error).
        sigma: standard deviation of the logarithm of the error; 0.5 is off by a factor of 1.65 either way.
        seed: of the errors.
        ageing: tokens per second of waiting, above 0.
        options: see `Scheduler`.

    Raises:
        ConfigError: an option out of range.
    """

    def __init__(
        self,
        allocator: KVAllocator,
        *,
        predictor: str = "oracle",
        sigma: float = 0.5,
        seed: int = 0,
        ageing: float = 1.0,
        **options: Any,
    ) -> None:
        super().__init__(allocator, **options)
        check_choice("scheduler.predictor", predictor, PREDICTORS)
        check_number("scheduler.sigma", sigma)
        self.ageing = check_number("scheduler.ageing", ageing, above=True)  # else long requests could starve
        self.predict = oracle_length if predictor == "oracle" else lognormal_length(seed, sigma)

    def order_key(self, req: Request) -> float:
        """Predicted length, less what waiting is worth."""
        return self.predict(req) + self.ageing * req.arrival_time
