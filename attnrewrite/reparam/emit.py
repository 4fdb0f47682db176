"""Writing a plan: one convolution, Gemm or MatMul per group, with new weights, and the sums that remain."""

from __future__ import annotations

import numpy as np

from attnrewrite.graph import Graph, Node, Value
from attnrewrite.reparam.operator import Operator
from attnrewrite.reparam.plan import Plan
from attnrewrite.reparam.weights import Weights


def into(plan: Plan) -> str:
    """The operator that a plan's groups are written with."""
    operator, shape = plan.groups[0].operator, plan.root.output.known_shape
    return "Conv" if operator.axes else "Gemm" if len(shape) == 2 else "MatMul"


class Writer:
    """The nodes of a plan, in order; the initialisers of the model stay as they are for whoever shares them."""

    def __init__(self, graph: Graph, plan: Plan, made_by: str) -> None:
        self.graph, self.plan, self.made_by = graph, plan, made_by
        self.result = plan.root.output
        self.nodes: list[Node] = []

    def written(self) -> Value:
        """The plan's result."""
        groups = zip(self.plan.groups, self.plan.weights, strict=True)
        terms = [(1, self._group(group.operator, group.base, own)) for group, own in groups]
        terms += self.plan.rest
        terms.sort(key=lambda term: -term[0])  # what is subtracted comes last
        sign, total = terms[0]
        assert sign == 1, "a group is added"
        for sign, value in terms[1:]:
            total = self._emit("Add" if sign > 0 else "Sub", [total, value])
        return total

    def _group(self, operator: Operator, base: Value, weights: Weights) -> Value:
        kernel, bias = weights.rounded[0], weights.rounded[1:]
        if operator.axes:
            return self._emit("Conv", [base, *self._constants(kernel, *bias)], _attributes(operator))
        matrix = np.ascontiguousarray(kernel.T)
        if len(self.result.known_shape) == 2:
            return self._emit("Gemm", [base, *self._constants(matrix, *bias)])
        product = self._emit("MatMul", [base, *self._constants(matrix)])
        return self._emit("Add", [product, self._constant("bias", bias[0])]) if bias else product

    def _constants(self, kernel: np.ndarray, *bias: np.ndarray) -> list[Value]:
        return [self._constant("weight", kernel), *(self._constant("bias", b) for b in bias)]

    def _constant(self, what: str, array: np.ndarray) -> Value:
        return Value(self.graph.fresh_name(f"{self.result.name}_{what}"), array.shape, array.dtype, array)

    def _emit(self, op: str, inputs: list[Value], attributes: dict[str, object] | None = None) -> Value:
        output = Value(self.graph.fresh_name(f"{self.result.name}_folded"), self.result.shape, self.result.dtype)
        node = Node(op, inputs, [output], attributes, output.name)
        node.made_by = self.made_by
        self.nodes.append(node)
        return output


def _attributes(operator: Operator) -> dict[str, object]:
    axes = operator.axes
    return {
        "kernel_shape": [a.kernel for a in axes],
        "strides": [a.stride for a in axes],
        "dilations": [a.dilation for a in axes],
        "pads": [*(a.begin for a in axes), *(a.end for a in axes)],
        "group": operator.groups,
    }
