"""Softmax written out, read as the Softmax it is: exp(x) / sum(exp(x)) and its relatives.

    Div(Exp(x), ReduceSum(Exp(x)))            Exp(Sub(x, ReduceLogSumExp(x)))
    Mul(Exp(x), Reciprocal(ReduceSum(...)))   Exp(Sub(x, Log(ReduceSum(Exp(x)))))      Exp(LogSoftmax(x))

Which elements a sum divides is compared by indexing maps, so it does not matter how the sums are brought back to the
shape of x. Subtracting the maximum of a row first changes nothing of the result and is what Softmax does anyway, so it
is read as if it were not there, before a Softmax node as well. Where a model does not subtract it, exp overflows for
logits that Softmax still computes with: the model's result is not a number there, and this one's is.
"""

from __future__ import annotations

import contextlib

from attnrewrite.dims import Shape
from attnrewrite.facts import Facts
from attnrewrite.graph import STANDARD_DOMAIN, Graph, Node, Value
from attnrewrite.indexing.map import Index, IndexingError, along, identity
from attnrewrite.indexing.provenance import provenances
from attnrewrite.indexing.rules import broadcast_index

# The logits, and the axis over which they are normalised.
Normalised = tuple[Value, int]


def join_softmax(graph: Graph) -> None:
    """Replace every written-out softmax over one axis by a Softmax node, in place."""
    reader = _Reader(Facts(graph))
    for at, node in enumerate(graph.nodes):
        if node.domain != STANDARD_DOMAIN or not node.outputs:
            continue
        if node.op == "Softmax" and node.required(0).shape is not None:
            node.inputs[0] = reader.before_maximum(node.required(0), _axis(node))
            continue
        found = reader.normalised(node)
        if found is not None:
            logits, axis = found
            graph.nodes[at] = Node("Softmax", [logits], [node.output], {"axis": axis}, node.name)
    graph.remove_dead()


def _axis(node: Node) -> int:
    """The axis, not negative, of a Softmax or LogSoftmax."""
    return int(node.attributes.get("axis", -1)) % len(node.required(0).known_shape)


