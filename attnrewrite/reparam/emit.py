"""Writing a plan: one convolution, Gemm or MatMul per group, with new weights, and the sums that remain."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from attnrewrite.graph import Graph, Node, Value
from attnrewrite.reparam.operator import Operator, regrouped
from attnrewrite.reparam.plan import Plan
from attnrewrite.reparam.precision import ulp


@dataclass(frozen=True, eq=False)
class Weights:
    """The numbers of one group in float64 and in the model's type: kernel [O, I/groups, *taps], bias [O] or None."""

    exact: tuple[np.ndarray, ...]
    rounded: tuple[np.ndarray, ...]

    @property
    def are_finite(self) -> bool:
        return all(np.isfinite(r.astype(np.float64)).all() for r in self.rounded)

    @property
    def size(self) -> int:
        return sum(r.size for r in self.rounded)

    @property
    def error(self) -> float:
        """The largest |rounded - exact|."""
        return max(float(np.abs(r.astype(np.float64) - e).max(initial=0.0)) for e, r in self._pairs())

    @property
    def error_in_ulp(self) -> float:
        """The largest error in units in the last place of the number it is an error of; at most 1/2."""
        return max(float((np.abs(r.astype(np.float64) - e) / ulp(r)).max(initial=0.0)) for e, r in self._pairs())

    def _pairs(self) -> list[tuple[np.ndarray, np.ndarray]]:
        return list(zip(self.exact, self.rounded, strict=True))


def weights_of(operator: Operator, dtype: np.dtype) -> Weights:
    """Computed in float64 and rounded once."""
    kernel = operator.kernel()
    if not operator.axes:
        kernel = regrouped(kernel, operator.groups, 1)
    exact = (kernel,) if operator.bias is None else (kernel, operator.bias())
    with np.errstate(over="ignore"):  # `are_finite` tells
        return Weights(exact, tuple(e.astype(dtype) for e in exact))


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

    def written(self, weights: list[Weights]) -> Value:
        """The plan's result; weights: of its groups."""
        groups = zip(self.plan.groups, weights, strict=True)
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
