"""What to fold: the groups of nodes that one operator replaces, exactly and at no higher cost.

The cost of a graph is the number of multiplications for one sample: a convolution or a matrix product takes one for
every product it sums (those of the taps between the taps of a dilated kernel too, once it is written as one), a mean
one for every element of its window; a normalisation, a scale, an added bias and each sum take one for every element
they give. Branches are folded where that number does not grow and fewer nodes remain, a chain where it shrinks and its
weights do not grow.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from attnrewrite.dims import Dim, Extent, Shape, elements
from attnrewrite.facts import Facts
from attnrewrite.graph import Node, Value
from attnrewrite.reparam.border import moves
from attnrewrite.reparam.forms import Form, Forms, total
from attnrewrite.reparam.operator import Inexact, Linear, Operator, Scaling, shifted
from attnrewrite.reparam.read import PRODUCTS, SUMS, Reading, read_offset, summands
from attnrewrite.reparam.weights import Weights, weights_of

# What a symbol counts for where costs are compared: maps and rows of tokens are about that long.
NOMINAL_EXTENT = 64
COUNTED = PRODUCTS | {"AveragePool"}
ELEMENTWISE = frozenset({"BatchNormalization", "Mul", "Div", "Add", "Sub", "Neg"})

Terms = tuple[tuple[int, Value], ...]


@dataclass(frozen=True, eq=False)
class Group:
    """Summands of a sum that one operator on a base replaces; a chain is a group of one.

    terms: the summands, each with its sign, constants among them.
    """

    base: Value
    operator: Operator
    nodes: frozenset[Node]
    branches: int
    terms: Terms


@dataclass(frozen=True, eq=False)
class Plan:
    """One fold. root: the node whose result is computed anew, as the sum of the groups and of the rest.

    nodes: those that go, the root among them. before, after: multiplications for one sample.
    """

    root: Node
    groups: tuple[Group, ...]
    rest: Terms
    nodes: frozenset[Node]
    before: int
    after: int

    @cached_property
    def weights(self) -> tuple[Weights, ...]:
        """Of every group, in the type of the result."""
        dtype = self.root.output.dtype
        assert dtype is not None
        return tuple(weights_of(group.operator, dtype) for group in self.groups)

    @property
    def branches(self) -> int:
        return sum(g.branches for g in self.groups)

    @property
    def saving(self) -> int:
        return self.before - self.after

    @property
    def parameters_before(self) -> int:
        """Numbers in the weights of the nodes that go, each counted once."""
        kept = {v for _, v in self.rest}
        read = [v for n in self.nodes if not moves(n) for v in n.reads() if v.is_constant]
        return sum(elements(v.known_shape) for v in dict.fromkeys(read) if v not in kept)

    @property
    def parameters_after(self) -> int:
        return sum(emitted_parameters(g.operator) for g in self.groups)

    @property
    def pays(self) -> bool:
        """Branches need not save multiplications, their sum is saved; a chain must, and not by larger weights."""
        if any(g.branches > 1 for g in self.groups):
            return self.saving >= 0
        return self.saving > 0 and self.parameters_after <= self.parameters_before


def elements_of_sample(shape: Shape) -> int:
    """Elements of one sample, the first axis aside."""
    return math.prod(_nominal(e) for e in shape[1:])


def _nominal(extent: Extent) -> int:
    if isinstance(extent, Dim):
        return max(1, sum(c for _, c in extent.terms) * NOMINAL_EXTENT + extent.constant)
    return extent


def emitted_nodes(operator: Operator, result: Shape) -> int:
    """How many nodes the operator is written with: a convolution, a Gemm, or a MatMul and an Add."""
    return 2 if not operator.axes and len(result) > 2 and operator.bias is not None else 1


def emitted_cost(operator: Operator, result: Shape) -> int:
    groups = operator.groups if operator.axes else 1
    own = operator.channels_in // groups * operator.taps
    return elements_of_sample(result) * (own + emitted_nodes(operator, result) - 1)


def emitted_parameters(operator: Operator) -> int:
    groups = operator.groups if operator.axes else 1
    own = operator.channels_in // groups * operator.taps
    return operator.channels_out * (own + (operator.bias is not None))


class Planner:
    """The plans of one graph, made when asked for; valid as long as its facts."""

    def __init__(self, facts: Facts) -> None:
        self.facts = facts
        self.forms = Forms(facts)
        self._plans: dict[Node, Plan | None] = {}
        self._worth: dict[Value, int] = {}
        self._absorbed: dict[Node, bool] = {}
        self._outputs = set(facts.graph.outputs)

    def plan(self, node: Node) -> Plan | None:
        """What to fold where this node ends it; None where nothing pays."""
        if node not in self._plans:
            self._plans[node] = self._made(node)
        return self._plans[node]

    def is_absorbed(self, node: Node) -> bool:
        """Whether the plan of a later node takes this one away."""
        if node not in self._absorbed:
            self._absorbed[node] = self._finds_absorbed(node)
        return self._absorbed[node]

    def _finds_absorbed(self, node: Node) -> bool:
        seen: set[Node] = set()
        pending = list(self.facts.users(node.output))
        while pending:
            user = pending.pop()
            if user in seen:
                continue
            seen.add(user)
            end = self.outermost(user)
            plan = self.plan(end)
            if plan is not None and node in plan.nodes and not self.is_absorbed(end):
                return True
            # Where a border is written, there is a form only at its end.
            if moves(user) or any(node in form.nodes for v in user.outputs[:1] for form in self.forms.of(v).values()):
                pending += self.facts.users(user.output)
        return False

    def outermost(self, node: Node) -> Node:
        """The last of the nested sums that a sum is a summand of."""
        while summands(node) and (user := self.facts.only_user(node.output)) is not None and summands(user):
            node = user
        return node

    def cost(self, node: Node) -> int:
        """Multiplications of a node as it is; nodes that only move data have none."""
        count = elements_of_sample(node.output.shape or ())
        if node.op in ELEMENTWISE:
            return count
        if node.op == "Sum":
            return count * (len(node.inputs) - 1)
        read = self.forms.reading(node)
        if node.op not in COUNTED or not isinstance(read, Reading) or not isinstance(read.operator, Operator):
            return 0
        return count * read.operator.products

    def cost_of(self, nodes: Iterable[Node], sums: int = 0, shape: Shape = ()) -> int:
        """Multiplications of nodes, and of so many sums of values of a shape."""
        return sum(self.cost(n) for n in nodes) + (sums * elements_of_sample(shape) if sums else 0)

    def leaves(self, node: Node) -> tuple[Terms, frozenset[Node]]:
        """The summands of nested sums, and the sums; a sum used elsewhere is a summand of its own."""
        terms: list[tuple[int, Value]] = []
        sums = {node}
        for sign, value in summands(node):
            inner = value.producer
            if inner is not None and summands(inner) and self.facts.only_user(value) is node:
                own, nested = self.leaves(inner)
                terms += [(sign * s, v) for s, v in own]
                sums |= nested
            else:
                terms.append((sign, value))
        return tuple(terms), frozenset(sums)

    def _made(self, node: Node) -> Plan | None:
        if not node.outputs or not self.cost(node):
            return None
        forms = list(self.forms.of(node.output).values())[1:]
        whole = [plan for form in forms if (plan := self._of_form(node, form)) is not None]
        if whole:
            return max(whole, key=lambda plan: (self._gain(plan), len(plan.nodes)))
        return self._of_summands(node) if summands(node) else None

    def _gain(self, plan: Plan) -> int:
        """What it saves, with what can be saved before its bases."""
        values = [g.base for g in plan.groups] + [v for _, v in plan.rest]
        return plan.saving + sum(self._saved_before(v) for v in dict.fromkeys(values))

    def _saved_before(self, value: Value) -> int:
        if value not in self._worth:
            self._worth[value] = 0  # of a value that is reached again
            plan = self.plan(self.outermost(value.producer)) if value.producer is not None else None
            self._worth[value] = self._gain(plan) if plan is not None else 0
        return self._worth[value]

    def _of_form(self, node: Node, form: Form) -> Plan | None:
        operator = form.operator
        if isinstance(operator, Scaling):
            return None
        group = Group(form.base, operator, form.nodes, form.branches, ((1, node.output),))
        return None if self._is_plain(group) else self._paying(node, [group], (), form.nodes)

    def _is_closed(self, nodes: frozenset[Node], root: Node) -> bool:
        """Whether nothing but the root's result is read from outside."""
        inside = [o for n in nodes if n is not root for o in n.outputs]
        return not any(o in self._outputs or not nodes.issuperset(self.facts.users(o)) for o in inside)

    def _paying(self, root: Node, groups: Sequence[Group], rest: Terms, nodes: frozenset[Node]) -> Plan | None:
        """The plan of these groups, if it is worth it."""
        shape = root.output.known_shape
        if not groups or any(not is_written(g.operator) or not has_product(g.nodes) for g in groups):
            return None
        if not self._is_closed(nodes, root) or any(v.producer in nodes for _, v in rest):
            return None
        sums = len(groups) + len(rest) - 1
        before = self.cost_of(nodes)
        after = sum(emitted_cost(g.operator, shape) for g in groups) + sums * elements_of_sample(shape)
        remaining = sum(emitted_nodes(g.operator, shape) for g in groups) + sums
        plan = Plan(root, tuple(groups), rest, nodes, before, after)
        return plan if plan.pays and remaining < len(nodes) else None

    def _is_plain(self, group: Group) -> bool:
        """Whether all there is to fold is a layer's own bias, or one number that scales it: an attention's or an
        activation's, which keep their form.
        """
        if group.branches > 1 or sum(n.op in PRODUCTS for n in group.nodes) > 1:
            return False
        own = PRODUCTS if group.operator.axes else PRODUCTS | SUMS
        return all(n.op in own or not self.cost(n) or self._is_number(n) for n in group.nodes)

    def _is_number(self, node: Node) -> bool:
        """Whether a node scales or offsets by one number."""
        read = self.forms.reading(node)
        return isinstance(read, Reading) and isinstance(read.operator, Scaling)

    def _of_summands(self, node: Node) -> Plan | None:
        """Some of the summands folded, the rest added to them as before."""
        terms, sums = self.leaves(node)
        groups: list[Group] = []
        left = list(terms)
        while (group := self._best_group(node, left, sums)) is not None:
            groups.append(group)
            left = [t for t in left if not any(t is taken for taken in group.terms)]
        nodes = sums.union(*(g.nodes for g in groups))
        return self._paying(node, groups, tuple(left), nodes)

    def _best_group(self, node: Node, terms: Sequence[tuple[int, Value]], sums: frozenset[Node]) -> Group | None:
        """The group of summands that saves most."""
        shape = node.output.known_shape
        offsets = [t for t in terms if read_offset(t[1], shape) is not None]
        bases = dict.fromkeys(b for _, v in terms if not v.is_constant and v.shape == shape for b in self.forms.of(v))
        found: list[tuple[int, Group]] = []
        for base in bases:
            own = self._closed_terms(base, [t for t in terms if t[1].shape == shape], sums)
            if len(own) + bool(offsets) > 1:
                found += self._groupings(node, base, own, offsets)
        paying = [(saving, group) for saving, group in found if saving >= 0]
        return max(paying, key=lambda pair: pair[0])[1] if paying else None

    def _closed_terms(
        self, base: Value, terms: Sequence[tuple[int, Value]], sums: frozenset[Node]
    ) -> list[tuple[int, Value]]:
        """The summands with this base of which nothing is read outside of them all."""
        own = [t for t in terms if not t[1].is_constant and base in self.forms.of(t[1])]
        while True:
            nodes = sums.union(*(self.forms.of(v)[base].nodes for _, v in own))
            others = {v for _, v in terms}.difference(v for _, v in own)
            kept = [t for t in own if self._stays_inside(self.forms.of(t[1])[base].nodes, nodes, others)]
            if len(kept) == len(own):
                return kept
            own = kept

    def _stays_inside(self, nodes: frozenset[Node], group: frozenset[Node], others: set[Value]) -> bool:
        """Whether what these nodes give is read by the group alone, and is none of the other summands."""
        results = [o for n in nodes for o in n.outputs]
        return not any(o in self._outputs or o in others or not group.issuperset(self.facts.users(o)) for o in results)

    def _groupings(
        self, node: Node, base: Value, terms: Sequence[tuple[int, Value]], offsets: Sequence[tuple[int, Value]]
    ) -> list[tuple[int, Group]]:
        """All summands of a base together, and those left of them when the one that costs most is taken out in turn."""
        found = []
        chosen = list(terms)
        while len(chosen) + bool(offsets) > 1 and chosen:
            group = self._group(node, base, chosen, offsets)
            if group is not None:
                found.append((self._saving(node, group), group))
            if len(chosen) == 1:
                break
            without = [[t for t in chosen if t is not one] for one in chosen]
            chosen = min(without, key=lambda some: self._size(node, base, some))
        return found

    def _size(self, node: Node, base: Value, terms: Sequence[tuple[int, Value]]) -> float:
        """The multiplications of these summands as one operator."""
        operator = total([(sign, self.forms.of(v)[base]) for sign, v in terms])
        return emitted_cost(operator, node.output.known_shape) if isinstance(operator, Operator) else math.inf

    def _group(
        self, node: Node, base: Value, terms: Sequence[tuple[int, Value]], offsets: Sequence[tuple[int, Value]]
    ) -> Group | None:
        """The summands as one operator, with those constants beside them that lie along its channels."""
        forms = [(sign, self.forms.of(v)[base]) for sign, v in terms]
        operator = total(forms)
        nodes = frozenset[Node]().union(*(f.nodes for _, f in forms))
        if not isinstance(operator, Operator) or not is_written(operator) or not has_product(nodes):
            return None
        taken = list(terms)
        for term in offsets:
            offset = read_offset(term[1], node.output.known_shape)
            moved = None if offset is None else shifted(operator, offset, term[0])
            if isinstance(moved, Operator):
                operator = moved
                taken.append(term)
        group = Group(base, operator, nodes, sum(f.branches for _, f in forms), tuple(taken))
        is_biased = operator.axes and len(taken) > len(terms)
        return None if self._is_plain(group) and not is_biased else group

    def _saving(self, node: Node, group: Group) -> int:
        shape = node.output.known_shape
        return self.cost_of(group.nodes, len(group.terms) - 1, shape) - emitted_cost(group.operator, shape)


def is_written(operator: Linear | Inexact) -> bool:
    """Whether there is a node that computes the operator: a convolution pads, it does not crop."""
    return isinstance(operator, Operator) and all(a.begin >= 0 and a.end >= 0 for a in operator.axes)


def has_product(nodes: Iterable[Node]) -> bool:
    return any(n.op in PRODUCTS for n in nodes)
