"""The closed form of a table of pixels: which windows it lists, and where the keys of each window lie.

Guesses are cheap because each one is compared with the table element by element: a geometry is returned only where
`WindowGeometry` predicts the table exactly, up to the order of windows and of tokens that is returned with it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from attnrewrite.indexing.map import first_difference
from attnrewrite.localattention.geometry import (
    KEY_BORDERS,
    PADDING,
    KeyWindows,
    Sizes,
    WindowGeometry,
    by,
    product_of_axes,
    within,
)
from attnrewrite.localattention.views import dilated_view

# Tokens in one axis are tried as maps of three axes up to this many: there are many such maps.
THREE_AXES_LIMIT = 4096

Fitted = tuple[WindowGeometry, np.ndarray, np.ndarray]


def fit_windows(table: np.ndarray, spatial: tuple[int, ...]) -> Fitted | str:
    """(geometry, window order, token order) with table[window order][:, token order] == geometry.pixels(), or why
    not.
    """
    nearest = "the queries of a window are no rectangle of pixels"
    for geometry in _geometries(table, spatial):
        expected = geometry.pixels()
        if expected.shape != table.shape:
            continue
        if np.array_equal(table, expected):
            return geometry, np.arange(len(table)), np.arange(table.shape[1])
        window_order = _window_order(table, expected)
        if window_order is None:
            difference = first_difference(table, expected)
            assert difference is not None
            size = by(geometry.window_size)
            found, wanted = (_point(p, spatial) for p in (difference.found, difference.expected))
            nearest = (
                f"query token {difference.at} reads {found}, a {size} window shifted by "
                f"{by(geometry.shift_size)} reads {wanted}"
            )
            continue
        token_order = token_order_of(table[window_order], geometry.pixels())
        if token_order is not None:
            return geometry, window_order, token_order
    return nearest


def fit_window_sets(table: np.ndarray, spatial: tuple[int, ...]) -> tuple[WindowGeometry, np.ndarray] | None:
    """(geometry, window order): every row of table[window order] holds the pixels of that window of the geometry, in
    any order; None where there is none. Tokens in one axis may be a map of up to three.
    """
    for geometry in itertools.chain(_geometries(table, spatial), _in_three_axes(table, spatial)):
        if geometry.is_padded or (geometry.num_windows, geometry.tokens_per_window) != table.shape:
            continue
        window_order = _window_order(table, geometry.pixels())
        if window_order is not None:
            return geometry, window_order
    return None


def _in_three_axes(table: np.ndarray, spatial: tuple[int, ...]) -> Iterator[WindowGeometry]:
    """Windows of the maps of three axes whose tokens these may be."""
    if len(spatial) != 1 or spatial[0] > THREE_AXES_LIMIT:
        return
    for sizes in _ordered(spatial[0], 3):
        if min(sizes) > 1:
            yield from _geometries(table, sizes)


def _point(pixel: int, spatial: tuple[int, ...]) -> str:
    if pixel == PADDING:
        return "padding"
    return "pixel (" + ", ".join(str(int(c)) for c in np.unravel_index(pixel, spatial)) + ")"


def _geometries(table: np.ndarray, spatial: tuple[int, ...]) -> Iterator[WindowGeometry]:
    """Window geometries that the table may be, most likely first."""
    whole = table[(table != PADDING).all(axis=1)]
    for sizes in _spatial_sizes(spatial, whole if len(whole) else table):
        for window in _window_sizes(whole, sizes, table.shape[1]):
            shifts = [_shifts(whole, sizes, window, axis) for axis in range(len(sizes))]
            for shift in itertools.product(*shifts):
                plain = WindowGeometry(sizes, window, shift)
                yield plain
                if plain.is_padded and any(shift):
                    yield WindowGeometry(sizes, window, shift, shift_padded=True)


def _spatial_sizes(spatial: tuple[int, ...], rows: np.ndarray) -> Iterator[tuple[int, ...]]:
    """The axes of the map; tokens in one axis are tried as the 2-D maps of every factorisation after the 1-D one.

    After the map itself its view for dilated windows.
    """
    yield spatial
    dilated = dilated_view(spatial, rows[0])
    if dilated is not None:
        yield dilated
    if len(spatial) == 1:
        total = spatial[0]
        square = math.isqrt(total)
        divisors = [h for h in range(2, total) if total % h == 0 and total // h > 1]
        for height in sorted(divisors, key=lambda h: abs(h - square)):
            yield height, total // height


def _window_sizes(whole: np.ndarray, spatial: tuple[int, ...], tokens: int) -> Iterator[tuple[int, ...]]:
    """Distinct rows, columns ... of a window without padding; all factorisations where every window is padded."""
    if len(whole):
        for row in whole[:1]:
            coordinates = np.unravel_index(row, spatial)
            window = tuple(len(np.unique(c)) for c in coordinates)
            if math.prod(window) == tokens:
                yield window
        return
    for window in itertools.product(*[[w for w in range(1, tokens + 1) if tokens % w == 0]] * len(spatial)):
        if math.prod(window) == tokens:
            yield window


def _shifts(whole: np.ndarray, spatial: tuple[int, ...], window: tuple[int, ...], axis: int) -> list[int]:
    """Shifts an axis may have: where windows without wrap start, modulo the window."""
    if window[axis] == 1 or window[axis] >= spatial[axis]:
        return [0]
    if not len(whole):
        return list(range(window[axis]))
    coordinates = np.unravel_index(whole, spatial)[axis]
    first, last = coordinates.min(axis=1), coordinates.max(axis=1)
    starts = first[last - first == window[axis] - 1]
    found = sorted({int(s) % window[axis] for s in starts[:64]})
    return found if found else list(range(window[axis]))


def _window_order(table: np.ndarray, expected: np.ndarray) -> np.ndarray | None:
    """The order of rows in which the table's windows hold the expected pixel sets, or None."""
    found_sets, expected_sets = np.sort(table, axis=1), np.sort(expected, axis=1)
    found_rank, expected_rank = np.lexsort(found_sets.T[::-1]), np.lexsort(expected_sets.T[::-1])
    if not np.array_equal(found_sets[found_rank], expected_sets[expected_rank]):
        return None
    order = np.empty(len(table), np.int64)
    order[expected_rank] = found_rank
    return order


