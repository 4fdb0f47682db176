"""A model's weights moved by their last bit: what rounding at every layer does to its outputs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper

from attnrewrite.verify.inputs import one_ulp_off

# Ops whose constant operands are weights. Elsewhere the value itself may count: a border, a scale of Resize, a label.
PRODUCTS = ("Conv", "ConvTranspose", "Gemm", "MatMul", "Einsum")
_FLOATS = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.DOUBLE)


def write_moved_weights(source: Path, target: Path, rng: np.random.Generator) -> None:
    """The model of `source` with every weight of its products one unit in the last place up or down, at random.

    Zeros stay zero. Weights go into a file beside `target`, for a large model does not fit into one message.
    """
    model = onnx.load(source)
    weights = {name for node in model.graph.node if node.op_type in PRODUCTS for name in node.input}
    for tensor in _constants(model.graph):
        if tensor.name in weights and tensor.data_type in _FLOATS:
            array = numpy_helper.to_array(tensor)
            moved = np.where(array == 0, array, one_ulp_off(array, rng))
            tensor.CopyFrom(numpy_helper.from_array(moved, tensor.name))
    onnx.save(model, target, save_as_external_data=True, location=f"{target.name}.data")


def _constants(graph: onnx.GraphProto) -> list[onnx.TensorProto]:
    """Initializers, and the tensors of Constant nodes under the names of their outputs."""
    tensors = list(graph.initializer)
    for node in graph.node:
        if node.op_type == "Constant":
            for attribute in node.attribute:
                if attribute.type == onnx.AttributeProto.TENSOR:
                    attribute.t.name = node.output[0]
                    tensors.append(attribute.t)
    return tensors
