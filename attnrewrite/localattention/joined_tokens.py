"""Tokens of several kinds in one row, from where they are joined to where they are parted again.

A block may join class, register or carrier tokens to the tokens of every window (Concat), treat the row as one tensor
in norms, MLPs and residual sums, and part it afterwards (Slice, Split). Such operators treat every token alike, so they
may as well be applied to the parts. Here the values between are found, and written for every part on its own.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from attnrewrite.dims import Dim, Extent, NonAffine, Shape, product
from attnrewrite.facts import Facts
from attnrewrite.frontend.evaluate import python_slice
from attnrewrite.graph import STANDARD_DOMAIN, Node, Value
from attnrewrite.indexing.map import IndexingError
from attnrewrite.indexing.rules import RULES
from attnrewrite.localattention.blocks import REGROUPING, is_per_token
from attnrewrite.localattention.feature_map import MapWriter
from attnrewrite.localattention.returns import REGION_LIMIT
from attnrewrite.localattention.tokens import channel_axis_of

CUTTING = frozenset({"Slice", "Split", "Gather"})


@dataclass(frozen=True, eq=False)
class Cut:
    """An output of a node that holds tokens of one part alone, from `start` to `stop` of it; keeps_axis: in an axis."""

    value: Value
    part: int
    start: int
    stop: int
    keeps_axis: bool


@dataclass(frozen=True, eq=False)
class JoinedRows:
    """The values between a Concat and the nodes that part it again.

    join: the Concat. extents: of its parts. axes: for each value that the cuts need, the axis along which its parts
    lie, in topological order; where rows are folded into one axis with what is before them (a Gemm over all tokens),
    that axis. cuts: by the value that is cut.
    """

    join: Node
    extents: tuple[int, ...]
    axes: dict[Value, int]
    cuts: dict[Value, tuple[Cut, ...]]

    @property
    def starts(self) -> list[int]:
        return [0, *np.cumsum(self.extents).tolist()]


def find_joined_rows(facts: Facts, node: Node) -> JoinedRows | None:
    """The rows that a Concat joins, if they are parted again behind operators that treat every token alike."""
    if node.op != "Concat" or node.domain != STANDARD_DOMAIN or node.output.shape is None:
        return None
    axis = node.attributes["axis"] % len(node.output.shape)
    parts = [v.known_shape[axis] for v in node.reads()]
    extents = tuple(e for e in parts if isinstance(e, int))
    if len(extents) != len(parts) or len(extents) < 2:
        return None
    reached: dict[Value, int] = {node.output: axis}
    cuts: dict[Value, list[Cut]] = {}
    starts = np.cumsum([0, *extents])
    for user in _readers(facts, node.output, reached):
        value = next((v for v in user.inputs if v is not None and v in reached), None)
        if value is None:
            continue  # a subgraph reads it
        apart = value.known_shape[reached[value]] == starts[-1]
        found = _cuts(user, value, reached[value], starts) if user.op in CUTTING and apart else None
        if found is not None:
            cuts.setdefault(value, []).extend(found)
            continue
        behind = _axis_behind(user, reached, int(starts[-1]))
        if behind is not None:
            reached[user.output] = behind
    needed = _needed(reached, cuts)
    if node.output not in needed:
        return None
    if any(v in facts.graph.outputs or any(v in user.captures for user in facts.users(v)) for v in needed):
        return None  # it is known by its name and has to stay
    folded = [v for v, a in needed.items() if v.known_shape[a] != starts[-1]]
    if any(not any(o in needed for o in user.outputs) for v in folded for user in facts.users(v)):
        return None
    return JoinedRows(node, extents, needed, {v: tuple(c) for v, c in cuts.items()})


def _readers(facts: Facts, first: Value, reached: dict[Value, int]) -> Iterator[Node]:
    """Nodes that read what is reached, in topological order, growing as it does."""
    heap: list[tuple[int, Node]] = []
    seen: set[Node] = set()
    known = [first]
    while True:
        for value in known:
            for user in facts.users(value):
                if user not in seen and user.outputs:
                    seen.add(user)
                    heapq.heappush(heap, (facts.positions[user.outputs[0]], user))
        if not heap:
            return
        node = heapq.heappop(heap)[1]
        yield node
        known = [v for v in node.outputs if v in reached]


def _cuts(node: Node, value: Value, axis: int, starts: np.ndarray) -> list[Cut] | None:
    """What a node cuts out of a value along an axis; None where an output is not of one part, or not one run of it."""
    if node.required(0) is not value:
        return None
    spans: list[tuple[int, int]] = []
    rank, total = len(value.known_shape), int(starts[-1])
    if node.op == "Slice":
        bounds = [node.constant(k) for k in (1, 2)]
        axes = node.constant(3) if node.input(3) is not None else np.arange(rank)
        steps = node.constant(4) if node.input(4) is not None else np.ones(1, np.int64)
        if any(b is None or b.size != 1 for b in (*bounds, steps)) or axes is None or int(axes[0]) % rank != axis:
            return None
        (start,), (stop,), (step,) = (b.reshape(-1).tolist() for b in (*bounds, steps) if b is not None)
        kept = python_slice(start, stop, step, total)
        if step != 1 or kept.stop is None:
            return None
        spans.append((kept.start, kept.stop))
    elif node.attributes.get("axis", 0) % rank != axis:
        return None
    elif node.op == "Split":
        sizes = [o.known_shape[axis] for o in node.outputs]
        if any(isinstance(e, Dim) for e in sizes):
            return None
        ends = np.cumsum([0, *sizes]).tolist()
        spans += itertools.pairwise(ends)
    else:
        indices = node.constant(1)
        if indices is None or indices.ndim:
            return None
        at = int(indices) % total
        spans.append((at, at + 1))
    cuts = []
    for output, (start, stop) in zip(node.outputs, spans, strict=True):
        part = int(np.searchsorted(starts, start, side="right")) - 1
        if stop <= start or stop > starts[part + 1]:
            return None
        first = int(starts[part])
        cuts.append(Cut(output, part, start - first, stop - first, node.op != "Gather"))
    return cuts


def _axis_behind(node: Node, reached: dict[Value, int], total: int) -> int | None:
    """The axis of a node's output along which its parts lie; None where it does not leave them apart."""
    inside = [v for v in node.inputs if v is not None and v in reached]
    if len(node.outputs) != 1 or node.output.shape is None or node.domain != STANDARD_DOMAIN:
        return None
    rank = len(node.output.shape)
    if node.op in REGROUPING or node.op == "Transpose":
        value = inside[0]
        same = node.required(0) is value
        return _axis_kept(node, value.known_shape, reached[value], node.output.shape, total) if same else None
    if not is_per_token(node):
        return None
    channel = channel_axis_of(node)
    if channel is not None:
        return None if node.required(0) is not inside[0] or channel == reached[inside[0]] else reached[inside[0]]
    from_end = {len(v.known_shape) - reached[v] for v in inside}
    if len(from_end) != 1:
        return None
    axis = rank - from_end.pop()
    extent = _extent(inside[0], axis - rank)
    allowed = (1, total) if extent == total else (1,)
    others = [v for v in node.inputs if v is not None and v not in inside]
    if any(_extent(v, axis - rank) not in allowed for v in others):
        return None
    return axis if node.output.shape[axis] == extent else None


