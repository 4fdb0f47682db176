"""Indexing maps: for every point of a grid, the element of a tensor that it reads.

A map goes output -> input. The grid's axes are chosen by whoever asks (the axes of an attention output, the summed
keys, the channels); a coordinate is an integer array over the grid with extent 1 along every axis it does not depend
on. So a map over millions of points costs no more than the axes it really mixes, and independence of an axis is proved
by the shape of the array, never assumed.

A symbolic batch is not enumerated: a coordinate is `batch * b + values` with b the index along the symbol.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from attnrewrite.dims import Dim, Extent, NonAffine, Shape


class IndexingError(ValueError):
    """The map cannot be expressed; the message says why, in terms of the model."""


class Coordinate:
    """One coordinate of a map: `batch * b + values`, values int64, one axis per grid axis, extent 1 where
    independent.

    The values may be a sum of parts that vary along different grid axes: a coordinate that runs over rows, columns and
    channels in one axis is three vectors, and is added up only where somebody looks at every element.
    """

    __slots__ = ("_values", "batch", "parts")

    def __init__(self, values: np.ndarray, batch: int = 0) -> None:
        self.parts: tuple[np.ndarray, ...] = (values,)
        self.batch = batch
        self._values: np.ndarray | None = values

    @classmethod
    def total(cls, parts: Sequence[np.ndarray], batch: int = 0) -> Coordinate:
        """The sum of arrays; those that vary along a common grid axis are added up."""
        coordinate = cls(parts[0], batch)
        coordinate.parts = _disjoint(parts)
        coordinate._values = coordinate.parts[0] if len(coordinate.parts) == 1 else None
        return coordinate

    @property
    def values(self) -> np.ndarray:
        if self._values is None:
            self._values = _sum(self.parts)
        return self._values

    @property
    def rank(self) -> int:
        """How many axes the grid has."""
        return self.parts[0].ndim

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of `values`."""
        return tuple(max(p.shape[a] for p in self.parts) for a in range(self.rank))

    def depends_on(self) -> frozenset[int]:
        """Grid axes the coordinate varies with."""
        return frozenset(a for a, extent in enumerate(self.shape) if extent > 1)

    def __add__(self, offset: int | np.ndarray) -> Coordinate:
        if isinstance(offset, int):
            return Coordinate.total([self.parts[0] + offset, *self.parts[1:]], self.batch)
        return Coordinate(self.values + offset, self.batch)

    def __mul__(self, factor: int) -> Coordinate:
        return Coordinate.total([p * factor for p in self.parts], self.batch * factor)

    def static(self, what: str) -> np.ndarray:
        """The values of a coordinate without a symbolic part; IndexingError names `what` otherwise."""
        if self.batch:
            raise IndexingError(f"{what} depends on the symbolic batch")
        return self.values

    def equals(self, other: Coordinate) -> bool:
        if self.batch != other.batch or self.rank != other.rank:
            return False
        if len(self.parts) == len(other.parts) and all(a is b for a, b in zip(self.parts, other.parts, strict=True)):
            return True
        one, another = self.values, other.values
        if any(a != b and 1 not in (a, b) for a, b in zip(one.shape, another.shape, strict=True)):
            return False
        return bool((one == another).all())


def _sum(parts: Sequence[np.ndarray]) -> np.ndarray:
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def _disjoint(parts: Sequence[np.ndarray]) -> tuple[np.ndarray, ...]:
    """The same sum in parts that vary along no common axis, each reduced; what is constant goes into one of them."""
    result: list[np.ndarray] = []
    for part in map(reduced, parts):
        common = [r for r in result if part.size == 1 or r.size == 1 or _overlap(part, r)]
        if part.size == 1 or not common:
            common = common[:1]
        result = [r for r in result if not any(r is c for c in common)]
        result.append(reduced(_sum([part, *common])) if common else part)
    return tuple(result)


def _overlap(a: np.ndarray, b: np.ndarray) -> bool:
    return any(x > 1 and y > 1 for x, y in zip(a.shape, b.shape, strict=True))


Index = tuple[Coordinate, ...]


