"""Elementary functions as vectorisable TIR expressions, and the vector unit of a CPU target.

TVM lowers `T.exp` and `T.erf` to a call of scalar libm for every lane. The polynomials here are plain arithmetic, which
LLVM keeps in vector registers on every target. Arguments and results are float32; NaN passes through.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce

from tvm.ir import Expr
from tvm.script import tirx as T
from tvm.target import Target, codegen
from tvm.tirx import Let, Var

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

    @property
    def registers(self) -> int:
        """Vector registers in all."""
        return self.accumulators * 4 // 3


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


def _let(value: Expr, body: Callable[[Expr], Expr]) -> Expr:
    """body(value), computed once: expressions are trees, and TVM's passes visit every copy of a shared part."""
    bound = Var("x", "float32")
    return Let(bound, value, body(bound))


def _polynomial(coefficients: tuple[float, ...], x: Expr) -> Expr:
    """Horner's rule, the highest power first."""
    return reduce(lambda value, c: value * x + _f32(c), coefficients[1:], _f32(coefficients[0]))


def _not_below(x: Expr, bound: float) -> Expr:
    """max(x, bound) that keeps NaN, which T.max does not promise. x is used twice."""
    return T.Select(x < _f32(bound), _f32(bound), x)


def _not_above(x: Expr, bound: float) -> Expr:
    return T.Select(x > _f32(bound), _f32(bound), x)


def _power(x: Expr, fraction_of: Callable[[Expr], Expr]) -> Expr:
    """2**(n + fraction_of(n)) for the integer n nearest to x; |x| < 2**22 and |fraction_of(n)| <= 1/2."""

    def scaled(shifted: Expr) -> Expr:
        # TVM's simplifier would cancel (x + c) - c even for floats; it does not look through the bits.
        bits = T.reinterpret("int32", shifted)
        n = T.reinterpret("float32", bits) - _f32(_ROUND)
        mantissa = _let(fraction_of(n), lambda fraction: _polynomial(_EXP2, fraction) * fraction + _f32(1.0))
        return T.reinterpret("float32", T.reinterpret("int32", mantissa) + T.shift_left(bits, 23))

    return _let(x + _f32(_ROUND), scaled)


def exp2_of_nonpositive(x: Expr) -> Expr:
    """2**x for x <= 0, to 2e-7 relative; exactly 0 from -127 down, so for -inf. Larger x gives nonsense from 128 on."""
    # At -127 the mantissa is exactly 1.0 and its bits plus the exponent's are those of zero.
    return _let(x, lambda x: _let(_not_below(x, -127.0), lambda x: _power(x, lambda n: x - n)))


def exp2(x: Expr) -> Expr:
    """2**x to 2e-7 relative where the result is a normal number; 0 from -127 down, inf from 128 up."""
    return _let(x, lambda x: exp2_of_nonpositive(_not_above(x, 128.0)))


def exp(x: Expr) -> Expr:
    """e**x to 3e-7 relative where the result is a normal number; 0 below about -88, inf above 88.7."""

    def of_power(x: Expr, power: Expr) -> Expr:
        # At the ends of the range the result is 0 and inf; between them the remainder of n ln 2 keeps full precision.
        inside = T.And(power > _f32(-127.0), power < _f32(128.0))

        def fraction(n: Expr) -> Expr:
            return _let(
                n,
                lambda n: T.Select(inside, ((x - n * _f32(_LN2_HIGH)) - n * _f32(_LN2_LOW)) * _f32(LOG2_E), power - n),
            )

        return _power(power, fraction)

    def clamped(x: Expr) -> Expr:
        low = _let(x * _f32(LOG2_E), lambda power: _not_below(power, -127.0))
        return _let(_let(low, lambda power: _not_above(power, 128.0)), lambda power: of_power(x, power))

    return _let(x, clamped)


def erf(x: Expr) -> Expr:
    """The error function to 1.5e-7 absolute: erf(a) = 1 - 2**log2(erfc(a)) for a = |x|."""

    def of_magnitude(a: Expr) -> Expr:
        return _f32(1.0) - exp2_of_nonpositive(_f32(0.0) - _polynomial(_LOG2_ERFC, a) * a)

    def signed(x: Expr) -> Expr:
        magnitude = _let(T.Select(x < _f32(0.0), _f32(0.0) - x, x), lambda a: _not_above(a, _ERF_SATURATES))
        value = _let(magnitude, of_magnitude)
        return _let(value, lambda value: T.Select(x < _f32(0.0), _f32(0.0) - value, value))

    return _let(x, signed)
