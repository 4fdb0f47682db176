"""Writing an ONNX graph by hand: `g = Builder(); y = g.op("Relu", g.input("x", [2, 3])); g.model({"y": y})`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

END = np.iinfo(np.int64).max


class Builder:
    """Collects nodes and initializers; every method that adds a node returns the name of its (first) output.

    element_type: ONNX data type of the inputs, float constants and outputs. opset: 11 or later; the few ops whose axes
    or sizes moved from attributes to inputs at 13 are written as the opset wants them.
    """

    def __init__(self, opset: int = 17, element_type: int = TensorProto.FLOAT) -> None:
        self.opset, self.element_type = opset, element_type
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []

    @property
    def dtype(self) -> np.dtype[Any]:
        return helper.tensor_dtype_to_np_dtype(self.element_type)

    def input(self, name: str, shape: Sequence[int | str]) -> str:
        self.inputs.append(helper.make_tensor_value_info(name, self.element_type, list(shape)))
        return name

    def constant(self, values: Any) -> str:
        """An initializer: floats in the builder's element type, integers as int64, booleans as they are."""
        array = np.asarray(values)
        if array.dtype.kind == "f":
            array = array.astype(self.dtype)
        elif array.dtype.kind in "iu":
            array = array.astype(np.int64)
        name = f"c{len(self.initializers)}"
        self.initializers.append(numpy_helper.from_array(array, name))
        return name

    def ops(self, op_type: str, *inputs: str, outputs: int, **attributes: Any) -> list[str]:
        """Add a node of several outputs."""
        names = [f"{op_type.lower()}{len(self.nodes)}_{i}" for i in range(outputs)]
        self.nodes.append(helper.make_node(op_type, list(inputs), names, name=names[0], **attributes))
        return names

    def op(self, op_type: str, *inputs: str, **attributes: Any) -> str:
        """Add a node of one output."""
        return self.ops(op_type, *inputs, outputs=1, **attributes)[0]

    def model(self, outputs: Mapping[str, str]) -> onnx.ModelProto:
        """The model with values `outputs[name]` returned as `name`; checked, shapes inferred strictly.

        With nodes of other domains the outputs have the rank of the first input.
        """
        for name, value in outputs.items():
            self.nodes.append(helper.make_node("Identity", [value], [name], name=f"output_{name}"))
        domains = sorted({n.domain for n in self.nodes if n.domain})
        if domains:  # what another domain's operators return, the inference does not know
            rank = len(self.inputs[0].type.tensor_type.shape.dim)
            results = [helper.make_tensor_value_info(name, self.element_type, [None] * rank) for name in outputs]
        else:
            results = [helper.make_empty_tensor_value_info(name) for name in outputs]
        graph = helper.make_graph(self.nodes, "spelling", self.inputs, results, self.initializers)
        imports = [helper.make_opsetid("", self.opset), *(helper.make_opsetid(d, 1) for d in domains)]
        model = helper.make_model(graph, opset_imports=imports, ir_version=8)
        if not domains:
            model = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True)
        onnx.checker.check_model(model)
        return model

    # Ops used all over, with their constants written for them.

    def reshape(self, x: str, *shape: int) -> str:
        return self.op("Reshape", x, self.constant(shape))

    def transpose(self, x: str, *perm: int) -> str:
        return self.op("Transpose", x, perm=list(perm))

    def slice(self, x: str, start: int, end: int, axis: int, step: int = 1) -> str:
        """x[start:end:step] along one axis."""
        return self.op("Slice", x, *(self.constant([v]) for v in (start, end, axis, step)))

    def concat(self, values: Sequence[str], axis: int) -> str:
        return self.op("Concat", *values, axis=axis)

    def gather(self, x: str, index: Any, axis: int) -> str:
        return self.op("Gather", x, self.constant(index), axis=axis)

    def split(self, x: str, sizes: Sequence[int], axis: int) -> list[str]:
        if self.opset < 13:
            return self.ops("Split", x, outputs=len(sizes), axis=axis, split=list(sizes))
        return self.ops("Split", x, self.constant(list(sizes)), outputs=len(sizes), axis=axis)

    def unsqueeze(self, x: str, axis: int) -> str:
        if self.opset < 13:
            return self.op("Unsqueeze", x, axes=[axis])
        return self.op("Unsqueeze", x, self.constant([axis]))

    def squeeze(self, x: str, axis: int) -> str:
        if self.opset < 13:
            return self.op("Squeeze", x, axes=[axis])
        return self.op("Squeeze", x, self.constant([axis]))

    def reduce_sum(self, x: str, axis: int, keepdims: bool = False) -> str:
        if self.opset < 13:
            return self.op("ReduceSum", x, axes=[axis], keepdims=int(keepdims))
        return self.op("ReduceSum", x, self.constant([axis]), keepdims=int(keepdims))

    def reduce(self, op_type: str, x: str, axis: int, keepdims: bool = True) -> str:
        """ReduceMax, ReduceMean and so on: their axes became an input at opset 18, those of ReduceSum at 13."""
        if op_type == "ReduceSum":
            return self.reduce_sum(x, axis, keepdims)
        if self.opset < 18:
            return self.op(op_type, x, axes=[axis], keepdims=int(keepdims))
        return self.op(op_type, x, self.constant([axis]), keepdims=int(keepdims))

    def add(self, x: str, values: Any) -> str:
        """x + an array."""
        return self.op("Add", x, self.constant(values))

    def mul(self, x: str, values: Any) -> str:
        return self.op("Mul", x, self.constant(values))

    def matmul(self, x: str, matrix: Any) -> str:
        return self.op("MatMul", x, self.constant(matrix))

    def linear(self, x: str, weight: np.ndarray, bias: np.ndarray) -> str:
        """x [..., in] @ weight [in, out] + bias [out]."""
        return self.add(self.matmul(x, weight), bias)

    def pad(self, x: str, begin: Sequence[int], end: Sequence[int], value: float = 0.0, mode: str = "constant") -> str:
        fill = (self.constant(value),) if mode == "constant" else ()
        return self.op("Pad", x, self.constant([*begin, *end]), *fill, mode=mode)
