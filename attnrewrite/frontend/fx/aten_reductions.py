"""ATen's reductions, softmaxes, normalisations, pools and resampling as ONNX operators; see `building.entry`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from attnrewrite.dims import Extent
from attnrewrite.frontend.fx.building import Builder, Opaque, Results, Table, axes_of, count, entry, every, plain
from attnrewrite.graph import Value

REDUCTIONS: Table = {}


def _floating(write: Builder, x: Value) -> Value:
    """The operand in the dtype of the result, which must be a fraction's."""
    if write.dtype.kind not in "fV":
        raise Opaque(f"{write.dtype} instead of fractions")
    return write.cast(x, write.dtype)


@entry(REDUCTIONS, "mean", "mean.dim")
def mean(write: Builder, x: Value, dim: Any = None, keepdim: bool = False) -> Value:
    return write.reduce("ReduceMean", _floating(write, x), axes_of(dim, len(x.known_shape)), keepdim)


@entry(REDUCTIONS, "sum", "sum.dim_IntList")
def sum_(write: Builder, x: Value, dim: Any = None, keepdim: bool = False) -> Value:
    return write.reduce("ReduceSum", write.cast(x, write.dtype), axes_of(dim, len(x.known_shape)), keepdim)


@entry(REDUCTIONS, "amax")
def amax(write: Builder, x: Value, dim: Any, keepdim: bool) -> Value:
    return write.reduce("ReduceMax", x, axes_of(dim, len(x.known_shape)), keepdim)


@entry(REDUCTIONS, "amin")
def amin(write: Builder, x: Value, dim: Any, keepdim: bool) -> Value:
    return write.reduce("ReduceMin", x, axes_of(dim, len(x.known_shape)), keepdim)


@entry(REDUCTIONS, "max")
def maximum_of_all(write: Builder, x: Value) -> Value:
    return amax(write, x, None, False)


@entry(REDUCTIONS, "min")
def minimum_of_all(write: Builder, x: Value) -> Value:
    return amin(write, x, None, False)


def _found(write: Builder, op: str, x: Value, dim: int | None, keepdim: bool) -> Value:
    """The position of the first largest or smallest element along an axis, or in the flattened tensor."""
    axis = 0 if dim is None else dim % max(len(x.known_shape), 1)
    data = write.reshape(x, (count(x.known_shape),)) if dim is None or not x.known_shape else x
    shape: list[Extent] = [1 if k == axis else e for k, e in enumerate(data.known_shape)]
    if not keepdim or data is not x:
        del shape[axis]
    kept = int(len(shape) == len(data.known_shape))
    found = write.op(op, [data], tuple(shape), np.dtype(np.int64), axis=axis, keepdims=kept)
    return write.reshape(found, write.shapes[-1])


@entry(REDUCTIONS, "argmax")
def argmax(write: Builder, x: Value, dim: int | None, keepdim: bool) -> Value:
    return _found(write, "ArgMax", x, dim, keepdim)


@entry(REDUCTIONS, "argmin")
def argmin(write: Builder, x: Value, dim: int | None, keepdim: bool) -> Value:
    return _found(write, "ArgMin", x, dim, keepdim)


def _quantifier(name: str, op: str) -> None:
    @entry(REDUCTIONS, name, f"{name}.dim", f"{name}.dims")
    def quantifier(write: Builder, x: Value, dim: Any = None, keepdim: bool = False) -> Value:
        """Whether any (or every) element is not zero: the largest (the smallest) of their truths."""
        truths = write.cast(write.cast(x, np.dtype(bool)), np.dtype(np.int32))
        return write.cast(write.reduce(op, truths, axes_of(dim, len(x.known_shape)), keepdim), write.dtype)


_quantifier("any", "ReduceMax")
_quantifier("all", "ReduceMin")


@entry(REDUCTIONS, "max.dim")
def max_along(write: Builder, x: Value, dim: int, keepdim: bool) -> Results:
    return [amax(write, x, dim, keepdim), _found(write, "ArgMax", x, dim, keepdim)]


