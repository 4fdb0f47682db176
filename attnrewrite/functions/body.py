"""Build the standard-operator body of an op: a small graph, used as an ONNX function, written inline, or proved
exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx

from attnrewrite.dims import Shape, static
from attnrewrite.graph import Graph, Node, Value


class BodyBuilder:
    """Appends nodes to a graph. Every value carries its shape; at most one extent is symbolic (the batch, first)."""

    def __init__(self, inputs: list[Value], opset: int) -> None:
        self.graph = Graph(inputs, [], [], opset, "body")
        self._count = 0

    def _name(self, stem: str) -> str:
        self._count += 1
        return f"{stem}_{self._count}"

    def op(
        self, op: str, inputs: Sequence[Value], shape: Shape, dtype: np.dtype | None = None, **attributes: Any
    ) -> Value:
        """One node with one output."""
        output = Value(self._name(op.lower()), shape, dtype if dtype is not None else inputs[0].dtype)
        self.graph.nodes.append(Node(op, inputs, [output], attributes, output.name))
        return output

    def split(self, value: Value, axis: int, parts: int) -> list[Value]:
        """Equal parts of extent 1 along an axis."""
        assert value.shape is not None
        shape = (*value.shape[:axis], 1, *value.shape[axis + 1 :])
        outputs = [Value(self._name("split"), shape, value.dtype) for _ in range(parts)]
        self.graph.nodes.append(
            Node("Split", [value, self.ints([1] * parts)], outputs, {"axis": axis}, outputs[0].name)
        )
        return outputs

    def constant(self, array: np.ndarray) -> Value:
        return Value(self._name("constant"), array.shape, array.dtype, array)

    def ints(self, values: Sequence[int]) -> Value:
        return self.constant(np.array(values, np.int64))

    def scalar(self, number: float, like: Value) -> Value:
        assert like.dtype is not None
        return self.constant(np.array(number, like.dtype))

    def reshape(self, value: Value, shape: Shape) -> Value:
        if value.shape == shape:
            return value
        return self.op("Reshape", [value, self.ints([e if isinstance(e, int) else -1 for e in shape])], shape)

    def transpose(self, value: Value, permutation: Sequence[int]) -> Value:
        assert value.shape is not None
        return self.op("Transpose", [value], tuple(value.shape[p] for p in permutation), perm=list(permutation))

    def slice(
        self, value: Value, axes: Sequence[int], starts: Sequence[int], ends: Sequence[int], steps: Sequence[int] = ()
    ) -> Value:
        """value[..., start:end:step, ...]; bounds within the extents, steps positive (all 1 by default)."""
        shape = list(value.known_shape)
        steps = list(steps) or [1] * len(axes)
        for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
            shape[axis] = -((start - end) // step)
        if tuple(shape) == value.shape:
            return value
        bounds = [self.ints(starts), self.ints(ends), self.ints(axes)]
        if any(s != 1 for s in steps):
            bounds.append(self.ints(steps))
        return self.op("Slice", [value, *bounds], tuple(shape))

    def gather(self, value: Value, positions: np.ndarray, axis: int) -> Value:
        """These positions (int64 [n]) of one axis, in this order."""
        shape = (*value.known_shape[:axis], len(positions), *value.known_shape[axis + 1 :])
        return self.op("Gather", [value, self.constant(positions)], shape, axis=axis)

    def concat(self, values: Sequence[Value], axis: int) -> Value:
        first = values[0].shape
        assert first is not None
        total = sum(static(v.shape[axis]) for v in values if v.shape is not None)
        return self.op("Concat", values, (*first[:axis], total, *first[axis + 1 :]), axis=axis)

    def pad(self, value: Value, before: Sequence[int], after: Sequence[int]) -> Value:
        """Zero padding, one entry per axis."""
        assert value.shape is not None
        if not any(before) and not any(after):
            return value
        shape = tuple(e + b + a if b or a else e for e, b, a in zip(value.shape, before, after, strict=True))
        return self.op("Pad", [value, self.ints([*before, *after])], shape)

    def cast(self, value: Value, dtype: np.dtype) -> Value:
        if value.dtype == dtype:
            return value
        assert value.shape is not None
        to = onnx.helper.np_dtype_to_tensor_dtype(dtype)
        return self.op("Cast", [value], value.shape, dtype, to=to)

    def output(self, *values: Value) -> Graph:
        """Finish: the body computes these values."""
        self.graph.outputs = list(values)
        return self.graph


def softmax_dtype(declared: int, value: Value) -> np.dtype:
    """The NumPy dtype an op's logits have from the scale on."""
    assert value.dtype is not None
    return onnx.helper.tensor_dtype_to_np_dtype(declared) if declared else value.dtype
