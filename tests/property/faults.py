"""Random near misses: a spelling with one fault in it, of the kinds people and converters make.

    faulty = with_fault(drawn.model, random.Random(7))     # (model, name of the fault) or None where it has no place

A fault changes what the model computes, or (a second consumer) what must stay in memory. Where it happens to change
nothing that matters (channels moved before a sum over them, say), the rewritten model must compute the faulty one's
function all the same: whoever uses these compares with the faulty model.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from tests.property.detours import END, FLOATING, Edge, Splicer, edges, opset_of, spliced_in

Fault = Callable[[onnx.ModelProto, random.Random], onnx.ModelProto | None]


def _on_an_edge(write: Callable[[Splicer, random.Random, Edge, int], str]) -> Fault:
    """A fault on one static axis of one edge that carries tokens."""

    def fault(model: onnx.ModelProto, r: random.Random) -> onnx.ModelProto | None:
        places = [(e, a) for e in edges(model) if not e.scores for a in e.static_axes()]
        if not places:
            return None
        edge, axis = r.choice(places)
        return spliced_in(model, edge, lambda s, e: write(s, r, e, axis))

    return fault


@_on_an_edge
def rolled(s: Splicer, r: random.Random, e: Edge, axis: int) -> str:
    """A roll that nothing undoes."""
    return s.roll(e.value, r.randrange(1, int(e.shape[axis])), axis)


@_on_an_edge
def off_by_one(s: Splicer, r: random.Random, e: Edge, axis: int) -> str:
    """Everything one position further, the first position empty, repeated or mirrored."""
    pads = [0] * (2 * len(e.shape))
    pads[axis] = 1
    mode = r.choice(["constant", "edge", "reflect"])
    return s.slice(s.op("Pad", e.value, s.constant(pads), mode=mode), 0, int(e.shape[axis]), axis)


@_on_an_edge
def two_exchanged(s: Splicer, r: random.Random, e: Edge, axis: int) -> str:
    """Two positions of one axis exchanged."""
    extent = int(e.shape[axis])
    order = list(range(extent))
    one, other = r.sample(range(extent), 2)
    order[one], order[other] = other, one
    return s.op("Gather", e.value, s.constant(order), axis=axis)


@_on_an_edge
def one_repeated(s: Splicer, r: random.Random, e: Edge, axis: int) -> str:
    """One position reads its neighbour's numbers."""
    order = list(range(int(e.shape[axis])))
    at = r.randrange(1, len(order))
    order[at] = at - 1
    return s.op("Gather", e.value, s.constant(order), axis=axis)


@_on_an_edge
def half_rolled(s: Splicer, r: random.Random, e: Edge, axis: int) -> str:
    """One part of an axis (some heads, some channels, some windows) rolled along another, the rest as it was."""
    others = [a for a in e.static_axes() if a != axis]
    if not others:
        return s.roll(e.value, 1, axis)
    along = r.choice(others)
    at = r.randrange(1, int(e.shape[axis]))
    kept, changed = s.slice(e.value, 0, at, axis), s.slice(e.value, at, END, axis)
    return s.op("Concat", kept, s.roll(changed, r.randrange(1, int(e.shape[along])), along), axis=axis)


@_on_an_edge
def flipped(s: Splicer, r: random.Random, e: Edge, axis: int) -> str:
    return s.slice(e.value, -1, -END, axis, -1)


def axes_swapped(model: onnx.ModelProto, r: random.Random) -> onnx.ModelProto | None:
    """Two axes of one extent exchanged."""
    places = [
        (e, a, b)
        for e in edges(model)
        for k, a in enumerate(e.static_axes())
        for b in e.static_axes()[k + 1 :]
        if e.shape[a] == e.shape[b]
    ]
    if not places:
        return None
    edge, one, other = r.choice(places)
    perm = list(range(len(edge.shape)))
    perm[one], perm[other] = other, one
    return spliced_in(model, edge, lambda s, e: s.op("Transpose", e.value, perm=perm))