@entry(REDUCTIONS, "min.dim")
def min_along(write: Builder, x: Value, dim: int, keepdim: bool) -> Results:
    return [amin(write, x, dim, keepdim), _found(write, "ArgMin", x, dim, keepdim)]


@entry(REDUCTIONS, "prod.dim_int")
def prod(write: Builder, x: Value, dim: int, keepdim: bool) -> Value:
    return write.reduce("ReduceProd", write.cast(x, write.dtype), axes_of(dim, len(x.known_shape)), keepdim)


@entry(REDUCTIONS, "logsumexp")
def logsumexp(write: Builder, x: Value, dim: Any, keepdim: bool) -> Value:
    return write.reduce("ReduceLogSumExp", _floating(write, x), axes_of(dim, len(x.known_shape)), keepdim)


@entry(REDUCTIONS, "linalg_vector_norm")
def vector_norm(write: Builder, x: Value, ord: float, dim: Any, keepdim: bool) -> Value:
    return _norm(write, x, ord, dim, keepdim)


@entry(REDUCTIONS, "norm.ScalarOpt_dim", "norm.ScalarOpt_dim_dtype")
def norm(write: Builder, x: Value, p: float | None, dim: Any, keepdim: bool) -> Value:
    return _norm(write, x, 2 if p is None else p, dim, keepdim)


def _norm(write: Builder, x: Value, order: float, dim: Any, keepdim: bool) -> Value:
    op = "ReduceL1" if order == 1 else "ReduceL2" if order == 2 else None
    axes = axes_of(dim, len(x.known_shape))
    if op is None or not axes:
        raise Opaque(f"a norm of order {order}")
    return write.reduce(op, _floating(write, x), axes, keepdim)


def _variance(write: Builder, x: Value, dim: Any, correction: Any, keepdim: bool) -> tuple[Value, Value]:
    """The mean squared distance from the mean, and the mean; correction: 1 divides by one less than there are."""
    x, axes = _floating(write, x), axes_of(dim, len(x.known_shape))
    n = count(tuple(x.known_shape[k] for k in axes))
    less = 1 if correction is None else correction
    if less and (not isinstance(n, int) or n <= less):
        raise Opaque("a corrected variance of that many elements")
    centre = write.reduce("ReduceMean", x, axes, True)
    distance = write.binary("Sub", x, centre)
    spread = write.reduce("ReduceMean", write.binary("Mul", distance, distance), axes, True)
    if less:
        assert isinstance(n, int)
        spread = write.binary("Mul", spread, write.scalar(n / (n - less), spread))
    shape = tuple(e for k, e in enumerate(x.known_shape) if k not in axes)
    return (spread, centre) if keepdim else (write.reshape(spread, shape), write.reshape(centre, shape))


@entry(REDUCTIONS, "var.correction")
def var(write: Builder, x: Value, dim: Any, correction: Any, keepdim: bool) -> Value:
    return _variance(write, x, dim, correction, keepdim)[0]


@entry(REDUCTIONS, "std.correction")
def std(write: Builder, x: Value, dim: Any, correction: Any, keepdim: bool) -> Value:
    return write.unary("Sqrt", _variance(write, x, dim, correction, keepdim)[0])


@entry(REDUCTIONS, "var_mean.correction")
def var_mean(write: Builder, x: Value, dim: Any, correction: Any, keepdim: bool) -> Results:
    return _variance(write, x, dim, correction, keepdim)


@entry(REDUCTIONS, "cumsum")
def cumsum(write: Builder, x: Value, dim: int) -> Value:
    if not x.known_shape:
        return write.same(write.cast(x, write.dtype))
    axis = write.constant(np.array(dim % len(x.known_shape)))
    return write.op("CumSum", [write.cast(x, write.dtype), axis], x.known_shape, write.dtype)


@entry(REDUCTIONS, "topk")
def topk(write: Builder, x: Value, k: Any, dim: int, largest: bool, sorted: bool) -> Results:
    """Of equal elements either may come first."""
    return _top(write, x, plain(k), dim, largest)


