"""Relative positions in the GPU kernel of FlashWindowAttention: what the query is multiplied with besides the key.

With one table per axis, every query has a product with each key coordinate along every axis, `sum of kw_a` numbers in
place of M, and a logit adds one of them per axis. They are computed once per tile of queries and stay in threadgroup
memory while keys pass. A thread takes one row of a table and multiplies it with all queries of that coordinate, up to
16 at a time, so a tile of queries reads the rows it needs about once.

A table of pairs of query and key is one axis whose rows serve one logit each: those are multiplied as they are read,
and so are the rows of all axes where the channels of a head are too many to be staged at once.

Letters: N query and M key tokens per window, T queries of a tile, w_a and kw_a extents of query and key window.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from attnrewrite.functions.spec import FlashWindowAttention
from attnrewrite.lowering.kernels.gpu_builder import (
    ACCUMULATOR,
    Expr,
    Flat,
    Frame,
    SharedTile,
    ceil_div,
    choose,
    every,
    fill,
    registers,
    spread,
    store,
    typed,
    when,
)

# Channels per load from threadgroup memory, and queries that a thread multiplies with one row at a time.
STEP = 4
QUERIES = 16


@dataclass(frozen=True)
class RelativeAxis:
    """The table of one axis: extent * length rows, query coordinate first.

    extent, length: of query and key window. stride, key_stride: tokens from one coordinate to the next. first_row: in
    the operand. first_column: of its products among those of a query.

    A *line* is a run of `stride` tokens with one coordinate; lines with the same coordinate are `extent` apart.
    """

    extent: int
    length: int
    stride: int
    key_stride: int
    first_row: int
    first_column: int

    def lines(self, tile: int, tokens: int) -> int:
        """The most lines that a tile of queries, which begins at a multiple of its size, touches in a window."""
        latest_start = self.stride - math.gcd(tile, self.stride)  # within a line
        return min((latest_start + tile - 1) // self.stride + 1, ceil_div(tokens, self.stride))

    def coordinates(self, tile: int, tokens: int) -> int:
        """The most coordinates that its queries have."""
        return min(self.lines(tile, tokens), self.extent)

    def places(self, tile: int, tokens: int) -> int:
        """Places for queries of one coordinate: so many lines, and so many tokens of each."""
        return ceil_div(self.lines(tile, tokens), self.extent) * min(self.stride, tile)

    def items(self, tile: int, tokens: int) -> int:
        """Rows that a tile is multiplied with, each as often as it takes for all its queries."""
        return self.coordinates(tile, tokens) * self.length * ceil_div(self.places(tile, tokens), QUERIES)

    def row(self, query: Expr, key: Expr) -> Expr:
        """The row of two tokens."""
        of_query = query // self.stride % self.extent
        return self.first_row + of_query * self.length + key // self.key_stride % self.length

    def column(self, key: Expr) -> Expr:
        """The product of a query that a key token's logit adds."""
        return self.first_column + key // self.key_stride % self.length


def relative_axes(spec: FlashWindowAttention, rows: int) -> tuple[RelativeAxis, ...]:
    """The axes of a table [1 or nH, rows, d]; one for a table of pairs."""
    window, keys = spec.geometry.window_size, spec.geometry.keys
    key_window = window if keys is None else keys.window_size
    if rows != sum(w * k for w, k in zip(window, key_window, strict=True)):
        return (RelativeAxis(spec.geometry.tokens_per_window, spec.geometry.keys_per_window, 1, 1, 0, 0),)
    axes, row, column = [], 0, 0
    for axis, (extent, length) in enumerate(zip(window, key_window, strict=True)):
        strides = math.prod(window[axis + 1 :]), math.prod(key_window[axis + 1 :])
        axes.append(RelativeAxis(extent, length, *strides, row, column))
        row, column = row + extent * length, column + length
    return tuple(axes)


