"""What single nodes compute, as linear operators: convolutions, matrix products, normalisations, scales, means, crops.

Whatever is not here is where an operator starts: an activation, a quantisation, a product of two computed tensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from attnrewrite.dims import Extent, Shape, static
from attnrewrite.floats import is_float
from attnrewrite.frontend.evaluate import python_slice
from attnrewrite.graph import STANDARD_DOMAIN, Node, Value
from attnrewrite.reparam.operator import Axis, Inexact, Linear, Operator, Scaling, depthwise

# They multiply and sum over many elements: a fold replaces at least one of them.
PRODUCTS = frozenset({"Conv", "Gemm", "MatMul"})
SUMS = frozenset({"Add", "Sub", "Sum"})

COMPUTED = Inexact("a branch computes its weights")


@dataclass(frozen=True, eq=False)
class Reading:
    """A node's result as an operator on one of its inputs."""

    source: Value
    operator: Linear


def read_linear(node: Node) -> Reading | Inexact | None:
    """The operator of a node that reads one tensor; None where it is none, Inexact where it only looks like one."""
    reader = _READERS.get(node.op) if node.domain == STANDARD_DOMAIN else None
    if reader is None or not all(_is_float(v) for v in (node.output, node.input(0))) or node.captures:
        return None
    return reader(node)


def summands(node: Node) -> list[tuple[int, Value]]:
    """(sign, value) of what an Add, Sub or Sum adds up; empty for any other node."""
    if node.op not in SUMS or node.domain != STANDARD_DOMAIN or not _is_float(node.output):
        return []
    values = [v for v in node.inputs if v is not None]
    return [(-1 if node.op == "Sub" and k else 1, v) for k, v in enumerate(values)]


def _is_float(value: Value | None) -> bool:
    return value is not None and value.shape is not None and value.dtype is not None and is_float(value.dtype)


def _wide(value: Value) -> np.ndarray:
    return np.asarray(value.constant).astype(np.float64)


def _conv(node: Node) -> Reading | Inexact | None:
    data, weight, bias = node.required(0), node.required(1), node.input(2)
    if not weight.is_constant or (bias is not None and not bias.is_constant):
        return COMPUTED
    filters, own, *taps = (static(e) for e in weight.known_shape)
    axes = _window(node, data.known_shape, node.output.known_shape, taps)
    if axes is None:
        return None
    groups = node.attributes.get("group", 1)
    return Reading(
        data,
        Operator(
            own * groups,
            filters,
            groups,
            axes,
            1,
            lambda: _wide(weight),
            None if bias is None else lambda: _wide(bias),
        ),
    )


def _window(node: Node, shape: Shape, result: Shape, taps: list[int]) -> tuple[Axis, ...] | None:
    """The axes of a convolution or a pool; None where `auto_pad` leaves the padding to extents nobody knows."""
    rank = len(taps)
    strides, dilations = (list(node.attributes.get(name) or [1] * rank) for name in ("strides", "dilations"))
    automatic = node.attributes.get("auto_pad", "NOTSET")
    automatic = automatic.decode() if isinstance(automatic, bytes) else automatic
    if automatic in ("NOTSET", "VALID"):
        pads = list(node.attributes.get("pads") or [0] * 2 * rank) if automatic == "NOTSET" else [0] * 2 * rank
        return tuple(map(Axis, taps, strides, dilations, pads[:rank], pads[rank:]))
    axes = []
    for tap, stride, dilation, extent, steps in zip(taps, strides, dilations, shape[2:], result[2:], strict=True):
        reach = (tap - 1) * dilation
        if stride == 1:
            total = reach
        elif isinstance(extent, int) and isinstance(steps, int):
            total = max((steps - 1) * stride + reach + 1 - extent, 0)
        else:
            return None
        less, more = total // 2, total - total // 2
        begin, end = (less, more) if automatic == "SAME_UPPER" else (more, less)
        axes.append(Axis(tap, stride, dilation, begin, end))
    return tuple(axes)


def _average_pool(node: Node) -> Reading | Inexact | None:
    data, result = node.required(0), node.output
    taps = list(node.attributes["kernel_shape"])
    axes = _window(node, data.known_shape, result.known_shape, taps)
    if axes is None:
        return None
    padded = any(a.begin or a.end for a in axes)
    if padded and not node.attributes.get("count_include_pad", 0):
        return Inexact("means that leave the padding out")
    if node.attributes.get("ceil_mode", 0) and not _is_whole(axes, data.known_shape, result.known_shape):
        return Inexact("means of windows that reach beyond the padding")
    channels = static(data.known_shape[1])
    kernel = np.full((channels, 1, *taps), 1 / math.prod(taps))
    return Reading(data, Operator(channels, channels, channels, axes, 1, lambda: kernel))


