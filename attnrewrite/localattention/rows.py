"""One site's arrays over the grid, read row by row: a row is a pixel of the query map, a column a key.

The matcher's grid keeps an axis of extent 1 wherever an array does not vary, so a dense N x N mask is held once.
Reading rows keeps it that way: only what is asked for is gathered, and excluded keys are dropped before anything else
is read.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from attnrewrite import floats
from attnrewrite.indexing.map import IndexingError
from attnrewrite.localattention.geometry import PADDING
from attnrewrite.localattention.grid import count, flat_pixels
from attnrewrite.localattention.maps import SiteMaps
from attnrewrite.localattention.sources import Source

# A slot that holds no key: one that a mask excludes.
DROPPED = -2


@dataclass(frozen=True, eq=False)
class QueryRows:
    """The output's rows in the order of the pixels they are computed for: batch element by element, row-major.

    order: int64 [batch * pixels], the output's own row of each.
    """

    maps: SiteMaps
    batch: int
    pixels: int
    order: np.ndarray

    def take(self, array: np.ndarray, slots: np.ndarray | None = None) -> np.ndarray:
        """[nH or 1, rows or 1, K] of an array over the grid at these key slots (int64 [rows, K], all keys by default).

        A slot below 0 reads key 0. IndexingError where the array varies along another axis.
        """
        attention = self.maps.attention
        array = array.reshape(array.shape + (1,) * (attention.grid_rank - array.ndim))
        if slots is None:
            slots = np.arange(attention.num_keys)[None]
        nowhere = np.zeros((1, 1, 1), np.int64)
        at = [nowhere] * attention.grid_rank
        extents = [count(attention.output_shape[a]) for a in self.maps.token_axes]
        for axis, rows in zip(self.maps.token_axes, np.unravel_index(self.order, extents), strict=True):
            at[axis] = rows[None, :, None] if array.shape[axis] > 1 else nowhere
        if any(array.shape[a] > 1 for a in self.maps.heads):
            extents = [count(attention.output_shape[a]) for a in self.maps.heads]
            heads = np.unravel_index(np.arange(math.prod(extents)), extents)
            for axis, head in zip(self.maps.heads, heads, strict=True):
                at[axis] = head[:, None, None] if array.shape[axis] > 1 else nowhere
        if array.shape[attention.key_axis] > 1:
            at[attention.key_axis] = np.maximum(slots, 0)[None]
        if any(array.shape[a] > 1 and at[a] is nowhere for a in range(array.ndim)):
            raise IndexingError("the tokens read differ from channel to channel or head to head")
        return array[tuple(at)]

    def pixels_of(self, source: Source, slots: np.ndarray | None = None) -> np.ndarray:
        """int64 [rows, K]: the flat pixel of the source, batch included, that every slot of every row reads."""
        candidate = source.candidate
        shape = source.value.known_shape
        flat: np.ndarray = np.zeros((1,) * candidate.index[0].rank, np.int64)
        for axis in source.roles.tokens:
            flat = flat * count(shape[axis]) + candidate.index[axis].values
        if candidate.domain is not None:
            flat = np.where(candidate.domain, flat, PADDING)
        found = self.take(flat, slots)
        if len(found) > 1:
            raise IndexingError("the tokens read differ from channel to channel or head to head")
        columns = self.maps.attention.num_keys if slots is None else slots.shape[1]
        return np.broadcast_to(found[0], (len(self.order), columns))

    def of_one_element(self, table: np.ndarray, extent: int) -> np.ndarray | None:
        """[pixels, K] within one batch element, of a table of flat pixels of a map of `extent` pixels; None where the
        elements differ or read one another.
        """
        elements = table.reshape(self.batch, self.pixels, -1)
        local = np.where(elements < 0, elements, elements - np.arange(self.batch)[:, None, None] * extent)
        same = (local == local[:1]).all() and local.max(initial=0) < extent and local.min(initial=0) >= DROPPED
        return local[0] if same else None


def query_rows(maps: SiteMaps) -> QueryRows | None:
    """The rows of a site; None where its queries are not the pixels of the map, one each."""
    shape = maps.attention.output_shape
    flat = flat_pixels(maps.query.candidate, maps.query.roles.tokens, shape, list(maps.token_axes)).reshape(-1)
    order = np.argsort(flat, kind="stable")
    if not np.array_equal(flat[order], np.arange(len(flat))):
        return None
    pixels = math.prod(maps.query.spatial)
    return QueryRows(maps, len(flat) // pixels, pixels, order)


@dataclass(frozen=True, eq=False)
class Exclusion:
    """Keys that the constant terms exclude in every head: bool [rows or 1, keys]. lowest: some by a finite number, the
    dtype's lowest, which is the same as long as a row keeps one key.
    """

    excluded: np.ndarray
    lowest: bool

    @property
    def empties_a_row(self) -> bool:
        return bool(self.excluded.all(axis=1).any())

    def kept(self, rows: int) -> np.ndarray:
        """int64 [rows, K]: the keys each row keeps, ascending, filled up with DROPPED."""
        kept = ~np.broadcast_to(self.excluded, (rows, self.excluded.shape[1]))
        row, key = np.nonzero(kept)
        counts = kept.sum(axis=1)
        slots = np.full((rows, int(counts.max(initial=0))), DROPPED, np.int64)
        slots[row, np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)] = key
        return slots


def exclusion(rows: QueryRows) -> Exclusion | None:
    """What the terms exclude; None where they exclude nothing. A finite penalty such as -100 excludes nothing."""
    attention = rows.maps.attention
    limit = floats.lowest(attention.softmax_dtype) / 2
    found: np.ndarray | None = None
    lowest = False
    for term in attention.terms:
        low = term.values <= limit
        if not low.any():
            continue
        low = low.reshape(low.shape + (1,) * (attention.grid_rank - low.ndim))
        if rows.maps.heads:
            low = np.logical_and.reduce(low, axis=rows.maps.heads, keepdims=True)
        if not low.any():
            continue
        taken = rows.take(low)[0]
        found = taken if found is None else found | taken
        lowest = lowest or term.lowest or bool(np.isfinite(term.values[term.values <= limit]).any())
    if found is None:
        return None
    keys = attention.num_keys
    return Exclusion(np.broadcast_to(found, (len(found), keys)), lowest)


def terms_at(rows: QueryRows, slots: np.ndarray | None = None) -> np.ndarray | None:
    """Floats [nH or 1, rows or 1, K]: what the constant terms add to the logits at these slots; None without terms."""
    total: np.ndarray | None = None
    for term in rows.maps.attention.terms:
        taken = rows.take(term.values, slots)
        total = taken if total is None else np.add(total, taken, dtype=np.float64)
    return total
