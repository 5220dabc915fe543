"""Logit transforms over a batch: penalties, and the filters that cut a distribution's tail.

All take float32 logits [rows, V]. A token that may not be picked has the logit -inf.
"""

from __future__ import annotations

import torch
from torch import Tensor


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


def keep_top_k(logits: Tensor, top_k: Tensor, max_k: int) -> Tensor:
    """Keep each row's `top_k` largest logits, and those equal to the smallest of them.

    Args:
        logits: float32 [R, V].
        top_k: int64 [R], each in [1, max_k].
        max_k: the largest, known to the host; at most V.
    """
    kth = logits.topk(max_k, dim=-1).values.gather(1, top_k[:, None] - 1)
    return logits.masked_fill(logits < kth, -torch.inf)


def keep_top_p(logits: Tensor, top_p: Tensor) -> Tensor:
    """Keep each row's nucleus: the most likely tokens whose mass first reaches `top_p` (Holtzman et al., 2020).

    Among equal logits the lower token ids come first. The most likely token is always kept.

    Args:
        logits: float32 [R, V].
        top_p: [R] in (0, 1].
    """
    values, order = logits.sort(dim=-1, descending=True, stable=True)
    mass = values.softmax(-1)
    dropped = (mass.cumsum(-1) - mass) >= top_p[:, None]
    dropped[:, 0] = False
    return logits.masked_fill(torch.empty_like(dropped).scatter_(1, order, dropped), -torch.inf)


def keep_min_p(logits: Tensor, min_p: Tensor) -> Tensor:
    """Drop tokens whose probability is below `min_p` times the most likely one's (Nguyen et al., 2024).

    Args:
        logits: float32 [R, V].
        min_p: [R] in [0, 1].
    """
    # p_i / p_max = exp(logit_i - logit_max); log(0) = -inf keeps everything.
    return logits.masked_fill(logits - logits.amax(-1, keepdim=True) < min_p.log()[:, None], -torch.inf)
