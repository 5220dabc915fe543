"""Shortest job first, with ageing, over continuous batching."""

from __future__ import annotations

import math
import random
from typing import Any

from kvarena.engine.contract import KVAllocator, check_choice, check_number
from kvarena.engine.request import Request
from kvarena.schedulers.chunked import ChunkedScheduler

PREDICTORS = ("oracle", "lognormal")


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
        self._sigma = sigma if predictor == "lognormal" else 0.0
        self._seed = seed
        self.ageing = check_number("scheduler.ageing", ageing, above=True)  # else long requests could starve

    def predict(self, req: Request) -> float:
        """The output's length, off by a factor exp(N(0, sigma^2)), drawn once per request id from its own stream."""
        if not self._sigma:
            return req.expected_output_len
        return req.expected_output_len * math.exp(random.Random(f"{self._seed}:{req.request_id}").gauss(0, self._sigma))

    def order_key(self, req: Request) -> float:
        """Predicted length, less what waiting is worth."""
        return self.predict(req) + self.ageing * req.arrival_time
