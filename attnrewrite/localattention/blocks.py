"""Blocks that work in another order of tokens than the map they come from and return to.

A model may partition its feature map once, run a whole transformer block (or several) on the windows, and merge them
afterwards. Its attention aside, such a block treats every token alike, so it may as well run on the map. Here the block
is found: `Order` says for every value of it where each of its tokens lies on the map, and the block ends where the
tokens lie in the map's own order again.
"""

from __future__ import annotations

import contextlib
import heapq
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from attnrewrite.dims import Dim, Extent, Shape
from attnrewrite.facts import Facts
from attnrewrite.graph import STANDARD_DOMAIN, Node, Value
from attnrewrite.indexing.map import Index, IndexingError, dependencies, identity, reduced
from attnrewrite.indexing.provenance import Provenance, provenances
from attnrewrite.indexing.rules import RULES
from attnrewrite.localattention.grid import count
from attnrewrite.localattention.tokens import Roles, channel_axis_of, roles
from attnrewrite.ops import POINTWISE

# Movement that leaves every element where it is in memory.
REGROUPING = frozenset({"Reshape", "Squeeze", "Unsqueeze", "Flatten", "Identity"})


@dataclass(frozen=True, eq=False)
class Order:
    """Where the tokens of a value lie on the map.

    position: int64, one axis per axis of the value, extent 1 along the features: the row-major position among all
    tokens of the map, its batch included; of a symbolic batch the tokens of one element are enumerated. tokens,
    features: the value's axes.
    """

    position: np.ndarray
    tokens: tuple[int, ...]
    features: tuple[int, ...]

    @property
    def table(self) -> np.ndarray:
        """int64 [tokens]: the position of each token, row-major over the token axes."""
        return self.position.reshape(-1)

    @property
    def in_place(self) -> bool:
        return bool((self.table == np.arange(self.table.size)).all())

    def same(self, other: Order) -> bool:
        """Whether both lay out their tokens alike, axis by axis."""
        return self.tokens == other.tokens and np.array_equal(self.position, other.position)


@dataclass(frozen=True, eq=False)
class TokenMap:
    """A value seen as the map of tokens: its axes, its extents as [batch, *spatial], where the reader's tokens lie."""

    value: Value
    roles: Roles
    batch: Extent
    spatial: tuple[int, ...]
    order: Order


@dataclass(frozen=True, eq=False)
class Moved:
    """A value that is another one of its block, moved: which of its features it holds (int64 [F])."""

    source: Value
    features: np.ndarray


@dataclass(frozen=True, eq=False)
class Block:
    """What may be written on the map.

    entry: the map; first: the first value in another order, the map's tokens moved or (made_inside) computed in that
    order. orders: every value of the block. steps: what makes each value that the exits need, `first` aside, in
    topological order. operands: computed values that the steps join to the block's, and how they lay out their tokens.
    exits: values in the map's order.
    """

    entry: TokenMap
    first: Value
    orders: dict[Value, Order]
    steps: dict[Value, Node | Moved]
    operands: dict[Value, Order]
    exits: tuple[Value, ...]
    made_inside: bool = False


def find_block(facts: Facts, node: Node) -> Block | None:
    """The block that begins with the node's output, the map in another order; None where there is none."""
    first = node.outputs[0]
    if node.op not in RULES or node.domain != STANDARD_DOMAIN or first.shape is None:
        return None
    if not any(is_per_token(user) for user in facts.users(first)):
        return None
    features = frozenset({feature_axis_behind(facts, first)})
    farther = False
    # the farthest first: a shift before the windows belongs to the block
    for way in reversed(list(ways(facts, first))):
        entry = as_map(first, way, features)
        if entry is None or entry.order.in_place:
            continue
        block = _Walk(facts, entry, first).block()
        if block is not None:
            return None if farther and any(_moves_on(facts, v) for v in block.exits) else block
        farther = True
    return None


def block_behind(facts: Facts, entry: TokenMap, first: Value) -> Block | None:
    """The block from a value that is computed in another order of the map's tokens to where it is merged."""
    block = None if entry.order.in_place else _Walk(facts, entry, first).block()
    return None if block is None else replace(block, made_inside=True)


def token_order(value: Value, position: np.ndarray, features: frozenset[int], total: int) -> Order | None:
    """The order of a value with its tokens at these positions; None unless it has each of the map's tokens once."""
    shape = value.known_shape
    tokens = tuple(a for a in range(len(shape)) if a not in features)
    if any(position.shape[a] != (1 if a in features else count(e)) for a, e in enumerate(shape)):
        return None
    if position.size != total or not np.array_equal(np.sort(position.reshape(-1)), np.arange(total)):
        return None
    return Order(position, tokens, tuple(sorted(features)))


