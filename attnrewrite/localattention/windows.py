"""Is this attention window attention? Token tables of one site against the closed form of windows.

The closed form is `WindowGeometry`, fitted in `window_fit`. Windows and the tokens inside them may be listed in any
order: a permutation changes nothing but the order in which bias and mask are read, so it is found, checked against
every element, and undone there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from attnrewrite.facts import Facts
from attnrewrite.graph import STANDARD_DOMAIN, Value
from attnrewrite.indexing.map import IndexingError, dependencies, first_difference, reduced
from attnrewrite.localattention.geometry import PADDING, Sizes, WindowGeometry, by
from attnrewrite.localattention.grid import count, flat_pixels, grouped
from attnrewrite.localattention.logits import has_fully_masked_row
from attnrewrite.localattention.maps import SiteMaps, global_attention, made_inside, settled
from attnrewrite.localattention.site import Decline, Kind
from attnrewrite.localattention.sources import Source, reads_alike
from attnrewrite.localattention.terms import Order, PlacedTerm, RelativePosition, computed_terms, relative_position
from attnrewrite.localattention.tokens import channel_axis_of
from attnrewrite.localattention.window_fit import fit_keys, fit_windows
from attnrewrite.ops import POINTWISE


@dataclass(frozen=True, eq=False)
class WindowMatch:
    """A site proved to be window attention.

    key, value: the feature maps chosen. bias: float64 [1 or nW, nH or 1, N, M] or None; mask: float64 [nW, N or 1, M]
    or None; mask_value: the penalty where the mask is Swin's shift mask; relative_position: the query's
    own terms; computed: terms made from data. All in the geometry's own window and token order. shared: where one set
    of queries serves all windows, the map of as many tokens that it comes from. order: how the grid's windows and
    tokens become the op's. With `maps.extra`, bias and mask have its keys behind the M of the window. head_shifts: the
    op's attribute; the geometry is then that of the first heads.
    """

    maps: SiteMaps
    geometry: WindowGeometry
    order: Order
    key: Source
    value: Source
    bias: np.ndarray | None
    mask: np.ndarray | None
    mask_value: float | None
    relative_position: RelativePosition | None = None
    computed: tuple[PlacedTerm, ...] = ()
    shared: Source | None = None
    head_shifts: tuple[Sizes, ...] = ()

    @property
    def merged(self) -> WindowGeometry:
        """The geometry with the fewest axes; shifts that differ from head to head keep theirs."""
        return self.geometry if self.head_shifts else self.geometry.merged()


def match_windows(facts: Facts, maps: SiteMaps) -> WindowMatch | Decline:
    """The window geometry of a site, or the reason why it is none."""
    node = maps.attention.softmax.label
    nearest: Decline | None = None
    # Keys on a map of another batch fit no query: what stops the others tells more.
    keys = sorted(maps.keys, key=lambda k: _static_batch(k) != _static_batch(maps.facing(k).query))
    pairs = ((facing, source) for source in keys for facing in maps.all_facing(source))
    for facing, key in pairs:
        try:
            found = _match_key(facts, facing, key)
        except IndexingError as error:
            found = Decline(str(error), node)
        if isinstance(found, WindowMatch):
            return found
        if nearest is None or (found.kind != "other" and nearest.kind == "other"):
            nearest = found
    return nearest or Decline("the keys come from no feature map", node)


def _match_key(facts: Facts, maps: SiteMaps, key: Source) -> WindowMatch | Decline:
    attention, node = maps.attention, maps.attention.softmax.label
    shape = attention.output_shape
    reads = dependencies([key.candidate.index[a] for a in key.roles.tokens])
    if key.candidate.domain is not None:
        reads |= frozenset(a for a, e in enumerate(key.candidate.domain.shape) if e > 1)
    window_axes = [a for a in maps.token_axes if a in reads or not isinstance(shape[a], int)]
    query_axes = [a for a in maps.token_axes if a not in window_axes]
    tables = _tables(maps, key, window_axes, query_axes)
    if isinstance(tables, Decline):
        return tables
    queries, keys, element = tables
    query = settled(maps, "query", maps.query)
    if isinstance(query, str):
        overlap = _overlap(maps, window_axes, query_axes, element)
        rearranged = "the tokens are rearranged before the attention in a way that its output does not undo"
        return Decline(overlap or rearranged, query)
    if len(queries) == 1:
        known = {"num_heads": maps.num_heads, "head_dim": attention.head_dim, "feature_size": maps.query.spatial}
        if reads_alike(attention.key_axis, maps.sources["key"]) is None:
            return made_inside(maps.sources["query"])
        found = global_attention(queries.size, keys.size, node, **known)
        masked = next((t for t in attention.computed_terms if t.excludes is not None), None)
        if masked is None:
            return found
        return replace(found, reason=f"{found.reason}; a mask computed from data excludes some", node=masked.node.label)
    own_keys = Decline("every query has keys of its own, so these are no windows", node, foreign=True)
    single = queries.shape[1] == 1
    widened = len(maps.query.spatial) > len(maps.query.spatial_axes)  # by axes of one pixel
    if single and (widened or np.bincount(keys.reshape(-1) - PADDING).max() > 1):
        return own_keys
    fitted = fit_windows(queries, maps.query.spatial)
    if isinstance(fitted, str):
        return Decline(fitted, node)
    geometry, window_order, query_order = fitted
    placed = fit_keys(keys[window_order], key.spatial, geometry)
    if isinstance(placed, str):
        return own_keys if single else Decline(placed, node)
    geometry, key_order = placed
    value = _matching_value(maps, keys, window_axes, key.spatial, element)
    if isinstance(value, Decline):
        return value
    settled_key, settled_value = settled(maps, "key", key), settled(maps, "value", value)
    for name, source in (("key", settled_key), ("value", settled_value)):
        if isinstance(source, str):
            return Decline(
                f"the {name} tokens are rearranged before the windows in a way that the output does not undo", source
            )
    assert isinstance(settled_key, Source) and isinstance(settled_value, Source)
    order = Order(window_axes, query_axes, element, window_order, query_order, key_order)
    terms = constant_terms(maps, order)
    if isinstance(terms, Decline):
        return terms
    bias, mask, mask_value = _split_terms(terms, geometry, maps.attention.softmax_dtype)
    merged = geometry.merged()
    key_window = merged.window_size if merged.keys is None else merged.keys.window_size
    relative = relative_position(maps, order, merged.window_size, key_window)
    chosen = replace(maps, query=query, keys=(settled_key,), values=(settled_value,))
    computed = computed_terms(facts, chosen, order)
    if isinstance(relative, Decline):
        return relative
    if isinstance(computed, Decline):
        return computed
    shared = _shared(maps, order) if maps.shared else None
    if isinstance(shared, Decline):
        return shared
    return WindowMatch(
        replace(maps, query=query, shared=() if shared is None else (shared,)),
        geometry,
        order,
        settled_key,
        settled_value,
        bias,
        mask,
        mask_value,
        relative,
        computed,
        shared,
    )


def _shared(maps: SiteMaps, order: Order) -> Source | Decline:
    """The nearest source of the shared queries that lists them as the windows list their tokens."""
    batch = np.arange(len(order.element))[:, None, None]
    for source in maps.shared:
        table = _pixels(maps, source, order.windows, order.queries, keys=False)[order.element]
        tokens = table.shape[2]
        if (table // tokens != batch).any():
            continue
        if np.array_equal((table - batch * tokens)[0, 0, order.query], np.arange(tokens)):
            return source
    return Decline(
        "the queries that all windows share are another image's, or listed in another order than a window's pixels",
        maps.shared[0].value.name,
    )


Tables = tuple[np.ndarray, np.ndarray, np.ndarray]


def _tables(maps: SiteMaps, key: Source, window_axes: list[int], query_axes: list[int]) -> Tables | Decline:
    """Pixels of queries [nW, N] and keys [nW, M] of one batch element, and the rows of each element, int64 [B, nW]."""
    queries = _pixels(maps, maps.query, window_axes, query_axes, keys=False)
    keys = _pixels(maps, key, window_axes, [], keys=True)
    batch, extent = _static_batch(maps.query), math.prod(maps.query.spatial)
    node = maps.attention.softmax.label
    if len(queries) % batch or len(keys) != len(queries):
        return Decline("the windows do not divide evenly over the batch", node)
    element = np.argsort(queries.max(axis=1) // extent, kind="stable").reshape(batch, -1)
    for table, source in ((queries, maps.query), (keys, key)):
        offset = np.arange(batch)[:, None, None] * math.prod(source.spatial)
        rows = table[element]
        local = np.where(rows == PADDING, PADDING, rows - offset)
        if _static_batch(source) != batch:
            ours, theirs = (f"{_static_batch(s)} x {by(s.spatial)} tokens" for s in (maps.query, source))
            return Decline(f"no map holds both the queries (from {ours}) and the keys (from {theirs})", node)
        if local.max() >= math.prod(source.spatial) or local.min() < PADDING:
            return Decline("windows reach from one batch element into another", node)
        if (local != local[:1]).any():
            return Decline("the windows of one batch element are not those of another", node)
    return queries[element[0]], keys[element[0]], element


def _overlap(maps: SiteMaps, window_axes: list[int], query_axes: list[int], element: np.ndarray) -> str | None:
    """That pixels are queries of several windows, on the smallest map on the way of the queries for which it is so."""
    for source in sorted(maps.sources["query"], key=lambda s: math.prod(s.spatial)):
        extent = math.prod(source.spatial)
        try:
            rows = _pixels(maps, source, window_axes, query_axes, keys=False)[element[0]]
        except IndexingError:
            continue
        inside = (rows >= 0) & (rows < extent)
        if (rows >= extent).any() or not inside.any() or (np.sort(rows, axis=1) == np.sort(rows[0])).all():
            continue
        counts = np.bincount(rows[inside], minlength=extent)
        most = int(counts.max())
        if most > 1 and all(len(np.unique(row[row >= 0])) == (row >= 0).sum() for row in rows):
            pixel = tuple(int(c) for c in np.unravel_index(int(counts.argmax()), source.spatial))
            return f"the windows overlap: pixel {pixel} is a query in {most} of them, so it has {most} results"
    return None


def _static_batch(source: Source) -> int:
    """Batch elements the grid enumerates; 1 where the batch is symbolic (it passes through unenumerated)."""
    return count(source.batch)


def _pixels(
    maps: SiteMaps, source: Source, window_axes: Sequence[int], inner_axes: Sequence[int], *, keys: bool
) -> np.ndarray:
    attention = maps.attention
    extra = [(attention.key_axis, attention.num_keys)] if keys else []
    flat = flat_pixels(
        source.candidate, source.roles.tokens, attention.output_shape, [*window_axes, *inner_axes], extra
    )
    rows = math.prod(count(attention.output_shape[a]) for a in window_axes)
    return flat.reshape(rows, -1)


def _matching_value(
    maps: SiteMaps, keys: np.ndarray, window_axes: list[int], spatial: tuple[int, ...], element: np.ndarray
) -> Source | Decline:
    difference = None
    for value in maps.values:
        if value.spatial != spatial or _static_batch(value) != len(element):
            continue
        try:
            rows = _pixels(maps, value, window_axes, [], keys=True)[element]
        except IndexingError:
            continue
        offset = np.arange(len(element))[:, None, None] * math.prod(spatial)
        different = first_difference(np.where(rows == PADDING, PADDING, rows - offset), keys[None])
        if different is None:
            return value
        difference = difference or different
    node = maps.attention.softmax.label
    if difference is None:
        return Decline("the values come from no feature map like that of the keys", node)
    at, found_pixel, expected = difference.at[1:], difference.found, difference.expected
    return Decline(f"token {at} takes its key from pixel {expected} and its value from pixel {found_pixel}", node)


@dataclass(frozen=True)
class Seen:
    """How the windows lie on the map as its owner sees it: extents, window and pixel distance per axis."""

    kind: Kind
    feature_size: tuple[int, ...]
    window_size: tuple[int, ...]
    dilation: tuple[int, ...]


def seen_on_map(match: WindowMatch) -> Seen:
    """The windows on the view of the map with height and width as axes.

    A grid is windows with pixels between; a stripe one that spans a whole axis of the map and is no square; a halo has
    keys around its window, which neighbouring windows read too.
    """
    geometry = match.merged
    keys = geometry.keys
    plain = (geometry.feature_size, geometry.window_size, (1,) * len(geometry.window_size))
    if keys is not None:
        reach = [w * d for w, d in zip(keys.window_size, keys.dilation, strict=True)]
        overlaps = any(r > s for r, s in zip(reach, keys.stride, strict=True))
        return Seen("halo" if overlaps else "window", *plain)
    views = [q.spatial for q in match.maps.queries if 1 < len(q.spatial) < len(match.geometry.feature_size)]
    if len(geometry.feature_size) == 1:
        views = [q.spatial for q in match.maps.queries if len(q.spatial) > 1]
    whole = [row for row in geometry.pixels() if (row != PADDING).all()]
    views = [q.spatial for q in match.maps.queries if _is_a_line(q)] or views
    back, batch = match.maps.back.value, match.maps.query.batch
    if count(back.known_shape[0]) != count(batch):
        views = []  # the windows stay rows of the batch axis, which are no axis of a map
    if views and whole:
        spatial = min(views, key=len)
        axes = [np.unique(c) for c in np.unravel_index(whole[0], spatial)]
        steps = [np.unique(np.diff(a)) for a in axes]
        if math.prod(map(len, axes)) == geometry.tokens_per_window and not any(len(s) > 1 for s in steps):
            dilation = tuple(int(s[0]) if len(s) else 1 for s in steps)
            plain = (spatial, tuple(map(len, axes)), dilation)
    if any(d > 1 for d in plain[2]):
        return Seen("grid", *plain)
    stripe = _is_stripe(plain[0], plain[1]) and not _joins_tokens(match.maps.query)
    return Seen("stripe" if stripe else "window", *plain)


def _is_a_line(source: Source) -> bool:
    """Whether a map is a sequence from the beginning: an input of the model, or made by a 1-D convolution."""
    node = source.value.producer
    return len(source.spatial) == 1 and source.groups == 1 and (node is None or node.op == "Conv")


def _joins_tokens(source: Source) -> bool:
    """Whether the last token axis of a map is no axis of an image: tokens of several tensors were joined along it."""
    axis, rank = source.roles.tokens[-1], len(source.value.known_shape)
    pending, seen = [source.value], {source.value}
    while pending:
        node = pending.pop().producer
        if node is None or node.domain != STANDARD_DOMAIN:
            continue
        if node.op == "Concat" and node.attributes["axis"] % rank == axis:
            return len({_cut_from(value) for value in node.reads()}) > 1
        per_token = node.op in POINTWISE or channel_axis_of(node) not in (None, axis)
        for value in node.reads() if per_token else ():
            if value not in seen and value.rank == rank:
                seen.add(value)
                pending.append(value)
    return False


def _cut_from(value: Value) -> Value:
    """The tensor that a value is a piece of: the halves of a roll come from one."""
    node = value.producer
    return node.required(0) if node is not None and node.op in ("Slice", "Split") else value


def _is_stripe(extents: tuple[int, ...], window: tuple[int, ...]) -> bool:
    """Whether a window runs through the map from side to side; a square one is a window on a narrow map.

    In three dimensions, where a window may well be as deep as the map (all frames of a clip), only a row counts.
    """
    whole = [w == e for w, e in zip(window, extents, strict=True)]
    if len(extents) < 2 or not any(whole) or all(whole) or len(set(window)) == 1:
        return False
    return len(extents) == 2 or all(w == 1 for w, spans in zip(window, whole, strict=True) if not spans)


def constant_terms(maps: SiteMaps, order: Order) -> list[np.ndarray] | Decline:
    """The constant terms as arrays [nW or 1, nH or 1, N or 1, M or 1] of one batch element, in the op's order."""
    attention = maps.attention
    if any(t.lowest for t in attention.terms) and has_fully_masked_row(attention.terms, attention.key_axis):
        return Decline("a query has all its keys masked by a finite number", attention.softmax.label)
    found = []
    for term in attention.terms:
        arrays = term.values.reshape(term.values.shape + (1,) * (attention.grid_rank - term.values.ndim))
        groups = [list(order.windows), list(maps.heads), list(order.queries), [attention.key_axis]]
        flat = grouped(arrays, groups, attention)
        if flat.shape[0] > 1:
            first, *others = order.element
            if any((flat[rows] != flat[first]).any() for rows in others):
                return Decline("the mask differs between batch elements", term.node.label)
            flat = flat[first]
        found.append(_reordered(reduced(flat), order))
    return found


