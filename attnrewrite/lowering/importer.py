"""ONNX to Relax: TVM's own importer, plus converters for the two ops and for operators it gets wrong or slow."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from tvm import IRModule, ir, relax, tirx
from tvm.relax.frontend.onnx.onnx_frontend import ONNXGraphImporter, _get_convert_map
from tvm.target import Target as TvmTarget

from attnrewrite.errors import CompilerError
from attnrewrite.functions.spec import SPECS, FlashWindowAttention, SlideAttention, Spec
from attnrewrite.lowering.kernels.coverage import covers
from attnrewrite.lowering.kernels.vector_math import vector_unit
from attnrewrite.lowering.overlap_add import col2im
from attnrewrite.lowering.targets import Target
from attnrewrite.lowering.written_out import write_out

# Operators of ONNX Runtime's own domain that TVM's importer knows.
_CONTRIBUTED = frozenset({"BiasGelu", "FastGelu", "Gelu", "SkipLayerNormalization", "EmbedLayerNormalization"})

Inputs = list[Any]  # relax.Expr, or None where an optional operand is missing


def import_onnx(model: onnx.ModelProto, target: Target, tvm_target: TvmTarget) -> IRModule:
    """A Relax module with the model as `main`; the two ops become calls of their kernels, scheduled for the target.

    Raises CompilerError naming the operators that have no converter.
    """
    opset = next((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), 13)
    return _Importer(target, tvm_target).from_onnx(_normalised(model.graph), opset)


def _normalised(graph: onnx.GraphProto) -> onnx.GraphProto:
    """Names of symbolic extents become identifiers: TVM would read `batch-1` as a difference."""
    for value in graph.input:
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param:
                dim.dim_param = re.sub(r"\W", "_", dim.dim_param)
    return graph


class _Importer(ONNXGraphImporter):  # type: ignore[misc]
    """TVM's importer with this package's converters in front of its own."""

    def __init__(self, target: Target, tvm_target: TvmTarget) -> None:
        super().__init__({}, "float32")
        self._target = target
        self._tvm_target = tvm_target
        self._kernels: dict[Any, ir.GlobalVar] = {}

    def _check_for_unsupported_ops(self, graph: onnx.GraphProto) -> None:
        known = {*_get_convert_map(), *_CONVERTERS, "If", "Constant"}
        missing = []
        for node in graph.node:
            standard = node.domain in ("", "ai.onnx")
            # TVM looks at names alone: another domain's operator of a standard name would be taken for that.
            listed = known if standard else _CONTRIBUTED if node.domain == "com.microsoft" else frozenset(SPECS)
            if node.op_type not in listed:
                missing.append(node.op_type if standard else f"{node.domain}.{node.op_type}")
        if missing:
            raise CompilerError(f"TVM's ONNX importer has no converter for {', '.join(sorted(set(missing)))}")

    def _convert_operator(self, op_name: str, inputs: Inputs, attrs: dict[str, Any], opset: int) -> Any:
        if op_name in SPECS:
            return self.bb.normalize(self._attention(SPECS[op_name].from_attributes(attrs), inputs))
        if op_name in _CONVERTERS:
            converted = _CONVERTERS[op_name](self.bb, inputs, attrs)
            if converted is not None:
                return self.bb.normalize(converted)
        return super()._convert_operator(op_name, inputs, attrs, opset)

    def _attention(self, spec: Spec, inputs: Inputs) -> Any:
        operands = {name: value for name, value in zip(spec.operands, inputs, strict=False) if value is not None}
        operands = self._laid_out(spec, operands)
        arguments = [self.bb.emit(value) if isinstance(value, ir.Call) else value for value in operands.values()]
        value = operands["value"].ty
        dtype, batch = str(value.dtype.dtype), value.shape[0]
        symbolic = tirx.Var("batch", "int64")  # what is not known of a shape is the batch
        shapes = {
            name: tuple(int(e) if isinstance(e, tirx.IntImm) else symbolic for e in operand.ty.shape)
            for name, operand in operands.items()
        }
        dtypes = {name: str(operand.ty.dtype.dtype) for name, operand in operands.items()}
        known = [tuple(e if isinstance(e, int) else None for e in shape) for shape in shapes.values()]
        key = (spec, tuple(dtypes.items()), tuple(known))
        if key not in self._kernels:
            name = f"{_snake(spec.op_type)}_{len(self._kernels)}"
            func = self._kernel(spec, shapes, dtypes, name)
            # Operator fusion must leave it alone: it is written out already.
            self._kernels[key] = self.bb.add_func(func.with_attr("op_pattern", 8).without_attr("global_symbol"), name)
        outputs = [relax.TensorType([batch, *shape], dtype) for shape in output_shapes(spec, shapes)]
        return relax.call_tir(self._kernels[key], arguments, outputs if len(outputs) > 1 else outputs[0])

    def _laid_out(self, spec: Spec, operands: dict[str, Any]) -> dict[str, Any]:
        """The operands as the target's kernel reads them: constants are laid out now, others when the model runs."""
        if self._target.device != "cpu" or not isinstance(spec, FlashWindowAttention):
            return operands
        from attnrewrite.lowering.kernels.window_cpu_operands import LAID_OUT, lay_out, lay_out_computed

        lanes = vector_unit(self._tvm_target).lanes
        laid_out = dict(operands)
        for name in LAID_OUT:
            if name in operands:
                constant = _constant(operands[name])
                if constant is None:
                    laid_out[name] = lay_out_computed(operands[name], lanes, self.bb.emit)
                else:
                    laid_out[name] = relax.const(lay_out(name, constant, spec, lanes))
        return laid_out

    def _kernel(
        self, spec: Spec, shapes: Mapping[str, tuple[Any, ...]], dtypes: Mapping[str, str], name: str
    ) -> tirx.PrimFunc:
        present, target, dtype = tuple(shapes), self._tvm_target, dtypes["value"]
        if self._target.device == "cpu":
            from attnrewrite.lowering.kernels import slide_cpu, window_cpu

            if isinstance(spec, FlashWindowAttention):
                return window_cpu.flash_window_attention(spec, present, shapes, dtype, target, name)
            return slide_cpu.slide_attention(spec, present, shapes, dtype, target, name)
        from attnrewrite.lowering.kernels.gpu import attention_kernel

        return attention_kernel(spec, shapes, dtypes, target, name)


