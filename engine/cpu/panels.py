"""Products in float32 with a weight that lies in panels: y = x @ weight.T, or y += x @ weight.T.

    a panel     [K, 3 vectors]: the weights of as many outputs, those of one input side by side; one stream of memory
    x           up to ROWS rows at a time; an element is multiplied with three vectors of the panel
    y           ROWS x 3 vectors of sums stay in registers while K goes by

A row's sums are added up in the same order whatever rows it is multiplied with. Goto and van de Geijn (2008) have the
blocks; the panels lie ready, so that nothing is packed while a step runs.
"""

# ruff: noqa: ARG001 - numba hands every generator the same arguments
from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils

from kvarena.engine.cpu.compiler import Kernel, kernel, num_threads, thread_id
from kvarena.engine.cpu.simd import F32, I64, LANES, at, intrinsic, load_vector, pointer, pointer_at, prefetch, splat

_FLOAT, _INT1, _INT32, _INT64 = ir.FloatType(), ir.IntType(1), ir.IntType(32), ir.IntType(64)
VECTORS = 3  # of a panel, side by side
WIDTH = VECTORS * LANES  # outputs of a panel
ROWS = 8 if LANES == 16 else 4  # of x at a time: with VECTORS, as many sums as the registers hold
DEPTH = 1024  # inputs after which sums go to y: so much of a panel stays in the second cache for all rows
AHEAD = 4096  # weights that are asked for before they are needed, in the pass that fetches a panel from memory
_FLAGS = ("contract",)


def panel_kernel() -> Kernel:
    """Products with a weight in panels.

    Arguments of a call, after the number of threads:

        x       float32 [M, K], contiguous
        panels  float32 [ceil(N / WIDTH), K, WIDTH], contiguous; what lies beyond N is not looked at
        y       float32 [M, N], contiguous
        M, N, K
        adds    1: the product is added to y; 0: y is overwritten
    """
    return _panel_kernel(LANES, ROWS, DEPTH, AHEAD)


