"""The proof of a replacement, apart from its match: maps pulled back through the body that was emitted.

The match says which closed form a site has. Here nobody asks for closed forms: the body of the new node is read as any
graph is, and for every output pixel the pixels of its keys and values, and what is added to its logits, must be those
of the original. Pixels are compared as integers, the order of keys aside.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from attnrewrite.dims import Dim, static
from attnrewrite.facts import Facts
from attnrewrite.frontend.fold import fold
from attnrewrite.functions import body_of, operands_of, spec_of
from attnrewrite.functions.spec import FlashWindowAttention
from attnrewrite.graph import Graph, Node, Value
from attnrewrite.indexing.map import Coordinate, Index, dependencies, identity, reduced, refined
from attnrewrite.indexing.provenance import provenances
from attnrewrite.localattention.attention import Attention, of_heads, read_attention, restricted
from attnrewrite.localattention.contraction import Operand
from attnrewrite.localattention.extra_queries import rows_by_place, tokens_asking
from attnrewrite.localattention.extra_sources import beside_the_map
from attnrewrite.localattention.geometry import PADDING
from attnrewrite.localattention.grid import count, flat_pixels, grouped, spread
from attnrewrite.localattention.maps import ExtraQueries, ExtraSource, ExtraTokens, SiteMaps
from attnrewrite.localattention.reads import Reads, Table
from attnrewrite.localattention.returns import returns_of
from attnrewrite.localattention.shared_query import read_window_maps
from attnrewrite.localattention.site import Decline
from attnrewrite.localattention.sources import Source
from attnrewrite.localattention.terms import grid_table
from attnrewrite.localattention.tokens import Roles, candidates, roles


class NotProved(Exception):
    """The emitted body does not read what the original reads; the message says where they part."""


def prove(maps: SiteMaps, node: Node, opset: int) -> None:
    """Raise NotProved unless the node's body reads what the original site reads."""
    if isinstance(spec_of(node), FlashWindowAttention):
        _prove_windows(maps, node, opset)
    else:
        _prove_slots(maps, node, opset)


def original_reads(maps: SiteMaps, learned: Collection[str] = ()) -> Reads:
    """The reads of a site as its graph says, of the first of the maps named for key and value.

    learned: of "key" and "value", those whose shifts are learned: they read the pixel itself in every slot, as the
    body's kernels do.
    """
    pixels, batch = math.prod(maps.query.spatial), _enumerated_batch(maps.query)
    order = _rows_of_pixels(maps)[:pixels]
    tables = []
    for name, source in (("key", maps.keys[0]), ("value", maps.values[0])):
        if _enumerated_batch(source) != batch:
            raise NotProved(f"the {name} has another batch than the query")
        tables.append(pixel_table(maps, source, order, learned=name in learned))
    sizes = (pixels, math.prod(maps.keys[0].spatial), math.prod(maps.values[0].spatial))
    return Reads(
        tables[0], tables[1], _terms(maps, order), sizes, _query_vectors(maps, order), _shared_queries(maps, order)
    )


def _rows_of_pixels(maps: SiteMaps) -> np.ndarray:
    """int64 [B * P]: the output's row, numbered over its token axes, of every pixel of the query's map."""
    query = maps.query
    shape, axes = maps.attention.output_shape, list(maps.token_axes)
    rows = flat_pixels(query.candidate, query.roles.tokens, shape, axes).reshape(-1)
    order = np.full(_enumerated_batch(query) * math.prod(query.spatial), -1, np.int64)
    order[rows[rows != PADDING]] = np.flatnonzero(rows != PADDING)
    if (order < 0).any():
        raise NotProved(f"no query is computed for pixel {int(np.argmax(order < 0))}")
    return order