@entry(REDUCTIONS, "sort")
def sort(write: Builder, x: Value, dim: int, descending: bool) -> Results:
    return _top(write, x, plain(x.known_shape[dim]), dim, descending)


def _top(write: Builder, x: Value, k: int, dim: int, largest: bool) -> Results:
    values, found = write.nodes(
        "TopK", [x, write.ints([k])], write.shapes, x.dtype, axis=dim % len(x.known_shape), largest=int(largest)
    )
    found.dtype = np.dtype(np.int64)
    return [values, found]


@entry(REDUCTIONS, "_softmax", "softmax.int", "_safe_softmax")
def softmax(write: Builder, x: Value, dim: int, half_to_float: bool = False) -> Value:
    return _softmax(write, "Softmax", x, dim)


@entry(REDUCTIONS, "_log_softmax", "log_softmax.int")
def log_softmax(write: Builder, x: Value, dim: int, half_to_float: bool = False) -> Value:
    return _softmax(write, "LogSoftmax", x, dim)


def _softmax(write: Builder, op: str, x: Value, dim: int) -> Value:
    if not x.known_shape:
        raise Opaque("a softmax of one number")
    axis = dim % len(x.known_shape)
    return write.unary(op, _floating(write, x), axis=-1 if axis == len(x.known_shape) - 1 else axis)


@entry(REDUCTIONS, "native_layer_norm", "layer_norm")
def layer_norm(
    write: Builder,
    input: Value,
    normalized_shape: Sequence[int],
    weight: Value | None,
    bias: Value | None,
    eps: float,
    cudnn_enable: bool = True,
) -> Results:
    sizes = [plain(e) for e in normalized_shape]
    scale = weight if weight is not None else write.constant(np.ones(sizes, input.dtype))
    operands = [input, scale, *([] if bias is None else [bias])]
    if any(v.dtype != input.dtype for v in operands):
        raise Opaque("a layer norm of several dtypes")
    axis = -len(sizes)
    result = write.op("LayerNormalization", operands, input.known_shape, axis=axis, epsilon=float(eps))
    return [result, *[None] * (len(write.shapes) - 1)]


@entry(REDUCTIONS, "rms_norm", "_fused_rms_norm")
def rms_norm(
    write: Builder, input: Value, normalized_shape: Sequence[int], weight: Value | None, eps: float | None
) -> Results:
    """x / sqrt(mean(x**2) + eps), times the weight."""
    if input.dtype is None or input.dtype.kind != "f" or input.dtype.itemsize < 4:
        raise Opaque("a norm that torch computes in float32")
    rank = len(input.known_shape)
    axes = list(range(rank - len(normalized_shape), rank))
    square = write.reduce("ReduceMean", write.binary("Mul", input, input), axes, True)
    smallest = float(np.finfo(input.dtype).eps) if eps is None else eps
    root = write.unary("Sqrt", write.binary("Add", square, write.scalar(smallest, input)))
    result = write.binary("Div", input, root)
    result = result if weight is None else write.binary("Mul", result, weight)
    return [result, *[None] * (len(write.shapes) - 1)]


