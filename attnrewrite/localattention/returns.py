"""Where an attention's output returns to: the values behind it that are made of it alone, token by token."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from attnrewrite.dims import Dim, Extent
from attnrewrite.facts import Facts
from attnrewrite.graph import STANDARD_DOMAIN, Value
from attnrewrite.indexing.map import Index, IndexingError, dependencies, identity, reshape
from attnrewrite.indexing.rules import RULES
from attnrewrite.localattention.attention import Attention
from attnrewrite.localattention.grid import count, row_major
from attnrewrite.localattention.tokens import Roles, candidates, channel_axis_of
from attnrewrite.ops import POINTWISE, REDUCTIONS

# How far behind the attention the way back to a feature map is followed, in operators.
REGION_LIMIT = 160

# How far the first operator that mixes channels is looked for, in operators.
HEADS_LIMIT = 16

# Who made a node that begins to move an attention's output for the one that reads it next.
FOR_THE_NEXT = "for the next attention"
# Who made the map from which it is moved there: what lies before it is that attention's.
RETURNED = "returned by an attention"


@dataclass(frozen=True, eq=False)
class Return:
    """The feature map the output returns to, read back into the attention's output at `index` (grid: its own axes).

    whole: it holds all heads and channels of the output.
    """

    value: Value
    index: Index
    roles: Roles
    depth: int
    whole: bool


def returns_of(facts: Facts, attention: Attention, features: frozenset[int]) -> list[Return]:
    """Values behind the attention that are made of its output alone, per token; in topological order."""
    region: dict[Value, None] = {attention.output: None}
    start = facts.positions[attention.output]
    for node in facts.graph.nodes[start + 1 : start + 1 + REGION_LIMIT]:
        computed = [v for v in node.inputs if v is not None and not v.is_constant]
        if not computed or any(v not in region for v in computed) or node.domain != STANDARD_DOMAIN:
            continue
        if node.made_by == FOR_THE_NEXT:
            continue
        if node.op in RULES or node.op in POINTWISE or channel_axis_of(node) is not None:
            region.update(dict.fromkeys(node.outputs))
    found = []
    for value in region:
        back = read_back(facts, attention, features, value)
        if back is not None:
            found.append(back)
    return found


def heads_behind(facts: Facts, attention: Attention) -> frozenset[int]:
    """Output axes that number attentions of their own and are joined with the channels by the first operator behind it
    that mixes channels: heads. For operands that are normalised head by head, and so do not tell.
    """
    reached = {attention.output}
    start = facts.positions[attention.output]
    for node in facts.graph.nodes[start + 1 : start + 1 + HEADS_LIMIT]:
        if node.domain != STANDARD_DOMAIN or reached.isdisjoint(v for v in node.inputs if v is not None):
            continue
        axis = channel_axis_of(node)
        if axis is not None and node.op not in REDUCTIONS:
            return _heads_among(facts, attention, node.required(0), axis)
        if node.op in RULES or node.op in POINTWISE:
            reached.update(node.outputs)
    return frozenset()


def _heads_among(facts: Facts, attention: Attention, mixed: Value, axis: int) -> frozenset[int]:
    """The heads of a value whose channels, along `axis`, are mixed."""
    operands = (attention.query, attention.key, attention.value)
    apart = frozenset.intersection(*(dependencies(operand.index) for operand in operands))
    rank = len(mixed.known_shape)
    try:
        for candidate in candidates(mixed, identity(mixed.known_shape, rank + 1), rank, facts.positions):
            if candidate.value is attention.output:
                index = reshape(candidate.index, attention.output.known_shape, attention.full_shape)
                return frozenset(a for a in apart if a < len(index) and index[a].depends_on() == {axis})
    except IndexingError:
        pass
    return frozenset()


def nearest_return(
    facts: Facts, attention: Attention, returns: Sequence[Return], agreeing: Sequence[Return], batch: int
) -> tuple[Return, str | None]:
    """Of the returns that agree on one order of pixels the one to put the op's result at, and the name of a value
    behind the last of them that is rearranged once more, if there is one. batch: elements that the map enumerates.
    """
    agreeing = [r for r in agreeing if r.whole] or agreeing
    fitting = [r for r in agreeing if count(r.value.known_shape[0]) == batch] or agreeing
    first = min(r.depth for r in fitting)
    nearest = [r for r in fitting if r.depth == first]
    moved = [r for r in returns if r not in agreeing and _follows(facts, nearest[0], r)]
    moved_again = [r for r in moved if _follows(facts, fitting[-1], r)]
    back_again = [r for r in nearest if not any(_follows(facts, r, m) for m in moved if m.depth == first)]
    # The attention's own output has its heads apart: where it returns at once, what it becomes is the map.
    chosen = min(
        back_again or nearest,
        key=lambda r: (r.value is attention.output, spelled_out(len(r.roles.tokens) - 1), _heads_apart(r.roles)),
    )
    return chosen, moved_again[0].value.name if moved_again else None


def read_back(facts: Facts, attention: Attention, features: frozenset[int], value: Value) -> Return | None:
    """A value behind the attention, read back into its output; None where it is not made of that, token by token."""
    if value.shape is None:
        return None
    channel_axis = len(value.shape)
    try:
        own = identity(value.shape, channel_axis + 1)
    except IndexingError:
        return None
    own_features: frozenset[int] = frozenset()
    for candidate in candidates(value, own, channel_axis, facts.positions):
        if candidate.domain is not None:
            return None
        if candidate.value is attention.output:
            try:
                read = reshape(candidate.index, attention.output.known_shape, attention.full_shape)
            except IndexingError:
                return None
            index = attention.among_kept(read)
            if index is None:
                return None
            tokens = dependencies([c for a, c in enumerate(index) if a not in features])
            own_features |= dependencies([c for a, c in enumerate(index) if a in features]) - {channel_axis}
            split = _roles_of_return(value, tokens, own_features)
            return (
                None
                if split is None or not _passes_batch(attention.output_shape, index)
                else Return(value, index, split, candidate.depth, _is_whole(attention, features, index))
            )
        node = candidate.value.producer
        axis = None if node is None else channel_axis_of(node)
        if node is not None and axis is not None and node.op not in REDUCTIONS:
            own_features |= candidate.index[axis].depends_on() - {channel_axis}
    return None


def _is_whole(attention: Attention, features: frozenset[int], index: Index) -> bool:
    """Whether every position of the output's feature axes is read."""
    shape = attention.output_shape
    axes = [a for a in range(len(shape)) if a in features]
    return len(np.unique(row_major(index, axes, shape))) == math.prod(count(shape[a]) for a in axes)


