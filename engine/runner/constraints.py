"""Structured output: the requests' token constraints as one mask on the device."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from engine.request import Request


def allowed_tokens(requests: Sequence[Request], vocab_size: int, device: torch.device) -> Tensor | None:
    """Which tokens each request may sample next: bool [len(requests), vocab_size]; None when none is constrained."""
    constrained = [(row, req.constraint) for row, req in enumerate(requests) if req.constraint is not None]
    if not constrained:
        return None
    mask = np.ones((len(requests), vocab_size), dtype=np.bool_)
    words = np.zeros(-(-vocab_size // 32), dtype=np.int32)
    for row, constraint in constrained:
        constraint.fill(words)
        mask[row] = np.unpackbits(words.view(np.uint8), bitorder="little", count=vocab_size)
    return torch.from_numpy(mask).to(device)
