"""What the draw of a request's tokens needs to know of it, as numbers: see `DrawParams`."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from kvarena.engine.request import SamplingParams
from kvarena.engine.sampling.streams import stream_keys

# Where a row of `pack_params` has its top_k, and what stands there for a row that the draw leaves alone.
TOP_K, SKIPPED = 4, -1
NUM_PARAMS = 7


class DrawParams(NamedTuple):
    """How a request's tokens are drawn.

    Attributes:
        temperature: 0 takes the largest logit.
        top_k: 0 where it keeps all tokens.
        top_p: 1 where it keeps all.
        log_min_p: logarithm of min_p; -inf where it keeps all.
    """

    temperature: float
    top_k: int = 0
    top_p: float = 1.0
    log_min_p: float = -math.inf

    @property
    def filters(self) -> bool:
        """Whether some tokens may be dropped."""
        return self[1:] != (0, 1.0, -math.inf)


def draw_params(params: SamplingParams, vocab_size: int) -> DrawParams:
    """Those of a request; filters that change nothing are off."""
    if params.temperature == 0:
        return DrawParams(0.0)
    top_k = params.top_k if params.top_k < vocab_size else 0
    return DrawParams(
        params.temperature, top_k, params.top_p, math.log(params.min_p) if params.min_p > 0 else -math.inf
    )


def pack_params(columns: np.ndarray, rows: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """What `kvarena.engine.kernels.sample` reads of each row: int32 [NUM_PARAMS, n].

        row | bits of temperature | key, two halves | top_k | bits of top_p | bits of log_min_p

    Args:
        columns: with `seed` and the fields of `DrawParams`, by row.
        rows: int64 [n].
        positions: int64 [n], output tokens that precede the one to draw.
    """
    params = np.empty((NUM_PARAMS, len(rows)), dtype=np.int32)
    params[0] = rows
    params[1] = columns["temperature"][rows].view(np.int32)
    params[2:4] = stream_keys(columns["seed"][rows], positions).T
    params[TOP_K] = columns["top_k"][rows]
    params[5] = columns["top_p"][rows].view(np.int32)
    params[6] = columns["log_min_p"][rows].view(np.int32)
    return params


def is_drawn(params: SamplingParams) -> bool:
    """Nothing edits the logits, and nobody asks for log-probabilities."""
    return (
        params.min_tokens == 0
        and params.presence_penalty == 0
        and params.frequency_penalty == 0
        and params.repetition_penalty == 1
        and not params.logit_bias
        and params.logprobs is None
    )
