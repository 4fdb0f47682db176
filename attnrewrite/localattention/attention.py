"""Attention as its numbers say: what the logits of one softmax are made of, and where query, key and value are read.

Everything is expressed on one grid: the axes of the attention's output, then the summed keys, then the summed channels.
So "which pixel does the key of this output element come from" is an array, and comparing two of them is exact.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from attnrewrite.dims import Extent
from attnrewrite.facts import Facts
from attnrewrite.graph import STANDARD_DOMAIN, Node, Value
from attnrewrite.indexing.map import Index, IndexingError, axis_groups, identity, reshape
from attnrewrite.indexing.provenance import Provenance, provenances
from attnrewrite.indexing.rules import Read, broadcast_index, sources
from attnrewrite.localattention.contraction import Operand, is_contraction, operands, passes_on, product_of
from attnrewrite.localattention.site import Decline


@dataclass(frozen=True, eq=False)
class Term:
    """A constant added to the logits: float64, one axis per grid axis, extent 1 where it does not vary.

    lowest: the -inf stand for the dtype's lowest number, which is the same wherever a row keeps one key.
    """

    values: np.ndarray
    node: Node
    lowest: bool = False


@dataclass(frozen=True, eq=False)
class Attention:
    """softmax(scale * query . key + terms) . value, on the grid [*output axes, keys, channels].

    output_shape: the output's axes as the grid numbers them: an axis that holds several (windows and heads, say) is
    split as the model itself splits it afterwards.
    """

    softmax: Node
    output: Value
    query: Operand
    key: Operand
    value: Operand
    scale: np.ndarray
    terms: tuple[Term, ...]
    key_axis: int
    channel_axis: int
    value_axis: int
    num_keys: int
    head_dim: int
    softmax_dtype: np.dtype
    logits: Value
    output_shape: tuple[Extent, ...]

    @property
    def grid_rank(self) -> int:
        return self.channel_axis + 1


def read_attention(facts: Facts, softmax: Node) -> Attention | Decline:
    """The attention around a softmax, or why it is none that can be read."""
    try:
        return _read(facts, softmax)
    except IndexingError as error:
        return Decline(str(error), softmax.label)


@dataclass(frozen=True, eq=False)
class WeightedSum:
    """sum_j probabilities[j] . value[j] around a softmax, on the grid [*output axes, keys, channels].

    weights: where the softmax's output is read. value_axes: output axes that the value alone depends on.
    """

    consumer: Node
    output_shape: tuple[Extent, ...]
    weights: Index
    value: Operand
    key_axis: int
    value_axes: tuple[int, ...]
    num_keys: int

    @property
    def output(self) -> Value:
        return self.consumer.output

    @property
    def channel_axis(self) -> int:
        return self.key_axis + 1


def read_weighted_sum(facts: Facts, softmax: Node) -> WeightedSum | Decline:
    """The sum over values behind a softmax. Raises IndexingError where a map on the way cannot be expressed."""
    if softmax.output.shape is None or softmax.output.dtype is None:
        return Decline("the shape of the softmax is unknown", softmax.label)
    consumer = _contraction_after(facts, softmax)
    if isinstance(consumer, Decline):
        return consumer
    output = consumer.output
    if output.shape is None:
        return Decline("the shape of the attention's output is unknown", consumer.label)
    output_shape = _split_axes(facts, output)
    key_axis, channel_axis = len(output_shape), len(output_shape) + 1
    index = reshape(identity(output_shape, channel_axis + 1), output_shape, output.shape)
    weights, value = None, None
    for one, other in _both_ways(operands(consumer, index, key_axis)):
        found = _pull_to(softmax.output, one.value, one.index)
        if found is not None:
            weights, value = found, other
            break
    if weights is None or value is None:
        return Decline("the probabilities are rearranged in a way that has no indexing rule", consumer.label)
    if weights.domain is not None:
        return Decline("the probabilities are padded before they meet the values", consumer.label)
    axis = softmax.attributes.get("axis", -1) % len(weights.index)
    key_position = weights.index[axis]
    num_keys = softmax.output.shape[axis]
    expected = np.arange(num_keys if isinstance(num_keys, int) else 0).reshape(
        [-1 if a == key_axis else 1 for a in range(channel_axis + 1)]
    )
    if not isinstance(num_keys, int) or key_position.batch or not np.array_equal(key_position.values, expected):
        return Decline("the softmax does not run over the keys that are summed", softmax.label)
    if any(key_axis in c.depends_on() for a, c in enumerate(weights.index) if a != axis):
        return Decline("the softmax does not run over the keys that are summed", softmax.label)
    value_axes = [a for a in range(key_axis) if _varies(value.index, a) and not _varies(weights.index, a)]
    return WeightedSum(consumer, output_shape, weights.index, value, key_axis, tuple(value_axes), num_keys)


def _read(facts: Facts, softmax: Node) -> Attention | Decline:
    summed = read_weighted_sum(facts, softmax)
    if isinstance(summed, Decline):
        return summed
    key_axis, channel_axis = summed.key_axis, summed.channel_axis
    if len(summed.value_axes) != 1:
        return Decline("the values have no channel axis of their own", summed.consumer.label)

    read = _read_logits(facts, softmax.required(0), summed.weights, channel_axis + 1)
    if isinstance(read, Decline):
        return read
    logits, logits_index, scale, terms, contraction = read
    query, key = None, None
    for one, other in _both_ways(operands(contraction, logits_index, channel_axis)):
        if _varies(other.index, key_axis) and not _varies(one.index, key_axis):
            query, key = one, other
    if query is None or key is None:
        return Decline("no operand of the logits depends on the key alone", contraction.label)
    query, query_factor = _without_scale(facts, query)
    key, key_factor = _without_scale(facts, key)
    scale = scale * query_factor * key_factor
    head_dim = max(_extent_along(query.index, channel_axis), _extent_along(key.index, channel_axis))
    assert softmax.output.dtype is not None
    return Attention(
        softmax,
        summed.output,
        query,
        key,
        summed.value,
        scale,
        tuple(terms),
        key_axis,
        channel_axis,
        summed.value_axes[0],
        summed.num_keys,
        head_dim,
        softmax.output.dtype,
        logits,
        summed.output_shape,
    )


def _split_axes(facts: Facts, output: Value) -> tuple[Extent, ...]:
    """The output's extents, each axis split as the first Reshape behind it splits it (through transposes)."""
    assert output.shape is not None
    axes = list(range(len(output.shape)))  # axes[i]: the output's axis that axis i of the current value is
    node = facts.only_user(output)
    while node is not None and node.op == "Transpose":
        axes = [axes[p] for p in node.attributes.get("perm") or list(range(len(axes)))[::-1]]
        node = facts.only_user(node.output)
    splits: dict[int, tuple[Extent, ...]] = {}
    if node is not None and node.op == "Reshape" and node.output.shape is not None and node.input(0) is not None:
        before = node.required(0).shape
        assert before is not None
        for outs, ins in axis_groups(node.output.shape, before):
            if len(ins) == 1 and len(outs) > 1:
                splits[axes[ins.start]] = tuple(node.output.shape[o] for o in outs)
    return tuple(e for a, extent in enumerate(output.shape) for e in splits.get(a, (extent,)))


