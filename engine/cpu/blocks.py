"""Blocks of products and sums as straight code over vectors, for the kernels of attention."""

# ruff: noqa: ARG001 - numba hands every generator the same arguments
from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from kvarena.engine.cpu.simd import at, fold, intrinsic, load_vector, splat, widen_code

_FLOAT, _INT32, _INT64 = ir.FloatType(), ir.IntType(32), ir.IntType(64)
_FLAGS = ("reassoc", "contract", "nsz", "arcp")
TOKENS = 8  # of a call of `dots_of_tokens`


@intrinsic(prefer_literal=True)
def dots(typing: Any, q: Any, k: Any, out: Any, stride: Any, dim: Any, count: Any) -> Any:
    """out[g * stride] = the product of q[g * dim:][:dim] and k[:dim], for g < count. `q` and `out` are float32."""
    signature = types.void(q, k, out, types.int64, dim, count)
    n, rows = dim.literal_value, count.literal_value

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
        key = load_vector(b, args[1], k.dtype, n)
        add = cgutils.get_or_insert_function(
            b.module, ir.FunctionType(_FLOAT, [_FLOAT, ir.VectorType(_FLOAT, n)]), f"llvm.vector.reduce.fadd.v{n}f32"
        )
        for g in range(rows):
            query = load_vector(b, at(b, args[0], g * n), types.float32, n)
            product = b.fmul(query, key, flags=_FLAGS)
            total = b.call(add, [ir.Constant(_FLOAT, -0.0), product], fastmath=_FLAGS)
            b.store(total, at(b, args[2], b.mul(args[3], ir.Constant(_INT64, g))))
        return context.get_dummy_value()

    return signature, generate


@intrinsic(prefer_literal=True)
def dots_of_tokens(
    typing: Any,
    q: Any,
    keys: Any,
    offsets: Any,
    out: Any,
    stride: Any,
    dim: Any,
    count: Any,
    lanes: Any,
) -> Any:
    """`dots` of TOKENS keys, those at keys[offsets[t]:], into out[g * stride + t]; `dim` a multiple of `lanes`.

    All sums of a call are folded together, which takes a third of the instructions of folding one by one.
    """
    signature = types.void(q, keys, offsets, out, types.int64, dim, count, lanes)
    n, rows, width = dim.literal_value, count.literal_value, lanes.literal_value
    at_once = width // TOKENS  # queries whose sums fill a vector

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
        places = [at(b, args[1], b.load(at(b, args[2], t))) for t in range(TOKENS)]
        for first in range(0, rows, at_once):
            queries = range(first, min(first + at_once, rows))
            sums = []
            for g in queries:
                for place in places:
                    total = None
                    for d in range(0, n, width):
                        key = load_vector(b, at(b, place, d), keys.dtype, width)
                        product = b.fmul(
                            load_vector(b, at(b, args[0], g * n + d), types.float32, width), key, flags=_FLAGS
                        )
                        total = product if total is None else b.fadd(total, product, flags=_FLAGS)
                    sums.append(total)
            folded = fold(b, sums, width)[0]
            for i, g in enumerate(queries):
                part = b.shuffle_vector(
                    folded, folded, ir.Constant(ir.VectorType(_INT32, TOKENS), [i * TOKENS + t for t in range(TOKENS)])
                )
                place = at(b, args[3], b.mul(args[4], ir.Constant(_INT64, g)))
                b.store(part, b.bitcast(place, part.type.as_pointer()), align=4)
        return context.get_dummy_value()

    return signature, generate


