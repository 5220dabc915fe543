"""What steps take, as far as a scheduler needs to know it: fitted to some that were timed before any request came.

    seconds = table over the step's tokens + per_kv_token x tokens of context read + per_pair x (query, key) pairs

Free of torch.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

from kvarena.engine.checks import check_number
from kvarena.engine.errors import ConfigError


@dataclass(frozen=True)
class StepTimes:
    """Seconds of steps. Beyond the last entry of a table they rise as steeply as before it.

    Between two entries of `rows` they are linear. A step with prompts takes what the next larger entry of `tokens`
    does: it is padded to a shape that has a graph, or launched kernel by kernel from some size on, and nobody knows
    where between two entries such a stair is.

    Args:
        rows, decode_seconds: requests of steps that only decode, ascending, and what such a step takes with short
            contexts.
        tokens, seconds: tokens of steps with prompts in them, ascending, and what these take.
        per_kv_token: of each token of context that decodes read.
        per_pair: of each (query, key) pair of prompt tokens.

    Raises:
        ConfigError: a table that does not rise, or a negative number.
    """

    rows: Sequence[int]
    decode_seconds: Sequence[float]
    tokens: Sequence[int]
    seconds: Sequence[float]
    per_kv_token: float = 0.0
    per_pair: float = 0.0

    def __post_init__(self) -> None:
        for name, sizes, seconds in (("rows", self.rows, self.decode_seconds), ("tokens", self.tokens, self.seconds)):
            falls = any(a > b for a, b in pairwise(seconds))
            if not sizes or len(sizes) != len(seconds) or list(sizes) != sorted(set(sizes)) or falls or seconds[0] < 0:
                raise ConfigError(f"step_times.{name}={list(sizes)} must rise, with seconds that do not fall")
        for name in ("per_kv_token", "per_pair"):
            check_number(f"step_times.{name}", getattr(self, name))

    @classmethod
    def of(cls, facts: Mapping[str, Any]) -> StepTimes:
        """From what `facts` said. Raises ConfigError where that is something else."""
        try:
            values: dict[str, Any] = {
                key: tuple(value) if isinstance(value, list) else value for key, value in facts.items()
            }
            return cls(**values)
        except TypeError as error:
            raise ConfigError(f"step_times must have the numbers of a fit: {error}") from error

    @property
    def facts(self) -> dict[str, Any]:
        """As plain values."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    def decode(self, num_rows: int, num_kv_tokens: int) -> float:
        """Seconds of a step in which so many requests decode."""
        return _at(self.rows, self.decode_seconds, num_rows) + self.per_kv_token * num_kv_tokens

    def step(self, num_tokens: int, num_kv_tokens: int, num_pairs: float) -> float:
        """Seconds of a step with prompts in it.

        Args:
            num_tokens: all new tokens, those of decodes among them.
            num_kv_tokens: tokens of context that the decodes read.
            num_pairs: of its prompts.
        """
        if num_tokens <= self.tokens[-1]:
            of_tokens = self.seconds[bisect_left(self.tokens, num_tokens)]
        else:
            of_tokens = _at(self.tokens, self.seconds, num_tokens)
        return of_tokens + self.per_kv_token * num_kv_tokens + self.per_pair * num_pairs


def _at(sizes: Sequence[int], seconds: Sequence[float], size: int) -> float:
    if len(sizes) == 1 or size <= sizes[0]:
        return seconds[0]
    right = min(bisect_left(sizes, size), len(sizes) - 1)
    slope = (seconds[right] - seconds[right - 1]) / (sizes[right] - sizes[right - 1])
    return seconds[right - 1] + slope * (size - sizes[right - 1])
