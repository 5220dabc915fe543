"""Drawing tokens in few passes over the logits, without a sort and without waiting for the device.

Each row's vocabulary is cut into parts; a part keeps its best score, and the last part to finish picks the row's token:

    row     | part 0 | part 1 | ... |      score = logit / T - log E(key, token)   (the exponential race of
    scores     best     best                        logit      where T is 0          engine/sampling/streams.py)

The random bits are those of `log_exponentials`, so a request's draw depends on its seed and position alone. What top-k,
top-p and min-p need beyond this pass is in `engine/kernels/filtered.py`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvarena.engine.kernels import INTERPRET
from kvarena.engine.kernels.common import await_previous, launch_options
from kvarena.engine.kernels.drawing import (
    MAX_PARTS,
    MAX_TOP_K,
    NUM_GROUPS,
    TILE,
    DrawScratch,
    first_of_best,
    key_shift,
    meet,
    num_parts,
    ordered,
    row_filters,
    row_params,
    row_score,
    store_token,
)


def draw_tokens(
    logits: Tensor, params: Tensor, last_tokens: Tensor, out: Tensor, scratch: DrawScratch, num_programs: int
) -> None:
    """Pick one token per row that does not filter; begin with the others, which `draw_filtered` ends.

    Args:
        logits: [N, V], rows contiguous.
        params: int32 [NUM_PARAMS, >= N] of `pack_params`. Rows that are SKIPPED are left alone.
        last_tokens: int64 [num_rows]; written, with token 0 where no token could be picked.
        out: int64 [>= N]; written, with -1 where no token could be picked: the logits hold NaN or +inf, or are all
            -inf.
        scratch: for at least N rows.
        num_programs: programs that fill the device.
    """
    num_rows, vocab_size = logits.shape
    draw_kernel[(num_rows, num_parts(num_rows, vocab_size, num_programs))](
        logits, params, last_tokens, out, scratch.scores, scratch.tokens, scratch.arrived, scratch.tops,
        scratch.groups, scratch.states, scratch.peaks, scratch.pivots, scratch.bounds, scratch.num_chosen, vocab_size,
        logits.stride(0), params.stride(0), logits, 0, TILE=TILE, PARTS=MAX_PARTS, FAST=not INTERPRET, PAIR=False,
        GROUPS=NUM_GROUPS, MAX_TOP_K=MAX_TOP_K, SHIFT=key_shift(logits.dtype), **launch_options(),
    )  # fmt: skip


def draw_parts(
    logits: Tensor, params: Tensor, first_token: int, scratch: DrawScratch, num_programs: int
) -> tuple[Tensor, Tensor]:
    """The best score and its token among some columns of each row, for whoever has the other columns' too.

    Args:
        logits: [N, V], the columns of tokens [first_token, first_token + V).
        params, scratch, num_programs: as of `draw_tokens`; nothing is filtered and no row is skipped.
        first_token: of the first column.

    Returns:
        float32 [N]: scores, inf where the logits hold NaN or +inf; int64 [N]: tokens, `NO_TOKEN` where there is none.
    """
    num_rows, vocab_size = logits.shape
    scores = torch.empty(num_rows, dtype=torch.float32, device=logits.device)
    tokens = torch.empty(num_rows, dtype=torch.int64, device=logits.device)
    draw_kernel[(num_rows, num_parts(num_rows, vocab_size, num_programs))](
        logits, params, tokens, tokens, scratch.scores, scratch.tokens, scratch.arrived, scratch.tops, scratch.groups,
        scratch.states, scratch.peaks, scratch.pivots, scratch.bounds, scratch.num_chosen, vocab_size,
        logits.stride(0), params.stride(0), scores, first_token, TILE=TILE, PARTS=MAX_PARTS, FAST=not INTERPRET,
        PAIR=True, GROUPS=NUM_GROUPS, MAX_TOP_K=MAX_TOP_K, SHIFT=key_shift(logits.dtype), **launch_options(),
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
    score_kernel[(num_rows, triton.cdiv(vocab_size, TILE))](
        logits,
        params,
        out,
        vocab_size,
        logits.stride(0),
        params.stride(0),
        TILE=TILE,
        FAST=not INTERPRET,
        **launch_options(),
    )
    return out


@triton.jit(do_not_specialize=["stride_params"])
def score_kernel(  # type: ignore[no-untyped-def]
    logits_ptr,
    params_ptr,
    out_ptr,
    vocab_size,
    stride_logits,
    stride_params,
    TILE: tl.constexpr,
    FAST: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One tile of one row's vocabulary; the grid is (rows, tiles)."""
    await_previous(OVERLAP)
    row = tl.program_id(0)
    greedy, inverse, low, high = row_params(params_ptr, stride_params, row)
    tokens = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = tokens < vocab_size
    logit = tl.load(logits_ptr + row.to(tl.int64) * stride_logits + tokens, mask=inside, other=0.0).to(tl.float32)
    score = row_score(logit, tokens, greedy, inverse, low, high, FAST)
    tl.store(out_ptr + row.to(tl.int64) * vocab_size + tokens, score, mask=inside)


