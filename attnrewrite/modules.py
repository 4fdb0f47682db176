"""PyTorch models through the passes: nn.Module, torch.fx.GraphModule and torch.export.ExportedProgram in, the same out.

Parameters stay parameters: what the rewritten model needs of them it computes from them at every call, unless it is
asked to freeze them.
"""

from __future__ import annotations

import contextlib
import copy
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.export import ExportedProgram
from torch.fx import GraphModule
from torch.utils._pytree import tree_leaves, tree_map

from attnrewrite.errors import UserError, last_line
from attnrewrite.frontend import pt2
from attnrewrite.frontend.fx.entry import NotInTorch
from attnrewrite.frontend.fx.program import Lifted, Live, Program, known_as
from attnrewrite.frontend.fx.read import read
from attnrewrite.frontend.fx.tensors import array_of
from attnrewrite.frontend.fx.write import write
from attnrewrite.functions.spec import Spec
from attnrewrite.graph import Graph, Value
from attnrewrite.operators import linear as _linear  # noqa: F401 - registers the operator
from attnrewrite.operators.compiled import prepare
from attnrewrite.operators.schema import bind, operator_of
from attnrewrite.pipeline import Outcome, Pipeline
from attnrewrite.trained import rewrite_trained
from attnrewrite.verify.numeric import Comparison, Verification, compare

# Of max |output|: float32 sums of a few thousand products taken in another order.
TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}

_DROPOUTS = (torch.ops.aten.dropout.default, torch.ops.aten.native_dropout.default)

Model = GraphModule | ExportedProgram


@dataclass(frozen=True)
class Rewritten:
    """model: of the kind that was given. frozen: whether parameters became constants."""

    model: Model
    outcome: Outcome
    frozen: bool

    def constants(self) -> set[str]:
        """The lifted placeholders of a GraphModule whose contents were read as constants."""
        program: Program = self.outcome.graph.source
        held = ((n, v) for n, v in program.values.items() if n.op == "placeholder" and isinstance(v, Value))
        return {n.name for n, v in held if v.is_constant}


@dataclass(frozen=True)
class Given:
    """A model as it was given, and how it is called. dynamic_shapes: as torch.export takes them."""

    model: torch.nn.Module | ExportedProgram
    inputs: tuple[Any, ...]
    kwargs: dict[str, Any]
    dynamic_shapes: Any = None

    @property
    def name(self) -> str:
        module = self.model.graph_module if isinstance(self.model, ExportedProgram) else self.model
        return type(module).__name__

    def traced(self) -> Model:
        """A GraphModule and an ExportedProgram as they are, any other module through torch.export."""
        if isinstance(self.model, (GraphModule, ExportedProgram)):
            return self.model
        return self.exported(self.model)

    def exported(self, module: torch.nn.Module) -> ExportedProgram:
        """The program that torch.export makes of a module called like this one. Raises UserError where it cannot."""
        try:
            return torch.export.export(module, self.inputs, self.kwargs, dynamic_shapes=self.dynamic_shapes)
        except Exception as error:  # torch.export raises what the model's own code raises, and more
            raise UserError(f"torch.export cannot trace {type(module).__name__}: {last_line(error)}") from error

    @contextlib.contextmanager
    def as_onnx(self, traced: Model) -> Iterator[Path]:
        """The traced model as an ONNX file, which goes with the context. Raises UserError where it has no such form."""
        with tempfile.TemporaryDirectory(prefix="attnrewrite-") as folder:
            path = Path(folder) / f"{self.name}.onnx"
            pt2.to_onnx(traced if isinstance(traced, ExportedProgram) else self.exported(traced), path)
            yield path


def is_model(model: object) -> bool:
    """Whether this is a PyTorch model."""
    return isinstance(model, (torch.nn.Module, ExportedProgram))


def as_program(model: Model) -> ExportedProgram | None:
    return model if isinstance(model, ExportedProgram) else None


def as_module(model: Model) -> GraphModule:
    """What is called in place of the original."""
    return model.module() if isinstance(model, ExportedProgram) else model


