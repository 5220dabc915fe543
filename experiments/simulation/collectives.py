"""What several cards of one replica lose to one another: all-reduces of tensor parallel, sends of pipeline parallel.

A layer adds up two rows of the hidden size a token over its ranks, after attention and after the MLP; a stage hands one
such row a token to the next one. A profile says what each takes by size and ranks (its section `collectives`).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import exp, log

from kvarena.engine.checks import check_int, check_number
from kvarena.engine.errors import ConfigError
from kvarena.engine.models.sizes import ModelSizes
from kvarena.experiments.recording.step_features import StepFeatures
from kvarena.experiments.simulation.step_time import StepTime


@dataclass(frozen=True)
class Ranks:
    """The cards of one replica.

    Args:
        tensor: cards that share each layer.
        pipeline: stages, each with as many layers as the others.
    """

    tensor: int = 1
    pipeline: int = 1

    @property
    def number(self) -> int:
        """All cards."""
        return self.tensor * self.pipeline


ONE_CARD = Ranks()


@dataclass(frozen=True)
class AllReduce:
    """Seconds of one all-reduce by its bytes, of one number of ranks; between two sizes the logarithms are linear.

    Args:
        bytes: sizes, ascending, at least two.
        seconds: of each.

    Raises:
        ConfigError: a table that is not of one length, does not rise, or has a time of 0.
    """

    bytes: Sequence[float]
    seconds: Sequence[float]

    def __post_init__(self) -> None:
        sizes, seconds = self.bytes, self.seconds
        if len(sizes) != len(seconds) or len(sizes) < 2 or not all(a < b for a, b in pairwise(sizes)):
            raise ConfigError("profile.collectives.all_reduce: bytes must rise, and each needs its seconds")
        if min(sizes) <= 0 or min(seconds) <= 0:
            raise ConfigError("profile.collectives.all_reduce: bytes and seconds must be above 0")

    def __call__(self, size: float) -> float:
        """Seconds for `size` bytes; below the table its first entry, beyond it the last two go on."""
        sizes, seconds = self.bytes, self.seconds
        if size <= sizes[0]:
            return seconds[0] if size else 0.0
        right = min(max(bisect_left(sizes, size), 1), len(sizes) - 1)
        one, other = log(sizes[right - 1]), log(sizes[right])
        share = (log(size) - one) / (other - one)
        return exp((1 - share) * log(seconds[right - 1]) + share * log(seconds[right]))


@dataclass(frozen=True)
class Collectives:
    """What a profile's cards take to exchange data.

    Args:
        source: where the figures come from.
        all_reduce: a table for each number of ranks that is known.
        send_latency: seconds of a send from one stage to the next, beside its bytes.
        send_bandwidth: bytes per second.

    Raises:
        ConfigError: a figure out of range.
    """

    source: str
    all_reduce: Mapping[int, AllReduce]
    send_latency: float
    send_bandwidth: float

    def __post_init__(self) -> None:
        for ranks in self.all_reduce:
            check_int("profile.collectives.all_reduce", ranks, 2)
        check_number("profile.collectives.send_latency", self.send_latency)
        check_number("profile.collectives.send_bandwidth", self.send_bandwidth, above=True)

    def check(self, ranks: Ranks) -> None:
        """Raise ConfigError where nothing is known of so many ranks."""
        if ranks.tensor > 1 and ranks.tensor not in self.all_reduce:
            known = ", ".join(map(str, sorted(self.all_reduce)))
            raise ConfigError(
                f"parallel.tensor_parallel_size={ranks.tensor}: runner.profile knows all-reduces of {known} ranks; "
                "take one of these, or more stages or replicas"
            )

    def send(self, size: float) -> float:
        """Seconds to hand `size` bytes to the next stage."""
        return self.send_latency + size / self.send_bandwidth


def check_ranks(ranks: Ranks, sizes: ModelSizes) -> None:
    """Raise ConfigError where a model cannot be cut so."""
    heads, layers, name = sizes.num_heads, sizes.spec.num_layers, sizes.spec.name
    if heads % ranks.tensor:
        raise ConfigError(
            f"parallel.tensor_parallel_size={ranks.tensor} does not divide the {heads} heads of model {name!r}; take a "
            "number that does"
        )
    if layers % ranks.pipeline:
        raise ConfigError(
            f"parallel.pipeline_parallel_size={ranks.pipeline} does not divide the {layers} layers of model {name!r}; "
            "take a number that does"
        )


def kv_share(ranks: Ranks, sizes: ModelSizes) -> int:
    """How many cards a token's KV is spread over: KV heads beyond their number are kept twice."""
    return min(ranks.tensor, sizes.spec.num_kv_heads) * ranks.pipeline


def parallel_step_time(share: StepTime, ranks: Ranks, sizes: ModelSizes, collectives: Collectives | None) -> StepTime:
    """The step time of a model on its cards, from that of one card's share.

    Raises:
        ConfigError: the model cannot be cut so, or the profile knows nothing of what the cards exchange.
    """
    if ranks.number == 1:
        return share
    check_ranks(ranks, sizes)
    if collectives is None:
        raise ConfigError(
            f"runner.profile says nothing of what {ranks.number} cards take to exchange data (section collectives); "
            "take h200 or h200-tables, or leave parallel.tensor_parallel_size and parallel.pipeline_parallel_size at 1"
        )
    collectives.check(ranks)
    row = sizes.hidden_size * sizes.spec.dtype.itemsize
    return ParallelStepTime(share, ranks, sizes.spec.num_layers, row, collectives)


@dataclass(frozen=True)
class ParallelStepTime:
    """A step of a model that lies on several cards, from the step time of one card's share.

    With stages a step's requests are split into as many batches as there are stages, which follow one another, so that
    in steady decode no stage idles. Each token then takes as long as its batch needs for all stages, at the pace of the
    slowest, which is the last one: it has the output head.

    Args:
        share: seconds of one stage's layers on one card, the output head among them.
        ranks: how the model lies.
        num_layers: of the model.
        row_bytes: of one token between two layers.
        collectives: what exchanging takes.
    """

    share: StepTime
    ranks: Ranks
    num_layers: int
    row_bytes: int
    collectives: Collectives

    def __call__(self, features: StepFeatures) -> float:
        """Seconds of a step with these features."""
        stages = self.ranks.pipeline
        num_batches = max(1, min(stages, features.num_requests))
        batch = features if num_batches == 1 else _part(features, num_batches)
        row = batch.num_tokens * self.row_bytes
        seconds = self.share(batch)
        if self.ranks.tensor > 1:
            seconds += 2 * self.num_layers / stages * self.collectives.all_reduce[self.ranks.tensor](row)
        return seconds if stages == 1 else stages * (seconds + self.collectives.send(row))


def _part(features: StepFeatures, parts: int) -> StepFeatures:
    """One of so many equal batches of a step. A prompt is in one of them: its context is as long as before."""
    counts = features._asdict()
    longest = counts.pop("longest_prefill")
    return StepFeatures(longest_prefill=longest, **{name: value / parts for name, value in counts.items()})
