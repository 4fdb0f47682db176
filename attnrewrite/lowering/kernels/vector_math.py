"""Elementary functions as vectorisable TIR expressions, and the vector unit of a CPU target.

TVM lowers `T.exp` and `T.erf` to a call of scalar libm for every lane. The polynomials here are plain arithmetic, which
LLVM keeps in vector registers on every target. Arguments and results are float32; NaN passes through.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce

from tvm.ir import Expr
from tvm.script import tirx as T
from tvm.target import Target, codegen

LOG2_E = 1.4426950408889634

# 1.5 * 2**23: a float32 of this size has no fraction bits, so adding it rounds to the nearest integer, and the low bits
# of the sum hold that integer, ready to be shifted into an exponent. No conversion and no rounding instruction needed.
_ROUND = 12582912.0

# ln 2 in two parts: the high one has 9 trailing zero bits, so its product with an exponent is exact.
_LN2_HIGH = 0.693145751953125
_LN2_LOW = 1.42860682030941723212e-6

# 2**f = 1 + f (c1 + ... + c5 f**4) on [-1/2, 1/2], minimax in relative error (9.2e-8); the highest power first.
_EXP2 = (0.0013264726404331253, 0.009671512696911046, 0.055507337458864964, 0.2402224208412689, 0.6931469775973329)

# -log2(erfc(a)) = a (c1 + ... + c8 a**7) on [0, 4.2], minimax in the absolute error of erfc (1.6e-8).
_LOG2_ERFC = (
    4.5358181268884135e-05,
    -0.00044550469852688845,
    0.0014894334895332317,
    0.0007746408670837868,
    -0.02825368920354454,
    0.14848161807109228,
    0.918416392760596,
    1.6279085930884365,
)
# From here on erf rounds to 1 in float32.
_ERF_SATURATES = 4.2


@dataclass(frozen=True)
class VectorUnit:
    """lanes: float32 values per vector register; accumulators: registers a loop may keep sums in without spilling."""

    lanes: int
    accumulators: int


def vector_unit(target: Target) -> VectorUnit:
    """The vector unit an `llvm` target compiles for; 4 lanes where nothing better is known."""
    # llvm_get_vector_width answers 512 bits for every x86 CPU, so the features are asked for instead.
    with target:
        if codegen.target_has_features("avx512f", target):
            return VectorUnit(lanes=16, accumulators=24)
        if codegen.target_has_features("avx2", target):
            return VectorUnit(lanes=8, accumulators=12)
        if codegen.target_has_features("neon", target):
            return VectorUnit(lanes=4, accumulators=24)
    return VectorUnit(lanes=4, accumulators=12)


def _f32(value: float) -> Expr:
    return T.float32(value)


def _polynomial(coefficients: tuple[float, ...], x: Expr) -> Expr:
    """Horner's rule, the highest power first."""
    return reduce(lambda value, c: value * x + _f32(c), coefficients[1:], _f32(coefficients[0]))


def _not_below(x: Expr, bound: float) -> Expr:
    """max(x, bound) that keeps NaN, which T.max does not promise."""
    return T.Select(x < _f32(bound), _f32(bound), x)


def _not_above(x: Expr, bound: float) -> Expr:
    return T.Select(x > _f32(bound), _f32(bound), x)


def _round(x: Expr) -> tuple[Expr, Expr]:
    """(n, n in the low bits of an int32) for the integer n nearest to x, |x| < 2**22."""
    # TVM's simplifier would cancel (x + c) - c even for floats; it does not look through the bits.
    bits = T.reinterpret("int32", x + _f32(_ROUND))
    return T.reinterpret("float32", bits) - _f32(_ROUND), bits


def _scale_by_power(fraction: Expr, bits: Expr) -> Expr:
    """2**fraction * 2**n for |fraction| <= 1/2 and the bits `_round` gave for n."""
    mantissa = _polynomial(_EXP2, fraction) * fraction + _f32(1.0)
    return T.reinterpret("float32", T.reinterpret("int32", mantissa) + T.shift_left(bits, 23))


def exp2_of_nonpositive(x: Expr) -> Expr:
    """2**x for x <= 0, to 2e-7 relative; exactly 0 from -127 down, so for -inf. Larger x gives nonsense from 128 on."""
    # At -127 the mantissa is exactly 1.0 and its bits plus the exponent's are those of zero.
    x = _not_below(x, -127.0)
    n, bits = _round(x)
    return _scale_by_power(x - n, bits)


def exp2(x: Expr) -> Expr:
    """2**x to 2e-7 relative where the result is a normal number; 0 from -127 down, inf from 128 up."""
    return exp2_of_nonpositive(_not_above(x, 128.0))


def exp(x: Expr) -> Expr:
    """e**x to 3e-7 relative where the result is a normal number; 0 below about -88, inf above 88.7."""
    # At the ends of the range the result is 0 and inf; between them the remainder of n ln 2 keeps full precision.
    power = _not_above(_not_below(x * _f32(LOG2_E), -127.0), 128.0)
    n, bits = _round(power)
    inside = T.And(power > _f32(-127.0), power < _f32(128.0))
    remainder = ((x - n * _f32(_LN2_HIGH)) - n * _f32(_LN2_LOW)) * _f32(LOG2_E)
    return _scale_by_power(T.Select(inside, remainder, power - n), bits)


def erf(x: Expr) -> Expr:
    """The error function to 1.5e-7 absolute: erf(a) = 1 - 2**log2(erfc(a)) for a = |x|."""
    magnitude = _not_above(T.Select(x < _f32(0.0), _f32(0.0) - x, x), _ERF_SATURATES)
    value = _f32(1.0) - exp2_of_nonpositive(_f32(0.0) - _polynomial(_LOG2_ERFC, magnitude) * magnitude)
    return T.Select(x < _f32(0.0), _f32(0.0) - value, value)
