"""Picks tokens from logits: a pure function of its two arguments.

For each row, in this order:

    barred tokens (allowed_tokens, min_tokens) -> logit_bias -> repetition, frequency, presence penalties
      -> [log-probabilities are read here] -> temperature -> top_k -> top_p -> min_p -> one draw

The draw comes from the request's own random stream (engine/sampling/streams.py), keyed by its seed and its output
position. A seeded request so gives the same tokens in any batch, at any row, on any step. Greedy rows (temperature 0)
take the largest logit, and among equals the lowest token id. Nothing here waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kvarena.engine.sampling.batch import NamedTokens, Penalties, Rows, SamplingBatch
from kvarena.engine.sampling.output import LogprobTensors, SampledTokens
from kvarena.engine.sampling.scores import ScoreTensors, best_scores
from kvarena.engine.sampling.streams import log_exponentials
from kvarena.engine.sampling.transforms import keep_min_p, keep_top_k, keep_top_p, penalize_rows


class Sampler:
    """Stateless: all state is in the batch.

    Args:
        num_scores: give the scores of so many best tokens of each row beside the tokens; 0: none.
        penalize: applies penalties, and may do so in place.
    """

    def __init__(self, num_scores: int = 0, penalize: Callable[[Tensor, Penalties], Tensor] = penalize_rows) -> None:
        self.num_scores = num_scores
        self._penalize = penalize

    def __call__(
        self, logits: Tensor, batch: SamplingBatch, draw: Callable[[Tensor], Tensor] | None = None
    ) -> SampledTokens:
        """Sample one token per row.

        Args:
            logits: [N, V], any float type; not modified. Computed on in float32.
            batch: N rows.
            draw: gives int64 [N], the tokens, from the edited logits, and -1 where there is none; no scores are kept.
                None: the race below does.

        Returns:
            The tokens on the device. A row whose logits hold NaN or +inf, or in which every token is barred, is
            marked there; reading it on the host raises EngineError.
        """
        if batch.edits_logits:
            logits = self._edit(logits.to(torch.float32, copy=True), batch)
        if draw is not None:
            drawn = draw(logits)
            token_ids = drawn.clamp_min(0)
            logprobs = self._logprobs(logits, token_ids, batch) if batch.num_top else None
            return SampledTokens(token_ids, drawn >= 0, logprobs, batch.request_ids)
        # Rounding to float32 keeps the order, so a greedy batch is never upcast. max gives the first of equal values.
        best = logits.max(dim=-1)
        token_ids = best.indices
        scores = best_scores(logits, self.num_scores) if self.num_scores else None
        if batch.keys is not None:
            peaks = _take(best.values, batch.random).float()
            race = self._race(_take(logits, batch.random).float(), peaks, batch)
            token_ids = _put(token_ids, batch.random, race.argmax(dim=-1))
            if scores is not None:
                scores = self._race_scores(scores, race, peaks, batch)
        logprobs = self._logprobs(logits, token_ids, batch) if batch.num_top else None
        return SampledTokens(token_ids, best.values.isfinite(), logprobs, batch.request_ids, scores)

    def _edit(self, logits: Tensor, batch: SamplingBatch) -> Tensor:
        """Bars, bias and penalties, in place."""
        if batch.allowed_tokens is not None:
            logits.masked_fill_(~batch.allowed_tokens, -torch.inf)
        if batch.barred is not None:
            barred = torch.full((), -torch.inf, device=logits.device)
            logits.index_put_((batch.barred[0], batch.barred[1]), barred)
        if batch.bias is not None:
            logits.index_put_((batch.bias.rows, batch.bias.tokens), batch.bias.values, accumulate=True)
        if batch.penalties is not None:
            logits = self._penalize(logits, batch.penalties)
        return logits

    def _race(self, logits: Tensor, best: Tensor, batch: SamplingBatch) -> Tensor:
        """What each random row's draw is the argmax of, [R, V]. `logits` float32 [R, V] and their maxima `best` [R]."""
        assert batch.keys is not None
        assert batch.temperature is not None
        # The maximum is taken off first: then no temperature, however small, overflows.
        logits = (logits - best[:, None]) / batch.temperature[:, None]
        if (top_k := batch.top_k) is not None:
            logits = _apply(logits, top_k.rows, lambda rows: keep_top_k(rows, top_k.values, int(top_k.largest)))
        if (top_p := batch.top_p) is not None:
            logits = _apply(logits, top_p.rows, lambda rows: keep_top_p(rows, top_p.values))
        if (min_p := batch.min_p) is not None:
            logits = _apply(logits, min_p.rows, lambda rows: keep_min_p(rows, min_p.values))
        return logits - log_exponentials(batch.keys, logits.shape[-1])

    def _race_scores(self, scores: ScoreTensors, race: Tensor, peaks: Tensor, batch: SamplingBatch) -> ScoreTensors:
        """`scores` with those of the random rows, to which the maximum that was taken off comes back."""
        assert batch.temperature is not None
        drawn = best_scores(race, self.num_scores)
        values = drawn.values + (peaks.double() / batch.temperature.double())[:, None]
        return ScoreTensors(
            _put(scores.token_ids, batch.random, drawn.token_ids), _put(scores.values, batch.random, values)
        )

    def _logprobs(self, logits: Tensor, token_ids: Tensor, batch: SamplingBatch) -> LogprobTensors:
        values = _take(logits, batch.logprobs).float()
        whole = values.logsumexp(-1, keepdim=True)
        sampled = values.gather(1, _take(token_ids, batch.logprobs)[:, None])
        rank = (values > sampled).sum(-1) + 1
        named = batch.named
        tops = [0 if named is not None and place in named.places else num for place, num in enumerate(batch.num_top)]
        top = values.topk(max(tops), dim=-1)
        ids, scores = top.indices, top.values
        if named is not None:
            ids, scores = self._with_named(values, ids, scores, named)
        places = frozenset() if named is None else frozenset(named.places)
        return LogprobTensors(
            batch.logprobs.host, batch.num_top, places, (sampled - whole)[:, 0], rank, ids, scores - whole
        )

    @staticmethod
    def _with_named(values: Tensor, ids: Tensor, scores: Tensor, named: NamedTokens) -> tuple[Tensor, Tensor]:
        """The best tokens and their scores, with those that rows name in their places."""
        found = values[named.places].gather(1, named.token_ids)
        wide = max(ids.shape[1], named.token_ids.shape[1])
        ids, scores = (torch.nn.functional.pad(one, (0, wide - one.shape[1])) for one in (ids, scores))
        width = named.token_ids.shape[1]
        ids[named.places, :width], scores[named.places, :width] = named.token_ids, found
        return ids, scores


def _take(tensor: Tensor, rows: Rows) -> Tensor:
    return tensor if rows.index is None else tensor[rows.index]


def _put(tensor: Tensor, rows: Rows, values: Tensor) -> Tensor:
    """`tensor` with `values` in those rows."""
    return values if rows.index is None else tensor.index_copy(0, rows.index, values)


def _apply(logits: Tensor, rows: Rows, transform: Callable[[Tensor], Tensor]) -> Tensor:
    """`logits` with `transform` applied to some of its rows."""
    if rows.index is None:
        return transform(logits)
    return logits.index_copy(0, rows.index, transform(logits[rows.index]))
