"""Operators that mix elements as torch functions: products, convolutions, softmaxes, normalisations, reductions."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from torch import Tensor

from attnrewrite.frontend.fx.emit_movement import zero_padded
from attnrewrite.frontend.fx.entry import Extent, NotInTorch, Rule, aten, axes_of, ints, number, text
from attnrewrite.graph import Node


def matmul(node: Node, a: Tensor, b: Tensor) -> Tensor:
    return aten.matmul.default(a, b)


def gemm(node: Node, a: Tensor, b: Tensor, c: Tensor | None = None) -> Tensor:
    alpha, beta = (node.attributes.get(name, 1.0) for name in ("alpha", "beta"))
    a = aten.permute.default(a, [1, 0]) if node.attributes.get("transA", 0) else a
    transposed = bool(node.attributes.get("transB", 0))
    if transposed and alpha == beta == 1.0 and (c is None or (c.dim() == 1 and c.shape[0] == b.shape[0])):
        return aten.linear.default(a, b, c)
    b = aten.permute.default(b, [1, 0]) if transposed else b
    if c is not None:
        return aten.addmm.default(c, a, b, beta=beta, alpha=alpha)
    product = aten.mm.default(a, b)
    return product if alpha == 1.0 else aten.mul.Tensor(product, alpha)


def einsum(node: Node, *operands: Tensor) -> Tensor:
    return aten.einsum.default(text(node.attributes["equation"]), list(operands))


def _spatial(node: Node, name: str, rank: int, default: int) -> list[int]:
    return [int(n) for n in node.attributes.get(name) or [default] * rank]


def _pads(
    node: Node, data: Tensor, kernel: list[int], strides: list[int], dilations: list[int]
) -> tuple[list[Extent], list[Extent]]:
    """Padding before and after each spatial axis, which `auto_pad` leaves to the extents."""
    rank, automatic = len(kernel), text(node.attributes.get("auto_pad", "NOTSET"))
    if automatic == "NOTSET":
        pads: list[Extent] = list(_spatial(node, "pads", 2 * rank, 0))
        return pads[:rank], pads[rank:]
    if automatic == "VALID":
        return [0] * rank, [0] * rank
    before: list[Extent] = []
    after: list[Extent] = []
    for extent, size, stride, dilation in zip(data.shape[2:], kernel, strides, dilations, strict=True):
        steps = (extent + stride - 1) // stride
        total = max((steps - 1) * stride + (size - 1) * dilation + 1 - extent, 0)
        small, large = total // 2, total - total // 2
        before.append(small if automatic == "SAME_UPPER" else large)
        after.append(large if automatic == "SAME_UPPER" else small)
    return before, after


def _around(before: list[Extent], after: list[Extent]) -> dict[int, tuple[Extent, Extent]]:
    return {2 + k: both for k, both in enumerate(zip(before, after, strict=True))}


def conv(node: Node, data: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    rank = data.dim() - 2
    strides, dilations = (_spatial(node, name, rank, 1) for name in ("strides", "dilations"))
    before, after = _pads(node, data, [int(e) for e in weight.shape[2:]], strides, dilations)
    if before != after:
        data = zero_padded(data, _around(before, after))
        before = [0] * rank
    groups = node.attributes.get("group", 1)
    return aten.convolution.default(data, weight, bias, strides, before, dilations, False, [0] * rank, groups)


def conv_transpose(node: Node, data: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Padding crops the result; uneven padding is cropped afterwards, and so is what `output_shape` leaves over."""
    rank = data.dim() - 2
    strides, dilations = (_spatial(node, name, rank, 1) for name in ("strides", "dilations"))
    beyond = _spatial(node, "output_padding", rank, 0)
    kernel = [int(e) for e in weight.shape[2:]]
    automatic, wanted = text(node.attributes.get("auto_pad", "NOTSET")), node.attributes.get("output_shape")
    if wanted is None and automatic.startswith("SAME"):
        wanted = [e * s for e, s in zip(data.shape[2:], strides, strict=True)]
    if wanted is None:
        before, after = _pads(node, data, kernel, strides, dilations)
    else:
        full = [
            (e - 1) * s + (k - 1) * d + 1 + o
            for e, s, k, d, o in zip(data.shape[2:], strides, kernel, dilations, beyond, strict=True)
        ]
        total = [have - want for have, want in zip(full, list(wanted)[-rank:], strict=True)]
        less, more = [t // 2 for t in total], [t - t // 2 for t in total]
        before, after = (less, more) if automatic == "SAME_UPPER" else (more, less)
    groups = node.attributes.get("group", 1)
    even = before == after and all(isinstance(b, int) and b >= 0 for b in before)
    inside = before if even else [0] * rank
    result = aten.convolution.default(data, weight, bias, strides, inside, dilations, True, beyond, groups)
    return result if even else zero_padded(result, _around([-b for b in before], [-a for a in after]))


def softmax(node: Node, x: Tensor) -> Tensor:
    return aten.softmax.int(x, node.attributes.get("axis", -1))


def log_softmax(node: Node, x: Tensor) -> Tensor:
    return aten.log_softmax.int(x, node.attributes.get("axis", -1))


def layer_normalization(
    node: Node, x: Tensor, scale: Tensor | None = None, bias: Tensor | None = None
) -> Tensor | list[Tensor]:
    """Over all axes from `axis` on; scale and bias may have fewer axes than those."""
    shape = list(x.shape[node.attributes.get("axis", -1) % x.dim() :])
    scale, bias = (v if v is None or v.dim() == len(shape) else aten.expand.default(v, shape) for v in (scale, bias))
    epsilon = node.attributes.get("epsilon", 1e-5)
    if len(node.outputs) == 1:
        return aten.layer_norm.default(x, shape, scale, bias, epsilon)
    return list(aten.native_layer_norm.default(x, shape, scale, bias, epsilon))


def rms_normalization(node: Node, x: Tensor, scale: Tensor) -> Tensor:
    shape = list(x.shape[node.attributes.get("axis", -1) % x.dim() :])
    scale = scale if scale.dim() == len(shape) else aten.expand.default(scale, shape)
    return aten.rms_norm.default(x, shape, scale, node.attributes.get("epsilon", 1e-5))


def lp_normalization(node: Node, x: Tensor) -> Tensor:
    """x / ||x|| along an axis, 0 where all of it is 0."""
    axis, order = node.attributes.get("axis", -1), node.attributes.get("p", 2)
    norm = aten.linalg_vector_norm.default(x, order, [axis], True)
    return aten.div.Tensor(x, aten.masked_fill.Scalar(norm, aten.eq.Scalar(norm, 0), 1))


def batch_normalization(node: Node, x: Tensor, scale: Tensor, bias: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    if node.attributes.get("training_mode", 0):
        raise NotInTorch("BatchNormalization in training mode")
    epsilon = node.attributes.get("epsilon", 1e-5)
    return aten.batch_norm.default(x, scale, bias, mean, variance, False, 0.1, epsilon, False)


def instance_normalization(node: Node, x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    return aten.instance_norm.default(
        x, scale, bias, None, None, True, 0.1, node.attributes.get("epsilon", 1e-5), False
    )


def group_normalization(node: Node, x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """Scale and bias are of the channels, or before opset 21 of the groups."""
    groups, channels = node.attributes["num_groups"], int(x.shape[1])
    if scale.shape[0] != channels:
        scale, bias = (
            aten.reshape.default(aten.expand.default(aten.unsqueeze.default(v, 1), [groups, channels // groups]), [-1])
            for v in (scale, bias)
        )
    return aten.group_norm.default(x, groups, scale, bias, node.attributes.get("epsilon", 1e-5), False)


def _reduction(call: Callable[[Tensor, list[int], bool], Tensor]) -> Rule:
    """Over the axes of the operand or of the attribute, over all where there are none."""

    def entry(node: Node, x: Tensor, axes: np.ndarray | None = None) -> Tensor:
        chosen = axes_of(node, axes, x.dim())
        if not chosen and node.attributes.get("noop_with_empty_axes", 0):
            return x
        return call(x, chosen or list(range(x.dim())), bool(node.attributes.get("keepdims", 1)))

    return Rule(entry, contents=(1,))


def _sum(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    return aten.sum.dim_IntList(x, axes, keep, dtype=x.dtype)


def _product(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    for axis in sorted(axes, reverse=True):
        x = aten.prod.dim_int(x, axis, keep, dtype=x.dtype)
    return x


def cumulative_sum(node: Node, x: Tensor, axis: Any) -> Tensor:
    at = int(number(axis)) % x.dim()
    backwards = bool(node.attributes.get("reverse", 0))
    x = aten.flip.default(x, [at]) if backwards else x
    total = aten.cumsum.default(x, at, dtype=x.dtype)
    total = aten.sub.Tensor(total, x) if node.attributes.get("exclusive", 0) else total
    return aten.flip.default(total, [at]) if backwards else total


def _arg(call: Callable[[Tensor, int, bool], Tensor]) -> Rule:
    """Of equal elements the first, or with `select_last_index` the last."""

    def entry(node: Node, x: Tensor) -> Tensor:
        axis, keep = node.attributes.get("axis", 0) % x.dim(), bool(node.attributes.get("keepdims", 1))
        if not node.attributes.get("select_last_index", 0):
            return call(x, axis, keep)
        found = call(aten.flip.default(x, [axis]), axis, keep)
        return aten.sub.Tensor(aten.full_like.default(found, x.shape[axis] - 1), found)

    return Rule(entry)


def top_k(node: Node, x: Tensor, k: Any) -> list[Tensor]:
    axis, largest = node.attributes.get("axis", -1), bool(node.attributes.get("largest", 1))
    return list(aten.topk.default(x, ints(k)[0], axis, largest, bool(node.attributes.get("sorted", 1))))


def _pool_geometry(node: Node, x: Tensor) -> tuple[list[int], list[int], list[int], list[Extent], list[Extent]]:
    kernel = [int(n) for n in node.attributes["kernel_shape"]]
    strides, dilations = (_spatial(node, name, len(kernel), 1) for name in ("strides", "dilations"))
    return kernel, strides, dilations, *_pads(node, x, kernel, strides, dilations)


def max_pool(node: Node, x: Tensor) -> Tensor:
    """Without the positions of the maxima."""
    if len(node.outputs) > 1:
        raise NotInTorch("MaxPool with the positions of the maxima")
    kernel, strides, dilations, before, after = _pool_geometry(node, x)
    if before != after or any(2 * b > k for b, k in zip(before, kernel, strict=True)):
        x, before = zero_padded(x, _around(before, after), -math.inf), [0] * len(kernel)
    call = {1: aten.max_pool1d, 2: aten.max_pool2d, 3: aten.max_pool3d}[len(kernel)].default
    return call(x, kernel, strides, before, dilations, bool(node.attributes.get("ceil_mode", 0)))


def average_pool(node: Node, x: Tensor) -> Tensor:
    kernel, strides, dilations, before, after = _pool_geometry(node, x)
    counted, ceil = (bool(node.attributes.get(name, 0)) for name in ("count_include_pad", "ceil_mode"))
    if any(d != 1 for d in dilations) or before != after:
        raise NotInTorch("AveragePool with dilation or uneven padding")
    match len(kernel):
        case 1:
            return aten.avg_pool1d.default(x, kernel, strides, before, ceil, counted)
        case 2:
            return aten.avg_pool2d.default(x, kernel, strides, before, ceil, counted)
    return aten.avg_pool3d.default(x, kernel, strides, before, ceil, counted)


def global_average_pool(node: Node, x: Tensor) -> Tensor:
    return aten.mean.dim(x, list(range(2, x.dim())), True)


def global_max_pool(node: Node, x: Tensor) -> Tensor:
    return aten.amax.default(x, list(range(2, x.dim())), True)


TABLE: dict[str, Rule] = {
    "MatMul": Rule(matmul),
    "Gemm": Rule(gemm),
    "Einsum": Rule(einsum),
    "Conv": Rule(conv),
    "ConvTranspose": Rule(conv_transpose),
    "Softmax": Rule(softmax),
    "LogSoftmax": Rule(log_softmax),
    "LayerNormalization": Rule(layer_normalization),
    "RMSNormalization": Rule(rms_normalization),
    "LpNormalization": Rule(lp_normalization),
    "BatchNormalization": Rule(batch_normalization),
    "InstanceNormalization": Rule(instance_normalization),
    "GroupNormalization": Rule(group_normalization),
    "ReduceSum": _reduction(_sum),
    "ReduceMean": _reduction(lambda x, axes, keep: aten.mean.dim(x, axes, keep)),
    "ReduceMax": _reduction(lambda x, axes, keep: aten.amax.default(x, axes, keep)),
    "ReduceMin": _reduction(lambda x, axes, keep: aten.amin.default(x, axes, keep)),
    "ReduceProd": _reduction(_product),
    "ReduceL1": _reduction(lambda x, axes, keep: _sum(aten.abs.default(x), axes, keep)),
    "ReduceL2": _reduction(lambda x, axes, keep: aten.linalg_vector_norm.default(x, 2, axes, keep)),
    "ReduceSumSquare": _reduction(lambda x, axes, keep: _sum(aten.mul.Tensor(x, x), axes, keep)),
    "ReduceLogSum": _reduction(lambda x, axes, keep: aten.log.default(_sum(x, axes, keep))),
    "ReduceLogSumExp": _reduction(lambda x, axes, keep: aten.logsumexp.default(x, axes, keep)),
    "CumSum": Rule(cumulative_sum, contents=(1,)),
    "ArgMax": _arg(aten.argmax.default),
    "ArgMin": _arg(aten.argmin.default),
    "TopK": Rule(top_k, contents=(1,)),
    "MaxPool": Rule(max_pool),
    "AveragePool": Rule(average_pool),
    "GlobalAveragePool": Rule(global_average_pool),
    "GlobalMaxPool": Rule(global_max_pool),
}
