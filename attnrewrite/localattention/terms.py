"""What is added to the logits besides constants, in the op's own order: query-dependent tables and computed tensors.

A table of the query's is decomposed into one per axis of the window where it is a sum of such. A computed tensor is
brought into [B, nW, nH, N, M] by a reshape and a transpose (and a Gather, where tokens or windows are listed in another
order), found from its map and checked on integers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from attnrewrite import floats
from attnrewrite.dims import Dim, Extent
from attnrewrite.facts import Facts
from attnrewrite.graph import Value, ancestors
from attnrewrite.indexing.map import Index, IndexingError, reduced
from attnrewrite.localattention.attention import Attention
from attnrewrite.localattention.geometry import Sizes
from attnrewrite.localattention.grid import count, grouped
from attnrewrite.localattention.logits import ComputedTerm, QueryTerm, constant_at
from attnrewrite.localattention.maps import SiteMaps
from attnrewrite.localattention.site import Decline


@dataclass(frozen=True, eq=False)
class Order:
    """How the op numbers what the site's grid numbers.

    windows, queries: the grid axes of each. element: int64 [B, nW], the row of the grid's windows for every batch
    element. window, query, key: the positions in which the op lists windows, query tokens and key tokens.
    """

    windows: Sequence[int]
    queries: Sequence[int]
    element: np.ndarray
    window: np.ndarray
    query: np.ndarray
    key: np.ndarray


@dataclass(frozen=True, eq=False)
class RelativePosition:
    """scale * q[n] . table[n, m]: table float64 [nH or 1, R, d], per axis of the window one after the other.

    R is sum_a window[a] * key_window[a] (the rows of axis a are [i_a, j_a], row-major), or N * M for one table of all.
    """

    table: np.ndarray
    scale: float


@dataclass(frozen=True, eq=False)
class PlacedTerm:
    """A computed term and how its tensor becomes [B or 1, nW or 1, nH or 1, N or 1, M or 1].

    Reshaped to `split`, its axes transposed by `permutation`, then reshaped to `shape`, then picked along axes by
    `picks` (axis, positions).
    """

    term: ComputedTerm
    factor: np.ndarray
    split: tuple[Extent, ...]
    permutation: tuple[int, ...]
    shape: tuple[Extent, ...]
    picks: tuple[tuple[int, np.ndarray], ...]

    @property
    def is_mask(self) -> bool:
        """A term that excludes, or is the same for all heads."""
        return self.term.excludes is not None or self.shape[2] == 1


def grid_table(term: QueryTerm, attention: Attention) -> np.ndarray:
    """float64 over the whole grid, the last axis the query's channels: what each channel of the query is times."""
    values = constant_at(term.table, term.index)
    rank = attention.grid_rank
    values = values.reshape(values.shape + (1,) * (rank - values.ndim)) * term.factor
    if values.shape[-1] == 1:
        values = np.broadcast_to(values, (*values.shape[:-1], len(term.channels)))
    full = np.zeros((*values.shape[:-1], attention.head_dim))
    full[..., term.channels] = values
    return full


def relative_position(
    maps: SiteMaps, order: Order, window: Sizes, key_window: Sizes
) -> RelativePosition | Decline | None:
    """The query terms of a site as one operand; None where it has none. window, key_window: in the op's axes."""
    attention = maps.attention
    if not attention.query_terms:
        return None
    tables = []
    for term in attention.query_terms:
        try:
            tables.append(_in_order(grid_table(term, attention), maps, order))
        except IndexingError:
            return Decline(
                "a table that the queries are multiplied with differs from window to window", term.node.label
            )
    scale = np.abs(attention.query_terms[0].factor).max()
    if any(t.factor.size != 1 or abs(float(t.factor.reshape(-1)[0])) != scale for t in attention.query_terms):
        scale = 1.0
    if scale in (0.0, 1.0):
        scale = 1.0
    dtype = attention.query.value.dtype
    assert dtype is not None
    table = _per_axis(tables, window, key_window, floats.step(dtype))
    if table is None:
        heads = max(t.shape[0] for t in tables)
        total = sum(tables[1:], tables[0])
        shape = (heads, math.prod(window), math.prod(key_window), attention.head_dim)
        table = np.broadcast_to(total, shape).reshape(heads, -1, attention.head_dim)
    return RelativePosition(table / scale, float(scale))


