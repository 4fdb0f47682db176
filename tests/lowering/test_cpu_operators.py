"""Operators and small graphs on this CPU against ONNX Runtime: every schedule, and the shapes that do not divide."""

from __future__ import annotations

import numpy as np
import pytest

from tests.lowering.compiling import compiled, model, node, normal, reference, relative_error

# Sums of at most a few thousand float32 products: rounding grows like the root of their number, times 6e-8.
FP32 = 1e-5
# float16 has 11 bits: half a unit in the last place is 4.9e-4 of a value, and a result is rounded a few times.
FP16 = 4e-3


def check(proto, *arrays, tolerance=FP32):
    assert relative_error(compiled(proto)(*arrays), reference(proto, *arrays)) <= tolerance


# rows, depth, columns: divisible by every tile; by none; a single row; fewer columns than lanes; primes; so large that
# rows go in blocks, and the depth in stretches, with columns that end within a tile, and within a vector.
GEMMS = [
    *[(196, 96, 384), (49, 33, 50), (1, 64, 1000), (7, 16, 5), (101, 31, 67), (3136, 8, 24), (5, 1, 48)],
    *[(401, 1536, 160), (389, 1536, 150), (523, 768, 192), (300, 1021, 144)],
]


@pytest.mark.parametrize(("rows", "depth", "columns"), GEMMS)
def test_linear_layer_with_packed_weights(rows, depth, columns):
    nodes = [node("MatMul", "x w", "m"), node("Add", "m b", "y")]
    check(
        model(nodes, {"x": [1, rows, depth]}, {"w": normal(depth, columns), "b": normal(columns)}),
        normal(1, rows, depth),
    )


@pytest.mark.parametrize(("rows", "depth", "columns"), [(49, 33, 50), (8, 16, 64)])
def test_linear_layer_in_half_precision_sums_in_single(rows, depth, columns):
    nodes = [node("MatMul", "x w", "m"), node("Relu", "m", "y")]
    weights = {"w": normal(depth, columns, dtype=np.float16)}
    proto = model(nodes, {"x": [rows, depth]}, weights, dtype=np.float16)
    x = normal(rows, depth, dtype=np.float16)
    exact = np.maximum(x.astype(np.float64) @ weights["w"].astype(np.float64), 0)
    assert relative_error(compiled(proto)(x), exact) <= 2**-11  # one rounding, at the end


@pytest.mark.parametrize("activation", ["Relu", "Sigmoid", "Tanh", "Erf", "HardSigmoid", "Exp"])
def test_activation_in_the_epilogue(activation):
    nodes = [node("MatMul", "x w", "m"), node(activation, "m", "a"), node("Add", "a r", "y")]
    weights = {"w": normal(24, 37) / 5}
    check(model(nodes, {"x": [1, 50, 24], "r": [1, 50, 37]}, weights), normal(1, 50, 24), normal(1, 50, 37))


@pytest.mark.parametrize("exponent", [0.5, 2.0, 3.0, 4.0, -1.0])
def test_power(exponent):
    weights = {"e": np.array(exponent, np.float32)}
    check(model([node("Pow", "x e", "y")], {"x": [7, 37]}, weights), np.abs(normal(7, 37)) + 0.5)


@pytest.mark.parametrize(
    "attributes",
    [{}, {"transB": 1}, {"transA": 1}, {"alpha": 0.5, "beta": 2.0}, {"alpha": 2.0, "transA": 1, "transB": 1}],
)
@pytest.mark.parametrize("constant", [True, False])
def test_gemm(attributes, constant):
    a = normal(*((17, 9) if attributes.get("transA") else (9, 17)))
    b = normal(*((21, 17) if attributes.get("transB") else (17, 21)))
    c = normal(21)
    nodes = [node("Gemm", "a b c", "y", **attributes)]
    if constant:
        check(model(nodes, {"a": a.shape}, {"b": b, "c": c}), a)
    else:
        check(model(nodes, {"a": a.shape, "b": b.shape, "c": c.shape}), a, b, c)


@pytest.mark.parametrize(("rows", "depth", "columns"), [(49, 32, 49), (49, 49, 32), (16, 6, 197), (3, 5, 2)])
def test_product_of_two_activations(rows, depth, columns):
    shapes = {"a": [2, 3, rows, depth], "b": [2, 3, depth, columns]}
    check(model([node("MatMul", "a b", "y")], shapes), normal(2, 3, rows, depth), normal(2, 3, depth, columns))


