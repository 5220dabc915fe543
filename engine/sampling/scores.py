"""The scores that tokens were picked by, of the best tokens of each row.

A row's token is the one with the largest score:

    greedy     logit
    sampled    logit / temperature - log E,  E the token's exponential of the draw (engine/sampling/streams.py)

both after bars, bias and penalties, and -inf for what top-k, top-p or min-p dropped. Nothing is normalised and no
maximum is taken off, so the values of two runs can be compared: of the same request at the same position the draw is
the same, and what differs is the logits.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class ScoreTensors(NamedTuple):
    """Scores of the best tokens of N rows, on the device; best first.

    Attributes:
        token_ids: int32 [N, K].
        values: float64 [N, K].
    """

    token_ids: Tensor
    values: Tensor


def best_scores(scores: Tensor, count: int) -> ScoreTensors:
    """The `count` largest of each row, or all of a smaller vocabulary.

    Args:
        scores: [N, V], any float type.
        count: K, at least 1.
    """
    best = scores.topk(min(count, scores.shape[-1]), dim=-1)
    return ScoreTensors(best.indices.int(), best.values.double())


def put_scores(scores: ScoreTensors | None, index: Tensor, others: ScoreTensors | None) -> ScoreTensors | None:
    """`scores` with those of `others` in the rows `index`; None where none are kept."""
    if scores is None or others is None:
        return None
    return ScoreTensors(*(one.index_copy(0, index, other) for one, other in zip(scores, others, strict=True)))
