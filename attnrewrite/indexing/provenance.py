"""Where the numbers of a value come from: rules composed backwards until the operators compute instead of move.

The walk does not stop by itself at a feature map, so every value at which all reads meet is a candidate; who asks picks
one. Reads are advanced in reverse topological order, which makes the two halves of a roll meet again at their source.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np

from attnrewrite.graph import Value
from attnrewrite.indexing.map import Coordinate, Index, IndexingError, reduced, reduced_where
from attnrewrite.indexing.rules import Fill, Read, sources


@dataclass(frozen=True, eq=False)
class Provenance:
    """A value and the map by which it is read; outside `domain` (None = everywhere inside) lie the fills."""

    value: Value
    index: Index
    domain: np.ndarray | None = None
    fills: tuple[Fill, ...] = field(default=())


def provenances(value: Value, index: Index, positions: Mapping[Value, int]) -> Iterator[Provenance]:
    """Every value from which all of `value[index]` is moved, nearest first; the value itself is the first.

    positions: topological position of each value's producer (inputs and constants absent). Raises IndexingError where
    the walk meets something it cannot express; what was yielded before remains true.
    """
    reads: dict[Value, Read] = {value: Read(value, index)}
    fills: list[Fill] = []
    merged = False
    while True:
        _constants_become_fills(reads, fills)
        if len(reads) == 1:
            (only,) = reads.values()
            if merged and only.where is not None:
                only = reads[only.value] = _reduced(only, only.where)
            merged = False
            yield Provenance(only.value, only.index, only.where, tuple(fills))
        if not reads:
            return
        latest = max(reads, key=lambda v: positions.get(v, -1))
        read = reads.pop(latest)
        if latest.producer is None:
            return
        found = sources(latest.producer, latest, read.index)
        if found is None:
            return
        for source in found:
            where = _both(read.where, source.where)
            if where is not None and not where.any():
                continue
            if isinstance(source, Fill):
                assert where is not None
                fills.append(Fill(source.number, where))
            else:
                piece = Read(source.value, source.index, None if where is not None and where.all() else where)
                merged = merged or source.value in reads
                reads[source.value] = _merge(reads[source.value], piece) if source.value in reads else piece


def _constants_become_fills(reads: dict[Value, Read], fills: list[Fill]) -> None:
    """A constant that is one number everywhere fills; any other constant ends the walk where it is reached."""
    if len(reads) < 2:
        return
    for value in [v for v in reads if v.is_constant]:
        elements = value.constant
        number = elements.reshape(-1)[0] if elements.size else 0
        where = reads[value].where
        if where is not None and (elements == number).all():
            fills.append(Fill(float(number), where))
            del reads[value]


def _both(a: np.ndarray | None, b: np.ndarray | None) -> np.ndarray | None:
    if a is None or b is None:
        return a if b is None else b
    return a & b


def _reduced(read: Read, where: np.ndarray) -> Read:
    """The same read, with what merging left outside its elements no longer making it vary along an axis."""
    where = reduced(where)
    found = [c if len(c.parts) > 1 else Coordinate(reduced_where(c.values, where), c.batch) for c in read.index]
    return Read(read.value, tuple(found), where)


def _merge(a: Read, b: Read) -> Read:
    """Two reads of one value at different grid points as one read."""
    if a.where is None or b.where is None:
        raise IndexingError(f"{a.value.name} is read twice for the same element")
    coordinates = []
    for one, other in zip(a.index, b.index, strict=True):
        if one.batch != other.batch:
            raise IndexingError(f"{a.value.name} is read with two different batch strides")
        if one.equals(other):
            coordinates.append(one)
        else:
            coordinates.append(Coordinate(np.where(a.where, one.values, other.values), one.batch))
    where: np.ndarray = a.where | b.where
    if not where.all():
        return Read(a.value, tuple(coordinates), where)
    return Read(a.value, tuple(Coordinate(reduced(c.values), c.batch) for c in coordinates))
