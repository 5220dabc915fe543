"""A runner without a device: a step-time model says how long each step takes, and a virtual clock moves on.

Schedulers and allocators are the real objects and cannot tell the difference. Steps follow each other on one
simulated device: under overlap a step that is launched while another one runs begins when that one ends. Free of
torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import NamedTuple

from engine.clock import VirtualClock
from engine.errors import ConfigError
from engine.plan import KVAllocator, StepPlan
from engine.runner.base import StepResult


class StepFeatures(NamedTuple):
    """What a step's time depends on.

    Attributes:
        num_prefill_tokens: new tokens of requests that compute more than one.
        num_decode_requests: requests that compute one token.
        num_kv_tokens: tokens whose KV attention reads, each once per request.
        num_attention_pairs: (query, key) pairs of the prefill tokens.
        num_copied_blocks: blocks copied before the forward.
    """

    num_prefill_tokens: int
    num_decode_requests: int
    num_kv_tokens: int
    num_attention_pairs: int
    num_copied_blocks: int


def step_features(plan: StepPlan) -> StepFeatures:
    """The features of `plan`."""
    prefill = pairs = kv = 0
    num_decodes = len(plan.scheduled)
    for _, start, num_new in plan.scheduled:
        kv += start
        if num_new > 1:
            num_decodes -= 1
            prefill += num_new
            pairs += num_new * start + num_new * (num_new + 1) // 2
    return StepFeatures(prefill, num_decodes, kv + prefill + num_decodes, pairs, len(plan.copies))


@dataclass(frozen=True)
class LinearStepTime:
    """Seconds of a step as a linear function of its features.

    Args:
        base: of any step: weights, launches, the host's gap.
        per_prefill_token: of each new token of a prompt.
        per_decode_request: of each request that decodes.
        per_kv_token: of each token whose KV is read.
        per_attention_pair: of each (query, key) pair of prompt tokens.
        per_copied_block: of each block copied.

    Raises:
        ConfigError: a negative coefficient.
    """

    base: float
    per_prefill_token: float = 0.0
    per_decode_request: float = 0.0
    per_kv_token: float = 0.0
    per_attention_pair: float = 0.0
    per_copied_block: float = 0.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not value >= 0:
                raise ConfigError(f"runner.step_time.{field.name}={value!r} must be at least 0 seconds")

    def __call__(self, features: StepFeatures) -> float:
        """Seconds of a step with these features."""
        return (
            self.base
            + self.per_prefill_token * features.num_prefill_tokens
            + self.per_decode_request * features.num_decode_requests
            + self.per_kv_token * features.num_kv_tokens
            + self.per_attention_pair * features.num_attention_pairs
            + self.per_copied_block * features.num_copied_blocks
        )


class SimulatedRunner:
    """Answers every step with `token_id`, at the time that the step-time model gives.

    Args:
        step_time: seconds of a step, from its features.
        clock: the engine's; only this runner and the driver move it.
        token_id: the token that every sample gets; must not end requests that are to run to their length.
    """

    def __init__(self, step_time: Callable[[StepFeatures], float], clock: VirtualClock, token_id: int = 0) -> None:
        self._step_time = step_time
        self._clock = clock
        self._token_id = token_id
        self._free_at = 0.0  # when the device has run all that was launched

    def execute(self, plan: StepPlan, allocator: KVAllocator) -> SimulatedStep:  # noqa: ARG002 - part of the protocol
        """Launch a step."""
        begin = max(self._clock.now(), self._free_at)
        self._free_at = begin + self._step_time(step_features(plan))
        token_id = self._token_id
        return SimulatedStep([token_id if sample else None for sample in plan.samples], self._free_at, self._clock)

    def release(self, request_ids: list[str]) -> None:
        """Nothing to forget."""


class SimulatedStep:
    """A step on the simulated device."""

    __slots__ = ("_clock", "_end_time", "_token_ids")

    def __init__(self, token_ids: list[int | None], end_time: float, clock: VirtualClock) -> None:
        self._token_ids = token_ids
        self._end_time = end_time
        self._clock = clock

    def result(self) -> StepResult:
        """Move the clock to the end of the step, unless it is past, and return the tokens."""
        self._clock.sleep_until(self._end_time)
        return StepResult(self._token_ids)
