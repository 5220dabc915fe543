"""Synthetic workloads: prompt and output lengths drawn independently from stated distributions."""

from __future__ import annotations

from typing import Any

import numpy as np

from kvarena.engine.errors import ConfigError
from kvarena.experiments.workloads.parts.base import IntArray, LengthTable, LimitedWorkload
from kvarena.experiments.workloads.parts.distributions import (
    FixedLength,
    LengthDistribution,
    LognormalLength,
    UniformLength,
)
from kvarena.experiments.workloads.parts.seeds import Purpose, generator

_MAX_DRAWS_PER_REQUEST = 1000


def required_num_requests(num_requests: int | None) -> int:
    """`num_requests`, which a workload without a file must state. Raises ConfigError."""
    if num_requests is None:
        raise ConfigError("workload.num_requests=null: a synthetic workload has no end; give an integer of at least 1")
    return num_requests


class DrawnWorkload(LimitedWorkload):
    """Lengths from two distributions, each with a random stream of its own.

    Args:
        prompt: distribution of prompt lengths.
        output: distribution of output lengths.
        common: see LimitedWorkload; a dropped draw is replaced by the next one.
    """

    def __init__(self, prompt: LengthDistribution, output: LengthDistribution, **common: Any) -> None:
        super().__init__(**common)
        self._num = required_num_requests(self.num_requests)
        self._prompt_lens = prompt
        self._output_lens = output

    def _build(self) -> LengthTable:
        prompt_lens: list[int] = []
        output_lens: list[int] = []
        prompts = outputs = np.empty(0, dtype=np.int64)
        drawn = 0
        while len(prompt_lens) < self._num:
            if drawn == len(prompts):
                self._check_progress(len(prompt_lens), drawn)
                # Drawn again from the start, twice as many: so row k is the same for every number of requests.
                num = max(2 * drawn, self._num)
                prompts = self._prompt_lens.draw(generator(self.seed, Purpose.PROMPT_LENGTHS), num)
                outputs = self._output_lens.draw(generator(self.seed, Purpose.OUTPUT_LENGTHS), num)
            kept = self._limits.apply(int(prompts[drawn]), int(outputs[drawn]))
            drawn += 1
            if kept is not None:
                prompt_lens.append(kept[0])
                output_lens.append(kept[1])
        note = self._limits.note()
        return LengthTable(_as_array(prompt_lens), _as_array(output_lens), notes=(note,) if note else ())

    def _check_progress(self, kept: int, drawn: int) -> None:
        if kept * _MAX_DRAWS_PER_REQUEST < drawn:
            raise ConfigError(
                f"{self.name}: only {kept} of {drawn} drawn requests are within the length limits; raise "
                "workload.max_prompt_len, max_output_len or max_total_len, or set workload.on_exceed=clip"
            )


def _as_array(values: list[int]) -> IntArray:
    return np.array(values, dtype=np.int64)


class UniformWorkload(DrawnWorkload):
    """Prompt and output lengths uniform on whole ranges.

    Args:
        prompt_len: {min, max} in tokens, both included.
        output_len: {min, max} in tokens, both included.
        common: num_requests, seed, vocab_size, reserved_token_ids.
    """

    name = "uniform"
    source = "synthetic, uniform lengths"

    def __init__(self, *, prompt_len: Any, output_len: Any, **common: Any) -> None:
        prompt = UniformLength.from_option("workload.prompt_len", prompt_len)
        super().__init__(prompt, UniformLength.from_option("workload.output_len", output_len), **common)


class LognormalWorkload(DrawnWorkload):
    """Prompt and output lengths from truncated lognormals.

    Args:
        prompt_len: {mean, sigma, min, max}; the mean is that of the truncated distribution.
        output_len: {mean, sigma, min, max}.
        common: see LimitedWorkload.
    """

    name = "lognormal"
    source = "synthetic, truncated lognormal lengths"

    def __init__(self, *, prompt_len: Any, output_len: Any, **common: Any) -> None:
        prompt = LognormalLength.from_option("workload.prompt_len", prompt_len)
        super().__init__(prompt, LognormalLength.from_option("workload.output_len", output_len), **common)


class FixedWorkload(DrawnWorkload):
    """Every request of the same lengths.

    Args:
        prompt_len: in tokens.
        output_len: in tokens.
        common: num_requests, seed, vocab_size, reserved_token_ids.
    """

    name = "fixed"
    source = "synthetic, fixed lengths"

    def __init__(self, *, prompt_len: int, output_len: int, **common: Any) -> None:
        prompt = FixedLength.from_option("workload.prompt_len", prompt_len)
        super().__init__(prompt, FixedLength.from_option("workload.output_len", output_len), **common)


class PublishedWorkload(DrawnWorkload):
    """Base of the built-in workloads: distributions fixed by the class, limits by options (see LimitedWorkload)."""

    prompt_distribution: LengthDistribution
    output_distribution: LengthDistribution

    def __init__(self, **common: Any) -> None:
        super().__init__(self.prompt_distribution, self.output_distribution, **common)
