"""The guard that torch's decomposition of scaled_dot_product_attention puts around a softmax, as exporters write it.

    Where(Not(ReduceMax(Not(x == -inf))), 0, Softmax(x))  ->  Where(IsNaN(Softmax(x)), 0, Softmax(x))

Both give zeros for a query that its mask leaves no key; the second does not read the logits a second time.
"""

from __future__ import annotations

import numpy as np

from attnrewrite.graph import STANDARD_DOMAIN, Graph, Node, Value


def guard_by_softmax(graph: Graph) -> None:
    """Rewrite every such guard, in place."""
    tests: dict[Node, Node] = {}
    for node in graph.nodes:
        softmax = node.required(2).producer if node.op == "Where" and node.domain == STANDARD_DOMAIN else None
        if softmax is None or softmax.op != "Softmax" or not _says_no_key(node.required(0), softmax):
            continue
        weights = softmax.output
        answer = Value(graph.fresh_name(f"{weights.name}_isnan"), weights.shape, np.dtype(bool))
        tests[node] = Node("IsNaN", [weights], [answer], name=answer.name)
        node.inputs[0] = answer
    graph.nodes = [n for node in graph.nodes for n in ([tests[node], node] if node in tests else [node])]
    graph.remove_dead()


def _says_no_key(condition: Value, softmax: Node) -> bool:
    """Whether a condition is that over the keys of the logits, casts aside."""
    rank = len(softmax.output.known_shape)
    node = condition.producer
    for op in ("Not", "ReduceMax", "Not", "Equal"):
        while node is not None and node.op == "Cast":
            node = node.required(0).producer
        if node is None or node.op != op or node.domain != STANDARD_DOMAIN:
            return False
        if op == "Equal":
            lowest = node.constant(1)
            return node.input(0) is softmax.input(0) and lowest is not None and bool(np.isneginf(lowest).all())
        if op == "ReduceMax":
            axes = node.constant(1)
            over_keys = axes is not None and [int(a) % rank for a in axes] == [softmax.attributes["axis"] % rank]
            if not over_keys or not node.attributes.get("keepdims", 1):
                return False
        node = node.required(0).producer
    return False
