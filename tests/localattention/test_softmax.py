"""A softmax written out is read as one; what only looks like one stays as it is."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from attnrewrite.frontend.onnx import read, to_model
from attnrewrite.localattention.softmax import join_softmax
from tests.models.onnx_builder import Builder
from tests.running import error, run

SHAPE = (2, 3, 5, 7)


def of_rows(g: Builder, x: str) -> str:
    """Over an axis that is not the last, in keys of its own."""
    weights = g.op("Exp", x)
    return g.op("Div", weights, g.unsqueeze(g.reduce_sum(weights, 1), 1))


def by_reshaped_sum(g: Builder, x: str) -> str:
    weights = g.op("Exp", g.op("Sub", x, g.reduce("ReduceMax", x, 3)))
    return g.op("Div", weights, g.reshape(g.reduce_sum(weights, 3), 2, 3, 5, 1))


def less_maximum_without_its_axis(g: Builder, x: str) -> str:
    return g.op("Softmax", g.op("Sub", x, g.unsqueeze(g.reduce("ReduceMax", x, 3, keepdims=False), 3)), axis=3)


def through_movement(g: Builder, x: str) -> str:
    """The exponentials and their sums transposed and back."""
    weights = g.op("Exp", x)
    total = g.reshape(g.reduce_sum(g.transpose(weights, 0, 3, 1, 2), 1), 6, 5)
    total = g.op("Tile", g.reshape(total, 2, 3, 5, 1), g.constant([1, 1, 1, 7]))
    return g.op("Div", g.reshape(g.transpose(g.transpose(weights, 3, 2, 1, 0), 3, 2, 1, 0), *SHAPE), total)


def by_reciprocal_of_moved_sum(g: Builder, x: str) -> str:
    weights = g.op("Exp", x)
    inverse = g.op("Reciprocal", g.transpose(g.reduce_sum(weights, 2), 2, 0, 1))
    return g.op("Mul", g.unsqueeze(g.transpose(inverse, 1, 2, 0), 2), weights)


WRITTEN_OUT: dict[str, tuple[Callable[[Builder, str], str], int]] = {
    "of-rows": (of_rows, 1),
    "by-reshaped-sum": (by_reshaped_sum, 3),
    "through-movement": (through_movement, 3),
    "by-reciprocal-of-moved-sum": (by_reciprocal_of_moved_sum, 2),
    "less-maximum-without-its-axis": (less_maximum_without_its_axis, 3),
}


@pytest.mark.parametrize("opset", [12, 17, 20])
@pytest.mark.parametrize("name", WRITTEN_OUT)
def test_written_out_softmax_is_read_as_one_node(name: str, opset: int) -> None:
    build, axis = WRITTEN_OUT[name]
    g = Builder(opset)
    model = g.model({"y": build(g, g.input("x", SHAPE))})
    graph = read(model)
    join_softmax(graph)
    assert [n.op for n in graph.nodes] == ["Softmax", "Identity"]
    assert graph.nodes[0].attributes["axis"] % 4 == axis
    inputs = {"x": np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)}
    assert error(run(to_model(graph), inputs)["y"], run(model, inputs)["y"].astype(np.float64)) < 1e-6


def with_epsilon(g: Builder, x: str) -> str:
    weights = g.op("Exp", x)
    return g.op("Div", weights, g.add(g.reduce_sum(weights, 3, keepdims=True), 1e-6))


def over_two_axes(g: Builder, x: str) -> str:
    weights = g.op("Exp", x)
    return g.op("Div", weights, g.op("ReduceSum", weights, g.constant([2, 3]), keepdims=1))


def of_another_tensor(g: Builder, x: str) -> str:
    return g.op("Div", g.op("Exp", x), g.reduce_sum(g.op("Exp", g.op("Neg", x)), 3, keepdims=True))


def by_the_mean(g: Builder, x: str) -> str:
    weights = g.op("Exp", x)
    return g.op("Div", weights, g.reduce("ReduceMean", weights, 3))


def inverted(g: Builder, x: str) -> str:
    weights = g.op("Exp", x)
    return g.op("Div", g.reduce_sum(weights, 3, keepdims=True), weights)


def powers_of_two(g: Builder, x: str) -> str:
    weights = g.op("Pow", g.constant(np.float64(2.0)), x)
    return g.op("Div", weights, g.reduce_sum(weights, 3, keepdims=True))


def sum_in_another_place(g: Builder, x: str) -> str:
    """On a square: the sums of the rows divide the columns."""
    square = g.slice(x, 0, 5, 3)
    weights = g.op("Exp", square)
    return g.op("Div", weights, g.unsqueeze(g.reduce_sum(weights, 3), 2))


def logarithm_of_another_axis(g: Builder, x: str) -> str:
    return g.op("Exp", g.op("Sub", x, g.reduce("ReduceLogSumExp", g.op("Neg", x), 3)))


NEAR_MISSES = [
    with_epsilon,
    over_two_axes,
    of_another_tensor,
    by_the_mean,
    inverted,
    powers_of_two,
    sum_in_another_place,
    logarithm_of_another_axis,
]


@pytest.mark.parametrize("build", NEAR_MISSES)
def test_what_is_no_softmax_is_left(build: Callable[[Builder, str], str]) -> None:
    g = Builder()
    graph = read(g.model({"y": build(g, g.input("x", SHAPE))}))
    before = str(graph)
    join_softmax(graph)
    assert str(graph) == before


def test_a_maximum_along_another_axis_is_not_forgotten() -> None:
    g = Builder()
    x = g.input("x", SHAPE)
    graph = read(g.model({"y": g.op("Softmax", g.op("Sub", x, g.reduce("ReduceMax", x, 2)), axis=3)}))
    join_softmax(graph)
    assert [n.op for n in graph.nodes] == ["ReduceMax", "Sub", "Softmax", "Identity"]
