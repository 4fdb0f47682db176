"""Windows that hold tokens of their own: class, register or summary tokens, joined to the keys of every window.

An attention over [extra tokens, tokens of the window] is read in parts. Restricted to the window's own queries and keys
it is window attention like any other; restricted to the other keys it says where the extra tokens come from. The map
ends at the operator that joins the two (Concat), so nothing else could be read there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from attnrewrite.dims import Dim, Extent
from attnrewrite.facts import Facts
from attnrewrite.graph import Value
from attnrewrite.indexing.map import IndexingError
from attnrewrite.indexing.rules import Read, sources
from attnrewrite.localattention.attention import Attention, restricted
from attnrewrite.localattention.contraction import Operand
from attnrewrite.localattention.grid import count, flat_pixels
from attnrewrite.localattention.maps import ExtraSource, ExtraTokens, SiteMaps, read_maps
from attnrewrite.localattention.site import Decline
from attnrewrite.localattention.terms import Order
from attnrewrite.localattention.tokens import Candidate, Roles, candidates, roles
from attnrewrite.localattention.windows import WindowMatch, constant_terms, match_windows


@dataclass(frozen=True, eq=False)
class Joined:
    """A value that joins several tensors along one axis of the grid: int64 positions of each piece, largest first."""

    value: Value
    pieces: tuple[np.ndarray, ...]

    def others(self, own: np.ndarray) -> np.ndarray:
        return np.sort(np.concatenate([p for p in self.pieces if p is not own]))


def match_with_extra_tokens(
    facts: Facts, attention: Attention, is_made_of: Callable[[WindowMatch], bool]
) -> WindowMatch | Decline | None:
    """The windows of an attention whose keys are joined with tokens of another origin; None where they are not.

    is_made_of: whether a match's query is a function of the map it was traced to. Declines where the tokens of the map
    are windows, and the extra ones cannot be operands of the op.
    """
    for joined in _joined(facts, attention, attention.key, attention.key_axis):
        for queries in _own_queries(facts, attention):
            for own in joined.pieces:
                if len(own) == 1:
                    break  # a neighbourhood of slices: one place of it is no window
                found = _match_piece(facts, queries, joined, own)
                if isinstance(found, Decline) or (found is not None and is_made_of(found)):
                    return found
    return None


def _match_piece(facts: Facts, attention: Attention, joined: Joined, own: np.ndarray) -> WindowMatch | Decline | None:
    """own: the keys of the map among those joined."""
    maps = read_maps(facts, restricted(attention, attention.key_axis, own))
    found = maps if isinstance(maps, Decline) else match_windows(facts, maps)
    if isinstance(maps, Decline) or isinstance(found, Decline) or found.geometry.tokens_per_window == 1:
        return None
    others, node = joined.others(own), joined.value.name
    tokens = "1 token that is" if len(others) == 1 else f"{len(others)} tokens that are"
    left = f"the windows hold {tokens} not on the map ({node})"
    if attention.query_terms or attention.computed_terms:
        return Decline(f"{left}, and their logits have computed terms", node)
    if attention.kept is not None and _is_read_elsewhere(facts, attention.output, maps.back.value):
        return Decline(f"{left}, and what these tokens attend is used as well", node)
    try:
        value = next(_joined(facts, attention, attention.value, attention.key_axis), None)
        if value is None:
            raise IndexingError("their values are not joined as they are")
        beside = beside_the_map(attention, others)
        key_source = _source(facts, maps, beside, beside.key, found.order, joined)
        value_source = _source(facts, maps, beside, beside.value, found.order, value)
        return _with_extra(found, ExtraTokens(beside, key_source, value_source), len(others))
    except IndexingError as error:
        return Decline(f"{left}: {error}", node)


def _own_queries(facts: Facts, attention: Attention) -> Iterator[Attention]:
    """The attention of the queries that may be those of the map: all, or one piece of queries that are joined too."""
    yield attention
    for axis in range(len(attention.output_shape)):
        if isinstance(attention.output_shape[axis], int):
            for joined in _joined(facts, attention, attention.query, axis):
                for piece in joined.pieces:
                    yield restricted(attention, axis, piece)


def _joined(facts: Facts, attention: Attention, operand: Operand, axis: int) -> Iterator[Joined]:
    """Values on the way of an operand that join tensors along this axis of the grid alone, nearest first."""
    for candidate in candidates(operand.value, operand.index, attention.channel_axis, facts.positions):
        node = candidate.value.producer
        if node is None or node.op != "Concat":
            continue
        found = sources(node, candidate.value, candidate.index)
        pieces = [_along(read, axis) for read in found or ()]
        whole = [p for p in pieces if p is not None]
        if len(whole) > 1 and len(whole) == len(pieces):
            yield Joined(candidate.value, tuple(sorted(whole, key=len, reverse=True)))


def _along(read: object, axis: int) -> np.ndarray | None:
    """int64: the positions along an axis at which a piece is read; None where other axes decide as well."""
    if not isinstance(read, Read) or read.where is None:
        return None
    if any(extent > 1 and a != axis for a, extent in enumerate(read.where.shape)):
        return None
    return np.flatnonzero(read.where.reshape(-1))


def beside_the_map(attention: Attention, slots: np.ndarray) -> Attention:
    """The attention at these keys. A lone one is asked for twice: a place that never changes would be taken for a
    feature.
    """
    return restricted(attention, attention.key_axis, np.repeat(slots, 2) if len(slots) == 1 else slots)


def _is_read_elsewhere(facts: Facts, output: Value, back: Value) -> bool:
    """Whether the model reads the attention's output by another way than the map it returns to."""
    pending, seen = [output], {output, back}
    while pending:
        value = pending.pop()
        if value in facts.graph.outputs:
            return True
        for user in facts.users(value):
            for made in user.outputs:
                if made not in seen:
                    seen.add(made)
                    pending.append(made)
    return False


