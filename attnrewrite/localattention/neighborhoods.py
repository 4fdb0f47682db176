"""Is this attention neighbourhood attention? Token tables of one site against the closed form of neighbourhoods.

Keys and values may be pure shifts of their maps (unfold in any spelling), learned shifts (`shifts.py`), or all tokens
of a map under a constant mask that leaves a neighbourhood to every query.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from attnrewrite.facts import Facts
from attnrewrite.indexing.map import IndexingError, first_difference
from attnrewrite.localattention.attention import Attention
from attnrewrite.localattention.geometry import PADDING, NeighborhoodGeometry, by
from attnrewrite.localattention.grid import flat_pixels
from attnrewrite.localattention.maps import SiteMaps, read_maps, settled
from attnrewrite.localattention.neighborhood_fit import NO_RECTANGLE, Fit, fit_neighborhood
from attnrewrite.localattention.rows import DROPPED, Exclusion, QueryRows, exclusion, query_rows, terms_at
from attnrewrite.localattention.shifts import Shifted, peel_shifts, per_slot
from attnrewrite.localattention.site import Decline
from attnrewrite.localattention.sources import Source

# Slots are written out one by one: beyond this many keys the op would be longer than what it replaces.
MOST_KEYS = 1024


@dataclass(frozen=True, eq=False)
class NeighborhoodMatch:
    """A site proved to be neighbourhood attention.

    bias: float64 [nH or 1, K], or [nH or 1, P, K] where it differs from pixel to pixel, on the logits, or None; in the
    geometry's slot order. The kernels are float64 [nH*d, K, *kernel_size], their biases [nH*d, K], or None. masked:
    some keys were excluded by a constant mask, which the geometry stands for now.
    """

    maps: SiteMaps
    geometry: NeighborhoodGeometry
    key: Source
    value: Source
    bias: np.ndarray | None
    key_kernel: np.ndarray | None
    key_bias: np.ndarray | None
    value_kernel: np.ndarray | None
    value_bias: np.ndarray | None
    masked: bool = False


def match_neighborhood(facts: Facts, attention: Attention) -> NeighborhoodMatch | Decline:
    """The neighbourhood geometry of an attention, or the reason why it is none."""
    added = [t.node for t in attention.query_terms] + [t.node for t in attention.computed_terms]
    if added:
        return Decline("a tensor computed from data is added to the logits", added[0].label)
    try:
        key = peel_shifts(attention.key, attention, facts.positions)
        value = peel_shifts(attention.value, attention, facts.positions)
        found = _match_shifted(facts, attention, key, value)
        if isinstance(found, NeighborhoodMatch) or key.kernel is not None or value.kernel is not None:
            return found
        if key.bias is None and value.bias is None:
            return found
        # a constant that is the same in every slot may as well be the layer's own
        plain = _match_shifted(
            facts,
            attention,
            replace(key, operand=attention.key, bias=None),
            replace(value, operand=attention.value, bias=None),
        )
        return plain if isinstance(plain, NeighborhoodMatch) else found
    except IndexingError as error:
        return Decline(str(error), attention.softmax.label)


def _match_shifted(facts: Facts, attention: Attention, key: Shifted, value: Shifted) -> NeighborhoodMatch | Decline:
    maps = read_maps(facts, replace(attention, key=key.operand, value=value.operand))
    return maps if isinstance(maps, Decline) else _match(maps, key, value)


def _match(maps: SiteMaps, key: Shifted, value: Shifted) -> NeighborhoodMatch | Decline:
    node = maps.attention.softmax.label
    rows = query_rows(maps)
    if rows is None:
        return Decline("the queries are not the pixels of the map, one each", node)
    excluded = exclusion(rows)
    if key.kernel is None and excluded is None and not _moves_with_query(maps):
        return Decline("the keys do not move with the query, so this is no neighbourhood", node, foreign=True)
    if excluded is not None and excluded.lowest and excluded.empties_a_row:
        return Decline("a query has all its keys masked by a finite number", node)
    nearest: Decline | None = None
    # A padded or cropped map is one that the keys come from as well: the query's own map before all.
    for source in sorted(maps.keys, key=lambda s: s.spatial != maps.facing(s).query.spatial):
        found = _match_key(maps.facing(source), source, key, value, excluded)
        if isinstance(found, NeighborhoodMatch):
            return found
        nearest = found if nearest is None or (nearest.foreign and not found.foreign) else nearest
    return nearest or Decline("the keys come from no feature map", node)


def _moves_with_query(maps: SiteMaps) -> bool:
    tokens, slot = frozenset(maps.token_axes), maps.attention.key_axis
    return any(slot in c.depends_on() and c.depends_on() & tokens for k in maps.keys for c in k.candidate.index)


def _match_key(
    maps: SiteMaps, key_source: Source, key: Shifted, value: Shifted, excluded: Exclusion | None
) -> NeighborhoodMatch | Decline:
    attention, node = maps.attention, maps.attention.softmax.label
    rows = query_rows(maps)
    if rows is None:
        return Decline("the queries are not the pixels of the map, one each", node)
    if key.kernel is not None or value.kernel is not None:
        placed = _learned(rows, key_source, key, value)
    else:
        placed = _gathered(rows, key_source, excluded)
    if isinstance(placed, Decline):
        return placed
    sources = []
    for name, source in (("query", maps.query), ("key", key_source), ("value", placed.value)):
        found = settled(maps, name, source)
        if isinstance(found, str):
            return Decline(f"the {name} tokens are rearranged in a way that the output does not undo", found)
        sources.append(_whole(maps, name, found))
    bias = _logit_bias(rows, placed)
    if isinstance(bias, Decline):
        return bias
    geometry, slots = placed.geometry, placed.slots
    if slots.ndim > 1 and (key.bias is not None or value.bias is not None):
        return Decline("a bias on keys or values belongs to slots whose order changes from pixel to pixel", node)
    return NeighborhoodMatch(
        replace(maps, query=sources[0]), geometry, sources[1], sources[2], bias,
        per_slot(key.kernel, maps, attention.channel_axis, slots, geometry.kernel_size),
        per_slot(key.bias, maps, attention.channel_axis, slots, None),
        per_slot(value.kernel, maps, attention.value_axis, slots, geometry.kernel_size),
        per_slot(value.bias, maps, attention.value_axis, slots, None),
        excluded is not None,
    )  # fmt: skip


@dataclass(frozen=True, eq=False)
class Placed:
    """A geometry, and where its slots stand on the attention's key axis: int64 [K], or [rows, K] where that changes
    from row to row; PADDING for a slot without a key.
    """

    geometry: NeighborhoodGeometry
    slots: np.ndarray
    value: Source


def _gathered(rows: QueryRows, source: Source, excluded: Exclusion | None) -> Placed | Decline:
    """Keys read where they lie, those excluded left out."""
    maps, node = rows.maps, rows.maps.attention.softmax.label
    kept = None if excluded is None else excluded.kept(len(rows.order))
    if kept is not None:
        placed = _placed(rows, source, kept)
        if isinstance(placed, Placed) or not _moves_with_query(maps):
            return placed
    # What is excluded stays a bias of -inf where no border explains it.
    if maps.attention.num_keys > MOST_KEYS:
        return Decline(f"every query has {maps.attention.num_keys} keys", node, foreign=True)
    found = _placed(rows, source, None)
    return placed if kept is not None and isinstance(found, Decline) else found


def _placed(rows: QueryRows, source: Source, kept: np.ndarray | None) -> Placed | Decline:
    """kept: int64 [rows, K], the keys that are not excluded; None for all of them."""
    maps, attention = rows.maps, rows.maps.attention
    node, spatial = attention.softmax.label, maps.query.spatial
    if len(source.spatial) != len(spatial):
        maps_of = f"the keys come from a {by(source.spatial)} map, the queries from a {by(spatial)} map"
        return Decline(maps_of, node, foreign=True)
    if len({depth for depth, _ in source.candidate.fills}) > 1:
        return Decline("the keys are padded at two places, before and behind an operator", node)
    if kept is not None and kept.shape[1] > MOST_KEYS:
        return Decline(f"a constant mask leaves {kept.shape[1]} keys to a query", node, "global")
    table = rows.pixels_of(source, kept)
    if kept is not None and ((table == PADDING) & (kept != DROPPED)).any():
        return Decline("some keys are excluded by a mask, others lie in the padding", node)
    if kept is not None:
        table = np.where(kept == DROPPED, DROPPED, table)
    local = rows.of_one_element(table, math.prod(source.spatial))
    if local is None:
        return Decline("neighbours differ between batch elements", node)
    if (local == local[:1]).all():
        if kept is None:
            return Decline("every query has the same keys, so this is no neighbourhood", node, foreign=True)
        return Decline("a constant mask leaves the same keys to every query", node, "global")
    dropping = kept is not None and bool((local == DROPPED).any())
    fitted = fit_neighborhood(np.maximum(local, PADDING), spatial, source.spatial, excluding=kept is not None)
    if isinstance(fitted, str):
        return Decline(_about(fitted, kept is not None), node)
    value = _matching_value(rows, source, table, kept)
    if isinstance(value, Decline):
        return value
    geometry = _canonical(fitted.geometry, dropping)
    axes = list(zip(geometry.kernel_size, geometry.key_size, strict=True))
    if all(k >= e for k, e in axes):
        return Decline(f"a {by(geometry.kernel_size)} neighbourhood covers the whole map", node, "global")
    if all(k >= e or k == 1 for k, e in axes):
        return Decline("every query has the keys of its whole rows, so these are windows", node, foreign=True)
    return Placed(geometry, _slots(rows, fitted, kept), value)


def _whole(maps: SiteMaps, name: str, chosen: Source) -> Source:
    """The same map before its heads were taken apart: as many tokens in the same order, nothing computed between."""
    attention = maps.attention
    axes = [*maps.token_axes, *([] if name == "query" else [attention.key_axis])]
    shape = (*attention.output_shape, attention.num_keys, 1)
    own = None
    for source in maps.sources[name]:
        if source.candidate is chosen.candidate:
            own = flat_pixels(source.candidate, source.roles.tokens, shape, axes)
        alike = source.spatial == chosen.spatial and source.candidate.depth == chosen.candidate.depth
        if own is None or not alike or source.has_batch != chosen.has_batch:
            continue
        if np.array_equal(flat_pixels(source.candidate, source.roles.tokens, shape, axes), own):
            chosen = source
    return chosen


def _about(reason: str, masked: bool) -> str:
    if masked:
        left = "the keys that a constant mask leaves to a query"
        return f"{left} are no neighbourhood of it" if reason == NO_RECTANGLE else f"{left}: {reason}"
    return f"keys: {reason}"


def _canonical(geometry: NeighborhoodGeometry, dropping: bool) -> NeighborhoodGeometry:
    """Border "exclude" only where a slot lies outside."""
    return geometry if dropping or geometry.border != "exclude" else replace(geometry, border="zero")


def _slots(rows: QueryRows, fitted: Fit, kept: np.ndarray | None) -> np.ndarray:
    """The keys of the attention in every slot, int64 [K] or [rows, K]."""
    if kept is None:
        return fitted.columns if fitted.ordered else np.tile(fitted.columns, (rows.batch, 1))
    if fitted.ordered and (kept == kept[:1]).all():
        return kept[0][fitted.columns]
    columns = np.tile(np.broadcast_to(fitted.columns, (rows.pixels, fitted.columns.shape[-1])), (rows.batch, 1))
    return np.where(columns == PADDING, PADDING, np.take_along_axis(kept, np.maximum(columns, 0), 1))


def _matching_value(rows: QueryRows, key: Source, table: np.ndarray, kept: np.ndarray | None) -> Source | Decline:
    """The value map whose tokens stand where the keys' do."""
    maps, node = rows.maps, rows.maps.attention.softmax.label
    difference = None
    for value in maps.values:
        if value.spatial != key.spatial or len({depth for depth, _ in value.candidate.fills}) > 1:
            continue
        try:
            found = rows.pixels_of(value, kept)
        except IndexingError:
            continue
        found = found if kept is None else np.where(kept == DROPPED, DROPPED, found)
        different = first_difference(found, table)
        if different is None:
            return value
        difference = difference or different
    if difference is None:
        return Decline(f"the values come from no {by(key.spatial)} map like that of the keys", node)
    (row, slot), reads = (
        difference.at,
        ["outside" if p < 0 else f"pixel {p}" for p in (difference.expected, difference.found)],
    )
    return Decline(f"query pixel {row} takes key {slot} from {reads[0]} and its value from {reads[1]}", node)


