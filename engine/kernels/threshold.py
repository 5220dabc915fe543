"""The search for a row's threshold over all of its logits, where `engine/kernels/filtered.py` has no short way.

One program a row, and one pass over it for each two bits of the threshold's key, then of its token where equal logits
are cut.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from kvarena.engine.kernels import INTERPRET
from kvarena.engine.kernels.common import await_previous, launch_options
from kvarena.engine.kernels.drawing import (
    DrawScratch,
    first_of_best,
    key_shift,
    mass_of,
    ordered,
    row_filters,
    row_params,
    row_score,
    store_token,
    wanted_mass,
)

SETTLE_TILE = 4096
SETTLE_WARPS = 16


def settle(logits: Tensor, params: Tensor, last_tokens: Tensor, out: Tensor, scratch: DrawScratch) -> None:
    """REJECTED and HARD rows: DONE, whatever it takes."""
    settle_kernel[(len(logits),)](
        logits, params, last_tokens, out, scratch.states, scratch.peaks, scratch.pivots, scratch.cuts,
        logits.shape[1], logits.stride(0), params.stride(0), TILE=SETTLE_TILE, FAST=not INTERPRET,
        SHIFT=key_shift(logits.dtype), num_warps=SETTLE_WARPS, **launch_options(),
    )  # fmt: skip


@triton.jit(do_not_specialize=["stride_params"])
def settle_kernel(  # type: ignore[no-untyped-def]
    logits_ptr, params_ptr, last_ptr, out_ptr, states_ptr, peaks_ptr, pivots_ptr, cuts_ptr, vocab_size, stride_logits,
    stride_params, TILE: tl.constexpr, FAST: tl.constexpr, SHIFT: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """One row that nothing else has served: the search for its threshold, and a draw."""
    await_previous(OVERLAP)
    row = tl.program_id(0)
    state = tl.load(states_ptr + row)
    if state >= 3:
        base = logits_ptr + row.to(tl.int64) * stride_logits
        greedy, inverse, low, high = row_params(params_ptr, stride_params, row)
        top_k, top_p, least = row_filters(params_ptr, stride_params, row)
        peak = tl.load(peaks_ptr + row)
        # All tokens, to begin with. What stands before a rejected one is kept or has a larger logit.
        key = row * 0 + (-2147483648 >> SHIFT)
        token = vocab_size - 1 + row * 0
        lowest = key
        if state == 3:
            pivot = tl.load(pivots_ptr + row)
            lowest = ordered(tl.load(base + pivot).to(tl.float32), SHIFT)
        if top_k > 0:
            wanted = top_k.to(tl.int64)
            key, token = _cut_row(base, vocab_size, key, token, key, wanted, peak, inverse, False, TILE, SHIFT)
            lowest = key
        if top_p < 1.0:
            totals = tl.zeros([TILE], tl.int64)
            for start in range(0, vocab_size, TILE):
                _, _, mass = _weigh(base, start, vocab_size, key, token, peak, inverse, True, TILE, SHIFT)
                totals += mass
            wanted = wanted_mass(top_p, tl.sum(totals, 0))
            key, token = _cut_row(base, vocab_size, key, token, lowest, wanted, peak, inverse, True, TILE, SHIFT)
        tl.store(cuts_ptr + 2 * row, key.to(tl.int64))
        tl.store(cuts_ptr + 2 * row + 1, token.to(tl.int64))
        best = tl.full([TILE], float("-inf"), tl.float32)
        best_token = tl.full([TILE], 0x7FFFFFFF, tl.int32)
        for start in range(0, vocab_size, TILE):
            tokens = start + tl.arange(0, TILE)
            logit = tl.load(base + tokens, mask=tokens < vocab_size, other=float("-inf")).to(tl.float32)
            keys = ordered(logit, SHIFT)
            kept = (keys > key) | ((keys == key) & (tokens <= token))
            score = row_score(logit, tokens, greedy, inverse, low, high, FAST)
            better = kept & ((logit - peak) * inverse >= least) & (score > best)
            best = tl.where(better, score, best)
            best_token = tl.where(better, tokens, best_token)
        _, drawn = first_of_best(best, best_token)
        store_token(params_ptr, last_ptr, out_ptr, row, drawn)
        tl.store(states_ptr + row, 0)


@triton.jit
def _weigh(  # type: ignore[no-untyped-def]
    base, start, vocab_size, key, token, peak, inverse, MASS: tl.constexpr, TILE: tl.constexpr, SHIFT: tl.constexpr
):
    """Keys, ids and weights of a tile: its mass, or 1, and 0 of what stands behind (key, token)."""
    tokens = start + tl.arange(0, TILE)
    logit = tl.load(base + tokens, mask=tokens < vocab_size, other=float("-inf")).to(tl.float32)
    keys = ordered(logit, SHIFT)
    counts = (tokens < vocab_size) & ((keys > key) | ((keys == key) & (tokens <= token)))
    weights = counts.to(tl.int64)
    if MASS:
        weights = tl.where(counts, mass_of(logit, peak, inverse), 0)
    return keys, tokens, weights


@triton.jit
def _cut_row(  # type: ignore[no-untyped-def]
    base, vocab_size, key, token, lowest, wanted, peak, inverse, MASS: tl.constexpr, TILE: tl.constexpr,
    SHIFT: tl.constexpr,
):  # fmt: skip
    """As `_cut`, of a row's tokens up to (key, token); each pass over the row leaves a quarter of the interval."""
    low = lowest.to(tl.int64)
    high = ordered(peak, SHIFT).to(tl.int64)
    while low < high:
        first, second, third = _quarters(low, high)
        ones = tl.zeros([TILE], tl.int64)
        twos = tl.zeros([TILE], tl.int64)
        threes = tl.zeros([TILE], tl.int64)
        for start in range(0, vocab_size, TILE):
            keys, tokens, weights = _weigh(base, start, vocab_size, key, token, peak, inverse, MASS, TILE, SHIFT)
            ones += tl.where(keys > first.to(tl.int32), weights, 0)
            twos += tl.where(keys > second.to(tl.int32), weights, 0)
            threes += tl.where(keys > third.to(tl.int32), weights, 0)
        one = tl.sum(ones, 0) >= wanted
        two = tl.sum(twos, 0) >= wanted
        three = tl.sum(threes, 0) >= wanted
        low = tl.where(three, third + 1, tl.where(two, second + 1, tl.where(one, first + 1, low)))
        high = tl.where(three, high, tl.where(two, third, tl.where(one, second, first)))
    found = low.to(tl.int32)
    above = tl.zeros([TILE], tl.int64)
    equals = tl.zeros([TILE], tl.int32)
    for start in range(0, vocab_size, TILE):
        keys, tokens, weights = _weigh(base, start, vocab_size, key, token, peak, inverse, MASS, TILE, SHIFT)
        above += tl.where(keys > found, weights, 0)
        equals += ((keys == found) & (tokens < vocab_size)).to(tl.int32)
    rest = wanted - tl.sum(above, 0)
    last = (vocab_size - 1 + tl.program_id(0) * 0).to(tl.int64)
    begin = tl.where(tl.sum(equals, 0) > 1, 0, last)
    while begin < last:
        first, second, third = _quarters(begin, last)
        ones = tl.zeros([TILE], tl.int64)
        twos = tl.zeros([TILE], tl.int64)
        threes = tl.zeros([TILE], tl.int64)
        for start in range(0, vocab_size, TILE):
            keys, tokens, weights = _weigh(base, start, vocab_size, key, token, peak, inverse, MASS, TILE, SHIFT)
            weights = tl.where(keys == found, weights, 0)
            ones += tl.where(tokens <= first.to(tl.int32), weights, 0)
            twos += tl.where(tokens <= second.to(tl.int32), weights, 0)
            threes += tl.where(tokens <= third.to(tl.int32), weights, 0)
        one = tl.sum(ones, 0) >= rest
        two = tl.sum(twos, 0) >= rest
        three = tl.sum(threes, 0) >= rest
        begin = tl.where(one, begin, tl.where(two, first + 1, tl.where(three, second + 1, third + 1)))
        last = tl.where(one, first, tl.where(two, second, tl.where(three, third, last)))
    return found, begin.to(tl.int32)


@triton.jit
def _quarters(low, high):  # type: ignore[no-untyped-def]
    """Three values that cut the int64 interval [low, high] in four; less than `high`."""
    gap = high - low
    return low + (gap >> 2), low + (gap >> 1), low + ((3 * gap) >> 2)
