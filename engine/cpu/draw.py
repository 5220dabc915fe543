"""Greedy and temperature draws in one pass over the logits, with the random bits of engine/sampling/streams.py.

A draw is the argmax of logit / T - log E. Its logarithms are needed of few tokens: E is never below its uniform u, so
-log E is at most -log u, which the exponent of u bounds; a token that cannot win even so is passed over.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numba import njit

from kvarena.engine.cpu.blocks import max_of
from kvarena.engine.cpu.compiler import Kernel, kernel, num_threads, thread_id
from kvarena.engine.cpu.simd import F32, I32, I64, bits, pointer, pointer_at, widen

_ZERO, _LOWEST, _MOST = np.float32(0), np.float32(-np.inf), np.float32(3.4028234663852886e38)
_GOLDEN, _MULTIPLY_1, _MULTIPLY_2 = np.uint32(0x9E3779B9), np.uint32(0x7FEB352D), np.uint32(0x846CA68B)
_HALF, _SCALE, _BELOW_ONE = np.float32(0.5), np.float32(2.0**-31), np.float32(1.0 - 2.0**-24)
_MASK, _LN2 = np.uint32(0x7FFFFFFF), np.float32(0.6931472)
_1, _15, _16 = np.float32(1), np.uint32(15), np.uint32(16)


@njit(error_model="numpy")
def _mix(x: Any) -> Any:
    x ^= x >> _16
    x = np.uint32(x * _MULTIPLY_1)
    x ^= x >> _15
    x = np.uint32(x * _MULTIPLY_2)
    return x ^ (x >> _16)


@njit(error_model="numpy")
def _best(logits: Any, n: Any) -> Any:
    """The first index of the largest logit, and it; -1 where there is NaN or infinity, or nothing else than -inf."""
    top, bad = max_of(logits, n, _LOWEST), np.int32(0)
    for i in range(n):
        bad |= np.int32(0) if widen(logits[i]) <= _MOST else np.int32(1)
    if bad or top == _LOWEST:
        return np.int64(-1), top
    for i in range(n):
        if widen(logits[i]) == top:
            return i, top
    return np.int64(-1), top


@njit(error_model="numpy")
def _race(logits, n, peak, temperature, low, high):  # type: ignore[no-untyped-def]
    """The token that wins the row's exponential race. The maximum comes off first, so that no temperature overflows."""
    best, winner = _LOWEST, np.int64(0)
    for i in range(n):
        x = (widen(logits[i]) - peak) / temperature
        mixed = _mix(_mix(np.uint32(np.uint32(i) * _GOLDEN + low)) ^ high)
        uniform = min((np.float32(np.int32(mixed & _MASK)) + _HALF) * _SCALE, _BELOW_ONE)
        exponent = (bits(uniform) >> np.int32(23)) - np.int32(127)
        if x - np.float32(exponent) * _LN2 < best:
            continue
        score = x - np.float32(np.log(-np.float32(np.log1p(-uniform))))
        if score > best:
            best, winner = score, i
    return winner


@cache
def draw_kernel(kind: int) -> Kernel:
    """Draw a token per row.

    Arguments of a call, after the number of threads:

        logits        [N, V] of `kind`, contiguous
        params        int32 [4, N]: each row's index into `last_tokens`, the bits of its float32 temperature, and the
                      two halves of its key (`stream_keys`)
        last_tokens   int64; written, with token 0 where no token could be picked
        out           int64 [N]; written, with -1 where no token could be picked: the logits hold NaN or +inf, or are
                      all -inf
        N, V
    """
    element = int(kind)

    @kernel("6q")
    def draw(args):  # type: ignore[no-untyped-def]
        a = pointer(args, I64)
        logits, params, last, out, rows, n = (
            pointer(a[0], element),
            pointer(a[1], I32),
            pointer(a[2], I64),
            pointer(a[3], I64),
            a[4],
            a[5],
        )
        temperatures = pointer(a[1] + 4 * rows, F32)
        team, me = np.int64(num_threads()), np.int64(thread_id())
        for row in range(rows * me // team, rows * (me + 1) // team):
            line = pointer_at(logits, row * n)
            token, peak = _best(line, n)
            if token >= 0 and temperatures[row] > _ZERO:
                token = _race(
                    line,
                    n,
                    peak,
                    temperatures[row],
                    np.uint32(params[2 * rows + row]),
                    np.uint32(params[3 * rows + row]),
                )
            out[row] = token
            last[params[row]] = max(token, 0)

    return draw
