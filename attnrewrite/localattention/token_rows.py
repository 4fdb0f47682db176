"""Windows that exist only as token order: attention within rows of tokens, of which a batch element has several."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from attnrewrite.dims import Extent
from attnrewrite.facts import Facts
from attnrewrite.graph import Node, Value, ancestors
from attnrewrite.localattention.maps import SiteMaps, rows_per_element
from attnrewrite.localattention.sources import Source, model_batch


def in_rows(facts: Facts, maps: SiteMaps) -> SiteMaps | None:
    """The maps with the rows of one element of the model's batch as tokens of it, where its attention runs over more
    rows than the model has elements; None where it does not.

    Tokens [B*n, N, C] are then a map [B, n*N, C], and attention within each row is attention in windows of N; not so
    where the rows are the frames of a video, for all of a frame attends all of it. Such a map begins where something
    else reads its rows too (a shortcut): what moved tokens before that is not the site's.
    """
    batch = model_batch(facts)
    counted = (rows_per_element(q, batch) for q in maps.queries)
    groups = next((g for g in counted if g is not None), None)
    if groups is None or groups in _frames(facts):
        return None

    def in_view(source: Source) -> Source:
        fits = rows_per_element(source, batch) == groups
        return replace(source, groups=groups, spatial=(groups * math.prod(source.spatial),)) if fits else source

    def listed(sources: Sequence[Source]) -> tuple[Source, ...]:
        """Those first that no other tensor was joined to since, of these the ones whose features lie behind their
        tokens: they need no transpose.
        """
        views = [v for v in map(in_view, sources) if v.groups == groups]
        return tuple(sorted(views, key=lambda s: (s.candidate.joins, s.roles.features[:1] < s.roles.tokens[-1:])))

    queries = listed(maps.queries)
    cone = {v.producer for v in ancestors([maps.attention.output])}
    own = {}
    for name, sources in maps.sources.items():
        shared = (k for k, s in enumerate(sources) if _is_read_beside(facts, s.value, cone))
        own[name] = sources[: next(shared, len(sources)) + 1]
    return replace(
        maps,
        query=queries[0],
        queries=queries,
        keys=listed(maps.keys),
        values=listed(maps.values),
        sources={name: tuple(map(in_view, sources)) for name, sources in own.items()},
    )


def _frames(facts: Facts) -> tuple[Extent, ...]:
    """How many frames a video [B, C, T, H, W] or [B, T, C, H, W] may have, by the model's inputs of five axes."""
    shapes = [v.shape for v in facts.graph.inputs if v.shape is not None]
    return tuple(e for shape in shapes if len(shape) == 5 for e in shape[1:3])


def _is_read_beside(facts: Facts, value: Value, cone: set[Node | None]) -> bool:
    """Whether something outside a cone of nodes reads a value, or another piece of it that a node of the cone splits
    off.
    """
    for user in facts.users(value):
        pieces = user.outputs if len(user.outputs) > 1 else []
        if user not in cone or any(reader not in cone for piece in pieces for reader in facts.users(piece)):
            return True
    return False