def delivered(done: Rewritten) -> GraphModule:
    """What is called in place of the original; if it is only to be run, with the faster library's linear layers."""
    module = as_module(done.model)
    if done.frozen and done.outcome.modified:
        _quicken_linears(module)
    return module


def _quicken_linears(module: GraphModule) -> None:
    """Let the faster library compute the float32 linear layers on CPUs."""
    for node in module.graph.nodes:
        value = node.meta.get("val")
        is_linear = node.op == "call_function" and node.target is torch.ops.aten.linear.default
        if (
            is_linear
            and isinstance(value, torch.Tensor)
            and value.device.type == "cpu"
            and value.dtype == torch.float32
        ):
            node.target = torch.ops.attnrewrite.linear.default
    module.recompile()


def graph_of(model: Model) -> GraphModule:
    """The graph itself, with a program's tensors as inputs."""
    return model.graph_module if isinstance(model, ExportedProgram) else model


def is_frozen(model: torch.nn.Module | ExportedProgram) -> bool:
    """Whether no gradients of the model's parameters are recorded at present."""
    return not (torch.is_grad_enabled() and any(p.requires_grad for p in model.parameters()))


def save(program: ExportedProgram, path: Path) -> None:
    """Write a .pt2 archive. Raises UserError where it cannot be written."""
    try:
        torch.export.save(program, path)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from error


def rewrite(
    model: Model,
    example_inputs: Sequence[Any] = (),
    *,
    pipeline: Pipeline,
    freeze: bool,
    lifted: Sequence[Lifted] = (),
    on_pass: Callable[[str, Graph], None] | None = None,
) -> Rewritten:
    """Run the passes over a copy of the model that shares its parameters.

    example_inputs: of a GraphModule, one for each of its placeholders. lifted: which placeholders are tensors of the
    model. freeze: take parameters for constants. Raises UserError for a graph that cannot be read, or not written.
    """
    model = _copied(model)
    parameters = {} if freeze else _parameters(model, lifted)

    def reading(arrays: Mapping[str, np.ndarray] | None = None) -> Graph:
        return read(model, example_inputs, lifted=lifted, tensors=arrays)

    live: dict[Value, Live] | None = None
    if parameters:
        outcome, gathered = rewrite_trained(reading, parameters, _live_values, pipeline, on_pass)
        live = {constant: Live(g.values, g.index) for constant, g in gathered.items()}
    else:
        outcome = pipeline.run(reading(), on_pass)
    if not outcome.modified:
        return Rewritten(model, outcome, freeze)
    try:
        written = write(outcome.graph, live)
    except NotInTorch as error:
        raise UserError(f"the rewritten graph cannot be written in PyTorch: {error}") from error
    return Rewritten(written, outcome, freeze)


def prepare_kernels(module: GraphModule) -> None:
    """Compile the kernels of a graph's ops together. Without this it happens at the first calls: on CPUs in
    the background, while PyTorch's own operators compute.
    """
    if sites := sites_of(module):
        prepare(sites)


def sites_of(module: GraphModule) -> list[tuple[Spec, dict[str, torch.Tensor]]]:
    """The spec and the operands, as what the graph knows of them, of each of its ops on a CPU or a CUDA device."""
    sites = []
    for node in module.graph.nodes:
        operator = operator_of(node.target)
        if operator is None or any(known_as(n) is None for n in node.all_input_nodes):
            continue
        args, kwargs = torch.fx.map_arg((node.args, node.kwargs), known_as)
        spec, operands = bind(operator, args, kwargs)
        if all(isinstance(t, torch.Tensor) and t.device.type in ("cpu", "cuda") for t in operands.values()):
            sites.append((spec, operands))
    return sites


def _live_values(graph: Graph) -> list[Value]:
    """The constants of the view that the program holds or computes, in its order."""
    program: Program = graph.source
    computed = [o for expansion in program.expansions.values() for node in expansion.nodes for o in node.outputs]
    return [v for v in dict.fromkeys([*program.names, *computed]) if v.is_constant]


