"""Top-k, top-p and min-p: the rest of `draw_tokens`, in few passes over the rows that filter and none over the others.

The kept tokens are the first ones in the order of their logits, of equal ones the lower ids first. So it need not be
known how many there are to know whether one of them is: it is by what stands before it. And the best of all scores, if
its token is kept, is the best of those that are kept. If it is not, the kept ones stand before it, and the next best
is looked for there:

    top-p, min-p    draw among all -> check: mass before the token < top_p * mass of all? -> draw among those before
                    it -> check -> draw -> check
    top-k           maxima of 2,048 groups -> the k-th of them bounds the k-th logit -> collect what is not below it,
                    a little more than k -> cut these, in registers
    settle          what is left: a search for the threshold over the whole row, by one program

With top_p 0.9 nine in ten rows end at their first check, and all but one in thousands at the last one. Every launch has
the same grid in every step, and a row that has its token costs it one load. Masses are integers, multiples of 2^-40 of
the likeliest token's: their sums do not depend on the order, and so a token not on who shares its request's step.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from kvarena.engine.kernels import INTERPRET
from kvarena.engine.kernels.common import await_previous, launch_options
from kvarena.engine.kernels.drawing import (
    MAX_CHOSEN,
    MAX_PARTS,
    TILE,
    DrawScratch,
    arrive,
    first_of_best,
    key_shift,
    mass_of,
    meet,
    num_parts,
    ordered,
    row_filters,
    row_params,
    row_score,
    store_token,
    wanted_mass,
)
from kvarena.engine.kernels.threshold import settle

# Checks of drawn tokens before the search. Each round after the first one costs two launches that mostly do nothing.
_CHECKS = 3
CHOSEN_WARPS = 8


def draw_filtered(
    logits: Tensor, params: Tensor, last_tokens: Tensor, out: Tensor, scratch: DrawScratch, num_programs: int
) -> None:
    """Pick a token for every row that filters, of those with which `draw_tokens` has begun. Arguments as there."""
    draw = (logits, params, last_tokens, out, scratch)
    check_drawn(*draw, 2 * num_programs)
    draw_chosen(*draw)
    for _ in range(_CHECKS - 1):
        # Rows that were rejected are few, and fill the device all the same.
        draw_again(logits, params, scratch, 8 * num_programs)
        check_drawn(*draw, 8 * num_programs)
    settle(*draw)


def check_drawn(
    logits: Tensor, params: Tensor, last_tokens: Tensor, out: Tensor, scratch: DrawScratch, num_programs: int
) -> None:
    """PIVOT rows: DONE if the token is kept, else REJECTED. CHOOSE rows: collect what is not below the bound."""
    num_rows, vocab_size = logits.shape
    check_kernel[(num_rows, num_parts(num_rows, vocab_size, num_programs))](
        logits, params, last_tokens, out, scratch.sums, scratch.arrived, scratch.states, scratch.peaks,
        scratch.pivots, scratch.bounds, scratch.num_chosen, scratch.chosen, vocab_size, logits.stride(0),
        params.stride(0), TILE=TILE, PARTS=MAX_PARTS, CHOSEN=MAX_CHOSEN, SHIFT=key_shift(logits.dtype),
        **launch_options(),
    )  # fmt: skip


def draw_again(logits: Tensor, params: Tensor, scratch: DrawScratch, num_programs: int) -> None:
    """REJECTED rows draw among the tokens before theirs: PIVOT."""
    num_rows, vocab_size = logits.shape
    draw_again_kernel[(num_rows, num_parts(num_rows, vocab_size, num_programs))](
        logits, params, scratch.scores, scratch.tokens, scratch.arrived, scratch.states, scratch.peaks, scratch.pivots,
        vocab_size, logits.stride(0), params.stride(0), TILE=TILE, PARTS=MAX_PARTS, FAST=not INTERPRET,
        **launch_options(),
    )  # fmt: skip


def draw_chosen(logits: Tensor, params: Tensor, last_tokens: Tensor, out: Tensor, scratch: DrawScratch) -> None:
    """CHOOSE rows, whose tokens have been collected: DONE, or HARD where these were too many."""
    draw_chosen_kernel[(len(logits),)](
        logits, params, last_tokens, out, scratch.states, scratch.peaks, scratch.bounds, scratch.num_chosen,
        scratch.chosen, scratch.cuts, logits.shape[1], logits.stride(0), params.stride(0), FAST=not INTERPRET,
        CHOSEN=MAX_CHOSEN, SHIFT=key_shift(logits.dtype), num_warps=CHOSEN_WARPS, **launch_options(),
    )  # fmt: skip


@triton.jit(do_not_specialize=["stride_params"])
def draw_again_kernel(  # type: ignore[no-untyped-def]
    logits_ptr, params_ptr, scores_ptr, tokens_ptr, arrived_ptr, states_ptr, peaks_ptr, pivots_ptr, vocab_size,
    stride_logits, stride_params, TILE: tl.constexpr, PARTS: tl.constexpr, FAST: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """Rows whose token was rejected draw among the tokens before it; one part of a row, the grid is (rows, parts)."""
    await_previous(OVERLAP)
    row = tl.program_id(0)
    if tl.load(states_ptr + row) == 3:
        base = logits_ptr + row.to(tl.int64) * stride_logits
        greedy, inverse, low, high = row_params(params_ptr, stride_params, row)
        _, _, least = row_filters(params_ptr, stride_params, row)
        top = tl.load(peaks_ptr + row)
        pivot = tl.load(pivots_ptr + row)
        pivot_logit = tl.load(base + pivot).to(tl.float32)
        best = tl.full([TILE], float("-inf"), tl.float32)
        best_token = tl.full([TILE], 0x7FFFFFFF, tl.int32)
        for start in range(tl.program_id(1) * TILE, vocab_size, tl.num_programs(1) * TILE):
            tokens = start + tl.arange(0, TILE)
            logit = tl.load(base + tokens, mask=tokens < vocab_size, other=float("-inf")).to(tl.float32)
            score = row_score(logit, tokens, greedy, inverse, low, high, FAST)
            before = (logit > pivot_logit) | ((logit == pivot_logit) & (tokens < pivot))
            better = before & ((logit - top) * inverse >= least) & (score > best)
            best = tl.where(better, score, best)
            best_token = tl.where(better, tokens, best_token)
        peak, token = first_of_best(best, best_token)
        _, token, last = meet(scores_ptr, tokens_ptr, arrived_ptr, row, peak, token, PARTS)
        if last:
            tl.store(pivots_ptr + row, token)
            tl.store(states_ptr + row, tl.where(token == 0x7FFFFFFF, 4, 1))


@triton.jit(do_not_specialize=["stride_params"])
def check_kernel(  # type: ignore[no-untyped-def]
    logits_ptr, params_ptr, last_ptr, out_ptr, sums_ptr, arrived_ptr, states_ptr, peaks_ptr, pivots_ptr,
    bounds_ptr, num_chosen_ptr, chosen_ptr, vocab_size, stride_logits, stride_params,
    TILE: tl.constexpr, PARTS: tl.constexpr, CHOSEN: tl.constexpr, SHIFT: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """Is the drawn token kept? Of rows with top-k, collect; one part of a row, the grid is (rows, parts)."""
    await_previous(OVERLAP)
    row = tl.program_id(0)
    state = tl.load(states_ptr + row)
    base = logits_ptr + row.to(tl.int64) * stride_logits
    if state == 1:
        _check(
            base, params_ptr, last_ptr, out_ptr, sums_ptr, arrived_ptr, states_ptr, peaks_ptr, pivots_ptr,
            vocab_size, stride_params, TILE, PARTS,
        )  # fmt: skip
    elif state == 2:
        bound = tl.load(bounds_ptr + row)
        chosen = chosen_ptr + row * CHOSEN
        for start in range(tl.program_id(1) * TILE, vocab_size, tl.num_programs(1) * TILE):
            tokens = start + tl.arange(0, TILE)
            logit = tl.load(base + tokens, mask=tokens < vocab_size, other=float("-inf")).to(tl.float32)
            takes = (ordered(logit, SHIFT) >= bound) & (logit > float("-inf"))
            place = tl.atomic_add(
                num_chosen_ptr + row + tl.zeros([TILE], tl.int32), tl.full([TILE], 1, tl.int32), mask=takes,
                sem="relaxed",
            )  # fmt: skip
            tl.store(chosen + place, tokens, mask=takes & (place < CHOSEN))


@triton.jit
def _check(  # type: ignore[no-untyped-def]
    base, params_ptr, last_ptr, out_ptr, sums_ptr, arrived_ptr, states_ptr, peaks_ptr, pivots_ptr,
    vocab_size, stride_params, TILE: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    _, inverse, _, _ = row_params(params_ptr, stride_params, row)
    _, top_p, least = row_filters(params_ptr, stride_params, row)
    peak = tl.load(peaks_ptr + row)
    pivot = tl.load(pivots_ptr + row)
    pivot_logit = tl.load(base + pivot).to(tl.float32)
    totals = tl.zeros([TILE], tl.int64)
    befores = tl.zeros([TILE], tl.int64)
    for start in range(tl.program_id(1) * TILE, vocab_size, tl.num_programs(1) * TILE):
        tokens = start + tl.arange(0, TILE)
        logit = tl.load(base + tokens, mask=tokens < vocab_size, other=float("-inf")).to(tl.float32)
        mass = mass_of(logit, peak, inverse)
        totals += mass
        before = (logit > pivot_logit) | ((logit == pivot_logit) & (tokens < pivot))
        befores += tl.where(before, mass, 0)
    sums = sums_ptr + row * 2 * PARTS
    tl.store(sums + tl.program_id(1), tl.sum(totals, 0))
    tl.store(sums + PARTS + tl.program_id(1), tl.sum(befores, 0))
    if arrive(arrived_ptr, row):
        lanes = tl.arange(0, PARTS)
        exists = lanes < tl.num_programs(1)
        total = tl.sum(tl.load(sums + lanes, mask=exists, other=0, cache_modifier=".cg"), 0)
        before = tl.sum(tl.load(sums + PARTS + lanes, mask=exists, other=0, cache_modifier=".cg"), 0)
        kept = (before < wanted_mass(top_p, total)) & ((pivot_logit - peak) * inverse >= least)
        if kept:
            store_token(params_ptr, last_ptr, out_ptr, row, pivot)
        tl.store(states_ptr + row, tl.where(kept, 0, 3))


@triton.jit(do_not_specialize=["stride_params"])
def draw_chosen_kernel(  # type: ignore[no-untyped-def]
    logits_ptr, params_ptr, last_ptr, out_ptr, states_ptr, peaks_ptr, bounds_ptr, num_chosen_ptr, chosen_ptr, cuts_ptr,
    vocab_size, stride_logits, stride_params, FAST: tl.constexpr, CHOSEN: tl.constexpr, SHIFT: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """A row of which the tokens that are not below its bound have been collected: cuts these and draws."""
    await_previous(OVERLAP)
    row = tl.program_id(0)
    if tl.load(states_ptr + row) == 2:
        count = tl.load(num_chosen_ptr + row)
        if count <= CHOSEN:
            _draw_chosen(
                logits_ptr + row.to(tl.int64) * stride_logits, chosen_ptr + row * CHOSEN, count,
                tl.load(bounds_ptr + row), params_ptr, last_ptr, out_ptr, peaks_ptr, cuts_ptr, vocab_size,
                stride_params, row, CHOSEN, FAST, SHIFT,
            )  # fmt: skip
        tl.store(states_ptr + row, tl.where(count <= CHOSEN, 0, 4))


@triton.jit
def _draw_chosen(  # type: ignore[no-untyped-def]
    base, chosen, count, bound, params_ptr, last_ptr, out_ptr, peaks_ptr, cuts_ptr, vocab_size, stride_params, row,
    CHOSEN: tl.constexpr, FAST: tl.constexpr, SHIFT: tl.constexpr,
):  # fmt: skip
    """Draws among the first `count` tokens of `chosen`, none of which is below `bound`."""
    greedy, inverse, low, high = row_params(params_ptr, stride_params, row)
    top_k, top_p, least = row_filters(params_ptr, stride_params, row)
    peak = tl.load(peaks_ptr + row)
    lanes = tl.arange(0, CHOSEN)
    exists = lanes < count
    tokens = tl.load(chosen + lanes, mask=exists, other=0)
    logit = tl.load(base + tokens, mask=exists, other=float("-inf")).to(tl.float32)
    keys = ordered(logit, SHIFT)
    key, token = _cut(keys, tokens, exists.to(tl.int64), top_k.to(tl.int64), bound, ordered(peak, SHIFT), vocab_size)
    kept = exists & ((keys > key) | ((keys == key) & (tokens <= token)))
    if top_p < 1.0:
        mass = tl.where(kept, mass_of(logit, peak, inverse), 0)
        wanted = wanted_mass(top_p, tl.sum(mass, 0))
        key, token = _cut(keys, tokens, mass, wanted, key, ordered(peak, SHIFT), vocab_size)
        kept = kept & ((keys > key) | ((keys == key) & (tokens <= token)))
    tl.store(cuts_ptr + 2 * row, key.to(tl.int64))
    tl.store(cuts_ptr + 2 * row + 1, token.to(tl.int64))
    kept = kept & ((logit - peak) * inverse >= least)
    score = tl.where(kept, row_score(logit, tokens, greedy, inverse, low, high, FAST), float("-inf"))
    _, token = first_of_best(score, tokens)
    store_token(params_ptr, last_ptr, out_ptr, row, token)


@triton.jit
def _cut(keys, tokens, weights, wanted, lowest, highest, vocab_size):  # type: ignore[no-untyped-def]
    """Which entries are kept while the weight before them is below `wanted`: (key, token) of the last one.

    Its key is the smallest with less than `wanted` above it, in [lowest, highest]; its token the first that fills it.
    """
    low = lowest.to(tl.int64)
    high = highest.to(tl.int64)
    while low < high:
        middle = low + ((high - low) >> 1)
        enough = tl.sum(tl.where(keys > middle.to(tl.int32), weights, 0), 0) >= wanted
        low = tl.where(enough, middle + 1, low)
        high = tl.where(enough, high, middle)
    key = low.to(tl.int32)
    above = tl.sum(tl.where(keys > key, weights, 0), 0)
    first = vocab_size * 0
    last = first + vocab_size - 1
    while first < last:
        middle = first + ((last - first) >> 1)
        enough = above + tl.sum(tl.where((keys == key) & (tokens <= middle), weights, 0), 0) >= wanted
        first = tl.where(enough, first, middle + 1)
        last = tl.where(enough, middle, last)
    return key, first
