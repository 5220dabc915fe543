"""Products of few rows with a weight [N, K] as it lies: y = x @ weight.T, or y += x @ weight.T.

    weight rows    n n+1 n+2 n+3     streamed from memory once, whoever many rows x has
    x rows         m ... m+3         from the cache, once more for each four of the weight's

Sixteen sums of a block stay in registers as vectors along K and are folded together at its end. Libraries pack both
operands first, which pays for many rows; a few are done sooner than packed.
"""

# ruff: noqa: ARG001 - numba hands every generator the same arguments
from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types

from kvarena.engine.cpu.compiler import Kernel, kernel, num_threads, thread_id
from kvarena.engine.cpu.simd import F32, I64, LANES, at, fold, intrinsic, load_vector, pointer, pointer_at, prefetch

_FLOAT, _INT32, _INT64 = ir.FloatType(), ir.IntType(32), ir.IntType(64)
_FLAGS = ("reassoc", "contract", "nsz", "arcp")
ROWS = 4  # of a block
STEP = 16  # K is a multiple of it
MOST_ROWS = 96  # of x; beyond, libraries are as fast


def fits(rows: int, width: int, depth: int) -> bool:
    """Whether a product of [rows, depth] and [width, depth] is for this kernel: few rows, and whole vectors."""
    return rows <= MOST_ROWS and depth % STEP == 0 and width % ROWS == 0


def product_kernel(kind: int, adds: bool) -> Kernel:
    """Products of few rows.

    Arguments of a call, after the number of threads:

        x      float32 [M, K], contiguous
        weight [N, K] of `kind`, contiguous; K a multiple of 16 and N of 4
        y      float32 [M, N], contiguous; with `adds` the product is added to it
        M, N, K
    """
    return _product_kernel(kind, int(adds), LANES, 4 if LANES == 16 else 2)


@cache
def _product_kernel(kind: int, adds: int, lanes: int, columns: int) -> Kernel:
    w_type, add, width, count, half = int(kind), int(adds), int(lanes), int(columns), int(columns) // 2

    @kernel("6q")
    def product(args):  # type: ignore[no-untyped-def]
        a = pointer(args, I64)
        x, weight, y, m, n, k = pointer(a[0], F32), pointer(a[1], w_type), pointer(a[2], F32), a[3], a[4], a[5]
        team, me = np.int64(num_threads()), np.int64(thread_id())
        blocks = n // count
        for block in range(blocks * me // team, blocks * (me + 1) // team):
            column = block * count
            w = pointer_at(weight, column * k)
            after = pointer_at(w, count * k)
            # The first two passes over x fetch the next weights meanwhile: rows of memory must not wait for products.
            row = np.int64(0)
            while row + ROWS <= min(m, 2 * ROWS):
                fetched = pointer_at(after, row // ROWS * half * k)
                into = pointer_at(y, row * n + column)
                multiply_rows(pointer_at(x, row * k), w, k, into, n, fetched, ROWS, count, width, add, half)
                row += ROWS
            while row + ROWS <= m:
                into = pointer_at(y, row * n + column)
                multiply_rows(pointer_at(x, row * k), w, k, into, n, after, ROWS, count, width, add, 0)
                row += ROWS
            rest, into = pointer_at(x, row * k), pointer_at(y, row * n + column)
            if m - row == 3:
                multiply_rows(rest, w, k, into, n, after, 3, count, width, add, 0)
            elif m - row == 2:
                multiply_rows(rest, w, k, into, n, after, 2, count, width, add, 0)
            elif m - row == 1:
                multiply_rows(rest, w, k, into, n, after, 1, count, width, add, 0)

    return product


@intrinsic(prefer_literal=True)
def multiply_rows(
    typing: Any, x: Any, w: Any, depth: Any, y: Any, stride: Any, after: Any,
    rows: Any, columns: Any, lanes: Any, adds: Any, ahead: Any,
) -> Any:  # fmt: skip
    """y[i * stride + j] (+)= the product of x[i * depth:][:depth] and w[j * depth:][:depth], i < rows, j < columns.

    Meanwhile the caches get `ahead` rows of `depth` from `after` on.
    """
    signature = types.void(x, w, types.int64, y, types.int64, after, rows, columns, lanes, adds, ahead)
    m, n, width = rows.literal_value, columns.literal_value, lanes.literal_value
    vector = ir.VectorType(_FLOAT, width)

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
        left, right, depth, out, stride, next_rows = args[:6]
        zero = ir.Constant(vector, [0.0] * width)
        entry = b.block
        head, body, end = (b.append_basic_block(name) for name in ("rows.head", "rows.body", "rows.end"))
        b.branch(head)
        b.position_at_end(head)
        index = b.phi(_INT64)
        index.add_incoming(ir.Constant(_INT64, 0), entry)
        sums = [[b.phi(vector) for _ in range(n)] for _ in range(m)]
        b.cbranch(b.icmp_signed("<", index, depth), body, end)
        b.position_at_end(body)

        def line(base: Any, kind: Any, i: int) -> Any:
            place = b.add(index, b.mul(depth, ir.Constant(_INT64, i)))
            return load_vector(b, at(b, base, place), kind, width)

        for j in range(ahead.literal_value):
            prefetch(b, at(b, next_rows, b.add(index, b.mul(depth, ir.Constant(_INT64, j)))))
        values = [line(left, types.float32, i) for i in range(m)]
        weights = [line(right, w.dtype, j) for j in range(n)]
        for i in range(m):
            for j in range(n):
                new = b.fadd(sums[i][j], b.fmul(values[i], weights[j], flags=_FLAGS), flags=_FLAGS)
                sums[i][j].add_incoming(zero, entry)
                sums[i][j].add_incoming(new, b.block)
        index.add_incoming(b.add(index, ir.Constant(_INT64, width)), b.block)
        b.branch(head)
        b.position_at_end(end)
        folded = fold(b, [total for line in sums for total in line], width)
        short = ir.VectorType(_FLOAT, n)
        for i in range(m):
            lanes_of = ir.Constant(ir.VectorType(_INT32, n), [(i * n + j) % width for j in range(n)])
            part = folded[i * n // width]
            part = b.shuffle_vector(part, part, lanes_of)
            place = b.bitcast(at(b, out, b.mul(stride, ir.Constant(_INT64, i))), short.as_pointer())
            if adds.literal_value:
                part = b.fadd(part, b.load(place, align=4), flags=_FLAGS)
            b.store(part, place, align=4)
        return context.get_dummy_value()

    return signature, generate
