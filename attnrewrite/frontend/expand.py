"""Attention in one operator written out: matmul, softmax, matmul.

Whether an exporter or a graph optimiser fuses attention or writes it out then makes no difference to anybody else. That
is ONNX's own Attention (opset 23), and of ONNX Runtime's domain com.microsoft Attention, MultiHeadAttention and
FusedMatMul. What they can do beyond that (a cache of past keys, a soft cap, grouped heads, padding masks, more than one
output) stays as it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx

from attnrewrite.dims import Extent, Shape, static
from attnrewrite.frontend.shapes import CONTRIB_DOMAIN, broadcast
from attnrewrite.graph import STANDARD_DOMAIN, Graph, Node, UnknownShape, Value


def expand_attention(graph: Graph) -> None:
    """Replace every operator that is plain scaled dot-product attention, in place; shapes must be known."""
    users = graph.users()
    outputs = set(graph.outputs)
    expanded: list[Node] = []
    for node in graph.nodes:
        plain, write = _FORMS.get((node.domain, node.op), (None, None))
        unused = not any(users.get(o) or o in outputs for o in node.outputs[1:])
        if plain is None or write is None or not unused or not plain(node):
            expanded.append(node)
            continue
        expansion = _Expansion(graph, node)
        write(expansion, node)
        expanded.extend(expansion.nodes)
    graph.nodes = expanded


def _has(node: Node, *ranks: tuple[int, ...]) -> bool:
    """Whether the first inputs are there and of known shape and type, each of one of its ranks."""
    values = [node.input(k) for k in range(len(ranks))]
    return all(
        v is not None and v.shape is not None and v.dtype is not None and len(v.shape) in ranks[k]
        for k, v in enumerate(values)
    )


def _is_plain_standard(node: Node) -> bool:
    if any(v is not None for v in node.inputs[4:]) or not _has(node, *[(3, 4)] * 3):
        return False
    attributes = node.attributes
    if attributes.get("softcap", 0.0) or attributes.get("qk_matmul_output_mode", 0):
        return False
    lengths = [node.required(k).known_shape[-2] for k in (0, 1)]
    mask = node.input(3)
    if mask is not None and (mask.shape is None or not mask.shape or mask.shape[-1] not in (1, lengths[1])):
        return False  # a shorter mask is continued by exclusion
    if attributes.get("is_causal", 0) and not all(isinstance(e, int) for e in lengths):
        return False
    return len({_heads(node, k) for k in range(3)}) == 1


def _heads(node: Node, operand: int) -> Extent:
    shape = node.required(operand).known_shape
    if len(shape) == 4:
        return shape[1]
    return int(node.attributes["q_num_heads" if operand == 0 else "kv_num_heads"])


def _standard(write: _Expansion, node: Node) -> None:
    """Query, key and value [B, L, nH*d] or [B, nH, L, d]; the output like the query."""
    query, key, value = (write.heads_first(node.required(k), _heads(node, k)) for k in range(3))
    scale = node.attributes.get("scale", 1.0 / math.sqrt(static(query.known_shape[3])))
    precision = node.attributes.get("softmax_precision", 0)
    causal = bool(node.attributes.get("is_causal", 0))
    attended = write.attended(query, key, value, scale, node.input(3), causal=causal, precision=precision)
    if len(node.required(0).known_shape) == 4:
        write.named(attended)
    else:
        write.heads_joined(attended)


def _is_plain_multi_head(node: Node) -> bool:
    if any(v is not None for v in (node.input(4), *node.inputs[6:])) or not _has(node, (3, 5)):
        return False
    separate = _has(node, (3,), (3, 4), (3, 4))
    packed = len(node.required(0).known_shape) == 5 and node.input(1) is None and node.input(2) is None
    if not separate and not packed:
        return False
    lengths = [node.required(0).known_shape[1], node.required(0 if packed else 1).known_shape[-2 if separate else 1]]
    causal = node.attributes.get("unidirectional", 0)
    bias = node.input(3)
    known = bias is None or bias.shape is not None
    return known and (not causal or (lengths[0] == lengths[1] and isinstance(lengths[0], int)))


def _multi_head(write: _Expansion, node: Node) -> None:
    """Query [B, L, nH*d], key and value alike or [B, nH, L, d]; or all three in one [B, L, nH, 3, d]. The bias
    [3*nH*d] is of the three.
    """
    heads = int(node.attributes["num_heads"])
    if node.input(1) is None:
        batch, length, _, _, size = node.required(0).known_shape
        parts = [write.picked(node.required(0), k, (batch, length, static(heads) * static(size))) for k in range(3)]
    else:
        parts = [node.required(k) for k in range(3)]
    bias, at = node.input(3), 0
    operands = []
    for part in parts:
        if bias is not None and len(part.known_shape) == 3:
            width = static(part.known_shape[2])
            part = write.emit("Add", [part, write.slice(bias, at, at + width)], part.known_shape)
            at += width
        operands.append(write.heads_first(part, heads))
    query, key, value = operands
    scale = node.attributes.get("scale", 0.0) or 1.0 / math.sqrt(static(query.known_shape[3]))
    causal = bool(node.attributes.get("unidirectional", 0))
    write.heads_joined(write.attended(query, key, value, scale, node.input(5), causal=causal))


def _is_plain_contributed(node: Node) -> bool:
    if any(v is not None for v in (node.input(3), node.input(4), *node.inputs[6:])) or not _has(node, (3,), (2,)):
        return False
    causal, length = node.attributes.get("unidirectional", 0), node.required(0).known_shape[1]
    return not node.attributes.get("do_rotary", 0) and (not causal or isinstance(length, int))


def _contributed(write: _Expansion, node: Node) -> None:
    """The input [B, L, C] times the weights [C, q+k+v] of the packed Linear, plus its bias."""
    data, weights = node.required(0), node.required(1)
    batch, length, _ = data.known_shape
    width = static(weights.known_shape[1])
    packed = write.emit("MatMul", [data, weights], (batch, length, width))
    if node.input(2) is not None:
        packed = write.emit("Add", [packed, node.required(2)], packed.known_shape)
    sizes = [int(s) for s in node.attributes.get("qkv_hidden_sizes") or [width // 3] * 3]
    parts = write.split(packed, sizes)
    query, key, value = (write.heads_first(part, int(node.attributes["num_heads"])) for part in parts)
    scale = node.attributes.get("scale", 0.0) or 1.0 / math.sqrt(static(query.known_shape[3]))
    causal = bool(node.attributes.get("unidirectional", 0))
    write.heads_joined(write.attended(query, key, value, scale, node.input(5), causal=causal))


def _is_plain_product(node: Node) -> bool:
    shapes = [v.shape for v in node.inputs if v is not None]
    if len(shapes) != 2 or any(s is None or len(s) < 2 for s in shapes) or node.required(0).dtype is None:
        return False
    return not node.attributes.get("transBatchA", 0) and not node.attributes.get("transBatchB", 0)


def _product(write: _Expansion, node: Node) -> None:
    """alpha * A B, either of them transposed first."""
    operands = []
    for k, flag in enumerate(("transA", "transB")):
        operand = node.required(k)
        if node.attributes.get(flag, 0):
            rank = len(operand.known_shape)
            operand = write.transposed(operand, (*range(rank - 2), rank - 1, rank - 2))
        operands.append(operand)
    shape, alpha = node.output.known_shape, node.attributes.get("alpha", 1.0)
    product = write.emit("MatMul", operands, shape)
    if alpha != 1.0:
        product = write.emit("Mul", [product, write.constant(np.array(alpha, node.required(0).dtype))], shape)
    write.named(product)


class _Expansion:
    """The nodes that stand for one node, in order."""

    def __init__(self, graph: Graph, node: Node) -> None:
        self.graph, self.node = graph, node
        self.nodes: list[Node] = []
        self.stem = node.output.name

    def emit(self, op: str, inputs: Sequence[Value], shape: Shape, **attributes: Any) -> Value:
        output = Value(self.graph.fresh_name(f"{self.stem}_{op.lower()}"), shape, inputs[0].dtype)
        name = self.node.name if op == "Softmax" and self.node.name else output.name
        self.nodes.append(Node(op, inputs, [output], attributes, name))
        return output

    def named(self, value: Value) -> None:
        """Let the last node write the output of the node that is replaced."""
        last = self.nodes[-1]
        assert last.output is value
        last.outputs = [self.node.output]
        self.node.output.producer = last
        self.node.output.shape, self.node.output.dtype = value.shape, value.dtype

    def attended(
        self,
        query: Value,
        key: Value,
        value: Value,
        scale: float,
        mask: Value | None,
        *,
        causal: bool = False,
        precision: int = 0,
    ) -> Value:
        """softmax(scale * query key^T + mask) value, all [B, nH, L, d]; precision: ONNX data type of the softmax."""
        dtype = query.dtype
        assert dtype is not None
        scaled = self.emit("Mul", [query, self.constant(np.array(scale, dtype))], query.known_shape)
        batch, heads, length, _ = query.known_shape
        logits_shape: Shape = (batch, heads, length, key.known_shape[2])
        logits = self.emit("MatMul", [scaled, self.transposed(key, (0, 1, 3, 2))], logits_shape)
        if causal:
            allowed = np.tri(static(length), static(logits_shape[3]), dtype=bool)
            logits = self._masked(logits, self.constant(allowed))
        logits = self._masked(logits, mask)
        wide = onnx.helper.tensor_dtype_to_np_dtype(precision) if precision else dtype
        weights = self._cast(self.emit("Softmax", [self._cast(logits, wide)], logits_shape, axis=-1), dtype)
        return self.emit("MatMul", [weights, value], (batch, heads, length, value.known_shape[3]))

    def _masked(self, logits: Value, mask: Value | None) -> Value:
        """Add a float mask; a boolean one excludes where it is false."""
        if mask is None:
            return logits
        if mask.dtype == np.dtype(bool):
            assert logits.dtype is not None
            lowest = self.constant(np.array(-np.inf, logits.dtype))
            masked = self.emit("Where", [mask, logits, lowest], logits.known_shape)
            masked.dtype = logits.dtype
            return masked
        try:
            shape = broadcast([logits.known_shape, mask.known_shape])
        except UnknownShape:
            shape = logits.known_shape
        return self.emit("Add", [logits, mask], shape)

    def heads_first(self, value: Value, heads: Extent) -> Value:
        """[B, L, nH*d] or [B, nH, L, d] -> [B, nH, L, d]."""
        shape = value.known_shape
        if len(shape) == 4:
            return value
        split = self.reshaped(value, (shape[0], shape[1], heads, static(shape[2]) // static(heads)))
        return self.transposed(split, (0, 2, 1, 3))

    def heads_joined(self, attended: Value) -> None:
        """[B, nH, L, d] -> [B, L, nH*d], as the output of the node that is replaced."""
        batch, heads, length, size = attended.known_shape
        moved = self.transposed(attended, (0, 2, 1, 3))
        self.named(self.reshaped(moved, (batch, length, static(heads) * static(size))))

    def constant(self, array: np.ndarray) -> Value:
        return Value(self.graph.fresh_name(f"{self.stem}_constant"), array.shape, array.dtype, array)

    def reshaped(self, value: Value, shape: Shape) -> Value:
        target = np.array([e if isinstance(e, int) else -1 for e in shape], np.int64)
        return self.emit("Reshape", [value, self.constant(target)], shape)

    def transposed(self, value: Value, permutation: tuple[int, ...]) -> Value:
        shape = tuple(value.known_shape[p] for p in permutation)
        return self.emit("Transpose", [value], shape, perm=list(permutation))

    def picked(self, packed: Value, part: int, shape: Shape) -> Value:
        """Part of [B, L, nH, 3, d] as [B, L, nH*d]."""
        whole = packed.known_shape
        one = self.emit("Gather", [packed, self.constant(np.array(part))], (*whole[:3], *whole[4:]), axis=3)
        return self.reshaped(one, shape)

    def slice(self, vector: Value, start: int, end: int) -> Value:
        """vector[start:end]; a constant stays one."""
        if vector.is_constant:
            return self.constant(vector.constant[start:end])
        bounds = [self.constant(np.array([n], np.int64)) for n in (start, end, 0)]
        return self.emit("Slice", [vector, *bounds], (end - start,))

    def split(self, packed: Value, sizes: Sequence[int]) -> list[Value]:
        """[B, L, sum of sizes] -> one [B, L, size] each."""
        batch, length, _ = packed.known_shape
        outputs = [Value(self.graph.fresh_name(f"{self.stem}_split"), (batch, length, s), packed.dtype) for s in sizes]
        inputs = [packed, self.constant(np.array(sizes, np.int64))]
        self.nodes.append(Node("Split", inputs, outputs, {"axis": 2}, outputs[0].name))
        return outputs

    def _cast(self, value: Value, dtype: np.dtype) -> Value:
        if value.dtype == dtype:
            return value
        cast = self.emit("Cast", [value], value.known_shape, to=int(onnx.helper.np_dtype_to_tensor_dtype(dtype)))
        cast.dtype = dtype
        return cast


_Form = tuple[Callable[[Node], bool], Callable[[_Expansion, Node], None]]
_FORMS: dict[tuple[str, str], _Form] = {
    (STANDARD_DOMAIN, "Attention"): (_is_plain_standard, _standard),
    (CONTRIB_DOMAIN, "Attention"): (_is_plain_contributed, _contributed),
    (CONTRIB_DOMAIN, "MultiHeadAttention"): (_is_plain_multi_head, _multi_head),
    (CONTRIB_DOMAIN, "FusedMatMul"): (_is_plain_product, _product),
}
