"""What each API key may have of an engine: requests at once, and tokens a minute."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable

from kvarena.engine.server.engine.served import ServedRequest


class Tenants:
    """Counts by key; requests without one are not counted.

    Tokens are a bucket that holds a minute's and refills evenly. A request takes its prompt and all that it may
    generate, and gives back what it did not. One that asks for more than a minute's is taken when the bucket is full.

    Args:
        max_requests: that a key may have in the engine; 0: any number.
        tokens_per_minute: of prompts and outputs; 0: any number.
        clock: seconds.
    """

    def __init__(
        self, max_requests: int = 0, tokens_per_minute: int = 0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._most, self._rate, self._clock = max_requests, tokens_per_minute, clock
        self._open: Counter[int] = Counter()
        self._levels: dict[int, tuple[float, float]] = {}  # of each key's bucket, and when it was so

    def refusal(self, key: int, num_requests: int, num_tokens: int) -> str:
        """Why a key may not have so many more requests, of so many tokens together; empty: it may."""
        if key < 0:
            return ""
        if self._most and self._open[key] + num_requests > self._most:
            return f"this key has {self._open[key]} requests open, and may have {self._most}"
        level = self._level(key)
        need = min(num_tokens, self._rate)
        if self._rate and level < need:
            seconds = math.ceil((need - level) * 60 / self._rate)
            return f"this key may have {self._rate} tokens a minute; there is room for this request in {seconds} s"
        return ""

    def begin(self, req: ServedRequest) -> None:
        """A request was taken in."""
        if req.key >= 0:
            self._open[req.key] += 1
            self._take(req.key, len(req.prompt_token_ids) + req.sampling.max_tokens)

    def end(self, req: ServedRequest) -> None:
        """It has ended, for whatever reason."""
        if req.key >= 0:
            self._open[req.key] -= 1
            self._take(req.key, len(req.output_token_ids) - req.sampling.max_tokens)

    def _level(self, key: int) -> float:
        now = self._clock()
        level, since = self._levels.get(key, (float(self._rate), now))
        return min(float(self._rate), level + (now - since) * self._rate / 60)

    def _take(self, key: int, num_tokens: int) -> None:
        if self._rate:
            self._levels[key] = (self._level(key) - num_tokens, self._clock())