def relative_table(found: RelativePosition | None, per_head: np.ndarray | None) -> np.ndarray | None:
    """The operand's elements; per_head: float64 [nH], what the query was multiplied with already."""
    if found is None or per_head is None:
        return None if found is None else found.table
    return found.table / per_head[:, None, None]


def _in_order(table: np.ndarray, maps: SiteMaps, order: Order) -> np.ndarray:
    """A grid array as [nH or 1, N or 1, M or 1, d] in the op's order; IndexingError where windows differ."""
    attention = maps.attention
    groups = [list(maps.heads), list(order.queries), [attention.key_axis], [attention.channel_axis]]
    flat = grouped(reduced(table), groups, attention)
    flat = np.broadcast_to(flat, (*flat.shape[:-1], attention.head_dim))
    for axis, positions in ((1, order.query), (2, order.key)):
        if flat.shape[axis] > 1:
            flat = flat.take(positions, axis=axis)
    return flat


def _per_axis(tables: list[np.ndarray], window: Sizes, key_window: Sizes, epsilon: float) -> np.ndarray | None:
    """[nH or 1, sum_a w_a * kw_a, d]: one table per axis whose sum is the sum of the tables; None where there is none.

    A table of one axis alone is kept bit for bit; the rest of them is split once, exact to the rounding of the sum that
    it was made by.
    """
    axes = len(window)
    heads, channels = max(t.shape[0] for t in tables), max(t.shape[-1] for t in tables)
    found = [np.zeros((heads, w, k, channels)) for w, k in zip(window, key_window, strict=True)]
    rest: np.ndarray | None = None
    for table in tables:
        shape = (table.shape[0], math.prod(window), math.prod(key_window), channels)
        view = reduced(np.broadcast_to(table, shape).reshape(shape[0], *window, *key_window, channels))
        used = [a for a in range(axes) if view.shape[1 + a] > 1 or view.shape[1 + axes + a] > 1]
        if len(used) <= 1:
            axis = used[0] if used else 0
            found[axis] = found[axis] + view.reshape(
                view.shape[0], view.shape[1 + axis], view.shape[1 + axes + axis], view.shape[-1]
            )
        else:
            rest = view if rest is None else rest + view
    if rest is not None:
        rest = np.broadcast_to(rest, (heads, *window, *key_window, channels))
        origin = rest.reshape(heads, -1, channels)[:, 0]
        rebuilt: np.ndarray = np.zeros((1,) * rest.ndim)
        for axis in range(axes):
            at = [slice(None) if a in (0, 1 + axis, 1 + axes + axis) else 0 for a in range(1 + 2 * axes)]
            part = rest[tuple(at)] - (origin[:, None, None] if axis else 0.0)
            found[axis] = found[axis] + part
            alone = [heads] + [1] * (2 * axes) + [channels]
            alone[1 + axis], alone[1 + axes + axis] = window[axis], key_window[axis]
            rebuilt = rebuilt + part.reshape(alone)
        if not (np.abs(rebuilt - rest) <= 4 * epsilon * np.abs(rest).max(initial=0.0)).all():
            return None
    return np.concatenate([f.reshape(heads, -1, channels) for f in found], axis=1)


def computed_terms(facts: Facts, maps: SiteMaps, order: Order) -> tuple[PlacedTerm, ...] | Decline:
    """Every computed term of a site as an operand of the op."""
    found = []
    for term in maps.attention.computed_terms:
        placed = place(facts, maps, order, term)
        if isinstance(placed, Decline):
            return placed
        found.append(placed)
    return tuple(found)


def place(facts: Facts, maps: SiteMaps, order: Order, term: ComputedTerm) -> PlacedTerm | Decline:
    """How a computed term becomes an operand of the op, or why it does not."""
    label = term.node.label
    if _made_inside(facts, maps, term):
        return Decline("a tensor computed from the windows' own tokens is added to the logits", label)
    try:
        flat, batch = _flat(term.value, term.index)
        at = _in_windows(flat, maps, order)
        factor = _in_windows(term.factor, maps, order)
    except IndexingError as error:
        return Decline(f"a tensor computed from data is added to the logits: {error}", label)
    if factor.shape[0] > 1 or factor.shape[1] > 1:
        return Decline("a tensor computed from data is added to the logits, scaled from window to window", label)
    placed = _strides(term, factor, at, batch, _batch_extent(maps))
    return placed or Decline(
        "a tensor computed from data is added to the logits in an order that no transpose undoes", label
    )


