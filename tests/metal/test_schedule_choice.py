"""Which schedule writes each kernel of a model: none may be TVM's generic one, which loops over device memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

tvm = pytest.importorskip("tvm")

from tvm import relax, tirx  # noqa: E402

from attnrewrite.emulator import metal_target  # noqa: E402
from attnrewrite.frontend import onnx as frontend  # noqa: E402
from attnrewrite.lowering import build, importer  # noqa: E402
from attnrewrite.lowering.precision import to_half  # noqa: E402
from attnrewrite.lowering.schedules import gpu  # noqa: E402
from attnrewrite.lowering.targets import parse_target  # noqa: E402
from attnrewrite.pipeline import PASSES, Pipeline  # noqa: E402
from tests.metal import test_schedules  # noqa: E402
from tests.models.build import exported  # noqa: E402

OF_AN_OP = "kernel of an op"


def schedules(module: tvm.IRModule) -> dict[str, str]:
    """Of every function of a fused module: what writes its kernels for Metal."""
    scheduled = gpu.schedule(module, metal_target())
    functions = {g.name_hint: f for g, f in scheduled.functions.items() if isinstance(f, tirx.PrimFunc)}
    return {name: str(func.attrs.get(gpu.MADE_BY, OF_AN_OP)) for name, func in functions.items()}


def fused(path: Path, directory: Path, half: bool) -> tvm.IRModule:
    """A model rewritten by every pass, as calls of fused functions."""
    rewritten = directory / "rewritten.onnx"
    frontend.write(Pipeline(list(PASSES.values())).run(frontend.read(path)).graph, rewritten)
    metal = parse_target("metal")
    model = importer.load_onnx(rewritten, metal)
    if half:
        to_half(model)
    return build.fuse(importer.import_onnx(model, metal, metal_target()), metal_target())


SMALL = [("small_swin", False), ("small_swin", True), ("small_slide", False), ("unfold_net", False), ("resnet", False)]
LARGE = [(name, half) for name in ("swin_tiny_timm", "slide_swin_tiny", "unfold_k7") for half in (False, True)]


@pytest.mark.parametrize(("name", "half"), [*SMALL, *(pytest.param(*row, marks=pytest.mark.slow) for row in LARGE)])
def test_every_kernel_of_a_model_has_a_schedule_of_ours(name: str, half: bool, tmp_path: Path) -> None:
    found = schedules(fused(exported(name, "dynamo"), tmp_path, half))
    assert [function for function, made_by in found.items() if made_by == gpu.GENERIC] == []
    assert gpu.PRODUCT in found.values()
    assert (OF_AN_OP in found.values()) == (name != "resnet")


MADE = {
    "matmul-bias-gelu": {gpu.PRODUCT},
    "conv-3x3": {gpu.PRODUCT},
    "softmax": {gpu.ROWS},
    "layer-norm": {gpu.ROWS},
    "conv-depthwise": {gpu.ROWS},
    "max-pool": {gpu.ROWS},
    "transpose": {gpu.STAGES},
}


@pytest.mark.parametrize("name", MADE)
def test_an_operator_gets_its_schedule(name: str) -> None:
    shapes, compute = test_schedules.CASES[name]
    module = build.fuse(test_schedules.relax_module(shapes, compute, "float32"), metal_target())
    assert set(schedules(module).values()) == MADE[name]


def test_what_is_no_stage_gets_the_generic_schedule() -> None:
    def scatter(x: Any, updates: Any) -> Any:
        return relax.op.scatter_elements(x, relax.const([[3]]), updates)

    module = test_schedules.relax_module([(7, 5), (1, 1)], scatter, "float32")
    assert gpu.GENERIC in schedules(build.fuse(module, metal_target())).values()
