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
from llvmlite.binding import get_host_cpu_features
from numba import extending, njit, types
from numba.core import cgutils

F32, BF16, F16, I32, I64, F64 = range(6)
KINDS = {torch.float32: F32, torch.bfloat16: BF16, torch.float16: F16}
LANES = 16 if get_host_cpu_features().get("avx512f") else 8  # float32 in a register
HAS_HALF = bool(get_host_cpu_features().get("f16c"))  # an instruction that widens float16
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
        return widen_code(builder, args[0], value, None)

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


def at(builder: Any, base: Any, index: Any) -> Any:
    """While code is made: the pointer `index` elements behind `base`."""
    return builder.gep(base, [ir.Constant(_INT64, index) if isinstance(index, int) else index])


def load_vector(builder: Any, base: Any, kind: Any, count: int) -> Any:
    """While code is made: `count` elements of `kind` at `base` as a vector of float32."""
    element = {types.float32: _FLOAT, types.int16: _INT16, types.uint16: _INT16}[kind]
    vector = ir.VectorType(element, count)
    raw = builder.load(builder.bitcast(base, vector.as_pointer()), align=4 if kind == types.float32 else 2)
    return widen_code(builder, raw, kind, count)


def fold(b: Any, vectors: list[Any], width: int) -> list[Any]:
    """While code is made: each vector's sum over its lanes, in order, `width` sums to a vector."""
    folded = []
    for start in range(0, len(vectors), width):
        part = vectors[start : start + width]
        count = width
        while count > 1:
            if len(part) % 2:
                part.append(part[-1])
            part = [_add_pairs(b, part[i], part[i + 1], width) for i in range(0, len(part), 2)]
            count //= 2
        folded.append(part[0])
    return folded


def _add_pairs(b: Any, first: Any, second: Any, width: int) -> Any:
    """Sums of neighbouring lanes: those of `first`, then those of `second`."""
    even, odd = (
        b.shuffle_vector(first, second, ir.Constant(ir.VectorType(_INT32, width), list(range(side, 2 * width, 2))))
        for side in (0, 1)
    )
    return b.fadd(even, odd, flags=_FLAGS)


def splat(builder: Any, value: Any, count: int) -> Any:
    """While code is made: a vector of `count` times `value`."""
    vector = ir.Constant(ir.VectorType(_FLOAT, count), ir.Undefined)
    vector = builder.insert_element(vector, value, ir.Constant(_INT32, 0))
    return builder.shuffle_vector(vector, vector, ir.Constant(ir.VectorType(_INT32, count), [0] * count))


def prefetch(b: Any, place: Any, *, first_cache: bool = False) -> None:
    """While code is made: ask for the cache line of `place`, to be read soon; into the second cache, or the first."""
    kind = ir.IntType(8).as_pointer()
    function = cgutils.get_or_insert_function(
        b.module, ir.FunctionType(ir.VoidType(), [kind, *[_INT32] * 3]), "llvm.prefetch.p0"
    )
    b.call(function, [b.bitcast(place, kind), *(ir.Constant(_INT32, value) for value in (0, 2, 1))])


def _shape(element: Any, count: int | None) -> Any:
    return element if count is None else ir.VectorType(element, count)


def _constant(value: int, count: int | None) -> Any:
    return ir.Constant(_shape(_INT32, count), value if count is None else [value] * count)


def widen_code(builder: Any, value: Any, kind: Any, count: int | None) -> Any:
    """While code is made: elements of `kind`, one or a vector of `count`, as float32."""
    if kind == types.float32:
        return value
    wide = builder.zext(value, _shape(_INT32, count))
    if kind == types.int16:
        return builder.bitcast(builder.shl(wide, _constant(16, count)), _shape(_FLOAT, count))
    if HAS_HALF:
        return builder.fpext(builder.bitcast(value, _shape(ir.HalfType(), count)), _shape(_FLOAT, count))
    # By integers alone: exponent and mantissa go to their places in a float32, which is then 2^112 too small; infinity
    # and NaN keep the largest exponent.
    rest = builder.shl(builder.and_(wide, _constant(0x7FFF, count)), _constant(13, count))
    sign = builder.shl(builder.and_(wide, _constant(0x8000, count)), _constant(16, count))
    factor = ir.Constant(_FLOAT, 2.0**112)
    scaled = builder.fmul(
        builder.bitcast(rest, _shape(_FLOAT, count)), factor if count is None else splat(builder, factor, count)
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


def exp_code(b: Any, x: Any, count: int) -> Any:
    """While code is made: `exp` of a vector of `count`."""
    flags, integers = ("contract",), ir.VectorType(_INT32, count)

    def constant(value: Any) -> Any:
        return ir.Constant(ir.VectorType(_FLOAT, count), [float(value)] * count)

    def multiply_add(first: Any, second: Any, third: Any) -> Any:
        return b.fadd(b.fmul(first, second, flags=flags), third, flags=flags)

    x = b.select(b.fcmp_ordered("<", x, constant(_LEAST)), constant(_LEAST), x)
    shifted = multiply_add(x, constant(_LOG2_E), constant(_ROUND))
    n = b.fsub(shifted, constant(_ROUND), flags=flags)  # flags of its own keep it from being reordered away
    r = multiply_add(n, constant(-_LN2_HIGH), x)
    r = multiply_add(n, constant(-_LN2_LOW), r)
    p = constant(_P0)
    for factor in (_P1, _P2, _P3, _P4, _P5):
        p = multiply_add(p, r, constant(factor))
    p = b.fadd(multiply_add(b.fmul(p, r, flags=flags), r, r), constant(_ONE), flags=flags)
    power = b.shl(b.bitcast(shifted, integers), ir.Constant(integers, [int(_SHIFT)] * count))
    return b.bitcast(b.add(b.bitcast(p, integers), power), ir.VectorType(_FLOAT, count))


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