@intrinsic
def max_of(typing: Any, x: Any, n: Any, start: Any) -> Any:
    """The largest of `start` and the first `n` elements, NaN left out. As a loop it would not become vectors."""
    width = 16
    vector = ir.VectorType(_FLOAT, width)

    def largest(b: Any, first: Any, second: Any, kind: Any, name: str) -> Any:
        function = cgutils.get_or_insert_function(b.module, ir.FunctionType(kind, [kind, kind]), f"llvm.maxnum.{name}")
        return b.call(function, [first, second])

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
        whole = b.and_(args[1], ir.Constant(_INT64, -width))
        best, last = cgutils.alloca_once(b, vector), cgutils.alloca_once(b, _FLOAT)
        b.store(splat(b, args[2], width), best)
        step = ir.Constant(_INT64, width)
        with cgutils.for_range_slice(b, ir.Constant(_INT64, 0), whole, step, intp=_INT64) as (index, _):
            b.store(
                largest(b, b.load(best), load_vector(b, at(b, args[0], index), x.dtype, width), vector, "v16f32"), best
            )
        reduce = cgutils.get_or_insert_function(
            b.module, ir.FunctionType(_FLOAT, [vector]), "llvm.vector.reduce.fmax.v16f32"
        )
        b.store(b.call(reduce, [b.load(best)]), last)
        with cgutils.for_range_slice(b, whole, args[1], ir.Constant(_INT64, 1), intp=_INT64) as (index, _):
            value = widen_code(b, b.load(at(b, args[0], index)), x.dtype, None)
            b.store(largest(b, b.load(last), value, _FLOAT, "f32"), last)
        return b.load(last)

    return types.float32(x, types.int64, types.float32), generate


@intrinsic(prefer_literal=True)
def add_scaled(
    typing: Any,
    out: Any,
    v: Any,
    offsets: Any,
    weights: Any,
    stride: Any,
    dim: Any,
    count: Any,
    num_terms: Any,
) -> Any:
    """out[g * dim:][:dim] += weights[g * stride + i] * v[offsets[i]:][:dim], over i < num_terms, for g < count."""
    signature = types.void(out, v, offsets, weights, types.int64, dim, count, num_terms)
    n, rows, terms = dim.literal_value, count.literal_value, num_terms.literal_value

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
        values = [load_vector(b, at(b, args[1], b.load(at(b, args[2], i))), v.dtype, n) for i in range(terms)]
        for g in range(rows):
            place = at(b, args[0], g * n)
            total = load_vector(b, place, types.float32, n)
            row = at(b, args[3], b.mul(args[4], ir.Constant(_INT64, g)))
            for i, value in enumerate(values):
                total = b.fadd(total, b.fmul(splat(b, b.load(at(b, row, i)), n), value, flags=_FLAGS), flags=_FLAGS)
            b.store(total, b.bitcast(place, total.type.as_pointer()), align=4)
        return context.get_dummy_value()

    return signature, generate


@intrinsic(prefer_literal=True)
def multiply_block(
    typing: Any,
    a: Any,
    lda: Any,
    b: Any,
    ldb: Any,
    c: Any,
    ldc: Any,
    depth: Any,
    rows: Any,
    columns: Any,
    adds: Any,
) -> Any:
    """c[i * ldc + j] (+)= sum over d < depth of a[i * lda + d] * b[d * ldb + j], for i < rows and j < columns.

    All float32; the block of sums stays in registers. `adds`: 1 adds to `c`, 0 overwrites it.
    """
    i64 = types.int64
    signature = types.void(a, i64, b, i64, c, i64, i64, rows, columns, adds)
    m, n = rows.literal_value, columns.literal_value
    vector = ir.VectorType(_FLOAT, n)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        left, lda, right, ldb, out, ldc, depth = args[:7]
        places = [
            builder.bitcast(at(builder, out, builder.mul(ldc, ir.Constant(_INT64, i))), vector.as_pointer())
            for i in range(m)
        ]
        sums = [cgutils.alloca_once(builder, vector) for _ in range(m)]
        for place, total in zip(places, sums, strict=True):
            start = builder.load(place, align=4) if adds.literal_value else ir.Constant(vector, [0.0] * n)
            builder.store(start, total)
        with cgutils.for_range(builder, depth) as loop:
            row = load_vector(builder, at(builder, right, builder.mul(loop.index, ldb)), types.float32, n)
            for i, total in enumerate(sums):
                place = builder.add(builder.mul(lda, ir.Constant(_INT64, i)), loop.index)
                factor = splat(builder, builder.load(at(builder, left, place)), n)
                product = builder.fmul(factor, row, flags=_FLAGS)
                builder.store(builder.fadd(builder.load(total), product, flags=_FLAGS), total)
        for place, total in zip(places, sums, strict=True):
            builder.store(builder.load(total), place, align=4)
        return context.get_dummy_value()

    return signature, generate
