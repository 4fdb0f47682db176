"""Whole rewritten models, every kernel of them Metal source run on the CPU, against what PyTorch computed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

tvm = pytest.importorskip("tvm")

from tvm import relax  # noqa: E402

from attnrewrite.emulator import metal_device, metal_target  # noqa: E402
from attnrewrite.frontend import onnx as frontend  # noqa: E402
from attnrewrite.lowering import build, importer  # noqa: E402
from attnrewrite.lowering.targets import parse_target  # noqa: E402
from attnrewrite.pipeline import PASSES, Pipeline  # noqa: E402
from tests.models.build import exported, references  # noqa: E402

pytestmark = pytest.mark.slow

# float32 through some dozens of layers, in another order of summation.
TOLERANCE = 1e-4


def compiled(path: Path, directory: Path) -> build.Built:
    """The model rewritten by every pass and built for Metal, its kernels runnable here."""
    rewritten = directory / "rewritten.onnx"
    frontend.write(Pipeline(list(PASSES.values())).run(frontend.read(path)).graph, rewritten)
    target = metal_target()
    module = importer.import_onnx(importer.load_onnx(rewritten, parse_target("metal")), parse_target("metal"), target)
    return build.build(module, target)


FIXED = ["small_swin", "small_swin_padded", "small_slide", "unfold_net", "small_swinv2_timm", "resnet", "vit_timm"]
DYNAMIC = ["small_swin", "small_slide", "unfold_net", "vit_timm"]
MODELS = [(name, False) for name in FIXED] + [(name, True) for name in DYNAMIC]


@pytest.mark.parametrize(("name", "dynamic_batch"), MODELS)
def test_model_computes_what_pytorch_does(name: str, dynamic_batch: bool, tmp_path: Path) -> None:
    path = exported(name, "dynamo", dynamic_batch=dynamic_batch)
    with metal_device(recording=True) as device:
        built = compiled(path, tmp_path)
        if name not in ("resnet", "vit_timm"):
            assert built.attention_kernels
        machine: Any = relax.VirtualMachine(built.executable, [tvm.metal(), tvm.cpu()])
        device.watch(machine)
        for reference in references(path)[:2]:
            (expected,) = reference.outputs.values()
            result = machine["main"](*(tvm.runtime.tensor(array, tvm.metal()) for array in reference.inputs.values()))
            got = (result if hasattr(result, "numpy") else result[0]).numpy()
            assert np.abs(got - expected).max() <= TOLERANCE * np.abs(expected).max()
        assert device.findings == ()
