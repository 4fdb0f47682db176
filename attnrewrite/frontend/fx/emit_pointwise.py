"""Pointwise operators, comparisons and logic as torch functions."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from attnrewrite.frontend.fx.entry import Entry, Rule, aten, number, text, torch_dtype
from attnrewrite.graph import Node

Call = Callable[..., Tensor]


def _unary(call: Call) -> Rule:
    return Rule(lambda node, x: call(x))


def _commutative(call: Call) -> Rule:
    """Two operands, of which one may be a number: it stands behind the tensor."""
    return Rule(lambda node, a, b: call(a, b) if isinstance(a, Tensor) else call(b, a), numbers=(0, 1))


def _binary(call: Call) -> Rule:
    return Rule(lambda node, a, b: call(a, b), numbers=(1,))


def _variadic(call: Call) -> Entry:
    return lambda node, *operands: functools.reduce(call, operands)


def _attribute(node: Node, name: str, default: float) -> float:
    return float(node.attributes.get(name, default))


def cast(node: Node, x: Tensor) -> Tensor:
    return aten.to.dtype(x, torch_dtype(node.attributes["to"]))


def clip(node: Node, x: Tensor, low: Any = None, high: Any = None) -> Tensor:
    """Bounds are operands; the upper one wins where they cross, as in torch."""
    if low is None and high is None:
        return x
    if isinstance(low, Tensor) or isinstance(high, Tensor):
        low, high = (b if b is None or isinstance(b, Tensor) else aten.full_like.default(x, b) for b in (low, high))
        return aten.clamp.Tensor(x, low, high)
    return aten.clamp.default(x, low, high)


def divide(node: Node, a: Tensor, b: Any) -> Tensor:
    """Integers are divided towards zero."""
    if a.dtype.is_floating_point or a.dtype.is_complex:
        return aten.div.Tensor(a, b)
    return aten.div.Tensor_mode(a, b, rounding_mode="trunc")


def modulo(node: Node, a: Tensor, b: Any) -> Tensor:
    """The sign of the divisor, or of the dividend with `fmod`."""
    if node.attributes.get("fmod", 0):
        return aten.fmod.Tensor(a, b) if isinstance(b, Tensor) else aten.fmod.Scalar(a, b)
    return aten.remainder.Tensor(a, b) if isinstance(b, Tensor) else aten.remainder.Scalar(a, b)


def power(node: Node, base: Tensor, exponent: Any) -> Tensor:
    """The result has the dtype of the base."""
    raised = (
        aten.pow.Tensor_Tensor(base, exponent)
        if isinstance(exponent, Tensor)
        else aten.pow.Tensor_Scalar(base, exponent)
    )
    return raised if raised.dtype == base.dtype else aten.to.dtype(raised, base.dtype)


def mean(node: Node, *operands: Tensor) -> Tensor:
    return aten.div.Tensor(functools.reduce(aten.add.Tensor, operands), len(operands))


def prelu(node: Node, x: Tensor, slope: Any) -> Tensor:
    return aten.where.self(aten.lt.Scalar(x, 0), aten.mul.Tensor(x, slope), x)


def gelu(node: Node, x: Tensor) -> Tensor:
    return aten.gelu.default(x, approximate=text(node.attributes.get("approximate", "none")))


def swish(node: Node, x: Tensor) -> Tensor:
    alpha = _attribute(node, "alpha", 1.0)
    return aten.silu.default(x) if alpha == 1.0 else aten.mul.Tensor(x, aten.sigmoid.default(aten.mul.Tensor(x, alpha)))


def elu(node: Node, x: Tensor) -> Tensor:
    return aten.elu.default(x, _attribute(node, "alpha", 1.0))


def celu(node: Node, x: Tensor) -> Tensor:
    return aten.celu.default(x, _attribute(node, "alpha", 1.0))


def selu(node: Node, x: Tensor) -> Tensor:
    alpha = _attribute(node, "alpha", 1.67326319217681884765625)
    return aten.elu.default(x, alpha, _attribute(node, "gamma", 1.05070102214813232421875))


def leaky_relu(node: Node, x: Tensor) -> Tensor:
    return aten.leaky_relu.default(x, _attribute(node, "alpha", 0.01))


def thresholded_relu(node: Node, x: Tensor) -> Tensor:
    return aten.threshold.default(x, _attribute(node, "alpha", 1.0), 0)


def hard_sigmoid(node: Node, x: Tensor) -> Tensor:
    scaled = aten.mul.Tensor(x, _attribute(node, "alpha", 0.2))
    return aten.clamp.default(aten.add.Tensor(scaled, _attribute(node, "beta", 0.5)), 0, 1)


def softplus(node: Node, x: Tensor) -> Tensor:
    """log(1 + exp x); beyond 40 that is x in every dtype, float64 included."""
    return aten.softplus.default(x, 1, 40)


def softsign(node: Node, x: Tensor) -> Tensor:
    return aten.div.Tensor(x, aten.add.Tensor(aten.abs.default(x), 1))


def is_infinite(node: Node, x: Tensor) -> Tensor:
    both = node.attributes.get("detect_positive", 1), node.attributes.get("detect_negative", 1)
    match both:
        case 1, 1:
            return aten.isinf.default(x)
        case 1, 0:
            return aten.isposinf.default(x)
        case 0, 1:
            return aten.isneginf.default(x)
    return aten.zeros_like.default(x, dtype=torch.bool)


def one_hot(node: Node, index: Tensor, depth: Any, values: Tensor) -> Tensor:
    """values = [off, on]; a position outside [-depth, depth) is off everywhere."""
    count = int(number(depth))
    axis = node.attributes.get("axis", -1) % (index.dim() + 1)
    wanted = aten.where.self(aten.lt.Scalar(index, 0), aten.add.Tensor(index, count), index)
    shape = [1] * (index.dim() + 1)
    shape[axis] = count
    positions = aten.reshape.default(aten.arange.default(count, dtype=index.dtype, device=index.device), shape)
    on = aten.eq.Tensor(aten.unsqueeze.default(wanted, axis), positions)
    return aten.where.self(on, aten.select.int(values, 0, 1), aten.select.int(values, 0, 0))


TABLE: dict[str, Rule] = {
    **{
        name: _unary(call)
        for name, call in {
            "Abs": aten.abs.default,
            "Acos": aten.acos.default,
            "Acosh": aten.acosh.default,
            "Asin": aten.asin.default,
            "Asinh": aten.asinh.default,
            "Atan": aten.atan.default,
            "Atanh": aten.atanh.default,
            "Ceil": aten.ceil.default,
            "Cos": aten.cos.default,
            "Cosh": aten.cosh.default,
            "Erf": aten.erf.default,
            "Exp": aten.exp.default,
            "Floor": aten.floor.default,
            "HardSwish": aten.hardswish.default,
            "IsNaN": aten.isnan.default,
            "Log": aten.log.default,
            "Mish": aten.mish.default,
            "Neg": aten.neg.default,
            "Not": aten.logical_not.default,
            "Reciprocal": aten.reciprocal.default,
            "Relu": aten.relu.default,
            "Round": aten.round.default,
            "Sigmoid": aten.sigmoid.default,
            "Sign": aten.sign.default,
            "Sin": aten.sin.default,
            "Sinh": aten.sinh.default,
            "Sqrt": aten.sqrt.default,
            "Tan": aten.tan.default,
            "Tanh": aten.tanh.default,
        }.items()
    },
    "Add": _commutative(aten.add.Tensor),
    "Mul": _commutative(aten.mul.Tensor),
    "Sub": _binary(aten.sub.Tensor),
    "Div": Rule(divide, numbers=(1,)),
    "Mod": Rule(modulo, numbers=(1,)),
    "Pow": Rule(power, numbers=(1,)),
    "PRelu": Rule(prelu, numbers=(1,)),
    "Sum": Rule(_variadic(aten.add.Tensor)),
    "Max": Rule(_variadic(aten.maximum.default)),
    "Min": Rule(_variadic(aten.minimum.default)),
    "Mean": Rule(mean),
    "Equal": _binary(lambda a, b: aten.eq.Tensor(a, b) if isinstance(b, Tensor) else aten.eq.Scalar(a, b)),
    "Greater": _binary(lambda a, b: aten.gt.Tensor(a, b) if isinstance(b, Tensor) else aten.gt.Scalar(a, b)),
    "GreaterOrEqual": _binary(lambda a, b: aten.ge.Tensor(a, b) if isinstance(b, Tensor) else aten.ge.Scalar(a, b)),
    "Less": _binary(lambda a, b: aten.lt.Tensor(a, b) if isinstance(b, Tensor) else aten.lt.Scalar(a, b)),
    "LessOrEqual": _binary(lambda a, b: aten.le.Tensor(a, b) if isinstance(b, Tensor) else aten.le.Scalar(a, b)),
    "And": Rule(lambda node, a, b: aten.logical_and.default(a, b)),
    "Or": Rule(lambda node, a, b: aten.logical_or.default(a, b)),
    "Xor": Rule(lambda node, a, b: aten.logical_xor.default(a, b)),
    "Cast": Rule(cast),
    "Clip": Rule(clip, numbers=(1, 2)),
    "Gelu": Rule(gelu),
    "Swish": Rule(swish),
    "Elu": Rule(elu),
    "Celu": Rule(celu),
    "Selu": Rule(selu),
    "LeakyRelu": Rule(leaky_relu),
    "ThresholdedRelu": Rule(thresholded_relu),
    "HardSigmoid": Rule(hard_sigmoid),
    "Softplus": Rule(softplus),
    "Softsign": Rule(softsign),
    "IsInf": Rule(is_infinite),
    "OneHot": Rule(one_hot, contents=(1,)),
}
