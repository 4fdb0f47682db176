"""Constants added to the parts of a tensor, read as one constant added to the whole.

Concat(a + c, b + d) is Concat(a, b) + Concat(c, d): stand-alone self-attention adds the embeddings of rows to one half
of its keys' channels and those of columns to the other (https://arxiv.org/abs/1906.05909).
"""

from __future__ import annotations

import math

import numpy as np

from attnrewrite.dims import is_static
from attnrewrite.graph import STANDARD_DOMAIN, Graph, Node, Value

# Constants written out over a common shape may take this many elements.
LIMIT = 1 << 20


def add_behind_concat(graph: Graph) -> None:
    """Replace every Concat of sums with constants by a sum with one constant, in place."""
    users = graph.users()
    read = {node for node in graph.nodes if node.op == "Concat" and node.domain == STANDARD_DOMAIN}
    graph.nodes = [n for node in graph.nodes for n in (_one_sum(graph, node, users) if node in read else [node])]
    graph.remove_dead()


def _one_sum(graph: Graph, node: Node, users: dict[Value, list[Node]]) -> list[Node]:
    """The Concat and the Add behind it that stand for a Concat; the node itself where there are none."""
    shape = node.output.shape
    if shape is None:
        return [node]
    rank, axis = len(shape), node.attributes.get("axis", 0) % len(shape)
    parts, constants = [], []
    for value in node.inputs:
        added = None if value is None else value.producer
        if added is None or added.op != "Add" or added.domain != STANDARD_DOMAIN or users[added.output] != [node]:
            return [node]
        data, other = (v for v in sorted(map(added.required, (0, 1)), key=lambda v: v.is_constant))
        if data.is_constant or not other.is_constant or data.shape != added.output.shape or data.shape is None:
            return [node]
        if not is_static((data.shape[axis],)) or added.output in graph.outputs or other.rank is None:
            return [node]
        parts.append(data)
        aligned = other.constant.reshape((1,) * (rank - other.rank) + other.constant.shape)
        constants.append(np.broadcast_to(aligned, _with(aligned.shape, axis, int(data.shape[axis]))))
    common = np.broadcast_shapes(*(_with(c.shape, axis, 1) for c in constants))
    if math.prod(common) * sum(c.shape[axis] for c in constants) > LIMIT:
        return [node]
    whole = np.concatenate([np.broadcast_to(c, _with(common, axis, c.shape[axis])) for c in constants], axis)
    joined = Value(graph.fresh_name(f"{node.output.name}_parts"), shape, node.output.dtype)
    constant = Value(graph.fresh_name(f"{node.output.name}_added"), whole.shape, whole.dtype, whole)
    concat = Node("Concat", parts, [joined], {"axis": axis}, node.name)
    return [concat, Node("Add", [joined, constant], [node.output], name=node.output.name)]


def _with(shape: tuple[int, ...], axis: int, extent: int) -> tuple[int, ...]:
    return (*shape[:axis], extent, *shape[axis + 1 :])