def _extra_difference(maps: SiteMaps, body: SiteMaps) -> str | None:
    """Where the keys that are not on the map part: pixel by pixel, the tokens read and what is added to the logits."""
    if maps.extra is None or body.extra is None:
        only = "the original" if body.extra is None else "the replacement"
        return None if maps.extra is body.extra else f"only {only} has keys that are not on the map"
    original, emitted = _rows_of_pixels(maps), _rows_of_pixels(body)
    if len(original) != len(emitted):
        return "original and replacement have batches of different size"
    before = _extra_reads(replace(maps, attention=maps.extra.beside), original)
    after = _extra_reads(replace(body, attention=body.extra.beside), emitted, maps.extra)
    difference = before.difference(after, maps.attention.softmax_dtype)
    return None if difference is None else f"of the keys that are not on the map, {difference}"


def _extra_reads(maps: SiteMaps, rows: np.ndarray, held: ExtraTokens | None = None) -> Reads:
    """The reads, in these rows, of an attention at the extra keys alone. held: what the operands of the extra tokens
    hold, where `maps` reads these operands.
    """
    assert maps.extra is not None
    key, value = (pixel_table(maps, s, rows) for s in (maps.extra.key, maps.extra.value))
    if held is not None:
        key = replace(key, values=_in_operand(held.key, key.values))
        value = replace(value, values=_in_operand(held.value, value.values))
    return Reads(key, value, _terms(maps, rows))


def _in_operand(source: ExtraSource, places: np.ndarray) -> np.ndarray:
    """The tokens of the source that an operand made of it holds at these places, batch included in both."""
    held = source.table.reshape(-1)
    return places // held.size * (0 if source.batch == 1 else source.tokens) + held[places % held.size]


def _extra_query_difference(maps: SiteMaps, body: SiteMaps) -> str | None:
    """Where the queries that are not on the map part: row by row of the second output, the token that asks, the tokens
    it reads and what is added to its logits.
    """
    own, now = (None if m.extra is None else m.extra.asking for m in (maps, body))
    if own is None or now is None:
        only = "the original" if now is None else "the replacement"
        return None if own is now else f"only {only} has queries that are not on the map"
    assert maps.extra is not None and body.extra is not None
    original, emitted = rows_by_place(maps), rows_by_place(body)
    if len(original) != len(emitted):
        return f"{len(original)} queries that are not on the map ask in the original, {len(emitted)} now"
    asked, asks_now = tokens_asking(maps, original), _in_operand(own.source, tokens_asking(body, emitted))
    if (asked != asks_now).any():
        row = int(np.argmax(asked != asks_now))
        return f"row {row} of the second output is asked for by token {asked[row]} in the original, {asks_now[row]} now"
    before, after = _at_own_keys(maps, original), _at_own_keys(body, emitted)
    beside, beside_now = (
        replace(m, attention=beside_the_map(a.attention, a.attention.key_axis, m.extra.others))
        for m, a in ((maps, own), (body, now))
        if m.extra is not None
    )
    difference = before.difference(after, maps.attention.softmax_dtype) or _extra_reads(beside, original).difference(
        _extra_reads(beside_now, emitted, maps.extra), maps.attention.softmax_dtype
    )
    return None if difference is None else f"of the queries that are not on the map, {difference}"


def _at_own_keys(maps: SiteMaps, rows: np.ndarray) -> Reads:
    """The reads of the extra queries at the keys of the map, in these rows."""
    assert maps.extra is not None and maps.extra.asking is not None
    asking = maps.extra.asking.attention
    maps = replace(maps, attention=restricted(asking, asking.key_axis, maps.extra.own))
    key, value = (pixel_table(maps, s, rows) for s in (maps.keys[0], maps.values[0]))
    return Reads(key, value, _terms(maps, rows))


def _shared_queries(maps: SiteMaps, order: np.ndarray) -> np.ndarray | None:
    """int64 [T]: the token of the shared queries that each output row asks with; None where each has a query of its
    own.
    """
    if not maps.shared:
        return None
    source = maps.shared[0]
    axes = list(maps.token_axes)
    flat = flat_pixels(source.candidate, source.roles.tokens, maps.attention.output_shape, axes).reshape(-1)
    return flat[order]