class RelativeTable:
    """The operand [1 or nH, R, d] as rows of one head that are read four channels at a time."""

    def __init__(self, table: tirx.Buffer, head: Expr, staged: int) -> None:
        """staged: channels that are multiplied at a time; what the last of them have too many is zero."""
        heads, self._rows, self._channels = (int(e) for e in table.shape)
        self._lanes, self._whole = math.gcd(self._channels, STEP), self._channels % staged == 0
        self._source = Flat(table, self._lanes)
        self._first = 0 if heads == 1 else head * self._rows

    def load(self, target: tirx.Buffer, row: Expr, channel: Expr, is_row: Expr | bool = True) -> None:
        """target[:4] = channels of a row from `channel` on; zero past the last, and where there is no row."""
        for part in range(0, STEP, self._lanes):
            own = channel + part
            value = self._source.load((self._first + row) * self._channels + own)
            inside = every([is_row, True if self._whole else own < self._channels])
            index = part if self._lanes == 1 else tirx.Ramp(part, 1, self._lanes)
            store(target, [index], typed(choose(inside, value, self._source.zero), ACCUMULATOR, self._lanes))


class RelativeProducts:
    """The products [T, sum of kw_a] of a tile of queries with the tables of all axes, in threadgroup memory."""

    def __init__(self, frame: Frame, table: RelativeTable, axes: Sequence[RelativeAxis], tokens: int, tile: SharedTile):
        """tokens: N. tile: where the products are."""
        self.frame, self.table, self.axes, self.tokens, self.tile = frame, table, axes, tokens, tile
        self.sums, self.query, self.row = registers(QUERIES), registers(STEP), registers(STEP)
        # Indices in registers rather than in bound variables: the latter keep TVM's region analysis busy for seconds.
        self.first_query, self.first_line, self.first_place = (registers(1, "int32") for _ in range(3))
        self.places, self.columns = registers(QUERIES, "int32"), registers(len(axes), "int32")

    def multiply(self, queries: SharedTile, first_query: Expr, scale: float) -> None:
        """scale * (query . row), for the tile of queries from token `first_query` on."""
        store(self.first_query, [0], first_query)
        for axis in self.axes:
            self._multiply_axis(axis, queries, self.first_query[0], scale)

    def choose_key(self, key: Expr) -> None:
        """The key token whose logits are computed from now on."""
        for at, axis in enumerate(self.axes):
            store(self.columns, [at], axis.column(key))

    def of(self, query_row: Expr) -> Expr:
        """What the logit of a query of the tile and the chosen key adds."""
        total: Expr = tirx.const(0.0, ACCUMULATOR)
        for at in range(len(self.axes)):
            total = total + self.tile.load(query_row, self.columns[at])
        return total

    def _multiply_axis(self, axis: RelativeAxis, queries: SharedTile, first_query: Expr, scale: float) -> None:
        size = self.tile.shape.rows
        places = axis.places(size, self.tokens)
        blocks, count = ceil_div(places, QUERIES), min(places, QUERIES)
        with spread(self.frame, axis.items(size, self.tokens)) as index:
            key, of_query = index % axis.length, index // axis.length
            store(self.first_line, [0], first_query // axis.stride + of_query // blocks)
            first_line = self.first_line[0]
            row = T.bind(axis.first_row + first_line % axis.extent * axis.length + key)
            store(self.first_place, [0], of_query % blocks * QUERIES)
            for at in range(count):
                place = at if blocks == 1 else self.first_place[0] + at
                store(self.places, [at], self._row_of_place(axis, first_line, place, first_query))
            fill(self.sums, count, 0.0)
            with T.serial(queries.shape.columns // STEP) as step:
                self.table.load(self.row, row, step * STEP)
                for at in range(count):
                    query = queries.load(tirx.max(self.places[at], 0), step * STEP, STEP)
                    store(self.query, [tirx.Ramp(0, 1, STEP)], typed(query, ACCUMULATOR, STEP))
                    total = self.sums[at]
                    for lane in range(STEP):
                        total = total + self.query[lane] * self.row[lane]
                    store(self.sums, [at], total)
            for at in range(count):
                with when(self.places[at] >= 0):
                    product = self.sums[at] * tirx.const(scale, ACCUMULATOR)
                    self.tile.store(self.places[at], axis.first_column + key, product)

    def _row_of_place(self, axis: RelativeAxis, first_line: Expr, place: Expr | int, first_query: Expr) -> Expr:
        """The row of the tile that the query of a place is in; -1 where there is none."""
        size = self.tile.shape.rows
        per_line = min(axis.stride, size)
        line = first_line + place // per_line * axis.extent
        token = tirx.max(first_query, line * axis.stride) + place % per_line
        end = tirx.min(tirx.min((line + 1) * axis.stride, first_query + size), self.tokens)
        return tirx.Select(token < end, token - first_query, -1)
