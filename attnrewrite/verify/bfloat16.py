"""A bfloat16 model computing in float32: the same function without its roundings, and one that ONNX Runtime has."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import onnx
from onnx import AttributeProto, TensorProto, numpy_helper

NARROW, WIDE = TensorProto.BFLOAT16, TensorProto.FLOAT

# Attributes that name an element type.
_TYPES = ("to", "dtype", "stash_type", "output_dtype", "softmax_precision", "softmax_dtype")


def is_bfloat16(model: onnx.ModelProto) -> bool:
    """Whether any value of the model is; its weights need not be loaded."""
    return next(_narrow_parts(model), None) is not None


def write_in_float32(source: Path, target: Path) -> None:
    """The model of `source` with float32 in place of bfloat16 everywhere, inputs and outputs too; weights go into a
    file beside `target`.
    """
    model = onnx.load(source)
    for part in list(_narrow_parts(model)):
        if isinstance(part, TensorProto):
            wide = numpy_helper.to_array(part).astype(np.float32)
            part.CopyFrom(numpy_helper.from_array(wide, part.name))
        elif isinstance(part, AttributeProto):
            part.i = WIDE
        else:
            part.type.tensor_type.elem_type = WIDE
    onnx.save(model, target, save_as_external_data=True, location=f"{target.name}.data")


def _narrow_parts(model: onnx.ModelProto) -> Iterator[TensorProto | AttributeProto | onnx.ValueInfoProto]:
    """Tensors, attributes and declared values that say bfloat16."""
    yield from _of_graph(model.graph)
    for function in model.functions:
        yield from (value for value in function.value_info if value.type.tensor_type.elem_type == NARROW)
        yield from _of_nodes(function.node)


def _of_graph(graph: onnx.GraphProto) -> Iterator[TensorProto | AttributeProto | onnx.ValueInfoProto]:
    values = (*graph.input, *graph.output, *graph.value_info)
    yield from (value for value in values if value.type.tensor_type.elem_type == NARROW)
    yield from (tensor for tensor in graph.initializer if tensor.data_type == NARROW)
    yield from _of_nodes(graph.node)


def _of_nodes(nodes: Iterable[onnx.NodeProto]) -> Iterator[TensorProto | AttributeProto | onnx.ValueInfoProto]:
    for node in nodes:
        for attribute in node.attribute:
            if attribute.type == AttributeProto.GRAPH:
                yield from _of_graph(attribute.g)
            elif attribute.type == AttributeProto.TENSOR and attribute.t.data_type == NARROW:
                yield attribute.t
            elif attribute.type == AttributeProto.INT and attribute.name in _TYPES and attribute.i == NARROW:
                yield attribute