def _query_vectors(maps: SiteMaps, order: np.ndarray) -> Table | None:
    """float64 [nH or 1, d, T, K]: what the query is multiplied with besides the keys, relative to the scale."""
    attention = maps.attention
    if not attention.query_terms:
        return None
    tables = [grid_table(term, attention) for term in attention.query_terms]
    scale = attention.scale.reshape(attention.scale.shape + (1,) * (attention.grid_rank - attention.scale.ndim))
    total = reduced(sum(tables[1:], tables[0]) / scale)
    shape, axes = attention.output_shape, [a for a in maps.token_axes if total.shape[a] > 1]
    kept = [(a, count(shape[a]) if total.shape[a] > 1 else 1) for a in maps.heads]
    heads = math.prod(e for _, e in kept)
    kept.append((attention.channel_axis, attention.head_dim))
    kept += [(a, count(shape[a])) for a in axes] + [(attention.key_axis, attention.num_keys)]
    vectors = spread(total, kept).reshape(heads, attention.head_dim, -1, attention.num_keys)
    return Table(vectors, _rows_along(maps, axes, order))


def pixel_table(maps: SiteMaps, source: Source | ExtraSource, order: np.ndarray, *, learned: bool = False) -> Table:
    """Flat pixels of the source that the key slots read, PADDING outside; one row for each of these output rows."""
    attention = maps.attention
    slots = 1 if learned else attention.num_keys
    axes = _token_axes_of(maps, source)
    extra = [(attention.key_axis, slots)]
    flat = flat_pixels(source.candidate, source.roles.tokens, attention.output_shape, axes, extra)
    table = np.broadcast_to(flat.reshape(-1, slots), (flat.size // slots, attention.num_keys))
    return Table(table, _rows_along(maps, axes, order))


def _token_axes_of(maps: SiteMaps, source: Source | ExtraSource) -> list[int]:
    """The token axes of the output on which it depends what the source is read at."""
    reads = dependencies([source.candidate.index[a] for a in source.roles.tokens])
    domain = source.candidate.domain
    if domain is not None:
        reads |= frozenset(a for a, e in enumerate(domain.shape) if e > 1)
    return [a for a in maps.token_axes if a in reads]


def _rows_along(maps: SiteMaps, axes: Sequence[int], order: np.ndarray) -> np.ndarray:
    """int64 [P]: rows of the output, numbered over all its token axes, as rows over these axes alone."""
    extents = [count(maps.attention.output_shape[a]) for a in maps.token_axes]
    positions = dict(zip(maps.token_axes, np.unravel_index(order, extents), strict=True))
    rows = np.zeros(len(order), np.int64)
    for axis in axes:
        rows = rows * count(maps.attention.output_shape[axis]) + positions[axis]
    return rows


def _terms(maps: SiteMaps, order: np.ndarray) -> Table:
    """float64 [nH or 1, T, K or 1]: what is added to the logits, the output's rows in this order."""
    attention = maps.attention
    total = Table(np.zeros((1, 1, 1)), np.zeros(len(order), np.int64))
    for term in attention.terms:
        values = term.values.reshape(term.values.shape + (1,) * (attention.grid_rank - term.values.ndim))
        axes = [a for a in maps.token_axes if values.shape[a] > 1]
        flat = grouped(values, [list(maps.heads), axes, [attention.key_axis]], attention)
        total = total + Table(flat, _rows_along(maps, axes, order)).compact()
    return total


def _enumerated_batch(source: Source) -> int:
    return count(source.batch)


def _prove_windows(maps: SiteMaps, node: Node, opset: int) -> None:
    """Heads with windows of their own are compared run by run."""
    start = 0
    for part in maps.groups or (maps,):
        end = start + part.num_heads
        body = _window_maps(node, opset, np.arange(start, end) if maps.groups else None)
        difference = original_reads(part).difference(original_reads(body), part.attention.softmax_dtype)
        difference = difference or _extra_difference(part, body) or _extra_query_difference(part, body)
        if difference is not None:
            raise NotProved(f"of heads {start} to {end - 1}, {difference}" if maps.groups else difference)
        start = end
    if maps.groups and start != spec_of(node).num_heads:
        raise NotProved(f"the original has {start} heads, the replacement {spec_of(node).num_heads}")


def _window_maps(node: Node, opset: int, heads: np.ndarray | None = None) -> SiteMaps:
    """The maps of the emitted body, its constant operands filled in; padding operands add values, not pixels. heads:
    int64, of these alone.
    """
    names = [n for n in operands_of(node) if not n.endswith("_padding")]
    bare = Node(
        node.op,
        [operands_of(node).get(n) if n in names else None for n in FlashWindowAttention.operands],
        [],
        node.attributes,
        "",
        node.domain,
    )
    body = body_of(bare, opset)
    formal = dict(zip(names, body.inputs, strict=True))
    for name in ("bias", "mask", "relative_position"):
        if name in formal:
            formal[name].set_constant(operands_of(node)[name].constant)
    fold(body)
    facts = Facts(body)
    softmax = next(n for n in body.nodes if n.op == "Softmax")
    attention = read_attention(facts, softmax)
    if heads is not None and not isinstance(attention, Decline):
        rows = refined(attention.output.known_shape, attention.output_shape)[0]  # the output is [B*nW, nH, N, dv]
        attention = of_heads(attention, len(rows), heads)
    extra = None if isinstance(attention, Decline) else _ExtraParts.of(attention, formal)
    if extra is not None:
        attention = extra.own
    maps = attention if isinstance(attention, Decline) else read_window_maps(facts, attention)
    if isinstance(maps, Decline):
        raise NotProved(f"the emitted body cannot be read: {maps.reason}")
    query, key, value = (formal[n] for n in ("query", "key", "value"))
    shared = [s for s in maps.shared if s.value is query]
    if len(shared) != bool(maps.shared):
        raise NotProved("the emitted body's query does not come from its operand alone")
    # What a shared query is computed for is the output's place, not its own.
    asked = body.outputs[0] if shared else query
    chosen = {}
    for name, target, sources in (
        ("query", asked, maps.queries),
        ("key", key, maps.keys),
        ("value", value, maps.values),
    ):
        found = [s for s in sources if s.value is target]
        if not found:
            raise NotProved(f"the emitted body's {name} does not come from its operand alone")
        chosen[name] = found[0]
    added = [t.value for t in maps.attention.computed_terms]
    if added != [formal[n] for n in ("logit_bias",) if n in formal]:
        raise NotProved("the emitted body adds other tensors to its logits")
    if body.outputs[0].known_shape[:-1] != asked.known_shape[:-1]:
        raise NotProved("the emitted body does not return to the map of its query")
    if extra is not None:
        maps = replace(maps, extra=extra.read(facts, maps, formal, body.outputs))
    return replace(maps, query=chosen["query"], keys=(chosen["key"],), values=(chosen["value"],), shared=tuple(shared))


@dataclass(frozen=True, eq=False)
class _ExtraParts:
    """The parts of the attention of an emitted body that has extra tokens: own, of the map alone; at its own queries
    and the extra keys; the extra queries, with all keys, where there are such.
    """

    own: Attention
    keys: tuple[np.ndarray, np.ndarray]
    beside: Attention
    whole: Attention
    rows: np.ndarray | None

    @staticmethod
    def of(attention: Attention, formal: Mapping[str, Value]) -> _ExtraParts | None:
        """None where there are no extra keys. formal: the body's inputs by name."""
        if "extra_key" not in formal:
            return None
        extra = static(formal["extra_key"].known_shape[2])
        own, others = np.split(np.arange(attention.num_keys), [attention.num_keys - extra])
        of_map, rows = attention, None
        if "extra_query" in formal:
            axis = attention.value_axis - 1
            total, asking = static(attention.output_shape[axis]), static(formal["extra_query"].known_shape[2])
            on_map, rows = np.split(np.arange(total), [total - asking])
            of_map = restricted(attention, axis, on_map)
        beside = beside_the_map(of_map, attention.key_axis, others)
        return _ExtraParts(restricted(of_map, attention.key_axis, own), (own, others), beside, attention, rows)

    def read(self, facts: Facts, maps: SiteMaps, formal: Mapping[str, Value], outputs: Sequence[Value]) -> ExtraTokens:
        """Raises NotProved where they are not the operands, or their result is not the second output."""
        key, value = (
            _operand_source(facts, maps, self.beside, operand, formal[name])
            for name, operand in (("extra_key", self.beside.key), ("extra_value", self.beside.value))
        )
        extra = ExtraTokens(*self.keys, self.beside, key, value)
        if self.rows is None:
            return extra
        axis = self.whole.value_axis - 1
        alone, asking = restricted(self.whole, axis, self.rows), beside_the_map(self.whole, axis, self.rows)
        source = _operand_source(facts, maps, asking, asking.query, formal["extra_query"])
        back = next((r for r in returns_of(facts, alone, maps.features) if r.value is outputs[1]), None)
        if back is None:
            raise NotProved("the emitted body does not return what its extra queries attend")
        place = np.arange(math.prod(count(e) for e in back.value.known_shape[:-1]))
        return replace(extra, asking=ExtraQueries(alone, axis, asking.query, source, back, place))


def _operand_source(facts: Facts, maps: SiteMaps, attention: Attention, read: Operand, operand: Value) -> ExtraSource:
    """The operand [B or 1, nW or 1, T, C] as it is read; its channels must pass through."""
    for way in candidates(read.value, read.index, attention.channel_axis, facts.positions):
        if way.value is operand and way.depth == 0 and way.domain is None:
            batch, tokens = operand.known_shape[0], [static(e) for e in operand.known_shape[1:3]]
            split = roles(operand, way.index, maps.features)
            own = way.index[0].batch == (count(batch) if isinstance(batch, Dim) else 0)
            if own and split is not None and split.features in ((3,), ()):
                table = np.arange(math.prod(tokens)).reshape(tokens)
                return ExtraSource(way, Roles((0, 1, 2), (3,)), batch, table.size, table)
    raise NotProved("the emitted body's extra keys do not come from their operand alone")


def _prove_slots(maps: SiteMaps, node: Node, opset: int) -> None:
    """SlideAttention: slot by slot, the pixel that the body's keys and values read. Padding operands add values, not
    pixels.
    """
    names = [n for n in type(spec_of(node)).operands if not n.endswith("_padding")]
    bare = Node(node.op, [operands_of(node).get(n) for n in names], [], node.attributes, "", node.domain)
    body = body_of(bare, opset)
    inputs = dict(zip(operands_of(bare), body.inputs, strict=True))
    facts = Facts(body)
    pixels = math.prod(static(e) for e in inputs["query"].known_shape[2:])
    found = {
        name: [_slot_pixels(facts, v, inputs, name, j, pixels) for j, v in enumerate(slots)]
        for name, slots in _slots(body).items()
    }
    keys, values = (np.stack(found[n], axis=1) for n in ("key", "value"))
    if pixels != math.prod(maps.query.spatial):
        raise NotProved("the emitted body does not return to the map of the original's query")
    learned = [n for n in ("key", "value") if f"{n}_kernel" in inputs]
    bias = operands_of(node).get("bias")
    terms = np.zeros((1, 1, 1))
    if bias is not None:
        constants = bias.constant.astype(np.float64)
        terms = constants if constants.ndim == 3 else constants[:, None]
    outside = _excluded(body)
    if outside is not None:
        terms = np.where(outside, -np.inf, terms)
    own, alike = np.arange(pixels), np.zeros(pixels, np.int64)
    added = Table(terms, own if terms.shape[1] > 1 else alike)
    sizes = tuple(math.prod(static(e) for e in inputs[n].known_shape[2:]) for n in ("query", "key", "value"))
    reads = Reads(Table(keys, own), Table(values, own), added, sizes)
    difference = original_reads(maps, learned).difference(reads, maps.attention.softmax_dtype)
    if difference is not None:
        raise NotProved(difference)


def _excluded(body: Graph) -> np.ndarray | None:
    """bool [P, K]: where the body's logits are replaced by -inf, whatever keys there are."""
    softmax = next(n for n in body.nodes if n.op == "Softmax")
    node = softmax.required(0).producer
    if node is None or node.op != "Where":
        return None
    condition, number = node.constant(0), node.constant(1)
    if condition is None or number is None or not np.isneginf(number).all():
        raise NotProved("the emitted body replaces logits by something else than -inf")
    table: np.ndarray = condition.reshape(condition.shape[-2:]).T
    return table


def _slots(body: Graph) -> dict[str, list[Value]]:
    """The keys and values that the body multiplies with query and weights, slot by slot."""
    softmax = next(n for n in body.nodes if n.op == "Softmax")
    value = softmax.required(0)
    while value.producer is not None and value.producer.op != "Concat":
        value = next(v for v in value.producer.inputs if v is not None and not v.is_constant)
    assert value.producer is not None
    keys = []
    for score in value.producer.inputs:
        assert score is not None and score.producer is not None
        product = _through(score.producer.required(0), "Mul")
        keys.append(product.required(1))
    split = next(n for n in body.nodes if n.op == "Split")
    weighted = {n.required(0): n.required(1) for n in body.nodes if n.op == "Mul" and n.required(0).producer is split}
    return {"key": keys, "value": [weighted[o] for o in split.outputs]}


def _through(value: Value, op: str) -> Node:
    node = value.producer
    while node is not None and node.op != op:
        node = node.required(0).producer
    assert node is not None
    return node


def _slot_pixels(facts: Facts, value: Value, inputs: dict[str, Value], name: str, slot: int, pixels: int) -> np.ndarray:
    """int64 [P]: the pixel of the operand that the slot reads for every output pixel; channels must pass through."""
    spatial = [static(e) for e in inputs["query"].known_shape[2:]]
    if value.producer is not None and value.producer.op == "Reshape":
        value = value.producer.required(0)  # [B, C, *S] -> [B, nH, dv, P]
    while True:
        last = None
        for last in _walk(value, facts):
            if last[0] is inputs[name]:
                return _pixels(last[1], inputs[name], last[2], spatial)
        assert last is not None
        node = last[0].producer
        if node is not None and node.op == "Add":
            value = node.required(0)  # the slot's bias
        elif node is not None and node.op == "Conv" and node.required(0) is inputs[name]:
            _check_kernel(facts, node.required(1), inputs[f"{name}_kernel"], slot)
            return np.arange(pixels)
        else:
            raise NotProved(f"slot {slot} of the emitted body does not read its {name} operand")


Step = tuple[Value, Index, np.ndarray | None]


def _walk(value: Value, facts: Facts) -> Iterator[Step]:
    for found in provenances(value, identity(value.known_shape), facts.positions):
        yield found.value, found.index, found.domain


def _pixels(index: Index, operand: Value, domain: np.ndarray | None, output: list[int]) -> np.ndarray:
    """Flat pixels of a channels-first operand read at an index whose grid is a [B, C, *output] tensor."""
    flat: np.ndarray = np.zeros((1,) * index[0].rank, np.int64)
    for extent, coordinate in zip(operand.known_shape[2:], index[2:], strict=True):
        flat = flat * static(extent) + coordinate.values
    if domain is not None:
        flat = np.where(domain, flat, PADDING)
    if not _passes_channels(index[0], index[1], operand):
        raise NotProved("a slot reads another channel or batch element than it writes")
    return np.broadcast_to(flat, (1, 1, *output)).reshape(-1)


def _passes_channels(batch: Coordinate, channel: Coordinate, operand: Value) -> bool:
    enumerated, channels = count(operand.known_shape[0]), count(operand.known_shape[1])
    flat = batch.values * channels + channel.values
    return bool(np.array_equal(flat.reshape(-1), np.arange(enumerated * channels)))


def _check_kernel(facts: Facts, weight: Value, kernel: Value, slot: int) -> None:
    for value, index, _ in _walk(weight, facts):
        if value is kernel:
            slots = index[1].values
            if slots.size == 1 and int(slots.reshape(-1)[0]) == slot:
                return
    raise NotProved(f"slot {slot} of the emitted body uses the kernel of another slot")
