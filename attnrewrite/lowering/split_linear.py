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
    """Columns [start, stop) of the layer's output, and the node that cuts them out."""

    start: int
    stop: int
    output: str
    node: onnx.NodeProto


def split_linear(model: onnx.ModelProto) -> None:
    """Rewrites the model in place: MatMul by a constant, maybe Add of a constant, then only cuts of the last axis."""
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
    for matmul in present:
        if matmul.op_type != "MatMul" or matmul.input[1] not in constants:
            continue
        weight = constants[matmul.input[1]]
        if len(weight.dims) != 2:
            continue
        add, bias = _bias_after(matmul, users, constants, weight.dims[1])
        cut = matmul.output[0] if add is None else add.output[0]
        parts = _parts(cut, users, constants, ranks.get(cut), weight.dims[1])
        if parts is None:
            continue
        replaced[id(matmul)] = list(_products(graph, matmul, weight, bias, parts))
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
    rank: int | None,
    width: int,
) -> list[_Part] | None:
    """What is cut out of a value, if nothing else reads it and no column is cut out twice."""
    parts: list[_Part] = []
    for node in users.get(name, []):
        found = _cuts(node, name, constants, rank, width)
        if found is None:
            return None
        parts += found
    ordered = sorted(parts, key=lambda part: part.start)
    overlap = any(left.stop > right.start for left, right in itertools.pairwise(ordered))
    return None if overlap or len(parts) < 2 else parts


def _cuts(
    node: onnx.NodeProto, name: str, constants: Mapping[str, onnx.TensorProto], rank: int | None, width: int
) -> list[_Part] | None:
    last = {-1} if rank is None else {-1, rank - 1}
    if node.op_type == "Slice" and node.input[0] == name:
        values = [constants.get(i) for i in node.input[1:]]
        if len(values) < 3 or any(v is None or [*v.dims] != [1] for v in values):
            return None
        start, stop, axis, *step = (int(numpy_helper.to_array(v)[0]) for v in values if v is not None)
        if axis not in last or step not in ([], [1]):
            return None
        start, stop, _ = slice(start, stop).indices(width)
        return [_Part(start, stop, node.output[0], node)] if start < stop else None
    if node.op_type == "Split" and node.input[0] == name:
        axis = next((a.i for a in node.attribute if a.name == "axis"), 0)
        if axis not in last:
            return None
        sizes = constants.get(node.input[1]) if len(node.input) > 1 else None
        if sizes is None and width % len(node.output):
            return None
        widths = (
            [width // len(node.output)] * len(node.output) if sizes is None else numpy_helper.to_array(sizes).tolist()
        )
        edges = np.cumsum([0, *widths]).tolist()
        return [_Part(a, b, o, node) for (a, b), o in zip(itertools.pairwise(edges), node.output, strict=True) if o]
    return None


def _products(
    graph: onnx.GraphProto,
    matmul: onnx.NodeProto,
    weight: onnx.TensorProto,
    bias: onnx.TensorProto | None,
    parts: list[_Part],
) -> Iterator[onnx.NodeProto]:
    columns = numpy_helper.to_array(weight)
    for part in parts:
        own = f"{part.output}_weight"
        graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(columns[:, part.start : part.stop]), own))
        product = part.output if bias is None else f"{part.output}_product"
        yield helper.make_node("MatMul", [matmul.input[0], own], [product])
        if bias is not None:
            shift = f"{part.output}_bias"
            own_bias = numpy_helper.to_array(bias)[part.start : part.stop]
            graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(own_bias), shift))
            yield helper.make_node("Add", [product, shift], [part.output])
