"""Constants, shapes and shape arithmetic: folded where they are known, left alone where not, never another function."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from attnrewrite.frontend.onnx import read, to_model
from attnrewrite.graph import Graph
from tests.models.onnx_builder import Builder
from tests.running import run

Build = Callable[[Builder], str]
Extents = list[int | str]


def extents(graph: Graph) -> list[str]:
    shape = graph.outputs[0].shape
    assert shape is not None
    return [str(e) for e in shape]


def ops(graph: Graph) -> list[str]:
    return [node.op for node in graph.nodes]


def shape_of(g: Builder, x: str, axis: int) -> str:
    """x.shape[axis] as TorchScript writes it: Shape, Gather, Unsqueeze."""
    return g.unsqueeze(g.op("Gather", g.op("Shape", x), g.constant(axis), axis=0), 0)


def input_(g: Builder, *shape: int | str) -> str:
    return g.input("x", list(shape))


def torchscript_view(g: Builder) -> str:
    x = input_(g, "B", 6, 10, 4)
    batch = shape_of(g, x, 0)
    rows = g.op("Div", shape_of(g, x, 1), g.constant([2]))
    columns = g.op(
        "Cast",
        g.op("Floor", g.op("Div", g.op("Cast", shape_of(g, x, 2), to=TensorProto.FLOAT), g.constant([5.0]))),
        to=TensorProto.INT64,
    )
    target = g.concat([batch, rows, g.constant([2]), columns, g.constant([5]), shape_of(g, x, 3)], 0)
    return g.op("Reshape", x, target)


def windows_into_batch(g: Builder) -> str:
    x = input_(g, "B", 6, 10, 4)
    count = g.op("Mul", shape_of(g, x, 0), g.constant([6]))
    return g.op("Reshape", x, g.concat([count, g.constant([10]), g.constant([-1])], 0))


def windows_back_out(g: Builder) -> str:
    x = input_(g, "B", 6, 10)
    rows = g.reshape(x, -1, 10)
    batch = g.op("Div", shape_of(g, rows, 0), g.constant([6]))
    return g.op("Reshape", rows, g.concat([batch, g.constant([6, 10])], 0))


def expand_by_where(g: Builder) -> str:
    """torch's expand: ones where the target says -1."""
    x = input_(g, "B", 1, 4)
    target = g.concat([shape_of(g, x, 0), g.constant([3, -1])], 0)
    minus = g.op("Equal", target, g.constant([-1, -1, -1]))
    return g.op("Expand", x, g.op("Where", minus, g.op("ConstantOfShape", g.constant([3]), value=_ones()), target))


def _ones() -> onnx.TensorProto:
    return helper.make_tensor("ones", TensorProto.INT64, [1], [1])


def size_and_division(g: Builder) -> str:
    x = input_(g, "B", 6, 10)
    rows = g.op("Div", g.op("Size", x), g.constant(20))
    return g.op("Reshape", x, g.concat([g.unsqueeze(rows, 0), g.constant([20])], 0))


def crop_to_its_own_size(g: Builder) -> str:
    x = input_(g, "B", 6, 10)
    return g.op("Slice", x, g.constant([0]), shape_of(g, x, 1), g.constant([1]))


def resized_to_its_own_size(g: Builder) -> str:
    """F.interpolate by a factor, then a crop as wide as the result."""
    x = g.op("Resize", input_(g, "B", 3, 5, 7), "", g.constant([1.0, 1.0, 2.0, 1.5]), mode="nearest")
    return g.op("Slice", x, g.constant([0]), shape_of(g, x, 3), g.constant([3]))


