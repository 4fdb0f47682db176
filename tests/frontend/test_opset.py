"""Models of opset 9 to 12 raised to 13: the same function, inside subgraphs too."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from attnrewrite.errors import UserError
from attnrewrite.frontend.onnx import read, to_model
from tests.models.onnx_builder import Builder
from tests.running import error, run

Build = Callable[[Builder], str]


def model_of(
    nodes: list[onnx.NodeProto], opset: int, *, weights: dict[str, np.ndarray] | None = None
) -> onnx.ModelProto:
    """x [2, 3, 4] to y, unchecked and without inferred shapes."""
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 3, 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [onnx.numpy_helper.from_array(a, n) for n, a in (weights or {}).items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=6)


X = np.random.default_rng(0).normal(size=(2, 3, 4)).astype(np.float32)
node = helper.make_node

CASES: dict[str, list[onnx.NodeProto]] = {
    # Softmax flattens from `axis` on, 1 by default.
    "softmax-default": [node("Softmax", ["x"], ["y"])],
    "softmax-axis-0": [node("Softmax", ["x"], ["y"], axis=0)],
    "softmax-last": [node("Softmax", ["x"], ["y"], axis=2)],
    "softmax-minus-one": [node("Softmax", ["x"], ["y"], axis=-1)],
    "softmax-minus-two": [node("Softmax", ["x"], ["y"], axis=-2)],
    "log-softmax": [node("LogSoftmax", ["x"], ["y"], axis=1)],
    "hardmax": [node("Hardmax", ["x"], ["y"], axis=1)],
    "softmax-behind-operators": [
        node("Transpose", ["x"], ["t"], perm=[2, 0, 1]),
        node("Softmax", ["t"], ["s"], axis=1),
        node("Exp", ["s"], ["y"]),
    ],
    # Axes and sizes became inputs.
    "unsqueeze-squeeze": [node("Unsqueeze", ["x"], ["u"], axes=[0, 4]), node("Squeeze", ["u"], ["y"], axes=[0])],
    "squeeze-all": [node("Unsqueeze", ["x"], ["u"], axes=[1]), node("Squeeze", ["u"], ["y"])],
    "reduce-sum": [node("ReduceSum", ["x"], ["y"], axes=[-1], keepdims=0)],
    "reduce-sum-all": [node("ReduceSum", ["x"], ["y"])],
    "split": [node("Split", ["x"], ["a", "b"], axis=2, split=[1, 3]), node("Exp", ["b"], ["y"])],
    "split-evenly": [node("Split", ["x"], ["a", "b"], axis=2), node("Exp", ["b"], ["y"])],
    # The ratio of Dropout became an input.
    "dropout": [node("Dropout", ["x"], ["d"], ratio=0.3), node("Exp", ["d"], ["y"])],
    "dropout-last": [node("Exp", ["x"], ["e"]), node("Dropout", ["e"], ["y"], ratio=0.3)],
    # Unchanged by name, other attributes.
    "reduce-mean": [node("ReduceMean", ["x"], ["y"], axes=[1])],
}


@pytest.mark.parametrize("opset", [11, 12])
@pytest.mark.parametrize("case", CASES)
def test_raising_keeps_the_function(case: str, opset: int) -> None:
    if case.startswith("dropout"):
        opset = 11  # it changed at 12
    original = model_of(CASES[case], opset)
    expected = run(original, {"x": X})["y"]
    raised = to_model(read(model_of(CASES[case], opset)))
    assert [i.version for i in raised.opset_import if i.domain == ""] == [13]
    onnx.checker.check_model(raised)  # the shape of y is inferred
    np.testing.assert_array_equal(run(raised, {"x": X})["y"], expected)


@pytest.mark.parametrize("opset", [9, 10])
def test_older_models_go_through_the_converter(opset: int) -> None:
    nodes = [
        node("Softmax", ["x"], ["s"], axis=1),
        node("Unsqueeze", ["s"], ["u"], axes=[1]),
        node("Relu", ["u"], ["y"]),
    ]
    expected = run(model_of(nodes, opset), {"x": X})["y"]
    raised = to_model(read(model_of(nodes, opset)))
    assert [i.version for i in raised.opset_import if i.domain == ""] == [13]
    assert error(run(raised, {"x": X})["y"], expected) < 1e-6


@pytest.mark.parametrize("opset", [13, 17, 23])
def test_from_13_on_the_opset_stays(opset: int) -> None:
    g = Builder(opset)
    model = g.model({"y": g.op("Softmax", g.input("x", [2, 3, 4]), axis=1)})
    written = to_model(read(model))
    assert [i.version for i in written.opset_import if i.domain == ""] == [opset]
    np.testing.assert_array_equal(run(written, {"x": X})["y"], run(model, {"x": X})["y"])


def branch(name: str, nodes: list[onnx.NodeProto], weights: dict[str, np.ndarray] | None = None) -> onnx.GraphProto:
    output = helper.make_tensor_value_info(nodes[-1].output[0], TensorProto.FLOAT, None)
    return helper.make_graph(
        nodes, name, [], [output], [onnx.numpy_helper.from_array(a, n) for n, a in (weights or {}).items()]
    )


@pytest.mark.parametrize("opset", [11, 12])
@pytest.mark.parametrize("taken", [True, False])
def test_bodies_of_if_are_raised_too(opset: int, taken: bool) -> None:
    """A flattening Softmax of a captured value on one side, Unsqueeze and ReduceSum with attributes on the other."""
    then = branch("then", [node("Softmax", ["t"], ["s"], axis=1)])
    orelse = branch(
        "else",
        [node("Unsqueeze", ["t"], ["u"], axes=[0]), node("ReduceSum", ["u"], ["r"], axes=[0], keepdims=0)],
    )
    nodes = [
        node("Transpose", ["x"], ["t"], perm=[2, 0, 1]),
        node("If", ["flag"], ["y"], then_branch=then, else_branch=orelse),
    ]

    def model() -> onnx.ModelProto:
        return model_of(nodes, opset, weights={"flag": np.array(taken)})

    raised = to_model(read(model()))
    np.testing.assert_array_equal(run(raised, {"x": X})["y"], run(model(), {"x": X})["y"])


@pytest.mark.parametrize("opset", [11, 12])
def test_the_body_of_a_loop_is_raised_too(opset: int) -> None:
    body = helper.make_graph(
        [
            node("Softmax", ["state"], ["s"], axis=1),
            node("Add", ["s", "x"], ["next"]),
            node("Identity", ["go"], ["go_on"]),
        ],
        "body",
        [
            helper.make_tensor_value_info("i", TensorProto.INT64, []),
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
            helper.make_tensor_value_info("state", TensorProto.FLOAT, [2, 3, 4]),
        ],
        [
            helper.make_tensor_value_info("go_on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("next", TensorProto.FLOAT, [2, 3, 4]),
        ],
    )
    nodes = [node("Exp", ["x"], ["e"]), node("Loop", ["count", "", "e"], ["y"], body=body)]

    def model() -> onnx.ModelProto:
        return model_of(nodes, opset, weights={"count": np.array(3, np.int64)})

    raised = to_model(read(model()))
    np.testing.assert_array_equal(run(raised, {"x": X})["y"], run(model(), {"x": X})["y"])


def test_a_model_without_an_opset_is_bad_input() -> None:
    model = model_of([node("Exp", ["x"], ["y"])], 13)
    del model.opset_import[:]
    model.opset_import.append(helper.make_opsetid("com.example", 1))
    with pytest.raises(UserError, match=r"^the model imports no ONNX operator set$"):
        read(model)


def test_a_very_old_operator_that_cannot_be_raised_is_bad_input() -> None:
    model = model_of([node("Affine", ["x"], ["y"], alpha=1.0, beta=0.0)], 7)
    with pytest.raises(UserError, match=r"^opset 7 is older than 11 and could not be raised: "):
        read(model)
