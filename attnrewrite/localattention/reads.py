"""What a site reads, pixel by pixel, kept small: rows that many pixels share are held once.

All queries of a window read the same keys, and bias and mask have a few kinds of rows however large the map is. So a
table over all pixels and slots is rows and, for every pixel, the number of its row; two tables are compared where
their rows meet. Nothing here grows with pixels x keys x heads unless the model's own constants do.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from attnrewrite import floats

# In place of the pixel of a key that is excluded: behind all pixels.
NO_KEY = np.iinfo(np.int64).max
# Elements of the largest temporary array.
CHUNK = 1 << 20


@dataclass(frozen=True, eq=False)
class Table:
    """One row of K entries per pixel: `values[..., row_of[p], :]`.

    values: [..., T, K] (K may be 1: the same in every slot); row_of: int64 [P], each below T.
    """

    values: np.ndarray
    row_of: np.ndarray

    @property
    def slots(self) -> int:
        return int(self.values.shape[-1])

    @property
    def pixels(self) -> int:
        return len(self.row_of)

    def rows(self, pixels: np.ndarray) -> np.ndarray:
        """[..., len(pixels), K]."""
        return self.values[..., self.row_of[pixels], :]

    def __add__(self, other: Table) -> Table:
        """The sum, element by element: rows are added once for every pair that meets at a pixel."""
        count = other.values.shape[-2]
        met, row_of = np.unique(self.row_of * count + other.row_of, return_inverse=True)
        values = self.values[..., met // count, :] + other.values[..., met % count, :]
        return Table(values, row_of.reshape(-1))

    def compact(self) -> Table:
        """The same table with equal rows held once, unused ones not at all."""
        used, row_of = np.unique(self.row_of, return_inverse=True)
        values = self.values[..., used, :]
        flat = np.ascontiguousarray(np.moveaxis(values, -2, 0)).reshape(len(used), -1)
        first: dict[bytes, int] = {}
        same = np.array([first.setdefault(row.tobytes(), len(first)) for row in flat], np.int64)
        kept = np.unique(same, return_index=True)[1]
        return Table(values[..., kept, :], same[row_of.reshape(-1)])


def meetings(one: Table, other: Table) -> Iterator[np.ndarray]:
    """Pixels at which every pair of rows that meets does so, in pieces small enough to look at."""
    pairs = one.row_of * other.values.shape[-2] + other.row_of
    first = np.sort(np.unique(pairs, return_index=True)[1])
    width = max(one.values[..., 0, :].size, other.values[..., 0, :].size)
    yield from pieces(first, width)


def pieces(pixels: np.ndarray, width: int) -> Iterator[np.ndarray]:
    """The pixels in runs of which an array with `width` elements per pixel stays below CHUNK."""
    step = max(1, CHUNK // max(width, 1))
    for start in range(0, len(pixels), step):
        yield pixels[start : start + step]


@dataclass(frozen=True, eq=False)
class Reads:
    """What a site reads, per output pixel of one batch element, row-major.

    keys, values: flat pixels or PADDING [T, K]; terms: float64 [nH or 1, T, K or 1], added to the logits; vectors:
    float64 [nH or 1, d, T, K], what the query is multiplied with besides the keys. The order of the K slots is
    the site's own; it is the same in all of them and means nothing. sizes: pixels of the maps of query, key and value,
    where they are known. queries: int64 [T], the token of the shared queries that each pixel asks with; None where
    every pixel has its own.
    """

    keys: Table
    values: Table
    terms: Table
    sizes: tuple[int, ...] = ()
    vectors: Table | None = None
    queries: np.ndarray | None = None

    def difference(self, other: Reads, dtype: np.dtype) -> str | None:
        """Where the two part, in one sentence; None where they are equal (terms: to two roundings of dtype), the order
        of a pixel's slots aside.
        """
        if self.sizes != other.sizes:
            return f"maps of {self.sizes} pixels are read in the original, of {other.sizes} in the replacement"
        if self.keys.pixels != other.keys.pixels:
            return f"{self.keys.pixels} pixels are computed in the original, {other.keys.pixels} in the replacement"
        if (self.queries is None) != (other.queries is None):
            return "only one of original and replacement has one set of queries for all windows"
        if self.queries is not None and other.queries is not None and (self.queries != other.queries).any():
            pixel = int(np.argmax(self.queries != other.queries))
            found, now = self.queries[pixel], other.queries[pixel]
            return f"output pixel {pixel} asks with shared query {found} in the original, with {now} now"
        lowest, step = floats.lowest(dtype) / 2, floats.step(dtype)
        finite = np.where(np.isfinite(self.terms.values) & (self.terms.values > lowest), self.terms.values, 0.0)
        allowed = 2 * step * max(float(np.abs(finite).max(initial=0.0)), 1e-30)
        if (self.vectors is None) != (other.vectors is None):
            return "only one of original and replacement multiplies its queries with relative positions"
        near = 0.0 if self.vectors is None else 8 * step * float(np.abs(self.vectors.values).max())
        if self.keys.slots == other.keys.slots and self._equal_as_listed(other, allowed, near):
            return None
        width = max(r._width() for r in (self, other))
        for pixels in pieces(np.arange(self.keys.pixels), width * max(self.keys.slots, other.keys.slots)):
            mine, theirs = self._sorted(pixels, lowest), other._sorted(pixels, lowest)
            difference = _sorted_difference(pixels, mine, theirs, allowed)
            if difference is None and not (_off(mine[3], theirs[3]) <= near).all():
                difference = "the queries are multiplied with other relative positions than in the original"
            if difference is not None:
                return difference
        return None

    def _width(self) -> int:
        """Numbers held for one pixel and slot."""
        vectors = 0 if self.vectors is None else self.vectors.values[..., 0, 0].size
        return len(self.terms.values) + vectors

    def _equal_as_listed(self, other: Reads, allowed: float, near: float) -> bool:
        """Whether the two are equal slot by slot, in the order each lists them."""
        for one, two in ((self.keys, other.keys), (self.values, other.values)):
            if any((one.rows(pixels) != two.rows(pixels)).any() for pixels in meetings(one, two)):
                return False
        if self.vectors is not None and other.vectors is not None:
            for pixels in meetings(self.vectors, other.vectors):
                if not (_off(self.vectors.rows(pixels), other.vectors.rows(pixels)) <= near).all():
                    return False
        meet = meetings(self.terms, other.terms)
        return all((_off(self.terms.rows(p), other.terms.rows(p)) <= allowed).all() for p in meet)

    def _sorted(self, pixels: np.ndarray, lowest: float) -> Sorted:
        """Keys, values [p, K], terms [nH or 1, p, K] and vectors [nH or 1, d, p, K] (or nothing) of these pixels, slots
        in order of key, value and first term: equal sets are equal arrays.

        A key that no head attends is none: NO_KEY, at the end. Such are keys of -inf, and of a number up to `lowest`
        where the pixel has others.
        """
        keys, values, terms = self.keys.rows(pixels), self.values.rows(pixels), self.terms.rows(pixels)
        vectors = np.zeros((0, 0, *keys.shape)) if self.vectors is None else self.vectors.rows(pixels)
        terms = np.broadcast_to(terms, (len(terms), *keys.shape))
        low = (terms <= lowest).all(axis=0)
        excluded = np.isneginf(terms).all(axis=0) | (low & ~low.all(axis=-1, keepdims=True))
        if excluded.any():
            keys, values = (np.where(excluded, NO_KEY, table) for table in (keys, values))
            terms, vectors = np.where(excluded, -np.inf, terms), np.where(excluded, 0.0, vectors)
        order = np.lexsort((terms[0], values, keys), axis=-1)[:, : int((~excluded).sum(axis=-1).max(initial=0))]
        return (
            np.take_along_axis(keys, order, -1),
            np.take_along_axis(values, order, -1),
            np.take_along_axis(terms, order[None], -1),
            np.take_along_axis(vectors, order[None, None], -1),
        )


Sorted = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def _sorted_difference(pixels: np.ndarray, one: Sorted, two: Sorted, allowed: float) -> str | None:
    kept = [(part[0] != NO_KEY).sum(axis=-1) for part in (one, two)]
    if (differs := kept[0] != kept[1]).any():
        at = int(np.argmax(differs))
        return f"output pixel {pixels[at]} attends {kept[0][at]} keys in the original, {kept[1][at]} in the replacement"
    for which, name in enumerate(("key", "value")):
        if (differs := one[which] != two[which]).any():
            pixel, slot = (int(i) for i in np.argwhere(differs)[0])
            found, now = one[which][pixel, slot], two[which][pixel, slot]
            return f"output pixel {pixels[pixel]} reads {name} pixel {found} in the original, {now} now"
    off = _off(one[2], two[2])
    if not (off <= allowed).all():
        return f"the logits are offset by up to {float(np.nanmax(off)):g} from the original's"
    return None


def _off(one: np.ndarray, two: np.ndarray) -> np.ndarray:
    """The distance, 0 for equal infinities, NaN for what cannot be compared."""
    with np.errstate(invalid="ignore"):
        return np.where(one == two, 0.0, np.abs(one - two))
