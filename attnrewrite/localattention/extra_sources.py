"""Where tokens come from that belong to a window but lie on no map: tensors joined to the window's own (Concat)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from attnrewrite.dims import Dim, Extent
from attnrewrite.facts import Facts
from attnrewrite.graph import Value
from attnrewrite.indexing.map import IndexingError
from attnrewrite.indexing.rules import Read, sources
from attnrewrite.localattention.attention import Attention, restricted
from attnrewrite.localattention.contraction import Operand
from attnrewrite.localattention.grid import count, flat_pixels
from attnrewrite.localattention.maps import ExtraSource, SiteMaps
from attnrewrite.localattention.terms import Order
from attnrewrite.localattention.tokens import Candidate, Roles, candidates, roles


@dataclass(frozen=True, eq=False)
class Joined:
    """A value that joins several tensors along one axis of the grid: int64 positions of each piece, largest first."""

    value: Value
    axis: int
    pieces: tuple[np.ndarray, ...]

    def others(self, own: np.ndarray) -> np.ndarray:
        return np.sort(np.concatenate([p for p in self.pieces if p is not own]))


def joined(facts: Facts, attention: Attention, operand: Operand, axis: int) -> Iterator[Joined]:
    """Values on the way of an operand that join tensors along this axis of the grid alone, nearest first."""
    for candidate in candidates(operand.value, operand.index, attention.channel_axis, facts.positions):
        node = candidate.value.producer
        if node is None or node.op != "Concat":
            continue
        found = sources(node, candidate.value, candidate.index)
        pieces = [_along(read, axis) for read in found or ()]
        whole = [p for p in pieces if p is not None]
        if len(whole) > 1 and len(whole) == len(pieces):
            yield Joined(candidate.value, axis, tuple(sorted(whole, key=len, reverse=True)))


def _along(read: object, axis: int) -> np.ndarray | None:
    """int64: the positions along an axis at which a piece is read; None where other axes decide as well."""
    if not isinstance(read, Read) or read.where is None:
        return None
    if any(extent > 1 and a != axis for a, extent in enumerate(read.where.shape)):
        return None
    return np.flatnonzero(read.where.reshape(-1))


def beside_the_map(attention: Attention, axis: int, slots: np.ndarray) -> Attention:
    """The attention at these keys or queries (int64 along that axis of the grid). A lone one is asked for twice: a
    place that never changes would be taken for a feature.
    """
    return restricted(attention, axis, np.repeat(slots, 2) if len(slots) == 1 else slots)


def extra_source(
    facts: Facts, maps: SiteMaps, attention: Attention, operand: Operand, order: Order, joined: Joined, slots: int
) -> ExtraSource:
    """Where an operand comes from at the extra tokens: before they are joined, not yet moved; or farther away, where
    they are fewer (not yet repeated for every window or image).

    attention: the attention at them (`beside_the_map`), along the axis at which they are joined; slots: how many they
    are in each window.
    """
    before = facts.positions[joined.value]
    found: Candidate | None = None
    split: Roles | None = None
    fewest, depth, mixed = 0, 0, False
    for candidate in candidates(operand.value, operand.index, attention.channel_axis, facts.positions):
        if mixed and candidate.depth > depth:
            break  # an operator lies between, to which tokens and channels were one axis
        own = roles(candidate.value, candidate.index, maps.features)
        depth, mixed = candidate.depth, own is None
        if own is None or not own.tokens or candidate.domain is not None:
            continue
        if facts.positions.get(candidate.value, -1) >= before:
            continue
        tokens = math.prod(count(candidate.value.known_shape[a]) for a in own.tokens)
        farther = found is None or candidate.depth == found.depth or tokens < fewest
        if farther and (found is None or candidate.joins == found.joins):
            found, split, fewest = candidate, own, tokens
    if found is None or split is None:
        raise IndexingError("they are no tokens of their own")
    asked = [(joined.axis, max(slots, 2))]
    flat = flat_pixels(found, split.tokens, attention.output_shape, list(order.windows), asked)
    table = flat.reshape(-1, max(slots, 2))[order.element][..., :slots]
    total = math.prod(count(found.value.known_shape[a]) for a in split.tokens)
    batch: Extent = maps.query.batch
    elements = len(table)
    if not any(found.index[a].batch for a in split.tokens) and (table == table[:1]).all():
        batch, elements = 1, 1
    local = table[0][order.window]
    apart = table - np.arange(len(table))[:, None, None] * (total // elements if elements > 1 else 0)
    extents = [found.value.known_shape[a] for a in split.tokens]
    passed = all(
        found.index[a].batch == (count(e) if isinstance(e, Dim) else 0)
        for a, e in zip(split.tokens, extents, strict=True)
    )
    leads = isinstance(extents[0], Dim) or not isinstance(batch, Dim)
    if total % elements or (apart != apart[:1]).any() or not leads or not passed:
        raise IndexingError("they differ from batch element to batch element in another way than the map")
    alike = bool((local == local[:1]).all())
    return ExtraSource(found, split, batch, total // elements, local[:1] if alike else local)
