"""One site's token maps: for every output pixel, the pixels its query, keys and values come from.

Found by composing three ways: from the attention's output forward to the feature map it returns to, and from query, key
and value back to the feature maps they are made of. The right cut is where the query's map and the way of the output
agree: then the site is a function from feature maps to a feature map.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from attnrewrite.dims import Dim, Extent, proportion
from attnrewrite.facts import Facts
from attnrewrite.indexing.map import dependencies, identity
from attnrewrite.localattention.attention import Attention
from attnrewrite.localattention.contraction import Operand
from attnrewrite.localattention.grid import count, flat_pixels, row_major
from attnrewrite.localattention.returns import (
    RETURNED,
    Return,
    heads_behind,
    nearest_return,
    read_elsewhere,
    returns_of,
    spelled_out,
)
from attnrewrite.localattention.site import Decline
from attnrewrite.localattention.sources import Source, model_batch, reads_alike, sources_of, tokens_of
from attnrewrite.localattention.tokens import Candidate, Roles, candidates, channel_axis_of, feature_axes
from attnrewrite.ops import REDUCTIONS


@dataclass(frozen=True, eq=False)
class ExtraSource:
    """Where the extra keys of the windows come from, or their values.

    roles: of the candidate's axes. batch: 1, or that of the map. table: int64 [nW or 1, T], which of the `tokens` of a
    batch element each window holds, windows in the op's order.
    """

    candidate: Candidate
    roles: Roles
    batch: Extent
    tokens: int
    table: np.ndarray


@dataclass(frozen=True, eq=False)
class ExtraQueries:
    """Queries that every window has besides those of its map.

    attention: at these queries, positions along `axis` of the grid, and all keys. query: where they are read (a lone
    one twice); source: where they come from. back: the value in which what they attend is read; place: int64, the row
    of [B, nW, T] that each of its tokens is.
    """

    attention: Attention
    axis: int
    query: Operand
    source: ExtraSource
    back: Return
    place: np.ndarray

    @property
    def count(self) -> int:
        """Extra queries of a window."""
        return count(self.attention.output_shape[self.axis])


@dataclass(frozen=True, eq=False)
class ExtraTokens:
    """Keys that every window has besides those of its map.

    own, others: int64, which keys of the attention are the map's, and which these. beside: the attention at these keys
    alone (a lone one twice), asked by the map's queries; key, value: where they come from. asking: those that are
    queries, too, and whose result is used.
    """

    own: np.ndarray
    others: np.ndarray
    beside: Attention
    key: ExtraSource
    value: ExtraSource
    asking: ExtraQueries | None = None

    @property
    def count(self) -> int:
        """Extra keys of a window."""
        return len(self.others)


@dataclass(frozen=True, eq=False)
class SiteMaps:
    """A site between feature maps. Grid axes are the attention's; features: those that number heads and channels.

    query: the source whose map and the output's agree, queries: all such views of it; keys, values: every candidate of
    theirs, nearest first; sources: of all three, in the order of the walk. shared: where one set of queries serves all
    windows, the maps it comes from, one token per token of a window; query and queries are then the places that the
    output returns to. extra: keys of the windows that are not on the map. groups: where heads have windows of
    their own, the maps of each run of heads, keys and values chosen; the rest is that of the first run.
    """

    attention: Attention
    features: frozenset[int]
    heads: tuple[int, ...]
    query: Source
    queries: tuple[Source, ...]
    back: Return
    keys: tuple[Source, ...]
    values: tuple[Source, ...]
    sources: dict[str, tuple[Source, ...]]
    shared: tuple[Source, ...] = ()
    extra: ExtraTokens | None = None
    groups: tuple[SiteMaps, ...] = ()

    @property
    def token_axes(self) -> tuple[int, ...]:
        """Grid axes of the output that number windows and query tokens."""
        return tuple(a for a in range(len(self.attention.output_shape)) if a not in self.features)

    @property
    def num_heads(self) -> int:
        return math.prod(count(self.attention.output_shape[a]) for a in self.heads)

    def chosen(self, role: str) -> Source:
        """The map of "query", "key" or "value", the first of those named."""
        return {"query": self.query, "key": self.keys[0], "value": self.values[0]}[role]

    def facing(self, other: Source) -> SiteMaps:
        """The same maps with the query seen as a map of `other`'s extents, or of as many axes, if a view is such."""
        return next(self.all_facing(other))

    def all_facing(self, other: Source) -> Iterator[SiteMaps]:
        """The same for every such view, of each extents the first; as they are if there is none. A map pooled to one
        row has lost that axis: it is seen with it as well.
        """
        alike = [q for q in self.queries if q.spatial == other.spatial]
        alike += [q for q in self.queries if len(q.spatial) == len(other.spatial)]
        alike += [
            replace(q, spatial=extents)
            for q in self.queries
            if q.batch == other.batch and len(q.spatial) < len(other.spatial)
            for extents in _with_ones(q.spatial, other.spatial)
        ]
        views = {q.spatial: q for q in reversed(alike)}
        yield from (replace(self, query=views[extents]) for extents in dict.fromkeys(q.spatial for q in alike))
        if not alike:
            yield self