@entry(REDUCTIONS, "group_norm")
def group_norm(
    write: Builder,
    input: Value,
    num_groups: int,
    weight: Value | None,
    bias: Value | None,
    eps: float,
    cudnn_enabled: bool = True,
) -> Value:
    """Every group of channels brought to mean 0 and variance 1, then scaled and shifted by channel."""
    batch, channels, *rest = input.known_shape
    groups = write.reshape(input, (batch, num_groups, count((plain(channels) // num_groups, *rest))))
    normal = _instances(write, groups, eps)
    return _by_channel(write, write.reshape(normal, input.known_shape), weight, bias)


@entry(REDUCTIONS, "native_group_norm")
def native_group_norm(
    write: Builder,
    input: Value,
    weight: Value | None,
    bias: Value | None,
    N: Any,
    C: Any,
    HxW: Any,
    group: int,
    eps: float,
) -> Results:
    return [group_norm(write, input, group, weight, bias, eps), None, None]


def _instances(write: Builder, x: Value, eps: float) -> Value:
    """Every channel of every sample brought to mean 0 and variance 1."""
    channels = plain(x.known_shape[1])
    if x.dtype is None:
        raise Opaque("a dtype that ONNX lacks")
    ones, zeros = (write.constant(np.full(channels, n, x.dtype)) for n in (1, 0))
    return write.op("InstanceNormalization", [x, ones, zeros], x.known_shape, epsilon=float(eps))


def _by_channel(write: Builder, x: Value, weight: Value | None, bias: Value | None) -> Value:
    for op, operand in (("Mul", weight), ("Add", bias)):
        if operand is not None:
            shape = (*operand.known_shape, *(1,) * (len(x.known_shape) - 2))
            x = write.binary(op, x, write.reshape(operand, shape))
    return x


@entry(REDUCTIONS, "instance_norm")
def instance_norm(
    write: Builder,
    input: Value,
    weight: Value | None,
    bias: Value | None,
    running_mean: Value | None,
    running_var: Value | None,
    use_input_stats: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool,
) -> Value:
    if not use_input_stats or running_mean is not None:
        raise Opaque("running statistics of instances")
    return _by_channel(write, _instances(write, input, eps), weight, bias)


@entry(REDUCTIONS, "batch_norm")
def batch_norm(
    write: Builder,
    input: Value,
    weight: Value | None,
    bias: Value | None,
    running_mean: Value | None,
    running_var: Value | None,
    training: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool = True,
) -> Value:
    if training or running_mean is None or running_var is None:
        raise Opaque("statistics of the batch")
    channels = plain(input.known_shape[1])
    scale = weight if weight is not None else write.constant(np.ones(channels, input.dtype))
    shift = bias if bias is not None else write.constant(np.zeros(channels, input.dtype))
    operands = [input, scale, shift, running_mean, running_var]
    return write.op("BatchNormalization", operands, input.known_shape, epsilon=float(eps))


@entry(REDUCTIONS, "_native_batch_norm_legit_no_training")
def batch_norm_of_inference(
    write: Builder,
    input: Value,
    weight: Value | None,
    bias: Value | None,
    running_mean: Value,
    running_var: Value,
    momentum: float,
    eps: float,
) -> Results:
    normal = batch_norm(write, input, weight, bias, running_mean, running_var, False, momentum, eps)
    return [normal, None, None]


@entry(REDUCTIONS, "dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout")
def dropout(write: Builder, input: Value, p: float, train: bool) -> Value:
    if train and p:
        raise Opaque("random zeros")
    return write.same(input)


@entry(REDUCTIONS, "native_dropout")
def native_dropout(write: Builder, input: Value, p: float, train: bool | None) -> Results:
    if train is None or (train and p):
        raise Opaque("random zeros")
    return [write.same(input), None]


def _pool(op: str, rank: int, *names: str) -> None:
    """Pools over `rank` spatial axes."""

    @entry(REDUCTIONS, *names)
    def pool(
        write: Builder,
        x: Value,
        kernel_size: Sequence[int],
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int] = (1,),
        ceil_mode: bool = False,
        count_include_pad: bool = True,
        divisor_override: int | None = None,
    ) -> Results:
        if divisor_override is not None:
            raise Opaque("a pool with a divisor of its own")
        image, shape = write.batched(x, rank)
        attributes: dict[str, Any] = {
            "kernel_shape": every(kernel_size, rank),
            "strides": every(stride or kernel_size, rank),
            "pads": every(padding, rank) * 2,
            "dilations": every(dilation, rank),
        }
        if ceil_mode and _whole_windows(image.known_shape[2:], attributes) != list(shape[2:]):
            if op == "AveragePool":
                raise Opaque("means of windows that reach beyond the padding")
            attributes["ceil_mode"] = 1
        if op == "AveragePool":
            del attributes["dilations"]
            attributes["count_include_pad"] = int(count_include_pad)
        pooled = write.reshape(write.op(op, [image], shape, **attributes), write.shape)
        return [pooled, *[None] * (len(write.shapes) - 1)]


def _whole_windows(extents: Sequence[Extent], attributes: dict[str, Any]) -> list[int]:
    """How many windows lie within the padded input, per axis."""
    parts = zip(*(attributes[name] for name in ("kernel_shape", "strides", "pads", "dilations")), strict=False)
    return [
        (plain(extent) + 2 * pad - dilation * (size - 1) - 1) // stride + 1
        for extent, (size, stride, pad, dilation) in zip(extents, parts, strict=True)
    ]


for _rank in (1, 2, 3):
    _pool("AveragePool", _rank, f"avg_pool{_rank}d")
    _pool("MaxPool", _rank, f"max_pool{_rank}d", f"max_pool{_rank}d_with_indices")


@entry(REDUCTIONS, "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "_adaptive_avg_pool2d")
@entry(REDUCTIONS, "_adaptive_avg_pool3d")
def adaptive_avg_pool(write: Builder, x: Value, output_size: Sequence[Any]) -> Value:
    """A mean where one pixel is left; a pool where the pixels share the input evenly."""
    rank = len(output_size)
    axes = list(range(len(x.known_shape) - rank, len(x.known_shape)))
    if all(e == 1 for e in output_size):
        return write.reduce("ReduceMean", x, axes, True)
    kernel = [plain(x.known_shape[a]) // plain(write.shape[a]) for a in axes]
    if any(plain(x.known_shape[a]) != k * plain(write.shape[a]) for a, k in zip(axes, kernel, strict=True)):
        raise Opaque("pixels that do not share the input evenly")
    return _means(write, x, kernel)


def _means(write: Builder, x: Value, kernel: list[int]) -> Value:
    image, shape = write.batched(x, len(kernel))
    pooled = write.op("AveragePool", [image], shape, kernel_shape=kernel, strides=kernel)
    return write.reshape(pooled, write.shape)


def _resize(write: Builder, x: Value, scales: Sequence[float | None], **attributes: Any) -> Value:
    """Resample the spatial axes to the sizes of the result; a scale that was given is what positions are told by."""
    spatial = len(write.shape) - 2
    for axis, scale in enumerate(scales, 2):
        exact = plain(write.shape[axis]) / plain(x.known_shape[axis])
        if scale is not None and not math.isclose(scale, exact, rel_tol=1e-9):
            raise Opaque("a scale that is not the ratio of the sizes")
    for axis in range(2):
        if x.known_shape[axis] != write.shape[axis]:
            raise Opaque("a resized batch")
    ratios = [plain(o) / plain(i) for o, i in zip(write.shape[2:], x.known_shape[2:], strict=True)]
    if any(float(np.float32(r)) != r for r in ratios):
        sizes = write.extents(write.shape)
        return write.nodes("Resize", [x, None, None, sizes], [write.shape], x.dtype, **attributes)[0]
    factors = write.constant(np.array([1, 1, *ratios][: 2 + spatial], np.float32))
    return write.nodes("Resize", [x, None, factors], [write.shape], x.dtype, **attributes)[0]


NEAREST = {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}


def _upsample(names: str, attributes: dict[str, Any]) -> None:
    """Resampling of the spatial axes, with one scale for each or all in one argument (`.vec`)."""

    @entry(REDUCTIONS, names, f"{names}.vec")
    def upsample(
        write: Builder,
        x: Value | None = None,
        input: Value | None = None,
        output_size: Any = None,
        align_corners: bool = False,
        scale_factors: Sequence[float] | None = None,
        **scales: float | None,
    ) -> Value:
        image = x if x is not None else input
        assert image is not None
        how = dict(attributes)
        if "coordinate_transformation_mode" not in how:
            how["coordinate_transformation_mode"] = "align_corners" if align_corners else "pytorch_half_pixel"
        given = list(scale_factors or scales.values())
        return _resize(write, image, given, **how)


for _rank, _smooth in ((1, "linear"), (2, "bilinear"), (3, "trilinear")):
    _upsample(f"upsample_nearest{_rank}d", NEAREST)
    _upsample(f"upsample_{_smooth}{_rank}d", {"mode": "linear"})
_upsample("upsample_bicubic2d", {"mode": "cubic", "cubic_coeff_a": -0.75})
