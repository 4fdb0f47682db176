"""Emit on the feature map what the model computes per token elsewhere.

Per-token operators commute with the movement of tokens. Given a value behind such operators and the feature map its
tokens come from, `Hoister` writes the same operators on the feature map, channels last. It repeats the walk of the
match and proves each step again: every tensor an operator reads must come from the same tokens of the same map.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from attnrewrite.dims import Dim, Extent, Shape, elements, static
from attnrewrite.facts import Facts
from attnrewrite.frontend.evaluate import evaluate
from attnrewrite.graph import Node, UnknownShape, Value
from attnrewrite.indexing.map import Coordinate, Index, IndexingError, dependencies, reshape
from attnrewrite.indexing.provenance import Provenance, provenances
from attnrewrite.indexing.rules import Read, broadcast_index
from attnrewrite.localattention.feature_map import FeatureMap, MapWriter
from attnrewrite.localattention.geometry import PADDING
from attnrewrite.localattention.grid import count, row_major
from attnrewrite.localattention.tokens import (
    Roles,
    channel_axis_of,
    feature_pieces,
    full_range,
    per_token_inputs,
    roles,
)
from attnrewrite.localattention.twins import Twin, share
from attnrewrite.ops import REDUCTIONS

# A constant for every pixel of a map may take this much.
CONSTANT_MAP_LIMIT_BYTES = 1 << 28


# A token of a value that no read has shown the pixel of.
UNREAD = PADDING - 1


class NotHoistable(ValueError):
    """A per-token operator could not be written on the feature map; the message names it."""


# What may be raised while a value is brought onto the feature map: then the site is left.
NOT_ON_MAP = (NotHoistable, IndexingError, UnknownShape)


@dataclass(frozen=True, eq=False)
class Anchor:
    """Where the walk ends: a value seen in `shape` and read at `index`, and the feature map that stands for it.

    roles, feature_order: its token axes, and its feature axes in the order of the map's features. pixels: int64 over
    the grid, the row-major position on the map (batch included) of the token that a grid point reads, PADDING for none.
    """

    value: Value
    shape: Shape
    index: Index
    roles: Roles
    feature_order: tuple[int, ...]
    map: FeatureMap
    pixels: np.ndarray


@dataclass(frozen=True, eq=False)
class Hoisted:
    """A value written on the feature map for all its features.

    pixels: int64, for every token of the value (row-major over its token axes) the pixel of the map that it was proved
    to come from, PADDING for padded ones, UNREAD where nothing read it; batch: elements of a symbolic batch by which
    each token axis advances.
    """

    map: FeatureMap
    pixels: np.ndarray
    batch: tuple[int, ...]


class Hoister(MapWriter):
    """Writes per-token operators on the feature map.

    one_token: an axis that is read at one position only holds tokens, of which one is asked for; it holds features
    (stacked query, key and value) otherwise, and all of them are written.
    """

    def __init__(self, facts: Facts, spatial: tuple[int, ...], made_by: str, *, one_token: bool = False) -> None:
        super().__init__(facts, spatial, made_by)
        self.one_token = one_token
        self.of_padding: dict[Value, np.ndarray | None] = {}  # what a constant per pixel holds for padded tokens
        self._full: dict[tuple[Value, FeatureMap, tuple[int, ...], tuple[int, ...]], Hoisted] = {}
        self._twins: dict[Value, Twin] = {}

    def replace(self, old: Value, new: Value) -> None:
        super().replace(old, new)
        share(self.facts, self._twins, self.made_by)

    def hoist(
        self, value: Value, index: Index, channel_axis: int, features: frozenset[int], anchor: Anchor
    ) -> tuple[FeatureMap, np.ndarray]:
        """A feature map and which of its features `value[index]` reads (int64 over the grid).

        features: grid axes that number features; channel_axis: the one along which operators lay out all of theirs.
        Raises NotHoistable or IndexingError where the proof fails.
        """
        last = None
        for last in provenances(value, index, self.facts.positions):
            if last.value is anchor.value:
                seen = reshape(last.index, anchor.value.known_shape, anchor.shape)
                self._same_tokens(seen, anchor, last.domain)
                flat = _flat_features(anchor.shape, seen, anchor.feature_order)
                self._note_padding(anchor.map, last.fills)
                return anchor.map, flat
        assert last is not None
        node = last.value.producer
        if node is None:
            raise NotHoistable(f"{last.value.name} is read beside the feature map")
        split = roles(last.value, last.index, features)
        if split is None:
            raise NotHoistable(f"{node.label} has the batch or tokens in one axis with heads or channels")
        fixed: tuple[int, ...] = ()
        if self.one_token:
            apart = [a for a in split.features if not last.index[a].depends_on()]
            fixed = tuple(int(last.index[a].values.reshape(-1)[0]) for a in apart)
            split = Roles(split.tokens, tuple(a for a in split.features if a not in apart))
        flat = _flat_features(last.value.known_shape, last.index, split.features)
        key = (last.value, anchor.map, anchor.roles.tokens, fixed)
        tokens, pixels = _tokens_read(last, split, anchor)
        batch = tuple(last.index[axis].batch for axis in split.tokens)
        known = self._full.get(key)
        if known is None or not _same_places(known, tokens, pixels, batch):
            full = _all_features(last.value, last.index, split, channel_axis)
            map_ = self._operator(node, last.value, full, split, channel_axis, features, anchor)
            table = np.full(math.prod(count(last.value.known_shape[a]) for a in split.tokens), UNREAD)
            table[tokens] = pixels
            known = self._full[key] = Hoisted(map_, table, batch)
            self._twins[last.value] = Twin(map_, split, table)
        self._note_padding(known.map, last.fills)
        return known.map, flat

    def _note_padding(self, map_: FeatureMap, fills: Sequence[Any]) -> None:
        for fill in fills:
            if self.padded.setdefault(map_, fill.number) != fill.number:
                raise NotHoistable(f"{map_.value.name} is padded with two different numbers")

    def _same_tokens(self, index: Index, anchor: Anchor, domain: np.ndarray | None) -> None:
        for axis in anchor.roles.tokens:
            one, other = index[axis], anchor.index[axis]
            same = one.values == other.values
            if one.batch != other.batch or not (same if domain is None else same | ~domain).all():
                raise NotHoistable(f"{anchor.value.name} is read at two different places for one token")

    def _operator(
        self,
        node: Node,
        value: Value,
        full: Index,
        split: Roles,
        channel_axis: int,
        features: frozenset[int],
        anchor: Anchor,
    ) -> FeatureMap:
        """The node written on the feature map, for all features of its output."""
        axis = channel_axis_of(node)
        if axis is not None:
            own = Roles(split.tokens, tuple(sorted({*split.features, axis})))
            if axis != own.features[-1]:
                raise NotHoistable(f"{node.label} mixes an axis that is not the last feature axis")
            data = node.required(0)
            inside, picked = self.hoist(
                data, _all_features(data, full, own, channel_axis), channel_axis, features, anchor
            )
            operand = self.features(inside, _vector(picked, channel_axis), f"{data.name}_map")
            return self._channelwise(node, operand, value, own, axis)
        inputs = per_token_inputs(node, full, channel_axis)
        if inputs:
            computed = {id(v): self.hoist(v, i, channel_axis, features, anchor) for v, i in inputs}
            return self._pointwise(node, value, full, channel_axis, computed, anchor)
        pieces = feature_pieces(node, value, full, channel_axis)
        if pieces is None:
            raise NotHoistable(f"{node.op} does not treat every token alike ({node.label})")
        found = [self.hoist(piece.value, piece.index, channel_axis, features, anchor) for piece in pieces]
        return self._joined(value, pieces, found, full, channel_axis)

    def _joined(
        self,
        value: Value,
        pieces: Sequence[Read],
        found: Sequence[tuple[FeatureMap, np.ndarray]],
        full: Index,
        channel_axis: int,
    ) -> FeatureMap:
        """Features that come from several tensors (Concat along channels), in the order of `value`."""
        count = full_extent(full, channel_axis)
        tensors, order = [], []
        for piece, (map_, picked) in zip(pieces, found, strict=True):
            assert piece.where is not None
            own = np.flatnonzero(np.broadcast_to(_vector(piece.where, channel_axis), (count,)))
            vector = np.broadcast_to(_vector(picked, channel_axis), (count,))[own]
            tensors.append(self.laid_out(self.features(map_, vector, f"{value.name}_part"), channels_first=False))
            order.append(own)
        shape = (*tensors[0].known_shape[:-1], count)
        joined = FeatureMap(self.emit("Concat", tensors, shape, f"{value.name}_map", axis=len(shape) - 1))
        return self.features(joined, np.argsort(np.concatenate(order)), f"{value.name}_map")

    def _channelwise(self, node: Node, operand: FeatureMap, value: Value, split: Roles, axis: int) -> FeatureMap:
        tensor = self.laid_out(operand, channels_first=False)
        inner, outer = static(node.required(0).known_shape[axis]), static(value.known_shape[axis])
        groups = operand.num_features // inner
        outside = tensor.known_shape[:-1]
        stem = f"{value.name}_map"
        grouped = self.reshape(tensor, (*outside, groups, inner)) if groups > 1 else tensor
        shape = (*outside, groups, outer) if groups > 1 else (*outside, outer)
        weights = node.inputs[1:]
        match node.op:
            case "MatMul":
                result = self.emit("MatMul", [grouped, weights[0]], shape, stem)
            case "Gemm" | "Conv":
                result = self.linear(node, grouped, shape, stem)
            case op if op in REDUCTIONS:
                attributes = {k: v for k, v in node.attributes.items() if k != "axes"}
                if "axes" in node.attributes:
                    result = self.emit(op, [grouped], shape, stem, axes=[-1], **attributes)
                else:
                    result = self.emit(op, [grouped, self.ints([-1], f"{stem}_axes")], shape, stem, **attributes)
            case _:
                attributes = {**node.attributes, "axis": -1}
                result = self.emit(node.op, [grouped, *weights], shape, stem, **attributes)
        return FeatureMap(self.reshape(result, (*outside, groups * outer)) if groups > 1 else result)

    def _pointwise(
        self,
        node: Node,
        value: Value,
        full: Index,
        channel_axis: int,
        computed: dict[int, tuple[FeatureMap, np.ndarray]],
        anchor: Anchor,
    ) -> FeatureMap:
        count = full_extent(full, channel_axis)
        operands: list[Value | None] = []
        group = _common_group([_vector(p, channel_axis) for _, p in computed.values()], count)
        outside: Shape = ()
        for operand in node.inputs:
            if operand is None:
                operands.append(None)
            elif operand.is_constant:
                operands.append(self._constant_operand(operand, full, channel_axis, count, group, anchor))
            else:
                map_, picked = computed[id(operand)]
                vector = _vector(picked, channel_axis)
                repeated = group > 1 and _repeats(vector, group)
                chosen = vector[::group] if repeated else vector
                tensor = self.laid_out(self.features(map_, chosen, f"{operand.name}_map"), channels_first=False)
                outside = tensor.known_shape[:-1]
                if group > 1:
                    tensor = self.reshape(tensor, (*outside, count // group, 1 if repeated else group))
                operands.append(tensor)
        shape = (*outside, count // group, group) if group > 1 else (*outside, count)
        result = self.emit(node.op, operands, shape, f"{value.name}_map", **node.attributes)
        result.dtype = value.dtype
        return FeatureMap(self.reshape(result, (*outside, count)))

    def _constant_operand(
        self, operand: Value, full: Index, channel_axis: int, count: int, group: int, anchor: Anchor
    ) -> Value:
        """A constant per channel as a vector, one per token as a map; a scalar as it is."""
        if elements(operand.known_shape) == 1:
            return operand if operand.known_shape == () else self.constant(operand.constant.reshape(()), operand.name)
        read = broadcast_index(full, operand)
        if dependencies(read) - {channel_axis}:
            return self._constant_map(operand, read, channel_axis, count, group, anchor)
        at = tuple(c.static(f"the constant {operand.name}").reshape(-1) for c in read)
        vector = np.broadcast_to(operand.constant[at], (count,))
        if group > 1:
            return self.constant(np.ascontiguousarray(vector).reshape(count // group, group), operand.name)
        if operand.known_shape == (count,) and np.array_equal(vector, operand.constant):
            return operand
        return self.constant(np.ascontiguousarray(vector), operand.name)

    def _constant_map(
        self, operand: Value, read: Index, channel_axis: int, count: int, group: int, anchor: Anchor
    ) -> Value:
        """A constant that differs from token to token (positions inside windows) as a map [1 or B, *S, count or 1].

        Every pixel must get one number only: the same in every window that reads it.
        """
        name = operand.name
        elements = np.asarray(operand.constant[tuple(c.static(f"the constant {name}") for c in read)])
        pixels = np.moveaxis(anchor.pixels, channel_axis, -1)
        elements = np.moveaxis(elements, channel_axis, -1)
        if pixels.shape[-1] > 1:
            raise NotHoistable(f"the constant {name} meets channels of different tokens")
        batch, *spatial = _without_features(anchor.map)
        total, width = _enumerated(batch) * math.prod(map(static, spatial)), elements.shape[-1]
        if total * count * elements.itemsize > CONSTANT_MAP_LIMIT_BYTES:
            raise NotHoistable(f"the constant {name} differs from token to token, and the map is large")
        grid = np.broadcast_shapes(pixels.shape[:-1], elements.shape[:-1])
        at = np.broadcast_to(pixels[..., 0], grid).reshape(-1)
        rows = np.broadcast_to(elements, (*grid, width)).reshape(-1, width)
        inside = np.flatnonzero(at != PADDING)
        first = np.full(total, -1)
        first[at[inside]] = inside
        if (first < 0).any():
            raise NotHoistable(f"the constant {name} holds nothing for pixel {int(np.argmax(first < 0))}")
        table = rows[first]
        if (table[at[inside]] != rows[inside]).any():
            raise NotHoistable(f"one pixel needs two values of {name}: it lies at different places of several windows")
        table = table.reshape(_enumerated(batch), -1, width)
        table = table[:1] if (table == table[:1]).all() else table
        channels = (1, 1) if width == 1 and group > 1 else (width // group, group) if group > 1 else (width,)
        result = self.constant(np.ascontiguousarray(table).reshape(len(table), *map(static, spatial), *channels), name)
        outside = rows[at == PADDING]
        if len(outside):
            self.of_padding[result] = outside[0].reshape(channels) if (outside == outside[:1]).all() else None
        return result

    # -- padding ------------------------------------------------------------------------------------------------------

    def padding_vector(self, result: Value) -> np.ndarray | None:
        """What a padded token's features become in `result`: the hoisted operators run on the padding. None if never
        padded.
        """
        known: dict[Value, np.ndarray] = {}
        for map_, number in self.padded.items():
            shape = [1] * (len(self.spatial) + 2)
            shape[1 if map_.channels_first else -1] = map_.num_features
            known[map_.value] = np.full(shape, number, map_.value.dtype)
        for node in self.nodes:
            if node.output in known or not any(v in known for v in node.inputs if v is not None):
                continue
            if not all(v is None or v in known or v.is_constant for v in node.inputs):
                continue
            arrays = [
                None if v is None else self._padding_constant(v) if v.is_constant else known[v] for v in node.inputs
            ]
            if node.op == "Reshape":
                data = known[node.required(0)]
                outside = [e if k > len(self.spatial) else 1 for k, e in enumerate(node.output.known_shape)]
                known[node.output] = data.reshape([static(e) for e in outside])
            else:
                known[node.output] = evaluate(node, arrays, self.graph.opset)[0]
        return known[result].reshape(-1) if result in known else None

    def _padding_constant(self, value: Value) -> np.ndarray:
        """A constant operand as padded tokens meet it."""
        if value not in self.of_padding:
            return value.constant
        found = self.of_padding[value]
        if found is None:
            raise NotHoistable(f"padded tokens get different numbers of {value.name}")
        return found


def _tokens_read(read: Provenance, split: Roles, anchor: Anchor) -> tuple[np.ndarray, np.ndarray]:
    """int64 [T], int64 [T]: the tokens of a value that are read, and the pixels of the map they stand for."""
    flat = row_major(read.index, split.tokens, read.value.known_shape)
    flat, pixels = np.broadcast_arrays(flat, anchor.pixels)
    if read.domain is None:
        return flat.reshape(-1), pixels.reshape(-1)
    flat, pixels, inside = np.broadcast_arrays(flat, pixels, read.domain)
    return flat[inside], pixels[inside]


def _same_places(known: Hoisted, tokens: np.ndarray, pixels: np.ndarray, batch: tuple[int, ...]) -> bool:
    """Whether these tokens of a value are known to come from these pixels: what was written for it stands for them."""
    return known.batch == batch and np.array_equal(known.pixels[tokens], pixels)


def _without_features(map_: FeatureMap) -> tuple[Extent, ...]:
    """Batch and spatial extents of a feature map."""
    shape = map_.value.known_shape
    return (shape[0], *shape[2:]) if map_.channels_first else shape[:-1]


def _enumerated(extent: Extent) -> int:
    """Batch elements the grid numbers: one of a symbolic batch."""
    return extent.terms[0][1] if isinstance(extent, Dim) else extent


def full_extent(index: Index, axis: int) -> int:
    return max(c.shape[axis] for c in index)


def _vector(array: np.ndarray, channel_axis: int) -> np.ndarray:
    """An array that varies along the channel axis alone, as a vector."""
    if any(e > 1 for a, e in enumerate(array.shape) if a != channel_axis):
        raise NotHoistable("features differ from token to token")
    return array.reshape(-1)


def _flat_features(shape: Shape, index: Index, axes: Sequence[int]) -> np.ndarray:
    """Row-major position among the feature axes that each grid point reads."""
    flat: np.ndarray = np.zeros((1,) * index[0].rank, np.int64)
    for axis in axes:
        extent = shape[axis]
        if isinstance(extent, Dim):
            raise NotHoistable(f"the feature axis of extent {extent} is symbolic")
        flat = flat * extent + index[axis].static("a feature")
    return flat


def _all_features(value: Value, index: Index, split: Roles, channel_axis: int) -> Index:
    """The same tokens with all features of `value` laid out along the channel axis."""
    extents = [static(value.known_shape[a]) for a in split.features]
    rank = index[0].rank
    whole = full_range(channel_axis, math.prod(extents), rank).values
    coordinates = list(index)
    for axis, positions in zip(split.features, np.unravel_index(whole, extents) if extents else (), strict=True):
        coordinates[axis] = Coordinate(positions)
    return tuple(coordinates)


def _repeats(vector: np.ndarray, group: int) -> bool:
    """Whether each run of `group` positions reads one and the same feature."""
    rows = vector.reshape(-1, group)
    return bool((rows == rows[:, :1]).all())


def _common_group(vectors: Sequence[np.ndarray], count: int) -> int:
    """The longest run g > 1 along which one operand repeats a feature (a norm over head_dim), 1 if none does."""
    best = 1
    for vector in vectors:
        if len(vector) != count or count < 2 or (vector == vector[0]).all():
            continue
        breaks = np.flatnonzero(np.diff(vector)) + 1
        group = math.gcd(*breaks.tolist(), count) if len(breaks) else count
        if group > 1:
            best = group if best == 1 else math.gcd(best, group)
    return best