@cache
def _panel_kernel(num_lanes: int, most_rows: int, most_depth: int, far: int) -> Kernel:
    lanes, rows, span, ahead, wide = int(num_lanes), int(most_rows), int(most_depth), int(far), VECTORS * int(num_lanes)

    @kernel("7q")
    def panel_product(args):  # type: ignore[no-untyped-def]
        a = pointer(args, I64)
        x, panels, y, m, n, k = pointer(a[0], F32), pointer(a[1], F32), pointer(a[2], F32), a[3], a[4], a[5]
        team, me = np.int64(num_threads()), np.int64(thread_id())
        count = (n + wide - 1) // wide
        for panel in range(count * me // team, count * (me + 1) // team):
            column = panel * wide
            left = n - column
            for first in range(0, k, span):
                depth = min(span, k - first)
                w = pointer_at(panels, (panel * k + first) * wide)
                add = a[6] if first == 0 else np.int64(1)
                row = np.int64(0)
                if rows <= m:
                    multiply_panel(
                        pointer_at(x, first), k, w, depth, pointer_at(y, column), n, left, add, rows, lanes, ahead
                    )
                    row += rows
                while row + rows <= m:
                    into = pointer_at(y, row * n + column)
                    multiply_panel(pointer_at(x, row * k + first), k, w, depth, into, n, left, add, rows, lanes, 0)
                    row += rows
                rest, into = pointer_at(x, row * k + first), pointer_at(y, row * n + column)
                if m - row == 1:
                    multiply_panel(rest, k, w, depth, into, n, left, add, 1, lanes, 0)
                elif m - row == 2:
                    multiply_panel(rest, k, w, depth, into, n, left, add, 2, lanes, 0)
                elif m - row == 3:
                    multiply_panel(rest, k, w, depth, into, n, left, add, 3, lanes, 0)
                elif m - row == 4:
                    multiply_panel(rest, k, w, depth, into, n, left, add, 4, lanes, 0)
                elif m - row == 5:
                    multiply_panel(rest, k, w, depth, into, n, left, add, 5, lanes, 0)
                elif m - row == 6:
                    multiply_panel(rest, k, w, depth, into, n, left, add, 6, lanes, 0)
                elif m - row == 7:
                    multiply_panel(rest, k, w, depth, into, n, left, add, 7, lanes, 0)

    return panel_product


@intrinsic(prefer_literal=True)
def multiply_panel(
    typing: Any, x: Any, x_stride: Any, w: Any, depth: Any, y: Any, y_stride: Any, left: Any, adds: Any,
    rows: Any, lanes: Any, ahead: Any,
) -> Any:  # fmt: skip
    """y[i * y_stride + j] (+)= sum over d < depth of x[i * x_stride + d] * w[d * WIDTH + j], i < rows, j < left.

    Columns from WIDTH on are not touched. Meanwhile the caches get the weights `ahead` of each row of `w`; 0: none.
    """
    i64 = types.int64
    signature = types.void(x, i64, w, i64, y, i64, i64, i64, rows, lanes, ahead)
    m, width, distance = rows.literal_value, lanes.literal_value, ahead.literal_value

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
        x, x_stride, w, depth, y, y_stride, left, adds = args[:8]
        lines = [at(b, x, b.mul(x_stride, ir.Constant(_INT64, i))) for i in range(m)]
        sums = _sums(b, lines, w, depth, width, distance)
        whole = [_below(b, left, first * width, width) for first in range(VECTORS)]
        none = ir.Constant(whole[0].type, [0] * width)
        adding = b.icmp_signed("!=", adds, ir.Constant(_INT64, 0))
        for i in range(m):
            line = at(b, y, b.mul(y_stride, ir.Constant(_INT64, i)))
            for j, mask in enumerate(whole):
                place = at(b, line, j * width)
                before = _load(b, place, b.select(adding, mask, none), width)
                _store(b, b.fadd(sums[i][j], before), place, mask, width)
        return context.get_dummy_value()

    return signature, generate


def _sums(b: Any, lines: list[Any], w: Any, depth: Any, width: int, distance: int) -> list[list[Any]]:
    """While code is made: the sums of each line of x, in VECTORS vectors, from a loop over `depth`."""
    vector = ir.VectorType(_FLOAT, width)
    zero, entry = ir.Constant(vector, [0.0] * width), b.block
    head, body, end = (b.append_basic_block(name) for name in ("panel.head", "panel.body", "panel.end"))
    b.branch(head)
    b.position_at_end(head)
    index = b.phi(_INT64)
    index.add_incoming(ir.Constant(_INT64, 0), entry)
    sums = [[b.phi(vector) for _ in range(VECTORS)] for _ in lines]
    b.cbranch(b.icmp_signed("<", index, depth), body, end)
    b.position_at_end(body)
    row = at(b, w, b.mul(index, ir.Constant(_INT64, VECTORS * width)))
    if distance:
        for j in range(0, VECTORS * width, 16):
            prefetch(b, at(b, row, distance + j))
    weights = [load_vector(b, at(b, row, j * width), types.float32, width) for j in range(VECTORS)]
    for line, totals in zip(lines, sums, strict=True):
        factor = splat(b, b.load(at(b, line, index)), width)
        for total, weight in zip(totals, weights, strict=True):
            total.add_incoming(zero, entry)
            total.add_incoming(b.fadd(total, b.fmul(factor, weight, flags=_FLAGS), flags=_FLAGS), b.block)
    index.add_incoming(b.add(index, ir.Constant(_INT64, 1)), b.block)
    b.branch(head)
    b.position_at_end(end)
    return sums


def _below(b: Any, count: Any, start: int, width: int) -> Any:
    """While code is made: which of `width` lanes, the first being number `start`, are below `count`."""
    lanes = ir.VectorType(_INT64, width)
    limit = b.insert_element(ir.Constant(lanes, ir.Undefined), count, ir.Constant(_INT32, 0))
    limit = b.shuffle_vector(limit, limit, ir.Constant(ir.VectorType(_INT32, width), [0] * width))
    return b.icmp_signed("<", ir.Constant(lanes, list(range(start, start + width))), limit)


def _load(b: Any, place: Any, mask: Any, width: int) -> Any:
    """While code is made: the lanes of a vector at `place` that `mask` has; 0 in the others."""
    vector = ir.VectorType(_FLOAT, width)
    kind = ir.FunctionType(vector, [vector.as_pointer(), _INT32, ir.VectorType(_INT1, width), vector])
    load = cgutils.get_or_insert_function(b.module, kind, f"llvm.masked.load.v{width}f32.p0")
    zero = ir.Constant(vector, [0.0] * width)
    return b.call(load, [b.bitcast(place, vector.as_pointer()), ir.Constant(_INT32, 4), mask, zero])


def _store(b: Any, value: Any, place: Any, mask: Any, width: int) -> None:
    """While code is made: write the lanes of a vector that `mask` has."""
    vector = ir.VectorType(_FLOAT, width)
    kind = ir.FunctionType(ir.VoidType(), [vector, vector.as_pointer(), _INT32, ir.VectorType(_INT1, width)])
    store = cgutils.get_or_insert_function(b.module, kind, f"llvm.masked.store.v{width}f32.p0")
    b.call(store, [value, b.bitcast(place, vector.as_pointer()), ir.Constant(_INT32, 4), mask])
