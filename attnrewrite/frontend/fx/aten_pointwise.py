"""ATen operators that treat every element alike, as ONNX operators; `building.entry` says how an entry is called."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from attnrewrite.dims import Dim
from attnrewrite.frontend.fx.building import Builder, Opaque, Table, entry
from attnrewrite.graph import Value

POINTWISE: Table = {}

BOOL = np.dtype(bool)

# ATen's name -> ONNX's, where the result has the dtype of the (converted) operand.
_UNARY = {
    "abs": "Abs", "acos": "Acos", "acosh": "Acosh", "asin": "Asin", "asinh": "Asinh", "atan": "Atan",
    "atanh": "Atanh", "ceil": "Ceil", "cos": "Cos", "cosh": "Cosh", "erf": "Erf", "exp": "Exp", "floor": "Floor",
    "log": "Log", "neg": "Neg", "reciprocal": "Reciprocal", "relu": "Relu", "round": "Round", "sigmoid": "Sigmoid",
    "sign": "Sign", "sin": "Sin", "sinh": "Sinh", "sqrt": "Sqrt", "tan": "Tan", "tanh": "Tanh",
}  # fmt: skip
_FLOAT_ONLY = frozenset({"Ceil", "Floor", "Round"})  # whole numbers stay as they are


def _unary(name: str, op: str) -> None:
    @entry(POINTWISE, name)
    def unary(write: Builder, x: Value) -> Value:
        if op in _FLOAT_ONLY and write.dtype.kind in "iu":
            return write.same(x)
        if op == "Relu" and write.dtype.kind not in "f" and write.dtype.itemsize < 4:
            raise Opaque(f"a relu of {write.dtype}")
        return write.unary(op, write.cast(x, write.dtype))


for _name, _op in _UNARY.items():
    _unary(_name, _op)


def _question(name: str, op: str) -> None:
    @entry(POINTWISE, name)
    def question(write: Builder, x: Value) -> Value:
        if x.dtype is None or x.dtype.kind in "iub":
            raise Opaque(f"{name} of {x.dtype}")
        return write.unary(op, x, BOOL)


_question("isnan", "IsNaN")
_question("isinf", "IsInf")


@entry(POINTWISE, "logical_not", "bitwise_not")
def logical_not(write: Builder, x: Value) -> Value:
    if write.dtype != BOOL:
        return write.unary("BitwiseNot", x)
    return write.unary("Not", write.cast(x, BOOL))


@entry(POINTWISE, "rsqrt")
def rsqrt(write: Builder, x: Value) -> Value:
    return write.unary("Reciprocal", write.unary("Sqrt", write.cast(x, write.dtype)))


@entry(POINTWISE, "square")
def square(write: Builder, x: Value) -> Value:
    return write.binary("Mul", x, x)


@entry(POINTWISE, "gelu")
def gelu(write: Builder, x: Value, approximate: str) -> Value:
    how: dict[str, Any] = {} if approximate == "none" else {"approximate": approximate}
    return write.unary("Gelu", x, **how)


@entry(POINTWISE, "silu")
def silu(write: Builder, x: Value) -> Value:
    return write.binary("Mul", x, write.unary("Sigmoid", x))


@entry(POINTWISE, "mish")
def mish(write: Builder, x: Value) -> Value:
    return write.unary("Mish", x)


@entry(POINTWISE, "hardswish")
def hardswish(write: Builder, x: Value) -> Value:
    return write.unary("HardSwish", x)


@entry(POINTWISE, "hardsigmoid")
def hardsigmoid(write: Builder, x: Value) -> Value:
    return write.unary("HardSigmoid", x, alpha=1 / 6, beta=0.5)


@entry(POINTWISE, "leaky_relu")
def leaky_relu(write: Builder, x: Value, negative_slope: float) -> Value:
    return write.unary("LeakyRelu", x, alpha=float(negative_slope))


@entry(POINTWISE, "elu")
def elu(write: Builder, x: Value, alpha: float, scale: float, input_scale: float) -> Value:
    if (scale, input_scale) == (1, 1):
        return write.unary("Elu", x, alpha=float(alpha))
    if input_scale != 1:
        raise Opaque("an elu of a scaled input")
    return write.unary("Selu", x, alpha=float(alpha), gamma=float(scale))


@entry(POINTWISE, "celu")
def celu(write: Builder, x: Value, alpha: float) -> Value:
    return write.unary("Celu", x, alpha=float(alpha))


@entry(POINTWISE, "softplus")
def softplus(write: Builder, x: Value, beta: float, threshold: float) -> Value:
    """log(1 + exp(x)); beyond the threshold torch takes x, the same in float32 from 20 on."""
    if beta != 1 or threshold < 20 or write.dtype.itemsize > 4:
        raise Opaque("a softplus with its own threshold")
    return write.unary("Softplus", x)


@entry(POINTWISE, "prelu", "_prelu_kernel")
def prelu(write: Builder, x: Value, weight: Value) -> Value:
    """The slope is one number or one per channel (axis 1)."""
    if len(weight.known_shape) == 1 and weight.known_shape != (1,):
        weight = write.reshape(weight, (*weight.known_shape, *(1,) * (len(x.known_shape) - 2)))
    return write.op("PRelu", [x, weight], x.known_shape)


@entry(POINTWISE, "glu")
def glu(write: Builder, x: Value, dim: int) -> Value:
    dim %= len(x.known_shape)
    half = write.shape[dim]
    if isinstance(half, Dim):
        raise Opaque("a gate along a symbolic axis")
    a, b = write.nodes("Split", [x, write.ints([half, half])], [write.shape, write.shape], x.dtype, axis=dim)
    return write.binary("Mul", a, write.unary("Sigmoid", b))


def _operand(write: Builder, x: Any, dtype: np.dtype) -> Value:
    """A tensor or a number in the dtype in which is computed."""
    if isinstance(x, Value):
        return write.cast(x, dtype)
    if isinstance(x, Dim):
        return write.cast(write.reshape(write.extents((x,)), ()), dtype)
    if not isinstance(x, (bool, int, float)):
        raise Opaque(f"an operand {x}")
    return write.constant(np.array(x, dtype))


def _times(write: Builder, x: Any, factor: Any) -> Any:
    """alpha * x, where alpha is not 1."""
    if factor == 1:
        return x
    return write.binary("Mul", _operand(write, x, write.dtype), _operand(write, factor, write.dtype))


@entry(POINTWISE, "add.Tensor", "add.Scalar")
def add(write: Builder, x: Any, other: Any, alpha: Any) -> Value:
    if write.dtype == BOOL:
        return _logical(write, "Or", x, other)
    return _arithmetic(write, "Add", x, _times(write, other, alpha))


@entry(POINTWISE, "sub.Tensor", "sub.Scalar")
def sub(write: Builder, x: Any, other: Any, alpha: Any) -> Value:
    return _arithmetic(write, "Sub", x, _times(write, other, alpha))


@entry(POINTWISE, "rsub.Tensor", "rsub.Scalar")
def rsub(write: Builder, x: Any, other: Any, alpha: Any) -> Value:
    return _arithmetic(write, "Sub", other, _times(write, x, alpha))


@entry(POINTWISE, "mul.Tensor", "mul.Scalar")
def mul(write: Builder, x: Any, other: Any) -> Value:
    if write.dtype == BOOL:
        return _logical(write, "And", x, other)
    return _arithmetic(write, "Mul", x, other)


def _arithmetic(write: Builder, op: str, x: Any, other: Any) -> Value:
    return write.binary(op, _operand(write, x, write.dtype), _operand(write, other, write.dtype))


def _logical(write: Builder, op: str, x: Any, other: Any) -> Value:
    return write.binary(op, _operand(write, x, BOOL), _operand(write, other, BOOL), BOOL)


@entry(POINTWISE, "div.Tensor", "div.Scalar", "true_divide.Tensor", "true_divide.Scalar")
def quotient(write: Builder, x: Any, other: Any) -> Value:
    return _arithmetic(write, "Div", x, other)


@entry(POINTWISE, "div.Tensor_mode", "div.Scalar_mode")
def rounded_quotient(write: Builder, x: Any, other: Any, rounding_mode: str | None) -> Value:
    if rounding_mode is None:
        return _arithmetic(write, "Div", x, other)
    if rounding_mode == "floor":
        return floor_divide(write, x, other)
    if write.dtype.kind not in "iu":
        raise Opaque("a truncated quotient of fractions")
    return _arithmetic(write, "Div", x, other)


@entry(POINTWISE, "floor_divide", "floor_divide.Scalar")
def floor_divide(write: Builder, x: Any, other: Any) -> Value:
    """(x - x mod other) / other of whole numbers; torch's own correction for fractions has no ONNX operator."""
    if write.dtype.kind not in "iu":
        raise Opaque("a rounded quotient of fractions")
    a, b = _operand(write, x, write.dtype), _operand(write, other, write.dtype)
    return write.binary("Div", write.binary("Sub", a, write.binary("Mod", a, b)), b)


