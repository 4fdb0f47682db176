"""Linear layers on flattened axes are put on the axes themselves where the symbolic batch is among the inner ones."""

from __future__ import annotations

import numpy as np
import pytest

from attnrewrite.frontend.onnx import read, to_model
from tests.models.onnx_builder import Builder
from tests.running import error, run


def flattened(g: Builder, x: str, layers: str, back: tuple[int, ...] = (5, -1, 7)) -> str:
    """x `[5, batch, 2, 3]` as `[5*batch, 6]` through the layers named, then split again."""
    rng = np.random.default_rng(0)
    value = g.reshape(x, -1, 6)
    for layer in layers.split("-"):
        if layer == "gemm":
            weight, bias = g.constant(rng.normal(size=(7, 6))), g.constant(rng.normal(size=7))
            value = g.op("Gemm", value, weight, bias, transB=1, alpha=0.5, beta=2.0)
        elif layer == "matmul":
            value = g.matmul(value, rng.normal(size=(6, 7)))
        elif layer == "add":
            value = g.op("Add", g.constant(rng.normal(size=7)), value)
        elif layer == "softmax":
            value = g.op("Softmax", value, axis=0)
    return g.reshape(value, *back)


@pytest.mark.parametrize("layers", ["gemm", "matmul", "matmul-add"])
def test_layers_are_put_on_the_axes(layers: str) -> None:
    g = Builder()
    model = g.model({"y": flattened(g, g.input("x", [5, "batch", 2, 3]), layers)})
    graph = read(model)
    assert not any(o.shape is not None and len(o.shape) == 2 for n in graph.nodes for o in n.outputs)
    inputs = {"x": np.random.default_rng(1).normal(size=(5, 4, 2, 3)).astype(np.float32)}
    assert error(run(to_model(graph), inputs)["y"], run(model, inputs)["y"].astype(np.float64)) < 1e-6


@pytest.mark.parametrize(
    ("layers", "shape", "back"),
    [
        ("gemm", [5, 4, 2, 3], (5, 4, 7)),  # nothing symbolic
        ("gemm", ["batch", 5, 2, 3], (-1, 5, 7)),  # the outermost axis
        ("gemm-softmax", [5, "batch", 2, 3], (5, -1, 7)),  # sees all rows
        ("gemm", [5, "batch", 2, 3], (7, 5, -1)),  # another split
    ],
)
def test_other_layers_stay(layers: str, shape: list[int | str], back: tuple[int, ...]) -> None:
    g = Builder()
    graph = read(g.model({"y": flattened(g, g.input("x", shape), layers, back)}))
    assert any(n.op == "Gemm" for n in graph.nodes)


def test_a_second_use_keeps_the_flattened_layer() -> None:
    g = Builder()
    rows = g.matmul(g.reshape(g.input("x", [5, "batch", 2, 3]), -1, 6), np.ones((6, 7)))
    graph = read(g.model({"y": g.reshape(rows, 5, -1, 7), "z": g.op("Softmax", rows, axis=0)}))
    assert sum(n.op == "MatMul" for n in graph.nodes) == 1
    assert any(o.shape is not None and len(o.shape) == 2 for n in graph.nodes for o in n.outputs)
