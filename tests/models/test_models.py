"""The exported test models compute in ONNX Runtime what PyTorch computes; comparisons with them stand on this."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

pytest.importorskip("torch")

from examples.exporting import EXPORTERS, OPSETS, export
from tests.models.build import MODELS, SMALL, exported, references

FULL = tuple(name for name in MODELS if name not in SMALL)
# Of the largest output. The deepest models differ by 6e-7 in float32; in float16 each of some 50 layers may round to
# 2**-11, and 7e-4 was the most seen.
FLOAT32, FLOAT16 = 1e-5, 5e-3
OPSET_CASES = [
    (name, exporter, opset)
    for name in ("small_swin_padded", "small_slide", "unfold_k3_30x41")
    for exporter in EXPORTERS
    for opset in OPSETS[exporter]
    if opset >= 11
]


def worst_error(path: Path) -> float:
    """Largest difference between ONNX Runtime and PyTorch over all references, as a part of the largest output."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    errors = []
    for reference in references(path):
        found = session.run(["y"], reference.inputs)[0].astype(np.float32)
        expected = reference.outputs["y"]
        assert found.shape == expected.shape
        errors.append(np.abs(found - expected).max() / np.abs(expected).max())
    return float(np.max(errors))  # NaN if one is


def softmaxes(path: Path) -> int:
    return Counter(node.op_type for node in onnx.load(path, load_external_data=False).graph.node)["Softmax"]


def check(path: Path, name: str, bound: float = FLOAT32) -> None:
    assert worst_error(path) <= bound
    assert softmaxes(path) == MODELS[name].softmaxes


@pytest.mark.parametrize("exporter", EXPORTERS)
@pytest.mark.parametrize("name", SMALL)
def test_small_model(name: str, exporter: str) -> None:
    """With a symbolic batch; tests/passes compares some with batch 1."""
    path = exported(name, exporter, dynamic_batch=True)
    assert [len(reference.inputs["x"]) for reference in references(path)] == [1, 2, 5]
    check(path, name)


@pytest.mark.slow
@pytest.mark.parametrize("dynamic_batch", [False, True])
@pytest.mark.parametrize("exporter", EXPORTERS)
@pytest.mark.parametrize("name", FULL)
def test_full_model(name: str, exporter: str, dynamic_batch: bool) -> None:
    check(exported(name, exporter, dynamic_batch=dynamic_batch), name)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "exporter", "opset"), OPSET_CASES)
def test_opset(name: str, exporter: str, opset: int) -> None:
    path = exported(name, exporter, opset=opset)
    assert [entry.version for entry in onnx.load(path).opset_import if entry.domain == ""] == [opset]
    check(path, name)


@pytest.mark.parametrize("exporter", EXPORTERS)
@pytest.mark.parametrize("name", ["small_swin_padded", "small_swin_fp32_softmax", "small_slide_fp32_softmax"])
def test_float16(name: str, exporter: str) -> None:
    path = exported(name, exporter, half=True)
    assert onnx.load(path).graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.FLOAT16
    check(path, name, FLOAT16)


@pytest.mark.parametrize("exporter", EXPORTERS)
def test_external_data(exporter: str) -> None:
    path = exported("small_swin_padded", exporter, external_data=True)
    weights = onnx.load(path, load_external_data=False).graph.initializer
    assert any(weight.data_location == onnx.TensorProto.EXTERNAL for weight in weights)
    assert path.with_name(f"{path.name}.data").is_file()
    check(path, "small_swin_padded")


def test_an_opset_the_exporter_cannot_write_is_refused(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    with pytest.raises(ValueError, match="the dynamo exporter writes opset 18 to 23, got opset=11"):
        export(torch.nn.Identity(), [torch.zeros(1)], tmp_path / "model.onnx", opset=11)
    assert not list(tmp_path.iterdir())
