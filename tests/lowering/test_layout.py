"""Channels last: what is computed stays what it was, and transpositions that undo each other are gone."""

from __future__ import annotations

import numpy as np
import pytest

from tests.lowering.compiling import compiled, model, node, normal, reference, relative_error

relax = pytest.importorskip("tvm.relax")

from tvm import ir  # noqa: E402

from attnrewrite.lowering import build, importer  # noqa: E402
from attnrewrite.lowering.layout import _groups, channels_last  # noqa: E402
from attnrewrite.lowering.targets import parse_target  # noqa: E402

FP32 = 1e-5


def operators(proto) -> list[str]:
    """Names of the operators left once layouts are chosen, in order."""
    target = parse_target("cpu")
    mod = channels_last(importer.import_onnx(proto, target, build.tvm_target(target)))
    bindings = [b for block in mod["main"].body.blocks for b in block.bindings]
    calls = [b.value for b in bindings if isinstance(b.value, ir.Call)]
    return [call.op.name.removeprefix("relax.") for call in calls if isinstance(call.op, ir.Op)]


def check(proto, *arrays):
    assert relative_error(compiled(proto)(*arrays), reference(proto, *arrays)) <= FP32


def pair(value) -> list[int]:
    return list(value) if isinstance(value, tuple) else [value, value]


# channels in and out, kernel, stride, padding, dilation, groups: odd sizes, asymmetric borders, depthwise, grouped.
CONVOLUTIONS = [
    (3, 60, 3, 1, (1, 1, 1, 1), 1, 1),
    (60, 12, 3, 1, (1, 1, 1, 1), 1, 1),
    (5, 37, (3, 1), (2, 1), (1, 0, 0, 0), 1, 1),
    (16, 48, 2, 2, (0, 0, 0, 0), 1, 1),
    (7, 9, 3, 1, (2, 2, 2, 2), 2, 1),
    (33, 20, 1, 1, (0, 0, 0, 0), 1, 1),
    (33, 20, 1, 2, (0, 0, 0, 0), 1, 1),
    (40, 40, 3, 1, (1, 1, 1, 1), 1, 40),
    (21, 21, 5, 2, (2, 1, 3, 0), 1, 21),
    (6, 9, 3, 1, (1, 1, 1, 1), 1, 3),
]