def _moves_on(facts: Facts, value: Value) -> bool:
    """Whether a value is rearranged at once: behind a block that began with an entry rearranged before, this says that
    the two do not undo each other (a shift in the wrong direction).
    """
    users = facts.users(value)
    while len(users) == 1 and users[0].op in REGROUPING:
        users = facts.users(users[0].output)
    return bool(users) and all(user.op in RULES and not is_per_token(user) for user in users)


def home_of(facts: Facts, value: Value, order: Order, entry: TokenMap) -> TokenMap | None:
    """The map that the value is when its tokens are put where `order` says, if some value of the graph is that."""
    for way in reversed(list(ways(facts, value))):
        found = as_map(value, way, frozenset(order.features))
        if found is None or count(found.batch) != count(entry.batch) or found.order.tokens != order.tokens:
            continue
        if math.prod(found.spatial) == math.prod(entry.spatial) and found.order.same(order):
            return found
    return None


def is_per_token(node: Node) -> bool:
    """Whether an operator treats every token alike (its constant operands may differ from token to token)."""
    if node.domain != STANDARD_DOMAIN or len(node.outputs) != 1:
        return False
    return node.op in POINTWISE or channel_axis_of(node) is not None


def ways(facts: Facts, value: Value) -> Iterator[Provenance]:
    """Everything further back that the value is, moved; nearest first, looked for as it is asked for."""
    with contextlib.suppress(IndexingError):
        for way in provenances(value, identity(value.known_shape), facts.positions):
            if way.domain is not None:
                return
            if way.value is not value and way.value.shape is not None:
                yield way


def feature_axis_behind(facts: Facts, value: Value) -> int:
    """The axis that the first operator behind the value mixes; the last where pointwise operators tell nothing."""
    rank, pending, seen = len(value.known_shape), [value], {value}
    while pending:
        here = pending.pop(0)
        for user in facts.users(here):
            axis = channel_axis_of(user)
            if axis is not None and user.required(0) is here:
                return axis
            output = user.outputs[0]
            if is_per_token(user) and output not in seen and output.shape is not None and len(output.shape) == rank:
                seen.add(output)
                pending.append(output)
    return rank - 1


def as_map(reader: Value, way: Provenance, features: frozenset[int]) -> TokenMap | None:
    """`way.value` as the map whose tokens the reader has, in some order; features: the reader's feature axes."""
    shape = way.value.known_shape
    split = roles(way.value, way.index, features)
    if split is None or not split.tokens:
        return None
    extents = [shape[a] for a in split.tokens]
    batch: Extent = 1
    if split.tokens[0] == 0 and len(extents) > 1:
        batch, *extents = extents
    if any(isinstance(e, Dim) for e in extents):
        return None
    position = _flat(way.index, shape, split.tokens)
    picked = _flat(way.index, shape, split.features)
    if position is None or picked is None or not np.array_equal(picked.reshape(-1), np.arange(picked.size)):
        return None
    spatial = tuple(count(e) for e in extents)
    order = token_order(reader, position, features, count(batch) * math.prod(spatial))
    return None if order is None else TokenMap(way.value, split, batch, spatial, order)


def _flat(index: Index, shape: Shape, axes: Sequence[int]) -> np.ndarray | None:
    """Row-major position among these axes; None where the elements of a symbolic batch are not passed through."""
    flat: np.ndarray = np.zeros((1,) * (index[0].values.ndim if index else 0), np.int64)
    for axis in axes:
        extent = shape[axis]
        if index[axis].batch != (count(extent) if isinstance(extent, Dim) else 0):
            return None
        flat = flat * count(extent) + index[axis].values
    return reduced(flat)