def reduced(values: np.ndarray) -> np.ndarray:
    """The same array with extent 1 along every axis it is constant along."""
    for axis, extent in enumerate(values.shape):
        if extent > 1:
            first = values.take([0], axis)
            if bool((values == first).all()):
                values = first
    return values


def reduced_where(values: np.ndarray, where: np.ndarray) -> np.ndarray:
    """Values that are equal to these wherever `where` holds, with extent 1 along every axis that they need not vary
    along for that. Both have the same rank; values: int64. Elsewhere they are among the values or 0.
    """
    alone = tuple(a for a, extent in enumerate(values.shape) if extent == 1)
    where = np.asarray(where.any(axis=alone, keepdims=True))
    limits = np.iinfo(np.int64)
    for axis, extent in enumerate(values.shape):
        if extent > 1:
            lowest = np.where(where, values, limits.max).min(axis=axis, keepdims=True)
            highest = np.where(where, values, limits.min).max(axis=axis, keepdims=True)
            if bool((lowest >= highest).all()):
                values = np.where(lowest == limits.max, 0, lowest)
                where = np.asarray(where.any(axis=axis, keepdims=True))
    return values


def constant(value: int, grid_rank: int) -> Coordinate:
    return Coordinate(np.full((1,) * grid_rank, value, np.int64))


def along(axis: int, extent: Extent, grid_rank: int, at: int | None = None) -> Coordinate:
    """The coordinate that runs over an axis of this extent along one grid axis.

    A symbolic extent must be a multiple c of one symbol: the grid enumerates the c positions within one batch element.
    """
    batch = 0
    if isinstance(extent, Dim):
        if len(extent.terms) != 1 or extent.constant:
            raise IndexingError(f"an axis of extent {extent} is not a multiple of one symbol")
        batch = extent = extent.terms[0][1]
    shape = [1] * grid_rank
    shape[axis if at is None else at] = extent
    return Coordinate(np.arange(extent, dtype=np.int64).reshape(shape), batch)


def identity(shape: Shape, grid_rank: int | None = None) -> Index:
    """The map of a tensor onto itself; grid axis i runs over tensor axis i."""
    rank = len(shape) if grid_rank is None else grid_rank
    return tuple(along(axis, extent, rank) for axis, extent in enumerate(shape))


def reshape(index: Index, out_shape: Shape, in_shape: Shape) -> Index:
    """Row-major reshape, out -> in: linear position of the output element, split by the input extents.

    Axes are grouped where the products of extents agree, so that only coordinates of one group mix.
    """
    result: list[Coordinate] = []
    for outs, ins in axis_groups(out_shape, in_shape):
        coordinates = index[outs.start : outs.stop]
        extents = out_shape[outs.start : outs.stop]
        result.extend(_regroup(coordinates, extents, in_shape[ins.start : ins.stop], index))
    return tuple(result)


def refined(shape: Shape, other: Shape) -> list[tuple[Extent, ...]]:
    """The axes of a shape, each split where an axis of the other begins that a row-major reshape makes of it.

    (18, 16, 8), (16, 18, 8): 18 stays, 16 stays; (36, 8), (12, 24): 36 becomes 12, 3.
    """
    begins = _trailing(other)
    split: list[tuple[Extent, ...]] = []
    for extent, inner in zip(shape, _trailing(shape)[1:], strict=True):
        parts: list[Extent] = []
        for begin in reversed(begins):  # from the innermost
            inside = _quotient(begin, inner)
            outside = None if inside is None else _quotient(extent, inside)
            if inside in (None, 1) or outside in (None, 1):
                continue
            assert inside is not None and outside is not None
            parts.insert(0, inside)
            inner, extent = begin, outside
        split.append((extent, *parts))
    return split


def _trailing(shape: Shape) -> list[Extent]:
    """Products of the last axes: of all, of all but the first, ..., 1. One whose factors are two symbols is left 0."""
    products: list[Extent] = [1]
    for extent in reversed(shape):
        try:
            products.append(products[-1] * extent)
        except NonAffine:
            products.append(0)
    return products[::-1]


def _quotient(extent: Extent, divisor: Extent) -> Extent | None:
    """extent / divisor where that is exact; else None."""
    try:
        if divisor == 0 or extent == 0 or extent % divisor != 0:
            return None
        return extent // divisor
    except NonAffine:
        return None


