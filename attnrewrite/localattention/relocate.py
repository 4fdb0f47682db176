"""Write a block on the map: its per-token operators there, its attentions between two movements that cancel later.

What the block's attentions read in the block's own order is put into that order, what they compute is put back onto the
map. Such a movement is one Gather, marked by its name; it is gone once an attention has become one op on the map.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from attnrewrite.dims import Dim, Extent, Shape
from attnrewrite.facts import Facts
from attnrewrite.graph import Node, Value
from attnrewrite.localattention.blocks import Block, Moved, Order, TokenMap, home_of
from attnrewrite.localattention.feature_map import MapWriter
from attnrewrite.localattention.grid import count
from attnrewrite.localattention.tokens import channel_axis_of
from attnrewrite.ops import REDUCTIONS


def relocate(facts: Facts, block: Block, made_by: str) -> list[Node]:
    """Edit the graph so that the block computes on the map; returns the nodes that move tokens."""
    return _Relocation(facts, block, made_by).run()


class _Relocation:
    """On the map every value is [batch, *spatial, *its feature extents]."""

    def __init__(self, facts: Facts, block: Block, made_by: str) -> None:
        self.facts, self.graph, self.block = facts, facts.graph, block
        self.batch, self.spatial = block.entry.batch, block.entry.spatial
        self.hoister = MapWriter(facts, self.spatial, made_by)
        self.on_map: dict[Value, Value] = {}
        self.movement: list[Node] = []

    def run(self) -> list[Node]:
        block = self.block
        first, order = block.first, block.orders[block.first]
        if block.made_inside:
            self.on_map[first] = self._onto_map(first, order)
        else:
            self.on_map[first] = self._laid_out(block.entry, _extents(first, order))
        for value, step in block.steps.items():
            self.on_map[value] = self._moved(value, step) if isinstance(step, Moved) else self._operator(value, step)
        made = {s for s in block.steps.values() if isinstance(s, Node)}
        for value in block.steps:
            readers = [n for n in self.facts.users(value) if n not in made]
            if value in block.exits or not readers:
                continue
            moved = self._out(value)
            for reader in readers:
                reader.inputs = [moved if v is value else v for v in reader.inputs]
        for value in block.exits:
            self.graph.replace_uses(value, self._home(value))
        self.graph.nodes.extend(self.hoister.nodes)
        self.graph.sort()
        return self.movement

    # -- between the map and the block's order ------------------------------------------------------------------------

    def _laid_out(self, source: TokenMap, features: tuple[int, ...]) -> Value:
        """A map of the graph with its features last, in these extents."""
        value, split = source.value, source.roles
        axes = [*split.tokens, *split.features]
        rest = [a for a in range(len(value.known_shape)) if a not in axes]
        return self._reshape(self.hoister.transpose(value, axes + rest), features)

    def _home(self, value: Value) -> Value:
        """A value of the map in the shape of one whose tokens are in the map's order."""
        return self._arranged(self.on_map[value], value, self.block.orders[value])

    def _out(self, value: Value) -> Value:
        """A value of the map in the block's order: the tensor that the model's own nodes read."""
        order = self.block.orders[value]
        return self._arranged(self._gathered(self.on_map[value], order.table), value, order)

    def _arranged(self, on_map: Value, like: Value, order: Order) -> Value:
        """Tokens in the order of `like`, in its axes."""
        split, permutation = self._axes(like.known_shape, order)
        listed = self.hoister.reshape(on_map, tuple(split[a] for a in permutation))
        return self.hoister.reshape(self.hoister.transpose(listed, np.argsort(permutation).tolist()), like.known_shape)

    def _onto_map(self, value: Value, order: Order) -> Value:
        """A tensor in the block's order on the map."""
        extents = _extents(value, order)
        home = home_of(self.facts, value, order, self.block.entry)
        if home is not None:
            return self._laid_out(home, extents)
        split, permutation = self._axes(value.known_shape, order)
        moved = self.hoister.transpose(self.hoister.reshape(value, split), permutation)
        return self._reshape(self._gathered(moved, np.argsort(order.table)), extents)

    def _axes(self, shape: Shape, order: Order) -> tuple[Shape, list[int]]:
        """A shape, its symbolic batch split off where tokens stand before it, and the permutation that puts the batch
        first, then the tokens, then the features.
        """
        at = next((a for a, e in enumerate(shape) if isinstance(e, Dim)), 0)
        if all(shape[a] == 1 for a in order.tokens if a < at):
            return shape, [*order.tokens, *order.features]
        split = (*shape[:at], self._lead, count(shape[at]), *shape[at + 1 :])
        axes = [a + (a >= at) for a in (*order.tokens, *order.features)]
        return split, [at, *axes]

    @property
    def _lead(self) -> Extent:
        return self.batch // count(self.batch) if isinstance(self.batch, Dim) else 1

    def _gathered(self, value: Value, table: np.ndarray) -> Value:
        """Tokens of [symbolic batch, tokens, features] picked by a table; other shapes are seen as that."""
        tokens = count(self.batch) * math.prod(self.spatial)
        features = math.prod(count(e) for e in value.known_shape) // tokens
        shape = (self._lead, tokens, features)
        flat = self.hoister.reshape(value, shape)
        picked = self.hoister.emit(
            "Gather", [flat, self.hoister.constant(table, f"{value.name}_order")], shape, f"{value.name}_moved", axis=1
        )
        assert picked.producer is not None
        self.movement.append(picked.producer)
        return picked

    def _reshape(self, value: Value, features: Sequence[int]) -> Value:
        return self.hoister.reshape(value, (self.batch, *self.spatial, *features))

    # -- operators ----------------------------------------------------------------------------------------------------

    def _moved(self, value: Value, step: Moved) -> Value:
        """Features picked and regrouped; the tokens stay where they are."""
        data = self.on_map[step.source]
        total = math.prod(_extents(step.source, self.block.orders[step.source]))
        if not np.array_equal(step.features, np.arange(total)):
            flat = self._reshape(data, (total,))
            index = self.hoister.constant(step.features, f"{value.name}_features")
            shape = (self.batch, *self.spatial, len(step.features))
            data = self.hoister.emit("Gather", [flat, index], shape, f"{value.name}_map", axis=len(shape) - 1)
        return self._reshape(data, _extents(value, self.block.orders[value]))

    def _operator(self, value: Value, node: Node) -> Value:
        order = self.block.orders[value]
        extents = _extents(value, order)
        shape = (self.batch, *self.spatial, *extents)
        if channel_axis_of(node) is not None:
            return self._channelwise(value, node, shape)
        inputs: list[Value | None] = []
        for operand in node.inputs:
            if operand is None:
                inputs.append(None)
            elif operand.is_constant:
                inputs.append(self._constant(operand, value, order))
            else:
                aligned = [operand.known_shape[a] for a in order.features]
                inputs.append(self._reshape(self._operand(operand, order), [count(e) for e in aligned]))
        result = self.hoister.emit(node.op, inputs, shape, f"{value.name}_map", **node.attributes)
        result.dtype = value.dtype
        return result

    def _operand(self, value: Value, order: Order) -> Value:
        if value not in self.on_map:
            self.on_map[value] = self._onto_map(value, order)
        return self.on_map[value]

    def _channelwise(self, value: Value, node: Node, shape: Shape) -> Value:
        """An operator over the last feature axis, which is the last on the map as well."""
        data, weights, stem = self.on_map[node.required(0)], node.inputs[1:], f"{value.name}_map"
        match node.op:
            case "MatMul":
                return self.hoister.emit("MatMul", [data, weights[0]], shape, stem)
            case "Gemm" | "Conv":
                return self.hoister.linear(node, data, shape, stem)
            case op if op in REDUCTIONS:
                attributes = {k: v for k, v in node.attributes.items() if k != "axes"}
                if "axes" in node.attributes:
                    return self.hoister.emit(op, [data], shape, stem, axes=[-1], **attributes)
                return self.hoister.emit(op, [data, self.hoister.ints([-1], f"{stem}_axes")], shape, stem, **attributes)
        return self.hoister.emit(node.op, [data, *weights], shape, stem, **{**node.attributes, "axis": -1})

    def _constant(self, operand: Value, value: Value, order: Order) -> Value:
        """A constant operand of a pointwise operator: what differs from token to token is put where they are."""
        elements = operand.constant
        if elements.ndim == 0:
            return operand
        rank = len(value.known_shape)
        aligned = elements.reshape((1,) * (rank - elements.ndim) + elements.shape)
        features = [aligned.shape[a] for a in order.features]
        if all(aligned.shape[a] == 1 for a in order.tokens):
            flat = aligned.reshape(features)
            return operand if flat.shape == elements.shape else self.hoister.constant(flat, operand.name)
        tokens = [count(value.known_shape[a]) for a in order.tokens]
        listed = np.broadcast_to(aligned.transpose([*order.tokens, *order.features]), (*tokens, *features)).reshape(
            -1, *features
        )
        placed = np.empty_like(listed)
        placed[order.table] = listed
        placed = placed.reshape(count(self.batch), *self.spatial, *features)
        if (placed == placed[:1]).all():
            placed = placed[:1]
        return self.hoister.constant(np.ascontiguousarray(placed), operand.name)


def _extents(value: Value, order: Order) -> tuple[int, ...]:
    return tuple(count(value.known_shape[a]) for a in order.features)
