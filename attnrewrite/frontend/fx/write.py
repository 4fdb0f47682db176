"""The edited graph view back into its torch.fx graph, in place: what the passes left alone stays as it was.

A torch.fx node whose definition is unchanged stays, an argument replaced where its value was (`demand.py`); everything
else is emitted (`emit.py`, `emission.py`) before its first user; what nobody asks for is deleted.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch.export import ExportedProgram
from torch.fx import Node as FxNode

from attnrewrite.dims import Dim
from attnrewrite.errors import UserError
from attnrewrite.frontend.fx.autocast import without_autocast
from attnrewrite.frontend.fx.calls import invoke, tensors_in
from attnrewrite.frontend.fx.demand import Demand, Emit, Keep, Ref, Size, in_order, updated, values_in
from attnrewrite.frontend.fx.emission import Recording
from attnrewrite.frontend.fx.emit import as_tensor, bound
from attnrewrite.frontend.fx.entry import tensor_of
from attnrewrite.frontend.fx.linears import Linear, linears
from attnrewrite.frontend.fx.program import TORCH_DOMAIN, Expansion, Live, Operand, Program
from attnrewrite.functions import is_local_op, spec_of
from attnrewrite.functions.spec import SPECS
from attnrewrite.graph import STANDARD_DOMAIN, Graph, Value
from attnrewrite.operators import schema

aten = torch.ops.aten

# Of a parameter these are written again rather than frozen: the result is a view of it.
_VIEWS = frozenset({"Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze"})

# A view of a tensor that may lie otherwise in memory now is a reshape.
_RESHAPES: dict[Any, Any] = {
    aten.view.default: aten.reshape.default,
    aten._unsafe_view.default: aten.reshape.default,
    torch.Tensor.view: torch.Tensor.reshape,
    "view": "reshape",
}
_STRIDED = (aten.as_strided.default, torch.as_strided, torch.Tensor.as_strided, "as_strided")

# What new nodes say of the model's source, taken over from the node they stand for.
_ORIGIN = ("stack_trace", "nn_module_stack")


def write(graph: Graph, live: Mapping[Value, Live] | None = None) -> torch.fx.GraphModule | ExportedProgram:
    """Edit the program that the graph was read from, and return it: as it was, if no pass edited the graph.

    New constants become buffers that are not in the state_dict, or constants of an exported program; those in `live`
    are computed from the values that they follow from whenever the program runs, and so is whatever was folded while
    the graph was read. live None: nothing is, parameters are constants. Raises UserError where torch cannot express an
    edit, NotInTorch (a ValueError) where the table lacks an operator; the program is then half edited.
    """
    program: Program = graph.source
    demand = Demand(graph, live)
    if demand.edited:
        _Writer(demand).run()
    return program.exported if program.exported is not None else program.module


class _Writer:
    """One edit of one program. It is the `Operands` of the nodes it emits."""

    def __init__(self, demand: Demand) -> None:
        self.demand, self.program = demand, demand.program
        self.fx = self.program.module.graph
        self.recording = Recording(self.program)
        self.device = self.recording.device
        self.output = self.recording.output
        self.placed = self.recording.placed
        self.made: dict[Value, FxNode] = {}
        self.numbers: dict[Value, np.ndarray] = {}  # results of shape arithmetic
        self.changed: set[FxNode] = set()  # may lie otherwise in memory than as read
        self.emitted: list[tuple[Emit, FxNode]] = []
        self.unfrozen: set[Value] = set()
        self.linears, self.inside = linears(demand)

    def run(self) -> None:
        index = {node: k for k, node in enumerate(self.fx.nodes)}
        effects = list(self.demand.effects)
        for node in self.demand.graph.nodes:
            owner = self.demand.owner.get(node)
            while owner is not None and effects and index[effects[0]] < index[owner]:
                self.place(effects.pop(0))
            for value in node.outputs:
                if value in self.demand.plans and value not in self.inside:
                    self.ensure(value)
        for effect in effects:
            self.place(effect)
        renamed = self._return()
        for node in reversed(list(self.fx.nodes)):
            unused = node in self.recording.fresh and not node.users
            if node.op not in ("placeholder", "output") and (unused or node not in self.placed):
                self.program.values.pop(node, None)
                self.program.expansions.pop(node, None)
                self.fx.erase_node(node)
        self._remember()
        without_autocast(self.fx, self.recording.fresh)
        self.fx.lint()
        self.program.module.recompile()
        if self.program.exported is not None:
            _rename(self.program.exported, renamed)
            self.program.exported.validate()  # type: ignore[no-untyped-call]

    def _return(self) -> dict[str, str]:
        """Put what stands for the results now into the output node; says which are called otherwise now."""
        refs = iter(self.demand.outputs)
        replaced: dict[FxNode, Any] = {}
        occurrences: list[Any] = []
        for node in in_order(self.output.args):
            tree = self.program.values.get(node)
            count = len(list(values_in(tree)))
            found = [self.node(next(refs)) for _ in range(count)]
            occurrences.append(
                self.place(node) if not count else found[0] if isinstance(tree, Value) else _shaped_like(tree, found)
            )
            replaced.setdefault(node, occurrences[-1])
        given = iter(occurrences)
        self.output.args = torch.fx.map_arg(self.output.args, lambda node: next(given))
        return {a.name: b.name for a, b in replaced.items() if isinstance(b, FxNode) and a is not b}

    def _remember(self) -> None:
        """Bring the program up to date, so that the graph may be edited and written again."""
        expansions, values = self.program.expansions, self.program.values
        for node in self.changed & expansions.keys():
            expansions[node] = updated(expansions[node])
        for plan, node in self.emitted:
            (values[node],) = (v for v in plan.node.outputs if self.made.get(v) is node)
            products = [v.producer for v in plan.inputs if v in self.inside] if plan.node in self.linears else []
            nodes = (*(n for n in products if n is not None), plan.node)
            inputs = (*(tuple(n.inputs) for n in nodes[:-1]), plan.inputs)
            expansions[node] = updated(Expansion(nodes, inputs, ()))
        for value, node in self.made.items():
            if value.is_constant and node.op in ("placeholder", "get_attr"):
                values.setdefault(node, value)

    # -- nodes that stay ----------------------------------------------------------------------------------------------

    def node(self, ref: Ref) -> FxNode:
        return self.tensor_node(ref) if isinstance(ref, Value) else self.place(ref)

    def place(self, node: FxNode) -> FxNode:
        """Keep a node, its arguments replaced, behind what it reads."""
        if node in self.placed or node.op == "placeholder":
            return node
        now = {a: self._written(self.demand.argument(node, a)) for a in node.all_input_nodes}
        replaced = {a: b for a, b in now.items() if a is not b}
        if replaced:
            node.args, node.kwargs = (_substituted(arguments, replaced) for arguments in (node.args, node.kwargs))
        self.output.prepend(node)
        self.placed.add(node)
        if replaced or not self.changed.isdisjoint(node.all_input_nodes):
            self.changed.add(node)
            self._laid_out_anew(node)
        return node

    def _written(self, argument: Any) -> Any:
        if isinstance(argument, Size):
            return self.recording.size(argument.size)
        return [self.node(a) for a in argument] if isinstance(argument, list) else self.node(argument)

    def _laid_out_anew(self, node: FxNode) -> None:
        """What a node reads may lie otherwise in memory than it did."""
        if node.target in _STRIDED:
            raise UserError(f"the torch.fx node {node} depends on how a tensor lies in memory that is computed anew")
        if node.target in _RESHAPES and not any(isinstance(a, torch.dtype) for a in node.args):
            node.target = _RESHAPES[node.target]
        self.recording.run_again(node)

    def _element(self, node: FxNode, value: Value) -> FxNode:
        """The tensor among a node's results that is this value."""
        for step in _path(self.program.values.get(node), value):
            getters = (u for u in node.users if u.target is operator.getitem and u.args == (node, step))
            getter = next(getters, None)
            if getter is None:
                result = self.recording.value_of(node)[step]
                getter = self.recording.call(operator.getitem, (node, step), {}, result)
            node = self.place(getter)
        return node

    # -- values -------------------------------------------------------------------------------------------------------

    def ensure(self, value: Value) -> None:
        """Let the program compute a value."""
        if value in self.made or value in self.numbers:
            return
        plan = self.demand.plans.get(value)
        if value in self.demand.inputs:
            self.made[value] = self.demand.node_of[value]
        elif value.is_constant:
            self._make_constant(value)
        elif isinstance(plan, Keep):
            self.made[value] = self._element(self.place(plan.node), value)
        else:
            assert plan is not None, f"{value.name} was not asked for"
            self._emit(plan)

    def tensor_node(self, value: Value) -> FxNode:
        """The node that returns a value."""
        self.ensure(value)
        if value not in self.made:
            with self.recording.running():
                tensor = as_tensor(self.numbers[value], self.device)
            self.made[value] = self.recording.node_of(tensor)
        return self.made[value]

    def tensor(self, value: Value) -> torch.Tensor:
        """The fake tensor that stands for a value."""
        return self.recording.fake_of(self.tensor_node(value))

    def known(self, value: Value) -> np.ndarray | None:
        """The elements of a constant or of shape arithmetic."""
        if value.is_constant:
            return np.asarray(value.constant)
        self.ensure(value)
        return self.numbers.get(value)

    def _make_constant(self, value: Value) -> None:
        """A parameter or buffer is its own node, a view of one is a view; what follows from one is computed, as far as
        the caller wants it; anything else becomes a new constant.
        """
        held, read, live = self._parameter(value), self.demand.as_read.get(value), self.demand.live.get(value)
        if not self.demand.frozen and (live is None or self.demand.reference(live.values[0]) is value):
            self._unfreeze(value)
        elif live is not None:
            self._follow(value, live)
            return
        if held is not None:
            self.made[value] = held
        elif read is not None and (value in self.unfrozen or self._is_view_of_parameter(read)):
            self._emit(read)
        else:
            self.made[value] = self.recording.constant(tensor_of(value.constant, self.device), value.name)

    def _parameter(self, value: Value) -> FxNode | None:
        node = self.demand.node_of.get(value)
        if node is not None and node.op in ("placeholder", "get_attr"):
            return self.place(node)
        name = self.program.names.get(value)
        return None if name is None or self.program.exported is not None else self.recording.attribute(name)

    def _is_view_of_parameter(self, read: Emit) -> bool:
        data = read.inputs[0] if read.inputs else None
        if read.node.op not in _VIEWS or read.node.domain != STANDARD_DOMAIN or data is None:
            return False
        before = self.demand.as_read.get(data)
        return self.demand.is_held(data) or (before is not None and self._is_view_of_parameter(before))

    def _follow(self, value: Value, live: Live) -> None:
        """Compute a constant from the values that it follows from."""
        fakes = [self._fake_of_live(v) for v in live.values]
        with self.recording.running():
            fake = fakes[0]
            if live.index is not None:
                flat = [aten.reshape.default(f, [-1]) for f in fakes]
                positions = tensor_of(np.asarray(live.index, np.int64).reshape(-1), self.device)
                fake = aten.index_select.default(flat[0] if len(flat) == 1 else aten.cat.default(flat), 0, positions)
            if tuple(fake.shape) != value.shape:
                fake = aten.reshape.default(fake, list(value.known_shape))
        self.made[value] = self.recording.node_of(fake)
        self.changed.add(self.made[value])

    def _fake_of_live(self, value: Value) -> torch.Tensor:
        source = self.demand.reference(value)
        if isinstance(source, Value):
            self._unfreeze(source)
        return self.recording.fake_of(self.node(source))

    def _unfreeze(self, value: Value) -> None:
        """Let a constant that no node returns be computed as it was read, from parameters on."""
        read = self.demand.as_read.get(value)
        if read is not None and value not in self.unfrozen and not self.demand.is_held(value):
            self.unfrozen.add(value)
            for operand in read.inputs:
                if operand is not None:
                    self._unfreeze(operand)

    # -- emitting -----------------------------------------------------------------------------------------------------

    def _emit(self, plan: Emit) -> None:
        """Append what computes a node of the graph view."""
        node = plan.node
        found: Sequence[torch.Tensor | np.ndarray]
        if is_local_op(node):
            found = self._call_operator(plan)
        elif node.domain == TORCH_DOMAIN:
            found = self._call_opaque(plan)
        elif node in self.linears:
            found = [self._call_linear(plan, self.linears[node])]
        else:
            compute = bound(node, self, plan.inputs)
            with self._emitting(plan):
                found = compute()
        for value, result in zip(node.outputs, found, strict=False):
            if isinstance(result, np.ndarray):
                self.numbers[value] = result
                continue
            made = self.made[value] = self.recording.node_of(result)
            self.changed.add(made)
            if made in self.recording.fresh:
                self.emitted.append((plan, made))

    def _emitting(self, plan: Emit) -> Any:
        return self.recording.running(plan.node.outputs[0].name, self._origin(plan))

    def _call_operator(self, plan: Emit) -> list[torch.Tensor]:
        """One of the two ops."""
        names = SPECS[plan.node.op].operands
        operands = {n: self.tensor(v) for n, v in zip(names, plan.inputs, strict=False) if v is not None}
        overload, args, keywords = schema.call(spec_of(plan.node), operands)
        with self._emitting(plan):
            found = overload(*args, **keywords)
        return [found] if isinstance(found, torch.Tensor) else list(found)

    def _call_linear(self, plan: Emit, layer: Linear) -> torch.Tensor:
        data, weight = self.tensor(layer.data), self.tensor(layer.weight)
        bias = None if layer.bias is None else self.tensor(layer.bias)
        with self._emitting(plan):
            return aten.linear.default(data, weight, bias)

    def _call_opaque(self, plan: Emit) -> list[torch.Tensor]:
        """An operator of torch that ONNX has no name for."""
        target, arguments = (plan.node.attributes.get(name) for name in ("target", "arguments"))
        if target is None or arguments is None:
            raise UserError(f"{plan.node.label} cannot be written anew")
        tensors = [None if v is None else self.tensor(v) for v in plan.inputs]

        def given(tree: Any) -> Any:
            if isinstance(tree, Operand):
                return tensors[tree.index]
            if isinstance(tree, Dim):
                return self.recording.size_of(tree)
            return [given(branch) for branch in tree] if isinstance(tree, list | tuple) else tree

        with self._emitting(plan):
            found = invoke(target, {name: given(argument) for name, argument in arguments.items()})
        return list(tensors_in(found))

    def _origin(self, plan: Emit) -> dict[str, Any]:
        """What a new node says of where it comes from: as the node that its name starts with, or that it reads."""
        sources = [self.demand.owner.get(plan.node)]
        stem = plan.node.outputs[0].name
        while stem:
            sources.append(self.recording.named.get(stem))
            stem = stem.rpartition("_")[0]
        sources += [self.made.get(v) for v in plan.inputs if v is not None]
        for source in sources:
            if source is not None and any(key in source.meta for key in _ORIGIN):
                return {key: source.meta[key] for key in _ORIGIN if key in source.meta}
        return {}


