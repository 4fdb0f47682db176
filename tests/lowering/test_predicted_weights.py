"""SlideAttention with predicted weights, which no kernel computes: compiled from its body for every kind of target."""

from __future__ import annotations

import onnx
import pytest

tvm = pytest.importorskip("tvm")


from attnrewrite.functions.spec import DOMAIN  # noqa: E402
from attnrewrite.lowering.kernels import reference  # noqa: E402
from attnrewrite.lowering.kernels.coverage import covers  # noqa: E402
from attnrewrite.lowering.written_out import write_out  # noqa: E402
from tests.functions.test_predicted_weights import CASES  # noqa: E402
from tests.lowering.compiling import compiled, relative_error  # noqa: E402

ON_CPU = [
    "logits-scaled-with-bias", "weights", "three-axes", "replicate", "strided",
    "overlap-add", "overlap-add-strided-uneven", "overlap-add-apart", "upsampling-uneven-with-bias",
]  # fmt: skip
TOLERANCE = 2e-6  # of max |reference|: sums of up to 225 terms, each rounded to 2**-24


def written_out(name: str, batch: int | str) -> onnx.ModelProto:
    model = CASES[name].model(batch=batch)
    write_out(model, covers)
    assert not any(node.domain == DOMAIN for node in model.graph.node)
    return model


@pytest.mark.parametrize("name", ON_CPU)
def test_body_on_the_cpu(name: str) -> None:
    case = CASES[name]
    operands = case.operands()
    found = compiled(written_out(name, "batch"))(*operands.values())
    assert relative_error(found, reference.slide_attention(case.spec, operands)) <= TOLERANCE
