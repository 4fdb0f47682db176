"""What a torch.fx graph says besides the graph view: which node computes which value, kept for the writer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.export import ExportedProgram

from attnrewrite.graph import Node, Value


@dataclass(frozen=True, eq=False)
class Expansion:
    """The nodes of the graph view that stand for one torch.fx node, in order, and what they read from outside.

    inputs: of each node as it was read, by which the writer tells whether a pass has edited it. replaces: whether the
    torch.fx node writes in place, so that it cannot stay where the graph around it is edited.
    """

    nodes: tuple[Node, ...]
    inputs: tuple[tuple[Value | None, ...], ...]
    reads: tuple[Value, ...]
    replaces: bool = False


@dataclass
class Program:
    """A torch.fx graph and how the graph view was read from it; `Graph.source` of a graph read by `frontend.fx.read`.

    values: of each torch.fx node, a Value for every tensor it returns (in the tuple or list that it returns them in),
    anything else as it is. expansions: of each node that computes tensors. symbols: of each symbol in the graph's
    shapes, the placeholder and axis whose extent it is.
    """

    module: torch.fx.GraphModule
    exported: ExportedProgram | None = None
    values: dict[torch.fx.Node, Any] = field(default_factory=dict)
    expansions: dict[torch.fx.Node, Expansion] = field(default_factory=dict)
    symbols: dict[str, tuple[torch.fx.Node, int]] = field(default_factory=dict)

    def node_of(self) -> dict[Value, torch.fx.Node]:
        """The torch.fx node of every value that one node alone returns."""
        return {v: node for node, v in self.values.items() if isinstance(v, Value)}


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