def _learned(rows: QueryRows, key_source: Source, key: Shifted, value: Shifted) -> Placed | Decline:
    """Keys or values made by a convolution with learned filters per slot: a centred neighbourhood of zero border."""
    node = rows.maps.attention.softmax.label
    keys = _learned_operand(rows, "key", key, (key_source,))
    if isinstance(keys, Decline):
        return keys
    values = _learned_operand(rows, "value", value, rows.maps.values)
    if isinstance(values, Decline):
        return values
    _, geometry, slots = keys
    value_source, value_geometry, value_slots = values
    if geometry != value_geometry or not np.array_equal(slots, value_slots):
        return Decline(f"keys lie in a {by(geometry.kernel_size)} neighbourhood, values in another", node)
    return Placed(geometry, slots, value_source)


Operand = tuple[Source, NeighborhoodGeometry, np.ndarray]


def _learned_operand(rows: QueryRows, name: str, shifted: Shifted, found: tuple[Source, ...]) -> Operand | Decline:
    attention, spatial = rows.maps.attention, rows.maps.query.spatial
    node = attention.softmax.label
    nearest: Decline | None = None
    for source in found:
        if source.spatial != spatial:
            maps_of = f"the {name}s come from a {by(source.spatial)} map, the queries from a {by(spatial)} map"
            nearest = nearest or Decline(maps_of, node, foreign=True)
            continue
        if any(f.number or depth for depth, f in source.candidate.fills):
            nearest = nearest or Decline(f"{name}s outside the map are not zero", node)
            continue
        if shifted.kernel is not None:
            assert shifted.taps is not None and shifted.dilation is not None
            geometry = NeighborhoodGeometry(spatial, shifted.taps, shifted.dilation)
            if geometry.keys_per_query != attention.num_keys:
                return Decline(f"{attention.num_keys} slots are made by a {by(shifted.taps)} kernel", node)
            own = rows.pixels_of(source, np.zeros((1, 1), np.int64))[:, 0]
            if (difference := first_difference(own, np.arange(len(own)))) is None:
                return source, geometry, np.arange(attention.num_keys)
            nearest = Decline(f"{name} pixel {difference.found} is shifted for query pixel {difference.expected}", node)
            continue
        local = rows.of_one_element(rows.pixels_of(source), math.prod(spatial))
        fitted = (
            "neighbours differ between batch elements" if local is None else fit_neighborhood(local, spatial, spatial)
        )
        if isinstance(fitted, Fit) and fitted.ordered and fitted.geometry.is_plain and fitted.geometry.border == "zero":
            return source, fitted.geometry, fitted.columns
        nearest = nearest or Decline(f"{name}s: {fitted if isinstance(fitted, str) else NO_RECTANGLE}", node)
    return nearest or Decline(f"the {name}s come from no feature map", node)


