"""Linear layers among what is emitted: x W^T + b of a parameter W is one `linear`, which torch runs as one product."""

from __future__ import annotations

from dataclasses import dataclass

from attnrewrite.frontend.fx.demand import Demand, Emit
from attnrewrite.graph import STANDARD_DOMAIN, Node, Value


@dataclass(frozen=True, eq=False)
class Linear:
    """data [..., K], weight [N, K], bias [N] or None -> [..., N]."""

    data: Value
    weight: Value
    bias: Value | None = None


def linears(demand: Demand) -> tuple[dict[Node, Linear], set[Value]]:
    """The layers by the node that ends them, and the products inside of them, which nobody else reads."""
    users = demand.graph.users()
    found: dict[Node, Linear] = {}
    inside: set[Value] = set()
    for node in demand.graph.nodes:
        if node.domain != STANDARD_DOMAIN or not node.outputs or not isinstance(demand.plans.get(node.output), Emit):
            continue
        if node.op == "MatMul" and (layer := _product(demand, node)) is not None:
            found[node] = layer
        elif node.op == "Add" and len(node.inputs) == 2:
            for product, bias in ((node.required(0), node.required(1)), (node.required(1), node.required(0))):
                layer = found.get(product.producer) if product.producer is not None else None
                if layer is None or product in demand.graph.outputs or users[product] != [node]:
                    continue
                if bias.is_constant and bias.shape == layer.weight.known_shape[:1] and bias.dtype == product.dtype:
                    found[node] = Linear(layer.data, layer.weight, bias)
                    inside.add(product)
                    break
    return found, inside


def _product(demand: Demand, node: Node) -> Linear | None:
    data, factor = node.required(0), node.required(1)
    read = demand.as_read.get(factor) if factor.is_constant and factor not in demand.live else None
    if read is None or read.node.op != "Transpose" or data.is_constant or len(data.shape or ()) < 2:
        return None
    weight = read.inputs[0]
    if weight is None or len(weight.shape or ()) != 2 or not demand.is_held(weight):
        return None
    return Linear(data, weight)