@pytest.mark.parametrize(("inputs", "outputs", "kernel", "stride", "pads", "dilation", "groups"), CONVOLUTIONS)
@pytest.mark.parametrize("batch", [1, 2])
def test_convolution(inputs, outputs, kernel, stride, pads, dilation, groups, batch):
    attributes = {"strides": pair(stride), "pads": list(pads), "dilations": pair(dilation), "group": groups}
    weights = {"w": normal(outputs, inputs // groups, *pair(kernel)), "b": normal(outputs)}
    nodes = [node("Conv", "x w b", "c", **attributes), node("Relu", "c", "y")]
    check(model(nodes, {"x": [batch, inputs, 13, 18]}, weights), normal(batch, inputs, 13, 18))


# kernel, stride, padding, output padding: without overlap, with it, a kernel that is no multiple, unequal axes.
TRANSPOSED = [
    (2, 2, (0, 0, 0, 0), 0),
    (4, 2, (1, 1, 1, 1), 0),
    (3, 2, (1, 1, 1, 1), 1),
    ((3, 5), (1, 3), (0, 2, 1, 1), 0),
    (2, 3, (0, 0, 0, 0), 0),
    (3, 2, (0, 0, 0, 0), 1),
]


@pytest.mark.parametrize(("kernel", "stride", "pads", "more"), TRANSPOSED)
def test_transposed_convolution(kernel, stride, pads, more):
    attributes = {"strides": pair(stride), "pads": list(pads), "output_padding": pair(more)}
    weights = {"w": normal(6, 5, *pair(kernel)), "b": normal(5)}
    nodes = [node("ConvTranspose", "x w b", "c", **attributes), node("Relu", "c", "y")]
    check(model(nodes, {"x": [2, 6, 7, 4]}, weights), normal(2, 6, 7, 4))


def residual_block():
    """Tokens to a map, two convolutions with a residual, back to tokens, as restoration models have it."""
    weights = {"w1": normal(24, 24, 3, 3), "w2": normal(24, 24, 1, 1), "b": normal(24), "s": np.array([1, 24, 6, 10])}
    weights["t"] = np.array([1, 24, 60])
    nodes = [
        node("Transpose", "x", "xt", perm=[0, 2, 1]),
        node("Reshape", "xt s", "map"),
        node("Conv", "map w1 b", "c1", pads=[1, 1, 1, 1]),
        node("LeakyRelu", "c1", "a", alpha=0.2),
        node("Conv", "a w2", "c2"),
        node("Add", "c2 map", "sum"),
        node("Reshape", "sum t", "flat"),
        node("Transpose", "flat", "y", perm=[0, 2, 1]),
    ]
    return model(nodes, {"x": [1, 60, 24]}, weights), normal(1, 60, 24)


def test_transpositions_around_convolutions_are_gone():
    proto, x = residual_block()
    assert "permute_dims" not in operators(proto)
    check(proto, x)


def test_pointwise_convolution_of_a_channels_first_map_stays():
    weights = {"w": normal(8, 4, 1, 1)}
    proto = model([node("Conv", "x w", "y")], {"x": [1, 4, 6, 6]}, weights)
    assert operators(proto) == ["nn.conv2d"]


def test_pixel_shuffle_moves_once():
    weights = {"w": normal(16, 4, 3, 3), "v": normal(3, 4, 3, 3)}
    nodes = [
        node("Conv", "x w", "c", pads=[1, 1, 1, 1]),
        node("DepthToSpace", "c", "d", blocksize=2, mode="CRD"),
        node("Conv", "d v", "y", pads=[1, 1, 1, 1]),
    ]
    proto = model(nodes, {"x": [1, 4, 5, 7]}, weights)
    # The input, the shuffle, the output.
    assert operators(proto).count("permute_dims") == 3
    check(proto, normal(1, 4, 5, 7))


FOLLOWERS = {
    "GlobalAveragePool": [node("GlobalAveragePool", "c", "p"), node("Mul", "c p", "y")],
    "MaxPool": [node("MaxPool", "c", "y", kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])],
    "AveragePool": [node("AveragePool", "c", "y", kernel_shape=[2, 2], strides=[2, 2])],
    "Resize": [node("Resize", "c - scales", "y", mode="nearest", nearest_mode="floor")],
    "Concat": [node("Sigmoid", "c", "g"), node("Concat", "c g", "y", axis=1)],
    "BatchNormalization": [node("BatchNormalization", "c gamma beta mean variance", "y")],
    "ReduceMean": [node("ReduceMean", "c axes", "m", keepdims=0), node("Softmax", "m", "y")],
    "broadcast along rows": [node("Add", "c row", "y")],
    "HardSigmoid": [node("HardSigmoid", "c", "g"), node("Mul", "c g", "y")],
    "HardSwish": [node("HardSwish", "c", "y")],
    "Clip": [node("Clip", "c least most", "y")],
    "LeakyRelu": [node("LeakyRelu", "c", "y", alpha=0.1)],
    "Clip on one side": [node("Clip", "c least", "g"), node("Erf", "g", "y")],
    "softmax over channels": [node("Softmax", "c", "y", axis=1)],
    "InstanceNormalization": [node("InstanceNormalization", "c gamma beta", "y")],
    "split channels": [node("Split", "c", "l", num_outputs=2, axis=1)],
}
FOLLOWERS["split channels"][0].output.append("r")
FOLLOWERS["split channels"].append(node("Mul", "l r", "y"))


@pytest.mark.parametrize("name", FOLLOWERS)
def test_what_follows_a_convolution(name):
    weights = {
        "w": normal(10, 6, 3, 3),
        "scales": np.array([1, 1, 2, 2], np.float32),
        "axes": np.array([2, 3]),
        "row": normal(9),
        "least": np.array(-0.5, np.float32),
        "most": np.array(1.5, np.float32),
        "gamma": normal(10, seed=1),
        "beta": normal(10, seed=2),
        "mean": normal(10, seed=3),
        "variance": np.abs(normal(10, seed=4)) + 0.1,
    }
    nodes = [node("Conv", "x w", "c", pads=[1, 1, 1, 1]), *FOLLOWERS[name]]
    used = {i for n in nodes for i in n.input}
    proto = model(nodes, {"x": [2, 6, 8, 9]}, {k: v for k, v in weights.items() if k in used})
    check(proto, normal(2, 6, 8, 9))


def test_symbolic_batch():
    weights = {"w": normal(10, 6, 3, 3)}
    proto = model([node("Conv", "x w", "c"), node("Relu", "c", "y")], {"x": ["n", 6, 8, 9]}, weights)
    run = compiled(proto)
    for batch in (1, 3):
        x = normal(batch, 6, 8, 9)
        assert relative_error(run(x), reference(proto, x)) <= FP32


def test_groups_of_a_reshape():
    def groups(before, after):
        from tvm import tirx

        symbol = tirx.Var("n", "int64")
        extents = ([symbol if e == "n" else tirx.IntImm("int64", e) for e in side] for side in (before, after))
        return _groups(*extents)

    assert groups([2, 6, 5, 7], [2, 6, 35]) == [([0], [0]), ([1], [1]), ([2, 3], [2])]
    assert groups(["n", 12, 5], ["n", 3, 2, 2, 5]) == [([0], [0]), ([1], [1, 2, 3]), ([2], [4])]
    assert groups([4, 6], [3, 8]) == [([0, 1], [0, 1])]
    assert groups([6, 1], [6]) == [([0, 1], [0])]
    assert groups([6], [6, 1, 1]) == [([0], [0, 1, 2])]
    assert groups(["n", 4], [4, "n"]) is None
