"""The logits of one softmax as a sum: one product of queries and keys, constants, and terms computed from data.

The walk goes from the softmax's input back through sums, scales, exclusions and movement. Every computed part at which
it ends is a summand; the one that is a product of queries and keys is the attention's, the others are terms of it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from attnrewrite import floats
from attnrewrite.facts import Facts
from attnrewrite.graph import STANDARD_DOMAIN, Node, Value
from attnrewrite.indexing.map import Coordinate, Index, IndexingError
from attnrewrite.indexing.provenance import provenances
from attnrewrite.indexing.rules import Read, broadcast_index, sources
from attnrewrite.localattention.choice import run_time_choice
from attnrewrite.localattention.contraction import (
    Operand,
    factors,
    is_contraction,
    is_weighted_sum,
    operands,
    passes_on,
)
from attnrewrite.localattention.site import Decline

# How many parts the logits may have, and how many operators may lie between a part and the softmax.
SUMMANDS_LIMIT = 16


@dataclass(frozen=True, eq=False)
class Term:
    """A constant added to the logits: one axis per grid axis, extent 1 where it does not vary. Of the constant's own
    floating type where it is as stored (sums of terms are to be made in float64), else float64.

    lowest: the -inf stand for the dtype's lowest number, which is the same wherever a row keeps one key.
    """

    values: np.ndarray
    node: Node
    lowest: bool = False


@dataclass(frozen=True, eq=False)
class QueryTerm:
    """factor * sum_c q[c] * table[c]: the site's own query times a constant, added to the logits.

    table: a constant, read at `index` over the grid, its coordinates apart because the whole is large; channels: int64,
    the position along the query's channels of each summed position. factor: float64 over the grid.
    """

    table: Value
    index: Index
    channels: np.ndarray
    factor: np.ndarray
    node: Node


@dataclass(frozen=True, eq=False)
class ComputedTerm:
    """factor * value[index], computed from data and added to the logits.

    excludes: the value is a condition, and where it holds (or, with negated, does not) this number is added.
    """

    value: Value
    index: Index
    factor: np.ndarray
    node: Node
    excludes: float | None = None
    negated: bool = False


@dataclass(frozen=True, eq=False)
class Summand:
    """A computed part of the logits, factor * value[index], and the values between it and the softmax."""

    value: Value
    index: Index
    factor: np.ndarray
    path: tuple[Value, ...]


@dataclass(frozen=True, eq=False)
class Logits:
    """factor * query . key + the terms. The query and key are as the product reads them; node: the product."""

    query: Operand
    key: Operand
    value: Value
    factor: np.ndarray
    node: Node
    constants: tuple[Term, ...]
    query_terms: tuple[QueryTerm, ...]
    computed: tuple[ComputedTerm, ...]


def read_logits(facts: Facts, value: Value, index: Index, key_axis: int, channel_axis: int) -> Logits | Decline:
    """The logits `value[index]`; summed keys run along key_axis, the channels of the product along channel_axis."""
    walk = _Walk(facts, channel_axis + 1)
    declined = walk.back(Summand(value, index, np.ones((1,) * (channel_axis + 1)), ()))
    if declined is not None:
        return declined
    product = None
    for summand in walk.summands:
        product = product or _product(summand, key_axis, channel_axis)
    if product is None:
        return _no_product(facts, walk.summands[0], key_axis, channel_axis)
    summand, query, key, factor = product
    node = summand.value.producer
    assert node is not None
    for passed in (*summand.path, summand.value):
        if facts.only_user(passed) is None:
            label = passed.producer.label if passed.producer is not None else passed.name
            return Decline("the logits are used elsewhere as well", label)
    query, query_factor = without_scale(facts, query)
    key, key_factor = without_scale(facts, key)
    query_terms, computed = [], list(walk.computed)
    for other in walk.summands:
        if other is summand:
            continue
        term = _query_term(facts, other, query, channel_axis)
        if term is None:
            assert other.value.producer is not None or other.path
            computed.append(ComputedTerm(other.value, other.index, other.factor, _node_of(other)))
        else:
            query_terms.append(term)
    factor = summand.factor * factor * query_factor * key_factor
    return Logits(query, key, summand.value, factor, node, tuple(walk.constants), tuple(query_terms), tuple(computed))


def _node_of(summand: Summand) -> Node:
    """The node that computes a summand, or else the one that adds it."""
    for value in (summand.value, *reversed(summand.path)):
        if value.producer is not None:
            return value.producer
    raise IndexingError("the logits are an input of the model")


class _Walk:
    """From the softmax's input back to the summands."""

    def __init__(self, facts: Facts, grid_rank: int) -> None:
        self.facts, self.grid_rank = facts, grid_rank
        self.constants: list[Term] = []
        self.computed: list[ComputedTerm] = []
        self.summands: list[Summand] = []

    def back(self, start: Summand) -> Decline | None:
        """Collect what `start` is a sum of; why not, where an exclusion or a scale makes it no sum."""
        pending = [start]
        while pending:
            part = pending.pop()
            node = part.value.producer
            if part.value.is_constant and part.path:  # expanded along a symbolic batch, say
                maker = part.path[-1].producer
                assert maker is not None
                declined = self._constant(stored_at(part.value, part.index), part.factor, maker)
                if declined is not None:
                    return declined
                continue
            without_data = self.facts.is_without_data(part.value)
            if node is None or node.domain != STANDARD_DOMAIN or is_contraction(node) or without_data:
                self.summands.append(part)
                continue
            found = self._step(node, part)
            if isinstance(found, Decline):
                return found
            pending.extend(found or ())
            if found is None:
                self.summands.append(part)
            if len(self.summands) + len(pending) > SUMMANDS_LIMIT:
                return Decline(f"the logits are a sum of more than {SUMMANDS_LIMIT} tensors", node.label)
        return None

    def _step(self, node: Node, part: Summand) -> list[Summand] | Decline | None:
        """The parts that one operator makes its result of, constants noted; None where it is no sum."""
        path = (*part.path, part.value)
        match node.op:
            case "Add" | "Sub" | "Sum":
                return self._sum(node, part, path)
            case "Neg":
                data = node.required(0)
                return [Summand(data, part.index, -part.factor, path)]
            case "Mul" | "Div":
                return self._scaled(node, part, path)
            case "Where":
                return self._excluded(node, part, path)
        if passes_on(node):
            return [Summand(node.required(0), part.index, part.factor, path)]
        found = sources(node, part.value, part.index)
        if found is not None and len(found) == 1:
            (read,) = found
            if isinstance(read, Read) and read.where is None:
                return [Summand(read.value, read.index, part.factor, path)]
        return None

    def _sum(self, node: Node, part: Summand, path: tuple[Value, ...]) -> list[Summand] | Decline | None:
        parts = []
        for position, operand in enumerate(v for v in node.inputs if v is not None):
            factor = -part.factor if node.op == "Sub" and position == 1 else part.factor
            index = broadcast_index(part.index, operand)
            if not operand.is_constant:
                parts.append(Summand(operand, index, factor, path))
                continue
            declined = self._constant(stored_at(operand, index), factor, node)
            if declined is not None:
                return declined
        return parts[::-1]

    def _constant(self, values: np.ndarray, factor: np.ndarray, node: Node, *, lowest: bool = False) -> Decline | None:
        if np.isinf(values).any() and (factor <= 0).any():
            return Decline(
                "the logits are scaled after keys were excluded, by a number that is not positive", node.label
            )
        self.constants.append(Term(scaled(values, factor), node, lowest))
        return None

    def _scaled(self, node: Node, part: Summand, path: tuple[Value, ...]) -> list[Summand] | None:
        a, b = node.required(0), node.required(1)
        if a.is_constant == b.is_constant or (node.op == "Div" and a.is_constant):
            return None
        data, other = (b, a) if a.is_constant else (a, b)
        elements = constant_at(other, broadcast_index(part.index, other))
        if node.op == "Div":
            if not elements.all():
                return None
            elements = 1.0 / elements
        return [Summand(data, broadcast_index(part.index, data), part.factor * elements, path)]

    def _excluded(self, node: Node, part: Summand, path: tuple[Value, ...]) -> list[Summand] | Decline | None:
        """where(masked, number, logits): exclusion, where the number is so low that exp gives 0 beside any logit."""
        condition, a, b = (node.required(k) for k in range(3))
        if a.is_constant == b.is_constant:
            return None
        data, other = (b, a) if a.is_constant else (a, b)
        number = constant_at(other, broadcast_index(part.index, other))
        where = broadcast_index(part.index, condition)
        rest = Summand(data, broadcast_index(part.index, data), part.factor, path)
        assert data.dtype is not None
        known = elements_at(condition, where)
        if known is not None:
            masked = (known != 0) == (other is a)
            number, masked = np.broadcast_arrays(number, masked)
            if not masked.any():
                return [rest]
            replaced = number[masked]
        else:
            replaced = number
        if (replaced > floats.lowest(data.dtype) / 2).any():
            return Decline(
                f"masked logits are set to {float(replaced.max()):g}, which is no exclusion where others are as low: "
                "only -inf or the lowest number of the type is one",
                node.label,
            )
        if known is not None:
            values = np.where(masked, -np.inf, 0.0)
            lowest = bool(np.isfinite(replaced).any())
            return self._constant(values, part.factor, node, lowest=lowest) or [rest]
        if (part.factor <= 0).any() or number.size != 1:
            return None
        lowest_number = float(number.reshape(-1)[0])
        self.computed.append(ComputedTerm(condition, where, part.factor, node, lowest_number, negated=other is b))
        return [rest]