def output_shapes(spec: Spec, shapes: Mapping[str, Sequence[Any]]) -> list[tuple[int, ...]]:
    """Of the outputs of an op on operands of these shapes, the batch left out."""
    value = shapes["value"]
    if isinstance(spec, SlideAttention):
        return [(int(value[1]), *spec.output_size)]
    geometry, channels = spec.geometry, int(value[-1])
    outputs: list[tuple[int, ...]] = [(*geometry.feature_size, channels)]
    if "extra_query" in shapes:
        outputs.append((geometry.num_windows, int(shapes["extra_query"][2]), channels))
    return outputs


def _snake(name: str) -> str:
    return re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()


def _constant(value: Any) -> np.ndarray | None:
    return value.value.numpy() if isinstance(value, ir.GenericConst) else None


def _gemm(bb: relax.BlockBuilder, inputs: Inputs, attrs: Mapping[str, Any]) -> Any:
    """alpha A B + beta C, with everything that is constant folded, so that B can be packed."""
    a, b, c = [*inputs, None][:3]
    dtype = a.ty.dtype
    alpha, beta = attrs.get("alpha", 1.0), attrs.get("beta", 1.0)
    if attrs.get("transA", 0):
        a = bb.emit(relax.op.permute_dims(a))
    weights = _constant(b)
    if weights is not None:
        weights = weights.T if attrs.get("transB", 0) else weights
        b = relax.const(np.ascontiguousarray(weights * weights.dtype.type(alpha)))
    else:
        b = bb.emit(relax.op.permute_dims(b)) if attrs.get("transB", 0) else b
        if alpha != 1.0:
            a = bb.emit(relax.op.multiply(a, relax.const(alpha, dtype)))
    result = relax.op.matmul(a, b)
    if c is None or beta == 0.0:
        return result
    if beta != 1.0:
        bias = _constant(c)
        c = (
            relax.op.multiply(c, relax.const(beta, dtype))
            if bias is None
            else relax.const(bias * bias.dtype.type(beta))
        )
    return relax.op.add(bb.emit(result), c)


def _batch_normalization(bb: relax.BlockBuilder, inputs: Inputs, attrs: Mapping[str, Any]) -> Any:
    """With constant statistics one product and one sum; TVM's own converter otherwise."""
    x, *parameters = inputs
    arrays = [_constant(parameter) for parameter in parameters]
    if attrs.get("training_mode", 0) or any(array is None for array in arrays):
        return None
    gamma, beta, mean, variance = (array.astype(np.float64) for array in arrays if array is not None)
    factor = gamma / np.sqrt(variance + attrs.get("epsilon", 1e-5))
    dtype = arrays[0].dtype if arrays[0] is not None else np.float32
    shape = (1, -1, *[1] * (int(x.ty.ndim) - 2))
    scale, shift = (relax.const(v.astype(dtype).reshape(shape)) for v in (factor, beta - mean * factor))
    return relax.op.add(bb.emit(relax.op.multiply(x, scale)), shift)


_CONVERTERS: dict[str, Callable[[relax.BlockBuilder, Inputs, Mapping[str, Any]], Any]] = {
    "BatchNormalization": _batch_normalization,
    "Gemm": _gemm,
    "Col2Im": col2im,
}


def load_onnx(path: Path, target: Target) -> onnx.ModelProto:
    """The model with its external data, without model-local functions: their nodes are converted as ops, or written
    out where the target's kernels do not compute them.
    """
    model = onnx.load(str(path))
    write_out(model, partial(covers, device=target.device))
    return model


def interface_names(model: onnx.ModelProto) -> tuple[list[str], list[str]]:
    """Names of the inputs (weights are none) and of the outputs, in the order the compiled function has them."""
    weights = {tensor.name for tensor in model.graph.initializer}
    inputs = [value.name for value in model.graph.input if value.name not in weights]
    return inputs, [value.name for value in model.graph.output]


def interface(
    mod: IRModule, inputs: list[str], outputs: list[str]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """name, dtype and shape of every input and output of `main`."""
    main = mod["main"]
    result = main.ret_ty
    results = list(result.fields) if isinstance(result, ir.TupleType) else [result]
    taken = [_tensor(name, var.ty) for name, var in zip(inputs, main.params, strict=True)]
    return taken, [_tensor(name, ty) for name, ty in zip(outputs, results, strict=True)]


def _tensor(name: str, ty: relax.TensorType) -> dict[str, Any]:
    if ty.shape is None or not isinstance(ty.shape, relax.ShapeExpr):
        shape: list[int | str] = ["?"] * max(int(ty.ndim), 0)
    else:
        shape = [int(e) if isinstance(e, tirx.IntImm) else str(e) for e in ty.shape]
    return {"name": name, "dtype": str(ty.dtype.dtype), "shape": shape}
