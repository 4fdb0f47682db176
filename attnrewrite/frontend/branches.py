"""An If whose condition is known is the branch that is taken.

TorchScript writes one for every `if` on a shape (interpolating a table of positions, squeezing an axis), with the
condition computed from shapes that folding knows.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_graphsurgeon as gs

from attnrewrite.frontend.tensors import Importer, captured
from attnrewrite.graph import Graph, Node, Value


def taken_branch(graph: Graph, node: Node, condition: np.ndarray) -> list[Node]:
    """The nodes that stand for an If of the graph under a condition of one element; [] where there is none to take."""
    body = node.attributes.get("then_branch" if condition.reshape(-1)[0] else "else_branch")
    if not isinstance(body, gs.Graph) or len(body.outputs) != len(node.outputs):
        return []
    importer = _BranchImporter(graph, body, {v.name: v for v in node.captures})
    nodes = importer.nodes(body)
    results = importer.values(body.outputs)
    return nodes + [Node("Identity", [r], [o]) for r, o in zip(results, node.outputs, strict=True)]


class _BranchImporter(Importer):
    """Tensors of a branch: those of the graph around it are known by name, its own get names nothing else has."""

    def __init__(self, graph: Graph, body: gs.Graph, around: Mapping[str, Value]) -> None:
        super().__init__(graph.source.folder, set(around) | {t.name for t in _constants(body)})
        self._graph = graph
        self._around = around
        self._own = {id(t) for n in body.nodes for t in n.outputs}

    def made(self, tensor: gs.Tensor) -> Value:
        if id(tensor) not in self._own and tensor.name in self._around:
            return self._around[tensor.name]
        # branches inside this one know the tensor by its name
        tensor.name = self._graph.fresh_name(tensor.name)
        return super().made(tensor)


def _constants(body: gs.Graph) -> list[gs.Tensor]:
    return [t for n in body.nodes for t in [*n.inputs, *captured(n)] if isinstance(t, gs.Constant)]