def _path(tree: Any, value: Value) -> list[Any]:
    """By which indices a value is found among a node's results."""
    if tree is value or isinstance(tree, Value):
        return []
    for step, branch in tree.items() if isinstance(tree, dict) else enumerate(tree):
        if any(v is value for v in values_in(branch)):
            return [step, *_path(branch, value)]
    raise UserError(f"no torch.fx node returns {value.name}")


def _substituted(arguments: Any, replaced: Mapping[FxNode, Any]) -> Any:
    return torch.fx.map_arg(arguments, lambda node: replaced.get(node, node))


def _shaped_like(tree: Any, leaves: list[FxNode]) -> Any:
    given: Iterator[FxNode] = iter(leaves)

    def build(branch: Any) -> Any:
        if isinstance(branch, Value):
            return next(given)
        if isinstance(branch, dict):
            return {key: build(inner) for key, inner in branch.items()}
        return type(branch)(map(build, branch)) if isinstance(branch, list | tuple) else branch

    return build(tree)


def _rename(exported: ExportedProgram, renamed: Mapping[str, str]) -> None:
    """Let the signatures call the results what they are called now; a submodule's signature that names what is gone is
    dropped.
    """
    specs = exported.graph_signature.output_specs
    for position, spec in enumerate(specs):
        name = getattr(spec.arg, "name", "")
        if name in renamed:
            specs[position] = replace(spec, arg=replace(spec.arg, name=renamed[name]))
    present = {n.name for n in exported.graph.nodes}
    for entry in exported.module_call_graph:
        if entry.signature is None:
            continue
        outputs = entry.signature.outputs
        outputs[:] = [replace(a, name=renamed[a.name]) if a.name in renamed else a for a in outputs]
        if any(a.name and a.name not in present for a in (*entry.signature.inputs, *outputs)):
            entry.signature = None
