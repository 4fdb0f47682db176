"""Ops that no kernel computes, compiled from their bodies: right numbers, and no fault."""

from __future__ import annotations

import pytest

pytest.importorskip("tvm")

from attnrewrite.emulator import metal_target, run_model
from attnrewrite.lowering import importer
from attnrewrite.lowering.kernels import reference
from attnrewrite.lowering.targets import parse_target
from tests.functions.test_predicted_weights import CASES
from tests.lowering.compiling import relative_error
from tests.lowering.test_predicted_weights import TOLERANCE, written_out


@pytest.mark.parametrize("name", ["weights", "overlap-add-strided", "upsampling"])
def test_predicted_weights(name: str) -> None:
    case = CASES[name]
    operands = case.operands()
    run = run_model(
        importer.import_onnx(written_out(name, 2), parse_target("metal"), metal_target()), [*operands.values()]
    )
    assert relative_error(run.outputs[0], reference.slide_attention(case.spec, operands)) <= TOLERANCE
    assert run.findings == ()