@entry(POINTWISE, "remainder.Tensor", "remainder.Scalar")
def remainder(write: Builder, x: Any, other: Any) -> Value:
    if write.dtype.kind not in "iu":
        raise Opaque("a remainder of fractions")
    return _arithmetic(write, "Mod", x, other)


@entry(POINTWISE, "fmod.Tensor", "fmod.Scalar")
def fmod(write: Builder, x: Any, other: Any) -> Value:
    a, b = _operand(write, x, write.dtype), _operand(write, other, write.dtype)
    remainder = write.binary("Mod", a, b)
    assert remainder.producer is not None
    remainder.producer.attributes["fmod"] = 1
    return remainder


@entry(POINTWISE, "pow.Tensor_Scalar", "pow.Tensor_Tensor", "pow.Scalar")
def pow_(write: Builder, x: Any, exponent: Any) -> Value:
    if write.dtype.kind not in "fV" and not (isinstance(exponent, int) and exponent >= 0):
        raise Opaque("a power of whole numbers")
    return _arithmetic(write, "Pow", x, exponent)


@entry(POINTWISE, "maximum")
def maximum(write: Builder, x: Value, other: Value) -> Value:
    return _arithmetic(write, "Max", x, other)


@entry(POINTWISE, "minimum")
def minimum(write: Builder, x: Value, other: Value) -> Value:
    return _arithmetic(write, "Min", x, other)


