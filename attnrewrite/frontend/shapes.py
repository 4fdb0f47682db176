"""Output shapes of a node from the shapes and known contents of its inputs, symbolic extents included.

Operators whose shape depends on the content of an input have a rule here; for all others ONNX's own inference is asked,
with symbolic extents passed through as named dimensions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import onnx

from attnrewrite.dims import Dim, Extent, NonAffine, Shape, is_static, product
from attnrewrite.frontend.evaluate import python_slice, to_attribute
from attnrewrite.functions.spec import DOMAIN, SPECS, FlashWindowAttention, SlideAttention
from attnrewrite.graph import STANDARD_DOMAIN, Node, UnknownShape, Value

CONTRIB_DOMAIN = "com.microsoft"
# Of that domain: the first output is as large as the first input.
LIKE_FIRST_INPUT = frozenset({"BiasGelu", "BiasSoftmax", "FastGelu", "Gelu", "QuickGelu", "SkipLayerNormalization"})

Contents = Callable[[Value | None], np.ndarray | None]
Inferred = list[tuple[Shape | None, np.dtype | None]]


def broadcast(shapes: Sequence[Shape]) -> Shape:
    """NumPy broadcasting; a symbol wins over 1, and two different symbols are unknown."""
    rank = max(map(len, shapes))
    result: list[Extent] = []
    for axis in range(-rank, 0):
        extents = {s[axis] for s in shapes if len(s) >= -axis} - {1}
        if len(extents) > 1:
            raise UnknownShape(f"extents {extents} do not broadcast")
        result.append(extents.pop() if extents else 1)
    return tuple(result)


def _shape(value: Value | None) -> Shape:
    if value is None or value.shape is None:
        raise UnknownShape("an input shape is unknown")
    return value.shape


def _content(contents: Contents, value: Value | None) -> list[Extent]:
    array = contents(value)
    if array is None:
        raise UnknownShape("a shape operand is computed from data")
    return [x if isinstance(x, Dim) else int(x) for x in np.asarray(array).reshape(-1)]


def reshape(node: Node, contents: Contents) -> Shape:
    shape, target = _shape(node.required(0)), _content(contents, node.input(1))
    keep = not node.attributes.get("allowzero", 0)
    result: list[Extent] = [shape[i] if keep and t == 0 else t for i, t in enumerate(target)]
    if -1 in result:
        at = result.index(-1)
        try:
            rest = product(tuple(result[:at] + result[at + 1 :]))
            total = product(shape)
            result[at] = total // rest if rest != 0 else 0
        except NonAffine:
            result[at] = _cancel(shape, result[:at] + result[at + 1 :])
    return tuple(result)


def _cancel(shape: Shape, others: list[Extent]) -> Extent:
    """The extent of -1 where a symbol stands on both sides: cancel equal symbols, divide the rest."""
    numerator, denominator = list(shape), list(others)
    for extent in others:
        if isinstance(extent, Dim) and extent in numerator:
            numerator.remove(extent)
            denominator.remove(extent)
    return product(tuple(numerator)) // product(tuple(denominator))


def expand(node: Node, contents: Contents) -> Shape:
    return broadcast([_shape(node.required(0)), tuple(_content(contents, node.input(1)))])


def slice_(node: Node, contents: Contents) -> Shape:
    shape = list(_shape(node.required(0)))
    starts, ends = _content(contents, node.input(1)), _content(contents, node.input(2))
    axes = range(len(starts)) if node.input(3) is None else _content(contents, node.input(3))
    steps = [1] * len(starts) if node.input(4) is None else _content(contents, node.input(4))
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        assert isinstance(axis, int)
        extent = shape[axis]
        if all(isinstance(x, int) for x in (start, end, step, extent)):
            taken = python_slice(start, end, step, extent)  # type: ignore[arg-type]
            shape[axis] = len(range(*taken.indices(extent)))  # type: ignore[arg-type]
        elif start == 0 and step == 1 and (end == extent or (isinstance(end, int) and end >= 2**31 - 1)):
            continue
        else:
            raise UnknownShape("a slice of a symbolic axis")
    return tuple(shape)


def pad(node: Node, contents: Contents) -> Shape:
    shape, pads = list(_shape(node.required(0))), _content(contents, node.input(1))
    axes = range(len(shape)) if node.input(3) is None else _content(contents, node.input(3))
    for k, axis in enumerate(axes):
        shape[axis] = shape[axis] + pads[k] + pads[k + len(pads) // 2]  # type: ignore[index]
    return tuple(shape)


def tile(node: Node, contents: Contents) -> Shape:
    return tuple(e * r for e, r in zip(_shape(node.required(0)), _content(contents, node.input(1)), strict=True))


def gather(node: Node, contents: Contents) -> Shape:
    data, index = _shape(node.required(0)), _shape(node.required(1))
    axis = node.attributes.get("axis", 0) % len(data)
    return data[:axis] + index + data[axis + 1 :]


def transpose(node: Node, contents: Contents) -> Shape:
    shape = _shape(node.required(0))
    permutation = node.attributes.get("perm") or range(len(shape))[::-1]
    return tuple(shape[p] for p in permutation)


def concat(node: Node, contents: Contents) -> Shape:
    shapes = [_shape(v) for v in node.inputs]
    axis = node.attributes["axis"] % len(shapes[0])
    total: Extent = 0
    for shape in shapes:
        total = total + shape[axis]
    return (*shapes[0][:axis], total, *shapes[0][axis + 1 :])


def pointwise(node: Node, contents: Contents) -> Shape:
    return broadcast([_shape(v) for v in node.inputs if v is not None])


def matmul(node: Node, contents: Contents) -> Shape:
    a, b = _shape(node.required(0)), _shape(node.required(1))
    if len(a) < 2 or len(b) < 2:
        raise UnknownShape("a vector operand")
    batch = broadcast([a[:-2], b[:-2]]) if len(a) > 2 or len(b) > 2 else ()
    return (*batch, a[-2], b[-1])


def einsum(node: Node, contents: Contents) -> Shape:
    """Each label's extent is what its axes broadcast to; ONNX's own inference takes that of the first operand."""
    equation = node.attributes["equation"].replace(" ", "")
    if "." in equation or "->" not in equation:
        raise UnknownShape("an implicit output or an ellipsis")
    terms, output = equation.split("->")
    extents: dict[str, Extent] = {}
    for term, value in zip(terms.split(","), node.inputs, strict=True):
        for label, extent in zip(term, _shape(value), strict=True):
            extents[label] = broadcast([(extents.get(label, 1),), (extent,)])[0]
    return tuple(extents[label] for label in output)


def constant_of_shape(node: Node, contents: Contents) -> Shape:
    return tuple(_content(contents, node.input(0)))


def flatten(node: Node, contents: Contents) -> Shape:
    shape = _shape(node.required(0))
    axis = node.attributes.get("axis", 1)
    axis = axis + len(shape) if axis < 0 else axis
    return (product(shape[:axis]), product(shape[axis:]))


def resize(node: Node, contents: Contents) -> Shape:
    """floor(extent * scale), or the sizes given; a symbolic extent passes through a scale of 1."""
    shape = _shape(node.required(0))
    stretched = node.attributes.get("keep_aspect_ratio_policy", "stretch") == "stretch"
    if node.attributes.get("axes") is not None or not stretched:
        raise UnknownShape("a resize of some axes")
    if node.input(3) is not None:
        return tuple(_content(contents, node.input(3)))
    scales = contents(node.input(2))
    if scales is None or scales.size != len(shape):
        raise UnknownShape("scales computed from data")
    result: list[Extent] = []
    for extent, scale in zip(shape, scales.reshape(-1), strict=True):
        if isinstance(extent, Dim):
            if scale != 1:
                raise UnknownShape("a symbolic axis is resized")
            result.append(extent)
            continue
        scaled = math.floor(extent * float(scale))
        if scaled != math.floor(np.float32(extent) * scale):
            raise UnknownShape("an extent that depends on how the scale is rounded")
        result.append(scaled)
    return tuple(result)


def convolution(node: Node, contents: Contents) -> Shape:
    """Of symbolic extents, which ONNX's own inference forgets: (extent + padding - reach - 1) // stride + 1."""
    (batch, _, *sizes), (filters, _, *taps) = _shape(node.required(0)), _shape(node.required(1))
    rank = len(sizes)
    if is_static(tuple(sizes)):
        raise UnknownShape("left to ONNX's own inference")
    strides, dilations = (node.attributes.get(name) or [1] * rank for name in ("strides", "dilations"))
    automatic = node.attributes.get("auto_pad", "NOTSET")
    pads = [0] * 2 * rank if automatic == "VALID" else node.attributes.get("pads") or [0] * 2 * rank
    result: list[Extent] = [batch, filters]
    for k, (extent, tap) in enumerate(zip(sizes, taps, strict=True)):
        if automatic in ("SAME_UPPER", "SAME_LOWER"):
            result.append((extent + strides[k] - 1) // strides[k])
        else:
            beyond = pads[k] + pads[rank + k] - (tap - 1) * dilations[k] - 1
            result.append((extent + beyond) // strides[k] + 1)
    return tuple(result)


SHAPE_RULES: dict[str, Callable[[Node, Contents], Shape]] = {
    "Reshape": reshape,
    "Expand": expand,
    "Slice": slice_,
    "Pad": pad,
    "Tile": tile,
    "Gather": gather,
    "Transpose": transpose,
    "Concat": concat,
    "MatMul": matmul,
    "Einsum": einsum,
    "ConstantOfShape": constant_of_shape,
    "Flatten": flatten,
    "Resize": resize,
    "Conv": convolution,
    **dict.fromkeys(["Add", "Sub", "Mul", "Div", "Pow", "Where", "Min", "Max", "Mod"], pointwise),
}
COMPARISONS = frozenset({"Equal", "Greater", "Less", "GreaterOrEqual", "LessOrEqual", "And", "Or"})
SHAPE_RULES |= dict.fromkeys(COMPARISONS, pointwise)


def infer(node: Node, contents: Contents, opset: int) -> Inferred:
    """(shape, dtype) of every output; None where unknown."""
    if node.domain == DOMAIN:
        return _local_op(node)
    if node.domain == CONTRIB_DOMAIN:
        return _contributed(node)
    if node.domain == STANDARD_DOMAIN and node.op in SHAPE_RULES:
        try:
            first = node.input(1 if node.op == "Where" else 0)
            dtype = np.dtype(bool) if node.op in COMPARISONS else first.dtype if first is not None else None
            if node.op == "ConstantOfShape":
                fill = node.attributes.get("value")
                dtype = np.dtype(np.float32) if fill is None else np.asarray(fill).dtype
            return [(SHAPE_RULES[node.op](node, contents), dtype)]
        except (UnknownShape, NonAffine):
            return _onnx_inference(node, contents, opset)
    return _onnx_inference(node, contents, opset)


def _contributed(node: Node) -> Inferred:
    """Operators that ONNX Runtime's optimisers write."""
    unknown: Inferred = [(None, None)] * len(node.outputs)
    first = node.input(0)
    if first is None or first.shape is None:
        return unknown
    try:
        match node.op:
            case "FusedMatMul":
                shape = _fused_matmul(node)
            case "Attention":
                weights = _shape(node.required(1))
                sizes = node.attributes.get("qkv_hidden_sizes")
                shape = (*first.shape[:2], int(sizes[2]) if sizes else product(weights[1:]) // 3)
            case "MultiHeadAttention":
                shape = _multi_head_attention(node)
            case op if op in LIKE_FIRST_INPUT:
                shape = first.shape
            case _:
                return unknown
    except (UnknownShape, NonAffine):
        return unknown
    return [(shape, first.dtype), *unknown[1:]]


def _fused_matmul(node: Node) -> Shape:
    shapes = []
    for k, flag in enumerate(("transA", "transB")):
        shape = _shape(node.required(k))
        if len(shape) < 2 or node.attributes.get(flag.replace("trans", "transBatch"), 0):
            raise UnknownShape("a vector operand, or transposed batches")
        shapes.append((*shape[:-2], shape[-1], shape[-2]) if node.attributes.get(flag, 0) else shape)
    a, b = shapes
    batch = broadcast([a[:-2], b[:-2]]) if len(a) > 2 or len(b) > 2 else ()
    return (*batch, a[-2], b[-1])


def _multi_head_attention(node: Node) -> Shape:
    """The query's batch and length, the value's channels: [B, L, nH*d] or [B, nH, L, d] or packed [B, L, nH, 3, d]."""
    query = _shape(node.required(0))
    value = query if node.input(2) is None else _shape(node.required(2))
    channels = value[2] if len(value) == 3 else product((int(node.attributes["num_heads"]), value[-1]))
    return (*query[:2], channels)


def _local_op(node: Node) -> Inferred:
    """The two ops return a map like the query's (of the windows' feature_size), with the channels of the value; extra
    queries of windows a second tensor with what they attend.
    """
    if node.op == SlideAttention.op_type and node.input(0) is None:
        return [_predicted(node)]
    query, value = node.required(0), node.required(2)
    if query.shape is None or value.shape is None or node.op not in SPECS:
        return [(None, query.dtype)] * len(node.outputs)
    if node.op == SlideAttention.op_type:
        return [((query.shape[0], value.shape[1], *query.shape[2:]), query.dtype)]
    batch, *_, channels = value.shape
    found: Inferred = [((batch, *node.attributes["feature_size"], channels), query.dtype)]
    extra = node.input(FlashWindowAttention.operands.index("extra_query"))
    if extra is not None:
        windows = FlashWindowAttention.from_attributes(node.attributes).geometry.num_windows
        shape = None if extra.shape is None else (batch, windows, extra.shape[2], channels)
        found.append((shape, query.dtype))
    return found


def _predicted(node: Node) -> tuple[Shape | None, np.dtype | None]:
    """SlideAttention with predicted weights returns the value's channels on a map of its own."""
    value = node.required(2)
    size = SlideAttention.from_attributes(node.attributes).output_size
    return (None if value.shape is None else (*value.shape[:2], *size)), value.dtype


def _onnx_inference(node: Node, contents: Contents, opset: int) -> Inferred:
    unknown: Inferred = [(None, None)] * len(node.outputs)
    if not onnx.defs.has(node.op, opset, node.domain) or node.captures:
        return unknown
    names: dict[str, Extent] = {}
    types: dict[str, onnx.TypeProto] = {}
    data: dict[str, onnx.TensorProto] = {}
    for k, value in enumerate(node.inputs):
        if value is None or value.dtype is None:
            continue
        extents = None
        if value.shape is not None:
            names |= {str(e): e for e in value.shape if isinstance(e, Dim)}
            extents = [e if isinstance(e, int) else str(e) for e in value.shape]
        element = onnx.helper.np_dtype_to_tensor_dtype(value.dtype)
        types[f"i{k}"] = onnx.helper.make_tensor_type_proto(element, extents)
        known = contents(value)
        if known is not None and known.dtype != object and known.size <= 1024:
            data[f"i{k}"] = onnx.numpy_helper.from_array(known)
    proto = onnx.helper.make_node(
        node.op,
        [f"i{k}" if v is not None else "" for k, v in enumerate(node.inputs)],
        [f"o{k}" for k in range(len(node.outputs))],
    )
    try:
        proto.attribute.extend(to_attribute(k, v) for k, v in node.attributes.items())
        schema = onnx.defs.get_schema(node.op, opset, node.domain)
        result = onnx.shape_inference.infer_node_outputs(
            schema, proto, types, data, opset_imports=[onnx.helper.make_opsetid("", opset)]
        )
    except Exception:  # the inference raises bare RuntimeErrors where a shape is inconsistent or unknown
        return unknown
    outputs: Inferred = []
    for k in range(len(node.outputs)):
        type_ = result.get(f"o{k}")
        if type_ is None or not type_.HasField("tensor_type"):
            outputs.append((None, None))
            continue
        tensor = type_.tensor_type
        dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type) if tensor.elem_type else None
        shape: Shape | None = None
        if tensor.HasField("shape"):
            found = [_extent(d, names) for d in tensor.shape.dim]
            shape = None if any(e is None for e in found) else tuple(e for e in found if e is not None)
        outputs.append((shape, dtype))
    return outputs


def _extent(dim: onnx.TensorShapeProto.Dimension, names: dict[str, Extent]) -> Extent | None:
    if dim.HasField("dim_value"):
        return int(dim.dim_value)
    return names.get(dim.dim_param) if dim.dim_param else None
