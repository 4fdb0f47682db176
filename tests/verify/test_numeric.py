"""Verification must pass what is equal up to rounding, and nothing else."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from attnrewrite.errors import UserError, VerificationError
from attnrewrite.verify.inputs import CASES, interface, make_inputs, resolve_shapes
from attnrewrite.verify.numeric import CEILING, TOLERANCE, compare, require, verify_models
from attnrewrite.verify.runners import OnnxRunner
from tests import tiny

NAN, INF = np.nan, np.inf


@pytest.mark.parametrize(
    ("expected", "found", "error"),
    [
        ([1.0, -4.0], [1.0, -4.0], 0.0),
        ([1.0, -4.0], [1.0, -4.4], 0.1),
        ([0.0, 0.0], [0.0, 0.5], 0.5),
        ([NAN, 2.0], [NAN, 2.0], 0.0),
        ([NAN, 2.0], [1.0, 2.0], INF),
        ([1.0, 2.0], [NAN, 2.0], INF),
        ([INF, 2.0], [INF, 1.0], 0.5),
        ([INF, 2.0], [-INF, 2.0], INF),
        ([INF, 2.0], [3.0, 2.0], INF),
        ([NAN, INF], [NAN, INF], 0.0),
    ],
)
def test_error_is_a_share_of_the_largest_reference_value(expected, found, error):
    assert compare(np.array(expected), np.array(found)).error == pytest.approx(error)


def test_shapes_must_agree():
    difference = compare(np.zeros((2, 3)), np.zeros((3, 2)))
    assert difference.error == INF
    assert str(difference) == "the shape is [3, 2], expected [2, 3]"


def test_difference_names_the_element():
    found = np.ones((2, 3), np.float32)
    found[1, 2] = 1.5
    assert str(compare(np.ones((2, 3)), found)) == "element [1, 2] is 1.5, expected 1 (5.00e-01 of scale 1)"


WRONG = {
    "twice as large": lambda: tiny.linear(factor=2.0),
    "a percent too large": lambda: tiny.linear(factor=1.01),
    "1e-4 too large": lambda: tiny.linear(factor=1.0001),
    "shuffled": lambda: tiny.linear(shift_by=1),
    "one element off": lambda: tiny.one_off(tiny.linear(), 1e-3),
    "one element NaN": lambda: tiny.one_off(tiny.linear(), NAN),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_outputs_fail(tmp_path, wrong):
    original = tiny.save(tmp_path / "original.onnx", tiny.linear())
    rewritten = tiny.save(tmp_path / "rewritten.onnx", WRONG[wrong]())
    verification = verify_models(original, rewritten, threads=1)
    assert not verification.passed
    with pytest.raises(VerificationError, match="the rewritten model differs at output y"):
        require(verification)


def test_reordered_sums_pass(tmp_path):
    """(x @ W) * 3 and x @ (3 * W) round differently."""
    original = tiny.linear(channels=64)
    original.graph.node[-1].output[0] = "sum"
    original.graph.node.append(helper.make_node("Mul", ["sum", "three"], ["y"]))
    original.graph.initializer.append(onnx.numpy_helper.from_array(np.float32(3.0), "three"))
    verification = verify_models(
        tiny.save(tmp_path / "original.onnx", original),
        tiny.save(tmp_path / "rewritten.onnx", tiny.linear(channels=64, factor=3.0)),
        trials=len(CASES),
        threads=1,
    )
    assert verification.passed
    assert 0 < verification.max_error("rewritten") < 1e-6
    assert {c.case for c in verification.comparisons} == set(CASES)


@pytest.mark.parametrize(("off_by", "passes"), [(0.0, True), (3e-4, False)])
def test_rounding_of_weights_that_cancel_is_allowed_for(tmp_path, off_by, passes):
    """x @ W - x @ V, W and V nearly equal, loses digits that x @ (W - V) keeps; x's own last bit hardly counts."""
    rng = np.random.default_rng(3)
    near = rng.standard_normal((64, 64)).astype(np.float32)
    far = (near + 0.01 * rng.standard_normal(near.shape)).astype(np.float32)
    ports = {"x": (TensorProto.FLOAT, [1, 4, 64])}, {"y": (TensorProto.FLOAT, [1, 4, 64])}
    two = [
        helper.make_node("MatMul", ["x", "far"], ["a"]),
        helper.make_node("MatMul", ["x", "near"], ["b"]),
        helper.make_node("Sub", ["a", "b"], ["y"]),
    ]
    original = tiny.model_of(two, *ports, weights={"far": far, "near": near})
    merged = (1 + off_by) * (far.astype(np.float64) - near)
    one = tiny.model_of(
        [helper.make_node("MatMul", ["x", "w"], ["y"])], *ports, weights={"w": merged.astype(np.float32)}
    )
    paths = tiny.save(tmp_path / "original.onnx", original), tiny.save(tmp_path / "rewritten.onnx", one)
    verification = verify_models(*paths, trials=1, threads=1)
    (row,) = verification.comparisons
    assert row.error > TOLERANCE["rewritten", "fp32"]
    assert row.tolerance < CEILING["fp32"] / 4
    assert verification.passed == passes


