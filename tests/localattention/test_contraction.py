"""Sums of products, however they are written, as two maps: summing what the maps read gives ONNX Runtime's result."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from onnx import TensorProto

from attnrewrite.frontend.onnx import read
from attnrewrite.graph import Graph, Node
from attnrewrite.indexing.map import IndexingError, identity
from attnrewrite.localattention.contraction import is_contraction, operands
from tests.models.onnx_builder import Builder
from tests.running import run

Write = Callable[[Builder], str]


def two(a: list[int], b: list[int], write: Callable[[Builder, str, str], str]) -> Write:
    return lambda g: write(g, g.input("a", list(a)), g.input("b", list(b)))


def matmul(a: list[int], b: list[int]) -> Write:
    return two(a, b, lambda g, x, y: g.op("MatMul", x, y))


def einsum(equation: str, a: list[int], b: list[int]) -> Write:
    return two(a, b, lambda g, x, y: g.op("Einsum", x, y, equation=equation))


def mul_sum(a: list[int], b: list[int], axes: list[int], keepdims: bool) -> Write:
    return two(a, b, lambda g, x, y: g.op("ReduceSum", g.op("Mul", x, y), g.constant(axes), keepdims=int(keepdims)))


def with_casts(g: Builder, x: str, y: str) -> str:
    product = g.op("Cast", g.op("Mul", x, y), to=TensorProto.DOUBLE)
    return g.op("Cast", g.op("ReduceSum", product, g.constant([2]), keepdims=0), to=TensorProto.FLOAT)


CONTRACTIONS: dict[str, Write] = {
    "matmul": matmul([3, 5], [5, 7]),
    "matmul-batched": matmul([2, 3, 5], [2, 5, 7]),
    "matmul-broadcast": matmul([2, 1, 3, 5], [7, 5, 4]),
    "einsum": einsum("bhid,bhjd->bhij", [2, 3, 5, 7], [2, 3, 4, 7]),
    "einsum-swapped-and-spaced": einsum("b h j d, b h i d -> b h i j", [2, 3, 4, 7], [2, 3, 5, 7]),
    "einsum-transposed-output": einsum("bid,bjd->jib", [2, 3, 5], [2, 7, 5]),
    "einsum-two-summed-axes": einsum("bicd,bjcd->bij", [2, 3, 5, 4], [2, 7, 5, 4]),
    "einsum-broadcast-extent": einsum("bid,bjd->bij", [1, 3, 5], [2, 7, 5]),
    "einsum-implicit": einsum("bd,ad", [3, 5], [7, 5]),
    "einsum-implicit-order": einsum("zd,ad", [3, 5], [7, 5]),
    "einsum-ellipsis": einsum("...id,...jd->...ij", [2, 3, 4, 5], [2, 3, 7, 5]),
    "einsum-ellipsis-implicit": einsum("...id,...jd", [2, 4, 5], [2, 7, 5]),
    "einsum-third-factor": two(
        [2, 3, 4, 5],
        [2, 3, 7, 5],
        lambda g, x, y: g.op("Einsum", x, y, g.constant(np.ones(3)), equation="bhid,bhjd,h->bhij"),
    ),
    "einsum-ellipsis-behind": einsum("id...,jd...->ij...", [4, 5, 2], [7, 5, 2]),
    "mul-sum": mul_sum([2, 3, 1, 5], [2, 1, 7, 5], [3], False),
    "mul-sum-kept": mul_sum([2, 3, 5], [2, 3, 5], [1], True),
    "mul-sum-negative-axis": mul_sum([2, 3, 5], [3, 5], [-1], False),
    "mul-sum-two-axes": mul_sum([2, 3, 5, 4], [2, 1, 5, 4], [1, 3], False),
    "mul-sum-in-double": two([2, 3, 5], [2, 3, 5], with_casts),
}


def contraction_of(graph: Graph) -> Node:
    return next(n for n in graph.nodes if is_contraction(n))


@pytest.mark.parametrize("name", CONTRACTIONS)
def test_maps_read_what_is_summed(name: str) -> None:
    g = Builder()
    model = g.model({"y": CONTRACTIONS[name](g)})
    rng = np.random.default_rng(0)
    arrays = {
        i.name: rng.integers(-9, 9, [d.dim_value for d in i.type.tensor_type.shape.dim]).astype(np.float32)
        for i in model.graph.input
    }
    node = contraction_of(read(model))
    shape = node.output.shape
    assert shape is not None
    axis = len(shape)
    pair = operands(node, identity(shape, axis + 1), axis)
    factors = [arrays[o.value.name][tuple(c.values for c in o.index)] for o in pair]
    found = (factors[0] * factors[1]).sum(axis=axis)
    np.testing.assert_array_equal(np.broadcast_to(found, shape), run(model, arrays)["y"])


def unsummed(equation: str, a: list[int], b: list[int], sentence: str) -> tuple[Write, str]:
    return einsum(equation, a, b), sentence


INEXPRESSIBLE: dict[str, tuple[Write, str]] = {
    "diagonal": unsummed("bii,bij->bij", [2, 3, 3], [2, 3, 5], "takes a diagonal"),
    "one-operand-summed-alone": unsummed("bide,bjd->bij", [2, 3, 5, 4], [2, 7, 5], "sums one operand alone"),
    "vector": (matmul([2, 3, 5], [5]), "multiplies a vector"),
    "symbolic-sum": (
        two([2, 3, 5], [2, 5, 7], lambda g, x, y: g.op("MatMul", g.op("Identity", x), y)),
        "sums over the symbolic extent K",
    ),
}


@pytest.mark.parametrize("name", INEXPRESSIBLE)
def test_what_has_no_maps_says_why(name: str) -> None:
    write, sentence = INEXPRESSIBLE[name]
    g = Builder()
    y = write(g)
    if name == "symbolic-sum":
        g.inputs.clear()
        g.input("a", [2, 3, "K"])
        g.input("b", [2, "K", 7])
    node = contraction_of(read(g.model({"y": y})))
    shape = node.output.shape
    assert shape is not None
    with pytest.raises(IndexingError, match=f"{sentence}$"):
        operands(node, identity(shape, len(shape) + 1), len(shape))


NO_CONTRACTION: dict[str, Write] = {
    "constant-weight": lambda g: g.matmul(g.input("a", [3, 5]), np.ones((5, 7))),
    "sum-alone": lambda g: g.reduce_sum(g.input("a", [3, 5]), 1),
    "sum-of-a-scaled-tensor": lambda g: g.reduce_sum(g.mul(g.input("a", [3, 5]), np.ones(5)), 1),
    "product-alone": two([3, 5], [3, 5], lambda g, x, y: g.op("Mul", x, y)),
    "rounded-product": two(
        [3, 5],
        [3, 5],
        lambda g, x, y: g.op(
            "Cast", g.reduce_sum(g.op("Cast", g.op("Mul", x, y), to=TensorProto.INT32), 1), to=TensorProto.FLOAT
        ),
    ),
}


@pytest.mark.parametrize("name", NO_CONTRACTION)
def test_no_contraction(name: str) -> None:
    g = Builder()
    assert not [n for n in read(g.model({"y": NO_CONTRACTION[name](g)})).nodes if is_contraction(n)]
