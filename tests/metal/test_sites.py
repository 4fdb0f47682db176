"""Nodes of the two ops in a model: each becomes one kernel, whatever its operands are."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import helper

pytest.importorskip("tvm")

from attnrewrite.emulator import metal_target, run_model
from attnrewrite.frontend.onnx import read, to_model
from attnrewrite.functions.spec import DOMAIN, FlashWindowAttention, SlideAttention
from attnrewrite.lowering import importer
from attnrewrite.lowering.kernels import reference
from attnrewrite.lowering.kernels.coverage import covers
from attnrewrite.lowering.targets import parse_target
from attnrewrite.lowering.written_out import write_out
from tests.metal.cases import BATCHED, SLIDES, WINDOWS, Case

# Attributes that are left out of a node where they are not needed.
OPTIONAL = {
    FlashWindowAttention: {"mask_value", "shared_query", "relative_scale", "head_shifts"},
    SlideAttention: {"stride", "key_size", "offset", "predicted", "overlap_add", "upsampling"},
}


def site(case: Case) -> onnx.ModelProto:
    """The op of a case as a model, the batch symbolic where that of the case is."""
    inputs = []
    for name, operand in case.operands.items():
        shape: list[int | str] = [*operand.shape]
        if case.symbolic and name in BATCHED:
            shape[0] = "batch"
        inputs.append(helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(operand.dtype), shape))
    names = [name if name in case.operands else "" for name in case.spec.operands]
    outputs = ["output", "beside"] if "extra_query" in case.operands else ["output"]
    node = helper.make_node(case.spec.op_type, names, outputs, name="op", domain=DOMAIN, **case.spec.attributes())
    kind = helper.np_dtype_to_tensor_dtype(case.operands["value"].dtype)
    graph = helper.make_graph(
        [node], "site", inputs, [helper.make_tensor_value_info(name, kind, None) for name in outputs]
    )
    imports = [helper.make_opsetid("", 17), helper.make_opsetid(DOMAIN, 1)]
    return to_model(read(helper.make_model(graph, opset_imports=imports, ir_version=10)))


def check(case: Case, expected: tuple[np.ndarray, ...], tolerance: float) -> None:
    model = site(case)
    write_out(model, lambda spec, present: covers(spec, present, "metal"))
    assert [node.domain for node in model.graph.node] == [DOMAIN]
    module = importer.import_onnx(model, parse_target("metal"), metal_target())
    run = run_model(module, list(case.operands.values()))
    assert run.findings == ()
    assert len(run.launches) == 1
    for got, wanted in zip(run.outputs, expected, strict=True):
        assert got.dtype == wanted.dtype
        assert np.abs(got.astype(np.float64) - wanted).max() <= tolerance * np.abs(wanted).max()


@pytest.mark.parametrize("name", [*WINDOWS, *SLIDES])
def test_every_case_has_a_kernel(name: str) -> None:
    case = {**WINDOWS, **SLIDES}[name]
    assert covers(case.spec, {operand: array.shape for operand, array in case.operands.items()}, "metal")


def test_the_cases_have_every_operand() -> None:
    """No operand and no attribute of the ops is left to bodies because nobody thought of it."""
    cases = [*WINDOWS.values(), *SLIDES.values()]
    for spec, optional in OPTIONAL.items():
        own = [case for case in cases if isinstance(case.spec, spec)]
        assert {name for case in own for name in case.operands} == set(spec.operands)
        assert {name for case in own for name in case.spec.attributes()} >= optional


def test_predicted_weights_for_any_batch() -> None:
    case = SLIDES["overlap-add-half"]
    check(case, (reference.slide_attention(case.spec, case.operands),), 2.0**-11 * 1.1)


def test_two_outputs_for_any_batch() -> None:
    case = WINDOWS["extra-queries"]
    check(case, reference.window_outputs(case.spec, case.operands), 1e-5)


def test_terms_of_the_logits_that_are_float32_beside_halves() -> None:
    """Exporters keep the softmax in float32, and with it bias and mask."""
    case = WINDOWS["run-half"]
    assert isinstance(case.spec, FlashWindowAttention)
    exact = {name: np.float32(1e-3) + case.operands[name].astype(np.float32) for name in ("bias", "mask")}
    case = Case(case.spec, {**case.operands, **exact})
    check(case, reference.window_outputs(case.spec, case.operands), 2.0**-11 * 1.1)
