"""Attention as its numbers say: what the logits of one softmax are made of, and where query, key and value are read.

Everything is expressed on one grid: the axes of the attention's output, then the summed keys, then the summed channels.
So "which pixel does the key of this output element come from" is an array, and comparing two of them is exact.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from attnrewrite.dims import Dim, Extent, proportion, static
from attnrewrite.facts import Facts
from attnrewrite.graph import STANDARD_DOMAIN, Node, Value
from attnrewrite.indexing.map import Coordinate, Index, IndexingError, identity, reduced, refined, reshape
from attnrewrite.indexing.provenance import Provenance
from attnrewrite.indexing.rules import Read, sources
from attnrewrite.localattention.contraction import (
    REARRANGING,
    Operand,
    is_contraction,
    operands,
    product_of,
    rearranges,
)
from attnrewrite.localattention.logits import ComputedTerm, Logits, QueryTerm, Term, read_logits, varies
from attnrewrite.localattention.site import Decline

NOT_OVER_KEYS = "the softmax does not run over the keys that are summed"


@dataclass(frozen=True, eq=False)
class Attention:
    """softmax(scale * query . key + terms) . value, on the grid [*output axes, keys, channels].

    terms are constants; query_terms products of the query with constants; computed_terms anything else made from data.

    output_shape: the output's axes as the grid numbers them: an axis that holds several (windows and heads, say) is
    split as the model itself splits it afterwards. kept: of an attention restricted to a part of its queries or heads,
    the axis and the int64 positions along it; full_extent: that axis without the restriction.
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
    query_terms: tuple[QueryTerm, ...] = ()
    computed_terms: tuple[ComputedTerm, ...] = ()
    kept: tuple[int, np.ndarray] | None = None
    full_extent: int = 0
    keeps_heads: bool = False

    @property
    def grid_rank(self) -> int:
        return self.channel_axis + 1

    @property
    def full_shape(self) -> tuple[Extent, ...]:
        """output_shape without the restriction to some queries."""
        if self.kept is None:
            return self.output_shape
        axis = self.kept[0]
        return (*self.output_shape[:axis], self.full_extent, *self.output_shape[axis + 1 :])

    def among_kept(self, index: Index) -> Index | None:
        """Coordinates over full_shape as coordinates over output_shape; None where one is not of the kept queries. Of
        kept heads: the coordinates at those positions of the reader's channels that hold them, None where none does.
        """
        if self.kept is None:
            return index
        axis, positions = self.kept
        place = np.full(self.full_extent, -1)
        place[positions] = np.arange(len(positions))
        values = place[index[axis].values]
        others = [*index[:axis], Coordinate(values), *index[axis + 1 :]]
        if (values >= 0).all():
            return tuple(others)
        varies_along = index[axis].depends_on()
        held = np.flatnonzero(values >= 0)
        if not self.keeps_heads or len(varies_along) != 1 or not len(held):
            return None
        (along,) = varies_along
        return tuple(Coordinate(reduced(taken(c.values, held, along)), c.batch) for c in others)

    def in_full(self, index: Index) -> Index:
        """The reverse of among_kept."""
        if self.kept is None:
            return index
        axis, positions = self.kept
        return (*index[:axis], Coordinate(positions[index[axis].values]), *index[axis + 1 :])


def read_attention(facts: Facts, softmax: Node) -> Attention | Decline:
    """The attention around a softmax, or why it is none that can be read."""
    try:
        return _read(facts, softmax)
    except IndexingError as error:
        return Decline(str(error), softmax.label)


def restricted(attention: Attention, axis: int, kept: np.ndarray) -> Attention:
    """The attention at these positions (int64) of one axis of its grid: some of its keys, or of its queries."""

    part = _changed(attention, lambda array: taken(array, kept, axis))
    if axis == attention.key_axis:
        return replace(part, num_keys=len(kept))
    shape = attention.output_shape
    fewer = (*shape[:axis], len(kept), *shape[axis + 1 :])
    return replace(part, output_shape=fewer, kept=(axis, kept), full_extent=static(shape[axis]))


def of_heads(attention: Attention, axis: int, kept: np.ndarray) -> Attention:
    """The attention of these heads (int64) along the grid axis that numbers heads; its coordinates tell what they still
    depend on.
    """
    return replace(_changed(restricted(attention, axis, kept), reduced), keeps_heads=True)


def _changed(attention: Attention, change: Callable[[np.ndarray], np.ndarray]) -> Attention:
    """The attention with this done to every array over its grid."""

    def operand(one: Operand) -> Operand:
        return Operand(one.value, tuple(Coordinate(change(c.values), c.batch) for c in one.index))

    return replace(
        attention,
        query=operand(attention.query),
        key=operand(attention.key),
        value=operand(attention.value),
        scale=change(attention.scale),
        terms=tuple(replace(t, values=change(t.values)) for t in attention.terms),
    )


def taken(array: np.ndarray, positions: np.ndarray, axis: int) -> np.ndarray:
    """The array at these positions (int64) of a grid axis; as it is where it does not vary along it."""
    return array.take(positions, axis=axis) if array.ndim > axis and array.shape[axis] > 1 else array


