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

# erf(x) = x (c0 + ... + c14 u**14) for u = 2 (x / 3.74)**2 - 1, |x| <= 3.74, minimax in absolute error (3.6e-8). In
# this variable the terms hardly cancel. At 3.74 the value is exactly 1, as erf is in float32 soon after.
_ERF = (
    0.000773850228, -0.00209277915, 0.00202858337, -0.00306659651, 0.00871508412, -0.0162941783, 0.0247177875,
    -0.0370456421, 0.0532972015, -0.0714024328, 0.0907100093, -0.112084256, 0.139574351, -0.188513716, 0.37806239,
)  # fmt: skip
_ERF_SATURATES = 3.74


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
    """The error function to 2.5e-7 absolute; exactly -1 and 1 from |x| = 3.74 on."""

    def inside(x: Expr) -> Expr:
        return _let(x * x * _f32(2.0 / _ERF_SATURATES**2) - _f32(1.0), lambda u: _polynomial(_ERF, u) * x)

    def below(x: Expr) -> Expr:
        return _let(_not_above(x, _ERF_SATURATES), inside)

    return _let(x, lambda x: _let(_not_below(x, -_ERF_SATURATES), below))


def tanh(x: Expr) -> Expr:
    """1 - 2 / (e**2x + 1), to 3e-7 absolute."""
    return _f32(1.0) - _f32(2.0) / (exp2(x * _f32(2.0 * LOG2_E)) + _f32(1.0))


def sigmoid(x: Expr) -> Expr:
    """1 / (1 + e**-x), to 2e-7 absolute."""
    return _f32(1.0) / (exp2(x * _f32(-LOG2_E)) + _f32(1.0))
