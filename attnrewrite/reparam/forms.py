"""Values as linear operators of values before them.

A value may have several forms: the operator of its own node on the node's input, that of two nodes on the input of the
first, and so on back to where something is no linear operator. A sum has those forms that all its summands share.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from attnrewrite.dims import NonAffine, SymbolicExtent
from attnrewrite.facts import Facts
from attnrewrite.floats import step
from attnrewrite.graph import Node, UnknownShape, Value
from attnrewrite.reparam.border import Border, read_border
from attnrewrite.reparam.operator import Inexact, Linear, Operator, Scaling, add, compose, scaled, shifted, with_border
from attnrewrite.reparam.read import Reading, read_linear, read_offset, summands

# Forms kept of one value, and nodes walked back over: more than any branch has; a bound for linear networks.
MOST_FORMS = 8
DEEPEST = 48
# A model computes its border from a BatchNorm's numbers in their own precision, with four operations; and ONNX has the
# epsilon in float32, whatever they are in.
BORDER_ULP, BORDER_LEAST = 8, 2.0**-38

NOT_AN_OFFSET = Inexact("a summand is a constant that is not one per channel")


@dataclass(frozen=True, eq=False)
class Form:
    """operator(base), computed by these nodes at present. branches: how many paths are summed in it."""

    base: Value
    operator: Linear
    nodes: frozenset[Node] = frozenset()
    branches: int = 1


class Forms:
    """The forms of the values of one graph, found when asked for; valid as long as its facts."""

    def __init__(self, facts: Facts) -> None:
        self.facts = facts
        self._known: dict[Value, dict[Value, Form]] = {}
        self._readings: dict[Node, Reading | Inexact | None] = {}
        self._depth = 0

    def reading(self, node: Node) -> Reading | Inexact | None:
        if node not in self._readings:
            try:
                self._readings[node] = read_linear(node)
            except (SymbolicExtent, UnknownShape, NonAffine):
                self._readings[node] = None
        return self._readings[node]

    def of(self, value: Value) -> dict[Value, Form]:
        """The forms by their bases, the value itself first."""
        if value in self._known:
            return self._known[value]
        found = {value: Form(value, Scaling())}
        producer = value.producer
        if producer is None or producer.output is not value or self._depth >= DEEPEST:
            return found
        self._depth += 1
        try:
            for form in self._before(producer):
                if len(found) < MOST_FORMS:
                    found.setdefault(form.base, form)
        finally:
            self._depth -= 1
        self._known[value] = found
        return found

    def _before(self, node: Node) -> list[Form]:
        read = self.reading(node)
        if isinstance(read, Reading):
            return self.through(node, read)
        terms = summands(node)
        if len(terms) > 1:
            return self.summed(node, terms)
        border = None if isinstance(read, Inexact) else read_border(node.output)
        return [] if border is None else self.bordered(border)

    def through(self, node: Node, read: Reading) -> list[Form]:
        """The forms of what a node gives, by those of what it reads."""
        found = []
        for form in self.of(read.source).values():
            operator = combine(read.operator, form, read.source, node.output)
            if not isinstance(operator, Inexact):
                found.append(Form(form.base, operator, form.nodes | {node}, form.branches))
        return found

    def summed(self, node: Node, terms: Sequence[tuple[int, Value]]) -> list[Form]:
        """The forms of a sum: of a base that all summands share, constants per channel aside."""
        shape = node.output.known_shape
        computed = [(sign, v) for sign, v in terms if not v.is_constant]
        if not computed or any(v.shape != shape for _, v in computed):
            return []
        offsets = [(sign, read_offset(v, shape)) for sign, v in terms if v.is_constant]
        # No base lies behind any summand: the latest is looked at first, which says no to most residual sums at once.
        latest = max((v for _, v in computed), key=self.position)
        earliest = min(self.position(v) for _, v in computed)
        found = []
        for base in self.of(latest):
            if self.position(base) > earliest or not all(base in self.of(v) for _, v in computed):
                continue
            parts = [(sign, self.of(v)[base]) for sign, v in computed]
            operator = total(parts, offsets)
            if not isinstance(operator, Inexact):
                nodes = frozenset({node}).union(*(f.nodes for _, f in parts))
                found.append(Form(base, operator, nodes, sum(f.branches for _, f in parts)))
        return found

    def bordered(self, border: Border) -> list[Form]:
        """The forms of a value with a constant border, where the border is what the operator gives there anyway."""
        dtype, around = border.inner.dtype, border.numbers
        found = []
        for form in self.of(border.inner).values():
            if isinstance(form.operator, Operator) and form.operator.axes and dtype is not None:
                shapes = (form.base.known_shape, border.inner.known_shape)
                tolerance = max(BORDER_ULP * step(dtype), BORDER_LEAST)
                operator = with_border(form.operator, around, border.begin, border.end, *shapes, tolerance)
                if not isinstance(operator, Inexact):
                    found.append(Form(form.base, operator, form.nodes | border.nodes, form.branches))
        return found

    def position(self, value: Value) -> int:
        """Of the node that computes a value; inputs lie before all."""
        return self.facts.positions.get(value, -1)


def combine(outer: Linear, form: Form, middle: Value, result: Value) -> Linear | Inexact:
    return compose(outer, form.operator, form.base.known_shape, middle.known_shape, result.known_shape)


def total(parts: Sequence[tuple[int, Form]], offsets: Sequence[tuple[int, Linear | None]] = ()) -> Linear | Inexact:
    """The sum of forms of one base, each with its sign, and of constants c beside them, as x -> x + c; None stands for
    any other constant.
    """
    operator = add([scaled(form.operator, sign) for sign, form in parts])
    for sign, offset in offsets:
        if isinstance(operator, Inexact):
            break
        operator = NOT_AN_OFFSET if offset is None else shifted(operator, offset, sign)
    return operator
