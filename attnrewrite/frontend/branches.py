"""An If whose condition is known is the branch that is taken.

TorchScript writes one for every `if` on a shape (interpolating a table of positions, squeezing an axis), with the
condition computed from shapes that folding knows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping

import numpy as np
import onnx_graphsurgeon as gs

from attnrewrite.frontend.tensors import Importer, captured
from attnrewrite.graph import Graph, Node, Value


def names_in_several_branches(graph: Graph) -> set[str]:
    """What more than one subgraph calls something of its own: outside of them it would be two things."""
    return {
        name for name, bodies in Counter(_defined(n.attributes.values() for n in graph.nodes)).items() if bodies > 1
    }


def taken_branch(graph: Graph, node: Node, condition: np.ndarray, ambiguous: set[str]) -> list[Node]:
    """The nodes that stand for an If of the graph under a condition of one element; [] where there is none to take.

    ambiguous: names that what comes out of the branch must not keep.
    """
    body = node.attributes.get("then_branch" if condition.reshape(-1)[0] else "else_branch")
    if not isinstance(body, gs.Graph) or len(body.outputs) != len(node.outputs):
        return []
    importer = _BranchImporter(graph, body, {v.name: v for v in node.captures}, ambiguous)
    nodes = importer.nodes(body)
    results = importer.values(body.outputs)
    return nodes + [Node("Identity", [r], [o]) for r, o in zip(results, node.outputs, strict=True)]


class _BranchImporter(Importer):
    """Tensors of a branch: those of the graph around it are known by name, its own get names nothing else has."""

    def __init__(self, graph: Graph, body: gs.Graph, around: Mapping[str, Value], ambiguous: set[str]) -> None:
        super().__init__(graph.source.folder, set(around) | {t.name for t in _constants(body)})
        self._graph = graph
        self._around = around
        self._ambiguous = ambiguous
        self._own = {id(t) for n in body.nodes for t in n.outputs}

    def made(self, tensor: gs.Tensor) -> Value:
        if id(tensor) not in self._own and tensor.name in self._around:
            return self._around[tensor.name]
        name = self._graph.fresh_name(tensor.name)
        while name in self._ambiguous:
            name = self._graph.fresh_name(tensor.name)
        tensor.name = name  # branches inside this one know the tensor by its name
        return super().made(tensor)


def _defined(attributes: Iterable[Iterable[object]]) -> Iterator[str]:
    """The names that each subgraph among these attributes defines, and those inside it."""
    for body in (a for values in attributes for a in values if isinstance(a, gs.Graph)):
        own = [*body.inputs, *(t for n in body.nodes for t in n.outputs), *_constants(body)]
        yield from {t.name for t in own}
        yield from _defined(n.attrs.values() for n in body.nodes)


def _constants(body: gs.Graph) -> list[gs.Tensor]:
    read = [t for n in body.nodes for t in [*n.inputs, *captured(n)]]
    return [t for t in [*read, *body.outputs] if isinstance(t, gs.Constant)]
