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
        for order in _key_orders(table, size, geometry):
            ordered = table[:, order]
            for tables in _axis_tables(ordered, size, geometry):
                keys = _keys_of_axes(tables, size, geometry)
                if isinstance(keys, str):
                    nearest = nearest or keys
                    continue
                fitted = replace(geometry, keys=keys)
                if np.array_equal(ordered, fitted.key_pixels()):
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
    """The key map on the axes of the queries' map; in one axis, it is the queries' map enlarged or reduced."""
    own = geometry.feature_size
    if len(spatial) == len(own):
        yield spatial
        return
    if math.prod(spatial) == math.prod(own):
        yield own
        return
    if len(spatial) == 1:
        for ratio in range(2, 17):
            for size in (tuple(e * ratio for e in own), tuple(-(-e // ratio) for e in own)):
                if math.prod(size) == spatial[0]:
                    yield size


def _key_orders(table: np.ndarray, size: Sizes, geometry: WindowGeometry) -> Iterator[np.ndarray]:
    """Orders of the key tokens to try: as they are, and row-major by the place each has in its window."""
    yield np.arange(table.shape[1])
    grid = np.indices(geometry.grid).reshape(len(size), -1, 1)
    inside = table != PADDING
    if not inside.any(axis=0).all():
        return
    places = []
    for axis, coordinate in enumerate(np.unravel_index(np.where(inside, table, 0), size)):
        stride = ceil_div(size[axis], geometry.grid[axis])
        place = np.where(inside, coordinate - grid[axis] * stride, np.iinfo(np.int64).max)
        places.append(place.min(axis=0))
    order = np.lexsort(places[::-1])
    if not np.array_equal(order, np.arange(len(order))):
        yield order


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def _axis_tables(table: np.ndarray, size: Sizes, geometry: WindowGeometry) -> Iterator[list[np.ndarray]]:
    """Tables per axis, int64 [windows, key tokens] each, whose product the table is; tokens row-major."""
    grid, rank = geometry.grid, len(size)
    inside = table != PADDING
    coordinates = np.unravel_index(np.where(inside, table, 0), size)
    for extents in _factorisations(table.shape[1], rank):
        tables = []
        for axis, coordinate in enumerate(coordinates):
            marked = np.where(inside, coordinate, PADDING).reshape(*grid, *extents)
            others = tuple(a for a in range(2 * rank) if a not in (axis, rank + axis))
            tables.append(marked.max(axis=others))
        if np.array_equal(product_of_axes(tables, size), table):
            yield tables


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
    """For every border with which it can be told, the placement that gives these positions, int64 [windows, tokens].

    The key windows must cover the map, one step apart, and contain the place of their query window.
    """
    windows, tokens = position.shape
    fallback = "the key windows are not evenly spaced"
    found: dict[str, Placement] = {}
    strides = [window] if same_map else sorted({ceil_div(extent, windows), *_differences(position)})
    for border, stride in itertools.product(KEY_BORDERS, strides):
        if border in found or not (windows - 1) * stride < extent <= windows * stride:
            continue
        for offset, dilation in _offsets(position, stride, tokens):
            steps = np.arange(windows)[:, None] * stride + offset + np.arange(tokens) * dilation
            if not np.array_equal(within(steps, extent, border), position):
                continue
            if offset >= dilation or offset + tokens * dilation < stride:
                fallback = (
                    f"the keys of a window begin {offset:+d} pixels from it and span {tokens * dilation}, "
                    f"so they leave out a part of it ({stride} pixels of the key map)"
                )
                continue
            found[border] = (stride, offset, dilation)
            break
    return found or fallback


def _differences(position: np.ndarray) -> set[int]:
    """Steps from one window to the next, where both read the map."""
    both = (position[:-1] != PADDING) & (position[1:] != PADDING)
    return {int(d) for d in np.unique((position[1:] - position[:-1])[both])}


def _offsets(position: np.ndarray, stride: int, tokens: int) -> Iterator[tuple[int, int]]:
    """Offsets and dilations to try: read off two tokens inside the map, then all small ones."""
    windows, slots = np.nonzero(position != PADDING)
    tried = set()
    if len(windows) > 1:
        steps = {1, *(int(d) for d in np.unique(np.diff(position, axis=1)) if d > 0)}
        for dilation in sorted(steps)[:4]:
            starts = position[windows, slots] - windows * stride - slots * dilation
            for offset in np.unique(starts)[:64].tolist():
                tried.add((offset, dilation))
                yield offset, dilation
    for offset in range(0, -tokens, -1):
        if (offset, 1) not in tried:
            yield offset, 1
