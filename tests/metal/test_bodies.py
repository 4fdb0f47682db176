"""What no kernel computes, compiled from its body: right numbers, and no fault."""

from __future__ import annotations

from functools import partial

import pytest

pytest.importorskip("tvm")

from attnrewrite.emulator import metal_target, run_model
from attnrewrite.functions.spec import DOMAIN
from attnrewrite.lowering import importer
from attnrewrite.lowering.kernels import reference
from attnrewrite.lowering.kernels.coverage import covers
from attnrewrite.lowering.targets import parse_target
from attnrewrite.lowering.written_out import write_out
from tests.functions.test_predicted_weights import Case, op
from tests.lowering.compiling import relative_error
from tests.lowering.test_predicted_weights import TOLERANCE


@pytest.mark.parametrize(("feature_size", "kernel_size"), [((6, 7), (3, 1)), ((9,), (3,))])
def test_blocks_that_move_inward_and_overlap(feature_size: tuple[int, ...], kernel_size: tuple[int, ...]) -> None:
    case = Case(op(feature_size, kernel_size, overlap_add=True, border="inward"))
    model = case.model()
    write_out(model, partial(covers, device="metal"))
    assert not any(node.domain == DOMAIN for node in model.graph.node)
    operands = case.operands()
    run = run_model(importer.import_onnx(model, parse_target("metal"), metal_target()), [*operands.values()])
    assert relative_error(run.outputs[0], reference.slide_attention(case.spec, operands)) <= TOLERANCE
    assert run.findings == ()