# channels in, out, kernel, stride, pad, dilation, groups, height, width
CONVOLUTIONS = {
    "patch embedding": (3, 24, 4, 4, 0, 1, 1, 28, 36),
    "3x3": (10, 20, 3, 1, 1, 1, 1, 15, 13),
    "3x3 stride 2": (10, 20, 3, 2, 1, 1, 1, 15, 13),
    "3x3 dilated": (4, 8, 3, 1, 2, 2, 1, 14, 14),
    "1x1": (17, 33, 1, 1, 0, 1, 1, 14, 10),
    "1x1 stride 2": (17, 33, 1, 2, 0, 1, 1, 14, 10),
    "1x1 of one pixel": (17, 33, 1, 1, 0, 1, 1, 1, 1),
    "many channels, few pixels": (64, 96, 3, 1, 1, 1, 1, 7, 7),
    "depthwise": (24, 24, 3, 1, 1, 1, 24, 20, 33),
    "depthwise 7x7": (8, 8, 7, 1, 3, 1, 8, 9, 56),
    "depthwise stride 2": (8, 8, 5, 2, 2, 1, 8, 15, 17),
    "depthwise with two outputs": (6, 12, 3, 1, 1, 1, 6, 9, 11),
    "grouped": (12, 18, 3, 1, 1, 1, 3, 11, 9),
}