def test_symbolic_batch_is_tried_at_1_2_and_3(tmp_path):
    path = tiny.save(tmp_path / "model.onnx", tiny.linear(batch="batch"))
    assert [c.batch for c in verify_models(path, path, threads=1).comparisons] == [1, 2, 3]


def test_batch_the_original_refuses_is_noted_and_not_held_against_the_rewritten(tmp_path):
    model = tiny.linear(batch="batch", tokens=6)
    model.graph.node[0].input[0] = "flat"
    shape = onnx.numpy_helper.from_array(np.array([1, 6, 8], np.int64), "shape")
    model.graph.initializer.append(shape)
    model.graph.node.insert(0, helper.make_node("Reshape", ["x", "shape"], ["flat"]))
    path = tiny.save(tmp_path / "model.onnx", model)
    verification = verify_models(path, path, threads=1)
    assert verification.passed
    assert verification.notes == (
        "the original itself does not run at batch 2",
        "the original itself does not run at batch 3",
    )


def test_token_ids_stay_inside_the_table(tmp_path):
    path = tiny.save(tmp_path / "model.onnx", tiny.embedding(vocabulary=11))
    (ids,) = interface(path).inputs
    assert ids.upper == 11
    drawn = make_inputs([ids], resolve_shapes([ids], {}, 3), "random", np.random.default_rng(0))["ids"]
    assert drawn.shape == (3, 5)
    assert drawn.dtype == np.int64
    assert drawn.min() >= 0
    assert drawn.max() > 1
    assert verify_models(path, path, threads=1).max_error("rewritten") == 0.0


def test_integer_outputs_must_be_equal(tmp_path):
    def arg_of(op: str) -> onnx.ModelProto:
        return tiny.model_of(
            [helper.make_node(op, ["x"], ["y"], axis=-1, keepdims=0)],
            {"x": (TensorProto.FLOAT, [1, 9])},
            {"y": (TensorProto.INT64, [1])},
        )

    original = tiny.save(tmp_path / "original.onnx", arg_of("ArgMax"))
    assert verify_models(original, original, threads=1).passed
    assert not verify_models(original, tiny.save(tmp_path / "other.onnx", arg_of("ArgMin")), threads=1).passed


def test_missing_output_fails(tmp_path):
    renamed = tiny.linear()
    renamed.graph.node[-1].output[0] = renamed.graph.output[0].name = "z"
    verification = verify_models(
        tiny.save(tmp_path / "original.onnx", tiny.linear()), tiny.save(tmp_path / "renamed.onnx", renamed), threads=1
    )
    assert "there is no such output; found z" in verification.explain_failure()


def test_rewritten_model_that_does_not_load_fails(tmp_path):
    broken = tiny.linear()
    broken.graph.node[0].op_type = "NoSuchOp"
    verification = verify_models(
        tiny.save(tmp_path / "original.onnx", tiny.linear()), tiny.save(tmp_path / "broken.onnx", broken), threads=1
    )
    assert not verification.passed
    assert verification.explain_failure().startswith("the rewritten model does not run: ")


def test_original_that_does_not_load_is_bad_input(tmp_path):
    broken = tiny.linear()
    broken.graph.node[0].op_type = "NoSuchOp"
    path = tiny.save(tmp_path / "broken.onnx", broken)
    with pytest.raises(UserError, match="does not load in ONNX Runtime"):
        verify_models(path, path, threads=1)


