"""The two ops in ONNX exports: each becomes one node of domain attnrewrite, with its body as a model-local function.

    export(module, inputs, "model.onnx")

does it all. It is made of these two, for whoever calls the exporter otherwise (which writes out every function that is
there before it has finished, so that bodies cannot come earlier):

    program = torch.onnx.export(module, inputs, dynamo=True, custom_translation_table=translation_table())
    add_functions(program)
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from os import PathLike
from typing import Any

import torch
from torch._ops import OpOverload

from attnrewrite.dims import Dim, Shape
from attnrewrite.functions import function_protos, overload_of
from attnrewrite.functions.spec import DOMAIN, DOMAIN_VERSION, SPECS
from attnrewrite.graph import Graph, Node, Value
from attnrewrite.operators.schema import OPERATORS, Operator, bind, dtype_of

# The first version of ONNX files whose nodes say which of several functions of one name they call.
FUNCTIONS_WITH_OVERLOADS = 10


def export(
    module: torch.nn.Module | torch.export.ExportedProgram,
    args: tuple[Any, ...] = (),
    path: str | PathLike[str] | None = None,
    **options: Any,
) -> torch.onnx.ONNXProgram:
    """`torch.onnx.export` of a module or program in which the two ops stand; in the model they are nodes with bodies.

    path: where the model is written, if anywhere. options: any of torch.onnx.export's (kwargs, dynamic_shapes,
    opset_version, input_names ...).
    """
    table = {**translation_table(), **options.pop("custom_translation_table", {})}
    saved = {name: options.pop(name) for name in ("external_data", "keep_initializers_as_inputs") if name in options}
    program = torch.onnx.export(module, args, dynamo=True, custom_translation_table=table, **options)
    assert program is not None
    add_functions(program)
    if path is not None:
        program.save(path, **saved)
    return program


def translation_table() -> dict[OpOverload, Callable[..., Any]]:
    """For `torch.onnx.export(..., dynamo=True, custom_translation_table=...)`: the ops become nodes without a body.

    attnrewrite reads such a model; for ONNX Runtime it needs `add_functions`.
    """
    return {operator.overload: _translation(operator) for operator in OPERATORS.values()}


def add_functions(program: torch.onnx.ONNXProgram) -> None:
    """Give every node of the two ops its body, in the model's opset. Raises ValueError where a shape is unknown."""
    import onnx_ir

    model = program.model
    for node in model.graph.all_nodes():
        if node.domain != DOMAIN or node.op_type not in SPECS:
            continue
        names = SPECS[node.op_type].operands
        operands = [None if v is None else _value(n, v) for n, v in zip(names, node.inputs, strict=False)]
        outputs = [Value(f"output_{k}") for k in range(len(node.outputs))]
        attributes = {name: attribute.value for name, attribute in node.attributes.items()}
        read = Node(node.op_type, operands, outputs, attributes, domain=DOMAIN)
        inputs = [v for v in operands if v is not None]
        (proto,) = function_protos(Graph(inputs, outputs, [read], model.graph.opset_imports[""]))
        function = onnx_ir.serde.deserialize_function(proto)
        node.overload = overload_of(read)
        model.functions[function.identifier()] = function
    model.ir_version = max(model.ir_version, FUNCTIONS_WITH_OVERLOADS)


def _translation(operator: Operator) -> Callable[..., Any]:
    """What the exporter calls for a call of the operator, with its own values in place of tensors."""

    def translate(*args: Any, **keywords: Any) -> Any:
        import onnx_ir
        from onnxscript import evaluator

        given = {n: _torch_dtype(v) if n == "softmax_dtype" else v for n, v in keywords.items()}
        spec, operands = bind(operator, args, given)
        names = list(spec.operands)
        while names[-1] not in operands:
            names.pop()
        node = onnx_ir.Node(
            DOMAIN,
            spec.op_type,
            [operands.get(name) for name in names],
            onnx_ir.convenience.convert_attributes(spec.attributes()),
            num_outputs=operator.results,
            version=DOMAIN_VERSION,
        )
        recorder: Any = evaluator.default()
        recorder.nodes.append(node)
        return node.outputs[0] if operator.results == 1 else node.outputs

    translate.__name__ = operator.name
    translate.__signature__ = _signature(operator)  # type: ignore[attr-defined]
    return translate


def _value(name: str, operand: Any) -> Value:
    """An operand of the exporter as a value of known shape and dtype."""
    if operand.shape is None or operand.dtype is None:
        raise ValueError(f"the exported model does not say the shape of {operand.name}")
    shape: Shape = tuple(e if isinstance(e, int) else Dim(((str(e), 1),)) for e in operand.shape)
    return Value(name, shape, operand.dtype.numpy())


def _torch_dtype(dtype: Any) -> torch.dtype | None:
    """The exporter says dtypes by their ONNX number."""
    return dtype if dtype is None or isinstance(dtype, torch.dtype) else dtype_of(int(dtype))


def _signature(operator: Operator) -> inspect.Signature:
    """The operator's arguments, for the exporter's dispatch."""
    parameter = inspect.Parameter
    required = [parameter(n, parameter.POSITIONAL_OR_KEYWORD) for n in operator.required]
    optional = [parameter(n, parameter.POSITIONAL_OR_KEYWORD, default=None) for n in operator.optional]
    attributes: Sequence[inspect.Parameter] = [
        parameter(n, parameter.KEYWORD_ONLY, default=None if " = " in kind else parameter.empty)
        for n, kind in operator.attributes.items()
    ]
    return inspect.Signature([*required, *optional, *attributes])
