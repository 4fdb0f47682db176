"""Pools of tokens that lie in windows, written on the map: a maximum or mean over tokens of one window is a strided
pool of the map.

Queries pooled inside their window (Hiera, SAM 2) and agents averaged from a window's queries (agent attention) are
computed where the windows are. Their tokens have places of their own: those of a smaller map, every pixel of which
pools one cell of pixels of the map. Here the cells are read off the maps, whatever way the pool is written; what is
emitted is the pool on the map, and one movement from there to the order that the model has.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from attnrewrite.facts import Facts
from attnrewrite.graph import STANDARD_DOMAIN, Node, Value
from attnrewrite.indexing.map import Coordinate, Index, IndexingError, identity
from attnrewrite.indexing.provenance import Provenance, provenances
from attnrewrite.localattention.blocks import feature_axis_behind
from attnrewrite.localattention.geometry import PADDING, Sizes
from attnrewrite.localattention.grid import count, flat_pixels
from attnrewrite.localattention.sources import Source, sources_of
from attnrewrite.localattention.tokens import candidates, feature_axes

# Reductions whose result over a product of axes is that over one axis after the other.
SEPARABLE = frozenset({"ReduceMax", "ReduceMin", "ReduceMean", "ReduceSum"})
WHOLE = {"GlobalMaxPool": "ReduceMax", "GlobalAveragePool": "ReduceMean"}
STRIDED = {"MaxPool": "ReduceMax", "AveragePool": "ReduceMean"}


@dataclass(frozen=True)
class Cells:
    """Cells of a map of `total` tokens: every token t of which digit (t // stride) % extent is any of `digits`, the
    rest of t the same. digits: (stride, extent), ascending and apart.
    """

    total: int
    digits: tuple[tuple[int, int], ...]

    @property
    def size(self) -> int:
        return math.prod(extent for _, extent in self.digits)

    def number(self, token: np.ndarray) -> np.ndarray:
        """The row-major position among the cells of each token's cell."""
        for stride, extent in reversed(self.digits):
            token = token // (stride * extent) * stride + token % stride
        return token

    def pooled(self, spatial: Sizes) -> Sizes:
        """Extents of the map of cells of a map of these extents; one extent where a digit spans several axes."""
        extents, stride = list(spatial), self.total
        taken = 1
        for axis, extent in enumerate(spatial):
            stride //= extent
            own = [e for s, e in self.digits if s >= stride and s * e <= stride * extent]
            extents[axis] //= math.prod(own)
            taken *= math.prod(own)
        return tuple(extents) if taken == self.size else (self.total // self.size,)


def cells_of(table: np.ndarray, total: int) -> Cells | None:
    """The cells of which each row of the table lists one, int64 [cells, tokens of a cell], every cell once; else
    None.
    """
    first = table.min(axis=1, keepdims=True)
    offsets = np.sort(table - first, axis=1)
    if total % table.shape[1] or len(table) != total // table.shape[1] or (offsets != offsets[:1]).any():
        return None
    digits = _digits(offsets[0])
    if digits is None:
        return None
    above = [stride for stride, _ in digits[1:]] + [total]
    if any(upper % (stride * extent) for (stride, extent), upper in zip(digits, above, strict=True)):
        return None
    if any((first // stride % extent != 0).any() for stride, extent in digits):
        return None
    cells = Cells(total, digits)
    return cells if np.array_equal(np.sort(cells.number(first[:, 0])), np.arange(len(table))) else None


def _digits(offsets: np.ndarray) -> tuple[tuple[int, int], ...] | None:
    """(stride, extent) of every digit of which these ascending offsets are all the numbers; None if they are not."""
    digits: list[tuple[int, int]] = []
    known = np.zeros(1, np.int64)
    while len(known) < len(offsets):
        stride = int(offsets[len(known)])
        if stride < 1:
            return None  # a token twice
        extent = 1
        while extent * len(known) < len(offsets) and offsets[extent * len(known)] == extent * stride:
            extent += 1
        known = (np.arange(extent)[:, None] * stride + known).reshape(-1)
        if extent < 2 or len(known) > len(offsets) or not np.array_equal(known, offsets[: len(known)]):
            return None
        digits.append((stride, extent))
    return tuple(digits)


@dataclass(frozen=True, eq=False)
class Reduction:
    """op over cells of `value`: what output element [i, ...] reduces is value[index], grid [*output axes, cell,
    channel].
    """

    op: str
    value: Value
    index: Index
    size: int


@dataclass(frozen=True)
class Step:
    """One node as a reduction of boxes of its input: op, the axes it reduces and the sides of a box along them.

    strides: from one box to the next, along every axis of the input (1 along those that it does not reduce). dropped:
    the output lacks the axes.
    """

    op: str
    axes: tuple[int, ...]
    sides: Sizes
    strides: tuple[int, ...]
    dropped: bool

    @property
    def size(self) -> int:
        """Elements of a box."""
        return math.prod(self.sides)

    def into(self, index: Index, cell: np.ndarray) -> Index:
        """Where in its input element `cell` of the box behind output[index] lies."""
        within = np.unravel_index(cell, self.sides)
        own, found = list(index), []
        for axis, stride in enumerate(self.strides):
            inside = within[self.axes.index(axis)] if axis in self.axes else None
            outside = None if self.dropped and inside is not None else own.pop(0)
            if inside is None:
                assert outside is not None
                found.append(outside)
            elif outside is None:
                found.append(Coordinate(inside))
            else:
                found.append(Coordinate.total([*(outside * stride).parts, inside]))
        return tuple(found)


def is_reduction(node: Node) -> bool:
    """Whether a node reduces boxes of its input that lie side by side."""
    return _step(node) is not None


def reduction(facts: Facts, node: Node) -> Reduction | None:
    """A node as a reduction of cells, together with those of the same kind before it (columns after rows); None where
    it is none, or one whose cells overlap or are padded.
    """
    step = _step(node)
    if step is None:
        return None
    at = len(node.output.known_shape)  # the grid axis of the cell
    index, value, size = identity(node.output.known_shape, at + 2), node.output, 1
    while True:
        maker = value.producer
        assert maker is not None
        size *= step.size
        within = np.arange(size).reshape([size if a == at else 1 for a in range(at + 2)]) % step.size
        spread = [Coordinate(_repeated(c.values, step.size, at), c.batch) for c in index]
        index, value = step.into(tuple(spread), within), maker.required(0)
        before = _farthest(facts, value, index)
        further = None if before is None or before.value.producer is None else _step(before.value.producer)
        if before is None or further is None or further.op != step.op:
            return Reduction(step.op, value, index, size)
        step, index, value = further, before.index, before.value


def _repeated(values: np.ndarray, times: int, axis: int) -> np.ndarray:
    return values if values.shape[axis] == 1 else np.repeat(values, times, axis)


def _farthest(facts: Facts, value: Value, index: Index) -> Provenance | None:
    """The last value that all of `value[index]` is moved from; None where some of it is padding."""
    last: Provenance | None = None
    try:
        for found in provenances(value, index, facts.positions):
            last = found
    except IndexingError:
        pass  # what was found before remains true
    return None if last is None or last.domain is not None else last


def _step(node: Node) -> Step | None:
    if node.domain != STANDARD_DOMAIN or not node.outputs or node.output.shape is None:
        return None
    data = node.required(0)
    if not data.shape:
        return None
    rank, op = len(data.shape), node.op
    axes = _reduced_axes(node) if op in SEPARABLE else None
    strides, dropped = [1] * rank, False
    if axes is not None:
        extents = [data.shape[a] for a in axes]
        dropped = not node.attributes.get("keepdims", 1)
    elif op in WHOLE:
        axes, op = list(range(2, rank)), WHOLE[op]
        extents = [data.shape[a] for a in axes]
    elif op in STRIDED and (kernel := _strided(node)) is not None:
        axes, op, extents = list(range(2, rank)), STRIDED[op], list(kernel)
        for axis, extent in zip(axes, kernel, strict=True):
            strides[axis] = extent
    else:
        return None
    if not all(isinstance(e, int) for e in extents):
        return None
    sides = tuple(count(e) for e in extents)
    return Step(op, tuple(axes), sides, tuple(strides), dropped) if math.prod(sides) > 1 else None


def _reduced_axes(node: Node) -> list[int] | None:
    data = node.required(0)
    axes = node.attributes.get("axes")
    if axes is None:
        constant = node.constant(1) if len(node.inputs) > 1 else None
        axes = None if constant is None else constant.reshape(-1).tolist()
    return None if axes is None else sorted(int(a) % len(data.known_shape) for a in axes)


def _strided(node: Node) -> tuple[int, ...] | None:
    """The kernel of a pool whose kernels lie side by side and cover the whole tensor; None for any other."""
    attributes, sizes = node.attributes, node.required(0).known_shape[2:]
    kernel = tuple(int(k) for k in attributes["kernel_shape"])
    if tuple(attributes.get("strides", [1] * len(kernel))) != kernel or any(attributes.get("pads", [])):
        return None
    if any(d != 1 for d in attributes.get("dilations", [])) or attributes.get("auto_pad", "NOTSET") == "SAME_UPPER":
        return None
    fits = all(isinstance(e, int) and e % k == 0 for e, k in zip(sizes, kernel, strict=True))
    return kernel if fits and len(node.outputs) == 1 else None


@dataclass(frozen=True, eq=False)
class Pool:
    """A pool of a map that the model computes in another order of tokens.

    source: the map. cells: what its pixels are pooled to. place: int64 over the output's token axes, the row-major
    position of each of its tokens on the pooled map, batch included. features: the output's feature axes. origin: the
    last value that the map itself can be followed to.
    """

    node: Node
    reduction: Reduction
    source: Source
    cells: Cells
    place: np.ndarray
    tokens: tuple[int, ...]
    features: tuple[int, ...]
    grid_features: frozenset[int]
    origin: Value

    @property
    def in_order(self) -> bool:
        """Whether the output is the pooled map as it is."""
        same_batch = self.node.output.known_shape[0] == self.source.batch
        return same_batch and bool((self.place.reshape(-1) == np.arange(self.place.size)).all())

    @property
    def is_whole(self) -> bool:
        """Whether every token of the output is a pixel of the pooled map; the others pool padding."""
        return bool((self.place != PADDING).all())

    @property
    def spatial(self) -> Sizes:
        """Extents of the pooled map."""
        return self.cells.pooled(self.source.spatial)


def find_pools(facts: Facts, node: Node) -> Iterator[Pool]:
    """The pools that a node may be, of the farthest map first."""
    reduced = reduction(facts, node)
    if reduced is None:
        return
    shape = node.output.known_shape
    channel = len(shape) + 1
    # the axes that hold features are told by the nearest operator that mixes them, without the rest of the way
    features = feature_axes(candidates(reduced.value, reduced.index, channel, facts.positions), frozenset({channel}))
    if len(shape) in features:
        return  # channels are reduced, not tokens
    if features == {channel}:
        features = features | {feature_axis_behind(facts, node.output)}
    tokens = tuple(a for a in range(len(shape)) if a not in features)
    way = list(candidates(reduced.value, reduced.index, channel, facts.positions))
    sources = sources_of(way, features)
    for source in sources[::-1]:
        found = _pool(node, reduced, source, tokens, features, sources[-1].value)
        if found is not None:
            yield found


def _pool(
    node: Node,
    reduced: Reduction,
    source: Source,
    tokens: tuple[int, ...],
    features: frozenset[int],
    origin: Value,
) -> Pool | None:
    shape = (*node.output.known_shape, reduced.size)
    cell = len(shape) - 1
    try:
        read = flat_pixels(source.candidate, source.roles.tokens, shape, [*tokens, cell]).reshape(-1, reduced.size)
    except IndexingError:
        return None
    total = math.prod(source.spatial)
    inside = np.flatnonzero((read != PADDING).all(axis=1))
    if not len(inside) or (read[np.setdiff1d(np.arange(len(read)), inside)] != PADDING).any():
        return None  # cells that lie partly in the padding
    element = read[inside, :1] // total
    local = read[inside] - element * total
    cells = cells_of(local[element[:, 0] == 0], total)
    if cells is None or (np.diff(np.sort(local, axis=1), axis=1) == 0).any():
        return None
    number = cells.number(local)
    place = np.full(len(read), PADDING)
    place[inside] = (number + element * (total // cells.size))[:, 0]
    known = place[inside]
    if (number != number[:, :1]).any() or not np.array_equal(
        np.sort(known), np.arange(count(source.batch) * (total // cells.size))
    ):
        return None
    extents = [count(shape[a]) for a in tokens]
    rest = tuple(a for a in range(cell) if a not in tokens)
    return Pool(node, reduced, source, cells, place.reshape(extents), tokens, rest, features, origin)
