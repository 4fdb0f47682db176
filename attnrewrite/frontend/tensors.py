"""graphsurgeon's tensors and nodes as values and nodes of the graph."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from attnrewrite.dims import Dim, Extent, Shape
from attnrewrite.graph import STANDARD_DOMAIN, Node, Value

CACHED_BYTES = 1 << 20


class Importer:
    """Makes one value per tensor. folder: where external weights lie. initializers: names of constants of the graph
    itself, those of its subgraphs not among them.
    """

    def __init__(self, folder: Path, initializers: set[str]) -> None:
        self.folder = folder
        self.initializers = initializers
        self._values: dict[int, Value] = {}

    def value(self, tensor: gs.Tensor) -> Value | None:
        """None for an input that is not given."""
        if tensor.is_empty():
            return None
        if id(tensor) not in self._values:
            self._values[id(tensor)] = self.made(tensor)
        return self._values[id(tensor)]

    def values(self, tensors: Sequence[gs.Tensor]) -> list[Value]:
        """Those that are given."""
        return [v for v in map(self.value, tensors) if v is not None]

    def made(self, tensor: gs.Tensor) -> Value:
        """The value of a tensor that is met for the first time."""
        return _to_value(tensor, self.folder)

    def nodes(self, graph: gs.Graph) -> list[Node]:
        """Its nodes in their order; a Constant becomes the constant."""
        found = []
        for node in graph.nodes:
            if node.op == "Constant" and (node.domain or "") == STANDARD_DOMAIN:
                constant = _constant_node(node)
                if constant is not None:
                    value = self.value(node.outputs[0])
                    assert value is not None
                    value.shape, value.dtype = constant.shape, constant.dtype
                    value.set_constant(constant)
                    continue
            found.append(self._node(node))
        return found

    def _node(self, node: gs.Node) -> Node:
        outputs = [self.value(t) or Value(f"{node.name}__unused_{k}") for k, t in enumerate(node.outputs)]
        outer = [t for t in captured(node) if not isinstance(t, gs.Constant) or t.name in self.initializers]
        return Node(
            node.op,
            [self.value(t) for t in node.inputs],
            outputs,
            {k: _attribute(v) for k, v in node.attrs.items()},
            node.name or "",
            "" if node.domain in (None, "ai.onnx") else node.domain,
            node,
            self.values(outer),
        )


def _to_value(tensor: gs.Tensor, folder: Path) -> Value:
    dtype = _dtype(tensor.dtype)
    if isinstance(tensor, gs.Constant):
        lazy = tensor._values  # the public attribute would load the elements
        if isinstance(lazy, gs.ir.tensor.LazyValues):
            value = Value(tensor.name, tuple(lazy.shape), dtype, _loader(lazy.tensor, folder))
            value.source = lazy.tensor
            return value
        return Value(tensor.name, tuple(tensor.values.shape), dtype, tensor.values)
    return Value(tensor.name, _declared_shape(tensor), dtype)


def _dtype(of: Any) -> np.dtype | None:
    """A NumPy dtype; graphsurgeon gives ONNX's number for element types that NumPy lacks, bfloat16 among them."""
    if isinstance(of, int):
        return onnx.helper.tensor_dtype_to_np_dtype(of) if of else None
    return None if of is None else np.dtype(of)


def _loader(tensor: onnx.TensorProto, folder: Path) -> Any:
    cache: list[np.ndarray] = []

    def load() -> np.ndarray:
        if cache:
            return cache[0]
        array = onnx.numpy_helper.to_array(tensor, str(folder))
        if array.nbytes <= CACHED_BYTES:
            cache.append(array)
        return array

    return load


def _declared_shape(tensor: gs.Tensor) -> Shape | None:
    if tensor.shape is None:
        return None
    extents: list[Extent] = []
    for axis, extent in enumerate(tensor.shape):
        if isinstance(extent, str) and extent:
            extents.append(Dim(((extent, 1),)))
        elif extent is None or isinstance(extent, str) or extent < 0:
            extents.append(Dim(((f"{tensor.name}_{axis}", 1),)))
        else:
            extents.append(int(extent))
    return tuple(extents)


def _constant_node(node: gs.Node) -> np.ndarray | None:
    for key, dtype in (
        ("value_float", np.float32),
        ("value_floats", np.float32),
        ("value_int", np.int64),
        ("value_ints", np.int64),
    ):
        if key in node.attrs:
            return np.asarray(node.attrs[key], dtype)
    value = node.attrs.get("value")
    return np.asarray(value.values) if isinstance(value, gs.Constant) and not isinstance(value.dtype, int) else None


def _attribute(value: Any) -> Any:
    return np.asarray(value.values) if isinstance(value, gs.Constant) else value


def captured(node: gs.Node) -> Iterator[gs.Tensor]:
    """Outer tensors that the node's subgraphs read, and initializers of their own."""
    for attribute in node.attrs.values():
        if isinstance(attribute, gs.Graph):
            inner = {id(t) for n in attribute.nodes for t in n.outputs} | {id(t) for t in attribute.inputs}
            reads = [t for n in attribute.nodes for t in [*n.inputs, *captured(n)]] + list(attribute.outputs)
            yield from (t for t in reads if id(t) not in inner and not t.is_empty())
