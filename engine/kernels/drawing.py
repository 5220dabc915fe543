"""What the kernels of the draw share: a row's state between launches, its parameters, scores, keys and masses."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import libdevice

TILE = 1024
MAX_PARTS = 128
NO_TOKEN = 0x7FFFFFFF  # of a row in which none can be picked
# Maxima of groups of a row's tokens, of which the k-th largest bounds the k-th largest logit from below.
NUM_GROUPS = 2048
# Largest top_k that takes this way, and how many tokens may lie above the bound.
MAX_TOP_K = 1024
MAX_CHOSEN = 2048
# Where a row stands between launches. DONE: it has its token. PIVOT: one was drawn and may be kept. CHOOSE: there is a
# bound for its top-k. REJECTED: the last one drawn is not kept. HARD: none of the short ways serves it.
DONE, PIVOT, CHOOSE, REJECTED, HARD = range(5)


class DrawScratch:
    """The parts' results, where each row stands and the arrival counters, for up to `num_rows` rows."""

    def __init__(self, num_rows: int, device: torch.device | str) -> None:
        def empty(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.empty(num_rows, *shape, dtype=dtype, device=device)

        self.scores = empty(MAX_PARTS, dtype=torch.float32)
        self.tops = empty(MAX_PARTS, dtype=torch.float32)
        self.tokens = empty(MAX_PARTS)
        self.sums = empty(2, MAX_PARTS, dtype=torch.int64)
        self.arrived = torch.zeros(num_rows, dtype=torch.int32, device=device)
        self.states = torch.zeros(num_rows, dtype=torch.int32, device=device)
        self.peaks = empty(dtype=torch.float32)
        self.pivots, self.bounds = empty(), empty()
        self.groups = torch.full((num_rows, NUM_GROUPS), -(1 << 31), dtype=torch.int32, device=device)
        self.num_chosen = torch.zeros(num_rows, dtype=torch.int32, device=device)
        self.chosen = empty(MAX_CHOSEN)
        self.cuts = empty(2, dtype=torch.int64)


def key_shift(dtype: torch.dtype) -> int:
    """How many low bits of a float32 say nothing of the order of values that were of type `dtype`."""
    return 16 if dtype == torch.bfloat16 else 0


def num_parts(num_rows: int, vocab_size: int, num_programs: int) -> int:
    """Parts of a row, where `num_programs` fill the device."""
    return min(triton.cdiv(vocab_size, TILE), MAX_PARTS, max(1, num_programs // num_rows))


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
def row_params(params_ptr, stride_params, row):  # type: ignore[no-untyped-def]
    """Whether a row is greedy, 1 / temperature, and the halves of its key."""
    temperature = tl.load(params_ptr + stride_params + row).to(tl.float32, bitcast=True)
    low = tl.load(params_ptr + 2 * stride_params + row).to(tl.uint32, bitcast=True)
    high = tl.load(params_ptr + 3 * stride_params + row).to(tl.uint32, bitcast=True)
    greedy = temperature < 1e-6
    return greedy, 1.0 / tl.where(greedy, 1.0, temperature), low, high


@triton.jit
def row_filters(params_ptr, stride_params, row):  # type: ignore[no-untyped-def]
    """A row's top_k, top_p, and the least that (logit - largest logit) / temperature may be."""
    top_k = tl.load(params_ptr + 4 * stride_params + row)
    top_p = tl.load(params_ptr + 5 * stride_params + row).to(tl.float32, bitcast=True)
    least = tl.load(params_ptr + 6 * stride_params + row).to(tl.float32, bitcast=True)
    return top_k, top_p, least


@triton.jit
def row_score(logit, tokens, greedy, inverse, low, high, FAST: tl.constexpr):  # type: ignore[no-untyped-def]
    """What a row's token is the best of."""
    score = logit
    if not greedy:
        score = logit * inverse - _log_exponential(tokens, low, high, FAST)
    return score


@triton.jit
def ordered(logit, SHIFT: tl.constexpr):  # type: ignore[no-untyped-def]
    """int32 that are in the order of the logits, and equal where these are; see `key_shift`."""
    bits = tl.where(logit == 0.0, 0.0, logit).to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)) >> SHIFT


@triton.jit
def first_of_best(scores, tokens):  # type: ignore[no-untyped-def]
    """The largest score and the lowest of its tokens."""
    peak = tl.max(scores, 0)
    return peak, tl.min(tl.where(scores == peak, tokens, 0x7FFFFFFF), 0)


@triton.jit
def mass_of(logit, peak, inverse):  # type: ignore[no-untyped-def]
    """int64: e^((logit - peak) / temperature), in units of 2^-40."""
    return (tl.exp((logit - peak) * inverse) * 1099511627776.0).to(tl.int64)


@triton.jit
def wanted_mass(top_p, total):  # type: ignore[no-untyped-def]
    """int64: a token is kept while the mass before it is below this."""
    part = tl.ceil(top_p.to(tl.float64) * total.to(tl.float64)).to(tl.int64)
    return tl.where(top_p < 1.0, part, 4611686018427387904)


@triton.jit
def arrive(arrived_ptr, row):  # type: ignore[no-untyped-def]
    """Whether this is the last of a row's parts: then what the others have stored can be read, past the first cache."""
    tl.debug_barrier()
    last = tl.atomic_add(arrived_ptr + row, 1, sem="acq_rel") == tl.num_programs(1) - 1
    if last:
        tl.store(arrived_ptr + row, 0)
    tl.debug_barrier()
    return last


@triton.jit
def meet(scores_ptr, tokens_ptr, arrived_ptr, row, peak, token, PARTS: tl.constexpr):  # type: ignore[no-untyped-def]
    """`arrive` with a part's best score and its token; the last part gets those of the row."""
    num_parts = tl.num_programs(1)
    last = num_parts == 1
    if num_parts > 1:
        tl.store(scores_ptr + row * PARTS + tl.program_id(1), peak)
        tl.store(tokens_ptr + row * PARTS + tl.program_id(1), token)
        last = arrive(arrived_ptr, row)
        if last:
            lanes = tl.arange(0, PARTS)
            exists = lanes < num_parts
            scores = tl.load(scores_ptr + row * PARTS + lanes, mask=exists, other=float("-inf"), cache_modifier=".cg")
            tokens = tl.load(tokens_ptr + row * PARTS + lanes, mask=exists, other=0x7FFFFFFF, cache_modifier=".cg")
            peak, token = first_of_best(scores, tokens)
    return peak, token, last


@triton.jit
def store_token(params_ptr, last_ptr, out_ptr, row, token):  # type: ignore[no-untyped-def]
    """A row has its token, or none."""
    found = token != 0x7FFFFFFF
    tl.store(last_ptr + tl.load(params_ptr + row), tl.where(found, token, 0).to(tl.int64))
    tl.store(out_ptr + row, tl.where(found, token, -1).to(tl.int64))
