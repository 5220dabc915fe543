"""Logit transforms over a batch: penalties, and the filters that cut a distribution's tail.

All take float32 logits [rows, V]. A token that may not be picked has the logit -inf.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from kvarena.engine.sampling.batch import Penalties


def penalize(
    logits: Tensor, in_prompt: Tensor, counts: Tensor, presence: Tensor, frequency: Tensor, repetition: Tensor
) -> Tensor:
    """Apply the three penalties, repetition first.

    Args:
        logits: float32 [R, V].
        in_prompt: bool [R, V], tokens of the prompt.
        counts: int32 [R, V], occurrences in the output.
        presence: [R], subtracted once from tokens in the output.
        frequency: [R], subtracted per occurrence in the output.
        repetition: [R], divides positive and multiplies negative logits of tokens in prompt or output
            (Keskar et al., CTRL, 2019).

    Returns:
        float32 [R, V].
    """
    in_output = counts > 0
    factor = torch.where(in_prompt | in_output, repetition[:, None], 1.0)
    logits = torch.where(logits > 0, logits / factor, logits * factor)
    return logits - frequency[:, None] * counts - presence[:, None] * in_output


def penalize_rows(logits: Tensor, penalties: Penalties) -> Tensor:
    """`logits` [N, V] with the rows penalized that `penalties` is of; may change `logits`."""
    p, index = penalties, penalties.rows.index
    rows = logits if index is None else logits[index]
    found = penalize(rows, p.in_prompt[p.slots], p.counts[p.slots], p.presence, p.frequency, p.repetition)
    return found if index is None else logits.index_copy(0, index, found)


def keep_top_k(logits: Tensor, top_k: Tensor, max_k: int) -> Tensor:
    """Keep each row's `top_k` largest logits, among equal ones the lower token ids.

    Args:
        logits: float32 [R, V].
        top_k: int64 [R], each in [1, max_k].
        max_k: the largest, known to the host; at most V.
    """
    return _keep_first(logits, logits.topk(max_k, dim=-1).values, top_k)


def keep_top_p(logits: Tensor, top_p: Tensor) -> Tensor:
    """Keep each row's nucleus: the most likely tokens whose mass first reaches `top_p` (Holtzman et al., 2020).

    Among equal logits the lower token ids come first. The most likely token is always kept. Masses are added in
    float64, so that no more than a token whose mass ends within 1e-6 of `top_p` depends on who adds them.

    Args:
        logits: float32 [R, V].
        top_p: [R] in (0, 1].
    """
    if logits.device.type == "cpu":  # numpy sorts values alone, in a fraction of the time
        values = torch.from_numpy(np.sort(logits.numpy(), axis=-1)).flip(-1)
    else:
        values = logits.sort(dim=-1, descending=True).values
    mass = (values.double() - values[:, :1].double()).exp_()
    reached = mass.cumsum(-1)
    wanted = top_p.double()[:, None] * reached[:, -1:]
    return _keep_first(logits, values, (reached - mass < wanted).sum(-1).clamp_min(1))


def _keep_first(logits: Tensor, values: Tensor, counts: Tensor) -> Tensor:
    """Keep the first `counts` tokens of each row, by logits and then by ids; `values` are its largest logits in order.

    `counts`: int64 [R], at least 1 and at most as many as `values` has.
    """
    last = values.gather(1, counts[:, None] - 1)
    above, equal = logits > last, logits == last
    room = counts - above.sum(-1)
    return logits.masked_fill(~(above | (equal & (equal.cumsum(-1) <= room[:, None]))), -torch.inf)


def keep_min_p(logits: Tensor, min_p: Tensor) -> Tensor:
    """Drop tokens whose probability is below `min_p` times the most likely one's (Nguyen et al., 2024).

    Args:
        logits: float32 [R, V].
        min_p: [R] in [0, 1].
    """
    # p_i / p_max = exp(logit_i - logit_max); log(0) = -inf keeps everything.
    return logits.masked_fill(logits - logits.amax(-1, keepdim=True) < min_p.log()[:, None], -torch.inf)