@triton.jit
def _kth_largest(keys, count):  # type: ignore[no-untyped-def]
    """The `count`-th largest of int32 keys [n]; the smallest where there are fewer."""
    low = tl.min(keys, 0).to(tl.int64)
    high = tl.max(keys, 0).to(tl.int64)
    while low < high:
        middle = low + ((high - low) >> 1)
        enough = tl.sum((keys > middle.to(tl.int32)).to(tl.int32), 0) >= count
        low = tl.where(enough, middle + 1, low)
        high = tl.where(enough, high, middle)
    return low.to(tl.int32)


@triton.jit(do_not_specialize=["stride_params"])
def draw_kernel(  # type: ignore[no-untyped-def]
    logits_ptr, params_ptr, last_ptr, out_ptr, scores_ptr, tokens_ptr, arrived_ptr, tops_ptr, groups_ptr, states_ptr,
    row_peaks_ptr, pivots_ptr, bounds_ptr, num_chosen_ptr, vocab_size, stride_logits, stride_params, peaks_ptr,
    first_token, TILE: tl.constexpr, PARTS: tl.constexpr, FAST: tl.constexpr, PAIR: tl.constexpr,
    GROUPS: tl.constexpr, MAX_TOP_K: tl.constexpr, SHIFT: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """One part of one row's vocabulary; the grid is (rows, parts)."""
    await_previous(OVERLAP)
    row = tl.program_id(0)
    base = logits_ptr + row.to(tl.int64) * stride_logits
    top_k, top_p, least = row_filters(params_ptr, stride_params, row)
    if PAIR:
        peak, token, _ = _race(base, vocab_size, params_ptr, stride_params, row, first_token, TILE, FAST, False)
        peak, token, last = meet(scores_ptr, tokens_ptr, arrived_ptr, row, peak, token, PARTS)
        if last:
            tl.store(peaks_ptr + row, peak)
            tl.store(out_ptr + row, tl.where(token != 0x7FFFFFFF, token + first_token, 0x7FFFFFFF).to(tl.int64))
    elif (top_k > 0) & (top_k <= MAX_TOP_K):
        groups = groups_ptr + row * GROUPS
        peak = _group_maxima(base, groups, vocab_size, TILE, GROUPS // TILE)
        peak, _, last = meet(scores_ptr, tokens_ptr, arrived_ptr, row, peak, row, PARTS)
        if last:
            tl.debug_barrier()
            lanes = tl.arange(0, GROUPS)
            bound = _kth_largest(tl.load(groups + lanes, cache_modifier=".cg") >> SHIFT, top_k)
            tl.debug_barrier()
            tl.store(groups + lanes, tl.full([GROUPS], -2147483648, tl.int32))
            is_broken = (peak == float("inf")) | (peak == float("-inf"))
            if is_broken:
                store_token(params_ptr, last_ptr, out_ptr, row, row * 0 + 0x7FFFFFFF)
            tl.store(bounds_ptr + row, bound)
            tl.store(num_chosen_ptr + row, 0)
            tl.store(row_peaks_ptr + row, peak)
            tl.store(states_ptr + row, tl.where(is_broken, 0, 2))
    elif top_k >= 0:
        if (top_k > 0) | (top_p < 1.0) | (least > float("-inf")):
            peak, token, top = _race(base, vocab_size, params_ptr, stride_params, row, first_token, TILE, FAST, True)
            tl.store(tops_ptr + row * PARTS + tl.program_id(1), top)
            _, token, last = meet(scores_ptr, tokens_ptr, arrived_ptr, row, peak, token, PARTS)
            if last:
                tl.debug_barrier()
                lanes = tl.arange(0, PARTS)
                exists = lanes < tl.num_programs(1)
                tops = tl.load(tops_ptr + row * PARTS + lanes, mask=exists, other=float("-inf"), cache_modifier=".cg")
                tl.store(row_peaks_ptr + row, tl.max(tops, 0))
                tl.store(pivots_ptr + row, token)
                if token == 0x7FFFFFFF:
                    store_token(params_ptr, last_ptr, out_ptr, row, token)
                tl.store(states_ptr + row, tl.where(token == 0x7FFFFFFF, 0, tl.where(top_k > 0, 4, 1)))
        else:
            peak, token, _ = _race(base, vocab_size, params_ptr, stride_params, row, first_token, TILE, FAST, False)
            _, token, last = meet(scores_ptr, tokens_ptr, arrived_ptr, row, peak, token, PARTS)
            if last:
                store_token(params_ptr, last_ptr, out_ptr, row, token)
                tl.store(states_ptr + row, 0)
    else:
        tl.store(states_ptr + row, 0)


@triton.jit
def _race(  # type: ignore[no-untyped-def]
    base, vocab_size, params_ptr, stride_params, row, first_token, TILE: tl.constexpr, FAST: tl.constexpr,
    TRACK: tl.constexpr,
):  # fmt: skip
    """The best score among this part's tokens, whose it is, and with TRACK the largest logit."""
    greedy, inverse, low, high = row_params(params_ptr, stride_params, row)
    best = tl.full([TILE], float("-inf"), tl.float32)
    top = tl.full([TILE], float("-inf"), tl.float32)
    best_token = tl.full([TILE], 0x7FFFFFFF, tl.int32)
    broken = tl.full([TILE], 0, tl.int32)
    for start in range(tl.program_id(1) * TILE, vocab_size, tl.num_programs(1) * TILE):
        tokens = start + tl.arange(0, TILE)
        logit = tl.load(base + tokens, mask=tokens < vocab_size, other=float("-inf")).to(tl.float32)
        broken |= ((logit != logit) | (logit == float("inf"))).to(tl.int32)
        if TRACK:
            top = tl.maximum(top, logit)
        score = row_score(logit, tokens + first_token, greedy, inverse, low, high, FAST)
        better = score > best
        best = tl.where(better, score, best)
        best_token = tl.where(better, tokens, best_token)
    # A part that met a NaN or +inf says so with a score that beats all others, and no token.
    is_broken = tl.max(broken, 0) > 0
    peak, token = first_of_best(best, best_token)
    return tl.where(is_broken, float("inf"), peak), tl.where(is_broken, 0x7FFFFFFF, token), tl.max(top, 0)


@triton.jit
def _group_maxima(base, groups, vocab_size, TILE: tl.constexpr, FOLDS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Puts the largest key of each group of this part's tokens into `groups`; the largest logit, inf of broken ones.

    A group is a column of the part's tiles: neighbours, which are often likely together, are in different ones.
    """
    best = tl.full([TILE], float("-inf"), tl.float32)
    broken = tl.full([TILE], 0, tl.int32)
    for start in range(tl.program_id(1) * TILE, vocab_size, tl.num_programs(1) * TILE):
        tokens = start + tl.arange(0, TILE)
        logit = tl.load(base + tokens, mask=tokens < vocab_size, other=float("-inf")).to(tl.float32)
        broken |= ((logit != logit) | (logit == float("inf"))).to(tl.int32)
        best = tl.where(logit > best, logit, best)
    fold = tl.program_id(1) % FOLDS
    tl.atomic_max(groups + fold * TILE + tl.arange(0, TILE), ordered(best, 0), sem="relaxed")
    return tl.where(tl.max(broken, 0) > 0, float("inf"), tl.max(best, 0))
