"""One set of queries for all windows (GC ViT's global query).

Such queries are no pixels of the map, so they do not say where a row of the output belongs. The output does: the map it
returns to is cut into windows just as that of the keys is, and every window asks with the same queries.
"""

from __future__ import annotations

import math

import numpy as np

from attnrewrite.dims import Dim
from attnrewrite.facts import Facts
from attnrewrite.indexing.map import Coordinate, IndexingError, dependencies
from attnrewrite.localattention.attention import Attention
from attnrewrite.localattention.geometry import PADDING
from attnrewrite.localattention.grid import count, flat_pixels, pixels_read
from attnrewrite.localattention.maps import SiteMaps, Ways, made_inside, meet, read_ways
from attnrewrite.localattention.returns import Return, nearest_return, returns_of
from attnrewrite.localattention.site import Decline
from attnrewrite.localattention.sources import Source, as_source, model_batch, reads_alike, tokens_of
from attnrewrite.localattention.tokens import Candidate, Roles


def read_window_maps(facts: Facts, attention: Attention) -> SiteMaps | Decline:
    """The token maps of an attention, whether its queries are pixels of the map or one set for all windows."""
    ways = read_ways(facts, attention)
    if isinstance(ways, Decline):
        return ways
    shared = _shared(attention, ways)
    return _meet_shared(facts, attention, ways, shared) if shared else meet(facts, attention, ways)


def queries_made_inside(facts: Facts, attention: Attention) -> Decline | None:
    """The decline of queries that an operator makes of several tokens of their window, where the keys come from the map
    that the windows are of; else None.
    """
    ways, batch = read_ways(facts, attention), model_batch(facts)
    if isinstance(ways, Decline) or reads_alike(attention.key_axis, ways.sources["key"]) is not None:
        return None
    queries, keys = (ways.sources[name] for name in ("query", "key"))
    maker = queries[-1].value.producer
    if maker is None or any(q.batch == batch for q in queries) or not any(k.batch == batch for k in keys):
        return None
    return made_inside(queries)


def queries_asked_again(facts: Facts, attention: Attention, maps: SiteMaps | Decline) -> Decline | None:
    """The decline of windows that overlap, or ask with the same queries in part, so that their output returns to no map
    of those; None where every query is asked once, or all windows ask with the same.
    """
    ways = read_ways(facts, attention)
    if isinstance(ways, Decline) or _shared(attention, ways):
        return None
    shape = attention.output_shape
    rows = math.prod(count(e) for a, e in enumerate(shape) if a not in ways.features)
    for source in ways.sources["query"]:
        tokens = tokens_of(source)
        if not isinstance(maps, Decline) and tokens >= tokens_of(maps.query):
            continue
        if source.candidate.domain is None and 1 < tokens < rows:
            detail = f"{source.value.name} holds {tokens}, {rows} are asked"
            return Decline(f"the windows overlap or share some of their queries: {detail}", attention.softmax.label)
    return None


