"""The way back of a sum of neighbours: the map that it returns to, and what the rows of a pixel are for there."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from attnrewrite.dims import Dim, Extent
from attnrewrite.facts import Facts
from attnrewrite.graph import Node, Value
from attnrewrite.indexing.map import Index, IndexingError, first_difference, identity, reshape
from attnrewrite.indexing.rules import RULES
from attnrewrite.indexing.sums import summands
from attnrewrite.localattention.attention import WeightedSum
from attnrewrite.localattention.geometry import PADDING, NeighborhoodGeometry, by, product_of_axes
from attnrewrite.localattention.grid import count, flat_pixels, spread
from attnrewrite.localattention.site import Decline
from attnrewrite.localattention.sources import Source
from attnrewrite.localattention.tokens import Roles

Rows = Literal["none", "overlap", "upsampling"]
# How far behind the sum its blocks are looked for being added up, in operators.
RETURN_LIMIT = 64


@dataclass(frozen=True, eq=False)
class Result:
    """The map that the site returns: where its tokens and features lie, and which feature (head, channel) each is.

    added: int64 [places, summands], batch included: the row of the sum's output, numbered (token, row of the pixel),
    that each place adds up, or PADDING.
    """

    value: Value
    roles: Roles
    picked: np.ndarray
    added: np.ndarray


@dataclass(frozen=True, eq=False)
class Returning:
    """Reads what becomes of the sum's output; its grid axes are those of `Aggregation`."""

    facts: Facts
    anchor: Node
    sum: WeightedSum
    heads: tuple[int, ...]
    channels: tuple[int, ...]
    rows: tuple[int, ...]
    tokens: tuple[int, ...]

    @property
    def shape(self) -> tuple[Extent, ...]:
        return self.sum.output_shape

    def result(
        self, source: Source, geometry: NeighborhoodGeometry, slots: np.ndarray
    ) -> tuple[Rows, tuple[int, ...], Result] | Decline:
        """What the rows are for, the factors of upsampling, and the map, for weights of this map and slots that are
        these keys of the site.
        """
        flat = flat_pixels(source.candidate, source.roles.tokens, self.shape, self.tokens)
        count_of_rows = math.prod(count(self.shape[a]) for a in self.rows)
        nearest: Decline | None = None
        plain: list[Result] = []
        for value in self._convergences():
            result = self._read_back(value)
            if isinstance(result, str):
                nearest = self._decline(result, value.name)
                continue
            table = result.added
            token, row = table // count_of_rows, table % count_of_rows
            if token.max(initial=0) >= flat.size:
                nearest = self._decline("more blocks are folded than there are", value.name)
                continue
            where = np.where(table == PADDING, PADDING, flat.reshape(-1)[np.maximum(token, 0)])
            if not self.rows:
                if table.shape[1] == 1 and np.array_equal(where[:, 0], np.arange(flat.size)):
                    plain.append(result)
                    continue
                nearest = self._decline("the output does not return to the pixels its weights came from", value.name)
                continue
            reason = f"{count_of_rows} sums per pixel do not return as a block of pixels each"
            if table.shape[1] == 1:
                factors = self._upsampling(where[:, 0], row[:, 0], geometry.feature_size, count_of_rows, result)
                if factors is not None:
                    return "upsampling", factors, result
            if count_of_rows == geometry.keys_per_query:
                difference = _overlap_difference(where, row, slots, geometry)
                if difference is None:
                    return "overlap", (), result
                reason = difference if table.shape[1] > 1 else reason
            if table.shape[1] > 1 or nearest is None:
                nearest = self._decline(reason, value.name)
        if plain:  # the map with its spatial axes spelled out, channels first, where there is one
            axes = 1 + len(geometry.feature_size)
            return "none", (), min(plain, key=lambda r: (len(r.roles.tokens) != axes, r.roles.features != (1,)))
        return nearest or self._decline("the output is used in several ways before it returns to a map")

    def _decline(self, reason: str, node: str | None = None) -> Decline:
        return Decline(reason, node or self.anchor.label, "outlook")

    def _upsampling(
        self, where: np.ndarray, row: np.ndarray, sizes: tuple[int, ...], rows: int, result: Result
    ) -> tuple[int, ...] | None:
        """Factors per axis with output pixel (y, x) = row (y % f, x % f) of pixel (y // f, x // f), if there are."""
        shape = result.value.known_shape
        spatial = [count(shape[a]) for a in result.roles.tokens][-len(sizes) :]
        if len(spatial) != len(sizes) or any(e % s for e, s in zip(spatial, sizes, strict=True)):
            return None
        factors = tuple(e // s for e, s in zip(spatial, sizes, strict=True))
        if math.prod(factors) != rows:
            return None
        fine = np.unravel_index(np.arange(math.prod(spatial)), spatial)
        pixel: np.ndarray = np.zeros(1, np.int64)
        part: np.ndarray = np.zeros(1, np.int64)
        for position, size, factor in zip(fine, sizes, factors, strict=True):
            pixel, part = pixel * size + position // factor, part * factor + position % factor
        batch = len(where) // len(pixel)
        pixel = (np.arange(batch)[:, None] * math.prod(sizes) + pixel[None]).reshape(-1)
        same = np.array_equal(where, pixel) and np.array_equal(row, np.tile(part, batch))
        return factors if same else None

    def _convergences(self) -> list[Value]:
        """Values behind the sum at which all of its output has come together again, through movement and additions."""
        output = self.sum.output
        facts, region, open_ends = self.facts, {output}, {output}
        found, leaving = [output], set(facts.graph.outputs)
        start = facts.positions[output]
        for node in facts.graph.nodes[start + 1 : start + 1 + 8 * RETURN_LIMIT]:
            computed = [v for v in node.inputs if v is not None and not v.is_constant]
            if not any(v in region for v in computed):
                continue
            moves = node.op in RULES or node.op in ("Add", "Sum", "Col2Im")
            if not moves or any(v not in region for v in computed) or node.domain:
                break
            for value in computed:
                last = max(facts.users(value), key=lambda n: facts.positions[n.output])
                if last is node and value not in leaving:
                    open_ends.discard(value)
            region.update(node.outputs)
            open_ends.update(node.outputs)
            if len(open_ends) == 1:
                found.append(next(iter(open_ends)))
            if len(found) > RETURN_LIMIT:
                break
        return found

    def _read_back(self, value: Value) -> Result | str:
        """The value as the map that the output returns to, or why it is none."""
        features, rows, tokens = (*self.heads, *self.channels), self.rows, self.tokens
        shape = value.shape
        if shape is None:
            return "the shape of the output is unknown"
        try:
            own = identity(shape)
            reads = summands(value, own, lambda v: v is self.sum.output, self.facts.positions)
            indices = [reshape(r.index, self.sum.output.known_shape, self.shape) for r in reads]
        except IndexingError as error:
            return str(error)
        featured: frozenset[int] = frozenset()
        for index in indices:
            featured |= frozenset().union(*(index[a].depends_on() for a in features)) if features else frozenset()
        for index in indices:
            if any(index[axis].depends_on() & featured for axis in (*tokens, *rows)):
                return "tokens and channels of the output are mixed"
            strides = [count(e) if isinstance(e, Dim) else 0 for e in self.shape]
            if [c.batch for c in index] != strides:
                return "the batch of the output is not that of its values"
        axes = [a for a, e in enumerate(shape) if a not in featured and (e != 1 or a == 0)]
        if any(isinstance(shape[a], Dim) for a in axes[1:]):
            return "the batch of the output is not its first axis"
        kept = [(a, count(shape[a])) for a in axes]
        columns = []
        picked: np.ndarray | None = None
        for read, index in zip(reads, indices, strict=True):
            flat = _flat(index, [*tokens, *rows], self.shape)
            if read.where is not None:
                flat = np.where(read.where, flat, PADDING)
            columns.append(spread(flat, kept).reshape(-1))
            chosen = spread(_flat(index, features, self.shape), [(a, count(shape[a])) for a in sorted(featured)])
            if picked is not None and not np.array_equal(picked, chosen.reshape(-1)):
                return "channels are mixed where the output is added up"
            picked = chosen.reshape(-1)
        if picked is None or math.prod(len(c) for c in columns[:1]) == 0:
            return "the output is dropped"
        extent = math.prod(count(self.shape[a]) for a in features)
        if not np.array_equal(np.sort(picked), np.arange(extent)):
            return "not every channel of the output returns once"
        return Result(value, Roles(tuple(axes), tuple(sorted(featured))), picked, np.stack(columns, axis=1))


def _flat(index: Index, axes: Sequence[int], shape: Sequence[Extent]) -> np.ndarray:
    """Row-major position along these axes of a tensor of this shape."""
    flat: np.ndarray = np.zeros((1,) * index[0].values.ndim, np.int64)
    for axis in axes:
        flat = flat * count(shape[axis]) + index[axis].values
    return flat


def _overlap_difference(
    where: np.ndarray, row: np.ndarray, slots: np.ndarray, geometry: NeighborhoodGeometry
) -> str | None:
    """Where the blocks are added up elsewhere than they were read; None where row t of pixel l is added at the pixel
    that slot t of it reads.

    where, row: int64 [places, summands], batch included; rows are numbered as the site's keys are.
    """
    expected = overlaps(geometry)  # [key pixels, K]
    batch = len(where) // len(expected)
    if len(where) != batch * len(expected):
        return f"the blocks are added up on {len(where)} pixels, the values lie on a {by(geometry.key_size)} map"
    if where.shape[1] > expected.shape[1]:
        return f"{where.shape[1]} rows are added per pixel, a {by(geometry.kernel_size)} block has {expected.shape[1]}"
    offset = np.arange(batch)[:, None, None] * math.prod(geometry.feature_size)
    closed = np.where(expected == PADDING, PADDING, expected[None] + offset).reshape(len(where), -1)
    found = np.full(closed.shape, PADDING)
    rank = np.argsort(slots)  # the site's key -> the geometry's slot
    for k in range(where.shape[1]):
        inside = where[:, k] != PADDING
        at = np.flatnonzero(inside)
        column = rank[row[at, k]]
        if (found[at, column] != PADDING).any():
            return "a row of a block is added twice to one pixel"
        found[at, column] = where[at, k]
    difference = first_difference(found, closed)
    if difference is None:
        return None
    place, slot = difference.at
    return (
        f"place {slot} of the blocks is added to pixel {place} from block {difference.found}, "
        f"the values of that pixel were read by block {difference.expected} (-1: none)"
    )


def overlaps(geometry: NeighborhoodGeometry) -> np.ndarray:
    """int64 [key pixels, K]: the pixel whose slot t stands at this pixel of the key map, or PADDING."""
    tables = []
    for axis, extent in enumerate(geometry.key_size):
        positions = geometry.axis_positions(axis)
        table = np.full((extent, geometry.kernel_size[axis]), PADDING)
        for slot, column in enumerate(positions.T):
            inside = np.flatnonzero((column >= 0) & (column < extent))
            table[column[inside], slot] = inside
        tables.append(table)
    return product_of_axes(tables, geometry.feature_size)