@dataclass(frozen=True, eq=False)
class WeightedSum:
    """sum_j weight[j] . value[j], on the grid [*output axes, keys, channels].

    weight: the softmax's output, where there is one; weights: where it is read. value_axes: output axes that the
    value alone depends on.
    """

    consumer: Node
    output_shape: tuple[Extent, ...]
    weights: Index
    value: Operand
    key_axis: int
    value_axes: tuple[int, ...]
    num_keys: int
    weight: Value

    @property
    def output(self) -> Value:
        return self.consumer.output

    @property
    def channel_axis(self) -> int:
        return self.key_axis + 1


def guarded(facts: Facts, softmax: Node) -> Value:
    """The probabilities, behind Where(IsNaN(softmax), 0, softmax) where that follows: exporters write it for masks that
    may leave a row no key.
    """
    users = facts.users(softmax.output)
    tests, chosen = ([u for u in users if u.op == op and u.domain == STANDARD_DOMAIN] for op in ("IsNaN", "Where"))
    if len(users) != 2 or len(tests) != 1 or len(chosen) != 1 or facts.only_user(tests[0].output) is not chosen[0]:
        return softmax.output
    condition, zero, kept = (chosen[0].required(k) for k in range(3))
    is_guard = condition is tests[0].output and kept is softmax.output and zero.is_constant
    whole = chosen[0].output.shape == softmax.output.shape
    return chosen[0].output if is_guard and whole and not zero.constant.any() else softmax.output


def read_weighted_sum(
    facts: Facts, softmax: Node, *, split: bool = True, probabilities: Value | None = None
) -> WeightedSum | Decline:
    """The sum over values behind a softmax. Raises IndexingError where a map on the way cannot be expressed.

    split: axes of the output that a reshape behind it divides are divided at once (`split_axes`). probabilities: the
    softmax's output where they are not that.
    """
    if softmax.output.shape is None or softmax.output.dtype is None:
        return Decline("the shape of the softmax is unknown", softmax.label)
    probabilities = softmax.output if probabilities is None else probabilities
    consumer = _contraction_after(facts, softmax, probabilities)
    if isinstance(consumer, Decline):
        return consumer
    output = consumer.output
    if output.shape is None:
        return Decline("the shape of the attention's output is unknown", consumer.label)
    output_shape = split_axes(facts, output) if split else output.shape
    key_axis, channel_axis = len(output_shape), len(output_shape) + 1
    index = reshape(identity(output_shape, channel_axis + 1), output_shape, output.shape)
    weights, value = None, None
    for one, other in _both_ways(operands(consumer, index, key_axis)):
        found = _pull_to(probabilities, one.value, one.index)
        if found is not None:
            weights, value = found, other
            break
    if any(v is not None and v.is_constant for v in consumer.inputs) and consumer.op == "Einsum":
        return Decline("the sum over values has a third factor", consumer.label)
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
        return Decline(NOT_OVER_KEYS, softmax.label)
    if any(key_axis in c.depends_on() for a, c in enumerate(weights.index) if a != axis):
        return Decline(NOT_OVER_KEYS, softmax.label)
    value_axes = [a for a in range(key_axis) if varies(value.index, a) and not varies(weights.index, a)]
    return WeightedSum(
        consumer, output_shape, weights.index, value, key_axis, tuple(value_axes), num_keys, softmax.output
    )


def _read(facts: Facts, softmax: Node) -> Attention | Decline:
    probabilities = guarded(facts, softmax)
    summed = read_weighted_sum(facts, softmax, probabilities=probabilities)
    if isinstance(summed, Decline):
        return summed
    if len(summed.value_axes) > 1:  # the values' own axis becomes several: pixels, where the softmax is over channels
        summed = read_weighted_sum(facts, softmax, split=False, probabilities=probabilities)
        if isinstance(summed, Decline):
            return summed
    key_axis, channel_axis = summed.key_axis, summed.channel_axis
    if len(summed.value_axes) > 1:
        axes = len(summed.value_axes)
        return Decline(f"the value of a key has {axes} axes (tokens and channels), not one", summed.consumer.label)
    if not summed.value_axes:
        return Decline("the values have no channel axis of their own", summed.consumer.label)
    if summed.num_keys == 1:
        return Decline("every query has one key alone, whose weight is 1 whatever it is", softmax.label, "global")

    logits = read_logits(facts, softmax.required(0), summed.weights, key_axis, channel_axis)
    if isinstance(logits, Decline):
        return logits
    if probabilities is not softmax.output and not _every_row_has_a_key(logits, key_axis):
        return Decline("a query that its mask leaves no key gives zeros here, which the op does not", softmax.label)
    query, key = logits.query, logits.key
    head_dim = max(_extent_along(query.index, channel_axis), _extent_along(key.index, channel_axis))
    assert softmax.output.dtype is not None
    return Attention(
        softmax,
        summed.output,
        query,
        key,
        summed.value,
        logits.factor,
        logits.constants,
        key_axis,
        channel_axis,
        summed.value_axes[0],
        summed.num_keys,
        head_dim,
        softmax.output.dtype,
        logits.value,
        summed.output_shape,
        logits.query_terms,
        logits.computed,
    )


