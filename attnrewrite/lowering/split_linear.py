"""One product per part, where a wide linear layer is cut right after: q, k and v of `qkv = x W + b`.

    y = x W + b;  q, k, v = y[..., :n], y[..., n:2n], y[..., 2n:]   ->   q = x W[:, :n] + b[:n], ...

The arithmetic of every element stays what it was; the parts are written where they are read, not copied out.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import helper, numpy_helper


@dataclass(frozen=True)
class _Part:
    """Columns of the layer's output, in the order that the node that takes them out has them."""

    columns: np.ndarray
    output: str
    node: onnx.NodeProto


def split_linear(model: onnx.ModelProto) -> None:
    """Rewrites the model in place: MatMul by a constant, maybe Add of a constant, then only cuts of the last axis; or
    Conv with constant weights, then only cuts of the channels. A gathering by constant indices counts as a cut.
    """
    graph = model.graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    users: dict[str, list[onnx.NodeProto]] = {}
    present = list(graph.node)
    for node in present:
        for name in node.input:
            users.setdefault(name, []).append(node)
        for attribute in node.attribute:
            if attribute.type in (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS):
                return  # a subgraph may read any value by name
    for value in graph.output:
        users.setdefault(value.name, []).append(onnx.NodeProto())  # a reader that is no cut
    ranks = {
        v.name: len(v.type.tensor_type.shape.dim) for v in graph.value_info if v.type.tensor_type.HasField("shape")
    }

    replaced: dict[int, list[onnx.NodeProto]] = {}
    dropped: set[int] = set()
    for layer in present:
        weight = constants.get(layer.input[1]) if layer.op_type in ("MatMul", "Conv") else None
        if weight is None:
            continue
        if layer.op_type == "Conv":
            bias = constants.get(layer.input[2]) if len(layer.input) > 2 else None
            grouped = any(a.name == "group" and a.i != 1 for a in layer.attribute)
            if grouped or (len(layer.input) > 2 and bias is None):
                continue
            add, cut, width, axes = None, layer.output[0], weight.dims[0], {1}
        elif len(weight.dims) == 2:
            width = weight.dims[1]
            add, bias = _bias_after(layer, users, constants, width)
            cut = layer.output[0] if add is None else add.output[0]
            axes = {-1} if cut not in ranks else {-1, ranks[cut] - 1}
        else:
            continue
        parts = _parts(cut, users, constants, axes, width)
        if parts is None:
            continue
        replaced[id(layer)] = list(_products(graph, layer, weight, bias, parts))
        dropped.update(id(node) for node in (*(p.node for p in parts), *([add] if add is not None else ())))
    if not replaced:
        return
    nodes = [n for node in present if id(node) not in dropped for n in replaced.get(id(node), [node])]
    kept = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:]
    graph.node.extend(kept)


def _bias_after(
    matmul: onnx.NodeProto,
    users: Mapping[str, list[onnx.NodeProto]],
    constants: Mapping[str, onnx.TensorProto],
    width: int,
) -> tuple[onnx.NodeProto | None, onnx.TensorProto | None]:
    """The one Add of a constant vector that reads the product, and that vector."""
    readers = users.get(matmul.output[0], [])
    if len(readers) != 1 or readers[0].op_type != "Add":
        return None, None
    others = [name for name in readers[0].input if name != matmul.output[0]]
    bias = constants.get(others[0]) if others else None
    return (readers[0], bias) if bias is not None and [*bias.dims] == [width] else (None, None)


def _parts(
    name: str,
    users: Mapping[str, list[onnx.NodeProto]],
    constants: Mapping[str, onnx.TensorProto],
    axes: set[int],
    width: int,
) -> list[_Part] | None:
    """What is taken out of a value, if nothing else reads it and no column is taken twice."""
    parts: list[_Part] = []
    for node in users.get(name, []):
        found = _cuts(node, name, constants, axes, width)
        if found is None:
            return None
        parts += found
    columns = np.concatenate([part.columns for part in parts]) if parts else np.empty(0, np.int64)
    return None if len(parts) < 2 or len(np.unique(columns)) < len(columns) else parts


def _cuts(
    node: onnx.NodeProto, name: str, constants: Mapping[str, onnx.TensorProto], axes: set[int], width: int
) -> list[_Part] | None:
    if node.op_type == "Slice" and node.input[0] == name:
        values = [constants.get(i) for i in node.input[1:]]
        if len(values) < 3 or any(v is None or [*v.dims] != [1] for v in values):
            return None
        start, stop, axis, *step = (int(numpy_helper.to_array(v)[0]) for v in values if v is not None)
        if axis not in axes or step not in ([], [1]):
            return None
        start, stop, _ = slice(start, stop).indices(width)
        return [_Part(np.arange(start, stop), node.output[0], node)] if start < stop else None
    if node.op_type == "Gather" and node.input[0] == name:
        axis = next((a.i for a in node.attribute if a.name == "axis"), 0)
        picked = constants.get(node.input[1])
        if axis not in axes or picked is None or len(picked.dims) != 1:
            return None
        return [_Part(numpy_helper.to_array(picked).astype(np.int64) % width, node.output[0], node)]
    if node.op_type == "Split" and node.input[0] == name:
        axis = next((a.i for a in node.attribute if a.name == "axis"), 0)
        if axis not in axes:
            return None
        sizes = constants.get(node.input[1]) if len(node.input) > 1 else None
        if sizes is None and width % len(node.output):
            return None
        widths = (
            [width // len(node.output)] * len(node.output) if sizes is None else numpy_helper.to_array(sizes).tolist()
        )
        edges = np.cumsum([0, *widths]).tolist()
        return [
            _Part(np.arange(a, b), o, node)
            for (a, b), o in zip(itertools.pairwise(edges), node.output, strict=True)
            if o
        ]
    return None


def _products(
    graph: onnx.GraphProto,
    layer: onnx.NodeProto,
    weight: onnx.TensorProto,
    bias: onnx.TensorProto | None,
    parts: list[_Part],
) -> Iterator[onnx.NodeProto]:
    outputs = 0 if layer.op_type == "Conv" else 1

    def taken(tensor: onnx.TensorProto, part: _Part, axis: int, name: str) -> str:
        array = np.ascontiguousarray(np.take(numpy_helper.to_array(tensor), part.columns, axis))
        graph.initializer.append(numpy_helper.from_array(array, name))
        return name

    for part in parts:
        inputs = [layer.input[0], taken(weight, part, outputs, f"{part.output}_weight")]
        shift = [] if bias is None else [taken(bias, part, 0, f"{part.output}_bias")]
        if layer.op_type == "Conv":
            own = onnx.NodeProto()
            own.CopyFrom(layer)
            own.name = f"{layer.name}_{part.output}"
            own.input[:], own.output[:] = [*inputs, *shift], [part.output]
            yield own
            continue
        product = part.output if bias is None else f"{part.output}_product"
        yield helper.make_node("MatMul", inputs, [product])
        if bias is not None:
            yield helper.make_node("Add", [product, *shift], [part.output])
