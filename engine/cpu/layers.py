"""What stands between a layer's products: norm, rotation with the store of keys and values, silu(gate) * up."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numba import njit

from kvarena.engine.cpu.compiler import FAST, Kernel, kernel, num_threads, thread_id
from kvarena.engine.cpu.simd import F32, F64, I64, exp, narrow, pointer, pointer_at, widen

_ZERO, _ONE, _MOST = np.float32(0), np.float32(1), np.float32(88)


@njit(error_model="numpy", fastmath=FAST)
def _norm_row(x: Any, weight: Any, out: Any, n: Any, eps: Any) -> None:
    total = _ZERO
    for i in range(n):
        value = widen(x[i])
        total += value * value
    factor = _ONE / np.float32(np.sqrt(total / np.float32(n) + eps))
    for i in range(n):
        # Rounded before the weight, as transformers' modules do.
        rounded = widen(narrow(widen(x[i]) * factor, x[0]))
        out[i] = narrow(widen(weight[i]) * rounded, x[0])


@cache
def norm_kernel(kind: int) -> Kernel:
    """RMS norms of rows.

    Arguments of a call, after the number of threads: x, weight, out ([rows, n], [n], [rows, n], all of `kind`, x and
    out contiguous), rows, n, epsilon.
    """
    element = int(kind)

    @kernel("5q1d")
    def norm(args):  # type: ignore[no-untyped-def]
        a, reals = pointer(args, I64), pointer(args + 40, F64)
        x, weight, out, n = pointer(a[0], element), pointer(a[1], element), pointer(a[2], element), a[4]
        team, me = np.int64(num_threads()), np.int64(thread_id())
        for row in range(a[3] * me // team, a[3] * (me + 1) // team):
            _norm_row(pointer_at(x, row * n), weight, pointer_at(out, row * n), n, np.float32(reals[0]))

    return norm


@cache
def glu_kernel(kind: int) -> Kernel:
    """silu(gate) * up: x [rows, 2 * n], the gate's columns first, out [rows, n]. A call: x, out, rows, n."""
    element = int(kind)

    @kernel("4q")
    def glu(args):  # type: ignore[no-untyped-def]
        a = pointer(args, I64)
        x, out, n = pointer(a[0], element), pointer(a[1], element), a[3]
        team, me = np.int64(num_threads()), np.int64(thread_id())
        for row in range(a[2] * me // team, a[2] * (me + 1) // team):
            gates, ups, into = pointer_at(x, row * 2 * n), pointer_at(x, row * 2 * n + n), pointer_at(out, row * n)
            for i in range(n):
                gate = widen(gates[i])
                minus = -gate if -gate < _MOST else _MOST
                into[i] = narrow(gate / (_ONE + exp(minus)) * widen(ups[i]), ups[i])

    return glu


@njit(error_model="numpy", fastmath=FAST)
def _turn(x: Any, cos: Any, sin: Any, out: Any, half: Any, dim: Any) -> None:
    """Rotate a head, halves paired; `out` may be `x`, and may be of another kind."""
    for i in range(half):
        first, second = widen(x[i]), widen(x[half + i])
        c, s = cos[i], sin[i]
        out[i] = narrow(first * c - second * s, out[0])
        out[half + i] = narrow(second * c + first * s, out[0])
    for i in range(2 * half, dim):
        out[i] = narrow(widen(x[i]), out[0])


@cache
def rope_store_kernel(kind: int, kv_kind: int) -> Kernel:
    """Norm and turn queries and keys, and store keys and values.

    Arguments of a call, after the number of threads:

        qkv            [rows, (num_heads + 2 * num_kv_heads) * head_dim] of `kind`; queries are turned in place
        cos, sin       float32, a row each of `angle_stride`
        slots          int64 [rows]
        keys, values   a layer by slot, [num_slots, num_kv_heads, head_dim] of `kv_kind`
        q_norm, k_norm [head_dim] of `kind`, or 0
        rows, num_heads, num_kv_heads, head_dim, half, angle_stride
        turn_keys      1: the turned keys are left in `qkv` too
        epsilon        of the norms
    """
    element, kv_element = int(kind), int(kv_kind)

    @kernel("15q1d")
    def rope_store(args):  # type: ignore[no-untyped-def]
        a, reals = pointer(args, I64), pointer(args + 120, F64)
        qkv, cos, sin, slots = pointer(a[0], element), pointer(a[1], F32), pointer(a[2], F32), pointer(a[3], I64)
        keys, values = pointer(a[4], kv_element), pointer(a[5], kv_element)
        q_norm, k_norm = pointer(a[6], element), pointer(a[7], element)
        rows, heads, kv_heads, dim, half, stride = a[8], a[9], a[10], a[11], a[12], a[13]
        eps = np.float32(reals[0])
        team, me = np.int64(num_threads()), np.int64(thread_id())
        for row in range(rows * me // team, rows * (me + 1) // team):
            line = pointer_at(qkv, row * (heads + 2 * kv_heads) * dim)
            c, s = pointer_at(cos, row * stride), pointer_at(sin, row * stride)
            for h in range(heads):
                head = pointer_at(line, h * dim)
                if a[6] != 0:
                    _norm_row(head, q_norm, head, dim, eps)
                _turn(head, c, s, head, half, dim)
            for h in range(kv_heads):
                head = pointer_at(line, (heads + h) * dim)
                place = pointer_at(keys, (slots[row] * kv_heads + h) * dim)
                if a[7] != 0:
                    _norm_row(head, k_norm, head, dim, eps)
                if a[14] != 0:
                    _turn(head, c, s, head, half, dim)
                    for i in range(dim):
                        place[i] = narrow(widen(head[i]), place[0])
                else:
                    _turn(head, c, s, place, half, dim)
            start = pointer_at(line, (heads + kv_heads) * dim)
            place = pointer_at(values, slots[row] * kv_heads * dim)
            for i in range(kv_heads * dim):
                place[i] = narrow(widen(start[i]), place[0])

    return rope_store


@cache
def gather_kernel(kind: int) -> Kernel:
    """Rows of a table: out[i] = table[indices[i]].

    Arguments of a call, after the number of threads:

        table    rows of `depth` of `kind` float32; with `width` > 1 in panels [N / width, depth, width]
        width    1: rows as they are
        indices  int64 [rows]
        out      [rows, depth]
        rows, depth
    """
    element = int(kind)

    @kernel("6q")
    def gather(args):  # type: ignore[no-untyped-def]
        a = pointer(args, I64)
        table, width, indices, out, depth = (
            pointer(a[0], element),
            a[1],
            pointer(a[2], I64),
            pointer(a[3], element),
            a[5],
        )
        team, me = np.int64(num_threads()), np.int64(thread_id())
        for row in range(a[4] * me // team, a[4] * (me + 1) // team):
            panel = indices[row] // width
            line = pointer_at(table, panel * depth * width + indices[row] - panel * width)
            into = pointer_at(out, row * depth)
            for i in range(depth):
                into[i] = line[i * width]

    return gather


@cache
def bias_kernel(kind: int) -> Kernel:
    """y += bias, for y [rows, n] and bias [n]. A call: y, bias, rows, n."""
    element = int(kind)

    @kernel("4q")
    def add_bias(args):  # type: ignore[no-untyped-def]
        a = pointer(args, I64)
        y, bias, n = pointer(a[0], element), pointer(a[1], element), a[3]
        team, me = np.int64(num_threads()), np.int64(thread_id())
        for row in range(a[2] * me // team, a[2] * (me + 1) // team):
            line = pointer_at(y, row * n)
            for i in range(n):
                line[i] = narrow(widen(line[i]) + widen(bias[i]), line[i])

    return add_bias