def _is_whole(axes: tuple[Axis, ...], shape: Shape, result: Shape) -> bool:
    """Whether every window lies inside the padded input; False where that is not known."""
    return all(
        isinstance(e, int) and isinstance(n, int) and (n - 1) * a.stride + a.reach < e + a.begin + a.end
        for a, e, n in zip(axes, shape[2:], result[2:], strict=True)
    )


def _batch_normalization(node: Node) -> Reading | Inexact | None:
    """(x - mean) / sqrt(variance + epsilon) * scale + bias, by the statistics that were collected."""
    if node.attributes.get("training_mode", 0):
        return Inexact("a BatchNormalization in training mode")
    data, operands = node.required(0), [node.required(k) for k in range(1, 5)]
    if not all(v.is_constant for v in operands):
        return COMPUTED
    if len(data.known_shape) < 2:
        return None
    epsilon = node.attributes.get("epsilon", 1e-5)
    channels = static(operands[0].known_shape[0])

    def factors() -> np.ndarray:
        return _wide(operands[0]) / np.sqrt(_wide(operands[3]) + epsilon)

    return Reading(
        data,
        Operator(
            channels,
            channels,
            channels,
            (Axis(),) * (len(data.known_shape) - 2),
            1,
            lambda: factors().reshape(channels, *[1] * (len(data.known_shape) - 1)),
            lambda: _wide(operands[1]) - _wide(operands[2]) * factors(),
        ),
    )


def _scale(node: Node) -> Reading | Inexact | None:
    """x * c or x / c, of numbers c per channel."""
    data, factor = node.required(0), node.required(1)
    if node.op == "Mul" and data.is_constant:
        data, factor = factor, data
    if data.is_constant or not factor.is_constant:
        return None
    return _per_channel(node, data, factor, lambda c: (1 / c if node.op == "Div" else c, None))


def _offset(node: Node) -> Reading | Inexact | None:
    """x + c, x - c or c - x, of numbers c per channel."""
    if len(node.inputs) != 2:
        return None
    data, other = node.required(0), node.required(1)
    sign, factor = (-1.0 if node.op == "Sub" else 1.0), 1.0
    if data.is_constant:
        data, other, sign, factor = other, data, 1.0, sign
    if data.is_constant or not other.is_constant:
        return None
    return _per_channel(node, data, other, lambda c: (np.full(c.shape, factor), sign * c))


Line = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray | None]]


def _per_channel(node: Node, data: Value, constant: Value, line: Line) -> Reading | None:
    if node.output.known_shape != data.known_shape or not _is_float(data):
        return None
    operator = _line(constant, data.known_shape, line)
    return None if operator is None else Reading(data, operator)


def read_offset(value: Value, shape: Shape) -> Linear | None:
    """x -> x + value on values of a shape; None for a constant that is neither one number nor one per channel."""
    return _line(value, shape, lambda c: (np.ones(c.shape), c)) if value.is_constant else None


def _line(constant: Value, shape: Shape, line: Line) -> Linear | None:
    """factors * x + offsets, with line(c) = (factors, offsets) of the numbers of a constant."""
    axis = None if constant.shape is None else channel_axis_of(constant.shape, shape)
    if axis is None:
        return None
    if axis < 0:
        factors, offsets = line(_wide(constant).reshape(1))
        return Scaling(float(factors[0]), 0.0 if offsets is None else float(offsets[0]))
    rank = len(shape) - 2 if axis == 1 else 0
    channels = static(shape[axis])

    def offsets_of() -> np.ndarray:
        offsets = line(_wide(constant).reshape(-1))[1]
        assert offsets is not None
        return offsets

    return Operator(
        channels,
        channels,
        channels,
        (Axis(),) * rank,
        axis,
        lambda: line(_wide(constant).reshape(-1))[0].reshape(channels, 1, *[1] * rank),
        None if line(np.ones(channels))[1] is None else offsets_of,
    )


def channel_axis_of(constant: Shape, data: Shape) -> int | None:
    """The axis along which a constant varies, if that is the channels' of the data; -1 for a single number."""
    full = (1,) * (len(data) - len(constant)) + tuple(constant)
    varying = [k for k, e in enumerate(full) if e != 1]
    if len(full) != len(data) or any(full[k] != data[k] for k in varying) or len(varying) > 1:
        return None
    if not varying:
        return -1
    return varying[0] if varying[0] in (1, len(data) - 1) and len(data) > 1 else None


def _negation(node: Node) -> Reading:
    return Reading(node.required(0), Scaling(-1.0))


