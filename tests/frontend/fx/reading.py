"""torch functions as torch.fx graphs of three dialects, and what the graph view of one computes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from torch import nn

from attnrewrite.frontend.fx.program import Lifted
from attnrewrite.frontend.fx.read import read
from attnrewrite.frontend.onnx import Source, to_model
from attnrewrite.graph import Graph

Function = Callable[..., Any]


class Called(nn.Module):
    """A function as a module."""

    def __init__(self, function: Function) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Any) -> Any:
        return self.function(*inputs)


def as_module(function: Function | nn.Module) -> nn.Module:
    return function if isinstance(function, nn.Module) else Called(function)


def exported(function: Function | nn.Module, inputs: Sequence[Any], **options: Any) -> Graph:
    """Read from a torch.export program: ATen operators."""
    return read(torch.export.export(as_module(function), tuple(inputs), **options))


def decomposed(function: Function | nn.Module, inputs: Sequence[Any]) -> Graph:
    """Read from a program in core ATen operators, without writes."""
    return read(torch.export.export(as_module(function), tuple(inputs)).run_decompositions())


def traced(function: Function | nn.Module, inputs: Sequence[Any]) -> Graph:
    """Read from torch.fx.symbolic_trace: call_module and call_method nodes."""
    return read(torch.fx.symbolic_trace(function), tuple(inputs))


def compiled(function: Function | nn.Module, inputs: Sequence[Any], **options: Any) -> Graph:
    """Read from what torch.compile hands to a backend: torch functions, the module's tensors among the inputs."""
    module, graphs = as_module(function), []  # type: ignore[var-annotated]
    own = {id(t): isinstance(t, nn.Parameter) for t in [*module.parameters(), *module.buffers()]}

    def backend(graph: torch.fx.GraphModule, examples: list[torch.Tensor]) -> Any:
        placeholders = [n for n in graph.graph.nodes if n.op == "placeholder"]
        lifted = [Lifted(n.name, x, own[id(x)]) for n, x in zip(placeholders, examples, strict=True) if id(x) in own]
        graphs.append(read(graph, examples, lifted=lifted))
        return graph.forward

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(module, backend=backend, fullgraph=True, **options)(*inputs)
    (graph,) = graphs
    return graph


DIALECTS = {"exported": exported, "traced": traced, "compiled": compiled}


def opaque(graph: Graph) -> list[str]:
    """The operators that the table has no entry for."""
    return [node.op for node in graph.nodes if node.domain == "torch"]


def computed(graph: Graph, inputs: Sequence[torch.Tensor]) -> list[np.ndarray]:
    """What ONNX Runtime computes of the graph view; inputs that it does not read are left out."""
    program, graph.source = graph.source, Source([], 10, "", {}, "", Path())
    constants = {k: v.constant for k, v in enumerate(graph.outputs) if v.is_constant}
    passed = {k: graph.inputs.index(v) for k, v in enumerate(graph.outputs) if v in graph.inputs}
    rest = [v for k, v in enumerate(graph.outputs) if k not in constants and k not in passed]
    outputs, graph.outputs = graph.outputs, rest
    found: list[np.ndarray] = []
    if rest:
        model = to_model(graph)
        onnx.checker.check_model(model)
        session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        named = {v.name: x.numpy() for v, x in zip(graph.inputs, inputs, strict=True)}
        found = session.run(None, {i.name: named[i.name] for i in session.get_inputs()})
    graph.outputs, graph.source = outputs, program
    waiting = iter(found)
    return [
        constants[k] if k in constants else inputs[passed[k]].numpy() if k in passed else next(waiting)
        for k in range(len(outputs))
    ]


def assert_computes(graph: Graph, function: Function, inputs: Sequence[torch.Tensor], bound: float = 2e-6) -> None:
    """The graph view computes what the function does, to `bound` of the largest number; whole numbers exactly."""
    with torch.no_grad():
        expected = function(*(x.clone() for x in inputs))
    results = [expected] if isinstance(expected, torch.Tensor) else list(expected)
    found = computed(graph, inputs)
    assert len(found) == len(results)
    for array, tensor in zip(found, results, strict=True):
        wanted = tensor.numpy()
        assert (array.shape, array.dtype) == (wanted.shape, wanted.dtype)
        if wanted.dtype.kind in "iub":
            np.testing.assert_array_equal(array, wanted)
        elif wanted.size:
            finite = np.isfinite(wanted)
            np.testing.assert_array_equal(array[~finite], wanted[~finite])
            scale = np.abs(wanted[finite]).max(initial=1e-30)
            assert np.abs(array[finite].astype(float) - wanted[finite]).max(initial=0) <= bound * scale
