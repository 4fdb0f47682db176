"""Running models in ONNX Runtime and measuring how far apart two outputs are."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import onnxruntime


def run(model: onnx.ModelProto | Path, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Every output by name, on one thread, without ONNX Runtime's own graph rewriting."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    source = str(model) if isinstance(model, Path) else model.SerializeToString()
    session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    names = [o.name for o in session.get_outputs()]
    return dict(zip(names, session.run(names, dict(inputs)), strict=True))


def error(found: np.ndarray, expected: np.ndarray) -> float:
    """max |found - expected| / max |expected|; NaN and infinities must be at the same places."""
    assert found.shape == expected.shape, (found.shape, expected.shape)
    found, expected = found.astype(np.float64), expected.astype(np.float64)
    np.testing.assert_array_equal(np.isfinite(found), np.isfinite(expected))
    inside = np.isfinite(expected)
    scale = np.abs(expected[inside]).max(initial=0.0)
    return float(np.abs(found - expected)[inside].max(initial=0.0) / (scale if scale else 1.0))