def _reordered(term: np.ndarray, order: Order) -> np.ndarray:
    for axis, positions in ((0, order.window), (2, order.query), (3, order.key)):
        if term.shape[axis] > 1:
            term = term.take(positions, axis=axis)
    return term


def _total(terms: list[np.ndarray]) -> np.ndarray:
    """Their sum in float64; one alone as it is."""
    return terms[0] if len(terms) == 1 else sum(terms[1:], terms[0].astype(np.float64))


Split = tuple[np.ndarray | None, np.ndarray | None, float | None]


def _split_terms(terms: list[np.ndarray], geometry: WindowGeometry, dtype: np.dtype) -> Split:
    """(bias, mask, mask_value): what all windows share, or has heads, apart from what differs between windows alone."""
    tokens, keys = geometry.tokens_per_window, geometry.keys_per_window
    per_window = [t for t in terms if t.shape[0] > 1 and t.shape[1] == 1]
    others = [t for t in terms if not (t.shape[0] > 1 and t.shape[1] == 1)]
    bias = None
    if others:
        total = _total(others)
        if (
            total.shape[0] > 1
            and not per_window
            and (parts := _bias_and_shift_mask(total, geometry, dtype)) is not None
        ):
            return np.broadcast_to(parts[0], (*parts[0].shape[:2], tokens, keys)), None, parts[1]
        if total.any():
            bias = np.broadcast_to(total, (*total.shape[:2], tokens, keys))
    mask = None
    if per_window:
        mask = _total(per_window)[:, 0]
        rows = tokens if geometry.keys is None else mask.shape[1]
        mask = np.broadcast_to(mask, (geometry.num_windows, rows, keys))
        mask_value = _shift_mask_value(mask, geometry)
        if mask_value is not None:
            return bias, None, mask_value
        if not mask.any():
            mask = None
    return bias, mask, None


