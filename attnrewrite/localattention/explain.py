"""What the queries of a site read, for people: a few queries with the pixels of their keys, taken from the maps and a
constant mask.

No geometry is asked for, so this works for every attention whose maps can be read, rewritten or left.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np

from attnrewrite.facts import Facts
from attnrewrite.graph import Node
from attnrewrite.indexing.map import IndexingError
from attnrewrite.localattention.attention import read_attention
from attnrewrite.localattention.geometry import PADDING, Sizes
from attnrewrite.localattention.grid import flat_pixels
from attnrewrite.localattention.maps import SiteMaps
from attnrewrite.localattention.proof import pixel_table
from attnrewrite.localattention.reads import Table
from attnrewrite.localattention.rows import exclusion, query_rows
from attnrewrite.localattention.shared_query import read_window_maps
from attnrewrite.localattention.site import Decline, Reading, Site
from attnrewrite.localattention.sources import Source


def readings(facts: Facts, softmax: Node, site: Site) -> tuple[Reading, ...]:
    """Up to three queries of the attention around a softmax; none where its maps cannot be read, or it is global."""
    attention = read_attention(facts, softmax)
    maps = attention if isinstance(attention, Decline) else read_window_maps(facts, attention)
    if isinstance(maps, Decline) or site.kind == "global":
        return ()
    total = math.prod(maps.query.spatial)
    for key in sorted(maps.keys, key=lambda k: math.prod(k.spatial) != total):  # the query's own map tells most
        try:
            found = tuple(_readings(maps.facing(key), key, site.feature_size))
        except IndexingError:
            continue
        return tuple(r for r in found if r.reads)
    return ()


def _readings(maps: SiteMaps, key: Source, feature_size: Sizes | None) -> Iterator[Reading]:
    shape, axes = maps.attention.output_shape, list(maps.token_axes)
    pixels = flat_pixels(maps.query.candidate, maps.query.roles.tokens, shape, axes).reshape(-1)
    total = math.prod(maps.query.spatial)
    own = np.flatnonzero((pixels != PADDING) & (pixels < total))  # rows of the first batch element
    order = own[np.argsort(pixels[own], kind="stable")]
    pixels = pixels[order]
    query_size = _size_of(maps.query, [feature_size or (), *(q.spatial for q in maps.queries)])
    key_size = _size_of(key, [query_size])
    keys = pixel_table(maps, key, order)
    rows = query_rows(maps)
    masked = None if rows is None else exclusion(rows)
    excluded = None if masked is None else masked.excluded

    def reading(row: int, note: str, table: Table = keys, source: Source = key) -> Reading:
        size = key_size if source is key else _size_of(source, [key_size])
        what: Literal["keys", "values"] = "keys" if table is keys else "values"
        return _reading(table, excluded, pixels, row, query_size, size, what, note)

    centre = int(np.ravel_multi_index(tuple(e // 2 for e in query_size), query_size))
    middle = int(np.searchsorted(pixels, centre).clip(max=len(pixels) - 1))
    shown = [reading(middle, "a query in the middle")]
    yield shown[0]
    last = reading(len(pixels) - 1, "the last query")
    if last.reads != shown[0].reads and _extents(last) != _extents(shown[0]):
        yield last
    values = _values_of(maps, key, keys, order)
    if values is not None:
        source, table, first = values
        yield reading(first, "the first query whose values come from elsewhere", table, source)
    elif (unlike := _unlike(keys, pixels)) is not None:
        yield reading(unlike, "the first query whose window reads other pixels than its own")


def _size_of(source: Source, views: Sequence[Sizes]) -> Sizes:
    """Extents of the source's map; one of the views of a map of as many pixels where its tokens lie in one axis."""
    total = math.prod(source.spatial)
    if len(source.spatial) in (2, 3):
        return source.spatial
    return next((tuple(v) for v in views if len(v) > 1 and math.prod(v) == total), source.spatial)


def _values_of(maps: SiteMaps, key: Source, keys: Table, order: np.ndarray) -> tuple[Source, Table, int] | None:
    """The values' source and table and the first row at which they are not read where the keys are; None where they
    are.
    """
    nearest: tuple[Source, Table, int] | None = None
    for value in maps.values:
        if math.prod(value.spatial) != math.prod(key.spatial):
            continue
        try:
            table = pixel_table(maps, value, order)
        except IndexingError:
            continue
        pairs = keys.row_of * len(table.values) + table.row_of
        met = np.unique(pairs, return_index=True)[1]
        differs = [int(p) for p in np.sort(met) if not np.array_equal(keys.rows(p), table.rows(p))]
        if not differs:
            return None
        nearest = nearest or (value, table, differs[0])
    return nearest


def _unlike(keys: Table, pixels: np.ndarray) -> int | None:
    """The first row whose queries are as many as its keys but not the same pixels, where other rows' are the same."""
    first: int | None = None
    alike = False
    by_row = np.argsort(keys.row_of, kind="stable")
    groups = np.split(by_row, np.flatnonzero(np.diff(keys.row_of[by_row])) + 1)
    for group in groups:
        reads = np.unique(keys.values[keys.row_of[group[0]]])
        reads = reads[reads != PADDING]
        if len(reads) != len(group):
            continue
        if np.array_equal(np.sort(pixels[group]), reads):
            alike = True
        elif first is None or group[0] < first:
            first = int(group[0])
    return first if alike else None


def _extents(reading: Reading) -> tuple[tuple[int, ...], int]:
    """Distance from the first to the last pixel read along each axis, and how much padding is read."""
    return tuple(max(axis) - min(axis) for axis in zip(*reading.reads, strict=True)), reading.padding


def _reading(
    table: Table,
    excluded: np.ndarray | None,
    pixels: np.ndarray,
    row: int,
    query_size: Sizes,
    size: Sizes,
    what: Literal["keys", "values"],
    note: str,
) -> Reading:
    """excluded: bool [rows or 1, keys], what a constant mask keeps from being read."""
    slots = table.values[table.row_of[row]]
    alike = (table.values[table.row_of] == slots).all(axis=1) if len(table.values) > 1 else np.ones(len(pixels), bool)
    if excluded is not None:
        own = excluded[row % len(excluded)]
        slots = np.broadcast_to(slots, own.shape)[~own]
        alike &= (excluded[: len(pixels)] == own).all(axis=1)
    read = np.unique(slots[(slots != PADDING) & (slots < math.prod(size))])
    return Reading(
        what,
        _positions(pixels[row : row + 1], query_size)[0],
        query_size,
        _positions(np.unique(pixels[alike]), query_size),
        _positions(read, size),
        size,
        int((slots == PADDING).sum()),
        note,
    )


def _positions(pixels: np.ndarray, size: Sizes) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(int(c) for c in point) for point in zip(*np.unravel_index(pixels, size), strict=True))
