"""Pixels folded into channels inside windows, written on the map.

Keys that hold the channels of a cell of pixels each (SRFormer's permuted window: 2 x 2 pixels of a quarter of the
channels are one key) are computed where the windows are. Cells that tile the map are the pixels of a smaller map with
more channels: space to depth. Here the cells are read off the maps; what is emitted is the fold on the map, and one
movement from there to the order that the model has.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from attnrewrite.facts import Facts
from attnrewrite.graph import Node, Value
from attnrewrite.indexing.map import Index, IndexingError, identity
from attnrewrite.indexing.provenance import provenances
from attnrewrite.localattention.attention import Attention, read_attention
from attnrewrite.localattention.contraction import Operand
from attnrewrite.localattention.grid import count, flat_pixels, pixels_read, row_major, spread
from attnrewrite.localattention.hoist import Anchor, Hoister
from attnrewrite.localattention.pool_on_map import Layout, Mover
from attnrewrite.localattention.pools import Cells, cells_of
from attnrewrite.localattention.returns import spelled_out
from attnrewrite.localattention.site import Decline
from attnrewrite.localattention.sources import Source, model_batch, sources_of
from attnrewrite.localattention.tokens import Candidate, candidates, channel_axis_of, feature_axes, roles
from attnrewrite.ops import REDUCTIONS


@dataclass(frozen=True, eq=False)
class Fold:
    """A value whose tokens hold channels of several pixels each.

    computed: the value of one token per pixel that it is moved from, its channels along channel_axis; source: the map
    that is made of. cells: of its pixels. place: int64 over the folded value's token axes, the cell that each token is,
    batch included. picked: int64 [F], which channel of the folded map each of its features is.
    """

    folded: Value
    computed: Value
    channel_axis: int
    source: Source
    cells: Cells
    tokens: tuple[int, ...]
    features: tuple[int, ...]
    place: np.ndarray
    picked: np.ndarray


def folds_of(facts: Facts, softmax: Node) -> Iterator[tuple[Fold, ...]]:
    """What keys and values of an attention are folded from, on each view of the map that this may be."""
    attention = read_attention(facts, softmax)
    if isinstance(attention, Decline):
        return
    found: dict[Value, list[Fold]] = {}
    for operand in (attention.key, attention.value):
        seen = _folded(facts, attention, operand)
        if seen is not None and seen.folded.value not in found:
            found[seen.folded.value] = list(_on_maps(facts, seen))
    if found:
        yield from zip(*found.values(), strict=False)


@dataclass(frozen=True, eq=False)
class _Seen:
    """On the way of an operand: the farthest value with axes for tokens and for features, and the one that it is moved
    from, whose channels lie along channel_axis. features: the grid axes that number them.
    """

    folded: Candidate
    computed: Candidate
    channel_axis: int
    features: frozenset[int]


def _folded(facts: Facts, attention: Attention, operand: Operand) -> _Seen | None:
    """How an operand is folded; None where each of its tokens is one of the map."""
    way, mixed = [], None  # up to the first operator that mixes channels
    for candidate in candidates(operand.value, operand.index, attention.channel_axis, facts.positions):
        way.append(candidate)
        node = candidate.value.producer
        mixed = None if node is None or node.op in REDUCTIONS else channel_axis_of(node)
        if mixed is not None:
            break
    if mixed is None:
        return None
    made = way[-1]
    channels = frozenset({attention.channel_axis, attention.value_axis})
    features = feature_axes(way, channels) - {attention.key_axis}
    if not any(c.depends_on() & features for a, c in enumerate(made.index) if a != mixed):
        return None
    moved = [c for c in way if c.depth == 0]
    apart = [c for c in moved if roles(c.value, c.index, features) is not None]
    if not apart or moved[-1].value.shape != made.value.shape:
        return None
    return _Seen(apart[-1], moved[-1], mixed, features)


def _on_maps(facts: Facts, seen: _Seen) -> Iterator[Fold]:
    folded, value, shape = seen.folded.value, seen.computed.value, seen.computed.value.known_shape
    split = roles(folded, seen.folded.index, seen.features)
    assert split is not None
    index = _moved_from(facts, folded, value)
    if index is None:
        return
    way = list(candidates(value, identity(shape, len(shape) + 1), len(shape), facts.positions))
    sources = [s for s in sources_of(way, frozenset({seen.channel_axis, len(shape)})) if s.candidate.domain is None]
    tokens = [a for a in range(len(shape)) if a != seen.channel_axis]
    batch = model_batch(facts)
    for source in sorted(sources, key=lambda s: (s.batch != batch, spelled_out(len(s.spatial)))):
        try:
            pixel = flat_pixels(source.candidate, source.roles.tokens, shape, tokens).reshape(-1)
        except IndexingError:
            continue
        if not np.array_equal(np.sort(pixel), np.arange(count(source.batch) * math.prod(source.spatial))):
            continue
        read = pixel[row_major(index, tokens, shape)]
        found = _fold(folded, value, seen.channel_axis, source, split.tokens, split.features, read, index)
        if found is not None:
            yield found


def _moved_from(facts: Facts, folded: Value, computed: Value) -> Index | None:
    """Where each element of the folded value is read, all within bounds."""
    for found in provenances(folded, identity(folded.known_shape), facts.positions):
        if found.value is computed:
            return found.index if found.domain is None else None
    return None


def _fold(
    folded: Value,
    computed: Value,
    channel_axis: int,
    source: Source,
    tokens: tuple[int, ...],
    features: tuple[int, ...],
    read: np.ndarray,
    index: Index,
) -> Fold | None:
    """read: int64 over the folded value, the pixel (batch included) that every element comes from."""
    shape = folded.known_shape
    order = [(a, count(shape[a])) for a in (*tokens, *features)]
    listed = math.prod(count(shape[a]) for a in tokens)
    pixels = spread(read, order).reshape(listed, -1)
    channels = spread(index[channel_axis].values, order).reshape(listed, -1)
    total = math.prod(source.spatial)
    element, local = pixels // total, pixels % total
    of_cell = [np.unique(row) for row in local[element[:, 0] == 0]]
    sizes = {len(row) for row in of_cell}
    if (element != element[:, :1]).any() or len(sizes) != 1 or sizes == {1}:
        return None
    cells = cells_of(np.stack(of_cell), total)
    if cells is None:
        return None
    number = cells.number(local)
    place = (number + element * (total // cells.size))[:, 0]
    picked, width = channels, count(computed.known_shape[channel_axis])
    for stride, extent in reversed(cells.digits):
        picked, width = picked + local // stride % extent * width, width * extent
    if (number != number[:, :1]).any() or (picked != picked[:1]).any():
        return None
    if not np.array_equal(np.sort(place), np.arange(len(place))):
        return None
    extents = [count(shape[a]) for a in tokens]
    return Fold(
        folded, computed, channel_axis, source, cells, tokens, features, place.reshape(extents), picked[0].copy()
    )


def write_fold(facts: Facts, fold: Fold, made_by: str) -> list[Node]:
    """Edit the graph so that the fold is made on its map; returns the nodes that move tokens from there.

    Raises NotHoistable or IndexingError, before anything is edited, where the map is not one of per-token operators.
    """
    source, computed, cells = fold.source, fold.computed, fold.cells
    shape, channel = computed.known_shape, len(computed.known_shape)
    hoister = Hoister(facts, source.spatial, made_by)
    map_ = hoister.source_map(source.value, source.roles, source.batch, source.spatial)
    pixels = pixels_read(source.candidate, source.roles.tokens)
    known = source.value.known_shape
    anchor = Anchor(source.value, known, source.candidate.index, source.roles, source.roles.features, map_, pixels)
    features = frozenset({fold.channel_axis, channel})
    found, picked = hoister.hoist(computed, identity(shape, channel + 1), channel, features, anchor)
    width, tokens = count(shape[fold.channel_axis]), cells.total
    own = spread(picked, [(fold.channel_axis, width)])
    tensor = hoister.laid_out(hoister.features(found, own, computed.name), channels_first=False)
    for stride, extent in reversed(cells.digits):
        view = hoister.reshape(tensor, (source.batch, tokens // (stride * extent), extent, stride, width))
        tensor = hoister.transpose(view, (0, 1, 3, 2, 4))
        tokens, width = tokens // extent, width * extent
    spatial = cells.pooled(source.spatial)
    on_map = hoister.reshape(tensor, (source.batch, *spatial, width))
    if not np.array_equal(fold.picked, np.arange(width)):
        order = hoister.constant(fold.picked, f"{computed.name}_order")
        axis = len(spatial) + 1
        on_map = hoister.emit(
            "Gather",
            [on_map, order],
            (*on_map.known_shape[:-1], len(order.constant)),
            f"{computed.name}_fold",
            axis=axis,
        )
    layout = Layout(fold.folded.known_shape, fold.tokens, fold.features, fold.place, source.batch, spatial)
    mover = Mover(hoister, layout)
    moved = mover.out(on_map)
    moved.dtype = fold.folded.dtype
    graph = facts.graph
    graph.nodes.extend(hoister.nodes)
    graph.replace_uses(fold.folded, moved)
    graph.remove_dead()
    graph.sort()
    return mover.movement