def _every_row_has_a_key(logits: Logits, key_axis: int) -> bool:
    """Whether what is added to the logits leaves every query a key, whatever the data."""
    if any(term.excludes is None or not np.isfinite(term.excludes) for term in logits.computed):
        return False
    excluded = np.zeros((1,) * (key_axis + 1), bool)
    for term in logits.constants:
        values = term.values.reshape(term.values.shape[: key_axis + 1] + (1,) * (key_axis + 1 - term.values.ndim))
        excluded = excluded | np.isneginf(values)
    return not bool(excluded.all(axis=key_axis).any())


def split_axes(facts: Facts, output: Value) -> tuple[Extent, ...]:
    """The output's extents, each axis split where the first Reshape behind it (through transposes) begins an axis; a
    symbolic axis also where the next ones do.
    """
    axes = list(range(len(output.known_shape)))  # axes[i]: the output's axis that axis i of the current value is
    node = facts.only_user(output)
    while node is not None and node.op == "Transpose":
        axes = [axes[p] for p in node.attributes.get("perm") or list(range(len(axes)))[::-1]]
        node = facts.only_user(node.output)
    behind = node
    splits: dict[int, tuple[Extent, ...]] = {}
    before = None if node is None or node.input(0) is None else node.required(0).shape
    while node is not None and node.op == "Reshape" and node.output.shape is not None and before is not None:
        for axis, parts in enumerate(refined(before, node.output.shape)):
            # Further views say which heads are folded into a symbolic batch.
            if axes[axis] not in splits or (isinstance(before[axis], Dim) and len(splits[axes[axis]]) == 1):
                splits[axes[axis]] = parts
        node = facts.only_user(node.output)
    if axes[:1] == [0] and len(splits.get(0, ())) <= 1:
        splits[0] = _unfolded(facts, output.known_shape[0], behind)
    return tuple(e for a, extent in enumerate(output.known_shape) for e in splits.get(a, (extent,)))


def _unfolded(facts: Facts, extent: Extent, node: Node | None) -> tuple[Extent, ...]:
    """A symbolic first axis as (batch, folded into it), where a later view takes it apart; until then other axes may be
    merged into it (8*batch, 32 -> 256*batch -> batch, 256).
    """
    while node is not None and isinstance(extent, Dim) and node.output.shape:
        first = node.output.shape[0]
        if node.op == "Reshape" and isinstance(first, Dim):
            folded = proportion(extent, first)
            if folded is not None and folded > 1:
                return first, folded
        elif node.op != "Transpose" or (node.attributes.get("perm") or [1])[0] != 0:
            break
        node = facts.only_user(node.output)
    return (extent,)


def _both_ways(pair: tuple[Operand, Operand]) -> tuple[tuple[Operand, Operand], tuple[Operand, Operand]]:
    return pair, (pair[1], pair[0])


def _extent_along(index: Index, axis: int) -> int:
    return max((c.shape[axis] for c in index), default=1)


def _contraction_after(facts: Facts, softmax: Node, value: Value) -> Node | Decline:
    """The contraction that consumes the probabilities, through operators that only rearrange or cast them."""
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
            while after is not None and rearranges(after):
                after = facts.only_user(after.output)
            if after is not None and product_of(after) is user:
                return after
        if _mixes_heads(user, softmax):
            return Decline(
                "the probabilities of several heads are mixed with one another after the softmax", user.label
            )
        if user.op == "Mul" and not any(v is not None and v.is_constant for v in user.inputs):
            return Decline("the probabilities are multiplied by a tensor computed from data", user.label)
        if not rearranges(user) or user.required(0) is not value:
            return Decline(f"the probabilities go into {user.op}, not into a sum over values", user.label)
        value = user.outputs[0]


def _mixes_heads(node: Node, softmax: Node) -> bool:
    """A Linear or a 1 x 1 convolution over the probabilities along another axis than the keys'."""
    shape, axis = softmax.output.shape, softmax.attributes.get("axis", -1)
    if shape is None or node.domain != STANDARD_DOMAIN or node.op not in ("MatMul", "Gemm", "Conv"):
        return False
    data = node.required(0).shape
    return data is not None and data[1 if node.op == "Conv" else -1] != shape[axis]


def _pull_to(target: Value, value: Value, index: Index) -> Provenance | None:
    """Follow rearranging operators from `value[index]` back to `target`."""
    while value is not target:
        node = value.producer
        if node is None or not rearranges(node):
            return None
        if node.op not in REARRANGING:
            value = node.required(0)
            continue
        found = sources(node, value, index)
        if found is None or len(found) != 1 or not isinstance(found[0], Read):
            return None
        value, index = found[0].value, found[0].index
    return Provenance(value, index)
