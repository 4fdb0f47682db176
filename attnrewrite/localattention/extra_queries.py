"""Extra tokens of the windows that ask as well: what they attend leaves the op by its second output."""

from __future__ import annotations

import numpy as np

from attnrewrite.facts import Facts
from attnrewrite.indexing.map import IndexingError, dependencies
from attnrewrite.localattention.attention import Attention, restricted
from attnrewrite.localattention.extra_sources import Joined, beside_the_map, extra_source
from attnrewrite.localattention.grid import count, flat_pixels, row_major
from attnrewrite.localattention.maps import ExtraQueries, ExtraTokens, SiteMaps
from attnrewrite.localattention.returns import Return, read_elsewhere, returns_of
from attnrewrite.localattention.tokens import Candidate
from attnrewrite.localattention.windows import WindowMatch


def read_extra_queries(
    facts: Facts, attention: Attention, found: WindowMatch, extra: ExtraTokens, joined: Joined, rows: np.ndarray
) -> ExtraQueries:
    """The extra queries of a match, which asks with the other rows of the axis that `joined` joins.

    attention: with all its rows and keys; rows: int64, those of the extra queries. IndexingError says why they cannot
    be an operand of the op.
    """
    order = found.order
    if [a for a in order.queries if a != joined.axis]:
        raise IndexingError("their rows are no axis of their own")
    for source in (found.key, found.value, extra.key, extra.value):
        if depends_on(source.candidate, joined.axis):
            raise IndexingError("the keys that they attend are not those of their window")
    asking = beside_the_map(attention, joined.axis, rows)
    source = extra_source(facts, found.maps, asking, asking.query, order, joined, len(rows))
    alone = restricted(attention, joined.axis, rows)
    first: str | None = None
    for back in sorted(returns_of(facts, alone, found.maps.features), key=_layout):
        place = _places(found, alone, joined.axis, back)
        if place is None:
            continue
        if len(rows) == 1 and back.depth:  # a fixed place would be taken for a feature
            first = first or back.value.name
            continue
        other = read_elsewhere(facts, attention.output, {found.maps.back.value, back.value})
        if other is None:
            return ExtraQueries(alone, joined.axis, asking.query, source, back, place)
        first = first or other.name
    if first is None:
        raise IndexingError("what they attend is read in several parts")
    raise IndexingError(f"what they attend is not parted from the window's where the attention ends ({first})")


def depends_on(candidate: Candidate, axis: int) -> bool:
    """Whether what is read differs along an axis of the grid."""
    domain = candidate.domain
    return axis in dependencies(candidate.index) or (domain is not None and domain.shape[axis] > 1)


def _layout(back: Return) -> tuple[int, bool, bool]:
    """Views of the result in order of preference: nothing computed on the way; the channels in one axis; the last."""
    features = back.roles.features
    return back.depth, len(features) > 1, features[-1:] < back.roles.tokens[-1:]


def _places(found: WindowMatch, alone: Attention, axis: int, back: Return) -> np.ndarray | None:
    """int64 [tokens of `back`]: the row of the second output [B, nW, T] that each is; None where it does not have each
    once, or has batch elements in another order.
    """
    order = found.order
    count_of_rows = count(alone.output_shape[axis])
    windows = row_major(back.index, order.windows, alone.output_shape)
    rows = np.asarray(windows * count_of_rows + back.index[axis].values)
    if any(rows.shape[a] > 1 for a in range(rows.ndim) if a not in back.roles.tokens):
        return None
    extents = [count(back.value.known_shape[a]) for a in back.roles.tokens]
    kept = [rows.shape[a] for a in back.roles.tokens]
    rows = np.broadcast_to(rows.reshape(kept), extents).reshape(-1)
    of_window = np.empty(order.element.size, np.int64)
    of_window[order.element[:, order.window].reshape(-1)] = np.arange(order.element.size)
    if rows.size != order.element.size * count_of_rows:
        return None
    place = of_window[rows // count_of_rows] * count_of_rows + rows % count_of_rows
    local = place.reshape(len(order.element), -1) - np.arange(len(order.element))[:, None] * (
        order.element.shape[1] * count_of_rows
    )
    own = np.arange(local.shape[1])
    return place if (local == local[:1]).all() and np.array_equal(np.sort(local[0]), own) else None


def rows_by_place(maps: SiteMaps) -> np.ndarray:
    """int64 [B * nW * T]: for every row of the second output, the attention's row, numbered over its token axes."""
    assert maps.extra is not None and maps.extra.asking is not None
    asking = maps.extra.asking
    back, shape = asking.back, asking.attention.output_shape
    rows = row_major(back.index, maps.token_axes, shape)
    extents = [count(back.value.known_shape[a]) for a in back.roles.tokens]
    rows = np.broadcast_to(rows.reshape([rows.shape[a] for a in back.roles.tokens]), extents).reshape(-1)
    by_place = np.empty_like(rows)
    by_place[asking.place] = rows
    return by_place


def tokens_asking(maps: SiteMaps, rows: np.ndarray) -> np.ndarray:
    """int64 [rows]: the token of the extra queries' source, batch included, that asks in each of these rows."""
    assert maps.extra is not None and maps.extra.asking is not None
    asking, axes = maps.extra.asking, list(maps.token_axes)
    shape = list(asking.attention.output_shape)
    shape[asking.axis] = max(asking.count, 2)
    flat = flat_pixels(asking.source.candidate, asking.source.roles.tokens, shape, axes)
    return flat.take(np.arange(asking.count), axis=axes.index(asking.axis)).reshape(-1)[rows]