def axis_groups(out_shape: Shape, in_shape: Shape) -> list[tuple[range, range]]:
    """Smallest runs of axes with equal products, in order."""
    try:
        return _axis_groups(out_shape, in_shape)
    except NonAffine as error:
        raise IndexingError(f"reshape from {in_shape} to {out_shape} multiplies two symbolic extents") from error


def _axis_groups(out_shape: Shape, in_shape: Shape) -> list[tuple[range, range]]:
    groups: list[tuple[range, range]] = []
    i = j = 0
    while i < len(out_shape) or j < len(in_shape):
        i0, j0 = i, j
        out_product: Extent = 1
        in_product: Extent = 1
        if i < len(out_shape):
            out_product = out_product * out_shape[i]
            i += 1
        if j < len(in_shape):
            in_product = in_product * in_shape[j]
            j += 1
        while out_product != in_product:
            if i < len(out_shape) and (j >= len(in_shape) or _below(out_product, in_product)):
                out_product = out_product * out_shape[i]
                i += 1
            elif j < len(in_shape):
                in_product = in_product * in_shape[j]
                j += 1
            else:
                raise IndexingError(f"reshape from {in_shape} to {out_shape} does not keep the number of elements")
        groups.append((range(i0, i), range(j0, j)))
    return groups


def _below(a: Extent, b: Extent) -> bool:
    """Which product to extend next; a product with the symbol counts as larger than one without."""
    if isinstance(a, Dim) != isinstance(b, Dim):
        return isinstance(b, Dim)
    return (a.terms[0][1] if isinstance(a, Dim) else a) < (b.terms[0][1] if isinstance(b, Dim) else b)


def _regroup(coordinates: Index, extents: Shape, targets: Shape, index: Index) -> list[Coordinate]:
    rank = index[0].rank if index else 0
    if tuple(extents) == tuple(targets):
        return list(coordinates)
    kept = [(c, e) for c, e in zip(coordinates, extents, strict=True) if e != 1]
    wanted = [t for t in targets if t != 1]
    if tuple(e for _, e in kept) == tuple(wanted):
        pending = [c for c, _ in kept]
        return [constant(0, rank) if t == 1 else pending.pop(0) for t in targets]
    parts, batch, stride = [np.zeros((1,) * rank, np.int64)], 0, 1
    for position, (coordinate, extent) in reversed(list(enumerate(kept))):
        parts += [p * stride for p in coordinate.parts]
        batch += coordinate.batch * stride
        if position:
            if isinstance(extent, Dim):
                raise IndexingError(f"the symbolic extent {extent} is merged behind another axis")
            stride *= extent
    parts = list(_disjoint(parts))
    split: list[Coordinate] = []
    for position, target in reversed(list(enumerate(targets))):
        outermost = all(t == 1 for t in targets[:position])
        if target == 1:
            split.append(constant(0, rank))
        elif outermost:
            split.append(Coordinate.total(parts, batch))
        else:
            if isinstance(target, Dim):
                raise IndexingError(f"the symbolic extent {target} is split off behind another axis")
            if batch % target:
                raise IndexingError(f"a symbolic extent is split by {target}")
            if sum(int((p % target).max(initial=0)) for p in parts) >= target:  # the sum of the remainders carries over
                parts = [_sum(parts)]
            split.append(Coordinate.total([p % target for p in parts]))
            parts, batch = list(_disjoint([p // target for p in parts])), batch // target
    return split[::-1]


@dataclass(frozen=True)
class Difference:
    """The first grid point at which two maps differ."""

    at: tuple[int, ...]
    found: int
    expected: int


def first_difference(found: np.ndarray, expected: np.ndarray) -> Difference | None:
    """Compare integer arrays (broadcast against each other) exactly; None means equal everywhere."""
    found, expected = np.broadcast_arrays(found, expected)
    differs = found != expected
    if not differs.any():
        return None
    at = tuple(int(i) for i in np.unravel_index(int(np.argmax(differs)), differs.shape))
    return Difference(at, int(found[at]), int(expected[at]))


def dependencies(coordinates: Sequence[Coordinate]) -> frozenset[int]:
    return frozenset().union(*(c.depends_on() for c in coordinates))
