"""torch.fx graphs in: torch.export programs, torch.fx.symbolic_trace and Dynamo graphs, all read by running them.

The graph is run on fake tensors, node by node, and the ATen operators that every node calls are written down with their
ONNX names, so that what follows is the same graph whichever dialect it was and the same passes as for ONNX files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

from attnrewrite.errors import UserError
from attnrewrite.frontend.expand import expand_attention
from attnrewrite.frontend.flattened import keep_axes
from attnrewrite.frontend.fold import fold
from attnrewrite.frontend.fx.calls import tensors_in
from attnrewrite.frontend.fx.guards import guard_by_softmax
from attnrewrite.frontend.fx.program import KNOWN_AS, Lifted, Program, by_name, known_as
from attnrewrite.frontend.fx.reading import Mutated, Reading, State
from attnrewrite.graph import Graph, Value

Tensors = Mapping[str, np.ndarray]


def read(
    module: torch.fx.GraphModule | ExportedProgram,
    example_inputs: Sequence[Any] = (),
    *,
    lifted: Sequence[Lifted] = (),
    tensors: Tensors | None = None,
) -> Graph:
    """The graph view of a torch.fx graph, with constants and shapes folded; its `source` is a Program.

    example_inputs: what a GraphModule is called with, real or fake tensors (symbolic sizes stay symbolic), one per
    placeholder; not needed where its placeholders have them (`meta["val"]`), nor for an ExportedProgram. lifted: which
    of a GraphModule's placeholders are tensors of the model. tensors: arrays in place of what parameters and buffers
    hold, by their names in the module's state (of lifted ones, the placeholders').
    Raises UserError, naming the torch.fx node, where the graph cannot be run or writes to a tensor that is read again.
    """
    mutable: frozenset[str] = frozenset()
    while True:
        try:
            reading, arguments = _prepared(module, example_inputs, lifted, tensors or {}, mutable)
            return _read(reading, arguments)
        except Mutated as found:
            if found.names <= mutable:
                raise AssertionError(f"{found} was read as a constant") from found
            mutable |= found.names


def _prepared(
    module: torch.fx.GraphModule | ExportedProgram,
    example_inputs: Sequence[Any],
    lifted: Sequence[Lifted],
    tensors: Tensors,
    mutable: frozenset[str],
) -> tuple[Reading, list[Any]]:
    """A reading with its inputs entered, and the arguments to run it with."""
    if isinstance(module, ExportedProgram):
        return _of_exported(module, tensors, mutable)
    return _of_module(module, example_inputs, by_name(lifted), tensors, mutable)


def _of_exported(exported: ExportedProgram, tensors: Tensors, mutable: frozenset[str]) -> tuple[Reading, list[Any]]:
    signature = exported.graph_signature
    changed = {**signature.buffers_to_mutate, **getattr(signature, "parameters_to_mutate", {})}
    program = Program(exported.graph_module, exported)
    state = State(tensors, mutable | frozenset(changed.values()))
    placeholders = [n for n in exported.graph.nodes if n.op == "placeholder"]
    arguments = [n.meta.get("val") for n in placeholders]
    reading = Reading(program, _mode_of(arguments), state)
    for node, spec, fake in zip(placeholders, signature.input_specs, arguments, strict=True):
        if not isinstance(fake, torch.Tensor):
            continue
        if spec.kind is InputKind.USER_INPUT:
            reading.enter(fake, node.name, f"the input {node.name}")
            continue
        assert spec.target is not None
        held = exported.state_dict.get(spec.target)
        real = held if held is not None else exported.constants[spec.target]
        state.name(real, spec.target)
        reading.hold(fake, real, spec.target)
    return reading, arguments


def _of_module(
    module: torch.fx.GraphModule,
    example_inputs: Sequence[Any],
    lifted: Mapping[str, Lifted],
    tensors: Tensors,
    mutable: frozenset[str],
) -> tuple[Reading, list[Any]]:
    placeholders = [n for n in module.graph.nodes if n.op == "placeholder"]
    if len(example_inputs) > len(placeholders):
        raise UserError(f"the graph takes {len(placeholders)} inputs, got {len(example_inputs)} example inputs")
    given = list(example_inputs)
    examples = [_described(n, x) for n, x in zip(placeholders, given, strict=False)]
    examples += [_example(n) for n in placeholders[len(given) :]]
    mode = _mode_of(examples)
    state = State(tensors, mutable)
    for name, tensor in [
        *module.named_parameters(remove_duplicate=False),
        *module.named_buffers(remove_duplicate=False),
    ]:
        state.name(tensor, name)
    reading = Reading(Program(module), mode, state)
    arguments = []
    for node, example in zip(placeholders, examples, strict=True):
        if not isinstance(example, torch.Tensor):
            arguments.append(example)
            continue
        fake = example if isinstance(example, FakeTensor) else mode.from_tensor(example, static_shapes=True)
        arguments.append(fake)
        own = lifted.get(node.name) or lifted.get(str(node.target))
        if own is None:
            reading.enter(fake, node.name, f"the input {node.name}")
        else:
            state.name(own.tensor, own.name)
            reading.hold(fake, own.tensor, own.name)
    return reading, arguments


def _described(node: torch.fx.Node, example: Any) -> Any:
    """The example, or the symbolic tensor that it is an instance of, where the graph was made for one (by Dynamo)."""
    symbolic = known_as(node)
    if not isinstance(symbolic, FakeTensor) or not isinstance(example, torch.Tensor) or isinstance(example, FakeTensor):
        return example
    sizes: list[tuple[Any, int]] = list(zip(symbolic.shape, example.shape, strict=False))
    fits = symbolic.ndim == example.ndim and all(isinstance(s, torch.SymInt) or s == e for s, e in sizes)
    return symbolic if fits and any(isinstance(s, torch.SymInt) for s in symbolic.shape) else example


def _example(node: torch.fx.Node) -> Any:
    """What is known of a placeholder without example inputs."""
    for key in KNOWN_AS:
        if key in node.meta:
            return node.meta[key]
    if node.args:
        return node.args[0]  # its default
    raise UserError(f"the graph's input {node.name} needs an example input")


def _mode_of(arguments: Sequence[Any]) -> FakeTensorMode:
    """The mode that the fake tensors among these belong to, or a new one."""
    for tensor in tensors_in(list(arguments)):
        if isinstance(tensor, FakeTensor):
            return tensor.fake_mode
    return FakeTensorMode()


def _read(reading: Reading, arguments: list[Any]) -> Graph:
    try:
        reading.run(arguments)
    except (UserError, Mutated, AssertionError):
        raise
    except Exception as error:  # whatever the operators of the graph raise
        raise UserError(f"the torch.fx graph cannot be run: {str(error).splitlines()[0]}") from error
    program, graph = reading.program, reading.write.graph
    inputs = [program.values[n] for n in program.module.graph.nodes if n.op == "placeholder"]
    graph.inputs = [v for v in inputs if isinstance(v, Value) and v in reading.inputs]
    graph.outputs = reading.outputs
    graph.name = "graph"
    graph.source = program
    fold(graph)
    expand_attention(graph)
    keep_axes(graph)
    guard_by_softmax(graph)
    reading.finished()
    return graph