def test_half_precision_has_a_tolerance_of_its_own(tmp_path):
    path = tiny.save(tmp_path / "model.onnx", tiny.linear(dtype=np.float16))
    verification = verify_models(path, path, threads=1)
    assert verification.precision == "fp16"
    assert all(c.tolerance >= TOLERANCE["rewritten", "fp16"] for c in verification.comparisons)


def test_a_bfloat16_model_is_compared_in_float32(tmp_path):
    """Where ONNX Runtime has its operators, and where nothing is rounded: so by the tolerances of float32."""
    path = tiny.save(tmp_path / "model.onnx", tiny.linear(dtype=ml_dtypes.bfloat16))
    off = tiny.save(tmp_path / "off.onnx", tiny.linear(dtype=ml_dtypes.bfloat16, factor=1.01))
    assert interface(path).bfloat16
    assert interface(path).inputs[0].dtype == ml_dtypes.bfloat16
    verification = verify_models(path, path, compiled=lambda: Rounding(path), threads=1)
    assert verification.passed
    assert {c.tolerance for c in verification.of("rewritten")} == {TOLERANCE["rewritten", "fp32"]}
    assert {c.tolerance for c in verification.of("compiled")} == {TOLERANCE["compiled", "bf16-stored"]}
    assert not verify_models(path, off, threads=1).passed


class Rounding(OnnxRunner):
    """As a library runs the model: it takes bfloat16, and gives it back."""

    def run(self, inputs):
        assert all(array.dtype == ml_dtypes.bfloat16 for array in inputs.values())
        return {name: array.astype(ml_dtypes.bfloat16) for name, array in super().run(inputs).items()}


def test_bfloat16_in_nodes_and_subgraphs_is_widened(tmp_path):
    """y = x + (x > 0 ? bfloat16(1.5) : bfloat16(-x)), for a single x"""
    narrow, wide = TensorProto.BFLOAT16, TensorProto.FLOAT
    one = helper.make_node("Constant", [], ["one"], value=helper.make_tensor("value", narrow, [1], [1.5]))
    minus = [helper.make_node("Neg", ["x"], ["minus"]), helper.make_node("Cast", ["minus"], ["cast"], to=narrow)]
    branches = {
        "then_branch": helper.make_graph([one], "then", [], [helper.make_tensor_value_info("one", narrow, [1])]),
        "else_branch": helper.make_graph(minus, "else", [], [helper.make_tensor_value_info("cast", narrow, [1])]),
    }
    nodes = [
        helper.make_node("Greater", ["x", "zero"], ["positive"]),
        helper.make_node("Squeeze", ["positive"], ["condition"]),
        helper.make_node("If", ["condition"], ["chosen"], **branches),
        helper.make_node("Cast", ["chosen"], ["again"], to=wide),
        helper.make_node("Add", ["x", "again"], ["y"]),
    ]
    model = tiny.model_of(nodes, {"x": (wide, [1])}, {"y": (wide, [1])}, {"zero": np.zeros(1, np.float32)})
    runner = OnnxRunner(tiny.save(tmp_path / "model.onnx", model), threads=1)
    found = [runner.run({"x": np.array([x], np.float32)})["y"].item() for x in (2.0, -1.0001)]
    assert found == [3.5, 0.0]  # where -x is rounded, the second is not zero


def test_output_that_is_always_zero_is_noted(tmp_path):
    path = tiny.save(tmp_path / "model.onnx", tiny.linear(factor=0.0))
    assert verify_models(path, path, threads=1).notes == (
        "the original's output y is zero on every input tried, which proves little",
    )


def test_no_tolerance_reaches_a_percent():
    """But that of bfloat16 in memory, which has two digits."""
    stored = ("bf16-stored", ("compiled", "bf16-stored"))
    assert max(v for table in (TOLERANCE, CEILING) for k, v in table.items() if k not in stored) < 1e-2


def test_json_has_no_infinity(tmp_path):
    renamed = tiny.linear()
    renamed.graph.node[-1].output[0] = renamed.graph.output[0].name = "z"
    verification = verify_models(
        tiny.save(tmp_path / "original.onnx", tiny.linear()), tiny.save(tmp_path / "renamed.onnx", renamed), threads=1
    )
    assert verification.to_json()["rewritten"]["max_error"] == "inf"
