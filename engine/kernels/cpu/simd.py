"""What kernels are made of: addresses as pointers, 16-bit floats widened, rows of numbers as vectors.

numba has no bfloat16 or float16 on CPUs. Pointers to them are pointers to integers here, int16 for the one and uint16
for the other, so that a pointer's type says how to read it. Lengths are literals: each intrinsic becomes straight code
over vectors of that length, whatever the processor's own are.
"""

# ruff: noqa: ARG001 - numba hands every generator the same arguments
from __future__ import annotations

from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import extending, njit, types
from numba.core import cgutils

F32, BF16, F16, I32, I64, F64 = range(6)
KINDS = {torch.float32: F32, torch.bfloat16: BF16, torch.float16: F16}
_ELEMENTS = (types.float32, types.int16, types.uint16, types.int32, types.int64, types.float64)

intrinsic: Any = extending.intrinsic  # of what it makes, types know no call from compiled code

_FLOAT, _INT16, _INT32, _INT64 = ir.FloatType(), ir.IntType(16), ir.IntType(32), ir.IntType(64)
_FLAGS = ("reassoc", "contract", "nsz", "arcp")


@intrinsic(prefer_literal=True)
def pointer(typing: Any, address: Any, kind: Any) -> Any:
    """The pointer at an address: `pointer(address, F32)`."""
    to = types.CPointer(_ELEMENTS[kind.literal_value])

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], context.get_value_type(to))

    return to(types.int64, kind), generate


@intrinsic
def pointer_at(typing: Any, base: Any, index: Any) -> Any:
    """The pointer `index` elements further on."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.gep(args[0], [args[1]])

    return base(base, types.int64), generate


@intrinsic
def widen(typing: Any, value: Any) -> Any:
    """An element as float32."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _widen(builder, args[0], value, None)

    return types.float32(value), generate


@intrinsic
def narrow(typing: Any, value: Any, like: Any) -> Any:
    """A float32 as an element of the type of `like`, to nearest, ties to even."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _narrow(builder, args[0], like)

    return like(types.float32, like), generate


@intrinsic
def bits(typing: Any, value: Any) -> Any:
    """A float32's bits."""
    return types.int32(types.float32), lambda _context, builder, _signature, args: builder.bitcast(args[0], _INT32)


@intrinsic
def from_bits(typing: Any, value: Any) -> Any:
    """The float32 of these bits."""
    return types.float32(types.int32), lambda _context, builder, _signature, args: builder.bitcast(args[0], _FLOAT)


@intrinsic(prefer_literal=True)
def dots(typing: Any, q: Any, k: Any, out: Any, stride: Any, dim: Any, count: Any) -> Any:
    """out[g * stride] = the product of q[g * dim:][:dim] and k[:dim], for g < count. `q` and `out` are float32."""
    signature = types.void(q, k, out, types.int64, dim, count)
    n, rows = dim.literal_value, count.literal_value

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
        key = _load(b, args[1], k.dtype, n)
        add = cgutils.get_or_insert_function(
            b.module, ir.FunctionType(_FLOAT, [_FLOAT, ir.VectorType(_FLOAT, n)]), f"llvm.vector.reduce.fadd.v{n}f32"
        )
        for g in range(rows):
            query = _load(b, _at(b, args[0], g * n), types.float32, n)
            product = b.fmul(query, key, flags=_FLAGS)
            total = b.call(add, [ir.Constant(_FLOAT, -0.0), product], fastmath=_FLAGS)
            b.store(total, _at(b, args[2], b.mul(args[3], ir.Constant(_INT64, g))))
        return context.get_dummy_value()

    return signature, generate


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
        values = [_load(b, _at(b, args[1], b.load(_at(b, args[2], i))), v.dtype, n) for i in range(terms)]
        for g in range(rows):
            place = _at(b, args[0], g * n)
            total = _load(b, place, types.float32, n)
            row = _at(b, args[3], b.mul(args[4], ir.Constant(_INT64, g)))
            for i, value in enumerate(values):
                total = b.fadd(total, b.fmul(_splat(b, b.load(_at(b, row, i)), n), value, flags=_FLAGS), flags=_FLAGS)
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
            builder.bitcast(_at(builder, out, builder.mul(ldc, ir.Constant(_INT64, i))), vector.as_pointer())
            for i in range(m)
        ]
        sums = [cgutils.alloca_once(builder, vector) for _ in range(m)]
        for place, total in zip(places, sums, strict=True):
            start = builder.load(place, align=4) if adds.literal_value else ir.Constant(vector, [0.0] * n)
            builder.store(start, total)
        with cgutils.for_range(builder, depth) as loop:
            row = _load(builder, _at(builder, right, builder.mul(loop.index, ldb)), types.float32, n)
            for i, total in enumerate(sums):
                at = builder.add(builder.mul(lda, ir.Constant(_INT64, i)), loop.index)
                factor = _splat(builder, builder.load(_at(builder, left, at)), n)
                product = builder.fmul(factor, row, flags=_FLAGS)
                builder.store(builder.fadd(builder.load(total), product, flags=_FLAGS), total)
        for place, total in zip(places, sums, strict=True):
            builder.store(builder.load(total), place, align=4)
        return context.get_dummy_value()

    return signature, generate