def scaled(term: np.ndarray, factor: np.ndarray) -> np.ndarray:
    """term * factor with 0 * inf out of the way: an excluded key stays excluded, the others unmoved."""
    if (factor == 1).all() and np.broadcast_shapes(term.shape, factor.shape) == term.shape:
        return term  # a mask of many windows is not copied
    return np.where(np.isinf(term), term, np.where(np.isinf(term), 0, term) * factor)


def constant_at(value: Value, index: Index) -> np.ndarray:
    """float64 elements of a constant read at an index, one axis per grid axis."""
    return stored_at(value, index).astype(np.float64, copy=False)


def stored_at(value: Value, index: Index) -> np.ndarray:
    """The same in the constant's own type, if that is a floating one: a mask of many windows is not doubled in size."""
    at = tuple(c.static(f"the constant {value.name}") for c in index)
    elements = value.constant[at] if at else value.constant
    return elements if elements.dtype.kind == "f" else np.asarray(elements, np.float64)


def elements_at(value: Value, index: Index) -> np.ndarray | None:
    """float64 elements of a value read at an index, where it is a constant that is moved, negated (Not) or cast to
    booleans, or from them to floating point: a mask expanded along a symbolic batch, say. None for any other value.
    """
    if value.is_constant:
        return constant_at(value, index)
    node = value.producer
    if node is None or node.domain != STANDARD_DOMAIN:
        return None
    if node.op in ("Not", "Cast") and value.dtype is not None:
        inside = elements_at(node.required(0), index)
        if inside is None or node.op == "Not":
            return None if inside is None else (inside == 0).astype(np.float64)
        if value.dtype.kind == "b":
            return (inside != 0).astype(np.float64)
        return inside if value.dtype.kind == "f" and node.required(0).dtype == np.dtype(bool) else None
    found = sources(node, value, index)
    if found is None or len(found) != 1 or not isinstance(found[0], Read) or found[0].where is not None:
        return None
    return elements_at(found[0].value, found[0].index)


