"""Write a pool on its map: the reduction there, then one movement to the order that the model computes it in.

An attention between pooled tokens may leave its output in that order too (agents that are read back inside their
window): it is put onto the map and back. All such movement is one Gather each; it is gone once the attentions around
have become ops on the map, and where it would not be, nothing is written.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from attnrewrite.dims import Dim, Extent, Shape, static
from attnrewrite.facts import Facts
from attnrewrite.graph import STANDARD_DOMAIN, Node, Value
from attnrewrite.indexing.map import IndexingError
from attnrewrite.localattention.attention import read_attention
from attnrewrite.localattention.geometry import PADDING, Sizes
from attnrewrite.localattention.grid import count, flat_pixels, pixels_read, spread
from attnrewrite.localattention.hoist import NOT_ON_MAP, Anchor, Hoister
from attnrewrite.localattention.maps import meet, read_ways
from attnrewrite.localattention.pools import Pool
from attnrewrite.localattention.returns import FOR_THE_NEXT, RETURNED
from attnrewrite.localattention.site import Decline

# How many operators behind a pool are looked at for the attentions that it is for.
REGION_LIMIT = 240


@dataclass(frozen=True, eq=False)
class Layout:
    """How a value of the model lays out the tokens of a map: place int64 over its token axes, the row-major position on
    the map [batch, *spatial] (the elements of a symbolic batch that it enumerates included), PADDING for none.
    """

    shape: Shape
    tokens: tuple[int, ...]
    features: tuple[int, ...]
    place: np.ndarray
    batch: Extent
    spatial: Sizes

    @property
    def lead(self) -> Extent:
        """Elements of the batch that are not enumerated."""
        return self.batch // count(self.batch) if isinstance(self.batch, Dim) else 1

    @property
    def width(self) -> int:
        return math.prod(count(self.shape[a]) for a in self.features)

    def axes(self) -> tuple[Shape, list[int]]:
        """The shape with the unenumerated batch as an axis of its own, and the axes that hold it, tokens, features."""
        at = next((a for a, e in enumerate(self.shape) if isinstance(e, Dim)), 0)
        split = (*self.shape[:at], self.lead, count(self.shape[at]), *self.shape[at + 1 :])
        return split, [at, *(a + (a >= at) for a in (*self.tokens, *self.features))]


class Mover:
    """Moves tensors between a map and a layout; `movement` are the nodes that do."""

    def __init__(self, hoister: Hoister, layout: Layout) -> None:
        self.hoister, self.layout = hoister, layout
        self.movement: list[Node] = []

    def out(self, on_map: Value) -> Value:
        """A map [batch, *spatial, F] in the layout; zero where it lists no token of the map."""
        layout, hoister = self.layout, self.hoister
        tokens = count(layout.batch) * math.prod(layout.spatial)
        shape = (layout.lead, tokens, layout.width)
        sizes = hoister.ints([e if isinstance(e, int) else -1 for e in shape], "sizes")
        flat = hoister.emit("Reshape", [on_map, sizes], shape, f"{on_map.name}_tokens")  # the map itself is kept
        table = layout.place.reshape(-1)
        if (table == PADDING).any():
            ends = hoister.ints([0, 0, 0, 0, 1, 0], "pads")
            flat = hoister.emit("Pad", [flat, ends], (layout.lead, tokens + 1, layout.width), f"{on_map.name}_padded")
            table = np.where(table == PADDING, tokens, table)
        listed = self._gathered(flat, table)
        split, axes = layout.axes()
        spread_out = hoister.reshape(listed, tuple(split[a] for a in axes))
        return hoister.reshape(hoister.transpose(spread_out, np.argsort(axes).tolist()), layout.shape)

    def home(self, value: Value) -> Value:
        """A tensor in the layout, which must list every token of the map, as the map [batch, *spatial, F]."""
        layout, hoister = self.layout, self.hoister
        split, axes = layout.axes()
        listed = hoister.transpose(hoister.reshape(value, split), axes)
        flat = hoister.reshape(listed, (layout.lead, layout.place.size, layout.width))
        moved = self._gathered(flat, np.argsort(layout.place.reshape(-1)))
        return hoister.reshape(moved, (layout.batch, *layout.spatial, layout.width))

    def _gathered(self, flat: Value, table: np.ndarray) -> Value:
        """The tokens of [batch, T, F] in this order."""
        if np.array_equal(table, np.arange(static(flat.known_shape[1]))):  # no movement; what is before it stays
            return self.hoister.emit("Identity", [flat], flat.known_shape, f"{flat.name}_in_order")
        shape = (flat.known_shape[0], len(table), flat.known_shape[2])
        order = self.hoister.constant(table, f"{flat.name}_order")
        picked = self.hoister.emit("Gather", [flat, order], shape, f"{flat.name}_moved", axis=1)
        assert picked.producer is not None
        self.movement.append(picked.producer)
        return picked


def pooled_map(hoister: Hoister, pool: Pool) -> Value:
    """The pool on its map, [batch, *pool.spatial, F]. Raises NotHoistable or IndexingError."""
    source, shape = pool.source, pool.node.output.known_shape
    channel = len(shape) + 1
    map_ = hoister.source_map(source.value, source.roles, source.batch, source.spatial)
    pixels = pixels_read(source.candidate, source.roles.tokens)
    known = source.value.known_shape
    anchor = Anchor(source.value, known, source.candidate.index, source.roles, source.roles.features, map_, pixels)
    found, picked = hoister.hoist(pool.reduction.value, pool.reduction.index, channel, pool.grid_features, anchor)
    axes = [(a, count(shape[a])) for a in pool.features]
    name = pool.node.output.name
    tensor = hoister.laid_out(hoister.features(found, spread(picked, axes).reshape(-1), name), channels_first=False)
    width, tokens = math.prod(e for _, e in axes), pool.cells.total
    for stride, extent in reversed(pool.cells.digits):
        view = hoister.reshape(tensor, (source.batch, tokens // (stride * extent), extent, stride * width))
        tensor = _reduced(hoister, pool.reduction.op, view, f"{name}_pooled")
        tokens //= extent
    return hoister.reshape(tensor, (source.batch, *pool.spatial, width))


def is_made_of(facts: Facts, pool: Pool) -> bool:
    """Whether what is pooled is made of the pool's map by per-token operators alone."""
    try:
        pooled_map(Hoister(facts, pool.source.spatial, ""), pool)
    except NOT_ON_MAP:
        return False
    return True


