"""SlideAttention with predicted weights, which no kernel computes: compiled from its body for every kind of target."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest

tvm = pytest.importorskip("tvm")

from tvm import relax  # noqa: E402

from attnrewrite.functions.spec import DOMAIN  # noqa: E402
from attnrewrite.lowering import build, importer  # noqa: E402
from attnrewrite.lowering.kernels import reference  # noqa: E402
from attnrewrite.lowering.kernels.coverage import covers  # noqa: E402
from attnrewrite.lowering.targets import parse_target  # noqa: E402
from attnrewrite.lowering.written_out import write_out  # noqa: E402
from tests.functions.test_predicted_weights import CASES  # noqa: E402
from tests.lowering import gpu_emulator  # noqa: E402
from tests.lowering.compiling import compiled, relative_error  # noqa: E402

ON_CPU = [
    "logits-scaled-with-bias", "weights", "three-axes", "replicate", "strided",
    "overlap-add", "overlap-add-strided-uneven", "overlap-add-apart", "upsampling-uneven-with-bias",
]  # fmt: skip
ON_GPU = ["weights", "overlap-add-strided", "upsampling"]
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


@pytest.mark.parametrize("name", ON_GPU)
def test_body_as_metal_source(name: str, tmp_path: Path) -> None:
    case, target = CASES[name], gpu_emulator.metal_target()
    operands = case.operands()
    module = importer.import_onnx(written_out(name, 2), parse_target("metal"), target)
    with gpu_emulator.emulated_builds(tmp_path):
        built = build.build(module, target)
    machine: Any = relax.VirtualMachine(built.executable, tvm.cpu())
    result = machine["main"](*(tvm.runtime.tensor(array) for array in operands.values()))
    found = (result if hasattr(result, "numpy") else result[0]).numpy()
    assert relative_error(found, reference.slide_attention(case.spec, operands)) <= TOLERANCE
