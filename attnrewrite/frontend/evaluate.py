"""Evaluate single nodes: shape arithmetic in NumPy (also on symbolic extents), everything else in ONNX Runtime.

Symbolic extents live in NumPy arrays of dtype object, so one implementation serves numbers and symbols; an operation
that leaves the affine expressions raises `NonAffine` and its result is simply unknown.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx

from attnrewrite.dims import Dim, NonAffine, equal
from attnrewrite.graph import STANDARD_DOMAIN, Node

Arrays = list[np.ndarray | None]

# Results that differ from run to run, or that the model's owner marked: never folded.
NOT_DETERMINISTIC = frozenset(
    {"RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "Multinomial", "Bernoulli"}
)
# A quantised graph keeps its quantisation: folding these would silently turn it into a float model.
NOT_FOLDED = NOT_DETERMINISTIC | {"QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear"}


def is_symbolic(array: np.ndarray) -> bool:
    return array.dtype == object


def _plain(array: Any, like: np.dtype | None = None) -> np.ndarray:
    """An object array without symbols becomes int64 (or `like`) again."""
    array = np.asarray(array)
    if array.dtype == object and not any(isinstance(x, Dim) for x in array.reshape(-1)):
        return array.astype(like if like is not None and like.kind != "O" else np.int64)
    return array


def _axes(node: Node, inputs: Arrays, rank: int) -> list[int]:
    axes = inputs[1] if len(inputs) > 1 and inputs[1] is not None else node.attributes.get("axes")
    return [] if axes is None else [int(a) % rank for a in np.asarray(axes).reshape(-1)]


def _slice(node: Node, inputs: Arrays) -> np.ndarray:
    data, starts, ends = inputs[:3]
    assert data is not None and starts is not None and ends is not None
    axes = inputs[3] if len(inputs) > 3 and inputs[3] is not None else np.arange(len(starts))
    steps = inputs[4] if len(inputs) > 4 and inputs[4] is not None else np.ones(len(starts), np.int64)
    index: list[slice] = [slice(None)] * data.ndim
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        index[int(axis)] = python_slice(int(start), int(end), int(step), data.shape[int(axis)])
    return data[tuple(index)]


def python_slice(start: int, end: int, step: int, extent: int) -> slice:
    """ONNX Slice bounds of one axis as a Python slice: negative bounds count from the end, all are clamped."""
    start = start + extent if start < 0 else start
    end = end + extent if end < 0 else end
    if step > 0:
        return slice(min(max(start, 0), extent), min(max(end, 0), extent), step)
    start, end = min(max(start, 0), extent - 1), min(max(end, -1), extent - 1)
    return slice(start, None if end < 0 else end, step)


def _reshape(node: Node, inputs: Arrays) -> np.ndarray:
    data, target = inputs
    assert data is not None and target is not None
    keep = not node.attributes.get("allowzero", 0)
    shape = [data.shape[i] if t == 0 and keep else int(t) for i, t in enumerate(target)]
    return data.reshape(shape)


def _squeeze(node: Node, inputs: Arrays) -> np.ndarray:
    data = inputs[0]
    assert data is not None
    axes = _axes(node, inputs, data.ndim)
    return np.squeeze(data, tuple(axes) if axes else None)


def _unsqueeze(node: Node, inputs: Arrays) -> np.ndarray:
    data = inputs[0]
    assert data is not None
    return np.expand_dims(data, tuple(_axes(node, inputs, data.ndim + len(_axes(node, inputs, 64)))))


def _expand(node: Node, inputs: Arrays) -> np.ndarray:
    data, target = inputs
    assert data is not None and target is not None
    shape = np.broadcast_shapes(data.shape, tuple(int(t) for t in target))
    return np.broadcast_to(data, shape)


def _range(node: Node, inputs: Arrays) -> np.ndarray:
    start, limit, delta = (np.asarray(x).reshape(-1)[0] for x in inputs)
    return np.arange(start, limit, delta, dtype=np.asarray(inputs[0]).dtype)


def _quotient(a: Any, b: Any) -> Any:
    """a / b where it comes out even: only then are integer and float division the same."""
    if isinstance(a, Dim) or isinstance(b, Dim):
        return a / b
    if b == 0 or a % b:
        raise NonAffine(f"{a} / {b}")
    return a // b


_exact_quotient = np.frompyfunc(_quotient, 2, 1)
_symbolic_equal = np.frompyfunc(equal, 2, 1)


def _equal(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.asarray(_symbolic_equal(a, b) if is_symbolic(a) or is_symbolic(b) else a == b, bool)


def _divide(node: Node, inputs: Arrays) -> np.ndarray:
    a, b = inputs
    assert a is not None and b is not None
    if is_symbolic(a) or is_symbolic(b):
        return np.asarray(_exact_quotient(a, b))
    if np.issubdtype(a.dtype, np.integer):
        return np.trunc(a / b).astype(a.dtype) if np.any(a < 0) or np.any(b < 0) else a // b
    return a / b


def _modulo(node: Node, inputs: Arrays) -> np.ndarray:
    a, b = inputs
    assert a is not None and b is not None
    return np.fmod(a, b) if node.attributes.get("fmod", 0) and not (is_symbolic(a) or is_symbolic(b)) else a % b


def _cast(node: Node, inputs: Arrays) -> np.ndarray:
    data = inputs[0]
    assert data is not None
    to = onnx.helper.tensor_dtype_to_np_dtype(node.attributes["to"])
    return data if is_symbolic(data) else data.astype(to)


def _concat(node: Node, inputs: Arrays) -> np.ndarray:
    parts = [x for x in inputs if x is not None]
    if any(is_symbolic(p) for p in parts):
        parts = [p.astype(object) for p in parts]
    return np.concatenate(parts, axis=node.attributes["axis"])


def _gather(node: Node, inputs: Arrays) -> np.ndarray:
    data, index = inputs
    assert data is not None and index is not None
    return np.asarray(np.take(data, index.astype(np.int64), axis=node.attributes.get("axis", 0)))


def _constant_of_shape(node: Node, inputs: Arrays) -> np.ndarray:
    fill = node.attributes.get("value")
    fill = np.zeros(1, np.float32) if fill is None else np.asarray(fill)
    assert inputs[0] is not None
    return np.full(tuple(int(x) for x in inputs[0]), fill.reshape(-1)[0], fill.dtype)


def _pointwise(function: Callable[..., Any]) -> Callable[[Node, Arrays], np.ndarray]:
    return lambda node, inputs: np.asarray(function(*inputs))


def _keep(node: Node, inputs: Arrays) -> np.ndarray:
    assert inputs[0] is not None
    return inputs[0]


def _reduce_prod(node: Node, inputs: Arrays) -> np.ndarray:
    data = inputs[0]
    assert data is not None
    axes = tuple(_axes(node, inputs, data.ndim)) or None
    if axes is None and node.attributes.get("noop_with_empty_axes", 0):
        return data
    return np.asarray(np.prod(data, axis=axes, keepdims=bool(node.attributes.get("keepdims", 1))))


# Shape arithmetic and movement; exact on any dtype and, where the function allows it, on symbolic extents.
NUMPY_OPS: dict[str, Callable[[Node, Arrays], np.ndarray]] = {
    "Add": _pointwise(lambda a, b: a + b),
    "Sub": _pointwise(lambda a, b: a - b),
    "Mul": _pointwise(lambda a, b: a * b),
    "Div": _divide,
    "Mod": _modulo,
    "Neg": _pointwise(lambda a: -a),
    "Floor": _pointwise(lambda a: a if is_symbolic(a) else np.floor(a)),
    "Ceil": _pointwise(lambda a: a if is_symbolic(a) else np.ceil(a)),
    "Equal": _pointwise(_equal),
    "Greater": _pointwise(lambda a, b: np.asarray(a > b, bool)),
    "Less": _pointwise(lambda a, b: np.asarray(a < b, bool)),
    "Not": _pointwise(np.logical_not),
    "And": _pointwise(np.logical_and),
    "Or": _pointwise(np.logical_or),
    "Where": _pointwise(np.where),
    "Cast": _cast,
    "Identity": _keep,
    "Concat": _concat,
    "Gather": _gather,
    "Slice": _slice,
    "Reshape": _reshape,
    "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze,
    "Transpose": lambda node, inputs: np.transpose(inputs[0], node.attributes.get("perm")),  # type: ignore[arg-type]
    "Expand": _expand,
    "Range": _range,
    "ConstantOfShape": _constant_of_shape,
    "ReduceProd": _reduce_prod,
}


def evaluate(node: Node, inputs: Arrays, opset: int) -> list[np.ndarray]:
    """The outputs of a node on concrete or symbolic inputs.

    Raises NonAffine where symbols leave the affine expressions, ValueError where the node cannot be evaluated.
    """
    if node.domain == STANDARD_DOMAIN and node.op in NUMPY_OPS:
        dtype = next((x.dtype for x in inputs if x is not None and x.dtype != object), None)
        return [_plain(NUMPY_OPS[node.op](node, inputs), dtype)]
    if any(x is not None and is_symbolic(x) for x in inputs):
        raise ValueError(f"{node.op} has no symbolic evaluation")
    return run_in_onnxruntime(node, inputs, opset)


def run_in_onnxruntime(node: Node, inputs: Arrays, opset: int) -> list[np.ndarray]:
    """One node as a model of its own; ValueError with ONNX Runtime's sentence where it refuses."""
    import onnxruntime

    names = [f"i{k}" if x is not None else "" for k, x in enumerate(inputs)]
    proto = onnx.helper.make_node(node.op, names, [f"o{k}" for k in range(len(node.outputs))], domain=node.domain)
    proto.attribute.extend(to_attribute(k, v) for k, v in node.attributes.items())
    graph = onnx.helper.make_graph(
        [proto],
        "node",
        [
            onnx.helper.make_tensor_value_info(n, onnx.helper.np_dtype_to_tensor_dtype(x.dtype), x.shape)
            for n, x in zip(names, inputs, strict=True)
            if x is not None
        ],
        [onnx.helper.make_empty_tensor_value_info(f"o{k}") for k in range(len(node.outputs))],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)], ir_version=10)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    try:
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        return list(session.run(None, {n: x for n, x in zip(names, inputs, strict=True) if x is not None}))
    except Exception as error:  # onnxruntime raises its own, undocumented classes
        raise ValueError(f"{node.label} could not be evaluated: {error}") from error


def to_attribute(name: str, value: Any) -> onnx.AttributeProto:
    """An attribute as ONNX writes it; arrays become tensors."""
    if isinstance(value, np.ndarray):
        value = onnx.numpy_helper.from_array(value)
    return onnx.helper.make_attribute(name, value)
