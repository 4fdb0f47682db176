"""What passes ask of a graph: positions, users, single use. Computed once for a graph, never mutated by a pass."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, TypeVar

from attnrewrite.graph import Graph, Node, Value

T = TypeVar("T")


class Facts:
    """Facts of one graph, valid until somebody edits it."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.positions: dict[Value, int] = {o: i for i, node in enumerate(graph.nodes) for o in node.outputs}
        self._users = graph.users()
        self._outputs = set(graph.outputs)
        self.apart: frozenset[Value] = frozenset()  # results of nodes that the graph does not hold
        self._derived: dict[Any, Any] = {}

    def with_nodes(self, nodes: Sequence[Node]) -> Facts:
        """The same facts, with nodes behind the last one that belong to no graph (an analysis' own)."""
        facts = copy.copy(self)
        facts.positions = dict(self.positions)
        facts._derived = {}
        for node in nodes:
            facts.positions.update(dict.fromkeys(node.outputs, len(facts.positions)))
        facts.apart = self.apart | {o for node in nodes for o in node.outputs}
        return facts

    def derived(self, analysis: Callable[[Facts], T]) -> T:
        """What an analysis makes of these facts, made when first asked for and kept with them."""
        if analysis not in self._derived:
            self._derived[analysis] = analysis(self)
        found: T = self._derived[analysis]
        return found

    def users(self, value: Value) -> list[Node]:
        """Nodes that read the value, once each."""
        return self._users.get(value, [])

    def is_without_data(self, value: Value) -> bool:
        """Whether the value is a constant or computed from constants alone: a mask too large to be folded, say."""
        return value.is_constant or value in self._without_data

    @cached_property
    def _without_data(self) -> set[Value]:
        found: set[Value] = set()
        for node in self.graph.nodes:
            if all(v.is_constant or v in found for v in node.reads()):
                found.update(node.outputs)
        return found

    def only_user(self, value: Value) -> Node | None:
        """The one node that reads the value; None where there are several, or it leaves the graph."""
        users = self.users(value)
        return users[0] if len(users) == 1 and value not in self._outputs else None
