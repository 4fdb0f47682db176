"""The two ops as ONNX functions of standard operators: built per node, named by their specialisation, or written
inline.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable

import numpy as np
import onnx

from attnrewrite.frontend.evaluate import to_attribute
from attnrewrite.functions import flash_window_attention, predicted_weights, slide_attention
from attnrewrite.functions.spec import DOMAIN, SPECS, FlashWindowAttention, SlideAttention, Spec
from attnrewrite.graph import Graph, Node, Value

BODIES: dict[str, Callable[..., Graph]] = {
    FlashWindowAttention.op_type: flash_window_attention.body,
    SlideAttention.op_type: slide_attention.body,
}


def is_local_op(node: Node) -> bool:
    """Whether the node is one of the two ops."""
    return node.domain == DOMAIN and node.op in SPECS


def spec_of(node: Node) -> Spec:
    return SPECS[node.op].from_attributes(node.attributes)


def operands_of(node: Node) -> dict[str, Value]:
    """The node's present operands by name, in order."""
    names = SPECS[node.op].operands
    return {n: v for n, v in itertools.zip_longest(names, node.inputs) if v is not None}


def body_of(node: Node, opset: int) -> Graph:
    """The node's body as a graph of its own; its inputs are fresh values named like the operands."""
    formal = {name: Value(name, v.shape, v.dtype) for name, v in operands_of(node).items()}
    spec = spec_of(node)
    if isinstance(spec, SlideAttention) and spec.predicted:
        return predicted_weights.body(spec, formal, opset)
    return BODIES[node.op](spec, formal, opset)


def overload_of(node: Node) -> str:
    """The name of a node's specialisation: geometry in clear, then a digest of everything the body depends on."""
    if not is_local_op(node):
        return ""
    spec = spec_of(node)
    operands = {name: [list(map(str, v.shape or ())), str(v.dtype)] for name, v in operands_of(node).items()}
    digest = hashlib.sha256(json.dumps([spec.attributes(), operands], sort_keys=True).encode()).hexdigest()[:8]
    size = "x".join(map(str, spec.geometry.feature_size))
    local = spec.geometry.window_size if isinstance(spec, FlashWindowAttention) else spec.geometry.kernel_size
    return f"{size}_{'x'.join(map(str, local))}_{digest}"


def function_protos(graph: Graph) -> list[onnx.FunctionProto]:
    """One function per specialisation that the graph uses."""
    protos: dict[str, onnx.FunctionProto] = {}
    for node in graph.nodes:
        if is_local_op(node) and (overload := overload_of(node)) not in protos:
            protos[overload] = _function_proto(node, body_of(node, graph.opset), overload)
    return list(protos.values())


def _function_proto(node: Node, body: Graph, overload: str) -> onnx.FunctionProto:
    protos: list[onnx.NodeProto] = []
    written: set[int] = set()
    for inner in body.nodes:
        for value in inner.inputs:
            if value is not None and value.is_constant and id(value) not in written:
                written.add(id(value))
                tensor = onnx.numpy_helper.from_array(
                    np.ascontiguousarray(value.constant).reshape(value.constant.shape)
                )
                protos.append(onnx.helper.make_node("Constant", [], [value.name], value=tensor))
        proto = onnx.helper.make_node(
            inner.op, [v.name if v else "" for v in inner.inputs], [o.name for o in inner.outputs], inner.name
        )
        proto.attribute.extend(to_attribute(k, v) for k, v in inner.attributes.items())
        protos.append(proto)
    present = operands_of(node)
    names = SPECS[node.op].operands[: len(node.inputs)]
    function = onnx.helper.make_function(
        DOMAIN,
        node.op,
        [n if n in present else f"{n}_absent" for n in names],
        [o.name for o in body.outputs],
        protos,
        [onnx.helper.make_opsetid("", body.opset)],
        attributes=sorted(node.attributes),
    )
    function.overload = overload
    return function


def inlined(graph: Graph) -> Graph:
    """A graph of the same values with the two ops written out; the original is left as it is."""
    result = Graph(graph.inputs, graph.outputs, [], graph.opset, graph.name)
    result.source = graph.source
    taken = {v.name for v in graph.values()}
    for node in graph.nodes:
        result.nodes.extend(_written_out(node, graph.opset, taken) if is_local_op(node) else [node])
    return result


def _written_out(node: Node, opset: int, taken: set[str]) -> list[Node]:
    body = body_of(node, opset)
    actual: dict[Value, Value] = dict(zip(body.inputs, operands_of(node).values(), strict=True))
    actual |= dict(zip(body.outputs, node.outputs, strict=True))
    stem = node.output.name
    nodes = []
    for inner in body.nodes:
        inputs = [_renamed(v, actual, stem, taken) for v in inner.inputs]
        outputs = [_renamed(o, actual, stem, taken) for o in inner.outputs]
        written = Node(
            inner.op, inputs, [o for o in outputs if o is not None], dict(inner.attributes), f"{stem}_{inner.name}"
        )
        written.made_by = node.made_by
        nodes.append(written)
    for output in node.outputs:
        output.producer = node  # the op keeps its outputs; the written-out nodes are a view of it
    return nodes


def _renamed(value: Value | None, actual: dict[Value, Value], stem: str, taken: set[str]) -> Value | None:
    if value is None:
        return None
    if value not in actual:
        name = f"{stem}_{value.name}"
        while name in taken:
            name += "_"
        taken.add(name)
        actual[value] = Value(name, value.shape, value.dtype, value.constant if value.is_constant else None)
    return actual[value]


__all__ = ["DOMAIN", "body_of", "function_protos", "inlined", "is_local_op", "operands_of", "overload_of", "spec_of"]