def _parameters(model: Model, lifted: Sequence[Lifted]) -> dict[str, np.ndarray]:
    """What is trained, by the names under which `read` knows it."""
    if isinstance(model, ExportedProgram):
        trained = {name: model.state_dict[name] for name in model.graph_signature.parameters}
    else:
        trained = dict(model.named_parameters(remove_duplicate=False))
        trained |= {tensor.name: tensor.tensor for tensor in lifted if tensor.trained}
    return {name: array_of(t) for name, t in trained.items() if t.is_floating_point()}


def verify(
    original: Model, after: GraphModule, example_inputs: Sequence[Any], kwargs: Mapping[str, Any]
) -> Verification:
    """Outputs of a model and of what is called in its place, on the example inputs and on random ones of their kind.

    Nothing is run, which a note says, where a run would change the model (norms in training) or be random.
    """
    start = time.perf_counter()
    if (reason := _not_repeatable(original)) is not None:
        return Verification(notes=(f"not compared on numbers: {reason}",))
    before = as_module(original)
    found: list[Comparison] = []
    example = (tuple(example_inputs), dict(kwargs))
    generator = torch.Generator().manual_seed(0)
    for case, inputs in (("example", example), ("random", tree_map(partial(_like, generator), example))):
        given, named = inputs
        with torch.no_grad():
            expected, computed = (tree_leaves(m(*given, **named)) for m in (before, after))
        for k, (a, b) in enumerate(zip(expected, computed, strict=True)):
            if isinstance(a, torch.Tensor):
                found.append(_comparison(case, f"output {k}", a, b))
    return Verification(tuple(found), seconds=time.perf_counter() - start)


def _like(generator: torch.Generator, value: Any) -> Any:
    """Random numbers of a floating-point tensor's shape, dtype and device; anything else as it is."""
    if not isinstance(value, torch.Tensor) or not value.is_floating_point():
        return value
    return torch.randn(value.shape, generator=generator).to(value)


def _comparison(case: str, name: str, expected: torch.Tensor, found: torch.Tensor) -> Comparison:
    difference = compare(
        *(t.double().cpu().numpy() if t.is_floating_point() else t.cpu().numpy() for t in (expected, found))
    )
    tolerance = TOLERANCES.get(expected.dtype, 0.0)
    batch = expected.shape[0] if expected.ndim else 1
    return Comparison("rewritten", case, batch, name, difference.error, difference.scale, tolerance, str(difference))


def _not_repeatable(model: Model) -> str | None:
    """Why two runs of a model may differ; None where they do not."""
    if isinstance(model, ExportedProgram):
        if model.graph_signature.buffers_to_mutate or model.graph_signature.user_inputs_to_mutate:
            return "the model writes to its own buffers or inputs"
    elif any(m.training for m in model.modules()):
        return "the model is in training mode"
    for node in model.graph.nodes:
        tags = getattr(node.target, "tags", ())
        if torch.Tag.nondeterministic_seeded in tags and node.target not in _DROPOUTS:
            return f"{node.name} is random"
        if node.target in _DROPOUTS and node.args[1] != 0 and node.args[2]:
            return f"{node.name} is random"
    return None


def _copied(model: Model) -> Model:
    """The same model with a graph of its own; parameters and buffers are shared."""
    graph = copy.deepcopy(model.graph)
    for new, old in zip(graph.nodes, model.graph.nodes, strict=True):
        new.name = old.name  # torch numbers a copied node that is called like a builtin
        if (source := getattr(old, "_dynamo_source", None)) is not None:
            new._dynamo_source = source  # which AOTAutograd asks placeholders for
    if not isinstance(model, ExportedProgram):
        return GraphModule(model, graph)
    return ExportedProgram(
        model.graph_module,
        graph,
        copy.deepcopy(model.graph_signature),
        model.state_dict,
        copy.deepcopy(model.range_constraints),
        copy.deepcopy(model.module_call_graph),
        model.example_inputs,
        dict(model.constants),
        verifiers=model.verifiers,
    )