def _extent(value: Value, from_end: int) -> object:
    shape = value.known_shape
    return shape[from_end] if len(shape) >= -from_end else 1


def _axis_kept(node: Node, shape: Shape, axis: int, into: Shape, total: int) -> int | None:
    """The axis of the output [into] of a rearranging node whose last digit the parts are, as they are that of an axis
    of its input; None where they are of none.
    """
    if node.op == "Transpose":
        permutation = node.attributes.get("perm") or list(range(len(shape)))[::-1]
        return int(permutation.index(axis))
    return _regrouped(shape, axis, into, total)


def _regrouped(shape: Shape, axis: int, into: Shape, total: int) -> int | None:
    inner, behind = product(shape[axis + 1 :]), product(())
    for a in range(len(into) - 1, -1, -1):
        if behind == inner and into[a] != 1 and _is_multiple(into[a], total):
            return a
        behind = behind * into[a]
    return None


def _is_multiple(extent: Extent, total: int) -> bool:
    try:
        return extent // total * total == extent
    except NonAffine:
        return False


def _needed(reached: dict[Value, int], cuts: dict[Value, list[Cut]]) -> dict[Value, int]:
    """The values that cuts are made of, back to the Concat."""
    needed: set[Value] = set()
    pending = list(cuts)
    while pending:
        value = pending.pop()
        if value in needed:
            continue
        needed.add(value)
        if value.producer is not None:
            pending += [v for v in value.producer.inputs if v is not None and v in reached]
    return {v: axis for v, axis in reached.items() if v in needed}