def read_elsewhere(facts: Facts, output: Value, returns: set[Value]) -> Value | None:
    """An output of the model that reads a value by another way than these; None without one."""
    pending, seen = [output], {output, *returns}
    while pending:
        value = pending.pop()
        if value in facts.graph.outputs:
            return value
        for user in facts.users(value):
            for made in user.outputs:
                if made not in seen:
                    seen.add(made)
                    pending.append(made)
    return None


def _roles_of_return(value: Value, tokens: frozenset[int], features: frozenset[int]) -> Roles | None:
    if tokens & features:
        return None
    featured = [a for a, e in enumerate(value.known_shape) if a in features]
    if any(isinstance(value.known_shape[a], Dim) for a in featured):
        return None  # channels folded into the batch
    rest = [a for a, e in enumerate(value.known_shape) if a not in features and (a in tokens or e != 1 or a == 0)]
    return Roles(tuple(rest), tuple(featured))


def _passes_batch(shape: tuple[Extent, ...], index: Index) -> bool:
    """Every symbolic axis is read with its own stride, so element b of the batch reads element b."""
    return all(c.batch == (count(e) if isinstance(e, Dim) else 0) for c, e in zip(index, shape, strict=True))


def _heads_apart(split: Roles) -> bool:
    """Whether tokens lie between the features of a value: neither channels last nor channels first."""
    first, *others = split.tokens
    orders = [[first, *others, *split.features], [first, *split.features, *others]]
    return not any(order == sorted(order) for order in orders) or len(split.features) > 1


def _follows(facts: Facts, one: Return, other: Return) -> bool:
    """Whether `other` lies behind `one` and holds as many tokens: then it is the same map, rearranged."""
    tokens = [math.prod(count(r.value.known_shape[a]) for a in r.roles.tokens) for r in (one, other)]
    return facts.positions[other.value] > facts.positions[one.value] and tokens[0] == tokens[1]


def spelled_out(axes: int) -> tuple[bool, int]:
    """Order views of one map: height and width as axes of their own first, then the fewest axes."""
    return axes < 2, axes
