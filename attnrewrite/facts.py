"""What passes ask of a graph: positions, users, single use. Computed once for a graph, never mutated by a pass."""

from __future__ import annotations

from attnrewrite.graph import Graph, Node, Value


class Facts:
    """Facts of one graph, valid until somebody edits it."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.positions: dict[Value, int] = {o: i for i, node in enumerate(graph.nodes) for o in node.outputs}
        self._users = graph.users()
        self._outputs = set(graph.outputs)

    def users(self, value: Value) -> list[Node]:
        """Nodes that read the value, once each."""
        return self._users.get(value, [])

    def only_user(self, value: Value) -> Node | None:
        """The one node that reads the value; None where there are several, or it leaves the graph."""
        users = self.users(value)
        return users[0] if len(users) == 1 and value not in self._outputs else None