# -- kept apart -------------------------------------------------------------------------------------------------------


def keep_apart(facts: Facts, rows: JoinedRows, made_by: str) -> list[Node]:
    """Edit the graph so that the parts of the rows stay apart; returns the nodes that join them for other readers, or
    cut them out of what these compute. Raises IndexingError, before anything is edited, where a part cannot be told.
    """
    return _Parting(facts, rows, made_by).run()


class _Parting:
    """Emits every value of the rows for every part."""

    def __init__(self, facts: Facts, rows: JoinedRows, made_by: str) -> None:
        self.facts, self.graph, self.rows = facts, facts.graph, rows
        self.writer = MapWriter(facts, (), made_by)
        self.parts: dict[tuple[Value, int], list[Value]] = {}
        self.movement: list[Node] = [rows.join]

    def run(self) -> list[Node]:
        rows = self.rows
        for value, axis in rows.axes.items():
            if self._parts(value, axis) is None:
                raise IndexingError(f"the parts of {value.name} do not stay apart")
        cut = {
            c.value: self._cut(c, self.parts[v, rows.axes[v]][c.part], rows.axes[v])
            for v, cuts in rows.cuts.items()
            for c in cuts
        }
        cutting = {v.producer for v in cut}
        for value, axis in rows.axes.items():
            readers = [
                n for n in self.facts.users(value) if n not in cutting and not any(o in rows.axes for o in n.outputs)
            ]
            if value is rows.join.output or not readers:
                continue
            joined = self._moving(
                "Concat", self.parts[value, axis], value.known_shape, f"{value.name}_joined", axis=axis
            )
            for reader in readers:
                reader.inputs = [joined if v is value else v for v in reader.inputs]
        self.graph.nodes.extend(self.writer.nodes)
        for old, new in cut.items():
            self.graph.replace_uses(old, new)
        self.graph.remove_dead()
        self.graph.sort()
        return self.movement

    def _moving(self, op: str, inputs: Sequence[Value], shape: Shape, stem: str, **attributes: Any) -> Value:
        """A node that moves tokens."""
        output = self.writer.emit(op, inputs, shape, stem, **attributes)
        assert output.producer is not None
        self.movement.append(output.producer)
        return output

    def _cut(self, cut: Cut, part: Value, axis: int) -> Value:
        """What a cut holds, cut out of its part as the model cuts it out of the row."""
        stem = cut.value.name
        own = len(self.writer.nodes)
        if not cut.keeps_axis:
            index = self.writer.constant(np.array(cut.start), f"{stem}_index")
            part = self.writer.emit("Gather", [part, index], cut.value.known_shape, stem, axis=axis)
        elif part.known_shape[axis] != cut.stop - cut.start:
            bounds = [self.writer.ints([b], f"{stem}_bound") for b in (cut.start, cut.stop, axis)]
            part = self.writer.emit("Slice", [part, *bounds], cut.value.known_shape, stem)
        elif cut.value in self.graph.outputs:
            part = self.writer.emit("Identity", [part], part.known_shape, stem)
        for node in self.writer.nodes[own:]:
            node.made_by = None  # the model's own
        return part

    def _parts(self, value: Value, axis: int) -> list[Value] | None:
        """The parts of a value along an axis, each computed from the parts of what it is made of; None where they are
        folded into the axis and cannot be.
        """
        if (value, axis) in self.parts:
            return self.parts[value, axis]
        node = value.producer
        apart: list[Value] | None = None
        if node is not None and self._joins(node, axis):
            apart = list(node.reads())
        elif node is not None and (value in self.rows.axes or self.facts.only_user(value) is not None):
            apart = self._made_of_parts(node, value, axis)
        if apart is None and value.known_shape[axis] == sum(self.rows.extents):
            apart = self._sliced(value, axis)
        if apart is not None:
            self.parts[value, axis] = apart
        return apart

    def _joins(self, node: Node, axis: int) -> bool:
        """Whether a node joins tensors of the parts' extents along an axis."""
        if node.op != "Concat" or node.domain != STANDARD_DOMAIN:
            return False
        along = node.attributes["axis"] % len(node.output.known_shape) == axis
        return along and tuple(v.known_shape[axis] for v in node.reads()) == self.rows.extents

    def _made_of_parts(self, node: Node, value: Value, axis: int) -> list[Value] | None:
        """The parts of what a node computes; None where it does not leave them apart."""
        shape, total = value.known_shape, sum(self.rows.extents)
        shapes = [_with(shape, axis, shape[axis] // total * e) for e in self.rows.extents]
        if node.domain == STANDARD_DOMAIN and (node.op in REGROUPING or node.op == "Transpose"):
            data = node.required(0)
            permutation = node.attributes.get("perm") or list(range(len(shape)))[::-1]
            moved = node.op == "Transpose"
            before = permutation[axis] if moved else _regrouped(shape, axis, data.known_shape, total)
            inside = None if before is None else self._parts(data, before)
            if inside is None or sum(isinstance(e, Dim) for e in shape) > 1:
                return None
            if moved:
                return [self.writer.transpose(p, permutation) for p in inside]
            return [self.writer.reshape(p, s) for p, s in zip(inside, shapes, strict=True)]
        if not is_per_token(node) or channel_axis_of(node) == axis:
            return None
        operands = [self._operand(node, k, axis - len(shape)) for k in range(len(node.inputs))]
        apart = [o for o in operands if o is not None]
        if len(apart) < len(operands):
            return None
        parts = []
        for inputs, own in zip(zip(*apart, strict=True), shapes, strict=True):
            parts.append(self.writer.emit(node.op, inputs, own, f"{value.name}_part", **node.attributes))
            parts[-1].dtype = value.dtype
        return parts

    def _operand(self, node: Node, position: int, from_end: int) -> Sequence[Value | None] | None:
        """An operand of a per-token operator for every part; None where it is not in parts."""
        operand, parts = node.input(position), len(self.rows.extents)
        weight = channel_axis_of(node) is not None and position > 0
        if operand is None or weight or _extent(operand, from_end) == 1:
            return [operand] * parts
        return self._parts(operand, len(operand.known_shape) + from_end)

    def _sliced(self, value: Value, axis: int) -> list[Value]:
        """The parts of a value that something else computes."""
        if value.is_constant:
            pieces = np.split(value.constant, self.rows.starts[1:-1], axis)
            return [self.writer.constant(np.ascontiguousarray(c), value.name) for c in pieces]
        parts = []
        for start, extent in zip(self.rows.starts, self.rows.extents, strict=False):
            bounds = [self.writer.ints([b], f"{value.name}_bound") for b in (start, start + extent, axis)]
            shape = _with(value.known_shape, axis, extent)
            parts.append(self._moving("Slice", [value, *bounds], shape, f"{value.name}_part"))
        return parts


def _with(shape: Shape, axis: int, extent: Extent) -> Shape:
    return (*shape[:axis], extent, *shape[axis + 1 :])


# -- several in a row -------------------------------------------------------------------------------------------------


def connected(facts: Facts, first: Node, counts: Callable[[Node], bool]) -> tuple[list[JoinedRows], list[Value]]:
    """The rows that begin at a Concat and those joined of what they are parted into, block after block, at Concats that
    count; and all values behind the cuts that are these parts, moved or treated alike token by token.
    """
    found: list[JoinedRows] = []
    behind: list[Value] = []
    pending, seen = [first], {first}
    while pending:
        rows = find_joined_rows(facts, pending.pop())
        if rows is None:
            continue
        found.append(rows)
        reached = {c.value: 0 for cuts in rows.cuts.values() for c in cuts}
        behind += reached
        known = list(reached)
        while known:
            for user in facts.users(known.pop()):
                if user in seen or len(seen) > REGION_LIMIT * len(found):
                    continue
                seen.add(user)
                if counts(user) and find_joined_rows(facts, user) is not None:
                    pending.append(user)
                elif user.domain == STANDARD_DOMAIN and (user.op in RULES or is_per_token(user)):
                    known += user.outputs
                    behind += user.outputs
    return found, behind