def _at(builder: Any, base: Any, index: Any) -> Any:
    return builder.gep(base, [ir.Constant(_INT64, index) if isinstance(index, int) else index])


def _load(builder: Any, base: Any, kind: Any, count: int) -> Any:
    """`count` elements as a vector of float32."""
    element = {types.float32: _FLOAT, types.int16: _INT16, types.uint16: _INT16}[kind]
    vector = ir.VectorType(element, count)
    raw = builder.load(builder.bitcast(base, vector.as_pointer()), align=4 if kind == types.float32 else 2)
    return _widen(builder, raw, kind, count)


def _splat(builder: Any, value: Any, count: int) -> Any:
    vector = ir.Constant(ir.VectorType(_FLOAT, count), ir.Undefined)
    vector = builder.insert_element(vector, value, ir.Constant(_INT32, 0))
    return builder.shuffle_vector(vector, vector, ir.Constant(ir.VectorType(_INT32, count), [0] * count))


def _shape(element: Any, count: int | None) -> Any:
    return element if count is None else ir.VectorType(element, count)


def _constant(value: int, count: int | None) -> Any:
    return ir.Constant(_shape(_INT32, count), value if count is None else [value] * count)


def _widen(builder: Any, value: Any, kind: Any, count: int | None) -> Any:
    """Elements of `kind`, one or a vector of `count`, as float32."""
    if kind == types.float32:
        return value
    wide = builder.zext(value, _shape(_INT32, count))
    if kind == types.int16:
        return builder.bitcast(builder.shl(wide, _constant(16, count)), _shape(_FLOAT, count))
    # A float16 by integers alone, since not every processor has an instruction for it: exponent and mantissa go to
    # their places in a float32, which is then 2^112 too small; infinity and NaN keep the largest exponent.
    rest = builder.shl(builder.and_(wide, _constant(0x7FFF, count)), _constant(13, count))
    sign = builder.shl(builder.and_(wide, _constant(0x8000, count)), _constant(16, count))
    factor = ir.Constant(_FLOAT, 2.0**112)
    scaled = builder.fmul(
        builder.bitcast(rest, _shape(_FLOAT, count)), factor if count is None else _splat(builder, factor, count)
    )
    is_special = builder.icmp_unsigned(">=", rest, _constant(0x0F800000, count))
    special = builder.or_(rest, _constant(0x7F800000, count))
    size = builder.select(is_special, special, builder.bitcast(scaled, _shape(_INT32, count)))
    return builder.bitcast(builder.or_(size, sign), _shape(_FLOAT, count))


