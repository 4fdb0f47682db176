"""Whole models, compiled to artifacts for Metal and run from what these hold, against what PyTorch computed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("tvm")

import attnrewrite
from attnrewrite.emulator import EmulatedModel
from tests.models.build import exported, references
from tests.running import error

pytestmark = pytest.mark.slow

# float32 through some dozens of layers, in another order of summation; float16 rounds what lies between layers.
TOLERANCE = {"fp32": 1e-4, "fp16": 2e-2}

FIXED = ["small_swin_padded", "small_swinv2_timm", "resnet"]
DYNAMIC = ["small_swin", "small_slide", "unfold_net", "vit_timm"]
HALF = ["small_swin", "small_slide"]
WHOLE = ["swin_tiny_timm"]
CASES = [
    *((name, False, "fp32") for name in (*FIXED, *WHOLE)),
    *((name, True, "fp32") for name in DYNAMIC),
    *((name, False, "fp16") for name in HALF),
]


@pytest.mark.parametrize(("name", "dynamic_batch", "precision"), CASES)
def test_model_computes_what_pytorch_does(name: str, dynamic_batch: bool, precision: str, tmp_path: Path) -> None:
    path = exported(name, "dynamo", dynamic_batch=dynamic_batch)
    result = attnrewrite.optimize(path, target="metal", precision=precision, verify=False)
    attention = result.report.compile["attention_kernels"]
    assert (attention > 0) == (name not in ("resnet", "vit_timm"))
    result.save(tmp_path / "artifact")
    model = EmulatedModel(tmp_path / "artifact")
    for reference in references(path)[: 1 if name in WHOLE else 2]:
        (expected,) = reference.outputs.values()
        (found,) = model.run(reference.inputs).values()
        assert error(found, expected.astype(np.float32)) <= TOLERANCE[precision]
    assert model.findings == ()
