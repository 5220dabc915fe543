"""Greedy and temperature sampling in one pass over the logits, without a sort and without waiting for the device.

Each row's vocabulary is cut into parts; a part keeps its best score, and the last part to finish picks the row's token:

    row     | part 0 | part 1 | ... |      score = logit / T - log E(key, token)   (the exponential race of
    scores     best     best                        logit      where T is 0          engine/sampling/streams.py)

The random bits are those of `log_exponentials`, so a request's draw depends on its seed and position alone.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import libdevice

from kvarena.engine.kernels import INTERPRET

_TILE = 1024
_MAX_PARTS = 128
NO_TOKEN = 0x7FFFFFFF  # of a row in which none can be picked


class DrawScratch:
    """The parts' results and the arrival counters, for up to `num_rows` rows."""

    def __init__(self, num_rows: int, device: torch.device | str) -> None:
        self.scores = torch.empty(num_rows, _MAX_PARTS, dtype=torch.float32, device=device)
        self.tokens = torch.empty(num_rows, _MAX_PARTS, dtype=torch.int32, device=device)
        self.arrived = torch.zeros(num_rows, dtype=torch.int32, device=device)


def draw_tokens(
    logits: Tensor, params: Tensor, last_tokens: Tensor, out: Tensor, scratch: DrawScratch, num_programs: int
) -> None:
    """Pick one token per row.

    Args:
        logits: [N, V], rows contiguous.
        params: int32 [4, >= N]: each row's index into `last_tokens`, the bits of its float32 temperature, and the two
            halves of its key (`stream_keys`).
        last_tokens: int64 [num_rows]; written, with token 0 where no token could be picked.
        out: int64 [>= N]; written, with -1 where no token could be picked: the logits hold NaN or +inf, or are all
            -inf.
        scratch: for at least N rows.
        num_programs: programs that fill the device.
    """
    num_rows, vocab_size = logits.shape
    num_tiles = triton.cdiv(vocab_size, _TILE)
    parts = min(num_tiles, _MAX_PARTS, max(1, num_programs // num_rows))
    draw_kernel[(num_rows, parts)](
        logits, params, last_tokens, out, scratch.scores, scratch.tokens, scratch.arrived,
        vocab_size, logits.stride(0), params.stride(0), logits, 0, TILE=_TILE, PARTS=_MAX_PARTS,
        FAST=not INTERPRET, PAIR=False,
    )  # fmt: skip


def draw_parts(
    logits: Tensor, params: Tensor, first_token: int, scratch: DrawScratch, num_programs: int
) -> tuple[Tensor, Tensor]:
    """The best score and its token among some columns of each row, for whoever has the other columns' too.

    Args:
        logits: [N, V], the columns of tokens [first_token, first_token + V).
        params, scratch, num_programs: as of `draw_tokens`.
        first_token: of the first column.

    Returns:
        float32 [N]: scores, inf where the logits hold NaN or +inf; int64 [N]: tokens, `NO_TOKEN` where there is none.
    """
    num_rows, vocab_size = logits.shape
    scores = torch.empty(num_rows, dtype=torch.float32, device=logits.device)
    tokens = torch.empty(num_rows, dtype=torch.int64, device=logits.device)
    parts = min(triton.cdiv(vocab_size, _TILE), _MAX_PARTS, max(1, num_programs // num_rows))
    draw_kernel[(num_rows, parts)](
        logits, params, tokens, tokens, scratch.scores, scratch.tokens, scratch.arrived,
        vocab_size, logits.stride(0), params.stride(0), scores, first_token, TILE=_TILE, PARTS=_MAX_PARTS,
        FAST=not INTERPRET, PAIR=True,
    )  # fmt: skip
    return scores, tokens


def draw_scores(logits: Tensor, params: Tensor) -> Tensor:
    """What `draw_tokens` takes the largest of, for whoever wants to see by how much it won.

    Args:
        logits, params: as of `draw_tokens`.

    Returns:
        float32 [N, V].
    """
    num_rows, vocab_size = logits.shape
    out = torch.empty(num_rows, vocab_size, dtype=torch.float32, device=logits.device)
    score_kernel[(num_rows, triton.cdiv(vocab_size, _TILE))](
        logits, params, out, vocab_size, logits.stride(0), params.stride(0), TILE=_TILE, FAST=not INTERPRET
    )
    return out


@triton.jit
def _mix32(x):  # type: ignore[no-untyped-def]
    x ^= x >> 16
    x *= 0x7FEB352D
    x ^= x >> 15
    x *= 0x846CA68B
    x ^= x >> 16
    return x


@triton.jit
def _log(x, FAST: tl.constexpr):  # type: ignore[no-untyped-def]
    """Natural logarithm; FAST takes the hardware's, which is good to 2 units in 2^22 and a fifth of the work."""
    if FAST:
        return libdevice.fast_logf(x)
    else:  # noqa: RET505 - both branches of a compile-time if are compiled unless one is the else
        return tl.log(x)


@triton.jit
def _log_exponential(tokens, low, high, FAST: tl.constexpr):  # type: ignore[no-untyped-def]
    bits = _mix32(tokens.to(tl.uint32) * 0x9E3779B9 + low)
    bits = _mix32(bits ^ high)
    uniform = ((bits & 0x7FFFFFFF).to(tl.int32).to(tl.float32) + 0.5) * 4.656612873077393e-10
    uniform = tl.minimum(uniform, 1.0 - 5.960464477539063e-08)
    # log(1 - u) loses the small u, which are the winners: there the series.
    series = uniform * (1.0 + uniform * (0.5 + uniform * (1.0 / 3.0 + uniform * 0.25)))
    return _log(tl.where(uniform < 0.01, series, -_log(1.0 - uniform, FAST)), FAST)


@triton.jit
def _row_params(params_ptr, stride_params, row):  # type: ignore[no-untyped-def]
    """Whether a row is greedy, 1 / temperature, and the halves of its key."""
    temperature = tl.load(params_ptr + stride_params + row).to(tl.float32, bitcast=True)
    low = tl.load(params_ptr + 2 * stride_params + row).to(tl.uint32, bitcast=True)
    high = tl.load(params_ptr + 3 * stride_params + row).to(tl.uint32, bitcast=True)
    greedy = temperature < 1e-6
    return greedy, 1.0 / tl.where(greedy, 1.0, temperature), low, high


@triton.jit
def _score(logit, tokens, greedy, inverse, low, high, FAST: tl.constexpr):  # type: ignore[no-untyped-def]
    score = logit
    if not greedy:
        score = logit * inverse - _log_exponential(tokens, low, high, FAST)
    return score


@triton.jit
def score_kernel(  # type: ignore[no-untyped-def]
    logits_ptr, params_ptr, out_ptr, vocab_size, stride_logits, stride_params, TILE: tl.constexpr, FAST: tl.constexpr
):
    """One tile of one row's vocabulary; the grid is (rows, tiles)."""
    row = tl.program_id(0)
    greedy, inverse, low, high = _row_params(params_ptr, stride_params, row)
    tokens = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = tokens < vocab_size
    logit = tl.load(logits_ptr + row.to(tl.int64) * stride_logits + tokens, mask=inside, other=0.0).to(tl.float32)
    score = _score(logit, tokens, greedy, inverse, low, high, FAST)
    tl.store(out_ptr + row.to(tl.int64) * vocab_size + tokens, score, mask=inside)


@triton.jit
def draw_kernel(  # type: ignore[no-untyped-def]
    logits_ptr, params_ptr, last_ptr, out_ptr, scores_ptr, tokens_ptr, arrived_ptr, vocab_size, stride_logits,
    stride_params, peaks_ptr, first_token, TILE: tl.constexpr, PARTS: tl.constexpr, FAST: tl.constexpr,
    PAIR: tl.constexpr,
):  # fmt: skip
    """One part of one row's vocabulary; the grid is (rows, parts)."""
    row = tl.program_id(0)
    part = tl.program_id(1)
    num_parts = tl.num_programs(1)
    greedy, inverse, low, high = _row_params(params_ptr, stride_params, row)
    base = logits_ptr + row.to(tl.int64) * stride_logits
    best = tl.full([TILE], float("-inf"), tl.float32)
    best_token = tl.full([TILE], 0x7FFFFFFF, tl.int32)
    broken = tl.full([TILE], 0, tl.int32)
    for start in range(part * TILE, vocab_size, num_parts * TILE):
        tokens = start + tl.arange(0, TILE)
        logit = tl.load(base + tokens, mask=tokens < vocab_size, other=float("-inf")).to(tl.float32)
        broken |= ((logit != logit) | (logit == float("inf"))).to(tl.int32)
        score = _score(logit, tokens + first_token, greedy, inverse, low, high, FAST)
        better = score > best
        best = tl.where(better, score, best)
        best_token = tl.where(better, tokens, best_token)
    peak = tl.max(best, 0)
    token = tl.min(tl.where(best == peak, best_token, 0x7FFFFFFF), 0)
    # A part that met a NaN or +inf says so with a score that beats all others, and no token.
    is_broken = tl.max(broken, 0) > 0
    peak = tl.where(is_broken, float("inf"), peak)
    token = tl.where(is_broken, 0x7FFFFFFF, token)
    if num_parts > 1:
        tl.store(scores_ptr + row * PARTS + part, peak)
        tl.store(tokens_ptr + row * PARTS + part, token)
        tl.debug_barrier()
        arrived = tl.atomic_add(arrived_ptr + row, 1, sem="acq_rel")
        if arrived == num_parts - 1:
            lanes = tl.arange(0, PARTS)
            keep = lanes < num_parts
            scores = tl.load(scores_ptr + row * PARTS + lanes, mask=keep, other=float("-inf"), cache_modifier=".cg")
            picks = tl.load(tokens_ptr + row * PARTS + lanes, mask=keep, other=0x7FFFFFFF, cache_modifier=".cg")
            peak = tl.max(scores, 0)
            token = tl.min(tl.where(scores == peak, picks, 0x7FFFFFFF), 0)
            if PAIR:
                _store_pair(peaks_ptr, out_ptr, row, peak, token, first_token)
            else:
                _store_token(params_ptr, last_ptr, out_ptr, row, token)
            tl.store(arrived_ptr + row, 0)
    elif PAIR:
        _store_pair(peaks_ptr, out_ptr, row, peak, token, first_token)
    else:
        _store_token(params_ptr, last_ptr, out_ptr, row, token)


@triton.jit
def _store_pair(peaks_ptr, out_ptr, row, peak, token, first_token):  # type: ignore[no-untyped-def]
    tl.store(peaks_ptr + row, peak)
    tl.store(out_ptr + row, tl.where(token != 0x7FFFFFFF, token + first_token, 0x7FFFFFFF).to(tl.int64))


@triton.jit
def _store_token(params_ptr, last_ptr, out_ptr, row, token):  # type: ignore[no-untyped-def]
    found = token != 0x7FFFFFFF
    tl.store(last_ptr + tl.load(params_ptr + row), tl.where(found, token, 0).to(tl.int64))
    tl.store(out_ptr + row, tl.where(found, token, -1).to(tl.int64))