def _reduced(hoister: Hoister, op: str, view: Value, stem: str) -> Value:
    """The reduction of axis 2 of [B, above, cell, below]."""
    shape = (*view.known_shape[:2], view.known_shape[3])
    if op == "ReduceSum" or hoister.graph.opset >= 18:
        return hoister.emit(op, [view, hoister.ints([2], "axes")], shape, stem, keepdims=0)
    return hoister.emit(op, [view], shape, stem, axes=[2], keepdims=0)


def write_pool(facts: Facts, pool: Pool, made_by: str) -> tuple[Value, list[Node]]:
    """Edit the graph so that the pool is computed on its map; returns the pooled map and the nodes that move tokens.

    Raises NotHoistable or IndexingError, before anything is edited, where the map is not one of per-token operators.
    """
    graph = facts.graph
    hoister = Hoister(facts, pool.source.spatial, made_by)
    on_map = pooled_map(hoister, pool)
    layout = Layout(
        pool.node.output.known_shape, pool.tokens, pool.features, pool.place, pool.source.batch, pool.spatial
    )
    mover = Mover(hoister, layout)
    moved = mover.out(on_map)
    moved.dtype = pool.node.output.dtype
    graph.nodes.extend(hoister.nodes)
    graph.replace_uses(pool.node.output, moved)
    graph.remove_dead()
    graph.sort()
    return on_map, mover.movement


def return_outputs(facts: Facts, on_map: Value, pool: Pool, made_by: str) -> list[Node]:
    """Edit the graph so that the output of every attention whose queries are the pooled map, and which returns to no
    map, passes over that map; returns the nodes that move its tokens.
    """
    movement: list[Node] = []
    graph = facts.graph
    near = [v.producer for v in behind(facts, on_map) if v.producer is not None]
    for softmax in [n for n in near if n.op == "Softmax" and n.domain == STANDARD_DOMAIN]:
        facts = Facts(graph)
        found = _left_in_windows(facts, softmax, on_map, pool)
        if found is None:
            continue
        value, layout = found
        hoister = Hoister(facts, pool.spatial, made_by)
        mover = Mover(hoister, layout)
        split = hoister.reshape(value, layout.shape)
        home = mover.home(split)
        assert home.producer is not None
        home.producer.made_by = RETURNED
        back = hoister.reshape(mover.out(home), value.known_shape)
        for node in hoister.nodes:
            if home in node.inputs:
                node.made_by = FOR_THE_NEXT
        for user in facts.users(value):
            user.inputs = [back if v is value else v for v in user.inputs]
        graph.nodes.extend(hoister.nodes)
        graph.sort()
        movement += mover.movement
    return movement


def behind(facts: Facts, value: Value) -> list[Value]:
    """What is computed from a value by the nearest operators, in topological order."""
    reached, found = {value}, []
    for user in facts.graph.nodes[facts.positions[value] + 1 :]:
        if any(v in reached for v in user.reads()):
            reached.update(user.outputs)
            found += user.outputs
            if len(found) >= REGION_LIMIT:
                break
    return found


def _left_in_windows(facts: Facts, softmax: Node, on_map: Value, pool: Pool) -> tuple[Value, Layout] | None:
    """The output of an attention and where its rows lie on the pooled map; None where it is none of this map, or
    returns to it by itself.
    """
    attention = read_attention(facts, softmax)
    if isinstance(attention, Decline) or attention.output in facts.graph.outputs:
        return None
    ways = read_ways(facts, attention)
    if isinstance(ways, Decline):
        return None
    maps = meet(facts, attention, ways)
    if not isinstance(maps, Decline) and any(q.value is on_map for q in maps.queries):
        return None
    shape = attention.output_shape
    tokens = tuple(a for a in range(len(shape)) if a not in ways.features)
    features = tuple(a for a in range(len(shape)) if a in ways.features)
    total = count(pool.source.batch) * math.prod(pool.spatial)
    for source in ways.sources["query"]:
        if source.value is not on_map or source.candidate.domain is not None:
            continue
        try:
            place = flat_pixels(source.candidate, source.roles.tokens, shape, tokens)
        except IndexingError:
            return None
        if np.array_equal(np.sort(place.reshape(-1)), np.arange(total)):
            return attention.output, Layout(shape, tokens, features, place, pool.source.batch, pool.spatial)
    return None
