"""The feature maps that an operand may be made of, and which pixel of each every grid point reads."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from attnrewrite.dims import Dim, Extent
from attnrewrite.facts import Facts
from attnrewrite.graph import Value
from attnrewrite.indexing.map import dependencies
from attnrewrite.localattention.grid import count
from attnrewrite.localattention.tokens import Candidate, Roles, roles


@dataclass(frozen=True, eq=False)
class Source:
    """A feature map an operand is made of, and which pixel of it each grid point reads.

    spatial: extents of its token axes without the batch. has_batch: its axis 0 is a batch that passes through, `groups`
    rows for each element of the model's (their number is the first of `spatial` then).
    """

    candidate: Candidate
    roles: Roles
    has_batch: bool
    spatial: tuple[int, ...]
    groups: int = 1

    @property
    def batch(self) -> Extent:
        """The extent of the batch that passes through; 1 where there is none."""
        return self.value.known_shape[0] // self.groups if self.has_batch else 1

    @property
    def value(self) -> Value:
        return self.candidate.value

    @property
    def spatial_axes(self) -> tuple[int, ...]:
        return self.roles.tokens[1:] if self.has_batch else self.roles.tokens


def sources_of(way: Sequence[Candidate], features: frozenset[int]) -> list[Source]:
    found = []
    for candidate in way:
        split = roles(candidate.value, candidate.index, features)
        if split is None or not split.tokens:
            continue
        source = as_source(candidate, split)
        if source is not None:
            found.append(source)
    # a batch that stands behind another axis (stacked queries, keys and values) would be taken for pixels
    with_batch = [s for s in found if s.has_batch]
    return with_batch or found


def as_source(candidate: Candidate, split: Roles) -> Source | None:
    """A candidate as a feature map: axis 0 its batch, every other token axis of static extent."""
    shape = candidate.value.known_shape
    has_batch = split.tokens[0] == 0 and len(split.tokens) > 1
    spatial_axes = split.tokens[1:] if has_batch else split.tokens
    spatial = []
    for axis in spatial_axes:
        extent = shape[axis]
        if not isinstance(extent, int) or candidate.index[axis].batch:
            return None
        spatial.append(extent)
    if has_batch and isinstance(shape[0], Dim) and candidate.index[0].batch != count(shape[0]):
        return None
    return Source(candidate, split, has_batch, tuple(spatial))


def tokens_of(source: Source) -> int:
    """Tokens of a source the grid enumerates, batch included."""
    return math.prod(count(source.value.known_shape[a]) for a in source.roles.tokens)


def model_batch(facts: Facts) -> Extent | None:
    """The batch of the model's first input of three axes or more; None without such an input."""
    shapes = [v.shape for v in facts.graph.inputs if v.shape is not None and len(v.shape) > 2]
    return shapes[0][0] if shapes else None


def reads_alike(key_axis: int, keys: Sequence[Source]) -> frozenset[int] | None:
    """The grid axes that number batch elements, if all queries of one read the same keys on every view of these.

    None where they do not: the queries of a window read alike on the nearest views alone.
    """
    rows: frozenset[int] = frozenset()
    for source in keys:
        index, domain = source.candidate.index, source.candidate.domain
        reads = dependencies([index[a] for a in source.spatial_axes])
        if domain is not None:
            reads |= frozenset(a for a, e in enumerate(domain.shape) if e > 1)
        if source.has_batch:
            rows |= index[0].depends_on() - {key_axis}
        if reads - {key_axis}:
            return None
    return rows
