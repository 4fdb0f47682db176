"""Constants added to all parts of a Concat are one constant added behind it; anything else stays."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import pytest

from attnrewrite.frontend.joins import add_behind_concat
from attnrewrite.frontend.onnx import read, to_model
from tests.models.onnx_builder import Builder
from tests.running import run

SHAPE = ("batch", 4, 5, 6)


def parts(g: Builder) -> list[str]:
    return g.split(g.input("x", SHAPE), [1, 3], 1)


def random(*shape: int) -> np.ndarray:
    return np.random.default_rng(len(shape)).normal(size=shape)


@pytest.mark.parametrize(
    "shapes",
    [((1, 5, 1), (3, 1, 6)), ((), (6,)), ((1, 1, 1, 6), (3, 5, 6)), ((1, 1), (3, 1, 1))],
)
@pytest.mark.parametrize("constant_first", [False, True])
def test_added_constants_become_one(shapes: tuple[tuple[int, ...], ...], constant_first: bool) -> None:
    g = Builder()
    added = []
    for part, shape in zip(parts(g), shapes, strict=True):
        operands = [part, g.constant(random(*shape))]
        added.append(g.op("Add", *(reversed(operands) if constant_first else operands)))
    model = g.model({"y": g.concat(added, 1)})
    graph = read(model)
    add_behind_concat(graph)
    assert [n.op for n in graph.nodes if n.op != "Identity"] == ["Split", "Concat", "Add"]
    x = random(2, 4, 5, 6).astype(np.float32)
    assert np.array_equal(run(to_model(graph), {"x": x})["y"], run(model, {"x": x})["y"])


def one_part_alone(g: Builder) -> dict[str, str]:
    first, second = parts(g)
    return {"y": g.concat([g.add(first, 1.0), second], 1)}


def computed(g: Builder) -> dict[str, str]:
    first, second = parts(g)
    total = g.op("ReduceSum", second, g.constant([1]), keepdims=1)
    return {"y": g.concat([g.add(first, 1.0), g.op("Add", second, total)], 1)}


def read_elsewhere(g: Builder) -> dict[str, str]:
    first, second = (g.add(part, 1.0) for part in parts(g))
    return {"y": g.concat([first, second], 1), "z": g.op("Relu", first)}


def broadcast_by_the_constant(g: Builder) -> dict[str, str]:
    row = g.input("x", ("batch", 1, 6))
    return {"y": g.concat([g.add(row, random(1, 5, 1)), g.add(row, random(1, 5, 1))], 1)}


@pytest.mark.parametrize("write", [one_part_alone, computed, read_elsewhere, broadcast_by_the_constant])
def test_anything_else_stays(write: Callable[[Builder], dict[str, str]]) -> None:
    g = Builder()
    model: onnx.ModelProto = g.model(write(g))
    graph = read(model)
    before = str(graph)
    add_behind_concat(graph)
    assert str(graph) == before