class _Walk:
    """Forward from the first moved value, through operators that treat every token alike, to where it is home."""

    def __init__(self, facts: Facts, entry: TokenMap, first: Value) -> None:
        self.facts, self.entry, self.first = facts, entry, first
        self.orders: dict[Value, Order] = {first: entry.order}
        self.steps: dict[Value, Node | Moved] = {}
        self.operands: dict[Node, dict[Value, Order]] = {}
        self.home: set[Value] = set()
        self.pieces: set[Value] = set()  # moved, but not all of it: one half of a roll

    def block(self) -> Block | None:
        """The block, or None where its tokens never come home, or nothing is joined to them on the way."""
        for node in self._reached():
            if self.home and not any(v in self.home for v in node.inputs):
                continue  # a residual stream joined on the way would lead through the rest of the model
            if node.op in RULES and node.domain == STANDARD_DOMAIN and not is_per_token(node):
                for output in node.outputs:
                    self._movement(output)
            elif is_per_token(node):
                self._operator(node)
        exits = [v for v in self.home if not self._goes_on(v)]
        needed = self._needed(exits)
        operands: dict[Value, Order] = {}
        for step in needed.values():
            operands.update(self.operands.get(step, {}) if isinstance(step, Node) else {})
        if not exits or not operands or any(self._is_named(v) for v in needed if v not in exits):
            return None
        return Block(self.entry, self.first, self.orders, needed, operands, tuple(exits))

    def _reached(self) -> Iterator[Node]:
        """Nodes that read what the walk has, in topological order, growing as it goes."""
        heap: list[tuple[int, Node]] = []
        seen: set[Node] = set()
        known = [self.first]
        while True:
            for value in known:
                for user in self.facts.users(value):
                    if user not in seen and user.outputs:
                        seen.add(user)
                        heapq.heappush(heap, (self.facts.positions[user.outputs[0]], user))
            if not heap:
                return
            node = heapq.heappop(heap)[1]
            yield node
            known = [v for v in node.outputs if v in self.pieces or (v in self.orders and self._open(v))]

    def _open(self, value: Value) -> bool:
        """Whether the walk goes on behind a value: once home, only through what leaves its tokens where they are."""
        user = self.facts.only_user(value)
        return value not in self.home or (user is not None and user.op in RULES and not is_per_token(user))

    def _is_named(self, value: Value) -> bool:
        """Whether a value is read under its name, by the model's caller or a subgraph: it has to stay."""
        return value in self.facts.graph.outputs or any(value in user.captures for user in self.facts.users(value))

    def _goes_on(self, value: Value) -> bool:
        user = self.facts.only_user(value)
        return user is not None and any(v in self.home for v in user.outputs)

    def _movement(self, output: Value) -> None:
        if output.shape is None:
            return
        node = output.producer
        assert node is not None
        if not all(v is None or v.is_constant or v in self.orders or v in self.pieces for v in node.inputs):
            return
        way = next((w for w in ways(self.facts, output) if w.value in self.orders), None)
        found = None if way is None else self._moved(output, way)
        if found is None:
            self.pieces.add(output)
            return
        order, features = found
        assert way is not None
        if way.value in self.home and not order.in_place:
            return  # the next partition is a block of its own
        self.orders[output] = order
        self.steps[output] = Moved(way.value, features)
        if order.in_place:
            self.home.add(output)

    def _moved(self, output: Value, way: Provenance) -> tuple[Order, np.ndarray] | None:
        """(order, features) of a value that is `way.value` moved; None where it mixes or drops tokens."""
        source, shape = self.orders[way.value], way.value.known_shape
        tokens, picked = _flat(way.index, shape, source.tokens), _flat(way.index, shape, source.features)
        if tokens is None or picked is None:
            return None
        features = dependencies([way.index[a] for a in source.features])
        order = token_order(output, source.table[tokens], features, source.table.size)
        return None if order is None else (order, picked.reshape(-1))

    def _operator(self, node: Node) -> None:
        output = node.output
        inside = [v for v in node.inputs if v is not None and v in self.orders and v not in self.home]
        if output.shape is None or not inside:
            return
        order = self.orders[inside[0]]
        axis = channel_axis_of(node)
        if axis is not None:
            if axis != order.features[-1] or inside[0] is not node.required(0):
                return
        elif len(output.shape) != len(inside[0].known_shape) or not all(order.same(self.orders[v]) for v in inside):
            return
        if any(output.shape[a] != inside[0].known_shape[a] for a in order.tokens):
            return
        joined = {v: order for v in node.inputs if v is not None and not v.is_constant and v not in inside}
        for operand in joined:
            shape = operand.shape
            if (
                shape is None
                or len(shape) != len(output.shape)
                or any(shape[a] != output.shape[a] for a in order.tokens)
            ):
                return
        self.orders[output], self.steps[output], self.operands[node] = order, node, joined

    def _needed(self, exits: Sequence[Value]) -> dict[Value, Node | Moved]:
        wanted: set[Value] = set()
        pending = list(exits)
        while pending:
            value = pending.pop()
            if value in wanted or value is self.first:
                continue
            wanted.add(value)
            step = self.steps[value]
            sources = [step.source] if isinstance(step, Moved) else [v for v in step.inputs if v in self.orders]
            pending += [v for v in sources if v is not None]
        return {v: self.steps[v] for v in sorted(wanted, key=self.facts.positions.__getitem__)}