def _without_scale(facts: Facts, operand: Operand) -> tuple[Operand, float]:
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


def _both_ways(pair: tuple[Operand, Operand]) -> tuple[tuple[Operand, Operand], tuple[Operand, Operand]]:
    return pair, (pair[1], pair[0])


def _varies(index: Index, axis: int) -> bool:
    return any(axis in c.depends_on() for c in index)


def _extent_along(index: Index, axis: int) -> int:
    return max((c.shape[axis] for c in index), default=1)


def _contraction_after(facts: Facts, softmax: Node) -> Node | Decline:
    """The contraction that consumes the probabilities, through operators that only rearrange or cast them."""
    value = softmax.output
    while True:
        user = facts.only_user(value)
        if user is None:
            count = len(facts.users(value))
            what = f"have {count} uses" if count != 1 else "leave the model as an output"
            return Decline(f"the attention probabilities {what}, so they must exist in memory", softmax.label)
        if is_contraction(user):
            return user
        if user.op == "Mul":
            after = facts.only_user(user.output)
            while after is not None and after.op == "Cast" and passes_on(after):
                after = facts.only_user(after.output)
            if after is not None and product_of(after) is user:
                return after
        if not _rearranges(user) or user.required(0) is not value:
            return Decline(f"the probabilities go into {user.op}, not into a sum over values", user.label)
        value = user.outputs[0]


REARRANGING = frozenset({"Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Expand"})


def _rearranges(node: Node) -> bool:
    """Whether a node passes its numbers on, in another order or type at most."""
    return node.domain == STANDARD_DOMAIN and (node.op in REARRANGING or passes_on(node))


def _pull_to(target: Value, value: Value, index: Index) -> Provenance | None:
    """Follow rearranging operators from `value[index]` back to `target`."""
    while value is not target:
        node = value.producer
        if node is None or not _rearranges(node):
            return None
        if node.op not in REARRANGING:
            value = node.required(0)
            continue
        found = sources(node, value, index)
        if found is None or len(found) != 1 or not isinstance(found[0], Read):
            return None
        value, index = found[0].value, found[0].index
    return Provenance(value, index)


Logits = tuple[Value, Index, np.ndarray, list[Term], Node]


