"""What a step's sampler gets, beside the logits: tensors on the device, and what the host knows of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Rows:
    """Some rows of a batch.

    Attributes:
        index: int64 on the device; None stands for all rows in order.
        host: the same on the host.
    """

    index: Tensor | None
    host: list[int]


class RowValues(NamedTuple):
    """A parameter of some rows: `values[i]` belongs to row `rows.host[i]`. `largest` is known to the host."""

    rows: Rows
    values: Tensor
    largest: float


class LogitBias(NamedTuple):
    """Values to add at (row, token), all int64 or float32 [K] on the device."""

    rows: Tensor
    tokens: Tensor
    values: Tensor


class Penalties(NamedTuple):
    """Penalty factors and counts of some rows; `slots` indexes the rows of `in_prompt` and `counts`."""

    rows: Rows
    presence: Tensor
    frequency: Tensor
    repetition: Tensor
    in_prompt: Tensor
    counts: Tensor
    slots: Tensor


class NamedTokens(NamedTuple):
    """Tokens whose log-probabilities rows ask for by name.

    Attributes:
        places: of those rows among the rows that want log-probabilities, on the host.
        token_ids: int64 [K, W]; the tokens of each, padded with token 0.
    """

    places: list[int]
    token_ids: Tensor


@dataclass(slots=True)
class SamplingBatch:
    """Everything that picks a step's tokens, beside the logits. Made by `SamplerState.batch`.

    Attributes:
        request_ids: one per row.
        random: the rows with temperature > 0.
        keys: int32 [num_random, 2], the random stream's draw of this position; None when all rows are greedy.
        temperature: float32 [num_random].
        top_k, top_p, min_p: filters of those random rows that use them.
        penalties: of the rows that use them.
        bias: logit_bias of the rows that use it.
        barred: int64 [2, K]: (row, token) pairs that may not be picked yet (min_tokens).
        allowed_tokens: bool [N, V], True where a token may be picked; None allows all.
        logprobs: the rows that want log-probabilities.
        num_top: how many of the most likely tokens, per row of `logprobs`.
        named: of those rows, the ones that name tokens instead; None: no row does.
    """

    request_ids: list[str]
    random: Rows
    keys: Tensor | None
    temperature: Tensor | None
    top_k: RowValues | None
    top_p: RowValues | None
    min_p: RowValues | None
    penalties: Penalties | None
    bias: LogitBias | None
    barred: Tensor | None
    allowed_tokens: Tensor | None
    logprobs: Rows
    num_top: list[int]
    named: NamedTokens | None

    @property
    def edits_logits(self) -> bool:
        """True when logits change before a token is picked from them."""
        return any(part is not None for part in (self.penalties, self.bias, self.barred, self.allowed_tokens))
