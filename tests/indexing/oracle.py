"""Chains of operators run in ONNX Runtime on an iota, beside the same chains as graph nodes.

    chain = Chain(2, 3, 5)
    chain.op("Transpose", perm=[2, 0, 1])
    chain.op("Pad", [0, 0, 1, 0, 0, 1], -7)
    chain.assert_map_is_exact()

Elements of the input are 1, 2, 3 ...: a zero or another fill in the result is no element of the input. All integers are
compared exactly. `str(chain)` is the code that builds the chain.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime

from attnrewrite.graph import Node, Value
from attnrewrite.indexing.map import identity
from attnrewrite.indexing.provenance import Provenance, provenances

OPSET = 19
# ONNX Runtime's CPU kernels of these take no int64 data; the iota stays below 2**24, where float32 is exact.
FLOAT_ONLY = frozenset({"Col2Im", "Conv", "DepthToSpace", "SpaceToDepth"})


class Chain:
    """Operators applied one after another; `value` is the last result, `arrays` holds what ONNX Runtime computed."""

    def __init__(self, *shape: int) -> None:
        self.arrays: dict[Value, np.ndarray] = {}
        self.positions: dict[Value, int] = {}
        self.lines = [f"chain = Chain({', '.join(map(str, shape))})"]
        count = int(np.prod(shape, dtype=np.int64))
        self.source = self.value = Value("x", shape, np.dtype(np.int64))
        self.arrays[self.source] = np.arange(1, count + 1).reshape(shape)

    def __str__(self) -> str:
        return "\n".join([*self.lines, "chain.assert_map_is_exact()"])

    @property
    def shape(self) -> tuple[int, ...]:
        return self.arrays[self.value].shape

    def op(self, op: str, *operands: Any, pick: int = 0, outputs: int = 1, **attributes: Any) -> Value:
        """Apply an operator to `value` and these further operands (constants, Values, or None for a missing one).

        "Where" and "Concat" take `value` where an operand is given as "value". pick: the output that becomes `value`.
        """
        arguments = ["value" if isinstance(o, str) else o if isinstance(o, Value) else _list(o) for o in operands]
        if not any(isinstance(o, Value) for o in operands):
            said = [repr(a) for a in arguments] + [f"{k}={v!r}" for k, v in attributes.items()]
            said += [f"{k}={v}" for k, v, usual in (("pick", pick, 0), ("outputs", outputs, 1)) if v != usual]
            self.lines.append(f"chain.op({', '.join([repr(op), *said])})")
        inputs = [self._operand(o, f"{op}{len(self.positions)}_{k}") for k, o in enumerate(operands)]
        if "value" not in arguments:
            inputs.insert(0, self.value)
        return self.node(op, inputs, pick=pick, outputs=outputs, **attributes)

    def node(
        self, op: str, inputs: Sequence[Value | None], *, pick: int = 0, outputs: int = 1, **attributes: Any
    ) -> Value:
        """One node on these values; its output `pick` becomes `value`."""
        arrays = [None if v is None else v.constant if v.is_constant else self.arrays[v] for v in inputs]
        results = run(op, arrays, outputs, attributes)
        made = [Value(f"{op.lower()}{len(self.positions)}_{k}", r.shape, r.dtype) for k, r in enumerate(results)]
        Node(op, inputs, made, attributes)
        for value, result in zip(made, results, strict=True):
            self.arrays[value] = result
            self.positions[value] = len(self.positions)
        self.value = made[pick]
        return self.value

    def _operand(self, operand: Any, name: str) -> Value | None:
        if operand is None or isinstance(operand, Value):
            return operand
        if isinstance(operand, str):
            return self.value
        array = np.asarray(operand)
        return Value(name, array.shape, array.dtype, array)

    def provenance(self) -> Provenance:
        """The map of `value` onto the input."""
        *_, last = provenances(self.value, identity(self.shape), self.positions)
        assert last.value is self.source, f"the walk stopped at {last.value}\n{self}"
        return last

    def assert_map_is_exact(self) -> None:
        """The composed indexing rules read, for every element of `value`, what ONNX Runtime put there."""
        found = evaluate(self.provenance(), self.arrays[self.source], self.shape)
        np.testing.assert_array_equal(found, self.arrays[self.value], err_msg=str(self))


def evaluate(provenance: Provenance, elements: np.ndarray, shape: Sequence[int], element: int = 0) -> np.ndarray:
    """The tensor of this shape that the map reads from `elements`; element: the index along a symbolic batch."""
    assert {c.values.ndim for c in provenance.index} <= {len(shape)}, "a coordinate without an axis per grid axis"
    index = [c.values + c.batch * element for c in provenance.index]
    result = np.broadcast_to(elements[tuple(index)], shape).copy()
    where = np.zeros((), bool)
    for fill in provenance.fills:
        assert not (where & fill.where).any(), "two fills at one place"
        where = where | fill.where
        result[np.broadcast_to(fill.where, shape)] = fill.number
    if provenance.domain is not None:
        assert not provenance.domain.all(), "a domain that excludes nothing"
        np.testing.assert_array_equal(np.broadcast_to(~provenance.domain, shape), np.broadcast_to(where, shape))
    else:
        assert not provenance.fills, "fills, but no domain"
    return result


def run(op: str, inputs: Sequence[np.ndarray | None], outputs: int, attributes: dict[str, Any]) -> list[np.ndarray]:
    """One node in ONNX Runtime."""
    if op in FLOAT_ONLY:
        assert all(x is None or np.abs(x).max(initial=0) < 2**24 for x in inputs)
        sizes = slice(1, 3) if op == "Col2Im" else slice(0)
        extents = inputs[sizes]
        inputs = [None if x is None else x.astype(np.float32) for x in inputs]
        inputs[sizes] = extents
    names = [f"i{k}" if x is not None else "" for k, x in enumerate(inputs)]
    proto = onnx.helper.make_node(op, names, [f"o{k}" for k in range(outputs)], **attributes)
    graph = onnx.helper.make_graph(
        [proto],
        "node",
        [
            onnx.helper.make_tensor_value_info(n, onnx.helper.np_dtype_to_tensor_dtype(x.dtype), x.shape)
            for n, x in zip(names, inputs, strict=True)
            if x is not None
        ],
        [onnx.helper.make_empty_tensor_value_info(f"o{k}") for k in range(outputs)],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", OPSET)], ir_version=9)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    results = session.run(None, {n: x for n, x in zip(names, inputs, strict=True) if x is not None})
    return [np.asarray(r).astype(np.int64) for r in results]


def _list(operand: Any) -> Any:
    return operand.tolist() if isinstance(operand, np.ndarray) else operand
