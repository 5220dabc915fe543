"""Structured output: the requests' token constraints as one mask on the device."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from kvarena.engine.request import Request
from kvarena.engine.sampling.transfer import to_device

# Processor time for the masks of one step. Whose mask is not made in it is put off to the next step, where it comes
# first: constraints that are slow to follow wait for each other, and nobody waits for them.
MASK_SECONDS = 0.05


def allowed_tokens(
    requests: Sequence[Request], vocab_size: int, device: torch.device, seconds: float = MASK_SECONDS
) -> Tensor | None:
    """Which tokens each request may sample next: bool [len(requests), vocab_size]; None when none is held.

    At least one mask is made, and no other is begun after `seconds` of this thread's processor time. Sets `num_late`
    of every constraint: above 0, the row's mask was not made and allows all.
    """
    asked = [(row, req.constraint) for row, req in enumerate(requests) if req.constraint is not None]
    for _, constraint in asked:
        constraint.num_late = constraint.num_late if not constraint.is_free else 0
    constrained = [(row, constraint) for row, constraint in asked if not constraint.is_free]
    if not constrained:
        return None
    end = time.thread_time() + seconds
    constrained.sort(key=lambda entry: -entry[1].num_late)
    words = np.full((len(requests), -(-vocab_size // 32)), -1, dtype=np.int32)
    for i, (row, constraint) in enumerate(constrained):
        if i and time.thread_time() >= end:
            constraint.num_late += 1
            continue
        constraint.num_late = 0
        constraint.fill(words[row])
    if device.type == "cpu":
        mask = np.unpackbits(words.view(np.uint8), axis=1, bitorder="little", count=vocab_size)
        return torch.from_numpy(mask.view(np.bool_))
    return unpacked(to_device(words, device), vocab_size)


def unpacked(words: Tensor, vocab_size: int) -> Tensor:
    """Bool [n, vocab_size]: the bits of int32 [n, >= vocab_size / 32], the lowest first.

    For a GPU: bits are sent, an eighth of a byte a token, and unpacked there.
    """
    octets = words.view(torch.uint8)
    bits = torch.arange(8, dtype=torch.uint8, device=words.device)
    return ((octets[:, :, None] >> bits) & 1).bool().flatten(1)[:, :vocab_size]
