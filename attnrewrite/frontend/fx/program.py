"""What a torch.fx graph says besides the graph view: which node computes which value, kept for the writer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.export import ExportedProgram

from attnrewrite.graph import Node, Value

# Of nodes that ONNX has no name for: the operator is ATen's, attributes are `target` (the OpOverload) and `arguments`
# (by the names of its schema, tensors as Operand, symbolic sizes as Dim). `state` reads a tensor that the graph writes
# to and that outlives it, a buffer say.
TORCH_DOMAIN = "torch"


# Where nodes say in their `meta` what they return on fake tensors: torch.export's way, and Dynamo's.
KNOWN_AS = ("val", "example_value")


def known_as(node: torch.fx.Node) -> Any:
    """What a node says that it returns; None where it says nothing."""
    return next((node.meta[key] for key in KNOWN_AS if key in node.meta), None)


@dataclass(frozen=True)
class Operand:
    """Stands for the input at an index in the arguments of an opaque node."""

    index: int


@dataclass(frozen=True, eq=False)
class Expansion:
    """The nodes of the graph view that stand for one torch.fx node, in order, and what they read from outside.

    inputs: of each node as it was read (folded), by which the writer tells whether a pass has edited it; so are forms,
    which say operator and attributes. replaces: whether the torch.fx node writes in place, so that it cannot stay where
    the graph around it is edited. stays: whether it writes to what outlives the graph (a buffer, an input), so that it
    must stay, and run once. seen: of argument nodes whose tensor had been written to since, the value that this node
    finds there instead of `Program.values`.
    """

    nodes: tuple[Node, ...]
    inputs: tuple[tuple[Value | None, ...], ...]
    reads: tuple[Value, ...]
    replaces: bool = False
    stays: bool = False
    seen: Mapping[torch.fx.Node, Value] = field(default_factory=dict)
    forms: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "forms", tuple(map(form, self.nodes)))


def form(node: Node) -> str:
    """What a node computes from its inputs, for comparison."""
    attributes = [(k, v.tobytes() if isinstance(v, np.ndarray) else v) for k, v in sorted(node.attributes.items())]
    return f"{node.domain}.{node.op} {attributes}"


@dataclass
class Program:
    """A torch.fx graph and how the graph view was read from it; `Graph.source` of a graph read by `frontend.fx.read`.

    values: of each torch.fx node, a Value for every tensor it returns (in the tuple or list that it returns them in),
    anything else as it is. expansions: of each node that computes tensors. symbols: of each symbol in the graph's
    shapes, the node (a placeholder, if one has it) and axis whose extent it is. fakes: what each node returns on fake
    tensors, where its own `meta` does not say. names: of parameters and buffers, what the module's state calls them.
    The graph's outputs are the values of the output node's tensors, in order.

    `Value.source` of a parameter or buffer is its placeholder or get_attr node, or its qualified name in the module
    where no node stands for it (inside of a call_module).
    """

    module: torch.fx.GraphModule
    exported: ExportedProgram | None = None
    values: dict[torch.fx.Node, Any] = field(default_factory=dict)
    expansions: dict[torch.fx.Node, Expansion] = field(default_factory=dict)
    symbols: dict[str, tuple[torch.fx.Node, int]] = field(default_factory=dict)
    fakes: dict[torch.fx.Node, Any] = field(default_factory=dict)
    names: dict[Value, str] = field(default_factory=dict)

    def node_of(self) -> dict[Value, torch.fx.Node]:
        """The torch.fx node of every value that one node alone returns."""
        return {v: node for node, v in self.values.items() if isinstance(v, Value)}


@dataclass(frozen=True, eq=False)
class Live:
    """How a constant of the rewritten graph follows from values that torch.fx nodes compute from parameters.

    index: int64 of the constant's shape, the position of each element in the values, each flattened row by row, one
    after the other; None where the constant is the one value.
    """

    values: tuple[Value, ...]
    index: np.ndarray | None = None


@dataclass(frozen=True)
class Lifted:
    """Placeholders that are no inputs of the model but its tensors, as torch.export and Dynamo hand them over.

    name: of the placeholder. tensor: what it holds. trained: whether it is a parameter, not a buffer.
    """

    name: str
    tensor: torch.Tensor
    trained: bool


def by_name(lifted: Sequence[Lifted]) -> dict[str, Lifted]:
    return {tensor.name: tensor for tensor in lifted}
