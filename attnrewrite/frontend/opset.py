"""Raise ONNX models to opset 13: what attnrewrite reads and writes starts there.

ONNX Runtime evaluates a function's body under the model's opset, so bodies are written in the file's own opset and that
is 13 at least. Between 11 and 13 four operators moved an attribute to an input and three changed what they compute
over; everything else means the same. Older models go through ONNX's own converter first.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np
import onnx

from attnrewrite.errors import UserError

MINIMUM_OPSET = 13
OLDEST_DIRECT = 11

AXES_BECAME_INPUT = {"Squeeze": "axes", "Unsqueeze": "axes", "ReduceSum": "axes", "Split": "split"}
FLATTENED_SOFTMAX = frozenset({"Softmax", "LogSoftmax", "Hardmax"})


def opset_of(model: onnx.ModelProto) -> int:
    for imported in model.opset_import:
        if imported.domain in ("", "ai.onnx"):
            return int(imported.version)
    raise UserError("the model imports no ONNX operator set")


def raise_opset(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same model at opset 13 or later; edits in place from opset 11 on."""
    version = opset_of(model)
    if version >= MINIMUM_OPSET:
        return model
    if version < OLDEST_DIRECT:
        try:
            return onnx.version_converter.convert_version(model, MINIMUM_OPSET)
        except Exception as error:  # the converter raises bare RuntimeErrors
            raise UserError(
                f"opset {version} is older than {OLDEST_DIRECT} and could not be raised: {error}"
            ) from error
    _raise_graph(model.graph, {})
    for imported in model.opset_import:
        if imported.domain in ("", "ai.onnx"):
            imported.version = MINIMUM_OPSET
    return model


def _raise_graph(graph: onnx.GraphProto, outer_ranks: dict[str, int]) -> None:
    ranks = outer_ranks | _ranks(graph)
    raised: list[onnx.NodeProto] = []
    for node in graph.node:
        for subgraph in _subgraphs(node):
            _raise_graph(subgraph, ranks)
        if node.domain not in ("", "ai.onnx"):
            raised.append(node)
        elif node.op_type in AXES_BECAME_INPUT:
            raised.extend(_attribute_to_input(node, AXES_BECAME_INPUT[node.op_type]))
        elif node.op_type in FLATTENED_SOFTMAX:
            raised.extend(_flattened_softmax(node, ranks))
        elif node.op_type == "Dropout":
            raised.append(_without_ratio(node))
        else:
            raised.append(node)
    del graph.node[:]
    graph.node.extend(raised)


def _subgraphs(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.GRAPH:
            yield attribute.g
        yield from attribute.graphs


def _constant(name: str, values: list[int]) -> onnx.NodeProto:
    return onnx.helper.make_node("Constant", [], [name], value=onnx.numpy_helper.from_array(np.array(values, np.int64)))


def _attribute_to_input(node: onnx.NodeProto, attribute: str) -> list[onnx.NodeProto]:
    moved = [a for a in node.attribute if a.name == attribute]
    if not moved:
        return [node]
    name = f"{node.output[0]}__{attribute}"
    raised = onnx.NodeProto()
    raised.CopyFrom(node)
    raised.attribute.remove(moved[0])
    raised.input.append(name)
    return [_constant(name, list(moved[0].ints)), raised]


def _without_ratio(node: onnx.NodeProto) -> onnx.NodeProto:
    """The ratio became an input at opset 12; outside of training it says nothing."""
    raised = onnx.NodeProto()
    raised.CopyFrom(node)
    for attribute in [a for a in raised.attribute if a.name == "ratio"]:
        raised.attribute.remove(attribute)
    return raised


def _flattened_softmax(node: onnx.NodeProto, ranks: dict[str, int]) -> list[onnx.NodeProto]:
    """Before opset 13 the tensor was flattened to 2-D at `axis` (default 1) and normalised over all that follows."""
    axis = next((a.i for a in node.attribute if a.name == "axis"), 1)
    rank = ranks.get(node.input[0])
    kept = [a for a in node.attribute if a.name != "axis"]
    if axis == -1 or (rank is not None and axis % rank == rank - 1):
        raised = onnx.helper.make_node(node.op_type, node.input, node.output, name=node.name, axis=-1)
        raised.attribute.extend(kept)
        return [raised]
    data, out = node.input[0], node.output[0]
    flat, normalised, shape = f"{out}__flat", f"{out}__normalised", f"{out}__shape"
    raised = onnx.helper.make_node(node.op_type, [flat], [normalised], name=node.name, axis=1)
    raised.attribute.extend(kept)
    return [
        onnx.helper.make_node("Flatten", [data], [flat], axis=axis),
        raised,
        onnx.helper.make_node("Shape", [data], [shape]),
        onnx.helper.make_node("Reshape", [normalised, shape], [out]),
    ]


def _ranks(graph: onnx.GraphProto) -> dict[str, int]:
    """Ranks the file declares, or ONNX's inference finds; enough to tell a last-axis softmax."""
    ranks = {t.name: len(t.dims) for t in graph.initializer}
    declared = [*graph.input, *graph.value_info, *graph.output]
    if any(n.op_type in FLATTENED_SOFTMAX for n in graph.node):
        skeleton = onnx.helper.make_model(
            onnx.helper.make_graph(graph.node, "ranks", graph.input, graph.output, _small(graph.initializer)),
            opset_imports=[onnx.helper.make_opsetid("", 12)],
        )
        with contextlib.suppress(Exception):  # best effort: without a rank the general form is written
            declared += onnx.shape_inference.infer_shapes(skeleton).graph.value_info
    for value in declared:
        if value.type.tensor_type.HasField("shape"):
            ranks[value.name] = len(value.type.tensor_type.shape.dim)
    return ranks


def _small(initializers: list[onnx.TensorProto]) -> list[onnx.TensorProto]:
    """Weights by shape alone, so that inference does not copy them; small ones with their content."""
    result = []
    for tensor in initializers:
        if np.prod(tensor.dims, dtype=np.int64) <= 1024:
            result.append(tensor)
        else:
            result.append(onnx.TensorProto(name=tensor.name, dims=tensor.dims, data_type=tensor.data_type))
    return result
