"""Linear layers on flattened axes, on the axes themselves: Reshape([..., C] -> [P, C]), Gemm, Reshape -> [..., C'].

Where the symbolic batch is not the outermost of the flattened axes (nn.MultiheadAttention computes in [tokens, batch,
channels]), positions along the flattened axis are no affine function of it, and nothing could be said of where a token
went. The layer does not care: it is the same on every row.
"""

from __future__ import annotations

import numpy as np

from attnrewrite.dims import Dim, Shape
from attnrewrite.graph import STANDARD_DOMAIN, Graph, Node, Value


def keep_axes(graph: Graph) -> None:
    """Undo such flattening in place; shapes must be known. Layers on other flattened tensors stay as they are."""
    users, outputs = graph.users(), set(graph.outputs)
    replaced: dict[Node, list[Node]] = {}
    for node in graph.nodes:
        if not _splits_symbols(node):
            continue
        chain: list[Node] = []
        value = node.required(0)
        while (step := value.producer) is not None and _is_row_wise(step, value):
            if users.get(value, []) != [chain[-1] if chain else node] or value in outputs:
                break
            chain.append(step)
            value = step.inputs[0] if not step.required(0).is_constant else step.required(1)  # type: ignore[assignment]
        if not chain:
            continue
        while (
            value.producer is not None and value.producer.op == "Reshape" and value.producer.domain == STANDARD_DOMAIN
        ):
            value = value.producer.required(0)
        lead = node.output.known_shape[:-1]
        replaced[node] = _on_axes(graph, value, chain[::-1], lead, node)
    if replaced:
        graph.nodes = [n for node in graph.nodes for n in replaced.get(node, [node])]
        graph.remove_dead()


def _splits_symbols(node: Node) -> bool:
    """Whether a Reshape splits the rows of a matrix so that a symbolic axis is not the first."""
    if node.op != "Reshape" or node.domain != STANDARD_DOMAIN or node.output.shape is None:
        return False
    before, shape = node.required(0).shape, node.output.shape
    if before is None or len(before) != 2 or len(shape) < 3 or before[1] != shape[-1]:
        return False
    return any(isinstance(e, Dim) for e in shape[1:-1]) and sum(isinstance(e, Dim) for e in shape) == 1


def _is_row_wise(node: Node, value: Value) -> bool:
    """A Linear layer of a matrix, or a constant per column added to it or multiplied with it."""
    if node.domain != STANDARD_DOMAIN or value.shape is None or len(value.shape) != 2:
        return False
    first, second = node.input(0), node.input(1)
    if first is None or second is None or first.shape is None or second.shape is None:
        return False
    match node.op:
        case "Gemm":
            plain = not node.attributes.get("transA", 0) and not first.is_constant
            return plain and all(v is not None and v.is_constant for v in node.inputs[1:])
        case "MatMul":
            return second.is_constant and len(second.shape) == 2 and not first.is_constant and len(first.shape) == 2
        case "Add" | "Mul":
            if first.is_constant == second.is_constant:
                return False
            return len((first if first.is_constant else second).shape or ()) <= 1
    return False


def _on_axes(graph: Graph, value: Value, chain: list[Node], lead: Shape, last: Node) -> list[Node]:
    """The chain on `[*lead, C]`, its result the output of `last`."""
    columns = chain[0].required(0 if not chain[0].required(0).is_constant else 1).known_shape[-1]
    nodes: list[Node] = []

    def emit(op: str, inputs: list[Value], channels: object, stem: str, name: str = "") -> Value:
        output = Value(graph.fresh_name(f"{stem}_axes"), (*lead, channels), value.dtype)  # type: ignore[arg-type]
        nodes.append(Node(op, inputs, [output], {}, name or output.name))
        return output

    def constant(array: np.ndarray, stem: str) -> Value:
        return Value(graph.fresh_name(f"{stem}_axes"), array.shape, array.dtype, array)

    target = np.array([-1 if isinstance(e, Dim) else e for e in (*lead, columns)], np.int64)
    current = emit("Reshape", [value, constant(target, value.name)], columns, value.name)
    for node in chain:
        stem, channels = node.output.name, node.output.known_shape[-1]
        if node.op != "Gemm":
            inputs = [v if v is not None and v.is_constant else current for v in node.inputs]
            current = emit(node.op, inputs, channels, stem, node.name)
            continue
        weight, bias = node.required(1).constant, node.constant(2)
        weight = weight.T if node.attributes.get("transB", 0) else weight
        weight = weight * np.array(node.attributes.get("alpha", 1.0), weight.dtype)
        current = emit("MatMul", [current, constant(np.ascontiguousarray(weight), stem)], channels, stem, node.name)
        if bias is not None:
            bias = (bias * np.array(node.attributes.get("beta", 1.0), bias.dtype)).reshape(-1)
            current = emit("Add", [current, constant(bias, stem)], channels, stem)
    nodes[-1].outputs = [last.output]
    last.output.producer = nodes[-1]
    return nodes