FOLDED: dict[str, tuple[Build, list[str], list[str]]] = {
    # build, the shape of y, the operators that remain
    "torchscript-view": (torchscript_view, ["B", "3", "2", "2", "5", "4"], ["Reshape", "Identity"]),
    "windows-into-batch": (windows_into_batch, ["6*B", "10", "4"], ["Reshape", "Identity"]),
    "windows-back-out": (windows_back_out, ["B", "6", "10"], ["Reshape", "Reshape", "Identity"]),
    "expand-by-where": (expand_by_where, ["B", "3", "4"], ["Expand", "Identity"]),
    "size-and-division": (size_and_division, ["3*B", "20"], ["Reshape", "Identity"]),
    "crop-to-its-own-size": (crop_to_its_own_size, ["B", "6", "10"], ["Identity"]),
    "resized-to-its-own-size": (resized_to_its_own_size, ["B", "3", "10", "10"], ["Resize", "Identity"]),
    "reshape-zero": (
        lambda g: g.reshape(input_(g, "B", 6, 10), 0, 0, 2, 5),
        ["B", "6", "2", "5"],
        ["Reshape", "Identity"],
    ),
    "reshape-cancels-two-symbols": (
        lambda g: g.reshape(input_(g, "B", "S", 6, 10), 0, 0, -1),
        ["B", "S", "60"],
        ["Reshape", "Identity"],
    ),
    "nothing-done": (
        lambda g: g.op(
            "Dropout",
            g.op(
                "Cast",
                g.reshape(g.pad(g.transpose(input_(g, "B", 6), 0, 1), [0, 0], [0, 0]), -1, 6),
                to=TensorProto.FLOAT,
            ),
        ),
        ["B", "6"],
        ["Identity"],
    ),
    "constants-computed": (
        lambda g: g.op("Add", input_(g, "B", 6), g.op("Exp", g.op("Cos", g.constant(np.arange(6.0))))),
        ["B", "6"],
        ["Add", "Identity"],
    ),
}


def built(build: Build, opset: int = 17) -> onnx.ModelProto:
    g = Builder(opset)
    return g.model({"y": build(g)})


def inputs_of(model: onnx.ModelProto, **sizes: int) -> dict[str, np.ndarray]:
    found = {}
    for value in model.graph.input:
        shape = [sizes[d.dim_param] if d.dim_param else d.dim_value for d in value.type.tensor_type.shape.dim]
        found[value.name] = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    return found


def assert_same_function(model: onnx.ModelProto, graph: Graph, **sizes: int) -> None:
    inputs = inputs_of(model, **sizes)
    for name, expected in run(model, inputs).items():
        np.testing.assert_array_equal(run(to_model(graph), inputs)[name], expected)


@pytest.mark.parametrize("case", FOLDED)
def test_shape_arithmetic_folds_away(case: str) -> None:
    build, shape, remaining = FOLDED[case]
    model = built(build)
    graph = read(model)
    assert extents(graph) == shape
    assert ops(graph) == remaining
    for batch in (1, 2, 5):
        assert_same_function(model, graph, B=batch, S=3)


def test_reshape_with_allowzero_makes_an_empty_tensor() -> None:
    g = Builder(17)
    target = g.constant([0, 3])
    model = g.model({"y": g.op("Reshape", g.input("x", [0, 6]), target, allowzero=1)})
    graph = read(model)
    assert extents(graph) == ["0", "3"]
    assert_same_function(model, graph)


def half_the_width(g: Builder) -> str:
    """Upsampling code computes sizes in floats; half of a symbolic width is no affine expression."""
    x = input_(g, 2, "W")
    half = g.op("Floor", g.op("Mul", g.op("Cast", shape_of(g, x, 1), to=TensorProto.FLOAT), g.constant([0.5])))
    return g.op("Slice", x, g.constant([0]), g.op("Cast", half, to=TensorProto.INT64), g.constant([1]))


def odd_width(g: Builder) -> str:
    """(2 W + 1) / 2 * 2 in floats is 2 W + 1; in integers it would be 2 W."""
    x = g.concat([input_(g, 2, "W"), "x", g.constant(np.zeros((2, 1)))], 1)
    halved = g.op("Div", g.op("Cast", shape_of(g, x, 1), to=TensorProto.FLOAT), g.constant([2.0]))
    width = g.op("Cast", g.op("Mul", halved, g.constant([2.0])), to=TensorProto.INT64)
    return g.op("Slice", x, g.constant([0]), width, g.constant([1]))


def pad_to_a_multiple(g: Builder) -> str:
    x = input_(g, 2, "W")
    rest = g.op("Mod", g.op("Sub", g.constant([4]), g.op("Mod", shape_of(g, x, 1), g.constant([4]))), g.constant([4]))
    return g.op("Pad", x, g.concat([g.constant([0, 0, 0]), rest], 0))


