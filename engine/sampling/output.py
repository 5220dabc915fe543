"""What sampling gives back, on the device, and its way to the host."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from kvarena.engine.errors import EngineError
from kvarena.engine.model_runner import TokenLogprobs, TokenScores
from kvarena.engine.sampling.scores import ScoreTensors, put_scores


class LogprobTensors(NamedTuple):
    """Log-probabilities of the rows that asked for them, on the device.

    Attributes:
        rows: the batch rows, in order, on the host.
        num_top: how many of the most likely tokens each of these rows wants, or how many it names, on the host.
        named: the places among these rows of those that name tokens, on the host.
        logprob: float32 [R], the sampled tokens'.
        rank: int64 [R], 1 for the most likely token.
        top_ids: int64 [R, max(num_top)], best first; of rows that name tokens, these.
        top_logprobs: float32, beside `top_ids`.
    """

    rows: list[int]
    num_top: list[int]
    named: frozenset[int]
    logprob: Tensor
    rank: Tensor
    top_ids: Tensor
    top_logprobs: Tensor


@dataclass(slots=True)
class SampledTokens:
    """A step's tokens.

    Attributes:
        token_ids: int64 [N] on the device; always valid ids, so that they may be the next step's input as they are.
        is_valid: bool [N] on the device; False where the logits were unusable.
        logprobs: None unless a row asked for them.
        request_ids: whose row is whose.
        scores: what they were picked by; None unless the sampler was made to keep it.
    """

    token_ids: Tensor
    is_valid: Tensor
    logprobs: LogprobTensors | None
    request_ids: list[str]
    scores: ScoreTensors | None = None

    def start_copy(self) -> HostTokens:
        """Start the copy to the host without waiting for it."""
        tensors = [torch.where(self.is_valid, self.token_ids, -1)]
        if self.logprobs is not None:
            tensors += self.logprobs[3:]
        if self.token_ids.device.type != "cuda":
            return HostTokens(self, [tensor.cpu() for tensor in tensors], None, copy_scores(self.scores))
        pinned = [to_pinned(tensor) for tensor in tensors]
        scores = copy_scores(self.scores)
        done = torch.cuda.Event()
        done.record()
        return HostTokens(self, pinned, done, scores)

    def tolist(self) -> list[int]:
        """The tokens on the host; waits for the device.

        Raises:
            EngineError: as `HostTokens.result`.
        """
        return self.start_copy().result()[0]


def merged(all_rows: SampledTokens, some: SampledTokens, index: Tensor, rows: np.ndarray) -> SampledTokens:
    """`all_rows` with the tokens of `some` in its `rows`, which are `index` on the device."""
    logprobs = some.logprobs
    if logprobs is not None:
        logprobs = logprobs._replace(rows=[int(rows[row]) for row in logprobs.rows])
    return SampledTokens(
        all_rows.token_ids.clamp_min(0).index_copy(0, index, some.token_ids),
        all_rows.is_valid.index_copy(0, index, some.is_valid),
        logprobs,
        all_rows.request_ids,
        put_scores(all_rows.scores, index, some.scores),
    )


@dataclass(slots=True)
class HostTokens:
    """A step's tokens on their way to the host."""

    _sampled: SampledTokens
    _tensors: list[Tensor]
    _done: torch.cuda.Event | None
    _scores: ScoreTensors | None = None

    def scores(self) -> TokenScores | None:
        """What the tokens were picked by, where that was kept; waits for the device."""
        if self._scores is None:
            return None
        if self._done is not None:
            self._done.synchronize()
        return TokenScores(self._scores.token_ids.numpy(), self._scores.values.numpy())

    def result(self) -> tuple[list[int], list[TokenLogprobs | None] | None]:
        """Wait, then return the tokens and, when a row asked for them, one `TokenLogprobs` or None per row.

        Raises:
            EngineError: a row's logits held NaN or infinity, or no token could be picked; names the requests.
        """
        if self._done is not None:
            self._done.synchronize()
        token_ids: list[int] = self._tensors[0].tolist()
        if token_ids and min(token_ids) < 0:
            bad = [rid for rid, token in zip(self._sampled.request_ids, token_ids, strict=True) if token < 0]
            raise EngineError(
                f"no token could be sampled for request{'s' if len(bad) > 1 else ''} {', '.join(map(repr, bad))}: the "
                "logits hold NaN or infinity, or every token is barred; check the weights, the dtype (bfloat16 "
                "overflows later than float16) and the request's logit_bias"
            )
        return token_ids, self._logprobs(token_ids)

    def _logprobs(self, token_ids: list[int]) -> list[TokenLogprobs | None] | None:
        wanted = self._sampled.logprobs
        if wanted is None:
            return None
        logprob, rank, top_ids, top_logprobs = (tensor.tolist() for tensor in self._tensors[1:])
        rows: list[TokenLogprobs | None] = [None] * len(token_ids)
        for i, (row, num_top) in enumerate(zip(wanted.rows, wanted.num_top, strict=True)):
            best = tuple(zip(top_ids[i][:num_top], top_logprobs[i][:num_top], strict=True))
            if i not in wanted.named:
                # Barred tokens have probability 0: they are no alternative.
                best = tuple((token, value) for token, value in best if value != float("-inf"))
            elif token_ids[row] not in (token for token, _ in best):
                best += ((token_ids[row], logprob[i]),)
            rows[row] = TokenLogprobs(token_ids[row], logprob[i], rank[i], best)
        return rows


def to_pinned(tensor: Tensor) -> Tensor:
    """Start a copy from a GPU to pinned memory of the host."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)


def copy_scores(scores: ScoreTensors | None) -> ScoreTensors | None:
    """Start the scores' copy to the host, as a step's tokens go."""
    if scores is None or scores.values.device.type != "cuda":
        return scores
    return ScoreTensors(to_pinned(scores.token_ids), to_pinned(scores.values))
