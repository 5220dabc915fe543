"""Requests that share prefixes: system prompts, few-shot examples, documents asked about more than once."""

from __future__ import annotations

from typing import Any

import numpy as np

from kvarena.engine.checks import check_int, check_number
from kvarena.experiments.workloads.parts.base import IntArray, LengthTable, Workload
from kvarena.experiments.workloads.parts.distributions import UniformLength
from kvarena.experiments.workloads.parts.limits import MAX_LENGTH
from kvarena.experiments.workloads.parts.seeds import Purpose, generator
from kvarena.experiments.workloads.synthetic import required_num_requests


class SharedPrefixWorkload(Workload):
    """Each prompt is one of `num_prefixes` prefixes and a suffix of its own.

    Args:
        num_prefixes: different prefixes.
        prefix_len: tokens of each prefix.
        suffix_len: {min, max} tokens after it, both included.
        output_len: {min, max} tokens, both included.
        skew: Zipf exponent of the prefixes' popularity: the k-th is used in proportion to 1 / k^skew; 0 is even.
        common: num_requests, seed, vocab_size, reserved_token_ids.
    """

    name = "shared_prefix"
    source = "synthetic, shared prefixes"

    def __init__(
        self, *, num_prefixes: int, prefix_len: int, suffix_len: Any, output_len: Any, skew: float = 0.0, **common: Any
    ) -> None:
        super().__init__(**common)
        self._num = required_num_requests(self.num_requests)
        self._num_prefixes = check_int("workload.num_prefixes", num_prefixes, 1)
        self._prefix_len = check_int("workload.prefix_len", prefix_len, 1, MAX_LENGTH)
        self._suffix_len = UniformLength.from_option("workload.suffix_len", suffix_len)
        self._output_len = UniformLength.from_option("workload.output_len", output_len)
        self._skew = check_number("workload.skew", skew)
        self._group: IntArray = np.empty(0, dtype=np.int64)

    def _build(self) -> LengthTable:
        popularity = np.arange(1, self._num_prefixes + 1) ** -self._skew
        bounds = np.cumsum(popularity) / popularity.sum()
        places = generator(self.seed, Purpose.STRUCTURE).random(self._num)
        self._group = np.minimum(np.searchsorted(bounds, places, side="right"), self._num_prefixes - 1)
        suffixes = self._suffix_len.draw(generator(self.seed, Purpose.PROMPT_LENGTHS), self._num)
        outputs = self._output_len.draw(generator(self.seed, Purpose.OUTPUT_LENGTHS), self._num)
        used = len(np.unique(self._group))
        return LengthTable(
            self._prefix_len + suffixes,
            outputs,
            client_ids=[f"prefix-{group}" for group in self._group.tolist()],
            notes=(f"{used} of {self._num_prefixes} prefixes of {self._prefix_len} tokens used, skew {self._skew:g}",),
        )

    def prompt(self, row: int) -> list[int]:
        """The row's prefix and its own suffix."""
        suffix_len = int(self.table.prompt_lens[row]) - self._prefix_len
        prefix = self._prefix_tokens.take(int(self._group[row]), self._prefix_len)
        return prefix + self._tokens.take(row, suffix_len)
