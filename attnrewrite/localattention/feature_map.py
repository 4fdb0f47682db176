"""Write nodes on feature maps: in whichever layout the model has them, with as little movement as that allows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from attnrewrite.dims import Extent, Shape, elements
from attnrewrite.facts import Facts
from attnrewrite.graph import STANDARD_DOMAIN, Node, Value
from attnrewrite.localattention.tokens import Roles


@dataclass(frozen=True)
class FeatureMap:
    """A tensor [B, *S, F], or [B, F, *S] if channels_first, with F the row-major product of its source's feature
    axes.
    """

    value: Value
    channels_first: bool = False

    @property
    def num_features(self) -> int:
        extent = self.value.known_shape[1 if self.channels_first else -1]
        assert isinstance(extent, int)
        return extent


class MapWriter:
    """Collects the nodes of one rewrite; `nodes` are in topological order and not yet part of the graph."""

    def __init__(self, facts: Facts, spatial: tuple[int, ...], made_by: str) -> None:
        self.facts, self.graph, self.spatial, self.made_by = facts, facts.graph, spatial, made_by
        self.nodes: list[Node] = []
        self.padded: dict[FeatureMap, float] = {}
        self._maps: dict[tuple[Value, tuple[int, ...], tuple[int, ...], tuple[int, ...]], FeatureMap] = {}
        self._picked: dict[tuple[FeatureMap, bytes], FeatureMap] = {}
        self._converted: dict[tuple[Value, bool], Value] = {}

    # -- emitting -----------------------------------------------------------------------------------------------------

    def emit(
        self, op: str, inputs: Sequence[Value | None], shape: Shape, stem: str, domain: str = "", **attributes: Any
    ) -> Value:
        """Append one node with one output of this shape; the dtype is that of the first input."""
        first = next(v for v in inputs if v is not None)
        output = Value(self.graph.fresh_name(stem), shape, first.dtype)
        node = Node(op, inputs, [output], attributes, output.name, domain)
        node.made_by = self.made_by
        self.nodes.append(node)
        return output

    def constant(self, array: np.ndarray, stem: str) -> Value:
        return Value(self.graph.fresh_name(stem), array.shape, array.dtype, array)

    def ints(self, values: Sequence[int], stem: str) -> Value:
        return self.constant(np.array(values, np.int64), stem)

    def reshape(self, value: Value, shape: Shape) -> Value:
        """Reshape with at most one symbolic extent, written as -1; of several in a row only the last is left."""
        while (node := value.producer) is not None and node.op == "Reshape" and node.domain == STANDARD_DOMAIN:
            value = node.required(0)
        if value.shape == shape:
            return value
        target = [e if isinstance(e, int) else -1 for e in shape]
        return self.emit("Reshape", [value, self.ints(target, f"{value.name}_shape")], shape, f"{value.name}_map")

    def transpose(self, value: Value, permutation: Sequence[int]) -> Value:
        """Transpose; of several in a row only one is left, or none. A padded map stays: its padding is known there."""
        padded = {map_.value for map_ in self.padded}
        while (node := value.producer) is not None and node.op == "Transpose" and node.domain == STANDARD_DOMAIN:
            if value in padded or node.required(0).shape is None:
                break
            value = node.required(0)
            inner = node.attributes.get("perm") or list(range(len(permutation)))[::-1]
            permutation = [inner[p] for p in permutation]
        if list(permutation) == list(range(len(permutation))):
            return value
        shape = tuple(value.known_shape[p] for p in permutation)
        return self.emit("Transpose", [value], shape, f"{value.name}_t", perm=[int(p) for p in permutation])

    def laid_out(self, map_: FeatureMap, *, channels_first: bool) -> Value:
        """The map's tensor in the wanted layout."""
        if map_.channels_first == channels_first:
            return map_.value
        key = (map_.value, channels_first)
        if key not in self._converted:
            rank = len(self.spatial) + 2
            order = [0, rank - 1, *range(1, rank - 1)] if channels_first else [0, *range(2, rank), 1]
            self._converted[key] = self.transpose(map_.value, order)
        return self._converted[key]

    def linear(self, node: Node, data: Value, shape: Shape, stem: str) -> Value:
        """Gemm and 1 x 1 convolution as MatMul and Add."""
        weight = node.constant(1)
        bias = node.constant(2)
        assert weight is not None
        if node.op == "Gemm":
            matrix = weight.T if node.attributes.get("transB", 0) else weight
            matrix = matrix * np.asarray(node.attributes.get("alpha", 1.0), weight.dtype)
            bias = None if bias is None else bias * np.asarray(node.attributes.get("beta", 1.0), weight.dtype)
        else:
            matrix = weight.reshape(weight.shape[:2]).T
        result = self.emit("MatMul", [data, self.constant(np.ascontiguousarray(matrix), f"{stem}_weight")], shape, stem)
        if bias is None:
            return result
        return self.emit("Add", [result, self.constant(bias.reshape(-1), f"{stem}_bias")], shape, stem)

    # -- sources and results ------------------------------------------------------------------------------------------

    def source_map(self, value: Value, split: Roles, batch: Extent, spatial: tuple[int, ...]) -> FeatureMap:
        """A value of the graph as a feature map of these spatial extents, in its own layout where that is one of the
        two.
        """
        key = (value, split.tokens, split.features, spatial)
        if key in self._maps:
            return self._maps[key]
        features = elements(tuple(value.known_shape[a] for a in split.features))
        order = [*split.tokens, *split.features]
        first_order = [*split.tokens[:1], *split.features, *split.tokens[1:]]
        if order == sorted(order):
            map_ = FeatureMap(self.reshape(value, (batch, *spatial, features)))
        elif (first_order == sorted(first_order) and split.tokens[0] == 0 and value.known_shape[0] == batch) or (
            batch == 1 and (features_first := [*split.features, *split.tokens]) == sorted(features_first)
        ):
            map_ = FeatureMap(self.reshape(value, (batch, features, *spatial)), channels_first=True)
        else:
            moved = self.transpose(value, order + [a for a in range(len(value.known_shape)) if a not in order])
            map_ = FeatureMap(self.reshape(moved, (batch, *spatial, features)))
        self._maps[key] = map_
        return map_

    def features(self, map_: FeatureMap, picked: np.ndarray, stem: str) -> FeatureMap:
        """The map with these features, in this order (int64 [F'])."""
        if np.array_equal(picked, np.arange(map_.num_features)):
            return map_
        key = (map_, picked.tobytes())
        if key not in self._picked:
            self._picked[key] = self._pick(map_, picked, stem)
        return self._picked[key]

    def _pick(self, map_: FeatureMap, picked: np.ndarray, stem: str) -> FeatureMap:
        axis = 1 if map_.channels_first else len(self.spatial) + 1
        shape = (*map_.value.known_shape[:axis], len(picked), *map_.value.known_shape[axis + 1 :])
        if np.array_equal(picked, np.arange(picked[0], picked[0] + len(picked))):
            bounds = [self.ints([v], f"{stem}_bound") for v in (int(picked[0]), int(picked[0]) + len(picked), axis)]
            return FeatureMap(self.emit("Slice", [map_.value, *bounds], shape, stem), map_.channels_first)
        return FeatureMap(
            self.emit("Gather", [map_.value, self.constant(picked, f"{stem}_index")], shape, stem, axis=axis),
            map_.channels_first,
        )

    def returned(self, map_: FeatureMap, value: Value, split: Roles) -> Value:
        """The map in the shape of a value whose tokens and features lie along these axes."""
        order = [*split.tokens, *split.features]
        first_order = [*split.tokens[:1], *split.features, *split.tokens[1:]]
        batch_first = first_order == sorted(first_order) and value.known_shape[:1] == map_.value.known_shape[:1]
        if map_.channels_first and batch_first:
            return self.reshape(map_.value, value.known_shape)
        last = self.laid_out(map_, channels_first=False)
        if order == sorted(order):
            return self.reshape(last, value.known_shape)
        if batch_first:
            return self.reshape(self.laid_out(map_, channels_first=True), value.known_shape)
        spread_out = self.reshape(last, tuple(value.known_shape[a] for a in order))
        return self.reshape(self.transpose(spread_out, list(np.argsort(order))), value.known_shape)

    def replace(self, old: Value, new: Value) -> None:
        """Add the nodes to the graph, its readers of `old` reading `new`; a view of a view becomes one view."""
        graph, readers = self.graph, self.facts.users(old)
        graph.nodes.extend(self.nodes)
        graph.replace_uses(old, new)
        view = new.producer
        if view is not None and view.op == "Reshape" and new not in graph.outputs:
            for reader in readers:
                target = reader.constant(1) if reader.op == "Reshape" else None
                if target is not None and target.all():  # a 0 would copy the extent of the view
                    reader.inputs[0] = view.inputs[0]