def _read_logits(facts: Facts, value: Value, index: Index, grid_rank: int) -> Logits | Decline:
    """Walk from the softmax's input to the contraction, collecting scale and constant terms; grid axes as in
    `index`.
    """
    multiplier = np.ones((1,) * grid_rank)
    terms: list[Term] = []
    while True:
        node = value.producer
        if node is None:
            return Decline("the logits are an input of the model", value.name)
        if facts.only_user(value) is None:
            return Decline("the logits are used elsewhere as well", node.label)
        if is_contraction(node):
            return value, index, multiplier, terms, node
        step = _step_back(node, value, index)
        if isinstance(step, Decline):
            return step
        if step.term is not None:
            if np.isinf(step.term).any() and (multiplier <= 0).any():
                return Decline(
                    "the logits are scaled after keys were excluded, by a number that is not positive", node.label
                )
            terms.append(Term(scaled(step.term, multiplier), node, step.lowest))
        if step.factor is not None:
            multiplier = multiplier * step.factor
        value, index = step.value, step.index


@dataclass(frozen=True, eq=False)
class _Step:
    value: Value
    index: Index
    term: np.ndarray | None = None
    factor: np.ndarray | None = None
    lowest: bool = False


def scaled(term: np.ndarray, factor: np.ndarray) -> np.ndarray:
    """term * factor with 0 * inf out of the way: an excluded key stays excluded, the others unmoved."""
    return np.where(np.isinf(term), term, np.where(np.isinf(term), 0, term) * factor)


def _step_back(node: Node, value: Value, index: Index) -> _Step | Decline:
    """One operator between logits and softmax: value = data * factor + term, or a rearrangement of data."""
    if node.domain == STANDARD_DOMAIN:
        if passes_on(node):
            return _Step(node.required(0), index)
        if node.op in ("Add", "Sub", "Mul", "Div"):
            return _affine(node, index)
        if node.op == "Where":
            return _masked_fill(node, index)
        found = sources(node, value, index)
        if found is not None and len(found) == 1:
            (read,) = found
            if isinstance(read, Read) and read.where is None:
                return _Step(read.value, read.index)
    return Decline(f"the logits come from {node.op}, not from a product of queries and keys", node.label)


def _affine(node: Node, index: Index) -> _Step | Decline:
    a, b = node.required(0), node.required(1)
    if a.is_constant == b.is_constant:
        what = "added to" if node.op in ("Add", "Sub") else "multiplied with"
        return Decline(f"a tensor computed from data is {what} the logits", node.label)
    data, other = (b, a) if a.is_constant else (a, b)
    elements = constant_at(other, broadcast_index(index, other))
    data_index = broadcast_index(index, data)
    match node.op:
        case "Add":
            return _Step(data, data_index, term=elements)
        case "Sub" if data is a:
            return _Step(data, data_index, term=-elements)
        case "Mul":
            return _Step(data, data_index, factor=elements)
        case "Div" if data is a:
            return _Step(data, data_index, factor=1.0 / elements)
    return Decline(f"the logits are the second operand of {node.op}", node.label)


def constant_at(value: Value, index: Index) -> np.ndarray:
    """float64 elements of a constant read at an index, one axis per grid axis."""
    at = tuple(c.static(f"the constant {value.name}") for c in index)
    elements = value.constant.astype(np.float64)
    return np.asarray(elements[at]) if at else elements


def _masked_fill(node: Node, index: Index) -> _Step | Decline:
    """where(masked, number, logits): exclusion, where the number is so low that exp gives 0 beside any ordinary
    logit.
    """
    if node.constant(0) is None:
        return Decline("the logits are masked by a condition computed from data", node.label)
    taken = constant_at(node.required(0), broadcast_index(index, node.required(0))) != 0
    a, b = node.required(1), node.required(2)
    if a.is_constant == b.is_constant:
        return Decline("the logits are chosen between two computed tensors", node.label)
    data, other, masked = (b, a, taken) if a.is_constant else (a, b, ~taken)
    number = constant_at(other, broadcast_index(index, other))
    assert data.dtype is not None
    if (number > np.finfo(data.dtype).min / 2).any():
        return Decline(f"logits are replaced by {float(number.max()):g}, which does not exclude them", node.label)
    lowest = bool(np.isfinite(number).any())
    return _Step(data, broadcast_index(index, data), term=np.where(masked, -np.inf, 0.0), lowest=lowest)


def has_fully_masked_row(terms: tuple[Term, ...], key_axis: int) -> bool:
    """Whether some query has all its keys excluded; there -inf and a very low number differ."""
    if not terms:
        return False
    total = sum((t.values for t in terms[1:]), terms[0].values)
    return bool(np.isneginf(total).all(axis=key_axis).any())