class _Reader:
    def __init__(self, facts: Facts) -> None:
        self.facts = facts

    def normalised(self, node: Node) -> Normalised | None:
        """What the node's output is the softmax of; None where it is none."""
        match node.op:
            case "Div":
                return self._quotient(node.required(0), node.required(1))
            case "Mul":
                for value, other in ((0, 1), (1, 0)):
                    inverse = self._made_by("Reciprocal", node.required(other), spread=True)
                    if inverse is not None:
                        return self._quotient(node.required(value), node.required(other), inverse)
            case "Exp":
                return self._exponential_of_logarithm(node.required(0))
        return None

    def _quotient(self, exponential: Value, total: Value, inverse: Node | None = None) -> Normalised | None:
        """exponential = exp(x), total = its sum along one axis (or what `inverse` makes of that)."""
        node = self._made_by("Exp", exponential)
        found = None if node is None else self._row("ReduceSum", total, exponential, inverse)
        if node is None or found is None:
            return None
        summed, axis = found
        return (self.before_maximum(node.required(0), axis), axis) if self._same(summed, exponential) else None

    def _exponential_of_logarithm(self, value: Value) -> Normalised | None:
        """value = x - log(sum(exp(x))), in one operator or several."""
        whole = self._made_by("LogSoftmax", value)
        if whole is not None:
            return self.before_maximum(whole.required(0), _axis(whole)), _axis(whole)
        difference = self._made_by("Sub", value)
        if difference is None:
            return None
        logits, norm = difference.required(0), difference.required(1)
        found = self._row("ReduceLogSumExp", norm, logits)
        if found is not None and self._origin(found[0]) is self._origin(logits):
            return self.before_maximum(logits, found[1]), found[1]
        logarithm = self._made_by("Log", norm, spread=True)
        found = None if logarithm is None else self._row("ReduceSum", norm, logits, logarithm)
        summed = None if found is None else self._made_by("Exp", found[0])
        if found is None or summed is None or self._origin(summed.required(0)) is not self._origin(logits):
            return None
        return self.before_maximum(logits, found[1]), found[1]

    def before_maximum(self, logits: Value, axis: int) -> Value:
        """x where logits = x - max(x) along the axis."""
        node = self._made_by("Sub", logits)
        if node is None:
            return logits
        data = node.required(0)
        found = self._row("ReduceMax", node.required(1), data)
        if found is None or found[1] != axis or self._origin(found[0]) is not self._origin(data):
            return logits
        return data

    def _row(self, op: str, value: Value, like: Value, between: Node | None = None) -> Normalised | None:
        """What `value` is the reduction of along one axis, where broadcasting it to `like` gives every element that of
        its own row.

        between: the pointwise operator of one input that lies between the two.
        """
        if like.shape is None or value.shape is None or len(value.shape) > len(like.shape):
            return None
        rank = len(like.shape)
        whole = identity(like.shape, rank + 1)
        way = self._back(value, broadcast_index(whole, value), None if between is None else between.output)
        if way is not None and between is not None:
            way = self._back(between.required(0), way[1], None)
        node = None if way is None else way[0].producer
        if way is None or node is None or node.op != op or node.domain != STANDARD_DOMAIN:
            return None
        axis = _reduced_axis(node)
        extent = None if axis is None else node.required(0).known_shape[axis]
        if axis is None or not isinstance(extent, int):
            return None
        kept = list(way[1])
        if node.attributes.get("keepdims", 1):
            del kept[axis]
        kept.insert(axis, along(rank, extent, rank + 1))
        return self._read_along(node.required(0), tuple(kept), like.shape)

    def _read_along(self, value: Value, index: Index, shape: Shape) -> Normalised | None:
        """The farthest tensor of this shape that `value[index]` is, where the index is its own place but for one axis,
        along which the last grid axis runs; and that axis.
        """
        rank, found = len(shape), None
        whole = identity(shape, rank + 1)
        with contextlib.suppress(IndexingError):
            for way in provenances(value, index, self.facts.positions):
                if way.domain is not None or way.value.shape != shape:
                    continue
                other = [a for a in range(rank) if not way.index[a].equals(whole[a])]
                if len(other) != 1 or not isinstance(shape[other[0]], int):
                    continue
                if way.index[other[0]].equals(along(rank, shape[other[0]], rank + 1)):
                    found = way.value, other[0]
        return found

    def _back(self, value: Value, index: Index, target: Value | None) -> tuple[Value, Index] | None:
        """`value[index]` followed to `target`, or as far as it is only moved."""
        found = None
        with contextlib.suppress(IndexingError):
            for way in provenances(value, index, self.facts.positions):
                if way.domain is not None:
                    break
                found = way.value, way.index
                if way.value is target:
                    return found
        return found if target is None else None

    def _origin(self, value: Value) -> Value:
        """The farthest value that this one is, moved away and back again."""
        if value.shape is None:
            return value
        own, origin = identity(value.shape), value
        with contextlib.suppress(IndexingError):
            for way in provenances(value, own, self.facts.positions):
                same = way.domain is None and way.value.shape == value.shape
                if same and all(c.equals(o) for c, o in zip(way.index, own, strict=True)):
                    origin = way.value
        return origin

    def _made_by(self, op: str, value: Value, *, spread: bool = False) -> Node | None:
        """The operator of this kind that makes a value; spread: its result may be moved and repeated on the way."""
        if value.shape is None:
            return None
        origin = self._origin(value)
        if spread:
            way = self._back(value, identity(value.shape), None)
            origin = value if way is None else way[0]
        node = origin.producer
        return node if node is not None and node.op == op and node.domain == STANDARD_DOMAIN else None

    def _same(self, one: Value, other: Value) -> bool:
        """Whether two values are equal: one value, or two exponentials of one."""
        if self._origin(one) is self._origin(other):
            return True
        a, b = self._made_by("Exp", one), self._made_by("Exp", other)
        return a is not None and b is not None and self._origin(a.required(0)) is self._origin(b.required(0))


def _reduced_axis(node: Node) -> int | None:
    """The one axis a reduction reduces."""
    axes = node.attributes.get("axes")
    if axes is None:
        constants = node.constant(1)
        axes = None if constants is None else constants.reshape(-1).tolist()
    return int(axes[0]) % len(node.required(0).known_shape) if axes is not None and len(axes) == 1 else None
