"""Weighted sums over neighbourhoods whose weights are predicted per pixel, not computed from queries and keys.

    out[p] = sum_j w[p, j] * v[neighbour j of p],  w = softmax_j(logits) or the predicted numbers themselves

Outlook attention (VOLO) predicts the weights of a whole block, K x K of them per pixel, and adds the blocks up where
they overlap; upsamplers predict those of several output pixels per pixel of the map. Axes of the sum's output that the
values do not depend on number these rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from attnrewrite.dims import Dim, Extent
from attnrewrite.facts import Facts
from attnrewrite.graph import Node, Value
from attnrewrite.indexing.map import Index, IndexingError, dependencies
from attnrewrite.indexing.provenance import provenances
from attnrewrite.indexing.rules import RULES
from attnrewrite.localattention.aggregation_return import Result, Returning, Rows
from attnrewrite.localattention.attention import NOT_OVER_KEYS, WeightedSum, read_weighted_sum
from attnrewrite.localattention.contraction import Operand, is_contraction, is_weighted_sum
from attnrewrite.localattention.gathered_sums import is_gathered_sum, read_chain, read_gathered_sums
from attnrewrite.localattention.geometry import NeighborhoodGeometry, Sizes, by
from attnrewrite.localattention.grid import count, flat_pixels
from attnrewrite.localattention.neighborhood_fit import fit_neighborhood
from attnrewrite.localattention.site import Decline
from attnrewrite.localattention.sources import Source, as_source
from attnrewrite.localattention.tokens import (
    Candidate,
    candidates,
    channel_axis_of,
    feature_axes,
    per_token_inputs,
    roles,
)
from attnrewrite.ops import POINTWISE, REDUCTIONS

# How many operators may lie between probabilities taken apart one by one and their sum.
CHAIN_LIMIT = 1024


@dataclass(frozen=True, eq=False)
class Aggregation:
    """A site proved to be a sum of neighbours with predicted weights.

    weights: the logits where softmax is given, else the weights. heads, channels, tokens: grid axes of the output;
    rows: axes that number the rows of a pixel, with what they are for. slots: the geometry's slot -> the site's key.
    facts: by which weights and values are followed.
    """

    anchor: Node
    softmax: Node | None
    sum: WeightedSum
    weights: Operand
    heads: tuple[int, ...]
    channels: tuple[int, ...]
    rows: tuple[int, ...]
    use_of_rows: Rows
    upsampling: tuple[int, ...]
    geometry: NeighborhoodGeometry
    slots: np.ndarray
    tokens: tuple[int, ...]
    facts: Facts
    weights_source: Source
    value_source: Source
    result: Result

    @property
    def num_heads(self) -> int:
        return self.extent(self.heads)

    @property
    def value_dim(self) -> int:
        return self.extent(self.channels)

    def extent(self, axes: Sequence[int]) -> int:
        """How many positions these axes of the output have together."""
        return math.prod(count(self.sum.output_shape[a]) for a in axes)

    @property
    def value_features(self) -> frozenset[int]:
        """Grid axes that number features of the values."""
        return frozenset({*self.heads, *self.channels, self.sum.channel_axis})

    @property
    def weight_features(self) -> frozenset[int]:
        """Grid axes that number features of the weights."""
        return frozenset({*self.heads, *self.rows, self.sum.key_axis, self.sum.channel_axis})


def match_aggregation(facts: Facts, anchor: Node) -> Aggregation | Decline | None:
    """The sum of neighbours around a softmax, or at a sum without one; None where neighbours are not summed."""
    try:
        if anchor.op == "Softmax":
            around = _around_softmax(facts, anchor)
            return None if isinstance(around, Decline) and _compares_tokens(anchor) else around
        if not is_gathered_sum(facts, anchor):
            return None
        nearest: Decline | None = None
        for found in read_gathered_sums(facts, anchor):
            weights = Operand(found.sum.weight, found.sum.weights)
            match = _Matcher(found.facts, anchor, None, found.sum, weights).match()
            if isinstance(match, Aggregation):
                return match
            if not (_is_of_softmax(found.sum.weight) or _runs_into_softmax(facts, anchor)):  # of which that tells
                nearest = nearest or match
        return nearest
    except IndexingError:
        return None


def _is_of_softmax(weights: Value) -> bool:
    node = weights.producer
    while node is not None and not node.domain and node.op in RULES:
        node = node.required(0).producer
    return node is not None and node.op == "Softmax"


def _runs_into_softmax(facts: Facts, node: Node) -> bool:
    user = facts.only_user(node.outputs[0])
    while user is not None and not user.domain and (user.op in RULES or user.op in POINTWISE):
        user = facts.only_user(user.outputs[0])
    return user is not None and user.op == "Softmax"


def _compares_tokens(softmax: Node) -> bool:
    """Whether the logits are products of computed tensors (queries and keys), those of several heads mixed or not, as
    far as they are read: then what can be said of predicted weights is not about them.
    """
    pending = [(softmax.required(0), False)]
    seen: set[Node] = set()
    while pending and len(seen) < CHAIN_LIMIT:
        value, mixed = pending.pop(0)
        node = value.producer
        if node is None or node in seen:
            continue
        seen.add(node)
        if is_contraction(node):
            return True
        mixes = is_weighted_sum(node) and not mixed
        if not node.domain and (mixes or node.op in RULES or node.op in POINTWISE):
            pending += [(v, mixed or mixes) for v in node.inputs if v is not None and not v.is_constant]
    return False


def _around_softmax(facts: Facts, softmax: Node) -> Aggregation | Decline | None:
    summed = read_weighted_sum(facts, softmax)
    if isinstance(summed, WeightedSum):
        return _Matcher(facts, softmax, softmax, summed, Operand(softmax.required(0), summed.weights)).match()
    root = _chain_behind(facts, softmax)
    for found in [] if root is None else read_chain(facts, root):
        read = None
        for read in provenances(found.sum.weight, found.sum.weights, found.facts.positions):
            if read.value is softmax.output:
                break
        if read is None or read.value is not softmax.output or read.domain is not None:
            continue
        if not _runs_over_keys(softmax, read.index, found.sum.key_axis, found.sum.num_keys):
            return Decline(NOT_OVER_KEYS, softmax.label, "outlook")
        summed = replace(found.sum, weight=softmax.output, weights=read.index)
        return _Matcher(found.facts, softmax, softmax, summed, Operand(softmax.required(0), read.index)).match()
    return None


def _runs_over_keys(softmax: Node, index: Index, key_axis: int, keys: int) -> bool:
    axis = softmax.attributes.get("axis", -1) % len(index)
    others = [c for a, c in enumerate(index) if a != axis]
    position = index[axis]
    if position.batch or any(key_axis in c.depends_on() for c in others) or position.depends_on() != {key_axis}:
        return False
    return softmax.output.known_shape[axis] == keys and np.array_equal(
        np.sort(position.values.reshape(-1)), np.arange(keys)
    )


def _chain_behind(facts: Facts, softmax: Node) -> Node | None:
    """The last Add of a chain that probabilities taken apart one by one run into; None where one leads elsewhere."""
    roots: dict[Node, None] = {}
    pending = list(facts.users(softmax.output))
    seen: set[Node] = set()
    while pending:
        node = pending.pop()
        if node in seen:
            continue
        seen.add(node)
        if len(seen) > CHAIN_LIMIT or node.domain or (node.op not in RULES and node.op not in ("Mul", "Add")):
            return None
        user = facts.only_user(node.outputs[0])
        if node.op == "Add" and (user is None or user.op != "Add"):
            roots[node] = None
            continue
        users = [u for o in node.outputs for u in facts.users(o)]
        if not users:
            return None
        pending += users
    return next(iter(roots)) if len(roots) == 1 else None


class _Matcher:
    """One site, read step by step; a step that fails says why, or None where this is no site of this kind."""

    def __init__(self, facts: Facts, anchor: Node, softmax: Node | None, summed: WeightedSum, weights: Operand) -> None:
        self.facts, self.anchor, self.softmax, self.sum, self.weights = facts, anchor, softmax, summed, weights
        self.shape = summed.output_shape

    def match(self) -> Aggregation | Decline | None:
        summed, shape = self.sum, self.shape
        value_index, weight_index = summed.value.index, self.weights.index
        output_axes = range(len(shape))
        own = [a for a in output_axes if _depends(value_index, a, shape[a])]
        rows = [a for a in output_axes if a not in own and _depends(weight_index, a, shape[a])]
        channels = [a for a in own if not _depends(weight_index, a, shape[a])]
        spare = summed.channel_axis
        way = list(candidates(summed.value.value, value_index, spare, self.facts.positions))
        found = feature_axes(way, frozenset({*channels, spare})) - {summed.key_axis}
        heads = tuple(sorted(found - {*channels, spare}))
        tokens = [a for a in output_axes if a not in found and a not in rows]
        values = self._sources(way, frozenset(found | {spare}))
        moving = [s for s in values if self._moves(s.candidate.index, tokens)]
        weight_way = list(candidates(self.weights.value, weight_index, spare, self.facts.positions))
        if _is_computed_from_pairs(weight_way) or self._is_computed_from_neighbours(weight_way, tokens):
            return None
        if not moving:
            told = self.softmax is not None and any(
                self._moves(c.index, tokens) and not self._reads_once(c.index, tokens) for c in way
            )
            return self._decline("the neighbours read differ from head to head or channel to channel") if told else None
        weight_way = _numbered_by(summed.key_axis, weight_way)
        weights = self._sources(weight_way, frozenset({*heads, *rows, summed.key_axis, spare}))
        weights = [w for w in weights if w.candidate.domain is None]
        if not weights:
            # The summed position is a place of the weights too: a product of two maps, not predicted weights.
            return None
        try:
            return self._with_sources(heads, tuple(channels), tuple(rows), tokens, weights, moving)
        except IndexingError as error:
            return self._decline(str(error))

    def _sources(self, way: Sequence[Candidate], features: frozenset[int]) -> list[Source]:
        found = []
        for candidate in way:
            split = None if candidate.value in self.facts.apart else roles(candidate.value, candidate.index, features)
            source = None if split is None or not split.tokens else as_source(candidate, split)
            if source is not None:
                found.append(source)
        return found

    def _moves(self, index: Index, tokens: Sequence[int]) -> bool:
        """Whether the values summed for a pixel lie at places that depend on the pixel and on the summed position."""
        key = self.sum.key_axis
        return any(key in c.depends_on() and c.depends_on() & set(tokens) for c in index)

    def _reads_once(self, index: Index, tokens: Sequence[int]) -> bool:
        """Whether no element is summed for two pixels: then tokens are pooled, and no neighbours gathered."""
        axes = {*tokens, self.sum.key_axis}
        moving = [c.values for c in index if c.depends_on() & axes]
        own = [v[tuple(slice(None) if a in axes else slice(0, 1) for a in range(v.ndim))] for v in moving]
        reads = np.stack(np.broadcast_arrays(*own), -1).reshape(-1, len(own))
        return len(np.unique(reads, axis=0)) == len(reads)

    def _is_computed_from_neighbours(self, way: Sequence[Candidate], tokens: Sequence[int]) -> bool:
        """Whether weights join a tensor of the pixels with one of their neighbours, as queries and keys are joined."""
        for candidate in way:
            node = candidate.value.producer
            if node is None or node.op not in POINTWISE:
                continue
            read = per_token_inputs(node, candidate.index, self.sum.channel_axis) or []
            for value, index in read if len(read) > 1 else []:
                if any(self._moves(p.index, tokens) for p in provenances(value, index, self.facts.positions)):
                    return True
        return False

    def _with_sources(
        self,
        heads: tuple[int, ...],
        channels: tuple[int, ...],
        rows: tuple[int, ...],
        tokens: list[int],
        weights: list[Source],
        values: list[Source],
    ) -> Aggregation | Decline | None:
        nearest: Decline | None = None
        # Behind equally many operators the furthest map: what is nearer is padded or gathered from it already.
        furthest_first = list(reversed(values))
        furthest_first.sort(key=lambda source: source.candidate.depth)
        for value in furthest_first:
            if any(f.number for _, f in value.candidate.fills) or any(d for d, _ in value.candidate.fills):
                nearest = nearest or self._decline("values outside the map are not zero")
                continue
            fitted = self._fit(weights, value, tokens)
            if fitted is None:
                return None
            if isinstance(fitted, Decline):
                nearest = nearest or fitted
                continue
            source, geometry, slots = fitted
            returning = Returning(self.facts, self.anchor, self.sum, heads, channels, rows, tuple(tokens))
            result = returning.result(source, geometry, slots)
            if isinstance(result, Decline):
                return result
            use, upsampling, returned = result
            return Aggregation(
                self.anchor, self.softmax, self.sum, self.weights, heads, channels, rows, use, upsampling, geometry,
                slots, tuple(tokens), self.facts, source, value, returned,
            )  # fmt: skip
        assert nearest is not None
        return nearest

    def _decline(self, reason: str) -> Decline:
        return Decline(reason, self.anchor.label, "outlook")

    def _fit(
        self, weights: list[Source], value: Source, tokens: list[int]
    ) -> tuple[Source, NeighborhoodGeometry, np.ndarray] | Decline | None:
        """The weights' map that fits the values' neighbourhoods, best laid out first; None where no value has a part in
        two of them, and no softmax says that they are weighted.
        """
        keys = self.sum.num_keys
        flat = flat_pixels(value.candidate, value.roles.tokens, self.shape, tokens, [(self.sum.key_axis, keys)])
        table = flat.reshape(-1, keys)
        nearest: Decline | None = None
        for source in sorted(weights, key=lambda s: (len(s.spatial) != len(value.spatial), not _is_direct(s))):
            positions = flat_pixels(source.candidate, source.roles.tokens, self.shape, tokens).reshape(-1)
            order = np.argsort(positions, kind="stable")
            if not np.array_equal(positions[order], np.arange(len(positions))):
                nearest = nearest or self._decline("the weights are not those of the pixels of one map, one set each")
                continue
            rows = _of_one_element(table[order], math.prod(source.spatial), math.prod(value.spatial))
            if rows is None:
                nearest = nearest or self._decline("neighbours differ between batch elements")
                continue
            for sizes in _sizes(source.spatial, value.spatial):
                fitted = fit_neighborhood(rows, sizes, value.spatial)
                if not isinstance(fitted, str) and fitted.ordered:
                    if self.softmax is None and not _overlap(fitted.geometry):
                        return None  # products summed group by group, as queries and keys are
                    return source, fitted.geometry, fitted.columns
                reason = fitted if isinstance(fitted, str) else "the order of the neighbours differs between pixels"
                nearest = nearest or self._decline(f"values: {reason}")
        reason = f"the weights lie on a {by(weights[0].spatial)} map, the values on a {by(value.spatial)} map"
        return nearest or self._decline(reason)


def _overlap(geometry: NeighborhoodGeometry) -> bool:
    """Whether the neighbourhoods of two pixels have a place in common."""
    axes = zip(geometry.kernel_size, geometry.dilation, geometry.stride, strict=True)
    return any((kernel - 1) * dilation >= stride for kernel, dilation, stride in axes)


def _is_computed_from_pairs(way: Sequence[Candidate]) -> bool:
    """Whether weights are products of two computed tensors (queries and keys), pointwise operators aside."""
    for candidate in way:
        node = candidate.value.producer
        if is_contraction(node):
            return True
        if node is not None and channel_axis_of(node) is not None and node.op not in REDUCTIONS:
            return False
    return False


def _numbered_by(key_axis: int, way: Sequence[Candidate]) -> list[Candidate]:
    """The values on the way that hold a weight per key, or the channels that a per-token operator makes them of."""
    found = []
    for candidate in way:
        if key_axis not in dependencies(candidate.index):
            break
        found.append(candidate)
        node = candidate.value.producer
        axis = None if node is None else channel_axis_of(node)
        if axis is not None and key_axis in candidate.index[axis].depends_on():
            return list(way)
    return found


def _sizes(queries: Sizes, keys: Sizes) -> Iterator[Sizes]:
    """The extents that the weights' map may have; tokens along one axis as the values' map divided by a stride."""
    if len(queries) == len(keys):
        yield queries
        return
    for stride in range(1, min(keys) + 1):
        sizes = tuple(-(-e // stride) for e in keys)
        if math.prod(sizes) == math.prod(queries):
            yield sizes


def _of_one_element(table: np.ndarray, pixels: int, key_pixels: int) -> np.ndarray | None:
    """int64 [P, K] of the first batch element, where it reads its own map and every other one the same of its own."""
    if len(table) % pixels:
        return None
    elements = table.reshape(-1, pixels, table.shape[1])
    offset = np.arange(len(elements))[:, None, None] * key_pixels
    local = np.where(elements < 0, elements, elements - offset)
    return None if (local != local[:1]).any() or (local >= key_pixels).any() else local[0]


def _depends(index: Index, axis: int, extent: Extent) -> bool:
    """Whether a read depends on an output axis; on a symbolic one where it has a batch stride."""
    if isinstance(extent, Dim) and any(c.batch for c in index):
        return True
    return any(axis in c.depends_on() for c in index)


def _is_direct(source: Source) -> bool:
    """Whether the map is channels-last or channels-first as it lies."""
    tokens, features = source.roles.tokens, source.roles.features
    last, first = [*tokens, *features], [*tokens[:1], *features, *tokens[1:]]
    return last == sorted(last) or (source.has_batch and first == sorted(first))