def _batch_extent(maps: SiteMaps) -> Extent:
    shape = maps.query.value.known_shape
    return shape[0] if maps.query.has_batch else 1


def _made_inside(facts: Facts, maps: SiteMaps, term: ComputedTerm) -> bool:
    """Whether the term is made of values between the feature maps and the attention: their movement would stay."""
    attention = maps.attention
    cuts = {s.value for s in (maps.query, *maps.keys[:1], *maps.values[:1])}
    if maps.extra is not None:
        cuts |= {s.candidate.value for s in (maps.extra.key, maps.extra.value)}
    operands = (attention.query.value, attention.key.value, attention.value.value)
    inside = ancestors(operands, cuts.__contains__) & ancestors([term.value], cuts.__contains__)
    return any(v.producer is not None for v in inside)


def _flat(value: Value, index: Index) -> tuple[np.ndarray, int]:
    """The row-major position that each grid point reads within one batch element, and how far elements are apart."""
    shape = value.known_shape
    rank = index[0].rank if index else 0
    flat: np.ndarray = np.zeros((1,) * rank, np.int64)
    batch = 0
    for axis, (coordinate, extent) in enumerate(zip(index, shape, strict=True)):
        if isinstance(extent, Dim) and axis:
            raise IndexingError(f"{value.name} has its symbolic extent behind another axis")
        flat = flat * count(extent) + coordinate.values
        batch = batch * count(extent) + coordinate.batch
    return flat, batch


def _in_windows(array: np.ndarray, maps: SiteMaps, order: Order) -> np.ndarray:
    """A grid array as [B or 1, nW or 1, nH or 1, N or 1, M or 1] in the op's order; B is 1 where it is symbolic."""
    attention = maps.attention
    array = array.reshape(array.shape + (1,) * (attention.grid_rank - array.ndim))
    groups = [list(order.windows), list(maps.heads), list(order.queries), [attention.key_axis]]
    flat = grouped(array, groups, attention)
    flat = flat[order.element] if flat.shape[0] > 1 else flat[None]
    for axis, positions in ((1, order.window), (3, order.query), (4, order.key)):
        if flat.shape[axis] > 1:
            flat = flat.take(positions, axis=axis)
    return reduced(flat)


def _strides(
    term: ComputedTerm, factor: np.ndarray, at: np.ndarray, batch: int, batch_extent: Extent
) -> PlacedTerm | None:
    """Axes of the result as axes of the tensor: each of one stride, in any order; checked on every element."""
    value_shape = term.value.known_shape
    total = math.prod(count(e) for e in value_shape)
    symbolic = isinstance(value_shape[0], Dim) if value_shape else False
    if symbolic != bool(batch) or (batch and batch != total):
        return None
    strides: list[tuple[int, int]] = []  # (stride, axis)
    picks = []
    for axis, extent in enumerate(at.shape):
        if extent == 1:
            continue
        profile = at.take(range(extent), axis)[tuple(slice(None) if a == axis else slice(0, 1) for a in range(at.ndim))]
        offsets = profile.reshape(-1) - profile.min()
        ordered = np.sort(offsets)
        step = int(ordered[1])
        if step == 0 or not np.array_equal(ordered, np.arange(extent) * step):
            return None
        if not np.array_equal(offsets, ordered):
            picks.append((axis, offsets // step))
        strides.append((step, axis))
    strides.sort(reverse=True)
    split: tuple[Extent, ...] = tuple(at.shape[axis] for _, axis in strides)
    order = [axis for _, axis in strides]
    permutation = tuple(int(p) for p in np.argsort(order))
    element = np.arange(total)
    try:
        tensor = element.reshape([int(e) for e in split if isinstance(e, int)]).transpose(permutation)
    except ValueError:
        return None
    tensor = tensor.reshape(at.shape)
    for axis, positions in picks:
        tensor = tensor.take(positions, axis)
    if not np.array_equal(tensor, at):
        return None
    shape: tuple[Extent, ...] = at.shape
    if batch:
        if shape[0] != 1:
            return None
        split, permutation = (batch_extent, *split), (0, *(p + 1 for p in permutation))
        shape = (batch_extent, *shape[1:])
    return PlacedTerm(term, factor, split, permutation, shape, tuple(picks))