def token_order_of(table: np.ndarray, expected: np.ndarray) -> np.ndarray | None:
    """One order of tokens that makes every window of the table equal to the expected one, or None."""
    if table.shape != expected.shape:
        return None
    if np.array_equal(table, expected):
        return np.arange(table.shape[1])
    # Tokens are told apart by what they read in all windows: equal columns are tokens that may change places.
    weights = np.random.default_rng(0).integers(1, 2**62, len(table), np.int64)
    order = np.empty(table.shape[1], np.int64)
    with np.errstate(over="ignore"):
        found, wanted = weights @ table, weights @ expected
    order[np.argsort(wanted, kind="stable")] = np.argsort(found, kind="stable")
    return order if np.array_equal(table[:, order], expected) else None


# -- keys -------------------------------------------------------------------------------------------------------------


def fit_keys(table: np.ndarray, spatial: Sizes, geometry: WindowGeometry) -> tuple[WindowGeometry, np.ndarray] | str:
    """(geometry with its keys, token order) with table[:, order] == geometry.key_pixels(), or why there is none.

    table: int64 [nW, M], the pixels of the key map that each window reads, windows in the geometry's order. Key windows
    must correspond to the query windows: contain the query's own place, one step of the windows apart.
    """
    if math.prod(spatial) == math.prod(geometry.feature_size):
        order = token_order_of(table, geometry.pixels())
        if order is not None:
            return geometry, order
    nearest = None
    for size in _key_sizes(spatial, geometry):
        for tables in _axis_tables(table, size, geometry):
            keys = _keys_of_axes(tables, size, geometry)
            if isinstance(keys, str):
                nearest = nearest or keys
                continue
            fitted = replace(geometry, keys=keys)
            order = token_order_of(table, fitted.key_pixels())
            if order is not None:
                return fitted, order
    same_windows = table.shape == geometry.pixels().shape and math.prod(spatial) == math.prod(geometry.feature_size)
    return _key_difference(table, spatial, geometry) if nearest is None or same_windows else nearest