@entry(POINTWISE, "clamp", "clamp_min", "clamp_max", "hardtanh", "clamp.Tensor", "clamp_min.Tensor", "clamp_max.Tensor")
def clamp(
    write: Builder, x: Value, min: Any = None, max: Any = None, min_val: Any = None, max_val: Any = None
) -> Value:
    """Cut off below and above, by numbers or tensors; max wins where they cross."""
    low, high = (min, max) if min_val is None and max_val is None else (min_val, max_val)
    x = write.cast(x, write.dtype)
    numbers = all(n is None or isinstance(n, (int, float)) for n in (low, high))
    crossed = numbers and low is not None and high is not None and low > high
    if numbers and not crossed:
        bounds = [None if n is None else _operand(write, n, write.dtype) for n in (low, high)]
        return write.nodes("Clip", [x, *bounds], [x.known_shape], write.dtype)[0]
    for op, bound in (("Max", low), ("Min", high)):
        x = x if bound is None else write.binary(op, x, _operand(write, bound, write.dtype))
    return x


def _comparison(name: str, op: str, *, negated: bool = False) -> Callable[..., Value]:
    @entry(POINTWISE, f"{name}.Tensor", f"{name}.Scalar")
    def compare(write: Builder, x: Any, other: Any) -> Value:
        dtype = _common(x, other)
        answer = write.binary(op, _operand(write, x, dtype), _operand(write, other, dtype), BOOL)
        return write.unary("Not", answer) if negated else answer

    return compare