@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_convolution(kind):
    c, o, k, s, p, d, g, h, w = CONVOLUTIONS[kind]
    attributes = {"kernel_shape": [k, k], "strides": [s, s], "pads": [p] * 4, "dilations": [d, d], "group": g}
    nodes = [node("Conv", "x w b", "c", **attributes), node("Relu", "c", "y")]
    check(model(nodes, {"x": [2, c, h, w]}, {"w": normal(o, c // g, k, k), "b": normal(o)}), normal(2, c, h, w))


# Pixels: panels that divide them, in groups that do not divide the panels; neither; a batch, whose maps lie apart.
@pytest.mark.parametrize("shape", [(1, 40, 48, 57), (1, 40, 47, 61), (2, 40, 32, 33), (1, 33, 64, 96)])
def test_pointwise_convolution_of_a_large_map(shape):
    nodes = [node("Conv", "x w b", "y", kernel_shape=[1, 1])]
    check(model(nodes, {"x": [*shape]}, {"w": normal(72, shape[1], 1, 1), "b": normal(72)}), normal(*shape))


@pytest.mark.parametrize("columns", [768, 48 * 17, 1000])
def test_product_of_computed_operands_in_many_panels(columns):
    a, b = (3, 90, 40), (3, 40, columns)
    check(model([node("MatMul", "a b", "y")], {"a": [*a], "b": [*b]}), normal(*a), normal(*b))


def test_squeeze_and_excite_broadcasts_a_convolution():
    nodes = [
        node("ReduceMean", "x axes", "m", keepdims=1),
        node("Conv", "m w b", "c", kernel_shape=[1, 1]),
        node("HardSigmoid", "c", "s"),
        node("Mul", "x s", "y"),
    ]
    weights = {"axes": np.array([2, 3]), "w": normal(16, 16, 1, 1), "b": normal(16)}
    check(model(nodes, {"x": [1, 16, 9, 7]}, weights), normal(1, 16, 9, 7))


ROWS = {
    "softmax": [node("Softmax", "x", "y", axis=-1)],
    "softmax over channels": [node("Softmax", "x", "y", axis=1)],
    "layer norm": [node("LayerNormalization", "x g b", "y", axis=-1)],
    "mean of the last axis": [node("ReduceMean", "x last", "y", keepdims=0)],
    "mean of a middle axis": [node("ReduceMean", "x middle", "y", keepdims=0)],
    "maximum of everything": [node("ReduceMax", "x", "y", keepdims=1)],
    "l2 norm": [node("ReduceL2", "x last", "n", keepdims=1), node("Div", "x n", "y")],
    "transpose": [node("Transpose", "x", "y", perm=[0, 2, 1])],
    "roll": [
        node("Slice", "x two end one", "p"),
        node("Slice", "x nil two one", "q"),
        node("Concat", "p q", "y", axis=1),
    ],
    "pad": [node("Pad", "x pads", "y")],
    "flip": [node("Slice", "x minus first one minus", "y")],
}


@pytest.mark.parametrize("last", [49, 96, 3])
@pytest.mark.parametrize("kind", ROWS)
def test_rows_and_movement(kind, last):
    numbers = {"two": [2], "end": [1 << 40], "one": [1], "nil": [0], "minus": [-1], "first": [-(1 << 40)]}
    weights = {name: np.array(value, np.int64) for name, value in numbers.items()}
    weights |= {"last": np.array([2]), "middle": np.array([1]), "pads": np.array([0, 1, 2, 0, 3, 1])}
    weights |= {"g": normal(last), "b": normal(last, seed=1)}
    check(model(ROWS[kind], {"x": [2, 7, last]}, weights), normal(2, 7, last))


def test_rows_of_half_precision():
    nodes = [node("Softmax", "x", "s", axis=-1), node("LayerNormalization", "s g b", "y", axis=-1)]
    weights = {"g": normal(49, dtype=np.float16), "b": normal(49, dtype=np.float16)}
    proto = model(nodes, {"x": [4, 49]}, weights, dtype=np.float16)
    x = normal(4, 49, dtype=np.float16)
    single = model(nodes, {"x": [4, 49]}, {k: v.astype(np.float32) for k, v in weights.items()})
    assert relative_error(compiled(proto)(x), reference(single, x.astype(np.float32))) <= FP16


@pytest.mark.parametrize("kind", ["MaxPool", "AveragePool", "GlobalAveragePool"])
def test_pooling(kind):
    attributes = {} if kind.startswith("Global") else {"kernel_shape": [3, 3], "strides": [2, 2]}
    check(model([node(kind, "x", "y", **attributes)], {"x": [2, 5, 15, 13]}), normal(2, 5, 15, 13))


def test_cut_linear_layer_is_split():
    nodes = [node("MatMul", "x w", "m"), node("Add", "m b", "a")]
    for name, start in (("q", 0), ("k", 24), ("v", 48)):
        nodes.append(node("Slice", f"a s{start} s{start + 24} axis", name))
    nodes += [node("Mul", "q k", "p"), node("Sub", "p v", "y")]
    weights = {f"s{i}": np.array([i]) for i in (0, 24, 48, 72)}
    weights |= {"axis": np.array([2]), "w": normal(24, 72), "b": normal(72)}
    proto = model(nodes, {"x": [1, 10, 24]}, weights)
    proto.graph.value_info.append(_info("a", [1, 10, 72]))
    from attnrewrite.lowering.split_linear import split_linear

    split = type(proto)()
    split.CopyFrom(proto)
    split_linear(split)
    assert [n.op_type for n in split.graph.node] == ["MatMul", "Add"] * 3 + ["Mul", "Sub"]
    x = normal(1, 10, 24)
    assert relative_error(reference(split, x), reference(proto, x)) <= 1e-6
    check(proto, x)


def test_linear_layer_behind_a_split_becomes_a_product_per_part():
    from onnx import helper

    split_node = helper.make_node("Split", ["a", "sizes"], ["q", "k", "v"], axis=-1)
    nodes = [node("MatMul", "x w", "a"), split_node, node("Mul", "q k", "qk"), node("Concat", "qk v", "y", axis=-1)]
    proto = model(nodes, {"x": [1, 10, 24]}, {"sizes": np.array([24, 24, 16]), "w": normal(24, 64)})
    proto.graph.value_info.append(_info("a", [1, 10, 64]))
    from attnrewrite.lowering.split_linear import split_linear

    split = type(proto)()
    split.CopyFrom(proto)
    split_linear(split)
    assert [n.op_type for n in split.graph.node] == ["MatMul"] * 3 + ["Mul", "Concat"]
    x = normal(1, 10, 24)
    assert relative_error(reference(split, x), reference(proto, x)) <= 1e-6
    check(proto, x)


def test_linear_layer_behind_gatherings_becomes_a_product_per_part():
    nodes = [node("MatMul", "x w", "m"), node("Gather", "m even", "q", axis=2), node("Gather", "m odd", "k", axis=2)]
    nodes.append(node("Sub", "q k", "y"))
    weights = {"w": normal(24, 40), "even": np.arange(0, 40, 2), "odd": np.arange(1, 40, 2)}
    proto = model(nodes, {"x": [1, 10, 24]}, weights)
    proto.graph.value_info.append(_info("m", [1, 10, 40]))
    assert_split(proto, ["MatMul", "MatMul", "Sub"], normal(1, 10, 24))


def test_convolution_cut_along_its_channels_becomes_one_per_part():
    nodes = [node("Conv", "x w b", "c", pads=[1, 1, 1, 1]), node("Slice", "c s0 s8 one", "q")]
    nodes += [node("Slice", "c s8 s16 one", "k"), node("Sub", "q k", "y")]
    weights = {"w": normal(16, 6, 3, 3), "b": normal(16), "one": np.array([1])}
    weights |= {f"s{i}": np.array([i]) for i in (0, 8, 16)}
    assert_split(model(nodes, {"x": [2, 6, 5, 7]}, weights), ["Conv", "Conv", "Sub"], normal(2, 6, 5, 7))


def assert_split(proto, operators, x):
    from attnrewrite.lowering.split_linear import split_linear

    split = type(proto)()
    split.CopyFrom(proto)
    split_linear(split)
    assert [n.op_type for n in split.graph.node] == operators
    assert relative_error(reference(split, x), reference(proto, x)) <= 1e-6
    check(proto, x)


def test_linear_layer_read_whole_stays_whole():
    nodes = [
        node("MatMul", "x w", "m"),
        node("Slice", "m s0 s24 axis", "q"),
        node("ReduceSum", "m", "t"),
        node("Add", "q t", "y"),
    ]
    weights = {"s0": np.array([0]), "s24": np.array([24]), "axis": np.array([-1]), "w": normal(24, 72)}
    proto = model(nodes, {"x": [10, 24]}, weights)
    from attnrewrite.lowering.split_linear import split_linear

    split_linear(proto)
    assert [n.op_type for n in proto.graph.node] == ["MatMul", "Slice", "ReduceSum", "Add"]


def _info(name, shape):
    from onnx import TensorProto, helper

    return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