def _shift_mask_value(mask: np.ndarray, geometry: WindowGeometry) -> float | None:
    """The penalty, where the mask is exactly Swin's shift mask of this geometry."""
    crosses = geometry.crosses_regions()
    if not crosses.any() or geometry.keys is not None:
        return None
    penalty = mask[crosses][0]
    same = penalty and np.array_equal(mask != 0, crosses) and (mask[crosses] == penalty).all()
    return float(penalty) if same else None


def _bias_and_shift_mask(
    total: np.ndarray, geometry: WindowGeometry, dtype: np.dtype
) -> tuple[np.ndarray, float] | None:
    """(bias, penalty) of a constant that is a bias plus the shift mask, added in `dtype`; None where it is not exactly
    that.
    """
    crosses = geometry.crosses_regions()
    plain = np.flatnonzero(~crosses.any(axis=(1, 2)))
    if not crosses.any() or not len(plain) or total.shape[2:] != crosses.shape[1:] or geometry.keys is not None:
        return None
    bias = total[plain[:1]]
    where = np.broadcast_to(crosses[:, None], total.shape)
    penalty = float(np.round(np.median((total - bias)[where]), 3))
    if not np.isfinite(penalty):
        return None
    rebuilt = np.where(where, bias.astype(dtype) + np.asarray(penalty, dtype), bias)
    return (bias, penalty) if np.array_equal(rebuilt, total) else None