def _itself(node: Node) -> Reading | None:
    """Identity, and Dropout where it does not drop."""
    mode = node.input(2)
    if node.op == "Dropout" and mode is not None and not (mode.is_constant and not np.any(mode.constant)):
        return None
    return Reading(node.required(0), Scaling())


def _matmul(node: Node) -> Reading | Inexact | None:
    data, weight = node.required(0), node.required(1)
    if data.is_constant or not weight.is_constant or len(weight.known_shape) != 2 or len(data.known_shape) < 2:
        return None
    rows, columns = (static(e) for e in weight.known_shape)
    last = len(data.known_shape) - 1
    return Reading(data, Operator(rows, columns, 1, (), last, lambda: _wide(weight).T))


def _gemm(node: Node) -> Reading | Inexact | None:
    data, weight, bias = node.required(0), node.required(1), node.input(2)
    if node.attributes.get("transA", 0) or data.is_constant or not weight.is_constant:
        return None
    if bias is not None and not bias.is_constant:
        return COMPUTED
    outward = bool(node.attributes.get("transB", 0))
    columns, rows = (static(e) for e in weight.known_shape[:: 1 if outward else -1])
    if bias is not None and channel_axis_of(bias.known_shape, node.output.known_shape) not in (1, -1):
        return None
    alpha, beta = (node.attributes.get(name, 1.0) for name in ("alpha", "beta"))

    def offsets() -> np.ndarray:
        assert bias is not None
        return beta * np.broadcast_to(_wide(bias).reshape(-1), (columns,))

    return Reading(
        data,
        Operator(
            rows,
            columns,
            1,
            (),
            1,
            lambda: alpha * (_wide(weight) if outward else _wide(weight).T),
            None if bias is None else offsets,
        ),
    )


def _pad(node: Node) -> Reading | Inexact | None:
    """Zeros around the spatial axes."""
    mode = node.attributes.get("mode", "constant")
    data, pads, fill, axes = node.required(0), node.constant(1), node.input(2), node.input(3)
    if mode not in ("constant", b"constant") or pads is None or (fill is not None and not fill.is_constant):
        return None
    if fill is not None and np.any(fill.constant != 0):
        return None
    rank = len(data.known_shape)
    if axes is not None and not axes.is_constant:
        return None
    chosen = [int(a) % rank for a in axes.constant] if axes is not None else list(range(rank))
    around = [(0, 0)] * rank
    for k, axis in enumerate(chosen):
        around[axis] = (int(pads[k]), int(pads[k + len(chosen)]))
    return _moved(data, around)


def _slice(node: Node) -> Reading | Inexact | None:
    """A crop of the spatial axes."""
    data = node.required(0)
    starts, ends, axes, steps = (node.constant(k) for k in range(1, 5))
    if starts is None or ends is None:
        return None
    rank = len(data.known_shape)
    around: list[tuple[int, int]] = [(0, 0)] * rank
    for k, (start, end) in enumerate(zip(starts.reshape(-1), ends.reshape(-1), strict=True)):
        axis = int(axes.reshape(-1)[k]) % rank if axes is not None else k
        extent = data.known_shape[axis]
        if steps is not None and steps.reshape(-1)[k] != 1:
            return None
        cut = _cut(int(start), int(end), extent)
        if cut is None:
            return None
        around[axis] = cut
    return _moved(data, around)


def _cut(start: int, end: int, extent: Extent) -> tuple[int, int] | None:
    """How much a slice leaves away on either side, as negative padding; None where that depends on the extent."""
    if isinstance(extent, int):
        kept = python_slice(start, end, 1, extent)
        return -kept.start, kept.stop - extent
    if start < 0 or 0 <= end < 1 << 31:
        return None
    return -start, end if end < 0 else 0


def _moved(data: Value, around: list[tuple[int, int]]) -> Reading | None:
    """x with so many zeros around every axis, or with so many elements left out."""
    if not any(any(pair) for pair in around):
        return Reading(data, Scaling())
    if len(around) < 3 or any(around[0]) or any(around[1]):
        return None
    channels = static(data.known_shape[1])
    axes = tuple(Axis(begin=before, end=after) for before, after in around[2:])
    same = depthwise(np.ones(channels), None, 1, len(axes))
    return Reading(data, Operator(channels, channels, channels, axes, 1, same.kernel))


_READERS: dict[str, Callable[[Node], Reading | Inexact | None]] = {
    "Conv": _conv,
    "BatchNormalization": _batch_normalization,
    "AveragePool": _average_pool,
    "Mul": _scale,
    "Div": _scale,
    "Add": _offset,
    "Sub": _offset,
    "Sum": _offset,
    "Neg": _negation,
    "Identity": _itself,
    "Dropout": _itself,
    "MatMul": _matmul,
    "Gemm": _gemm,
    "Pad": _pad,
    "Slice": _slice,
}
