"""Channels last: convolutions read and write feature maps `[B, *S, C]` instead of `[B, C, *S]`.

A convolution over channels-last maps is a matrix product that reads its input in place, and the layer norms, linear
layers and attention windows around it want that order anyway. So transpositions are *delayed*: a value known to be
`permute(base, axes)` is not computed until something needs it in its own order. Convolutions compute channels-last maps
and leave delayed values; element-wise operators, pooling, concatenation and reshapes act on the base and hand the
transposition on; two transpositions that undo each other leave nothing.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tvm import IRModule, ir, relax, tirx
from tvm.relax.expr_functor import PyExprMutator, mutator

from attnrewrite.lowering.schedules.stages import same

Call = Any  # tvm.ir.Call
Var = Any  # relax.Var

_UNARY = (
    "abs", "astype", "ceil", "clip", "erf", "exp", "floor", "log", "negative", "round", "rsqrt", "sigmoid", "sign",
    "sqrt", "square", "tanh", "nn.gelu", "nn.gelu_tanh", "nn.leakyrelu", "nn.relu", "nn.relu6", "nn.silu",
)  # fmt: skip
_BINARY = ("add", "divide", "maximum", "minimum", "multiply", "power", "subtract")


@dataclass(frozen=True)
class Delayed:
    """permute(base, axes), not computed: axis i of the value is axis `axes[i]` of the base."""

    base: Var
    axes: tuple[int, ...]

    @property
    def is_channels_last(self) -> bool:
        return self.axes == tuple(to_first(len(self.axes)))


def channels_last(mod: IRModule) -> IRModule:
    """The module with its 2-D convolutions of constant weights over channels-last maps, transpositions delayed.

    Grouped convolutions keep their order unless they are depthwise; so do 1 x 1 ones of a map that is not there in
    channels-last order already, because they are matrix products in place in either order.
    """
    return _Layout(mod).run()


def to_last(rank: int) -> list[int]:
    """Axes that transpose `[B, C, *S]` to `[B, *S, C]`."""
    return [0, *range(2, rank), 1]


def to_first(rank: int) -> list[int]:
    """Axes that transpose `[B, *S, C]` to `[B, C, *S]`."""
    return [0, rank - 1, *range(1, rank - 1)]


def _inverse(axes: Sequence[int]) -> list[int]:
    return [axes.index(axis) for axis in range(len(axes))]


def _shape(value: Any) -> list[Any] | None:
    shape = getattr(value.ty, "shape", None)
    return [*shape] if isinstance(shape, relax.ShapeExpr) else None


@mutator
class _Layout(PyExprMutator):  # type: ignore[misc]
    def __init__(self, mod: IRModule) -> None:
        super().__init__(mod)
        self._delayed: dict[Var, Delayed] = {}
        self._computed: dict[Var, Var] = {}
        self._constants: dict[Var, Any] = {}
        self._rules: dict[str, Callable[[Call], tuple[Any, Sequence[int]] | None]] = {
            "relax.nn.conv2d": self._convolution,
            "relax.nn.conv2d_transpose": self._transposed_convolution,
            "relax.permute_dims": self._permutation,
            "relax.reshape": self._reshape,
            "relax.concat": self._concatenation,
            "relax.mean": self._mean,
            "relax.image.resize2d": self._resize,
            "relax.nn.adaptive_avg_pool2d": self._adaptive_pooling,
            "relax.nn.avg_pool2d": self._pooling,
            "relax.nn.max_pool2d": self._pooling,
            **{f"relax.{name}": self._elementwise for name in (*_UNARY, *_BINARY)},
        }

    def run(self) -> IRModule:
        for name, func in self.builder_.get().functions.items():
            if isinstance(func, relax.Function):
                self.builder_.update_func(name, self.visit_expr(func))
        return self.builder_.get()

    def visit_var_binding_(self, binding: relax.VarBinding) -> None:
        call = binding.value
        rule = self._rules.get(call.op.name) if isinstance(call, ir.Call) and isinstance(call.op, ir.Op) else None
        found = rule(call) if rule is not None else None
        if found is None:
            super().visit_var_binding_(binding)
            self._note_constant(binding)
            return
        base, axes = found
        if isinstance(binding.var, relax.DataflowVar):
            self._delayed[binding.var] = Delayed(self._emitted(base), tuple(axes))
        else:  # an output
            result = self.builder_.emit_output(self._permuted(self._emitted(base), axes))
            self.set_var_remap(binding.var, result)

    def visit_dataflow_var_(self, var: relax.DataflowVar) -> Any:
        if var not in self._delayed:
            return super().visit_dataflow_var_(var)
        if var not in self._computed:
            delayed = self._delayed[var]
            self._computed[var] = self._permuted(delayed.base, delayed.axes)
        return self._computed[var]

    def _note_constant(self, binding: relax.VarBinding) -> None:
        """The importer reshapes biases, constants, to the rank of what they are added to."""
        call, shape = binding.value, _shape(binding.var)
        if shape is None or not isinstance(call, ir.Call) or call.op != ir.Op.get("relax.reshape"):
            return
        if isinstance(call.args[0], ir.GenericConst) and all(isinstance(extent, tirx.IntImm) for extent in shape):
            self._constants[binding.var] = relax.const(call.args[0].value.numpy().reshape([int(e) for e in shape]))

    def _emitted(self, value: Any) -> Var:
        return value if isinstance(value, relax.Var) else self.builder_.emit(value)

    def _permuted(self, value: Var, axes: Sequence[int]) -> Var:
        return value if [*axes] == sorted(axes) else self._emitted(relax.op.permute_dims(value, [*axes]))

    def _in_order(self, value: Var, axes: Sequence[int]) -> Var:
        """The base of the value as `permute(base, axes)`."""
        delayed = self._delayed.get(value)
        order = _inverse([*axes])
        if delayed is None:
            return self._permuted(self.visit_expr(value), order)
        return self._permuted(delayed.base, [delayed.axes[axis] for axis in order])

    def _convolution(self, call: Call) -> tuple[Any, Sequence[int]] | None:
        (data, weight), attributes = call.args, call.attrs
        if not isinstance(weight, ir.GenericConst) or _shape(data) is None:
            return None
        if (attributes.data_layout, attributes.kernel_layout, attributes.out_layout) != ("NCHW", "OIHW", "NCHW"):
            return None
        kernel = weight.value.numpy()
        groups, (outputs, per_group, *size) = int(attributes.groups), kernel.shape
        if groups != 1 and not (per_group == 1 and groups == outputs):
            return None
        strides, padding, dilation = (
            [int(v) for v in numbers] for numbers in (attributes.strides, attributes.padding, attributes.dilation)
        )
        if groups == 1 and size == strides == [1, 1] and not any(padding):
            if data not in self._delayed or not self._delayed[data].is_channels_last:
                return None
            weights = relax.const(np.ascontiguousarray(kernel[:, :, 0, 0].T))
            return relax.op.matmul(self._in_order(data, to_first(4)), weights), to_first(4)
        convolution = relax.op.nn.conv2d(
            self._in_order(data, to_first(4)),
            relax.const(np.ascontiguousarray(kernel.transpose(2, 3, 1, 0))),
            strides=strides,
            padding=padding,
            dilation=dilation,
            groups=groups,
            data_layout="NHWC",
            kernel_layout="HWIO",
            out_layout="NHWC",
        )
        return convolution, to_first(4)

    def _transposed_convolution(self, call: Call) -> tuple[Any, Sequence[int]] | None:
        """A convolution that computes all pixels of a step at once, one after the other in the channels, which then are
        shuffled into the map, and the border cut off.
        """
        (data, weight), attributes, shape = call.args, call.attrs, _shape(call)
        if not isinstance(weight, ir.GenericConst) or int(attributes.groups) != 1 or shape is None:
            return None
        strides, padding, dilation = (
            [int(v) for v in numbers] for numbers in (attributes.strides, attributes.padding, attributes.dilation)
        )
        if (attributes.data_layout, attributes.kernel_layout) != ("NCHW", "IOHW") or dilation != [1, 1]:
            return None
        before = _shape(data)
        if before is None or not all(isinstance(extent, tirx.IntImm) for extent in (*before[1:], *shape[1:])):
            return None
        kernel, reach = step_kernel(weight.value.numpy(), strides)
        batch, outputs, height, width = shape
        steps = [int(before[2 + a]) + reach[a] - 1 for a in range(2)]
        if any(padding[a] + int(shape[2 + a]) > steps[a] * strides[a] for a in range(2)):
            return None  # output padding beyond all that the kernel reaches
        border = [extent - 1 for extent in reach]
        convolution = relax.op.nn.conv2d(
            self._in_order(data, to_first(4)),
            relax.const(kernel),
            padding=[*border, *border],
            data_layout="NHWC",
            kernel_layout="HWIO",
            out_layout="NHWC",
        )
        apart = relax.op.reshape(self._emitted(convolution), [batch, *steps, *strides, outputs])
        shuffled = self._permuted(self._emitted(apart), [0, 1, 3, 2, 4, 5])
        extents = [steps[a] * strides[a] for a in range(2)]
        whole = self._emitted(relax.op.reshape(shuffled, [batch, *extents, outputs]))
        if extents == [int(height), int(width)]:
            return whole, to_first(4)
        ends = [padding[0] + int(height), padding[1] + int(width)]
        return relax.op.strided_slice(whole, [1, 2], padding[:2], ends), to_first(4)

    def _permutation(self, call: Call) -> tuple[Any, Sequence[int]]:
        source = call.args[0]
        axes = [int(a) for a in call.attrs.axes] if call.attrs.axes else [*reversed(range(int(source.ty.ndim)))]
        delayed = self._delayed.get(source)
        if delayed is None:
            return self._emitted(self.visit_expr(source)), axes
        return delayed.base, [delayed.axes[axis] for axis in axes]

    def _reshape(self, call: Call) -> tuple[Any, Sequence[int]] | None:
        """Axes merged or split within the base, where those that are merged lie side by side there."""
        source = call.args[0]
        delayed, before, after = self._delayed.get(source), _shape(source), _shape(call)
        if delayed is None or before is None or after is None:
            return None
        groups = _groups(before, after)
        if groups is None:
            return None
        merged = [[delayed.axes[axis] for axis in old] for old, _ in groups]
        if any(right != left + 1 for places in merged for left, right in itertools.pairwise(places)):
            if len(after) != 4 or [*map(len, (new for _, new in groups))] != [1, 1, 1, 1]:
                return None
            # What moves anyway, as in a pixel shuffle, becomes a map with its channels last.
            order = [axis for group in (0, 2, 3, 1) for axis in groups[group][0]]
            base = self._permuted(delayed.base, [delayed.axes[axis] for axis in order])
            return relax.op.reshape(base, [after[axis] for axis in to_last(4)]), to_first(4)
        in_base = sorted(range(len(groups)), key=lambda g: merged[g][0])
        order = [axis for g in in_base for axis in groups[g][1]]
        return relax.op.reshape(delayed.base, [after[axis] for axis in order]), _inverse(order)

    def _elementwise(self, call: Call) -> tuple[Any, Sequence[int]] | None:
        rank = int(call.ty.ndim)
        found = [d for d in map(self._delayed.get, call.args) if d is not None and len(d.axes) == rank]
        if not found:
            return None
        axes = next((d.axes for d in found if d.is_channels_last), found[0].axes)
        operands = [self._operand(argument, axes) for argument in call.args]
        if any(operand is None for operand in operands):
            return None
        return ir.Call(call.op, operands, call.attrs, call.ty_args), axes

    def _operand(self, value: Any, axes: Sequence[int]) -> Any:
        """An operand of an element-wise operator in the order of the base; None where its axes are not all there."""
        value = self._constants.get(value, value)
        if isinstance(value.ty, ir.PrimType):
            return value  # a number, such as the bounds of a clip
        if isinstance(value, ir.GenericConst):
            array = value.value.numpy()
            if array.size == 1:
                return value
            whole = array.reshape((1,) * (len(axes) - array.ndim) + array.shape)
            return relax.const(np.ascontiguousarray(whole.transpose(_inverse([*axes]))))
        return self._in_order(value, axes) if int(value.ty.ndim) == len(axes) else None

    def _concatenation(self, call: Call) -> tuple[Any, Sequence[int]] | None:
        parts = call.args[0].fields if isinstance(call.args[0], relax.Tuple) else []
        axes = next((self._delayed[part].axes for part in parts if part in self._delayed), None)
        if axes is None or any(isinstance(part, ir.GenericConst) for part in parts):
            return None
        return relax.op.concat([self._in_order(part, axes) for part in parts], axes[int(call.attrs.axis)]), axes

    def _mean(self, call: Call) -> tuple[Any, Sequence[int]] | None:
        delayed, reduced = self._delayed.get(call.args[0]), call.attrs.axis
        if delayed is None or reduced is None:
            return None
        rank = len(delayed.axes)
        gone = {int(axis) % rank for axis in reduced}
        mean = relax.op.mean(delayed.base, sorted(delayed.axes[axis] for axis in gone), bool(call.attrs.keepdims))
        if call.attrs.keepdims:
            return mean, delayed.axes
        left = [delayed.axes[axis] for axis in range(rank) if axis not in gone]
        return mean, [sorted(left).index(axis) for axis in left]

    def _channels_last_map(self, call: Call) -> Var | None:
        """The first operand of a pooling operator, where it is there in channels-last order."""
        delayed = self._delayed.get(call.args[0])
        layout = getattr(call.attrs, "layout", "")
        return delayed.base if delayed is not None and delayed.is_channels_last and layout == "NCHW" else None

    def _pooling(self, call: Call) -> tuple[Any, Sequence[int]] | None:
        base, attributes = self._channels_last_map(call), call.attrs
        if base is None:
            return None
        make = relax.op.nn.max_pool2d if call.op.name == "relax.nn.max_pool2d" else relax.op.nn.avg_pool2d
        pooled = make(
            base,
            pool_size=attributes.pool_size,
            strides=attributes.strides,
            padding=attributes.padding,
            dilation=attributes.dilation,
            ceil_mode=attributes.ceil_mode,
            count_include_pad=attributes.count_include_pad,
            layout="NHWC",
            out_layout="NHWC",
        )
        return pooled, to_first(4)

    def _adaptive_pooling(self, call: Call) -> tuple[Any, Sequence[int]] | None:
        base = self._channels_last_map(call)
        if base is None:
            return None
        return relax.op.nn.adaptive_avg_pool2d(base, call.attrs.output_size, "NHWC", "NHWC"), to_first(4)

    def _resize(self, call: Call) -> tuple[Any, Sequence[int]] | None:
        base, attributes = self._channels_last_map(call), call.attrs
        if base is None:
            return None
        resized = relax.op.image.resize2d(
            base,
            call.args[1],
            roi=[float(v) for v in attributes.roi],
            layout="NHWC",
            method=attributes.method,
            coordinate_transformation_mode=attributes.coordinate_transformation_mode,
            rounding_method=attributes.rounding_method,
            cubic_alpha=attributes.cubic_alpha,
            cubic_exclude=attributes.cubic_exclude,
            extrapolation_value=attributes.extrapolation_value,
            out_dtype=attributes.out_dtype,
        )
        return resized, to_first(4)


def step_kernel(weights: np.ndarray, strides: Sequence[int]) -> tuple[np.ndarray, list[int]]:
    """Weights `[I, O, kh, kw]` of a transposed convolution as those of a convolution, `[mh, mw, I, sh * sw * O]`, and
    (mh, mw), the inputs that a pixel reads per axis.

    Output pixel q s + r is the sum over m of input[q - m] * weights[r + s m]: for each of the s values of r a
    convolution of its own, with m backwards.
    """
    inputs, outputs, *size = weights.shape
    reach = [-(-k // s) for k, s in zip(size, strides, strict=True)]
    padded = np.zeros((inputs, outputs, *(m * s for m, s in zip(reach, strides, strict=True))), weights.dtype)
    padded[:, :, : size[0], : size[1]] = weights
    apart = padded.reshape(inputs, outputs, reach[0], strides[0], reach[1], strides[1])[:, :, ::-1, :, ::-1]
    kernel = apart.transpose(2, 4, 0, 3, 5, 1).reshape(*reach, inputs, strides[0] * strides[1] * outputs)
    return np.ascontiguousarray(kernel), reach


def _groups(before: Sequence[Any], after: Sequence[Any]) -> list[tuple[list[int], list[int]]] | None:
    """A reshape as the fewest groups of consecutive axes with the same product before and after; None where a symbolic
    extent leaves that open. Each group has an axis on both sides.
    """
    groups: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(before) and j < len(after):
        if not isinstance(before[i], tirx.IntImm) or not isinstance(after[j], tirx.IntImm):
            if not same(before[i], after[j]):
                return None
            groups.append(([i], [j]))
            i, j = i + 1, j + 1
            continue
        old, new = [i], [j]
        while math.prod(int(before[a]) for a in old) != math.prod(int(after[a]) for a in new):
            smaller = math.prod(int(before[a]) for a in old) < math.prod(int(after[a]) for a in new)
            side, extents = (old, before) if smaller else (new, after)
            side.append(side[-1] + 1)
            if side[-1] == len(extents) or not isinstance(extents[side[-1]], tirx.IntImm):
                return None
        i, j = old[-1] + 1, new[-1] + 1
        groups.append((old, new))
    for rest, extents, of_side in ((i, before, 0), (j, after, 1)):
        for axis in range(rest, len(extents)):  # of extent 1
            if not groups or not isinstance(extents[axis], tirx.IntImm) or int(extents[axis]) != 1:
                return None
            groups[-1][of_side].append(axis)
    return groups
