"""Linear layers written as Einsum, read as the MatMul they are: "abc,cde->abde" with a constant weight (Keras).

The last axes of the data are summed with those of the weight, and the weight's others take their place: one MatMul,
with a Reshape on either side where they are several. Any other Einsum stays as it is.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from attnrewrite.dims import Dim, Extent, product, static
from attnrewrite.graph import STANDARD_DOMAIN, Graph, Node, Value
from attnrewrite.indexing.einsum import einsum_labels
from attnrewrite.indexing.map import IndexingError


def einsum_to_matmul(graph: Graph) -> None:
    """Replace every Einsum that is a Linear layer, in place."""
    graph.nodes = [n for node in graph.nodes for n in (_layer(graph, node) or [node])]


def _layer(graph: Graph, node: Node) -> list[Node] | None:
    """The nodes that stand for an Einsum; None where it is no Linear layer."""
    if node.op != "Einsum" or node.domain != STANDARD_DOMAIN or len(node.inputs) != 2:
        return None
    values = [node.required(0), node.required(1)]
    if values[0].is_constant == values[1].is_constant or any(v.shape is None for v in values):
        return None
    try:
        terms, output = einsum_labels(node.attributes["equation"], [len(v.known_shape) for v in values])
    except IndexingError:
        return None
    at = 1 if values[1].is_constant else 0
    data, weight = values[1 - at], values[at]
    own, other = terms[1 - at], terms[at]
    shared = [x for x in own if x in other]
    kept, made = [x for x in own if x not in other], [x for x in other if x not in own]
    repeated = any(len(set(t)) != len(t) for t in (own, other, output))
    if repeated or not shared or not made or own != kept + shared or output != kept + made:
        return None
    extents = dict(zip(own, data.known_shape, strict=True)) | dict(zip(other, weight.known_shape, strict=True))
    if any(data.known_shape[own.index(x)] != extents[x] for x in shared):
        return None  # an axis of extent 1 is repeated
    if any(isinstance(extents[x], Dim) for x in shared + made) or sum(isinstance(extents[x], Dim) for x in kept) > 1:
        return None
    return _Layer(graph, node).written(data, weight, other, (kept, shared, made), extents)


Labels = Sequence[str]


class _Layer:
    def __init__(self, graph: Graph, node: Node) -> None:
        self.graph, self.node = graph, node
        self.nodes: list[Node] = []

    def written(
        self,
        data: Value,
        weight: Value,
        labels: Labels,
        parts: tuple[Labels, Labels, Labels],
        extents: dict[str, Extent],
    ) -> list[Node]:
        kept, shared, made = parts
        lead = [extents[x] for x in kept]
        rows, columns = (static(product(tuple(extents[x] for x in part))) for part in (shared, made))
        matrix = weight.constant.transpose([labels.index(x) for x in [*shared, *made]]).reshape(rows, columns)
        constant = Value(self.graph.fresh_name(f"{weight.name}_matrix"), matrix.shape, matrix.dtype, matrix.copy())
        flat = self._reshaped(data, [*lead, rows])
        result = self._emit("MatMul", [flat, constant], [*lead, columns], self.node.name)
        self._reshaped(result, [*lead, *(extents[x] for x in made)])
        self.nodes[-1].outputs = [self.node.output]
        self.node.output.producer = self.nodes[-1]
        return self.nodes

    def _emit(self, op: str, inputs: list[Value], shape: list[Extent], name: str = "") -> Value:
        output = Value(self.graph.fresh_name(f"{self.node.output.name}_{op.lower()}"), tuple(shape), inputs[0].dtype)
        self.nodes.append(Node(op, inputs, [output], {}, name or output.name))
        return output

    def _reshaped(self, value: Value, shape: list[Extent]) -> Value:
        if list(value.known_shape) == shape:
            return value
        target = np.array([-1 if isinstance(e, Dim) else e for e in shape], np.int64)
        constant = Value(self.graph.fresh_name(f"{value.name}_shape"), target.shape, target.dtype, target)
        return self._emit("Reshape", [value, constant], shape)
