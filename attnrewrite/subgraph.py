"""A part of a graph as a graph of its own, to try on it what may not be kept."""

from __future__ import annotations

from collections.abc import Sequence

from attnrewrite.facts import Facts
from attnrewrite.graph import Graph, Node, Value, ancestors


def copy_between(facts: Facts, entries: Sequence[Value], exits: Sequence[Value]) -> tuple[Graph, dict[Value, Value]]:
    """The part of the graph between these values as a graph of its own, and the copies by value; with what is computed
    beside them, behind the first entry, for the exits; and the cuts (Slice, Split) that somebody else makes of a value
    before the exits.

    Its inputs are the graph's and what the part reads beside the entries, its outputs what is read behind it.
    """
    first = min(facts.positions.get(v, -1) for v in entries)
    before = ancestors(exits)
    inside = before - set(exits)
    nodes = [
        n
        for n in facts.graph.nodes[first + 1 :]
        if any(o in before for o in n.outputs) or (n.op in ("Slice", "Split") and n.required(0) in inside)
    ]
    copied_nodes = set(nodes)
    own = {o for n in nodes for o in n.outputs}
    copies: dict[Value, Value] = {}

    def copy_of(value: Value) -> Value:
        if value.is_constant:
            return value
        if value not in copies:
            copies[value] = Value(value.name, value.shape, value.dtype)
        return copies[value]

    copied = []
    for node in nodes:
        operands = [None if v is None else copy_of(v) for v in node.inputs]
        copied.append(
            Node(node.op, operands, [copy_of(o) for o in node.outputs], node.attributes, node.name, node.domain)
        )
        copied[-1].made_by = node.made_by
    read = {v for n in nodes for v in n.reads() if not v.is_constant and v not in own}
    seen = [o for o in own if o in facts.graph.outputs or any(u not in copied_nodes for u in facts.users(o))]
    inputs = [copy_of(v) for v in dict.fromkeys([*facts.graph.inputs, *read])]
    return Graph(inputs, [copy_of(v) for v in seen], copied, facts.graph.opset), copies
