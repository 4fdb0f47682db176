"""Nodes of the two ops that no kernel computes, written out as the bodies that the file carries for them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping

import onnx
from onnx import helper

from attnrewrite.functions.spec import DOMAIN, SPECS, Spec

Shape = tuple[int, ...]
Covers = Callable[[Spec, Mapping[str, Shape | None]], bool]


def write_out(model: onnx.ModelProto, covers: Covers) -> None:
    """Replace, in place, each node of the two ops for which `covers(spec, operands)` is false by its function's nodes.

    The constants of a body become initializers. The model's functions are left out afterwards: the nodes that remain
    are converted as ops.
    """
    functions = {(f.domain, f.name, f.overload): f for f in model.functions}
    taken = {name for node in model.graph.node for name in (*node.input, *node.output)}
    taken |= {tensor.name for tensor in model.graph.initializer}
    shapes = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    nodes: list[onnx.NodeProto] = []
    for node in model.graph.node:
        function = functions.get((node.domain, node.op_type, node.overload))
        if node.domain != DOMAIN or function is None or _is_covered(node, shapes, covers):
            nodes.append(node)
        else:
            nodes.extend(_body(node, function, model.graph, taken))
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    del model.functions[:]


def _is_covered(node: onnx.NodeProto, shapes: Mapping[str, Shape], covers: Covers) -> bool:
    specification = SPECS[node.op_type]
    spec = specification.from_attributes({a.name: helper.get_attribute_value(a) for a in node.attribute})
    operands = zip(specification.operands, node.input, strict=False)
    present = {name: shapes.get(value) for name, value in operands if value}
    return covers(spec, present)


def _body(
    node: onnx.NodeProto, function: onnx.FunctionProto, graph: onnx.GraphProto, taken: set[str]
) -> list[onnx.NodeProto]:
    """The function's nodes on the node's operands; every other name is made the graph's own."""
    names = {"": ""}
    names |= dict(itertools.zip_longest(function.input, node.input, fillvalue=""))
    names |= dict(zip(function.output, node.output, strict=True))

    def renamed(name: str) -> str:
        if name not in names:
            own = f"{node.output[0]}_{name}"
            while own in taken:
                own += "_"
            taken.add(own)
            names[name] = own
        return names[name]

    written = []
    for inner in function.node:
        if inner.op_type == "Constant":
            tensor = onnx.TensorProto()
            tensor.CopyFrom(inner.attribute[0].t)
            tensor.name = renamed(inner.output[0])
            graph.initializer.append(tensor)
            continue
        copy = onnx.NodeProto()
        copy.CopyFrom(inner)
        copy.name = f"{node.name}_{inner.name}"
        copy.input[:] = [renamed(name) for name in inner.input]
        copy.output[:] = [renamed(name) for name in inner.output]
        written.append(copy)
    return written
