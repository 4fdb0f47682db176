"""A float32 ONNX model computing in float16 or bfloat16: weights and values in between are halved, inputs and outputs
as they were.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

_FLOAT = TensorProto.FLOAT
_HALVES: dict[str, Any] = {"fp16": np.float16, "bf16": ml_dtypes.bfloat16}

# operator -> inputs that ONNX requires to be float32 whatever the data is: scales and regions are not data.
_KEPT_INPUTS = {"Resize": (1, 2), "Upsample": (1,), "QuantizeLinear": (1,), "DequantizeLinear": (1,)}


def to_half(model: onnx.ModelProto, precision: str = "fp16") -> None:
    """Rewrites the model in place; values beyond the range of fp16 or bf16 become its largest finite number."""
    graph, half = model.graph, np.dtype(_HALVES[precision])
    half_type = helper.np_dtype_to_tensor_dtype(half)
    kept = _kept_names(graph)
    for subgraph in _graphs(graph):
        for tensor in subgraph.initializer:
            if tensor.data_type == _FLOAT and tensor.name not in kept:
                _halve_tensor(tensor, half)
        for value in (*subgraph.value_info, *(() if subgraph is graph else (*subgraph.input, *subgraph.output))):
            if value.type.tensor_type.elem_type == _FLOAT and value.name not in kept:
                value.type.tensor_type.elem_type = half_type
        for node in subgraph.node:
            _halve_attributes(node, kept, half)
    _cast_interface(graph, half_type)


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


def halved(values: np.ndarray, dtype: Any = np.float16) -> np.ndarray:
    """float32 as float16 or bfloat16; numbers out of range become the largest there is, infinities stay (masks)."""
    limit = float(ml_dtypes.finfo(dtype).max)  # type: ignore[no-untyped-call]
    return np.where(np.isinf(values), values, np.clip(values, -limit, limit)).astype(dtype)


def _halve_tensor(tensor: onnx.TensorProto, dtype: Any) -> None:
    tensor.CopyFrom(numpy_helper.from_array(halved(numpy_helper.to_array(tensor), dtype), tensor.name))


def _halve_attributes(node: onnx.NodeProto, kept: set[str], dtype: Any) -> None:
    if node.op_type == "Cast":
        for attribute in node.attribute:
            if attribute.name == "to" and attribute.i == _FLOAT and node.output[0] not in kept:
                attribute.i = helper.np_dtype_to_tensor_dtype(dtype)
    if node.op_type in ("Constant", "ConstantOfShape") and node.output[0] not in kept:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.TENSOR and attribute.t.data_type == _FLOAT:
                _halve_tensor(attribute.t, dtype)


def _cast_interface(graph: onnx.GraphProto, half_type: int) -> None:
    """Casts behind every float32 input and before every float32 output."""
    first: list[onnx.NodeProto] = []
    last: list[onnx.NodeProto] = []
    constants = {tensor.name for tensor in graph.initializer}
    for value in graph.input:
        if value.type.tensor_type.elem_type == _FLOAT and value.name not in constants:
            inner = f"{value.name}_half"
            _rename_reads(graph, value.name, inner)
            first.append(helper.make_node("Cast", [value.name], [inner], to=half_type))
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
