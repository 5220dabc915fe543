"""Blocks of products and sums as straight code over vectors, for the kernels of attention."""

# ruff: noqa: ARG001 - numba hands every generator the same arguments
from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from kvarena.engine.cpu.simd import LANES, at, exp_code, fold, intrinsic, load_vector, prefetch, splat, widen_code

_FLOAT, _INT32, _INT64 = ir.FloatType(), ir.IntType(32), ir.IntType(64)
_FLAGS = ("reassoc", "contract", "nsz", "arcp")
TOKENS = 8  # of a call of `dots_of_tokens`
SUMS = LANES  # vectors of sums in registers: half of those that there are
CHAINS = 8  # additions that depend on one another: a processor does two at a time, and each takes four cycles
LINE = 64  # bytes of a line of the caches
_SIZES = {types.float32: 4, types.int16: 2, types.uint16: 2}


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
    ahead: Any,
    dim: Any,
    count: Any,
    lanes: Any,
) -> Any:
    """`dots` of TOKENS keys, those at keys[offsets[t]:], into out[g * stride + t]; `dim` a multiple of `lanes`.

    Meanwhile the caches get ahead[offsets[t]:][:dim], which are to be read next. All sums of a call are folded
    together, which takes a third of the instructions of folding one by one.
    """
    signature = types.void(q, keys, offsets, out, types.int64, ahead, dim, count, lanes)
    n, rows, width = dim.literal_value, count.literal_value, lanes.literal_value
    at_once = width // TOKENS  # queries whose sums fill a vector

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
        starts = [b.load(at(b, args[2], t)) for t in range(TOKENS)]
        places = [at(b, args[1], start) for start in starts]
        for start in starts:
            for d in range(0, n, LINE // _SIZES[keys.dtype]):
                prefetch(b, at(b, at(b, args[5], start), d), first_cache=True)
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


def largest(b: Any, first: Any, second: Any, count: int | None) -> Any:
    """While code is made: the larger of two numbers or vectors of `count`; of NaN and a number the number."""
    kind, name = (_FLOAT, "f32") if count is None else (ir.VectorType(_FLOAT, count), f"v{count}f32")
    function = cgutils.get_or_insert_function(b.module, ir.FunctionType(kind, [kind, kind]), f"llvm.maxnum.{name}")
    return b.call(function, [first, second])


@intrinsic
def max_of(typing: Any, x: Any, n: Any, start: Any) -> Any:
    """The largest of `start` and the first `n` elements, NaN left out. As a loop it would not become vectors."""
    width = 16
    vector = ir.VectorType(_FLOAT, width)

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
        whole = b.and_(args[1], ir.Constant(_INT64, -width))
        best, last = cgutils.alloca_once(b, vector), cgutils.alloca_once(b, _FLOAT)
        b.store(splat(b, args[2], width), best)
        step = ir.Constant(_INT64, width)
        with cgutils.for_range_slice(b, ir.Constant(_INT64, 0), whole, step, intp=_INT64) as (index, _):
            b.store(largest(b, b.load(best), load_vector(b, at(b, args[0], index), x.dtype, width), width), best)
        reduce = cgutils.get_or_insert_function(
            b.module, ir.FunctionType(_FLOAT, [vector]), "llvm.vector.reduce.fmax.v16f32"
        )
        b.store(b.call(reduce, [b.load(best)]), last)
        with cgutils.for_range_slice(b, whole, args[1], ir.Constant(_INT64, 1), intp=_INT64) as (index, _):
            value = widen_code(b, b.load(at(b, args[0], index)), x.dtype, None)
            b.store(largest(b, b.load(last), value, None), last)
        return b.load(last)

    return types.float32(x, types.int64, types.float32), generate


@intrinsic(prefer_literal=True)
def top_of(typing: Any, s: Any, top: Any, count: Any, lanes: Any) -> Any:
    """The largest of `top` and `count` scores, whole vectors of them; with NaN among them it or NaN."""
    n, width = count.literal_value, lanes.literal_value

    def larger(b: Any, first: Any, second: Any) -> Any:
        return b.select(b.fcmp_ordered(">", first, second), first, second)

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
        scores = [load_vector(b, at(b, args[0], i), types.float32, width) for i in range(0, n, width)]
        best, half = _in_pairs(scores, lambda first, second: larger(b, first, second)), width // 2
        while half:
            lanes = ir.Constant(ir.VectorType(_INT32, width), [(lane + half) % width for lane in range(width)])
            best = larger(b, best, b.shuffle_vector(best, best, lanes))
            half //= 2
        return larger(b, b.extract_element(best, ir.Constant(_INT32, 0)), args[1])

    return types.float32(s, types.float32, count, lanes), generate


@intrinsic(prefer_literal=True)
def weigh(typing: Any, s: Any, top: Any, count: Any, lanes: Any) -> Any:
    """Turn `count` scores, whole vectors of them, into weights exp(score - top) in place; -inf becomes 0.

    Returns:
        the weights' sum.
    """
    n, width = count.literal_value, lanes.literal_value
    vector = ir.VectorType(_FLOAT, width)

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
        weights, lowest, top = [], ir.Constant(vector, [float("-inf")] * width), splat(b, args[1], width)
        for i in range(0, n, width):
            score = load_vector(b, at(b, args[0], i), types.float32, width)
            weight = exp_code(b, b.fsub(score, top), width)
            weight = b.select(b.fcmp_ordered("==", score, lowest), ir.Constant(vector, [0.0] * width), weight)
            b.store(weight, b.bitcast(at(b, args[0], i), vector.as_pointer()), align=4)
            weights.append(weight)
        total = _in_pairs(weights, lambda first, second: b.fadd(first, second, flags=_FLAGS))
        add = cgutils.get_or_insert_function(
            b.module, ir.FunctionType(_FLOAT, [_FLOAT, vector]), f"llvm.vector.reduce.fadd.v{width}f32"
        )
        return b.call(add, [ir.Constant(_FLOAT, -0.0), total], fastmath=_FLAGS)

    return types.float32(s, types.float32, count, lanes), generate


def _in_pairs(values: list[Any], join: Any) -> Any:
    """All of them joined: neighbours first."""
    while len(values) > 1:
        values = [join(*values[i : i + 2]) if i + 1 < len(values) else values[i] for i in range(0, len(values), 2)]
    return values[0]


@intrinsic(prefer_literal=True)
def add_weighted(
    typing: Any, out: Any, v: Any, offsets: Any, n: Any, weights: Any, stride: Any, factors: Any, ahead: Any,
    ahead_offsets: Any, dim: Any, count: Any, lanes: Any,
) -> Any:  # fmt: skip
    """out[g * dim:][:dim] = that * factors[g] + sum over t < n of weights[g * stride + t] * v[offsets[t]:][:dim].

    For g < count; `n` is a multiple of TOKENS. Sums stay in registers. Meanwhile the caches get `dim` elements of each
    ahead[ahead_offsets[t]:], which are to be read next.
    """
    i64, kind = types.int64, v.dtype
    signature = types.void(out, v, offsets, i64, weights, i64, factors, ahead, ahead_offsets, dim, count, lanes)
    size, rows, width = dim.literal_value, count.literal_value, lanes.literal_value
    num_registers = -(-width // LANES)  # of a vector
    most = max(1, SUMS // num_registers)
    at_once = min(rows, most)
    vectors = max(1, most // at_once)

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
        first = True
        for g in range(0, rows, at_once):
            for d in range(0, size, vectors * width):
                places = [
                    (i, j)
                    for i in range(g, min(g + at_once, rows))
                    for j in range(d, min(d + vectors * width, size), width)
                ]
                _add_weighted(b, args, places, kind, size, width, asks=first)
                first = False
        return context.get_dummy_value()

    return signature, generate


def _add_weighted(b: Any, args: Any, places: list[Any], kind: Any, size: int, width: int, *, asks: bool) -> None:
    """While code is made: `add_weighted` for some vectors of sums, (row, column) each."""
    out, v, offsets, n, weights, stride, factors, ahead, ahead_offsets = args[:9]
    vector = ir.VectorType(_FLOAT, width)
    unroll = min(TOKENS, max(1, CHAINS // len(places)))  # so many chains of sums hide what an addition takes
    where = [at(b, out, i * size + j) for i, j in places]
    rows, columns = ({place[part] for place in places} for part in (0, 1))
    first = {i: splat(b, b.load(at(b, factors, i)), width) for i in rows}
    lines = {i: at(b, weights, b.mul(stride, ir.Constant(_INT64, i))) for i in rows}
    begin = [
        b.fmul(load_vector(b, place, types.float32, width), first[i], flags=_FLAGS)
        for place, (i, _) in zip(where, places, strict=True)
    ]
    zero, entry = ir.Constant(vector, [0.0] * width), b.block
    head, body, end = (b.append_basic_block(name) for name in ("weighted.head", "weighted.body", "weighted.end"))
    b.branch(head)
    b.position_at_end(head)
    index = b.phi(_INT64)
    index.add_incoming(ir.Constant(_INT64, 0), entry)
    sums = [[b.phi(vector) for _ in places] for _ in range(unroll)]
    b.cbranch(b.icmp_signed("<", index, n), body, end)
    b.position_at_end(body)
    for u, chain in enumerate(sums):
        token = b.add(index, ir.Constant(_INT64, u))
        if asks:
            line = at(b, ahead, b.load(at(b, ahead_offsets, token)))
            for d in range(0, size, LINE // _SIZES[kind]):
                prefetch(b, at(b, line, d), first_cache=True)
        row = at(b, v, b.load(at(b, offsets, token)))
        values = {j: load_vector(b, at(b, row, j), kind, width) for j in sorted(columns)}
        factor = {i: splat(b, b.load(at(b, lines[i], token)), width) for i in sorted(rows)}
        for total, start, (i, j) in zip(chain, begin, places, strict=True):
            total.add_incoming(zero if u else start, entry)
            product = b.fmul(factor[i], values[j], flags=_FLAGS)
            total.add_incoming(b.fadd(total, product, flags=_FLAGS), b.block)
    index.add_incoming(b.add(index, ir.Constant(_INT64, unroll)), b.block)
    b.branch(head)
    b.position_at_end(end)
    for number, place in enumerate(where):
        total = _in_pairs([chain[number] for chain in sums], lambda one, other: b.fadd(one, other, flags=_FLAGS))
        b.store(total, b.bitcast(place, vector.as_pointer()), align=4)


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
