"""Past the operators that treat every token alike, back to the feature map.

Between a feature map and the attention lie movement and per-token operators (Linear, LayerNorm, bias, GELU, norms).
They commute: what is computed per token may be computed on the feature map and moved afterwards. This module follows
one operand back through both and names every value on the way as a candidate for "the feature map", telling token axes
from feature axes by what each coordinate depends on.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from attnrewrite.dims import Dim
from attnrewrite.graph import STANDARD_DOMAIN, Node, Value
from attnrewrite.indexing.map import Coordinate, Index, IndexingError, dependencies
from attnrewrite.indexing.provenance import Provenance, provenances
from attnrewrite.indexing.rules import Fill, Read, broadcast_index, sources
from attnrewrite.ops import NORMALISATIONS, POINTWISE, REDUCTIONS


@dataclass(frozen=True, eq=False)
class Candidate:
    """A value all of the operand comes from, and the map by which it is read.

    depth: how many per-token operators lie between it and the operand; joins: how many of them read several computed
    tensors. fills: elements that come from padding below it, with the depth at which they are padded.
    """

    value: Value
    index: Index
    domain: np.ndarray | None
    fills: tuple[tuple[int, Fill], ...]
    depth: int
    joins: int


@dataclass(frozen=True, eq=False)
class Roles:
    """Which axes of a value hold tokens and which features, read off an index."""

    tokens: tuple[int, ...]
    features: tuple[int, ...]


def full_range(axis: int, extent: int, grid_rank: int) -> Coordinate:
    shape = [1] * grid_rank
    shape[axis] = extent
    return Coordinate(np.arange(extent, dtype=np.int64).reshape(shape))


def channel_axis_of(node: Node) -> int | None:
    """The axis over which a channelwise operator mixes elements; None where the node is not channelwise.

    Linear layers need a constant weight: MatMul and Gemm mix the last axis, a 1 x 1 convolution axis 1.
    """
    if node.domain != STANDARD_DOMAIN or not node.inputs:
        return None
    data = node.required(0)
    if data.shape is None:
        return None
    rank = len(data.shape)
    match node.op:
        case "MatMul":
            weight = node.required(1)
            return rank - 1 if weight.is_constant and weight.shape is not None and len(weight.shape) == 2 else None
        case "Gemm":
            plain = node.attributes.get("transA", 0) == 0 and all(
                v is not None and v.is_constant for v in node.inputs[1:]
            )
            return rank - 1 if plain else None
        case "Conv":
            weight = node.required(1)
            pointwise = weight.is_constant and weight.shape is not None and all(e == 1 for e in weight.shape[2:])
            plain = all(s == 1 for s in node.attributes.get("strides", [])) and not any(node.attributes.get("pads", []))
            same = node.attributes.get("auto_pad", "NOTSET") in ("NOTSET", "VALID")
            return 1 if pointwise and plain and same and node.attributes.get("group", 1) == 1 else None
    if node.op in NORMALISATIONS:
        axis = node.attributes.get("axis", -1) % rank
        constants = all(v is None or v.is_constant for v in node.inputs[1:])
        return axis if axis == rank - 1 and constants and len(node.outputs) == 1 else None
    if node.op in REDUCTIONS and node.attributes.get("keepdims", 1):
        axes = node.attributes.get("axes")
        if axes is None:
            constant = node.constant(1)
            axes = None if constant is None else constant.reshape(-1).tolist()
        return int(axes[0]) % rank if axes is not None and len(axes) == 1 else None
    return None


def per_token_inputs(node: Node, index: Index, channel_axis: int) -> list[tuple[Value, Index]] | None:
    """The computed inputs of a per-token operator and where they are read, for its output read at `index`.

    A channelwise operator reads its whole axis, which then runs along the grid axis `channel_axis`. Which tokens are
    read must not depend on which channel is asked for: then one channel stands for all. None where the operator is not
    per-token.
    """
    if node.domain != STANDARD_DOMAIN:
        return None
    axis = channel_axis_of(node)
    if axis is not None:
        data = node.required(0)
        others = [c for a, c in enumerate(index) if a != axis]
        extent = data.known_shape[axis]
        if isinstance(extent, Dim):
            raise IndexingError(f"{node.label} mixes the symbolic extent {extent}")
        if dependencies(others) & (index[axis].depends_on() | {channel_axis}):
            return None
        whole = full_range(channel_axis, extent, index[0].rank)
        return [(data, (*index[:axis], whole, *index[axis + 1 :]))]
    if node.op in POINTWISE and len(node.outputs) == 1:
        computed = [v for v in node.inputs if v is not None and not v.is_constant]
        if any(v.shape is None for v in computed):
            return None
        return [(v, broadcast_index(index, v)) for v in computed]
    return None


def feature_pieces(node: Node, value: Value, index: Index, channel_axis: int) -> list[Read] | None:
    """The tensors that the channels of `value[index]` come from, where it joins several along its channels (Concat);
    the channel alone must decide which. None where the operator does not do that.
    """
    found = sources(node, value, index)
    if found is None or len(found) < 2:
        return None
    pieces = [read for read in found if isinstance(read, Read) and read.where is not None]
    if len(pieces) != len(found) or any(read.value.is_constant for read in pieces):
        return None
    own = [c for c in index if channel_axis in c.depends_on()]
    others = dependencies([c for c in index if channel_axis not in c.depends_on()])
    for read in pieces:
        assert read.where is not None
        decided_by = {a for a, extent in enumerate(read.where.shape) if extent > 1}
        if channel_axis not in decided_by or decided_by & others or not decided_by <= dependencies(own):
            return None
    return pieces


def candidates(value: Value, index: Index, channel_axis: int, positions: Mapping[Value, int]) -> Iterator[Candidate]:
    """Every value on the way back from `value[index]`, nearest first, through movement and per-token operators.

    Where an operator reads two computed tensors (x / norm(x)), the way of the one computed last is followed; that the
    other comes from the same tokens is proved when the operator is hoisted.
    """
    depth = joins = 0
    fills: tuple[tuple[int, Fill], ...] = ()
    domain: np.ndarray | None = None
    while True:
        last: Provenance | None = None
        try:
            for last in provenances(value, index, positions):
                inside = last.domain if domain is None else domain if last.domain is None else last.domain & domain
                found = fills + tuple((depth, f) for f in last.fills)
                yield Candidate(last.value, last.index, inside, found, depth, joins)
        except IndexingError:
            return
        if last is None or last.value.producer is None:
            return
        fills, domain = fills + tuple((depth, f) for f in last.fills), (last.domain if domain is None else domain)
        try:
            inputs = per_token_inputs(last.value.producer, last.index, channel_axis)
            if not inputs:
                pieces = feature_pieces(last.value.producer, last.value, last.index, channel_axis)
                inputs = [(piece.value, piece.index) for piece in pieces or ()]
        except IndexingError:
            return
        if not inputs:
            return
        joins += len(inputs) > 1
        value, index = max(inputs, key=lambda pair: (_elements(pair[0]), positions.get(pair[0], -1)))
        depth += 1


def _elements(value: Value) -> int:
    return int(np.prod([e if isinstance(e, int) else e.terms[0][1] for e in value.shape or ()], dtype=np.int64))


def feature_axes(way: Iterable[Candidate], channel_axes: frozenset[int]) -> frozenset[int]:
    """Grid axes that number the features of an operand: its channels, and what shares an axis with them (the heads).

    way: the operand's candidates, nearest first. The first operator that mixes channels tells. Without one, a
    coordinate that depends on a channel and something else does: at the nearest such value, or at the last value if
    that needs less (a reshape in between may put tokens and channels into one axis for a while). channel_axes: the grid
    axes known as channels.
    """
    nearest: frozenset[int] | None = None
    last = channel_axes
    for candidate in way:
        node = candidate.value.producer
        axis = None if node is None else channel_axis_of(node)
        if node is not None and axis is not None and node.op not in REDUCTIONS:
            return candidate.index[axis].depends_on() | channel_axes
        mixed = dependencies([c for c in candidate.index if c.depends_on() & channel_axes]) | channel_axes
        nearest = nearest or (mixed if mixed != channel_axes else None)
        last = mixed
    return min(nearest or last, last, key=len)


def roles(value: Value, index: Index, features: frozenset[int]) -> Roles | None:
    """Token and feature axes of a value read at `index`; None where an axis is both.

    features: grid axes that number channels and heads. An axis of fixed position (a slice of stacked q, k, v) is a
    feature.
    """
    tokens, featured = [], []
    for axis, (coordinate, extent) in enumerate(zip(index, value.known_shape, strict=True)):
        depends = coordinate.depends_on()
        if coordinate.batch or depends - features:
            if depends & features:
                return None
            tokens.append(axis)
        elif depends or extent != 1:
            featured.append(axis)
        elif axis == 0 and not _is_cut(value):
            tokens.append(axis)  # a batch of one
    return Roles(tuple(tokens), tuple(featured))


def _is_cut(value: Value) -> bool:
    """Whether a value is one of several pieces along its first axis (of stacked q, k, v, say)."""
    node = value.producer
    if node is None or node.op not in ("Split", "Slice") or node.domain != STANDARD_DOMAIN:
        return False
    shape = node.required(0).shape
    return shape is not None and shape[0] != value.known_shape[0]