Product = tuple[Summand, Operand, Operand, np.ndarray]


def _product(summand: Summand, key_axis: int, channel_axis: int) -> Product | None:
    """A summand as a product of two computed tensors, of which one depends on the key and one does not."""
    node = summand.value.producer
    if node is None or not is_contraction(node):
        return None
    factor = np.ones((1,) * (channel_axis + 1))
    for constant in (f for f in factors(node, summand.index, channel_axis) if f.value.is_constant):
        values = constant_at(constant.value, constant.index)
        if values.shape[channel_axis] > 1:
            raise IndexingError(f"{node.label} weighs the channels that it sums")
        factor = factor * values
    one, other = operands(node, summand.index, channel_axis)
    for query, key in ((one, other), (other, one)):
        if varies(key.index, key_axis) and not varies(query.index, key_axis):
            return summand, query, key, factor
    return None


def varies(index: Index, axis: int) -> bool:
    return any(axis in c.depends_on() for c in index)


def _no_product(facts: Facts, summand: Summand, key_axis: int, channel_axis: int) -> Decline:
    """Why a summand that is the logits is no product of queries and keys."""
    node = summand.value.producer
    if node is None:
        return Decline("the logits are an input of the model", summand.value.name)
    if is_contraction(node):
        if any(varies(o.index, key_axis) for o in operands(node, summand.index, channel_axis)):
            return Decline("both factors of the logits differ from key to key, so neither is the query", node.label)
        return Decline("the logits are the same for every key", node.label)
    if node.op in ("Mul", "Div"):
        if node.op == "Div" and node.required(0).is_constant:
            return Decline("the logits are the second operand of Div", node.label)
        return Decline("a tensor computed from data is multiplied with the logits", node.label)
    if node.op == "Where":
        if node.constant(0) is None:
            return Decline("the logits are masked by a condition computed from data", node.label)
        return Decline("the logits are chosen between two computed tensors", node.label)
    if mixes_products(facts, node):
        return Decline("the logits of several heads are mixed with one another before the softmax", node.label)
    choice = run_time_choice(node)
    if choice is not None:
        return Decline(f"the logits are chosen from data: they come from {choice}", node.label)
    if node.op in ("MatMul", "Gemm", "Einsum", "Conv"):
        return Decline(f"the logits are a linear projection ({node.op}), not a product of queries and keys", node.label)
    return Decline(f"the logits come from {node.op}, not from a product of queries and keys", node.label)


