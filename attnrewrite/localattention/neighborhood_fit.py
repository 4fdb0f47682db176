"""Which neighbourhood is this table of pixels? Hypotheses from a few rows, then every element compared.

Rows are query pixels, columns the keys a query reads, in any order. From one query in the middle come the kernel's size
and dilation, from the lines through it the stride, the offset and what happens at the borders; the closed form of each
hypothesis is compared with the whole table.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from attnrewrite.indexing.map import first_difference
from attnrewrite.localattention.geometry import MOVED_BORDERS, PADDING, NeighborhoodGeometry, Sizes, by

NO_RECTANGLE = "the keys are no rectangle of pixels around the query"


@dataclass(frozen=True, eq=False)
class Fit:
    """geometry: its pixels are the table's. columns: the table's column in every slot, PADDING where a slot has none;
    int64 [K], or [P, K] where rows differ in the order of their columns.
    """

    geometry: NeighborhoodGeometry
    columns: np.ndarray

    @property
    def ordered(self) -> bool:
        """Whether all rows have one order of columns."""
        return self.columns.ndim == 1


def fit_neighborhood(table: np.ndarray, queries: Sizes, keys: Sizes, *, excluding: bool = False) -> Fit | str:
    """The neighbourhood of a table, or why it is none.

    table: int64 [P, K], flat pixels of the key map, PADDING where a column reads none. queries, keys: extents of the
    two maps; tokens along one axis are tried as 2-D and 3-D maps as well. excluding: PADDING is no key at all, so rows
    may have fewer columns than slots.
    """
    nearest = NO_RECTANGLE
    for query_size, key_size in _sizes(queries, keys):
        middle = _middle(table, query_size)
        if middle is None:
            continue
        if not _is_rectangle(table[middle], key_size, table.shape[1], excluding):
            if len(query_size) == len(queries):
                nearest = f"{NO_RECTANGLE}: {_seen(table[middle], middle, query_size, key_size)}"
            continue
        for geometry in _hypotheses(table, middle, query_size, key_size, excluding):
            slots = geometry.keys_per_query
            if (slots != table.shape[1] and not excluding) or slots < table.shape[1]:
                continue
            if _fits_some_rows(table, geometry, middle):
                columns = _columns(table, geometry.pixels(), middle, excluding)
                if columns is not None:
                    return Fit(geometry, columns)
            if nearest.startswith(NO_RECTANGLE):
                nearest = _difference(table, geometry.pixels(), middle, geometry)
    return nearest


def _fits_some_rows(table: np.ndarray, geometry: NeighborhoodGeometry, middle: int) -> bool:
    """Whether the first, the middle and the last query read the pixels of the hypothesis, in any order: most fail."""
    rows = np.array([0, middle, len(table) - 1])
    expected = geometry.pixels_of(rows)
    missing = expected.shape[1] - table.shape[1]
    found = np.pad(table[rows], ((0, 0), (0, missing)), constant_values=PADDING)
    return np.array_equal(np.sort(found, axis=1), np.sort(expected, axis=1))


def _sizes(queries: Sizes, keys: Sizes) -> Iterator[tuple[Sizes, Sizes]]:
    """The maps' axes; tokens in one axis as every 2-D, then every 3-D map, squares first."""
    if len(queries) == len(keys):
        yield queries, keys
    if queries != keys or len(queries) > 1:
        return
    total = queries[0]
    divisors = [h for h in range(2, total) if total % h == 0]
    square = math.isqrt(total)
    for height in sorted(divisors, key=lambda h: abs(h - square)):
        yield (height, total // height), (height, total // height)
    for planes in divisors:
        for height in divisors:
            width = total // planes // height
            if total % (planes * height) == 0 and width > 1:
                yield (planes, height, width), (planes, height, width)


def _seen(row: np.ndarray, query: int, queries: Sizes, keys: Sizes) -> str:
    """The pixels that one query reads, the first nine of them."""
    points = [tuple(int(c) for c in np.unravel_index(p, keys)) for p in np.sort(row[row >= 0])[:9]]
    more = " ..." if (row >= 0).sum() > 9 else ""
    return f"query pixel {tuple(int(c) for c in np.unravel_index(query, queries))} reads {str(points)[1:-1]}{more}"


def _middle(table: np.ndarray, sizes: Sizes) -> int | None:
    """Of the rows with the most keys, the one nearest to the middle of the map; None where no row has a key."""
    counts = (table >= 0).sum(axis=1)
    most = int(counts.max(initial=0))
    rows = np.flatnonzero(counts == most)
    if not most:
        return None
    away = sum(np.abs(c - e // 2) for c, e in zip(np.unravel_index(rows, sizes), sizes, strict=True))
    return int(rows[np.argmin(away)])


def _is_rectangle(row: np.ndarray, sizes: Sizes, columns: int, excluding: bool) -> bool:
    """Whether the keys of one row are a product of evenly spaced positions. A row that leaves the map on every side
    says nothing.
    """
    read = row[row >= 0]
    if len(read) < columns and not excluding:
        return True
    axes = [np.unique(c) for c in np.unravel_index(read, sizes)]
    even = all(len(np.unique(np.diff(a))) <= 1 for a in axes)
    return even and math.prod(map(len, axes)) == len(np.unique(read))


@dataclass(frozen=True)
class _Axis:
    """A hypothesis about one axis."""

    kernel: int
    dilation: int
    offset: int
    stride: int
    border: str


def _hypotheses(
    table: np.ndarray, middle: int, queries: Sizes, keys: Sizes, excluding: bool
) -> Iterator[NeighborhoodGeometry]:
    padded = "exclude" if excluding else "zero"
    rank = len(queries)
    positions = [c.reshape(-1) for c in np.unravel_index(np.arange(len(table)), queries)]
    inside = table >= 0
    reads = np.unravel_index(np.where(inside, table, 0), keys)
    per_axis = []
    for axis in range(rank):
        line = np.ones(len(table), bool)  # the rows that differ from the middle one along this axis alone
        for other in range(rank):
            line &= (other == axis) | (positions[other] == positions[other][middle])
        found = list(_axis_hypotheses(reads[axis], inside, positions[axis], middle, queries[axis], keys[axis], padded))
        passing = [
            a for a in found if rank == 1 or _explains(a, reads[axis][line], inside[line], queries[axis], keys[axis])
        ]
        per_axis.append(passing or found[:1])
    combined = sorted(itertools.product(*per_axis), key=lambda axes: len({a.border for a in axes}))
    for axes in combined:
        borders = [a.border for a in axes]
        try:
            yield NeighborhoodGeometry(
                queries,
                tuple(a.kernel for a in axes),
                tuple(a.dilation for a in axes),
                borders[0] if len(set(borders)) == 1 else ",".join(borders),
                tuple(a.stride for a in axes),
                keys,
                tuple(a.offset for a in axes),
            )
        except ValueError:
            continue


def _axis_hypotheses(
    reads: np.ndarray, inside: np.ndarray, positions: np.ndarray, middle: int, queries: int, keys: int, padded: str
) -> Iterator[_Axis]:
    """First those whose slots read no pixel outside, then those that read another one."""
    row = np.unique(reads[middle][inside[middle]])
    for stride in _strides(reads, inside, positions, queries, keys):
        relative = np.unique((reads - positions[:, None] * stride)[inside])
        steps = np.unique(np.diff(relative))
        if len(steps) <= 1:
            yield _Axis(len(relative), int(steps[0]) if len(steps) else 1, int(relative[0]), stride, padded)
        steps = np.unique(np.diff(row))
        if len(steps) > 1:
            continue
        kernel, dilation = len(row), int(steps[0]) if len(steps) else 1
        offset = int(row[0]) - int(positions[middle]) * stride
        for border in MOVED_BORDERS:
            for start in dict.fromkeys((-dilation * (kernel // 2), offset) if border == "inward" else (offset,)):
                yield _Axis(kernel, dilation, start, stride, border)


def _strides(reads: np.ndarray, inside: np.ndarray, positions: np.ndarray, queries: int, keys: int) -> list[int]:
    """How far the neighbourhoods of adjacent queries may lie apart."""
    if queries == 1:
        return [1]
    if queries == keys:
        return [1]
    first = np.array([reads[row][inside[row]].min() for row in np.flatnonzero(inside.any(axis=1))])
    seen = np.diff(first[np.argsort(positions[inside.any(axis=1)], kind="stable")])
    likely = [keys // queries, -(-keys // queries), *(int(s) for s in np.unique(seen))]
    return [s for s in dict.fromkeys(likely) if 0 < s <= keys]


def _explains(axis: _Axis, reads: np.ndarray, inside: np.ndarray, queries: int, keys: int) -> bool:
    """Whether the sets of positions along one line are those of the hypothesis."""
    try:
        table = NeighborhoodGeometry(
            (queries,), (axis.kernel,), (axis.dilation,), axis.border, (axis.stride,), (keys,), (axis.offset,)
        ).axis_table(0)
    except ValueError:
        return False
    if len(table) != len(reads):
        return False
    return all(
        np.array_equal(np.unique(row[row != PADDING]), np.unique(read[valid]))
        for row, read, valid in zip(table, reads, inside, strict=True)
    )


def _columns(table: np.ndarray, expected: np.ndarray, middle: int, excluding: bool) -> np.ndarray | None:
    """The table's column in every slot, in one order for all rows where there is one; None where a row differs."""
    if table.shape == expected.shape:
        order = _order_in_row(table[middle], expected[middle])
        if order is not None and np.array_equal(table[:, order], expected):
            return order
    missing = expected.shape[1] - table.shape[1]
    filled = np.pad(table, ((0, 0), (0, missing)), constant_values=PADDING)
    by_found, by_expected = np.argsort(filled, axis=1, kind="stable"), np.argsort(expected, axis=1, kind="stable")
    if not np.array_equal(np.take_along_axis(filled, by_found, 1), np.take_along_axis(expected, by_expected, 1)):
        return None
    columns = np.empty_like(expected)
    np.put_along_axis(columns, by_expected, by_found, 1)
    return np.where(expected == PADDING, PADDING, columns) if excluding else columns


def _order_in_row(found: np.ndarray, expected: np.ndarray) -> np.ndarray | None:
    order = np.empty(len(expected), np.int64)
    order[np.argsort(expected, kind="stable")] = np.argsort(found, kind="stable")
    return order if np.array_equal(found[order], expected) else None


def _difference(table: np.ndarray, expected: np.ndarray, middle: int, geometry: NeighborhoodGeometry) -> str:
    kernel = by(geometry.kernel_size)
    if table.shape != expected.shape:
        return f"queries keep up to {table.shape[1]} keys, a {kernel} neighbourhood has {expected.shape[1]}"
    order = np.empty(table.shape[1], np.int64)
    order[np.argsort(expected[middle], kind="stable")] = np.argsort(table[middle], kind="stable")
    difference = first_difference(table[:, order], expected)
    if difference is None:
        return NO_RECTANGLE
    at, found, wanted = difference.at, difference.found, difference.expected
    return (
        f"slot {at[1]} of query pixel {at[0]} reads pixel {found}, a {kernel} neighbourhood reads {wanted} "
        "(-1: outside)"
    )
