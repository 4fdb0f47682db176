"""ONNX's own Attention operator (opset 23) written out: matmul, softmax, matmul.

Whether an exporter fuses attention or writes it out then makes no difference to anybody else. What the operator can do
beyond that (a cache of past keys, a soft cap, grouped heads, a causal mask over symbolic lengths or beside another
mask, more than one output) stays as it is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx

from attnrewrite.dims import Extent, Shape, static
from attnrewrite.frontend.shapes import broadcast
from attnrewrite.graph import STANDARD_DOMAIN, Graph, Node, UnknownShape, Value


def expand_attention(graph: Graph) -> None:
    """Replace every Attention node that is plain scaled dot-product attention, in place; shapes must be known."""
    users = graph.users()
    outputs = set(graph.outputs)
    expanded: list[Node] = []
    for node in graph.nodes:
        if _is_plain(node, users, outputs):
            expanded.extend(_Expansion(graph, node).nodes)
        else:
            expanded.append(node)
    graph.nodes = expanded


def _is_plain(node: Node, users: dict[Value, list[Node]], outputs: set[Value]) -> bool:
    if node.op != "Attention" or node.domain != STANDARD_DOMAIN:
        return False
    if any(users.get(o) or o in outputs for o in node.outputs[1:]) or any(v is not None for v in node.inputs[4:]):
        return False
    operands = [node.input(k) for k in range(3)]
    shapes = [v.shape for v in operands if v is not None]
    if len(shapes) != 3 or any(s is None or len(s) not in (3, 4) for s in shapes):
        return False
    attributes = node.attributes
    if attributes.get("softcap", 0.0) or attributes.get("qk_matmul_output_mode", 0):
        return False
    if attributes.get("is_causal", 0):
        lengths = [node.required(k).known_shape[-2] for k in range(2)]
        if node.input(3) is not None or not all(isinstance(e, int) for e in lengths):
            return False
    return len({_heads(node, k) for k in range(3)}) == 1


def _heads(node: Node, operand: int) -> Extent:
    shape = node.required(operand).known_shape
    if len(shape) == 4:
        return shape[1]
    return int(node.attributes["q_num_heads" if operand == 0 else "kv_num_heads"])


class _Expansion:
    """The nodes of one Attention, in order."""

    def __init__(self, graph: Graph, node: Node) -> None:
        self.graph, self.node = graph, node
        self.nodes: list[Node] = []
        self.stem = node.output.name
        query, key, value = (self._heads_first(k) for k in range(3))
        dtype = query.dtype
        assert dtype is not None
        head_dim = static(query.known_shape[3])
        scale = node.attributes.get("scale", 1.0 / math.sqrt(head_dim))
        scaled = self._emit("Mul", [query, self._constant(np.array(scale, dtype))], query.known_shape)
        batch, heads, length, _ = query.known_shape
        keys = key.known_shape[2]
        logits_shape: Shape = (batch, heads, length, keys)
        logits = self._emit("MatMul", [scaled, self._transposed(key, (0, 1, 3, 2))], logits_shape)
        logits = self._masked(logits)
        precision = node.attributes.get("softmax_precision", 0)
        wide = onnx.helper.tensor_dtype_to_np_dtype(precision) if precision else dtype
        weights = self._cast(self._emit("Softmax", [self._cast(logits, wide)], logits_shape, axis=-1), dtype)
        attended_shape: Shape = (batch, heads, length, value.known_shape[3])
        if len(node.required(0).known_shape) == 4:
            self._emit("MatMul", [weights, value], attended_shape, output=node.output)
            return
        attended = self._transposed(self._emit("MatMul", [weights, value], attended_shape), (0, 2, 1, 3))
        channels = static(heads) * static(value.known_shape[3])
        self._reshaped(attended, (batch, length, channels), output=node.output)

    def _emit(
        self, op: str, inputs: Sequence[Value], shape: Shape, *, output: Value | None = None, **attributes: Any
    ) -> Value:
        dtype = inputs[0].dtype
        if output is None:
            output = Value(self.graph.fresh_name(f"{self.stem}_{op.lower()}"), shape, dtype)
        name = self.node.name if op == "Softmax" and self.node.name else output.name
        self.nodes.append(Node(op, inputs, [output], attributes, name))
        return output

    def _constant(self, array: np.ndarray) -> Value:
        return Value(self.graph.fresh_name(f"{self.stem}_constant"), array.shape, array.dtype, array)

    def _reshaped(self, value: Value, shape: Shape, output: Value | None = None) -> Value:
        target = np.array([e if isinstance(e, int) else -1 for e in shape], np.int64)
        return self._emit("Reshape", [value, self._constant(target)], shape, output=output)

    def _transposed(self, value: Value, permutation: tuple[int, ...]) -> Value:
        shape = tuple(value.known_shape[p] for p in permutation)
        return self._emit("Transpose", [value], shape, perm=list(permutation))

    def _cast(self, value: Value, dtype: np.dtype) -> Value:
        if value.dtype == dtype:
            return value
        cast = self._emit("Cast", [value], value.known_shape, to=int(onnx.helper.np_dtype_to_tensor_dtype(dtype)))
        cast.dtype = dtype
        return cast

    def _heads_first(self, operand: int) -> Value:
        """[B, L, nH*d] or [B, nH, L, d] -> [B, nH, L, d]."""
        value = self.node.required(operand)
        shape = value.known_shape
        if len(shape) == 4:
            return value
        heads = static(_heads(self.node, operand))
        split = self._reshaped(value, (shape[0], shape[1], heads, static(shape[2]) // heads))
        return self._transposed(split, (0, 2, 1, 3))

    def _masked(self, logits: Value) -> Value:
        """Add a float mask; a boolean one excludes where it is false, as a causal one does behind the query."""
        mask = self.node.input(3)
        if self.node.attributes.get("is_causal", 0):
            length, keys = (static(e) for e in logits.known_shape[2:])
            mask = self._constant(np.tri(length, keys, dtype=bool))
        if mask is None:
            return logits
        if mask.dtype == np.dtype(bool):
            assert logits.dtype is not None
            lowest = self._constant(np.array(-np.inf, logits.dtype))
            masked = self._emit("Where", [mask, logits, lowest], logits.known_shape)
            masked.dtype = logits.dtype
            return masked
        try:
            shape = broadcast([logits.known_shape, mask.known_shape])
        except UnknownShape:
            shape = logits.known_shape
        return self._emit("Add", [logits, mask], shape)