def _key_difference(table: np.ndarray, spatial: Sizes, geometry: WindowGeometry) -> str:
    """Why the keys are those of no window of the query's kind."""
    if math.prod(spatial) != math.prod(geometry.feature_size):
        return f"queries come from a {by(geometry.feature_size)} map, keys from other windows of a {by(spatial)} map"
    expected = geometry.pixels()
    if table.shape != expected.shape:
        count = f"{expected.shape[1]} queries attend {table.shape[1]} keys"
        return f"{count}, which are no rectangle of pixels around the query's window"
    difference = first_difference(np.sort(table, axis=1), np.sort(expected, axis=1))
    detail = "in an order that changes from window to window"
    if difference is not None:
        window, found, wanted = difference.at[0], difference.found, difference.expected
        detail = f"window {window} reads pixel {found}, its queries come from pixel {wanted}"
    return f"the keys are not those of the queries' window: {detail}"


def _key_sizes(spatial: Sizes, geometry: WindowGeometry) -> Iterator[Sizes]:
    """The key map on the axes of the queries' map; in one axis, it is the queries' map enlarged or reduced, if need be
    by another ratio along every axis.
    """
    own = geometry.feature_size
    if len(spatial) == len(own):
        yield spatial
        return
    if math.prod(spatial) == math.prod(own):
        yield own
        return
    if len(spatial) == 1:
        tried = set()
        for ratio in range(2, 17):
            for size in (tuple(e * ratio for e in own), tuple(-(-e // ratio) for e in own)):
                if math.prod(size) == spatial[0]:
                    tried.add(size)
                    yield size
        divisors = [[d for d in range(1, e + 1) if e % d == 0] for e in own]
        yield from (s for s in itertools.product(*divisors) if math.prod(s) == spatial[0] and s not in tried)


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def _axis_tables(table: np.ndarray, size: Sizes, geometry: WindowGeometry) -> Iterator[list[np.ndarray]]:
    """Tables per axis, int64 [windows, key tokens] each, whose product the table may be, up to the order of columns.

    Each token is told apart by the coordinates it has along one axis in all windows. A token that is outside the map
    everywhere (only one window along an axis) shows none: it is put where the others leave room.
    """
    grid, rank, tokens = geometry.grid, len(size), table.shape[1]
    inside = (table != PADDING).reshape(*grid, tokens)
    along = []
    for axis, coordinate in enumerate(np.unravel_index(np.where(inside, table.reshape(inside.shape), 0), size)):
        along.append(np.where(inside, coordinate, PADDING).max(axis=_others(rank, axis)))
    flat = np.zeros_like(inside, np.int64)
    for axis, coordinate in enumerate(along):
        own = coordinate.reshape(*(grid[a] if a == axis else 1 for a in range(rank)), tokens)
        flat = np.where((flat == PADDING) | (own == PADDING), PADDING, flat * size[axis] + own)
    if not inside.any() or not np.array_equal(flat.reshape(table.shape), table):
        return
    seen = inside.any(axis=tuple(range(rank)))
    distinct = [_distinct_columns(coordinate[:, seen]) for coordinate in along]
    count = int(seen.sum())
    for extents in _factorisations(tokens, rank):
        rows = [c.reshape(-1, *extents).max(axis=_others(rank, a, 1)) for a, c in enumerate(along)]
        if np.array_equal(product_of_axes(rows, size), table):
            yield rows
            continue
        for shown in _factorisations(count, rank):
            repeats = [count // e for e in shown]
            if any(e < s for e, s in zip(extents, shown, strict=True)):
                continue
            if any((counts % times).any() for (_, counts), times in zip(distinct, repeats, strict=True)):
                continue
            columns = [
                np.repeat(unique, counts // times, axis=1)
                for (unique, counts), times in zip(distinct, repeats, strict=True)
            ]
            yield [
                np.pad(c, [(0, 0), (0, e - s)], constant_values=PADDING)
                for c, e, s in zip(columns, extents, shown, strict=True)
            ]


def _others(rank: int, axis: int, first: int = 0) -> tuple[int, ...]:
    """All axes from `first` on but one, which is counted from there."""
    return tuple(first + a for a in range(rank) if a != axis)


def _distinct_columns(table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The columns, each once, by first appearance, and how often each is there."""
    columns, first, counts = np.unique(table, axis=1, return_index=True, return_counts=True)
    order = np.argsort(first)
    return columns[:, order], counts[order]


def _factorisations(number: int, parts: int) -> Iterator[Sizes]:
    """All ways to write a number as an ordered product of this many factors, the most even first."""
    found = _ordered(number, parts)
    yield from sorted(found, key=lambda f: max(f) / min(f))


def _ordered(number: int, parts: int) -> list[Sizes]:
    if parts == 1:
        return [(number,)]
    divisors = [d for d in range(1, number + 1) if number % d == 0]
    return [(d, *rest) for d in divisors for rest in _ordered(number // d, parts - 1)]


# Of one axis: stride, offset, dilation.
Placement = tuple[int, int, int]


def _keys_of_axes(tables: list[np.ndarray], size: Sizes, geometry: WindowGeometry) -> KeyWindows | str:
    """The key windows whose axes have these tables, or which axis has none and why."""
    per_axis: list[dict[str, Placement]] = []
    for axis, table in enumerate(tables):
        bare = replace(geometry, keys=KeyWindows(size, (), (), (), ()))
        extent, shift = bare.key_roll(axis)
        if shift * geometry.feature_size[axis] != geometry.shift_size[axis] * size[axis]:
            return f"windows shifted by {by(geometry.shift_size)} have keys on a map of {by(size)}"
        position = np.where(table == PADDING, PADDING, (table - shift) % extent)
        found = _placements(position, extent, geometry.window_size[axis], size[axis] == geometry.feature_size[axis])
        if isinstance(found, str):
            return found
        per_axis.append(found)
    window = tuple(t.shape[1] for t in tables)
    for border in KEY_BORDERS:
        if all(border in found for found in per_axis):
            stride, offset, dilation = zip(*(found[border] for found in per_axis), strict=True)
            return KeyWindows(size, window, stride, offset, dilation, border)
    return "the keys outside the map are something else along every axis"


def _placements(position: np.ndarray, extent: int, window: int, same_map: bool) -> dict[str, Placement] | str:
    """For every border with which it can be told, the placement that gives these positions, int64 [windows, tokens], in
    this order of tokens if one does, else in another.

    The key windows must cover the map, one step apart, and contain the place of their query window.
    """
    windows, tokens = position.shape
    fallback = "the key windows are not evenly spaced"
    found: dict[str, Placement] = {}
    wanted = _sorted_columns(position)
    strides = [window] if same_map else sorted({ceil_div(extent, windows), *_differences(position)})
    for border, stride in itertools.product(KEY_BORDERS, strides):
        if border in found or not (windows - 1) * stride < extent <= windows * stride:
            continue
        for offset, dilation in _offsets(position, stride):
            steps = np.arange(windows)[:, None] * stride + offset + np.arange(tokens) * dilation
            reads = within(steps, extent, border)
            in_order = np.array_equal(reads, position)
            if not in_order and (border in found or not np.array_equal(_sorted_columns(reads), wanted)):
                continue
            if offset >= dilation or offset + tokens * dilation < stride:
                fallback = (
                    f"the keys of a window begin {offset:+d} pixels from it and span {tokens * dilation}, "
                    f"so they leave out a part of it ({stride} pixels of the key map)"
                )
                continue
            found[border] = (stride, offset, dilation)
            if in_order:
                break
    return found or fallback


def _sorted_columns(table: np.ndarray) -> np.ndarray:
    return table[:, np.lexsort(table)]


def _differences(position: np.ndarray) -> set[int]:
    """Steps from one window to the next, where both read the map."""
    both = (position[:-1] != PADDING) & (position[1:] != PADDING)
    return {int(d) for d in np.unique((position[1:] - position[:-1])[both])}


def _offsets(position: np.ndarray, stride: int) -> Iterator[tuple[int, int]]:
    """Offsets and dilations to try: read off tokens inside the map, then all with which a window's keys can cover it.

    position: int64 [windows, tokens], columns in no special order.
    """
    windows, tokens = position.shape
    inside = position != PADDING
    place = position - np.arange(windows)[:, None] * stride
    place = np.sort(np.where(inside, place, np.iinfo(np.int64).max).min(axis=0)[inside.any(axis=0)])
    steps = sorted({1, *(int(d) for d in np.unique(np.diff(place)) if d > 0)})[:4]
    tried = set()
    for dilation in steps:
        for offset in np.unique(place - np.arange(len(place)) * dilation)[:64].tolist():
            tried.add((offset, dilation))
            yield offset, dilation
    for dilation in steps:
        for offset in range(dilation - 1, stride - tokens * dilation - 1, -1):
            if (offset, dilation) not in tried:
                yield offset, dilation