# -- where the extra tokens come from ---------------------------------------------------------------------------------


def _with_extra(found: WindowMatch, extra: ExtraTokens, count: int) -> WindowMatch:
    """The match with `count` extra tokens as operands. IndexingError says why not."""
    maps, beside = found.maps, extra.attention
    if beside.scale.size != maps.attention.scale.size or (beside.scale != maps.attention.scale).any():
        raise IndexingError("their logits have a scale of their own")
    terms = constant_terms(replace(maps, attention=beside), replace(found.order, key=np.arange(beside.num_keys)))
    if isinstance(terms, Decline):
        raise IndexingError(terms.reason)
    per_window = [t[..., :count] for t in terms if t.shape[0] > 1 and t.shape[1] == 1]
    others = [t[..., :count] for t in terms if not (t.shape[0] > 1 and t.shape[1] == 1)]
    tokens, keys = found.geometry.tokens_per_window, found.geometry.keys_per_window
    bias = _columns(found.bias, others, (1, 1, tokens, keys), count)
    mask = None if found.mask is None else found.mask[:, None]
    mask = _columns(mask, per_window, (found.geometry.num_windows, 1, tokens, keys), count)
    held = [replace(s, table=s.table[:, :count]) for s in (extra.key, extra.value)]
    return replace(
        found,
        maps=replace(maps, extra=ExtraTokens(beside, held[0], held[1])),
        bias=bias,
        mask=None if mask is None else mask[:, 0],
    )


def _columns(
    own: np.ndarray | None, terms: Sequence[np.ndarray], shape: tuple[int, ...], extra: int
) -> np.ndarray | None:
    """A constant operand for the window's keys (shape where there is none) and behind them the extra ones."""
    beside = np.zeros((1, 1, 1, 1)) + sum(terms)
    if own is None and not beside.any():
        return None
    own = np.zeros(shape) if own is None else own
    rows = np.broadcast_shapes(own.shape[:3], beside.shape[:3])
    return np.concatenate([np.broadcast_to(a, (*rows, k)) for a, k in ((own, own.shape[3]), (beside, extra))], axis=3)


def _source(
    facts: Facts, maps: SiteMaps, attention: Attention, operand: Operand, order: Order, joined: Joined
) -> ExtraSource:
    """Where an operand comes from at the extra keys: before they are joined, not yet moved; or farther away, where
    they are fewer (not yet repeated for every window or image).
    """
    before = facts.positions[joined.value]
    found: Candidate | None = None
    split: Roles | None = None
    fewest = 0
    for candidate in candidates(operand.value, operand.index, attention.channel_axis, facts.positions):
        own = roles(candidate.value, candidate.index, maps.features)
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
    keys = [(attention.key_axis, attention.num_keys)]
    flat = flat_pixels(found, split.tokens, attention.output_shape, list(order.windows), keys)
    table = flat.reshape(-1, attention.num_keys)[order.element]
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
