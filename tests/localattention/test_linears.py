"""An Einsum with a constant weight is read as a Linear layer where it is one."""

from __future__ import annotations

import numpy as np
import pytest

from attnrewrite.frontend.onnx import read, to_model
from attnrewrite.localattention.linears import einsum_to_matmul
from tests.models.onnx_builder import Builder
from tests.running import error, run

EXTENTS = {"b": 2, "n": 5, "h": 3, "d": 4, "c": 6, "o": 7, "u": 1}


def model_of(equation: str, *, weight_first: bool = False) -> tuple[Builder, str]:
    left = equation.replace(" ", "").split("->")[0].split(",")
    g = Builder()
    shapes = [[EXTENTS[x] for x in term] for term in left]
    at = 0 if weight_first else 1
    weight = g.constant(np.random.default_rng(0).normal(size=shapes[at]))
    data = g.input("x", shapes[1 - at])
    return g, g.op("Einsum", *((weight, data) if weight_first else (data, weight)), equation=equation)


@pytest.mark.parametrize(
    ("equation", "ops"),
    [
        ("bnc,co->bno", ["MatMul"]),
        ("bnc,oc->bno", ["MatMul"]),
        ("bnc,chd->bnhd", ["MatMul", "Reshape"]),
        ("bnhd,hdo->bno", ["Reshape", "MatMul"]),
        ("bnhd,dho->bno", ["Reshape", "MatMul"]),
        ("bnhc,cdo->bnhdo", ["MatMul", "Reshape"]),
    ],
)
@pytest.mark.parametrize("weight_first", [False, True])
def test_linear_layer_becomes_one_product(equation: str, ops: list[str], weight_first: bool) -> None:
    if weight_first:
        left, output = equation.split("->")
        equation = ",".join(left.split(",")[::-1]) + "->" + output
    g, y = model_of(equation, weight_first=weight_first)
    model = g.model({"y": y})
    graph = read(model)
    einsum_to_matmul(graph)
    assert [n.op for n in graph.nodes] == [*ops, "Identity"]
    shape = [d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim]
    inputs = {"x": np.random.default_rng(1).normal(size=shape).astype(np.float32)}
    assert error(run(to_model(graph), inputs)["y"], run(model, inputs)["y"].astype(np.float64)) < 1e-6


@pytest.mark.parametrize(
    "equation",
    [
        "bnhd,hdo->bnho",  # a product per head
        "bnc,nc->bn",  # nothing new
        "bnc,co->bon",  # moved
        "bcn,co->bno",  # not the last axis
        "bn,co->bnco",  # nothing summed
        "bnc,co->no",  # the batch summed alone
        "bnu,co->bno",  # the weight summed alone
    ],
)
def test_any_other_sum_stays(equation: str) -> None:
    g, y = model_of(equation)
    graph = read(g.model({"y": y}))
    before = str(graph)
    einsum_to_matmul(graph)
    assert str(graph) == before