def _narrow(builder: Any, value: Any, kind: Any) -> Any:
    if kind == types.float32:
        return value
    raw = builder.bitcast(value, _INT32)
    sign = builder.lshr(builder.and_(raw, _constant(-(1 << 31), None)), _constant(16, None))
    size = builder.and_(raw, _constant(0x7FFFFFFF, None))
    is_nan = builder.icmp_unsigned(">", size, _constant(0x7F800000, None))
    if kind == types.int16:
        odd = builder.and_(builder.lshr(size, _constant(16, None)), _constant(1, None))
        rounded = builder.lshr(builder.add(size, builder.add(odd, _constant(0x7FFF, None))), _constant(16, None))
        nan = _constant(0x7FC0, None)
    else:
        # Normal results: the exponent is shifted by 112 and the mantissa rounded to 10 bits. Subnormal ones: the
        # addition of 0.5 rounds to multiples of 2^-24. From 65,520 on: infinity.
        odd = builder.and_(builder.lshr(size, _constant(13, None)), _constant(1, None))
        moved = builder.sub(builder.add(size, builder.add(odd, _constant(0xFFF, None))), _constant(112 << 23, None))
        normal = builder.lshr(moved, _constant(13, None))
        half = builder.bitcast(builder.fadd(builder.bitcast(size, _FLOAT), ir.Constant(_FLOAT, 0.5)), _INT32)
        small = builder.sub(half, _constant(0x3F000000, None))
        is_small = builder.icmp_unsigned("<", size, _constant(113 << 23, None))
        is_large = builder.icmp_unsigned(">=", size, _constant(0x477FF000, None))
        rounded = builder.select(is_large, _constant(0x7C00, None), builder.select(is_small, small, normal))
        nan = _constant(0x7E00, None)
    return builder.trunc(builder.or_(builder.select(is_nan, nan, rounded), sign), _INT16)


_LOG2_E, _ROUND = np.float32(1.4426950408889634), np.float32(1.5 * 2**23)
_LN2_HIGH, _LN2_LOW = np.float32(0.693359375), np.float32(-2.12194440e-4)
_P0, _P1, _P2 = np.float32(1.9875691500e-4), np.float32(1.3981999507e-3), np.float32(8.3334519073e-3)
_P3, _P4, _P5 = np.float32(4.1665795894e-2), np.float32(1.6666665459e-1), np.float32(5.0000001201e-1)
_ONE, _TWO, _LEAST, _SHIFT = np.float32(1), np.float32(2), np.float32(-87), np.int32(23)


@njit(error_model="numpy", fastmath={"contract"})
def exp(x: Any) -> Any:
    """exp(x) in float32 for x <= 88 (Cephes' polynomial), good to 2 units; below -87 as at -87. Loops vectorise."""
    x = _LEAST if x < _LEAST else x
    shifted = x * _LOG2_E + _ROUND  # the nearest integer, in the lowest bits
    n = shifted - _ROUND
    r = x - n * _LN2_HIGH
    r = r - n * _LN2_LOW
    p = _P0 * r + _P1
    p = p * r + _P2
    p = p * r + _P3
    p = p * r + _P4
    p = p * r + _P5
    p = p * r * r + r + _ONE
    return from_bits(bits(p) + (bits(shifted) << _SHIFT))


@njit(error_model="numpy", fastmath={"contract"})
def tanh(x: Any) -> Any:
    """tanh(x) in float32, to 1e-7."""
    size = -x if x < np.float32(0) else x
    e = exp(-_TWO * size)
    small = size < np.float32(0.0625)
    square = x * x
    rest = np.float32(2 / 15) - square * np.float32(17 / 315)
    series = size * (_ONE - square * (np.float32(1 / 3) - square * rest))
    result = series if small else (_ONE - e) / (_ONE + e)
    return -result if x < np.float32(0) else result