def mixes_products(facts: Facts, node: Node) -> bool:
    """Whether a node is a Linear or convolution over what comes, moved or scaled, from a product of two tensors."""
    if node.op not in ("MatMul", "Gemm", "Einsum", "Conv"):
        return False
    for value in node.inputs:
        for _ in range(SUMMANDS_LIMIT):
            if value is None or value.is_constant or value.producer is None:
                break
            before = value.producer
            if is_contraction(before):
                return True
            value = next((v for v in before.inputs if v is not None and not v.is_constant), None)
            if before.op not in ("Reshape", "Transpose", "Add", "Mul", "Div", "Sub", "Squeeze", "Unsqueeze", "Cast"):
                break
    return False


def without_scale(facts: Facts, operand: Operand) -> tuple[Operand, float]:
    """An operand before it was multiplied by scalars, and the product of those."""
    factor = 1.0
    while True:
        last = None
        for last in provenances(operand.value, operand.index, facts.positions):
            if last.domain is not None:
                return operand, factor
        node = None if last is None else last.value.producer
        if last is None or node is None or node.domain != STANDARD_DOMAIN or node.op not in ("Mul", "Div"):
            return operand, factor
        a, b = node.required(0), node.required(1)
        data, other = (b, a) if a.is_constant and node.op == "Mul" else (a, b)
        if not other.is_constant or other.constant.size != 1 or data.is_constant:
            return operand, factor
        number = float(other.constant.reshape(-1)[0])
        factor = factor * number if node.op == "Mul" else factor / number
        operand = Operand(data, broadcast_index(last.index, data))


def _query_term(facts: Facts, summand: Summand, query: Operand, channel_axis: int) -> QueryTerm | None:
    """A summand as a product of a constant with the site's own query, read at the same tokens; None if it is none."""
    value, index, factor = summand.value, summand.index, summand.factor
    last = None
    try:
        for last in provenances(value, index, facts.positions):
            if last.domain is not None:
                return None
    except IndexingError:
        return None
    if last is None or not is_weighted_sum(last.value.producer):
        return None
    node = last.value.producer
    assert node is not None
    try:
        found = factors(node, last.index, channel_axis)
    except IndexingError:
        return None
    if len(found) != 2:
        return None
    computed, table = found if found[1].value.is_constant else found[::-1]
    own, own_factor = without_scale(facts, computed)
    channels = _same_query(facts, own, query, channel_axis)
    if channels is None:
        return None
    return QueryTerm(table.value, table.index, channels, factor * own_factor, node)


def _same_query(facts: Facts, own: Operand, query: Operand, channel_axis: int) -> np.ndarray | None:
    """Which channel of the site's query each summed position of `own` is, int64; None where it is another query's.

    Both are followed back by movement to a value they share; there they must be read at the same element for every
    token, whatever the key.
    """
    try:
        ways = {
            found.value: found.index
            for found in provenances(query.value, query.index, facts.positions)
            if found.domain is None
        }
        for found in provenances(own.value, own.index, facts.positions):
            if found.domain is None and found.value in ways:
                return _same_channels(found.index, ways[found.value], channel_axis)
    except IndexingError:
        return None
    return None


def _same_channels(own: Index, query: Index, channel_axis: int) -> np.ndarray | None:
    if any(a.batch != b.batch for a, b in zip(own, query, strict=True)):
        return None
    summed = max((c.shape[channel_axis] for c in own), default=1)
    channels = max((c.shape[channel_axis] for c in query), default=1)
    keys = [_first_along(c, channel_axis, channels) for c in query]
    position = {key: k for k, key in enumerate(zip(*keys, strict=True))}
    wanted = zip(*(_first_along(c, channel_axis, summed) for c in own), strict=True)
    picked = [position.get(key) for key in wanted]
    if any(p is None for p in picked):
        return None
    order = np.array(picked, np.int64)
    for one, other in zip(own, query, strict=True):
        values = other.values.take(order, channel_axis) if other.values.shape[channel_axis] > 1 else other.values
        shapes = zip(one.values.shape, values.shape, strict=True)
        if any(a != b and 1 not in (a, b) for a, b in shapes) or not (one.values == values).all():
            return None
    return order


def _first_along(coordinate: Coordinate, axis: int, extent: int) -> list[int]:
    """The coordinate along one grid axis, at position 0 of all others."""
    line = np.moveaxis(coordinate.values, axis, -1).reshape(-1, coordinate.values.shape[axis])[0]
    return [int(v) for v in np.broadcast_to(line, (extent,))]


def has_fully_masked_row(terms: tuple[Term, ...], key_axis: int) -> bool:
    """Whether some query has all its keys excluded; there -inf and a very low number differ."""
    excluded = np.zeros((1,) * (key_axis + 2), bool)
    for term in terms:
        excluded = excluded | np.isneginf(term.values)
    return bool(excluded.all(axis=key_axis).any())