def _common(x: Value, other: Any) -> np.dtype:
    """The dtype in which two operands are compared."""
    if x.dtype is None:
        raise Opaque("a dtype that ONNX lacks")
    if not isinstance(other, Value):
        kind = np.dtype(type(other)).kind if isinstance(other, (bool, int, float)) else "i"
        ranks = "biuf"
        if x.dtype.kind == "V" or ranks.index(kind if kind != "u" else "i") <= ranks.index(x.dtype.kind):
            return x.dtype
        return np.dtype(np.float32 if kind == "f" else np.int64)
    if other.dtype is None:
        raise Opaque("a dtype that ONNX lacks")
    if x.dtype == other.dtype:
        return x.dtype
    if (x.dtype.kind == "f") != (other.dtype.kind == "f"):
        return x.dtype if x.dtype.kind == "f" else other.dtype
    return np.promote_types(x.dtype, other.dtype)


for _name, _op, _negated in (
    ("eq", "Equal", False), ("ne", "Equal", True), ("lt", "Less", False), ("le", "LessOrEqual", False),
    ("gt", "Greater", False), ("ge", "GreaterOrEqual", False),
):  # fmt: skip
    _comparison(_name, _op, negated=_negated)


def _connective(op: str, *names: str) -> None:
    @entry(POINTWISE, *names)
    def connect(write: Builder, x: Any, other: Any) -> Value:
        if write.dtype != BOOL:
            raise Opaque("bits of whole numbers")
        return _logical(write, op, x, other)


_connective("And", "logical_and", "bitwise_and.Tensor", "bitwise_and.Scalar", "__and__.Tensor")
_connective("Or", "logical_or", "bitwise_or.Tensor", "bitwise_or.Scalar", "__or__.Tensor")
_connective("Xor", "logical_xor", "bitwise_xor.Tensor", "bitwise_xor.Scalar")


@entry(POINTWISE, "where.self", "where.Scalar", "where.ScalarSelf", "where.ScalarOther")
def where(write: Builder, condition: Value, x: Any, other: Any) -> Value:
    a, b = _operand(write, x, write.dtype), _operand(write, other, write.dtype)
    return write.op("Where", [write.cast(condition, BOOL), a, b], write.shape, write.dtype)


@entry(POINTWISE, "masked_fill.Scalar", "masked_fill.Tensor")
def masked_fill(write: Builder, x: Value, mask: Value, value: Any) -> Value:
    filled = _operand(write, value, write.dtype)
    return write.op("Where", [write.cast(mask, BOOL), filled, x], write.shape, write.dtype)


def _fused(name: str, op: str) -> None:
    @entry(POINTWISE, name)
    def fused(write: Builder, x: Value, tensor1: Value, tensor2: Value, value: Any) -> Value:
        """x + value * (tensor1 op tensor2)."""
        return _arithmetic(write, "Add", x, _times(write, _arithmetic(write, op, tensor1, tensor2), value))


_fused("addcmul", "Mul")
_fused("addcdiv", "Div")


@entry(POINTWISE, "lerp.Scalar", "lerp.Tensor")
def lerp(write: Builder, x: Value, end: Value, weight: Any) -> Value:
    """x + weight * (end - x)."""
    return write.binary("Add", x, _arithmetic(write, "Mul", write.binary("Sub", end, x), weight))


# In-place operators whose functional ones have other names or arguments.


@entry(POINTWISE, "fill.Scalar", "fill.Tensor", "zero", "copy")
def fill(write: Builder, x: Value, value: Any = 0, src: Any = None, non_blocking: bool = False) -> Value:
    """What x holds after it has been written over: one number, or a tensor that is broadcast."""
    content = value if src is None else src
    written = _operand(write, content, write.dtype)
    expanded = write.expand(written, x.known_shape)
    return write.same(expanded) if expanded is content else expanded
