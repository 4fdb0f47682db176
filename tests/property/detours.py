"""Random movement that undoes itself, spliced into the edges of a model: another spelling of the same function.

    varied = with_detours(model, random.Random(7), 4)      # the model, and the names of the detours taken

A detour moves numbers and moves them back: roll and roll back, split and concatenate, pad and crop, gather by a
permutation and by its inverse. The tensors between logits and the weighting of the values only take detours that a
softmax over one axis leaves readable (transposes, reshapes): splitting probabilities is a second use of them.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

END = np.iinfo(np.int64).max
FLOATING = (TensorProto.FLOAT, TensorProto.FLOAT16)
Extent = int | str


@dataclass(frozen=True)
class Edge:
    """One input of one node, and the tensor that flows through it."""

    node: int
    position: int
    value: str
    shape: tuple[Extent, ...]
    scores: bool

    def static_axes(self, least: int = 2) -> list[int]:
        return [a for a, extent in enumerate(self.shape) if isinstance(extent, int) and extent >= least]


class Splicer:
    """Adds nodes in front of one edge; names are unique per model."""

    def __init__(self, model: onnx.ModelProto, opset: int) -> None:
        self.model, self.opset, self.nodes = model, opset, list[onnx.NodeProto]()
        self.taken = sum(len(n.output) for n in model.graph.node) + len(model.graph.initializer)

    def name(self) -> str:
        self.taken += 1
        return f"detour{self.taken}"

    def constant(self, values: object, dtype: type | np.dtype = np.int64) -> str:
        name = self.name()
        self.model.graph.initializer.append(numpy_helper.from_array(np.asarray(values, dtype), name))
        return name

    def op(self, op: str, *inputs: str, **attributes: object) -> str:
        name = self.name()
        self.nodes.append(helper.make_node(op, list(inputs), [name], name=name, **attributes))
        return name

    def slice(self, x: str, start: int, end: int, axis: int, step: int = 1) -> str:
        return self.op("Slice", x, *(self.constant([v]) for v in (start, end, axis, step)))

    def reshape(self, x: str, shape: Sequence[Extent]) -> str:
        return self.op("Reshape", x, self.constant([e if isinstance(e, int) else -1 for e in shape]))

    def axes(self, op: str, x: str, axis: int) -> str:
        """Squeeze or Unsqueeze as the opset writes it."""
        if self.opset < 13:
            return self.op(op, x, axes=[axis])
        return self.op(op, x, self.constant([axis]))

    def roll(self, x: str, shift: int, axis: int) -> str:
        """out[i] = x[(i + shift) mod extent], 0 < shift < extent."""
        return self.op("Concat", self.slice(x, shift, END, axis), self.slice(x, 0, shift, axis), axis=axis)


Detour = Callable[[Splicer, random.Random, Edge], str | None]


def identity(s: Splicer, r: random.Random, e: Edge) -> str:
    return s.op("Identity", e.value)


def transposed(s: Splicer, r: random.Random, e: Edge) -> str:
    perm = r.sample(range(len(e.shape)), len(e.shape))
    return s.op("Transpose", s.op("Transpose", e.value, perm=perm), perm=np.argsort(perm).tolist())


def unsqueezed(s: Splicer, r: random.Random, e: Edge) -> str:
    axis = r.randint(0, len(e.shape))
    return s.axes("Squeeze", s.axes("Unsqueeze", e.value, axis), axis)


def reshaped(s: Splicer, r: random.Random, e: Edge) -> str | None:
    """Two neighbouring axes merged and split again."""
    if len(e.shape) < 2 or sum(isinstance(x, str) for x in e.shape) > 1:
        return None
    at = r.randrange(len(e.shape) - 1)
    one, two = e.shape[at], e.shape[at + 1]
    merged = one * two if isinstance(one, int) and isinstance(two, int) else "batch"
    return s.reshape(s.reshape(e.value, (*e.shape[:at], merged, *e.shape[at + 2 :])), e.shape)


def split_and_concatenated(s: Splicer, r: random.Random, e: Edge) -> str | None:
    axis, extent = _axis(r, e)
    if axis is None:
        return None
    at = r.randrange(1, extent)
    return s.op("Concat", s.slice(e.value, 0, at, axis), s.slice(e.value, at, END, axis), axis=axis)


def padded_and_cropped(s: Splicer, r: random.Random, e: Edge) -> str | None:
    axis, extent = _axis(r, e)
    if axis is None:
        return None
    before, after = r.randint(0, 2), r.randint(0, 2)
    pads = [0] * (2 * len(e.shape))
    pads[axis], pads[axis + len(e.shape)] = before, after
    return s.slice(s.op("Pad", e.value, s.constant(pads)), before, before + extent, axis)


def gathered_and_back(s: Splicer, r: random.Random, e: Edge) -> str | None:
    axis, extent = _axis(r, e)
    if axis is None:
        return None
    order = r.sample(range(extent), extent)
    there = s.op("Gather", e.value, s.constant(order), axis=axis)
    return s.op("Gather", there, s.constant(np.argsort(order)), axis=axis)


def rolled_and_back(s: Splicer, r: random.Random, e: Edge) -> str | None:
    axis, extent = _axis(r, e)
    if axis is None:
        return None
    shift = r.randrange(1, extent)
    return s.roll(s.roll(e.value, shift, axis), extent - shift, axis)


def flipped_twice(s: Splicer, r: random.Random, e: Edge) -> str | None:
    axis, _ = _axis(r, e)
    if axis is None:
        return None
    return s.slice(s.slice(e.value, -1, -END, axis, -1), -1, -END, axis, -1)


def repeated_and_cropped(s: Splicer, r: random.Random, e: Edge) -> str | None:
    axis, extent = _axis(r, e)
    if axis is None:
        return None
    return s.slice(s.op("Concat", e.value, e.value, axis=axis), extent, END, axis)


def interleaved_and_back(s: Splicer, r: random.Random, e: Edge) -> str | None:
    """Even positions before odd ones, then back by reshape and transpose."""
    axes = [a for a in e.static_axes() if int(e.shape[a]) % 2 == 0]
    if not axes or sum(isinstance(x, str) for x in e.shape) > 1:
        return None
    axis = r.choice(axes)
    halves = s.op("Concat", s.slice(e.value, 0, END, axis, 2), s.slice(e.value, 1, END, axis, 2), axis=axis)
    apart = s.reshape(halves, (*e.shape[:axis], 2, int(e.shape[axis]) // 2, *e.shape[axis + 1 :]))
    order = list(range(len(e.shape) + 1))
    order[axis], order[axis + 1] = axis + 1, axis
    return s.reshape(s.op("Transpose", apart, perm=order), e.shape)


def stacked_and_picked(s: Splicer, r: random.Random, e: Edge) -> str:
    axis = r.randint(0, len(e.shape))
    one = s.axes("Unsqueeze", e.value, axis)
    return s.op("Gather", s.op("Concat", one, one, axis=axis), s.constant(r.randint(0, 1)), axis=axis)


def reshaped_to_its_shape(s: Splicer, r: random.Random, e: Edge) -> str:
    """x.reshape(x.shape), the shape read off the tensor."""
    return s.op("Reshape", e.value, s.op("Shape", e.value))


ANYWHERE: dict[str, Detour] = {
    f.__name__: f for f in (identity, transposed, unsqueezed, reshaped, reshaped_to_its_shape)
}
OF_TOKENS: dict[str, Detour] = ANYWHERE | {
    f.__name__: f
    for f in (
        split_and_concatenated,
        padded_and_cropped,
        gathered_and_back,
        rolled_and_back,
        flipped_twice,
        repeated_and_cropped,
        interleaved_and_back,
        stacked_and_picked,
    )
}


def with_detours(model: onnx.ModelProto, r: random.Random, count: int) -> tuple[onnx.ModelProto, list[str]]:
    """The model with up to `count` detours on random edges, and their names."""
    taken = []
    for _ in range(count):
        edge = r.choice(edges(model))
        name = r.choice(list(ANYWHERE if edge.scores else OF_TOKENS))
        spliced = spliced_in(model, edge, lambda s, e, detour=OF_TOKENS[name]: detour(s, r, e))
        if spliced is not None:
            model = spliced
            taken.append(name)
    return model, taken


def spliced_in(
    model: onnx.ModelProto, edge: Edge, write: Callable[[Splicer, Edge], str | None]
) -> onnx.ModelProto | None:
    """A copy of the model whose edge reads what `write` makes of its value; None where `write` has no use for it."""
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    splicer = Splicer(changed, opset_of(changed))
    result = write(splicer, edge)
    if result is None:
        return None
    changed.graph.node[edge.node].input[edge.position] = result
    nodes = list(changed.graph.node)
    del changed.graph.node[:]
    changed.graph.node.extend([*nodes[: edge.node], *splicer.nodes, *nodes[edge.node :]])
    return changed


def opset_of(model: onnx.ModelProto) -> int:
    return next(o.version for o in model.opset_import if o.domain == "")


def edges(model: onnx.ModelProto) -> list[Edge]:
    """Inputs of nodes that carry computed floats of known rank, but for what leaves the model."""
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True).graph
    kinds = {v.name: v.type.tensor_type for v in [*inferred.value_info, *inferred.input]}
    scores = set(_scores(model.graph))
    found = []
    for at, node in enumerate(model.graph.node):
        for position, value in enumerate(node.input):
            kind = kinds.get(value)
            if kind is None or kind.elem_type not in FLOATING or node.output[0] in [o.name for o in model.graph.output]:
                continue
            shape = tuple(d.dim_value if d.HasField("dim_value") else "batch" for d in kind.shape.dim)
            if shape:
                found.append(Edge(at, position, value, shape, value in scores))
    return found


def _scores(graph: onnx.GraphProto) -> Iterator[str]:
    """Logits and probabilities: the tensors between a contraction (the products that one sums, where it is written so),
    a softmax (or the exponentials of one that is written out) and the next contraction.
    """
    producers = {o: n for n in graph.node for o in n.output}
    initializers = {i.name for i in graph.initializer}
    for softmax in (n for n in graph.node if n.op_type in ("Softmax", "LogSoftmax", "Exp")):
        pending, summed = [softmax.input[0]], False
        while pending:
            value = pending.pop()
            yield value
            node = producers.get(value)
            if node is None or (node.op_type in ("MatMul", "Einsum", "Mul") and summed):
                continue
            if node.op_type == "ReduceSum":
                pending.append(node.input[0])
                summed = True
            elif node.op_type not in CONTRACTIONS:
                pending += [v for v in node.input if v not in initializers]
        pending = list(softmax.output)
        while pending:
            value = pending.pop()
            yield value
            for user in (n for n in graph.node if value in n.input and n.op_type not in CONTRACTIONS):
                pending += user.output


CONTRACTIONS = {"MatMul", "Einsum", "ReduceSum"}


def _axis(r: random.Random, edge: Edge) -> tuple[int, int] | tuple[None, int]:
    axes = edge.static_axes()
    if not axes:
        return None, 0
    axis = r.choice(axes)
    return axis, int(edge.shape[axis])
