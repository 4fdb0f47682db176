"""Windows that a constant mask leaves of an attention in which all tokens attend all: sets of tokens that attend
themselves.

Only a mask that excludes (-inf, or a dtype's lowest number) leaves windows; -100 excludes nothing.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from attnrewrite.indexing.map import IndexingError
from attnrewrite.localattention.geometry import PADDING, WindowGeometry
from attnrewrite.localattention.maps import SiteMaps, settled
from attnrewrite.localattention.rows import Exclusion, QueryRows, exclusion, query_rows, terms_at
from attnrewrite.localattention.sources import Source
from attnrewrite.localattention.terms import Order
from attnrewrite.localattention.window_fit import fit_window_sets
from attnrewrite.localattention.windows import WindowMatch


def match_masked_windows(maps: SiteMaps) -> WindowMatch | None:
    """The windows of a dense attention under a constant mask; None where it leaves none."""
    attention = maps.attention
    if attention.query_terms or attention.computed_terms or maps.shared:
        return None
    for source in maps.keys:
        for facing in maps.all_facing(source):
            try:
                rows = query_rows(facing)
                excluded = None if rows is None else exclusion(rows)
                if rows is None or excluded is None or (excluded.lowest and excluded.empties_a_row):
                    return None
                found = _match(rows, source, excluded)
            except IndexingError:
                continue
            if found is not None:
                return found
    return None


def _match(rows: QueryRows, source: Source, excluded: Exclusion) -> WindowMatch | None:
    maps = rows.maps
    slots = excluded.kept(len(rows.order))  # the keys that every row keeps
    if (slots < 0).any() or slots.shape[1] < 2:
        return None
    keys = _local(rows, source, slots)
    if keys is None or (keys == PADDING).any():
        return None
    windows, number = np.unique(np.sort(keys, axis=1), axis=0, return_inverse=True)
    members = [np.flatnonzero(number.reshape(-1) == w) for w in range(len(windows))]
    if len(windows) < 2 or any(not np.array_equal(m, w) for m, w in zip(members, windows, strict=True)):
        return None  # all tokens attend all, or a set of them attends others
    fitted = fit_window_sets(windows, maps.query.spatial)
    if fitted is None:
        return None
    geometry, window_order = fitted
    values = [v for v in maps.values if _reads_alike(rows, v, source, excluded)]
    if not values:
        return None
    settled_maps = [settled(maps, n, s) for n, s in (("query", maps.query), ("key", source), ("value", values[0]))]
    query, key, value = (s if isinstance(s, Source) else None for s in settled_maps)
    if query is None or key is None or value is None:
        return None
    bias = _bias(rows, geometry, keys, slots[: rows.pixels])
    tokens = np.arange(geometry.tokens_per_window)
    order = Order((), (), np.zeros((1, len(windows)), np.int64), window_order, tokens, tokens)
    return WindowMatch(replace(maps, query=query), geometry, order, key, value, bias, None, None)


def _local(rows: QueryRows, source: Source, slots: np.ndarray) -> np.ndarray | None:
    """int64 [P, K]: the pixels of one batch element that these slots of its rows read; None where elements differ."""
    extent = int(np.prod(source.spatial))
    return rows.of_one_element(rows.pixels_of(source, slots), extent)


def _reads_alike(rows: QueryRows, value: Source, key: Source, excluded: Exclusion) -> bool:
    """Whether a slot that is kept reads the value of the pixel whose key it reads."""
    if value.spatial != key.spatial or value.batch != key.batch:
        return False
    slots = excluded.kept(len(rows.order))
    return np.array_equal(rows.pixels_of(value, slots), rows.pixels_of(key, slots))


def _bias(rows: QueryRows, geometry: WindowGeometry, keys: np.ndarray, slots: np.ndarray) -> np.ndarray | None:
    """float64 [1 or nW, 1 or nH, N, N]: what the terms add besides. keys, slots: int64 [P, N], the pixels that each
    pixel attends and the slots in which it does. IndexingError where it differs between batch elements.
    """
    pixels = geometry.pixels()
    listed = np.empty_like(slots)  # the slots of a pixel in the order of its window
    listed[pixels] = pixels[:, None, :]
    ranks = np.argsort(np.argsort(listed, axis=1, kind="stable"), axis=1, kind="stable")
    by_pixel = np.take_along_axis(slots, np.argsort(keys, axis=1, kind="stable"), axis=1)
    listed = np.tile(np.take_along_axis(by_pixel, ranks, axis=1), (rows.batch, 1))
    terms = terms_at(rows, listed)
    if terms is None:
        return None
    full = np.broadcast_to(terms, (len(terms), *listed.shape)).reshape(len(terms), rows.batch, rows.pixels, -1)
    if (full != full[:, :1]).any():
        raise IndexingError("the mask differs between batch elements")
    bias = np.moveaxis(full[:, 0][:, pixels], 0, 1)  # [nW, nH, N, N]
    if not bias.any():
        return None
    bias = bias[:1] if (bias == bias[:1]).all() else bias
    return np.ascontiguousarray(bias[:, :1] if (bias == bias[:, :1]).all() else bias)
