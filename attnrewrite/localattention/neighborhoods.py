"""Is this attention neighbourhood attention? Token tables of one site against the closed form of neighbourhoods.

Keys and values may be pure shifts of their maps (unfold in any spelling), or learned shifts: a depthwise convolution
with one filter per channel and slot, which Slide-Transformer merges from a fixed shift and a learned kernel. A bias on
the keys that differs from slot to slot is kept apart as well.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from attnrewrite.facts import Facts
from attnrewrite.graph import STANDARD_DOMAIN, Value
from attnrewrite.indexing.map import Coordinate, IndexingError, dependencies, first_difference, reduced
from attnrewrite.indexing.provenance import provenances
from attnrewrite.indexing.rules import broadcast_index
from attnrewrite.localattention.attention import Attention
from attnrewrite.localattention.contraction import Operand
from attnrewrite.localattention.geometry import NeighborhoodGeometry, by
from attnrewrite.localattention.logits import constant_at
from attnrewrite.localattention.maps import SiteMaps, Source, count, flat_pixels, grouped, read_maps, settled
from attnrewrite.localattention.site import Decline


@dataclass(frozen=True, eq=False)
class Shifted:
    """An operand below its learned shifts: element(slot) = sum_t kernel[slot, t] * map[p + off(t)] + bias[slot].

    kernel, bias: arrays over the grid (features and slots), kernel with the taps as one more last axis; None where
    absent. taps, dilation: of the convolution, per spatial axis; None without one.
    """

    operand: Operand
    kernel: np.ndarray | None = None
    bias: np.ndarray | None = None
    taps: tuple[int, ...] | None = None
    dilation: tuple[int, ...] | None = None


@dataclass(frozen=True, eq=False)
class NeighborhoodMatch:
    """A site proved to be neighbourhood attention with zero borders.

    bias: float64 [nH or 1, K] on the logits, or None. The kernels are float64 [nH*d, K, *kernel_size], their biases
    [nH*d, K], in the geometry's slot order, or None.
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


def match_neighborhood(facts: Facts, attention: Attention) -> NeighborhoodMatch | Decline:
    """The neighbourhood geometry of an attention, or the reason why it is none."""
    added = [t.node for t in attention.query_terms] + [t.node for t in attention.computed_terms]
    if added:
        return Decline("a tensor computed from data is added to the logits", added[0].label)
    try:
        key = peel_shifts(attention.key, attention, facts.positions)
        value = peel_shifts(attention.value, attention, facts.positions)
        maps = read_maps(facts, replace(attention, key=key.operand, value=value.operand))
        return maps if isinstance(maps, Decline) else _match(maps, key, value)
    except IndexingError as error:
        return Decline(str(error), attention.softmax.label)


def peel_shifts(operand: Operand, attention: Attention, positions: Mapping[Value, int]) -> Shifted:
    """Take a slot-dependent bias and a learned shift convolution off an operand; without either it stays as it is."""
    slot = attention.key_axis
    value, index = operand.value, operand.index
    bias: np.ndarray | None = None
    while True:
        last = None
        for last in provenances(value, index, positions):
            if last.domain is not None:
                break
        node = None if last is None else last.value.producer
        if last is None or node is None or last.domain is not None or node.domain != STANDARD_DOMAIN:
            return _without_convolution(operand, value, index, bias)
        if node.op == "Add" and len([v for v in node.inputs if v is not None and v.is_constant]) == 1:
            data, other = node.required(0), node.required(1)
            data, other = (other, data) if data.is_constant else (data, other)
            added = constant_at(other, broadcast_index(last.index, other))
            if added.ndim <= slot or added.shape[slot] == 1:
                return _without_convolution(operand, value, index, bias)
            bias = added if bias is None else bias + added
            value, index = data, broadcast_index(last.index, data)
            continue
        if node.op == "Conv":
            shifted = _shift_convolution(last.value, last.index, slot)
            if shifted is not None:
                own = shifted.bias if bias is None else bias if shifted.bias is None else bias + shifted.bias
                return replace(shifted, bias=own)
        return _without_convolution(operand, value, index, bias)


def _without_convolution(
    operand: Operand, value: Value, index: tuple[Coordinate, ...], bias: np.ndarray | None
) -> Shifted:
    return Shifted(operand) if bias is None else Shifted(Operand(value, index), bias=bias)


