"""How long a step takes, as a function of what it computes: the models that drive the simulated runner.

    |<- host, before ->|<-------------- device --------------->|<- host, after ->|
         schedule      |  base + max(weights, GEMMs) + KV + ...   update, record
                       |<- host, launch ->|

Without overlap a step takes the sum. With it the host works on the neighbouring steps while the device computes, so
the host's part shows only where it is longer than the device's: before all, it cannot take in the tokens of the step
before until it has launched this one. Free of torch.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Collection, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from itertools import pairwise
from typing import Protocol

from kvarena.engine.checks import check_number
from kvarena.engine.errors import ConfigError
from kvarena.experiments.recording.step_features import StepFeatures
from kvarena.reports.analysis.experts import ExpertLoad


class StepTime(Protocol):
    """Seconds that the device needs for a step."""

    def __call__(self, features: StepFeatures) -> float:
        """Seconds of a step with these features."""
        ...


def check_seconds(owner: object, prefix: str, leave_out: Collection[str] = ()) -> None:
    """Raise ConfigError unless every field of the dataclass `owner` is a finite number of at least 0."""
    for field in fields(owner):  # type: ignore[arg-type]
        if field.name not in leave_out:
            check_number(f"{prefix}.{field.name}", getattr(owner, field.name))


@dataclass(frozen=True)
class RooflineStepTime:
    """Seconds of a step whose weights are read once and multiplied with every token: the longer of the two counts.

    Source: the roofline model (Williams et al., CACM 2009) of a decoder's linear layers; attention comes on top, as
    its KV is read by kernels of their own. Of experts those weights are read that some token of the step takes.

    Args:
        base: of any step: what kernels lose between one another.
        weights: to read all weights once, but those of experts.
        per_token: linear layers, for each token.
        per_request: the output head and the draw, for each request.
        per_kv_token: of each token whose KV is read; one that another request's read serves is a pair more.
        per_attention_pair: of each (query, key) pair of prompt tokens.
        per_copied_block: of each block copied.
        per_expert: to read the weights of one expert of every layer.
        experts: how many of them a step reads; None for a dense model.

    Raises:
        ConfigError: a negative coefficient.
    """

    base: float
    weights: float
    per_token: float
    per_request: float = 0.0
    per_kv_token: float = 0.0
    per_attention_pair: float = 0.0
    per_copied_block: float = 0.0
    per_expert: float = 0.0
    experts: ExpertLoad | None = None

    def __post_init__(self) -> None:
        check_seconds(self, "step_time", leave_out=("experts",))

    def __call__(self, features: StepFeatures) -> float:
        """Seconds of a step with these features."""
        weights = self.weights
        if self.experts is not None:
            weights += self.per_expert * self.experts.read(features.num_tokens)
        multiplied = self.per_token * features.num_tokens + self.per_request * features.num_requests
        return (
            self.base
            + max(weights, multiplied)
            + self.per_kv_token * features.num_distinct_kv_tokens
            + self.per_attention_pair * (features.num_attention_pairs + features.num_saved_kv_tokens)
            + self.per_copied_block * features.num_copied_blocks
        )


@dataclass(frozen=True)
class TableStepTime:
    """Seconds of a step from a table over its tokens, linear in between, and a share for what attention reads.

    What a GPU takes over its tokens has no simple form: it is flat while weights bind, linear where operations do, and
    has stairs where batches are padded. Beyond the last entry it rises by the mean slope of the table's upper half
    (from the last entry of at most half the tokens on), or of the whole table where that is steeper: a stair at its end
    must not make longer steps free.

    Args:
        tokens: numbers of tokens, ascending, at least two.
        seconds: for each of them, never falling.
        per_request: for each request in the batch.
        per_kv_token: of each token whose KV is attended to, once per request.
        per_attention_pair: of each (query, key) pair of prompt tokens.
        per_copied_block: of each block copied.
        fill_queries: new tokens of one prompt whose attention fills the device. Fewer take as long, because each tile
            of queries walks through the whole context alone.
        per_distinct_kv_token: of each token whose KV is read, on top: requests that have it in common read it once.
            0 where nothing was.

    Raises:
        ConfigError: a table that falls or is not ascending, or a negative coefficient.
    """

    tokens: Sequence[float]
    seconds: Sequence[float]
    per_request: float = 0.0
    per_kv_token: float = 0.0
    per_attention_pair: float = 0.0
    per_copied_block: float = 0.0
    fill_queries: float = 0.0
    per_distinct_kv_token: float = 0.0

    def __post_init__(self) -> None:
        check_seconds(self, "step_time", leave_out=("tokens", "seconds"))
        tokens, seconds = tuple(self.tokens), tuple(self.seconds)
        if len(tokens) < 2 or len(tokens) != len(seconds):
            raise ConfigError("step_time.tokens and step_time.seconds must be of one length, at least 2")
        rising = all(a < b for a, b in pairwise(tokens)) and all(a <= b for a, b in pairwise(seconds))
        if not rising or tokens[0] < 0 or seconds[0] < 0:
            raise ConfigError("step_time.tokens must rise and step_time.seconds must not fall, both from at least 0")

    @cached_property
    def slope(self) -> float:
        """Seconds a token beyond the last entry."""
        tokens, seconds = self.tokens, self.seconds
        half = max(0, bisect_right(tokens, tokens[-1] / 2) - 1)
        return max((seconds[-1] - seconds[k]) / (tokens[-1] - tokens[k]) for k in (0, half))

    def __call__(self, features: StepFeatures) -> float:
        """Seconds of a step with these features."""
        tokens, seconds, count = self.tokens, self.seconds, features.num_tokens
        if count > tokens[-1]:
            of_tokens = seconds[-1] + self.slope * (count - tokens[-1])
        else:
            right = max(bisect_left(tokens, count), 1)
            share = max(0.0, (count - tokens[right - 1]) / (tokens[right] - tokens[right - 1]))
            of_tokens = seconds[right - 1] + share * (seconds[right] - seconds[right - 1])
        return (
            of_tokens
            + self.per_request * features.num_requests
            + self.per_kv_token * features.num_kv_tokens
            + self.per_distinct_kv_token * features.num_distinct_kv_tokens
            + self.per_attention_pair * max(features.num_attention_pairs, self.fill_queries * features.longest_prefill)
            + self.per_copied_block * features.num_copied_blocks
        )


@dataclass(frozen=True)
class TwoPhaseStepTime:
    """Steps that only decode run other code (CUDA graphs, decode attention) than steps with prompts.

    Args:
        decode: of steps in which every request computes one token.
        prefill: of the others.
    """

    decode: StepTime
    prefill: StepTime

    def __call__(self, features: StepFeatures) -> float:
        """Seconds of a step with these features."""
        return (self.prefill if features.num_prefill_requests else self.decode)(features)


@dataclass(frozen=True)
class HostTime:
    """Seconds that the host needs around a step.

    Args:
        before: to schedule and prepare a step; without overlap the device waits for it.
        before_per_request: the same, for each request in the batch.
        after: to take the tokens in and record them, from the end of a step to the start of the next one.
        after_per_request: the same, for each request in the batch.
        before_prefill, after_prefill: the same, of a step with prompts: requests are admitted, and answered first.
        launch_decode: to launch a step that only decodes, while the device computes already.
        launch_prefill: the same, of a step with prompts of up to `max_launch_tokens` tokens.
        launch_eager: the same, of a longer step: its kernels are launched one by one, where others replay a graph.
        max_launch_tokens: where that begins.
        launch_mixed: what a launch kernel by kernel takes longer where some of the requests decode: their attention has
            kernels of its own.
        launch_per_request: of a launch, for each request in the batch.
        launch_per_token: of a launch, for each new token of a prompt.
        take: to take in tokens that had been waiting for the host.
        tail: from the end of a launch kernel by kernel until the tokens can be there, where the device waits for it.

    Raises:
        ConfigError: a negative value.
    """

    before: float = 0.0
    before_per_request: float = 0.0
    after: float = 0.0
    after_per_request: float = 0.0
    launch_decode: float = 0.0
    launch_prefill: float = 0.0
    launch_eager: float = 0.0
    max_launch_tokens: float = 0.0
    launch_mixed: float = 0.0
    launch_per_request: float = 0.0
    launch_per_token: float = 0.0
    tail: float = 0.0
    take: float = 0.0
    before_prefill: float = 0.0
    after_prefill: float = 0.0

    def __post_init__(self) -> None:
        check_seconds(self, "host")

    def replays(self, features: StepFeatures) -> bool:
        """Whether a step with these features replays a graph: the device begins when all is launched."""
        return not features.num_prefill_requests or features.num_tokens <= self.max_launch_tokens

    def launch(self, features: StepFeatures) -> float:
        """Seconds to launch a step with these features."""
        if not self.replays(features):
            fixed = self.launch_eager + (self.launch_mixed if features.num_decode_requests else 0.0)
        else:
            fixed = self.launch_prefill if features.num_prefill_requests else self.launch_decode
        return (
            fixed
            + self.launch_per_request * features.num_requests
            + self.launch_per_token * features.num_prefill_tokens
        )