def _shared(attention: Attention, ways: Ways) -> tuple[Source, ...]:
    """Sources of the query with as many tokens as a window, each window reading all of them in the same order."""
    windows, inner = _window_axes(attention, ways)
    shape = attention.output_shape
    rows = math.prod(count(shape[a]) for a in windows)
    found = []
    for source in ways.sources["query"]:
        tokens = math.prod(source.spatial)
        batch = _elements(source)
        if source.candidate.domain is not None or batch >= rows or rows % batch:
            continue
        try:
            read = flat_pixels(source.candidate, source.roles.tokens, shape, windows + inner).reshape(rows, -1)
        except IndexingError:
            continue
        element = read[:, :1] // tokens
        of_element = np.bincount(element.reshape(-1), minlength=batch)
        if read.shape[1] == tokens and (of_element == rows // batch).all():
            local = read - element * tokens
            if (local == local[:1]).all() and np.array_equal(np.sort(local[0]), np.arange(tokens)):
                found.append(source)
    return tuple(found)


def _window_axes(attention: Attention, ways: Ways) -> tuple[list[int], list[int]]:
    """The output's token axes that number windows (the keys depend on them, or they hold the batch) and tokens."""
    shape = attention.output_shape
    candidate = ways.sources["key"][0].candidate
    reads = dependencies(candidate.index)
    if candidate.domain is not None:
        reads |= frozenset(a for a, e in enumerate(candidate.domain.shape) if e > 1)
    tokens = [a for a in range(len(shape)) if a not in ways.features]
    windows = [a for a in tokens if a in reads or isinstance(shape[a], Dim)]
    return windows, [a for a in tokens if a not in windows]


def _elements(source: Source) -> int:
    return count(source.batch)


def _meet_shared(facts: Facts, attention: Attention, ways: Ways, shared: tuple[Source, ...]) -> SiteMaps | Decline:
    """The maps on which the output of every window returns to the pixels of its keys."""
    windows, inner = _window_axes(attention, ways)
    batch = min(map(_elements, shared))
    returns = returns_of(facts, attention, ways.features)
    places = {r: place for r in returns if (place := _place(attention, ways, r)) and _elements(place) == batch}
    for place in reversed(places.values()):
        pixels = _windows_of(attention, place, windows, inner)
        agreeing = [
            key
            for key in ways.sources["key"]
            if _elements(key) == batch
            and key.spatial == place.spatial
            and _equal(_windows_of(attention, key, windows, [attention.key_axis]), pixels)
        ]
        if not agreeing:
            continue
        own = pixels_read(place.candidate, place.roles.tokens)
        same = [r for r, p in places.items() if _equal(pixels_read(p.candidate, p.roles.tokens), own)]
        back, moved_again = nearest_return(facts, attention, returns, same, batch)
        if moved_again:
            return Decline("the output is rearranged once more, to other pixels than its keys came from", moved_again)
        views = (places[back], *(places[r] for r in same if r is not back))
        keys, values = (
            tuple(sorted(ways.sources[name], key=lambda s: s.value is not agreeing[0].value))
            for name in ("key", "value")
        )
        return SiteMaps(attention, ways.features, ways.heads, views[0], views, back, keys, values, ways.sources, shared)
    reason = "one set of queries serves all windows, whose keys are not the pixels that their output returns to"
    return Decline(reason, attention.softmax.label)


def _equal(one: np.ndarray | None, other: np.ndarray | None) -> bool:
    return one is not None and other is not None and np.array_equal(one, other)


def _windows_of(attention: Attention, source: Source, windows: list[int], inner: list[int]) -> np.ndarray | None:
    """int64 [nW, N]: the pixels of each window, ascending; None where they differ from head to head."""
    shape = (*attention.output_shape, attention.num_keys)
    try:
        flat = flat_pixels(source.candidate, source.roles.tokens, shape, windows + inner)
    except IndexingError:
        return None
    return np.sort(flat.reshape(math.prod(count(shape[a]) for a in windows), -1), axis=1)


def _place(attention: Attention, ways: Ways, back: Return) -> Source | None:
    """The returned map as if the queries came from it: every row of the output is read at the pixel that it returns to;
    rows that are dropped lie outside the domain. None where a row returns to several pixels.
    """
    shape, own = attention.output_shape, back.value.known_shape
    axes = [a for a in range(len(shape)) if a not in ways.features]
    tokens = back.roles.tokens
    if not tokens or 0 in own:
        return None
    rows: np.ndarray = np.zeros((1,) * (len(own) + 1), np.int64)
    for axis in axes:
        rows = rows * count(shape[axis]) + back.index[axis].values
    if any(e > 1 and a not in tokens for a, e in enumerate(rows.shape)):
        return None
    extents = [count(own[a]) for a in tokens]
    rows = np.broadcast_to(rows.reshape([rows.shape[a] for a in tokens]), extents).reshape(-1)
    total = math.prod(count(shape[a]) for a in axes)
    pixel = np.full(total, PADDING)
    pixel[rows] = np.arange(len(rows))
    if np.count_nonzero(pixel != PADDING) != len(rows):
        return None
    grid = [count(e) if a in axes else 1 for a, e in enumerate(shape)]
    grid += [1] * (attention.grid_rank - len(grid))
    positions = np.unravel_index(np.maximum(pixel, 0), extents)
    index = [Coordinate(np.zeros((1,) * len(grid), np.int64))] * len(own)
    for axis, position in zip(tokens, positions, strict=True):
        extent = own[axis]
        index[axis] = Coordinate(position.reshape(grid), count(extent) if isinstance(extent, Dim) else 0)
    inside = (pixel != PADDING).reshape(grid)
    candidate = Candidate(back.value, tuple(index), None if inside.all() else inside, (), back.depth, 0)
    return as_source(candidate, Roles(tokens, back.roles.features))