def _shift_convolution(value: Value, index: tuple[Coordinate, ...], slot: int) -> Shifted | None:
    """out[b, o, p] = sum_t weight[o, t] * in[b, o // m, p + off(t)] + bias[o] with the slot numbered by o."""
    node = value.producer
    assert node is not None
    data, weight = node.required(0), node.constant(1)
    if weight is None or data.shape is None or weight.shape[1] != 1 or node.attributes.get("group", 1) != data.shape[1]:
        return None
    spatial = weight.ndim - 2
    dilation = tuple(node.attributes.get("dilations") or [1] * spatial)
    taps = weight.shape[2:]
    same = [d * (k // 2) for k, d in zip(taps, dilation, strict=True)] * 2
    strides = node.attributes.get("strides") or [1] * spatial
    if any(k % 2 == 0 for k in taps) or list(node.attributes.get("pads") or [0] * (2 * spatial)) != same:
        return None
    if any(s != 1 for s in strides) or node.attributes.get("auto_pad", "NOTSET") != "NOTSET":
        return None
    filters = index[1].static("a convolution")
    if filters.shape[slot] == 1:
        return None
    kernel = weight.reshape(weight.shape[0], -1).astype(np.float64)[filters]
    offsets = node.constant(2)
    bias = None if offsets is None else offsets.astype(np.float64)[filters]
    channels = data.shape[1]
    if not isinstance(channels, int):
        return None
    channel = Coordinate(reduced(filters // (weight.shape[0] // channels)))
    read = (index[0], channel, *index[2:])
    if slot in dependencies(read):
        return None  # another channel or place for every slot: the convolution's filters are no slots
    return Shifted(Operand(data, read), kernel, bias, tuple(taps), dilation)


def _match(maps: SiteMaps, key: Shifted, value: Shifted) -> NeighborhoodMatch | Decline:
    node = maps.attention.softmax.label
    if key.kernel is None and not _moves_with_query(maps):
        return Decline("the keys do not move with the query, so this is no neighbourhood", node, foreign=True)
    nearest: Decline | None = None
    for source in maps.keys:
        found = _match_key(maps.facing(source), source, key, value)
        if isinstance(found, NeighborhoodMatch):
            return found
        nearest = found
    return nearest or Decline("the keys come from no feature map", node)


def _moves_with_query(maps: SiteMaps) -> bool:
    tokens, slot = frozenset(maps.token_axes), maps.attention.key_axis
    return any(slot in c.depends_on() and c.depends_on() & tokens for k in maps.keys for c in k.candidate.index)


def _match_key(maps: SiteMaps, key_source: Source, key: Shifted, value: Shifted) -> NeighborhoodMatch | Decline:
    attention, node = maps.attention, maps.attention.softmax.label
    spatial = maps.query.spatial
    queries = _query_table(maps)
    order = np.argsort(queries, kind="stable")
    if not np.array_equal(queries[order], np.arange(len(queries))):
        return Decline("the queries are not the pixels of the map, one each", node)
    keys = _fit_operand(maps, "key", key, (key_source,), order, spatial)
    if isinstance(keys, Decline):
        return keys
    values = _fit_operand(maps, "value", value, maps.values, order, spatial)
    if isinstance(values, Decline):
        return values
    _, geometry, slots = keys
    value_source, value_geometry, value_slots = values
    if geometry != value_geometry or not np.array_equal(slots, value_slots):
        return Decline(f"keys lie in a {by(geometry.kernel_size)} neighbourhood, values in another", node)
    query = settled(maps, "query", maps.query)
    if isinstance(query, str):
        return Decline("the query tokens are rearranged in a way that the output does not undo", query)
    bias = _logit_bias(maps, slots)
    if isinstance(bias, Decline):
        return bias
    return NeighborhoodMatch(
        replace(maps, query=query), geometry, key_source, value_source, bias,
        _per_slot(key.kernel, maps, attention.channel_axis, slots, geometry.kernel_size),
        _per_slot(key.bias, maps, attention.channel_axis, slots, None),
        _per_slot(value.kernel, maps, attention.value_axis, slots, geometry.kernel_size),
        _per_slot(value.bias, maps, attention.value_axis, slots, None),
    )  # fmt: skip


def _query_table(maps: SiteMaps) -> np.ndarray:
    """Flat position, batch included, that each output token's query reads."""
    shape = maps.attention.output_shape
    return flat_pixels(maps.query.candidate, maps.query.roles.tokens, shape, list(maps.token_axes)).reshape(-1)


Fitted = tuple[Source, NeighborhoodGeometry, np.ndarray]


def _fit_operand(
    maps: SiteMaps, name: str, shifted: Shifted, found: tuple[Source, ...], order: np.ndarray, spatial: tuple[int, ...]
) -> Fitted | Decline:
    attention, node = maps.attention, maps.attention.softmax.label
    nearest: Decline | None = None
    for source in found:
        if source.spatial != spatial:
            maps_of = f"the {name}s come from a {by(source.spatial)} map, the queries from a {by(spatial)} map"
            nearest = nearest or Decline(maps_of, node, foreign=True)
            continue
        if any(f.number for _, f in source.candidate.fills) or any(depth for depth, _ in source.candidate.fills):
            nearest = nearest or Decline(f"{name}s outside the map are not zero", node)
            continue
        keys = attention.num_keys if shifted.kernel is None else 1
        table = flat_pixels(
            source.candidate,
            source.roles.tokens,
            attention.output_shape,
            list(maps.token_axes),
            [(attention.key_axis, keys)],
        ).reshape(len(order), keys)[order]
        if shifted.kernel is not None:
            assert shifted.taps is not None and shifted.dilation is not None
            geometry = NeighborhoodGeometry(spatial, shifted.taps, shifted.dilation)
            if geometry.keys_per_query != attention.num_keys:
                return Decline(f"{attention.num_keys} slots are made by a {by(shifted.taps)} kernel", node)
            if (difference := first_difference(table[:, 0], np.arange(len(table)))) is None:
                return source, geometry, np.arange(attention.num_keys)
            nearest = Decline(f"{name} pixel {difference.found} is shifted for query pixel {difference.expected}", node)
            continue
        fitted = _fit_neighborhood(table, spatial)
        if not isinstance(fitted, str):
            return source, *fitted
        if nearest is None:
            nearest = Decline(f"{name}s: {fitted}", node)
    return nearest or Decline(f"the {name}s come from no feature map", node)


def _fit_neighborhood(table: np.ndarray, spatial: tuple[int, ...]) -> tuple[NeighborhoodGeometry, np.ndarray] | str:
    """(geometry, slot order) with table[:, slot order] equal to the closed form for every batch element, or why not."""
    pixels = math.prod(spatial)
    elements = table.reshape(-1, pixels, table.shape[1])
    offset = np.arange(len(elements))[:, None, None] * pixels
    local = np.where(elements < 0, elements, elements - offset)
    if (local != local[:1]).any():
        return "neighbours differ between batch elements"
    rows = local[0]
    nearest = "the keys are no rectangle of pixels around the query"
    for sizes in _sizes(spatial):
        offsets = _offsets(rows, sizes)
        if offsets is None:
            continue
        axes = [np.unique(o) for o in offsets.T]
        if math.prod(map(len, axes)) != len(offsets) or any(len(a) % 2 == 0 for a in axes):
            continue
        steps = [int(a[1] - a[0]) if len(a) > 1 else 1 for a in axes]
        geometry = NeighborhoodGeometry(sizes, tuple(map(len, axes)), tuple(steps))
        slots = np.lexsort(offsets.T[::-1])
        difference = first_difference(rows[:, slots], geometry.pixels())
        if difference is None:
            return geometry, slots
        kernel = by(geometry.kernel_size)
        at, found, expected = difference.at, difference.found, difference.expected
        nearest = (
            f"slot {at[1]} of query pixel {at[0]} reads pixel {found}, a {kernel} neighbourhood reads {expected} "
            "(-1: outside)"
        )
    return nearest


def _sizes(spatial: tuple[int, ...]) -> list[tuple[int, ...]]:
    if len(spatial) > 1:
        return [spatial]
    total = spatial[0]
    heights = [h for h in range(2, total) if total % h == 0 and total // h > 1]
    return [spatial, *((h, total // h) for h in sorted(heights, key=lambda h: abs(h - math.isqrt(total))))]


def _offsets(rows: np.ndarray, sizes: tuple[int, ...]) -> np.ndarray | None:
    """Key minus query position per slot and axis, int64 [K, axes]; None where a slot's offset is not one."""
    inside = rows >= 0
    if not inside.any(axis=0).all():
        return None
    first = inside.argmax(axis=0)
    reads = rows[first, np.arange(rows.shape[1])]
    return np.stack(
        [a - b for a, b in zip(np.unravel_index(reads, sizes), np.unravel_index(first, sizes), strict=True)], axis=1
    )


def _logit_bias(maps: SiteMaps, slots: np.ndarray) -> np.ndarray | Decline | None:
    attention = maps.attention
    total: np.ndarray | None = None
    for term in attention.terms:
        values = term.values.reshape(term.values.shape + (1,) * (attention.grid_rank - term.values.ndim))
        if any(values.shape[a] > 1 for a in maps.token_axes):
            return Decline("a mask differs from pixel to pixel", term.node.label)
        flat = grouped(values, [list(maps.heads), [attention.key_axis]], attention)
        total = flat if total is None else total + flat
    if total is None or not total.any():
        return None
    return np.broadcast_to(total, (total.shape[0], attention.num_keys))[:, slots]


def _per_slot(
    array: np.ndarray | None, maps: SiteMaps, channel_axis: int, slots: np.ndarray, taps: tuple[int, ...] | None
) -> np.ndarray | None:
    """[nH*d, K] (or with taps [nH*d, K, *kernel_size]) of an array over features and slots."""
    if array is None:
        return None
    attention = maps.attention
    shape = attention.output_shape
    channels = attention.head_dim if channel_axis == attention.channel_axis else count(shape[channel_axis])
    tail = 0 if taps is None else array.shape[-1]
    axes = [*maps.heads, channel_axis, attention.key_axis]
    extents = [*(count(shape[a]) for a in maps.heads), channels, attention.num_keys]
    order = axes + [a for a in range(attention.grid_rank) if a not in axes]
    rest = [array.shape[a] for a in order[len(axes) :]]
    if any(e != 1 for e in rest):
        raise IndexingError("the shift kernels differ from pixel to pixel")
    last = [] if taps is None else [attention.grid_rank]
    moved = array.transpose(order + last).reshape([array.shape[a] for a in axes] + ([tail] if taps is not None else []))
    full = np.broadcast_to(moved, extents + ([tail] if taps is not None else []))
    flat = full.reshape(math.prod(extents[:-1]), extents[-1], *(() if taps is None else taps))
    return flat[:, slots]