def _with_ones(extents: tuple[int, ...], like: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """The extents with ones between them, as many as `like`, of which each divides its counterpart."""
    for kept in itertools.combinations(range(len(like)), len(extents)):
        filled = [1] * len(like)
        for axis, extent in zip(kept, extents, strict=True):
            filled[axis] = extent
        if all(e % f == 0 for e, f in zip(like, filled, strict=True)):
            yield tuple(filled)


def read_maps(facts: Facts, attention: Attention) -> SiteMaps | Decline:
    """The token maps of an attention whose queries are pixels of the map its output returns to, or why they cannot be
    read.
    """
    ways = read_ways(facts, attention)
    return ways if isinstance(ways, Decline) else meet(facts, attention, ways)


def read_padded_maps(facts: Facts, attention: Attention) -> SiteMaps | Decline | None:
    """As read_maps, no map going back beyond its padding; None where the queries are not padded."""
    ways = read_ways(facts, attention)
    if isinstance(ways, Decline):
        return None
    sources = {name: tuple(s for s in found if s.candidate.domain is None) for name, found in ways.sources.items()}
    if len(sources["query"]) == len(ways.sources["query"]) or not all(sources.values()):
        return None
    return meet(facts, attention, replace(ways, sources=sources))


@dataclass(frozen=True, eq=False)
class Ways:
    """The feature maps that query, key and value are made of, nearest first; features: as in SiteMaps."""

    features: frozenset[int]
    heads: tuple[int, ...]
    sources: dict[str, tuple[Source, ...]]


def read_ways(facts: Facts, attention: Attention) -> Ways | Decline:
    """Where the operands of an attention come from."""
    channels = frozenset({attention.channel_axis, attention.value_axis})
    node = attention.softmax.label
    ways = {name: _way(facts, attention, operand) for name, operand in _operands(attention).items()}
    if _sums_over_tokens(attention, ways["query"]):
        return Decline(
            "channel attention: the logits sum over the tokens, the softmax runs over channels", node, "channel"
        )
    features: frozenset[int] = channels
    for name in ("query", "value", "key"):
        found = feature_axes(ways[name], channels) - {attention.key_axis}
        if found != channels:
            features = found
            break
    else:
        features = channels | heads_behind(facts, attention)
    batch = model_batch(facts)
    found_sources = {name: tuple(_of_batch(sources_of(way, features), batch)) for name, way in ways.items()}
    for name, sources in found_sources.items():
        if not sources:
            operand = _operands(attention)[name]
            left = Decline(f"the {name} is not one set of features per token", operand.value.name)
            return _attends_everything(attention, features, found_sources["key"]) or left
    return Ways(features, tuple(sorted(features - channels)), found_sources)


def meet(facts: Facts, attention: Attention, ways: Ways) -> SiteMaps | Decline:
    """The maps on which the output returns to the pixels of its queries."""
    features, found_sources = ways.features, ways.sources
    maps = _meet(facts, attention, features, found_sources["query"])
    if isinstance(maps, Decline):
        return _attends_everything(attention, features, found_sources["key"]) or maps
    queries, back, moved_again = maps
    if not back.whole and read_elsewhere(facts, attention.output, {back.value}) is not None:
        return Decline("only some of the heads return to the pixels their queries came from", back.value.name)
    if moved_again:
        return Decline("the output is rearranged once more, to other pixels than its queries came from", moved_again)
    keys, values = (_like_query(found_sources[name], queries[0]) for name in ("key", "value"))
    return SiteMaps(attention, features, ways.heads, queries[0], queries, back, keys, values, found_sources)


def global_attention(queries: int, keys: int, node: str, **known: Any) -> Decline:
    """The site is left: every query of a batch element attends the same keys."""
    who = "the one query attends" if queries == 1 else f"each of the {queries} queries attends"
    which = "one key" if keys == 1 else f"the same {keys} keys" if queries > 1 else f"all {keys} keys"
    return Decline(f"global attention: {who} {which}", node, "global", known=known)


def made_inside(queries: Sequence[Source]) -> Decline:
    """The keys lie in windows of a feature map; the queries can be followed no farther than into their window."""
    nearest = queries[-1].value
    maker = nearest.producer
    what = nearest.name if maker is None else f"{maker.op} ({maker.label})"
    return Decline(f"{what} makes the queries inside each window, so they have no place on the feature map", what)


def _attends_everything(attention: Attention, features: frozenset[int], keys: Sequence[Source]) -> Decline | None:
    """The decline of a global attention whose queries are on no feature map of the keys (learned queries, say), else
    None.
    """
    shape = attention.output_shape
    rows = reads_alike(attention.key_axis, keys)
    if not keys or rows is None:
        return None
    queries = math.prod(count(e) for a, e in enumerate(shape) if a not in features and a not in rows)
    return global_attention(queries, attention.num_keys, attention.softmax.label)


def _of_batch(sources: list[Source], batch: Extent | None) -> list[Source]:
    """The sources that have the model's batch, if some do: in the others it is one of the token axes (axis 0 was one of
    stacked query, key and value).
    """
    if not isinstance(batch, int) or batch == 1:
        return sources
    return [s for s in sources if count(s.batch) % batch == 0] or sources


def _like_query(sources: Sequence[Source], query: Source) -> tuple[Source, ...]:
    """Nearest first, but the query's own feature map before all."""
    return tuple(sorted(sources, key=lambda s: s.value is not query.value))


def _sums_over_tokens(attention: Attention, way: Sequence[Candidate]) -> bool:
    """Whether the summed position of the logits numbers tokens where the query is made of channels."""
    for candidate in way:
        node = candidate.value.producer
        axis = None if node is None else 1 if node.op == "Conv" else channel_axis_of(node)  # of any kernel, any groups
        if node is not None and axis is not None and node.op not in REDUCTIONS:
            others = [c for a, c in enumerate(candidate.index) if a != axis]
            mixed = candidate.index[axis].depends_on()
            return attention.channel_axis in dependencies(others) and attention.channel_axis not in mixed
    return False


def _operands(attention: Attention) -> dict[str, Operand]:
    return {"query": attention.query, "key": attention.key, "value": attention.value}


def _way(facts: Facts, attention: Attention, operand: Operand) -> list[Candidate]:
    return list(candidates(operand.value, operand.index, attention.channel_axis, facts.positions))


def _meet(
    facts: Facts, attention: Attention, features: frozenset[int], queries: Sequence[Source]
) -> tuple[tuple[Source, ...], Return, str | None] | Decline:
    """The last value behind the attention at which output pixel and query pixel are the same, and those query
    sources.
    """
    returns = returns_of(facts, attention, features)
    batch = model_batch(facts)
    own = [q for q in queries if q.has_batch and q.batch == batch]  # rows of any other number may be windows
    for tried in (own, queries):
        for back in reversed(returns):
            for query in tried:
                if _agree(attention, features, query, back):
                    return _met(facts, attention, features, queries, returns, query, back)
    where = returns[-1].value.name if returns else attention.output.name
    return Decline("the output does not return to the pixels its queries came from", where)


def _met(
    facts: Facts,
    attention: Attention,
    features: frozenset[int],
    queries: Sequence[Source],
    returns: Sequence[Return],
    query: Source,
    back: Return,
) -> tuple[tuple[Source, ...], Return, str | None]:
    """All views of the query that agree with a return, and the return to take of all that agree with the query."""
    same = [q for q in queries if _agree(attention, features, q, back)]
    agreeing = [r for r in returns if _agree(attention, features, query, r)]
    batch = min(count(q.value.known_shape[0]) for q in same)
    chosen, moved_again = nearest_return(facts, attention, returns, agreeing, batch)
    same.sort(key=lambda q: (q.candidate.depth, spelled_out(len(q.spatial))))
    return tuple(same), chosen, moved_again


def agreeing_returns(facts: Facts, maps: SiteMaps) -> list[Return]:
    """The maps that the output returns to with every pixel where its query came from, in topological order."""
    returns = returns_of(facts, maps.attention, maps.features)
    return [r for r in returns if _agree(maps.attention, maps.features, maps.query, r)]


def settled(maps: SiteMaps, name: str, chosen: Source) -> Source | str:
    """The chosen map, or the one before it whose tokens are rearranged and put back; where they are rearranged for good
    before anything joins them, the name of the value that shows it.

    A map of as many tokens in another order (a roll, a flip, windows of a folded batch) belongs to the site: what is
    left of it would remain in the graph. So does a map of another size than the query's that was cut out of the query's
    or holds tokens more than once.
    """
    attention = maps.attention
    axes = [*maps.token_axes, *([] if name == "query" else [attention.key_axis])]
    shape = (*attention.output_shape, attention.num_keys, 1)
    own = flat_pixels(chosen.candidate, chosen.roles.tokens, shape, axes)
    total = tokens_of(chosen)
    same_size = math.prod(chosen.spatial) == math.prod(maps.query.spatial)
    later, returned, moved = False, False, None
    for source in maps.sources[name]:
        if later and returned:
            break
        later = later or source.candidate is chosen.candidate
        returned = source.value.producer is not None and source.value.producer.made_by == RETURNED
        if not later or source.candidate.joins != chosen.candidate.joins:
            continue
        tokens = tokens_of(source)
        if tokens != total:
            if not same_size and (tokens < total or tokens == tokens_of(maps.query)):
                return source.value.name
            continue
        found = flat_pixels(source.candidate, source.roles.tokens, shape, axes)
        if not np.array_equal(found, own):
            if not (chosen.has_batch and _same_places(found, own, math.prod(chosen.spatial))):
                moved = moved or source.value.name
        elif moved is not None and (view := _with_batch_of(source, chosen)) is not None:
            chosen, moved = view, None
    return moved or chosen


def _same_places(one: np.ndarray, other: np.ndarray, extent: int) -> bool:
    """Whether two tables of flat pixels differ by the batch element alone: images that attend each other, say."""
    inside = one >= 0
    return np.array_equal(inside, other >= 0) and np.array_equal((one % extent)[inside], (other % extent)[inside])


def _with_batch_of(source: Source, other: Source) -> Source | None:
    """A source of the same tokens seen with the other's batch, its rows of one element as tokens of it; None where it
    has fewer rows.
    """
    if source.batch == other.batch:
        return source
    rows = rows_per_element(source, other.batch)
    return None if rows is None else replace(source, groups=rows, spatial=other.spatial)


def rows_per_element(source: Source, batch: Extent | None) -> int | None:
    """How many rows of a source belong to one element of a batch; None where that is one, or unknown."""
    if batch is None or not source.has_batch or source.groups > 1:
        return None
    rows = source.value.known_shape[0]
    ratio: int | None = None
    if isinstance(rows, Dim) and isinstance(batch, Dim):
        ratio = proportion(rows, batch)
    elif isinstance(rows, int) and isinstance(batch, int):
        ratio = rows // batch if rows % batch == 0 else None
    return ratio if ratio is not None and ratio > 1 else None


def _agree(attention: Attention, features: frozenset[int], query: Source, back: Return) -> bool:
    """For every pixel of the returned map: the query computed for it came from that pixel."""
    shape = back.value.known_shape
    read = pixels_asked(attention, features, query, back)
    if read is None:
        return False
    # the grid of `back` has one axis per axis of the returned value, and one for channels it mixes
    own = row_major(identity(shape, len(shape) + 1), back.roles.tokens, shape)
    return bool((read == own).all()) if _broadcastable(read, own) else False


def pixels_asked(attention: Attention, features: frozenset[int], query: Source, back: Return) -> np.ndarray | None:
    """int64 over the grid of `back`: which pixel of the query's map each of its tokens was asked for by; None unless
    they are as many.
    """
    shape = back.value.known_shape
    enumerated = [count(shape[a]) for a in back.roles.tokens]
    expected = [count(query.value.known_shape[a]) for a in query.roles.tokens]
    if math.prod(enumerated) != math.prod(expected):
        return None
    if not back.roles.tokens or not query.roles.tokens:
        return None
    if isinstance(shape[back.roles.tokens[0]], Dim) != isinstance(query.value.known_shape[query.roles.tokens[0]], Dim):
        return None
    rows = [c.values for a, c in enumerate(back.index) if a not in features]
    axes = [a for a in range(len(attention.output_shape)) if a not in features]
    if not axes:
        return None
    flat = flat_pixels(query.candidate, query.roles.tokens, attention.output_shape, axes)
    return np.asarray(flat[tuple(np.minimum(r, flat.shape[k] - 1) for k, r in enumerate(rows))])


def _broadcastable(a: np.ndarray, b: np.ndarray) -> bool:
    return all(x == y or 1 in (x, y) for x, y in zip(a.shape, b.shape, strict=True))
