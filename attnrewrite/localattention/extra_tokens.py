"""Windows that hold tokens of their own: class, register or summary tokens, joined to the tokens of every window.

An attention over [extra tokens, tokens of the window] is read in parts. Restricted to the window's own queries and keys
it is window attention like any other; restricted to the other keys it says where the extra tokens come from, and
restricted to the other queries what these attend. The map ends at the operator that joins the two (Concat), so nothing
else could be read there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from attnrewrite.facts import Facts
from attnrewrite.indexing.map import IndexingError
from attnrewrite.localattention.attention import Attention, restricted
from attnrewrite.localattention.extra_queries import read_extra_queries
from attnrewrite.localattention.extra_sources import Joined, beside_the_map, extra_source, joined
from attnrewrite.localattention.maps import ExtraTokens, SiteMaps, read_maps
from attnrewrite.localattention.returns import read_elsewhere
from attnrewrite.localattention.site import Decline
from attnrewrite.localattention.sources import Source
from attnrewrite.localattention.terms import Order, PlacedTerm, computed_terms
from attnrewrite.localattention.windows import WindowMatch, constant_terms, match_windows


@dataclass(frozen=True, eq=False)
class OwnQueries:
    """An attention restricted to queries that may be those of the map. joined, others: where other queries are joined
    to them, and which rows of that axis these are (int64).
    """

    attention: Attention
    joined: Joined | None = None
    others: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))


def match_with_extra_tokens(
    facts: Facts, attention: Attention, is_made_of: Callable[[WindowMatch], bool]
) -> WindowMatch | Decline | None:
    """The windows of an attention whose keys are joined with tokens of another origin; None where they are not.

    is_made_of: whether a match's query is a function of the map it was traced to. Declines where the tokens of the map
    are windows, and the extra ones cannot be operands of the op.
    """
    declined: Decline | None = None
    for keys in joined(facts, attention, attention.key, attention.key_axis):
        for queries in _own_queries(facts, attention):
            for own in keys.pieces:
                if len(own) == 1:
                    break  # a neighbourhood of slices: one place of it is no window
                found = _match_piece(facts, attention, queries, keys, own)
                if isinstance(found, Decline):
                    declined = declined or found
                elif found is not None and is_made_of(found):
                    return found
        if declined is not None:
            return declined
    return None


def ends_where_joined(facts: Facts, attention: Attention, key: Source) -> bool:
    """Whether a map of the keys is no farther away than where several tensors are joined to be the keys of a window."""
    position = facts.positions.get(key.value, -1)
    keys = joined(facts, attention, attention.key, attention.key_axis)
    return any(facts.positions[k.value] <= position for k in keys)


def _match_piece(
    facts: Facts, attention: Attention, queries: OwnQueries, keys: Joined, own: np.ndarray
) -> WindowMatch | Decline | None:
    """own: the keys of the map among those joined."""
    asking = replace(queries.attention, query_terms=(), computed_terms=())  # those are of all keys
    maps = read_maps(facts, restricted(asking, asking.key_axis, own))
    found = maps if isinstance(maps, Decline) else match_windows(facts, maps)
    if isinstance(maps, Decline) or isinstance(found, Decline) or found.geometry.tokens_per_window == 1:
        return None
    others, node = keys.others(own), keys.value.name
    tokens = "1 token that is" if len(others) == 1 else f"{len(others)} tokens that are"
    left = f"the windows hold {tokens} not on the map ({node})"
    if attention.query_terms:
        return Decline(f"{left}, and the queries are multiplied with relative positions", node)
    try:
        value = next(joined(facts, attention, attention.value, attention.key_axis), None)
        if value is None:
            raise IndexingError("their values are not joined as they are")
        beside = beside_the_map(asking, asking.key_axis, others)
        key_source = extra_source(facts, found.maps, beside, beside.key, found.order, keys, len(others))
        value_source = extra_source(facts, found.maps, beside, beside.value, found.order, value, len(others))
        extra = ExtraTokens(own, others, beside, key_source, value_source)
        if queries.joined is not None and read_elsewhere(facts, attention.output, {maps.back.value}) is not None:
            asked = read_extra_queries(facts, attention, found, extra, queries.joined, queries.others)
            extra = replace(extra, asking=asked)
        computed = _computed(facts, attention, found, extra, queries)
        if isinstance(computed, Decline):
            return replace(computed, reason=f"{left}: {computed.reason}")
        return replace(_with_extra(found, extra), computed=computed)
    except IndexingError as error:
        return Decline(f"{left}: {error}", node)


def _own_queries(facts: Facts, attention: Attention) -> Iterator[OwnQueries]:
    """The attention of the queries that may be those of the map: the largest piece of queries that are joined too (of
    class, register or carrier tokens there are fewer), or all.
    """
    for axis in range(len(attention.output_shape)):
        if isinstance(attention.output_shape[axis], int):
            for found in joined(facts, attention, attention.query, axis):
                for piece in (p for p in found.pieces if len(p) == len(found.pieces[0])):
                    yield OwnQueries(restricted(attention, axis, piece), found, found.others(piece))
    yield OwnQueries(attention)


# -- what is added to the logits --------------------------------------------------------------------------------------


def _with_extra(found: WindowMatch, extra: ExtraTokens) -> WindowMatch:
    """The match with the extra tokens as operands. IndexingError says why not."""
    maps, order, asking = found.maps, found.order, extra.asking
    rows = [found.geometry.tokens_per_window, 0 if asking is None else asking.count]
    columns = [found.geometry.keys_per_window, extra.count]
    terms = {
        (0, 0): (found.bias, None if found.mask is None else found.mask[:, None]),
        (0, 1): _terms(maps, extra.beside, replace(order, key=np.arange(extra.beside.num_keys))),
    }
    if asking is not None:
        order = replace(order, query=np.arange(asking.count))
        own, beside = (restricted(asking.attention, maps.attention.key_axis, k) for k in (extra.own, extra.others))
        terms[1, 0] = _terms(maps, own, order)
        terms[1, 1] = _terms(maps, beside, replace(order, key=np.arange(extra.count)))
    bias, mask = (_blocks({at: pair[k] for at, pair in terms.items()}, rows, columns) for k in range(2))
    if mask is not None:
        mask = np.broadcast_to(mask, (found.geometry.num_windows, *mask.shape[1:]))[:, 0]
    return replace(found, maps=replace(maps, extra=extra), bias=bias, mask=mask)


def _computed(
    facts: Facts, attention: Attention, found: WindowMatch, extra: ExtraTokens, queries: OwnQueries
) -> tuple[PlacedTerm, ...] | Decline:
    """The computed terms of all queries and keys, the extra ones behind those of the map."""
    order = replace(found.order, key=np.concatenate([extra.own[found.order.key], extra.others]))
    if queries.attention.kept is not None:
        rows = queries.attention.kept[1][order.query]
        order = replace(order, query=rows if extra.asking is None else np.concatenate([rows, queries.others]))
    chosen = replace(found.maps, attention=attention, keys=(found.key,), values=(found.value,), extra=extra)
    return computed_terms(facts, chosen, order)


def _terms(maps: SiteMaps, attention: Attention, order: Order) -> tuple[np.ndarray | None, np.ndarray | None]:
    """The constant terms as parts of bias and mask, [nW or 1, nH or 1, queries or 1, keys or 1]; None without any."""
    if attention.scale.size != maps.attention.scale.size or (attention.scale != maps.attention.scale).any():
        raise IndexingError("their logits have a scale of their own")
    found = constant_terms(replace(maps, attention=attention), order)
    if isinstance(found, Decline):
        raise IndexingError(found.reason)
    per_window = [t for t in found if t.shape[0] > 1 and t.shape[1] == 1]
    others = [t for t in found if not (t.shape[0] > 1 and t.shape[1] == 1)]
    bias, mask = (sum(terms[1:], terms[0]) if terms else None for terms in (others, per_window))
    return bias, mask


def _blocks(
    blocks: Mapping[tuple[int, int], np.ndarray | None], rows: Sequence[int], columns: Sequence[int]
) -> np.ndarray | None:
    """One array of the blocks (row, column of blocks) of these extents, zero where there is none; None for none at all.
    A block may hold more rows or columns than its extents, all alike.
    """
    present = {at: block for at, block in blocks.items() if block is not None and block.any()}
    if not present:
        return None
    lead = np.broadcast_shapes(*(block.shape[:2] for block in present.values()))
    whole = np.zeros((*lead, sum(rows), sum(columns)))
    for (row, column), block in present.items():
        above, left = sum(rows[:row]), sum(columns[:column])
        part = block[:, :, : rows[row], : columns[column]]
        whole[:, :, above : above + rows[row], left : left + columns[column]] = part
    return whole
