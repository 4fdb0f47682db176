"""What an edited graph view asks of the torch.fx graph it was read from: which nodes stay, and what is emitted anew.

From the outputs on, every value asks for what computes it. A torch.fx node whose definition is unchanged stays, with
other values in place of what it reads where these were replaced.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node as FxNode

from attnrewrite.errors import UserError
from attnrewrite.frontend.fold import does_nothing
from attnrewrite.frontend.fx.program import Expansion, Live, Program, form
from attnrewrite.graph import Graph, Node, Value

# Checks of what export knew already: they go with the tensor that they are about.
_ABOUT_A_TENSOR = (torch.ops.aten._assert_tensor_metadata.default,)

Ref = Value | FxNode  # what stands for an argument: a value, or a node as it is


@dataclass(frozen=True, eq=False)
class Keep:
    """The value is what this torch.fx node returns."""

    node: FxNode


@dataclass(frozen=True, eq=False)
class Emit:
    """The value is computed by this node of the graph view from these inputs."""

    node: Node
    inputs: tuple[Value | None, ...]


@dataclass(frozen=True)
class Size:
    """A size that stands as an argument: a number, a symbol, or several of them."""

    size: Any


class Demand:
    """The decisions, one for every value that is asked for.

    plans: how each value that is no constant and no input is computed. mappings: of each torch.fx node that stays, the
    values it reads, as read -> now. edited: whether the program has to change at all. frozen: whether parameters, and
    what follows from them, are constants.
    """

    def __init__(self, graph: Graph, live: Mapping[Value, Live] | None) -> None:
        self.graph, self.live, self.frozen = graph, live or {}, live is None
        self.program: Program = graph.source
        self.present = set(graph.nodes)
        self.inputs = set(graph.inputs)
        expansions = self.program.expansions
        self.owner = {n: node for node, e in expansions.items() for n in e.nodes}
        self.as_read = {
            o: Emit(n, i)
            for e in expansions.values()
            for n, i in zip(e.nodes, e.inputs, strict=True)
            for o in n.outputs
        }
        self.node_of: dict[Value, FxNode] = {}
        for node, value in self.program.values.items():
            if isinstance(value, Value):
                self.node_of.setdefault(value, node)
        self.plans: dict[Value, Keep | Emit] = {}
        self.mappings: dict[FxNode, dict[Value, Value]] = {}
        self.edited = False
        self.outputs: list[Ref] = []
        self.effects = self._decide([n for n in self.program.module.graph.nodes if self._has_effect(n)])

    def _decide(self, effects: list[FxNode]) -> list[FxNode]:
        """Ask for what the outputs and the effects need; returns the effects that stay."""
        self.outputs = self._outputs()
        pending: list[Ref] = [*self.outputs, *(n for n in effects if n.target not in _ABOUT_A_TENSOR)]
        seen: set[Ref] = set()
        while pending:
            ref = pending.pop()
            if ref not in seen:
                seen.add(ref)
                pending += self._read_by(ref)
        return [n for n in effects if n.target not in _ABOUT_A_TENSOR or seen.issuperset(self._refs_of(n))]

    # -- the ends -----------------------------------------------------------------------------------------------------

    def _outputs(self) -> list[Ref]:
        """Of every tensor that the program returns, in order, what stands for it now."""
        output = next(n for n in self.program.module.graph.nodes if n.op == "output")
        leaves = [(node, v) for node in in_order(output.args) for v in values_in(self.program.values.get(node))]
        if len(leaves) != len(self.graph.outputs):
            raise UserError(f"the program returns {len(leaves)} tensors, the graph {len(self.graph.outputs)}")
        found: list[Ref] = []
        for (node, old), new in zip(leaves, self.graph.outputs, strict=True):
            self.edited |= old is not new
            alone = isinstance(self.program.values.get(node), Value)
            found.append(new if old is not new or not alone else self.standing(node))
        return found

    def _has_effect(self, node: FxNode) -> bool:
        """Whether the node does something besides computing a result: then it stays, and in its order."""
        expansion = self.program.expansions.get(node)
        if node.op in ("placeholder", "output", "get_attr") or (expansion is not None and expansion.replaces):
            return False
        if expansion is not None:
            return expansion.stays
        return node.is_impure() or (not node.users and self.program.values.get(node) is None)

    # -- one value, one node ------------------------------------------------------------------------------------------

    def _read_by(self, ref: Ref) -> list[Ref]:
        """What a value, or a node as it is, reads in its turn."""
        if isinstance(ref, FxNode):
            self.mappings.setdefault(ref, {})
            return self._refs_of(ref)
        if ref in self.inputs:
            return []
        if ref.is_constant:
            return [self.reference(v) for v in self.live[ref].values] if ref in self.live else []
        plan = self.plans[ref] = self._plan(ref)
        if isinstance(plan, Keep):
            return self._refs_of(plan.node)
        return [v for v in plan.inputs if v is not None and (not v.is_constant or v in self.live)]

    def reference(self, value: Value) -> Ref:
        """A value; by its node, which is then taken as it is, where it was folded into a constant."""
        node = self.node_of.get(value)
        return node if node is not None and value.is_constant and not self._replaces(node) else value

    def _replaces(self, node: FxNode) -> bool:
        expansion = self.program.expansions.get(node)
        return expansion is not None and expansion.replaces

    def is_held(self, value: Value) -> bool:
        """Whether the value is a parameter or a buffer."""
        node = self.node_of.get(value)
        return value in self.program.names or (node is not None and node.op in ("placeholder", "get_attr"))

    def _plan(self, value: Value) -> Keep | Emit:
        node = value.producer
        if node is None or node not in self.present:  # asked for by a node that stays, for its shape say
            if value not in self.as_read:
                raise UserError(f"{value.name} is computed by nothing")
            return self.as_read[value]
        owner = self.owner.get(node)
        emitted = Emit(node, tuple(node.inputs))
        if owner is None:
            if value in self.node_of:
                return Keep(self.node_of[value])  # a tensor that outlives the program, as it is found
            self.edited = True
            return emitted
        mapping, known = self._mapping(owner, value), self.mappings.get(owner, {})
        self.edited |= mapping is None or any(old is not new for old, new in mapping.items())
        whole = any(v is value for v in values_in(self.program.values.get(owner)))
        if mapping is None or not whole or self.program.expansions[owner].replaces:
            return emitted
        if any(known.get(old, new) is not new for old, new in mapping.items()):
            return emitted
        self.mappings[owner] = known | mapping
        return Keep(owner)

    def _mapping(self, owner: FxNode, value: Value) -> dict[Value, Value] | None:
        """What the nodes that stand for a torch.fx node read from outside, as read -> now; None where they were edited
        otherwise.
        """
        expansion = self.program.expansions[owner]
        position = {o: k for k, n in enumerate(expansion.nodes) for o in n.outputs}
        mapping: dict[Value, Value] = {}
        pending, seen = [position[value]], set[int]()
        while pending:
            k = pending.pop()
            if k in seen:
                continue
            seen.add(k)
            node, before = expansion.nodes[k], expansion.inputs[k]
            if form(node) != expansion.forms[k] or len(node.inputs) != len(before):
                return None
            for old, new in zip(before, node.inputs, strict=True):
                if old is None or new is None or old in position:
                    if old is not new:
                        return None
                    if old is not None and not old.is_constant:
                        pending.append(position[old])
                elif mapping.setdefault(old, new) is not new:
                    return None
        replaced = {old for old, new in mapping.items() if old is not new}
        read = (v for a in owner.all_input_nodes for v in values_in(self._found_in(owner, a)))
        return mapping if not replaced or replaced <= {v for a in read for v in self._passed_on(a)} else None

    def _found_in(self, reader: FxNode, argument: FxNode) -> Any:
        """The values that a node finds in its argument."""
        expansion = self.program.expansions.get(reader)
        found = None if expansion is None else expansion.seen.get(argument)
        return self.program.values.get(argument) if found is None else found

    def _passed_on(self, value: Value) -> Iterator[Value]:
        """The value, and what it is the same as: nodes that do nothing are not in the graph view."""
        same: Value | None = value
        while same is not None:
            yield same
            read = self.as_read.get(same)
            same = None if read is None else does_nothing(read.node, _constant)

    # -- arguments ----------------------------------------------------------------------------------------------------

    def _refs_of(self, node: FxNode) -> list[Ref]:
        return [ref for argument in node.all_input_nodes for ref in _refs_in(self.argument(node, argument))]

    def argument(self, node: FxNode, argument: FxNode) -> Any:
        """What an argument of a node that stays is now: a value, a node, a Size, or a list of values."""
        tree, mapping = self._found_in(node, argument), self.mappings.get(node, {})
        if isinstance(tree, Value):
            now = self._now(tree, mapping)
            if now is not None:
                return now
            return self.standing(argument) if tree is self.program.values.get(argument) else tree
        values = list(values_in(tree))
        if values and any(self._now(v, mapping) is not None for v in values):
            return [self._now(v, mapping) or v for v in values]
        if isinstance(tree, int | torch.SymInt | torch.Size) and not isinstance(tree, bool):
            return argument if self._is_at_hand(argument) else Size(tree)
        return argument

    def _now(self, value: Value, mapping: Mapping[Value, Value]) -> Value | None:
        """What stands for an argument's value, if it was replaced."""
        for same in self._passed_on(value):
            if same in mapping:
                return mapping[same] if mapping[same] is not same else None
        return None

    def standing(self, node: FxNode) -> Ref:
        """A node as the graph view has it: by its value, or as it is where that does not compute it."""
        value, replaces = self.program.values.get(node), self._replaces(node)
        if not isinstance(value, Value) or (value.is_constant and not replaces):
            return node
        return value if replaces or value.producer in self.present or value in self.inputs else node

    def _is_at_hand(self, node: FxNode) -> bool:
        """Whether a size is read from inputs alone, so that nothing is computed for it."""
        return all(
            a.op in ("placeholder", "get_attr")
            or (not list(values_in(self.program.values.get(a))) and self._is_at_hand(a))
            for a in node.all_input_nodes
        )


def updated(expansion: Expansion) -> Expansion:
    """The expansion as its nodes are now."""
    inputs = tuple(tuple(n.inputs) for n in expansion.nodes)
    own = {o for n in expansion.nodes for o in n.outputs}
    reads = dict.fromkeys(v for values in inputs for v in values if v is not None and v not in own)
    return Expansion(expansion.nodes, inputs, tuple(reads), expansion.replaces, expansion.stays)


def values_in(tree: Any) -> Iterator[Value]:
    """The values in what a node returns, in order."""
    if isinstance(tree, Value):
        yield tree
    elif isinstance(tree, dict):
        for branch in tree.values():
            yield from values_in(branch)
    elif isinstance(tree, list | tuple):
        for branch in tree:
            yield from values_in(branch)


def in_order(arguments: Any) -> list[FxNode]:
    """The nodes among arguments, in order, as often as they stand there."""
    found: list[FxNode] = []
    torch.fx.map_arg(arguments, found.append)
    return found


def _refs_in(argument: Any) -> list[Ref]:
    if isinstance(argument, list):
        return argument
    return [] if isinstance(argument, Size) else [argument]


def _constant(value: Value | None) -> Any:
    return value.constant if value is not None and value.is_constant else None
