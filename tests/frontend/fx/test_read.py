"""torch.fx graphs read as the graph view: the three dialects, symbols, parameters, and who stands for whom."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

pytest.importorskip("torch")

import torch

from attnrewrite import passes
from attnrewrite.dims import Dim
from attnrewrite.frontend.fx.program import Program
from attnrewrite.frontend.fx.read import read
from attnrewrite.graph import Graph
from attnrewrite.pipeline import Pipeline
from tests.frontend.fx.reading import DIALECTS, assert_computes, compiled, decomposed, exported, opaque
from tests.models.build import MODELS, build_model


def block(softmax_after: int = 1) -> torch.nn.Module:
    """A window attention block in miniature, in modules, methods and functions."""

    class Block(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = torch.nn.LayerNorm(6)
            self.qkv = torch.nn.Linear(6, 18)
            self.drop = torch.nn.Dropout(0.1)
            self.register_buffer("index", torch.arange(16).reshape(4, 4) % 7)
            self.table = torch.nn.Parameter(torch.randn(7, 2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            batch, tokens, _ = x.shape
            q, k, v = self.qkv(self.norm(x)).reshape(batch, tokens, 3, 2, 3).permute(2, 0, 3, 1, 4).unbind(0)
            bias = self.table[self.index.view(-1)].view(4, 4, 2).permute(2, 0, 1)
            weights = ((q * 3**-0.5) @ k.transpose(-2, -1) + bias).softmax(dim=-1)
            return x + (self.drop(weights) @ v).transpose(1, 2).reshape(batch, tokens, 6)

    torch.manual_seed(0)
    return Block().eval()


@pytest.mark.parametrize("dialect", DIALECTS)
def test_dialects_are_read_alike(dialect: str) -> None:
    module, x = block(), torch.randn(2, 4, 6)
    graph = DIALECTS[dialect](module, (x,))
    assert not opaque(graph)
    assert Counter(n.op for n in graph.nodes)["Softmax"] == 1
    assert_computes(graph, module, (x,))


def test_nodes_are_called_what_their_torch_node_is_called() -> None:
    graph = exported(block(), (torch.randn(2, 4, 6),))
    program = graph.source
    assert isinstance(program, Program)
    (softmax,) = [n for n in graph.nodes if n.op == "Softmax"]
    assert softmax.name == "softmax" and softmax.source.name == "softmax"
    assert program.values[softmax.source] is softmax.output
    (layer,) = [n for n in program.expansions if n.name == "linear"]
    assert [n.op for n in program.expansions[layer].nodes] == ["Transpose", "MatMul", "Add"]


def test_symbolic_batch() -> None:
    module = block()
    graph = exported(module, (torch.randn(2, 4, 6),), dynamic_shapes=({0: torch.export.Dim("batch", max=64)},))
    (batch,) = [e for e in graph.inputs[0].known_shape if isinstance(e, Dim)]
    assert graph.outputs[0].known_shape == (batch, 4, 6)
    assert graph.source.symbols[str(batch)][1] == 0
    for size in (1, 3):
        assert_computes(graph, module, (torch.randn(size, 4, 6),))


def test_symbolic_batch_of_dynamo() -> None:
    """The example inputs are real tensors; that their batch stands for any is said by the placeholders."""
    module, x = block(), torch.randn(3, 4, 6)
    torch._dynamo.mark_dynamic(x, 0)
    graph = compiled(module, (x,))
    (batch,) = [e for e in graph.inputs[0].known_shape if isinstance(e, Dim)]
    assert graph.outputs[0].known_shape == (batch, 4, 6)
    assert_computes(graph, module, (torch.randn(5, 4, 6),))


def test_parameters_are_constants_named_by_their_torch_node() -> None:
    module = block()
    graph = exported(module, (torch.randn(2, 4, 6),))
    program = graph.source
    named = {name: value for value, name in program.names.items()}
    assert set(named) == {"norm.weight", "norm.bias", "qkv.weight", "qkv.bias", "table", "index"}
    assert named["table"].source.op == "placeholder"
    np.testing.assert_array_equal(named["table"].constant, module.table.detach().numpy())
    (index,) = [n for n in program.values if n.name == "index"]
    assert program.values[index].is_constant and program.values[index].shape == (16, 2)


def test_other_tensors_in_place_of_parameters() -> None:
    program = torch.export.export(block(), (torch.randn(2, 4, 6),))
    graph = read(program, tensors={"table": np.full((7, 2), 3, np.float32)})
    (index,) = [n for n in graph.source.values if n.name == "index"]
    assert (graph.source.values[index].constant == 3).all()


def attend_and_project(q: torch.Tensor, k: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    attended = torch.nn.functional.scaled_dot_product_attention(q, k, k).transpose(1, 2)
    return attended.flatten(2) @ w


def test_decomposed_attention_is_read_as_exporters_write_it() -> None:
    """Without a second use of the logits, and the matrix that is repeated for bmm taken once."""
    inputs = (torch.randn(2, 3, 5, 4), torch.randn(2, 3, 6, 4), torch.randn(12, 7))
    graph = decomposed(attend_and_project, inputs)
    assert Counter(n.op for n in graph.nodes)["IsNaN"] == 1 and not any(n.op == "ReduceMax" for n in graph.nodes)
    (product,) = [n for n in graph.nodes if n.op == "MatMul" and n.required(1).shape == (12, 7)]
    assert product.output.shape == (2, 5, 7)
    assert_computes(graph, attend_and_project, inputs)


def sites(graph: Graph) -> Counter[tuple[str, str]]:
    return Counter((s.verdict, s.kind) for s in Pipeline(passes.ALL).run(graph).sites)


@pytest.mark.parametrize("dialect", ["exported", "compiled"])  # the model's control flow stops symbolic_trace
def test_windows_are_found_in_every_dialect(dialect: str) -> None:
    module, x = build_model("small_swin"), torch.randn(MODELS["small_swin"].input_shape)
    assert sites(DIALECTS[dialect](module, (x,))) == {("rewrite", "window"): 4}