def transposed_after_reshape(model: onnx.ModelProto, r: random.Random) -> onnx.ModelProto | None:
    """An axis split the other way round: the same numbers of elements, another order (windows and places swapped)."""
    places = []
    for e in edges(model):
        for a in e.static_axes(4):
            factors = [f for f in range(2, int(e.shape[a])) if int(e.shape[a]) % f == 0]
            places += [(e, a, f) for f in factors]
    places = [p for p in places if sum(isinstance(x, str) for x in p[0].shape) < 2]
    if not places:
        return None
    edge, axis, factor = r.choice(places)

    def write(s: Splicer, e: Edge) -> str:
        shape = (*e.shape[:axis], factor, int(e.shape[axis]) // factor, *e.shape[axis + 1 :])
        order = list(range(len(shape)))
        order[axis], order[axis + 1] = axis + 1, axis
        return s.reshape(s.op("Transpose", s.reshape(e.value, shape), perm=order), e.shape)

    return spliced_in(model, edge, write)


def softmax_elsewhere(model: onnx.ModelProto, r: random.Random) -> onnx.ModelProto | None:
    """The softmax runs over another axis."""
    shapes = {e.value: e.shape for e in edges(model)}
    places = [
        (k, a)
        for k, n in enumerate(model.graph.node)
        if n.op_type == "Softmax" and n.input[0] in shapes and opset_of(model) >= 13
        for a in range(1, len(shapes[n.input[0]]))
        if a != next((x.i for x in n.attribute if x.name == "axis"), -1) % len(shapes[n.input[0]])
    ]
    if not places:
        return None
    at, axis = r.choice(places)
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    node = changed.graph.node[at]
    del node.attribute[:]
    node.attribute.append(helper.make_attribute("axis", axis))
    return changed


def second_consumer(model: onnx.ModelProto, r: random.Random) -> onnx.ModelProto | None:
    """Logits or probabilities leave the model too."""
    softmaxes = [n for n in model.graph.node if n.op_type == "Softmax"]
    if not softmaxes:
        return None
    value = r.choice([r.choice(softmaxes).output[0], r.choice(softmaxes).input[0]])
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    changed.graph.node.append(helper.make_node("Identity", [value], ["seen"], name="seen"))
    changed.graph.output.append(helper.make_tensor_value_info("seen", TensorProto.FLOAT, None))
    return changed


def constant_changed(model: onnx.ModelProto, r: random.Random) -> onnx.ModelProto | None:
    """One entry of one integer table that moves data (a gather's index, a slice's start, a permutation) is another."""
    tables = {i.name: i for i in model.graph.initializer if i.data_type == TensorProto.INT64}
    places = [
        (n.op_type, n.input[1]) for n in model.graph.node if n.op_type in ("Gather", "Slice") and n.input[1] in tables
    ]
    places = [(op, name) for op, name in places if np.prod(tables[name].dims) > (1 if op == "Gather" else 0)]
    if not places:
        return None
    op, name = r.choice(places)
    values = numpy_helper.to_array(tables[name]).copy()
    at = r.randrange(values.size)
    values.reshape(-1)[at] = r.choice(values.reshape(-1).tolist()) if op == "Gather" else values.reshape(-1)[at] + 1
    return _with_initializer(model, name, values)


def number_changed(model: onnx.ModelProto, r: random.Random) -> onnx.ModelProto | None:
    """One entry of one table of numbers (a mask, a bias, a filter, an angle) is another, or that of its neighbour."""
    tables = [i for i in model.graph.initializer if i.data_type in FLOATING and np.prod(i.dims) > 1]
    if not tables:
        return None
    chosen = r.choice(tables)
    values = numpy_helper.to_array(chosen).copy()
    flat, at = values.reshape(-1), r.randrange(values.size)
    flat[at] = r.choice([flat[at - 1], 0.0, 1.0])
    return _with_initializer(model, chosen.name, values)


def flag_changed(model: onnx.ModelProto, r: random.Random) -> onnx.ModelProto | None:
    """One entry of one boolean mask is the other."""
    tables = [i for i in model.graph.initializer if i.data_type == TensorProto.BOOL]
    if not tables:
        return None
    chosen = r.choice(tables)
    values = numpy_helper.to_array(chosen).copy()
    at = r.randrange(values.size)
    values.reshape(-1)[at] = not values.reshape(-1)[at]
    return _with_initializer(model, chosen.name, values)


def attribute_changed(model: onnx.ModelProto, r: random.Random) -> onnx.ModelProto | None:
    """A pool, a fold or a convolution whose pads, strides or dilations are off by one."""
    places = [
        (at, k, j)
        for at, node in enumerate(model.graph.node)
        for k, attribute in enumerate(node.attribute)
        if attribute.name in ("pads", "strides", "dilations", "kernel_shape")
        for j in range(len(attribute.ints))
    ]
    if not places:
        return None
    at, k, j = r.choice(places)
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    changed.graph.node[at].attribute[k].ints[j] += 1
    return changed


def _with_initializer(model: onnx.ModelProto, name: str, values: np.ndarray) -> onnx.ModelProto:
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    for initializer in changed.graph.initializer:
        if initializer.name == name:
            initializer.CopyFrom(numpy_helper.from_array(values, name))
    return changed


def permutation_changed(model: onnx.ModelProto, r: random.Random) -> onnx.ModelProto | None:
    """A Transpose exchanges two axes of one extent more than it should."""
    shapes = {e.value: e.shape for e in edges(model)}
    places = []
    for at, node in enumerate(model.graph.node):
        if node.op_type == "Transpose" and node.input[0] in shapes:
            shape, perm = shapes[node.input[0]], list(node.attribute[0].ints)
            places += [(at, i, j) for i, j in _pairs(len(perm)) if shape[perm[i]] == shape[perm[j]] != 1]
    if not places:
        return None
    at, one, other = r.choice(places)
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    perm = changed.graph.node[at].attribute[0].ints
    perm[one], perm[other] = perm[other], perm[one]
    return changed


def _pairs(count: int) -> Iterable[tuple[int, int]]:
    return ((i, j) for i in range(count) for j in range(i + 1, count))


FAULTS: dict[str, Fault] = {
    "rolled": rolled,
    "off-by-one": off_by_one,
    "two-exchanged": two_exchanged,
    "one-repeated": one_repeated,
    "half-rolled": half_rolled,
    "flipped": flipped,
    "axes-swapped": axes_swapped,
    "split-the-other-way": transposed_after_reshape,
    "softmax-elsewhere": softmax_elsewhere,
    "second-consumer": second_consumer,
    "constant-changed": constant_changed,
    "permutation-changed": permutation_changed,
    "number-changed": number_changed,
    "flag-changed": flag_changed,
    "attribute-changed": attribute_changed,
}


def with_fault(model: onnx.ModelProto, r: random.Random) -> tuple[onnx.ModelProto, str] | None:
    """The model with one random fault that is still a valid model, and the fault's name."""
    for name in r.sample(list(FAULTS), len(FAULTS)):
        faulty = FAULTS[name](model, r)
        if faulty is not None and _is_valid(faulty):
            return faulty, name
    return None


def _is_valid(model: onnx.ModelProto) -> bool:
    try:
        onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True)
    except onnx.shape_inference.InferenceError:
        return False
    return True
