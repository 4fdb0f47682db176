"""A float32 ONNX model computing in float16: weights and values in between halved, inputs and outputs as they were."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

_FLOAT, _HALF = TensorProto.FLOAT, TensorProto.FLOAT16

# operator -> inputs that ONNX requires to be float32 whatever the data is: scales and regions are not data.
_KEPT_INPUTS = {"Resize": (1, 2), "Upsample": (1,), "QuantizeLinear": (1,), "DequantizeLinear": (1,)}


def to_half(model: onnx.ModelProto) -> None:
    """Rewrites the model in place; values beyond float16's range become its largest finite number."""
    graph = model.graph
    kept = _kept_names(graph)
    for subgraph in _graphs(graph):
        for tensor in subgraph.initializer:
            if tensor.data_type == _FLOAT and tensor.name not in kept:
                _halve_tensor(tensor)
        for value in (*subgraph.value_info, *(() if subgraph is graph else (*subgraph.input, *subgraph.output))):
            if value.type.tensor_type.elem_type == _FLOAT and value.name not in kept:
                value.type.tensor_type.elem_type = _HALF
        for node in subgraph.node:
            _halve_attributes(node, kept)
    _cast_interface(graph)


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """The graph and the bodies of its If and Loop nodes."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from _graphs(attribute.g)


def _kept_names(graph: onnx.GraphProto) -> set[str]:
    return {
        node.input[index]
        for subgraph in _graphs(graph)
        for node in subgraph.node
        for index in _KEPT_INPUTS.get(node.op_type, ())
        if index < len(node.input) and node.input[index]
    }


def halved(values: np.ndarray) -> np.ndarray:
    """float32 as float16; numbers out of range become the largest there is, infinities stay (they are masks)."""
    limit = float(np.finfo(np.float16).max)
    return np.where(np.isinf(values), values, np.clip(values, -limit, limit)).astype(np.float16)


def _halve_tensor(tensor: onnx.TensorProto) -> None:
    tensor.CopyFrom(numpy_helper.from_array(halved(numpy_helper.to_array(tensor)), tensor.name))


def _halve_attributes(node: onnx.NodeProto, kept: set[str]) -> None:
    if node.op_type == "Cast":
        for attribute in node.attribute:
            if attribute.name == "to" and attribute.i == _FLOAT and node.output[0] not in kept:
                attribute.i = _HALF
    if node.op_type in ("Constant", "ConstantOfShape") and node.output[0] not in kept:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.TENSOR and attribute.t.data_type == _FLOAT:
                _halve_tensor(attribute.t)


def _cast_interface(graph: onnx.GraphProto) -> None:
    """Casts behind every float32 input and before every float32 output."""
    first: list[onnx.NodeProto] = []
    last: list[onnx.NodeProto] = []
    constants = {tensor.name for tensor in graph.initializer}
    for value in graph.input:
        if value.type.tensor_type.elem_type == _FLOAT and value.name not in constants:
            inner = f"{value.name}_half"
            _rename_reads(graph, value.name, inner)
            first.append(helper.make_node("Cast", [value.name], [inner], to=_HALF))
    for value in graph.output:
        if value.type.tensor_type.elem_type == _FLOAT:
            inner = f"{value.name}_half"
            _rename_reads(graph, value.name, inner)
            for node in graph.node:
                node.output[:] = [inner if name == value.name else name for name in node.output]
            last.append(helper.make_node("Cast", [inner], [value.name], to=_FLOAT))
    nodes = [*first, *graph.node, *last]
    del graph.node[:]
    graph.node.extend(nodes)


def _rename_reads(graph: onnx.GraphProto, old: str, new: str) -> None:
    for subgraph in _graphs(graph):
        for node in subgraph.node:
            node.input[:] = [new if name == old else name for name in node.input]