def different_for_one(g: Builder) -> str:
    """Where(width == 1, 0, 1) slices: a symbol may well be 1."""
    x = input_(g, 2, "W")
    start = g.op("Where", g.op("Equal", shape_of(g, x, 1), g.constant([1])), g.constant([0]), g.constant([1]))
    return g.op("Slice", x, start, g.constant([2**31]), g.constant([1]))


@pytest.mark.parametrize("build", [half_the_width, odd_width, pad_to_a_multiple, different_for_one])
@pytest.mark.parametrize("width", [1, 2, 5, 8])
def test_arithmetic_that_is_not_affine_stays_in_the_graph(build: Build, width: int) -> None:
    model = built(build)
    assert_same_function(model, read(model), W=width)


def test_specialised_shapes_fold_what_symbols_cannot() -> None:
    model = built(pad_to_a_multiple)
    graph = read(model, {"x": (2, 6)})
    assert extents(graph) == ["2", "8"]
    assert ops(graph) == ["Pad", "Identity"]
    assert_same_function(model, graph, W=6)


def test_specialising_may_keep_or_rename_a_symbol() -> None:
    model = built(lambda g: g.op("Relu", input_(g, "B", "W")))
    assert extents(read(model, {"x": ("N", 6)})) == ["N", "6"]
    assert extents(read(model, {"x": ("B", "W")})) == ["B", "W"]


def test_random_numbers_are_not_folded() -> None:
    graph = read(built(lambda g: g.op("Add", input_(g, 3), g.op("RandomUniformLike", g.constant(np.zeros(3))))))
    assert ops(graph) == ["RandomUniformLike", "Add", "Identity"]


def test_a_quantised_weight_stays_quantised() -> None:
    def build(g: Builder) -> str:
        scale, zero = g.constant(0.1), helper.make_tensor("zero", TensorProto.INT8, [], [0])
        weight = helper.make_tensor("weight", TensorProto.INT8, [6, 4], range(24))
        g.initializers += [zero, weight]
        return g.op("MatMul", input_(g, "B", 6), g.op("DequantizeLinear", "weight", scale, "zero"))

    assert ops(read(built(build))) == ["DequantizeLinear", "MatMul", "Identity"]


def test_a_constant_cast_to_a_tensors_type_is_one() -> None:
    """dynamo's decomposed convolutions have a bias Expand(CastLike(0, x))."""
    g = Builder()
    x = g.input("x", [2, 3])
    bias = g.op("Expand", g.op("CastLike", g.constant(np.array(2.6, np.float64)), x), g.constant([3]))
    whole = g.op("CastLike", g.op("CastLike", x, g.constant(np.zeros(1, np.int32))), x)
    graph = read(g.model({"y": g.op("Add", g.op("CastLike", g.op("Add", x, whole), bias), bias)}))
    assert ops(graph) == ["CastLike", "CastLike", "Add", "Add", "Identity"]
    bias_value = graph.nodes[-2].constant(1)
    assert bias_value is not None
    np.testing.assert_array_equal(bias_value, np.full(3, 2.6, np.float32))


def test_a_mask_that_would_fill_the_file_is_not_folded() -> None:
    """Expanding one number to 64 MB is left to whoever runs the model."""
    graph = read(
        built(
            lambda g: g.op("Add", input_(g, 4096, 4096), g.op("Expand", g.constant([[1.0]]), g.constant([4096, 4096])))
        )
    )
    assert ops(graph) == ["Expand", "Add", "Identity"]


@pytest.mark.parametrize("axes", [[], [1]])
def test_reduce_prod_of_no_axes_may_mean_none(axes: list[int]) -> None:
    def build(g: Builder) -> str:
        numbers = g.constant([[1, 2, 3], [4, 5, 6]])
        reduced = g.op("ReduceProd", numbers, g.constant(np.array(axes, np.int64)), noop_with_empty_axes=1)
        return g.op("Add", input_(g, 2, 3), g.op("Cast", reduced, to=TensorProto.FLOAT))

    model = built(build, opset=18)
    assert_same_function(model, read(model))


def test_unused_results_go() -> None:
    def build(g: Builder) -> str:
        x = input_(g, "B", 6)
        g.op("Exp", x)
        return g.op("Relu", g.split(x, [2, 4], 1)[1])

    assert ops(read(built(build))) == ["Split", "Relu", "Identity"]