def _logit_bias(rows: QueryRows, placed: Placed) -> np.ndarray | Decline | None:
    """float64 [nH or 1, K], or [nH or 1, P, K] where it differs from pixel to pixel."""
    attention, slots = rows.maps.attention, placed.slots
    keys = slots.shape[-1]
    total = terms_at(rows, slots if slots.ndim == 2 else slots[None])
    if total is None:
        return None
    total = np.broadcast_to(total, (*total.shape[:2], keys))
    outside = (
        np.tile(placed.geometry.pixels() == PADDING, (rows.batch, 1)) if "exclude" in placed.geometry.borders else None
    )
    if total.shape[1] > 1:
        elements = total.reshape(len(total), rows.batch, rows.pixels, keys)
        if rows.batch > 1 and not np.array_equal(elements, np.broadcast_to(elements[:, :1], elements.shape)):
            if outside is None:
                return Decline("the mask differs between batch elements", attention.softmax.label)
            hidden = np.where(outside.reshape(rows.batch, rows.pixels, keys), 0.0, elements)
            if not np.array_equal(hidden, np.broadcast_to(hidden[:, :1], hidden.shape)):
                return Decline("the mask differs between batch elements", attention.softmax.label)
        total = elements[:, 0]
        outside = None if outside is None else outside[: rows.pixels]
        # A slot outside the map has no key, so anything may be added to it: what the slot's other pixels have.
        first = np.zeros(keys, np.int64) if outside is None else outside.argmin(axis=0)
        typical = total[:, first, np.arange(keys)]
        if outside is not None:
            total = np.where(outside, typical[:, None], total)
        if np.array_equal(total, np.broadcast_to(typical[:, None], total.shape)):
            total = typical
    else:
        total = total[:, 0]
    return total if total.any() else None
