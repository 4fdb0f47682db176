"""Graph nodes with ONNX operator names as torch functions: ONE table, for running a graph and for emitting it.

`run_graph` computes with tensors: real ones, fake ones, with or without gradients. The writer of torch.fx graphs calls
the same entries on fake tensors and records what they call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from attnrewrite.frontend.evaluate import NUMPY_OPS
from attnrewrite.frontend.fx import emit_layers, emit_movement, emit_pointwise
from attnrewrite.frontend.fx.entry import NotInTorch, Operand, Rule, aten, tensor_of
from attnrewrite.functions import body_of, is_local_op, operands_of
from attnrewrite.graph import STANDARD_DOMAIN, Graph, Node, Value

TABLE: dict[str, Rule] = {**emit_movement.TABLE, **emit_pointwise.TABLE, **emit_layers.TABLE}

# Of these, a result computed from shapes alone is followed as numbers instead of made a tensor.
SHAPE_ARITHMETIC = frozenset(
    {
        "Add", "Cast", "Concat", "Div", "Equal", "Gather", "Identity", "Mod", "Mul", "Neg", "ReduceProd", "Reshape",
        "Slice", "Squeeze", "Sub", "Unsqueeze", "Where",
    }
)  # fmt: skip


class Operands(Protocol):
    """Where a node's operands come from."""

    def known(self, value: Value) -> np.ndarray | None:
        """The elements of a constant or of shape arithmetic; None where only a tensor holds them."""

    def tensor(self, value: Value) -> Tensor:
        """The value as a tensor."""

    @property
    def device(self) -> torch.device:
        """Where tensors are made."""


Results = list[Tensor | np.ndarray]


def bound(node: Node, operands: Operands, inputs: Sequence[Value | None] | None = None) -> Callable[[], Results]:
    """What computes the node's outputs: tensors, or arrays (dtype object) for the results of shape arithmetic.

    All operands have been asked for when it returns. inputs: others than the node's own. Raises NotInTorch where the
    table has no entry that expresses the node.
    """
    inputs = node.inputs if inputs is None else inputs
    if node.domain != STANDARD_DOMAIN:
        raise NotInTorch(f"{node.label} is no operator of ONNX but of the domain {node.domain}")
    if node.op in ("Shape", "Size"):
        assert inputs[0] is not None
        data = operands.tensor(inputs[0])
        return lambda: [_shape(node, data)]
    if node.op in SHAPE_ARITHMETIC and (arrays := _arrays(inputs, operands)) is not None:
        known = arrays
        return lambda: [np.asarray(NUMPY_OPS[node.op](node, known), object)]
    rule = TABLE.get(node.op)
    if rule is None:
        raise NotInTorch(f"no torch function is known for {node.op} ({node.label})")
    given = _operands(inputs, rule, operands)
    keywords = {"device": operands.device} if rule.device else {}

    def compute() -> Results:
        made = rule.entry(node, *given, **keywords)
        return list(made) if isinstance(made, list) else [made]

    return compute


def _shape(node: Node, data: Tensor) -> np.ndarray:
    extents = list(data.shape)[node.attributes.get("start", 0) : node.attributes.get("end")]
    if node.op == "Shape":
        result = np.empty(len(extents), object)
        result[:] = extents
        return result
    total = np.empty((), object)
    total[()] = 1
    for extent in extents:
        total[()] = total[()] * extent
    return total


def _arrays(inputs: Sequence[Value | None], operands: Operands) -> list[np.ndarray | None] | None:
    """The operands' elements, if all are known and one comes from a shape."""
    if all(v is None or v.is_constant for v in inputs):
        return None
    computed = [operands.known(v) for v in inputs if v is not None and not v.is_constant]
    if any(a is None for a in computed):
        return None
    return [None if v is None else operands.known(v) for v in inputs]


def _operands(present: Sequence[Value | None], rule: Rule, operands: Operands) -> list[Operand]:
    """What the entry is called with."""
    inputs = list(present)
    while inputs and inputs[-1] is None:
        inputs.pop()
    given: list[Operand] = []
    for position, value in enumerate(inputs):
        if value is None:
            given.append(None)
        elif position in rule.contents and (known := operands.known(value)) is not None:
            given.append(known)
        elif position in rule.numbers and _is_number(value, inputs, given):
            element = operands.known(value)
            given.append(operands.tensor(value) if element is None else element.reshape(-1)[0].item())
        else:
            given.append(operands.tensor(value))
    return given


def _is_number(value: Value, inputs: Sequence[Value | None], before: Sequence[Operand]) -> bool:
    """Whether a constant of one element adds no axis to the result, and another operand of its dtype stays a tensor."""
    if not value.is_constant or value.shape is None or any(e != 1 for e in value.shape):
        return False
    numbers = {inputs[k] for k, operand in enumerate(before) if isinstance(operand, bool | int | float)}
    others = [v for v in inputs if v is not None and v is not value and v not in numbers and v.dtype == value.dtype]
    return any(v.shape is not None and len(v.shape) >= len(value.shape) for v in others)


class _Run:
    """The values of one run."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.found: dict[Value, Tensor | np.ndarray] = {}

    def known(self, value: Value) -> np.ndarray | None:
        found = self.found.get(value)
        if found is None and value.is_constant:
            return np.asarray(value.constant)
        return found if isinstance(found, np.ndarray) else None

    def tensor(self, value: Value) -> Tensor:
        found = self.found.get(value)
        if isinstance(found, Tensor):
            return found
        if found is not None:
            return as_tensor(found, self.device)
        tensor = self.found[value] = tensor_of(value.constant, self.device)
        return tensor


def as_tensor(numbers: np.ndarray, device: torch.device) -> Tensor:
    """Results of shape arithmetic as an int64 tensor."""
    elements = [aten.scalar_tensor.default(x, dtype=torch.int64, device=device) for x in numbers.reshape(-1)]
    if not elements:
        return aten.empty.memory_format(list(numbers.shape), dtype=torch.int64, device=device)
    return aten.reshape.default(aten.stack.default(elements), list(numbers.shape))


def run_graph(graph: Graph, tensors: Sequence[Tensor]) -> list[Tensor]:
    """The graph's outputs for its inputs, in order; constants are put on the device of the first input.

    Differentiable, also on fake tensors; the two local attention ops are computed by their bodies. Raises NotInTorch
    where the table cannot express a node.
    """
    device = tensors[0].device if tensors else torch.device("cpu")
    run = _Run(device)
    run.found.update(zip(graph.inputs, tensors, strict=True))
    for node in graph.nodes:
        if is_local_op(node):
            operands = [run.tensor(v) for v in operands_of(node).values()]
            found: Sequence[Tensor | np.ndarray] = run_graph(body_of(node, graph.opset), operands)
        else:
            found = bound(node, run)()
        run.found.update(zip(node.outputs, found, strict=False))
    return [run.tensor(v) for v in graph.outputs]


def run_node(node: Node, tensors: Sequence[Tensor | None]) -> list[Tensor]:
    """The node's outputs for its inputs that are no constants; None stands for those that are, and for absent ones."""
    inputs = [v for v, t in zip(node.inputs, tensors, strict=True) if v is not None and t is not None]
    graph = Graph(inputs, list(node.outputs), [node], 17)
    return run_graph(graph, [t for t in tensors if t is not None])
