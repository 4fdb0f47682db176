"""The hand-built models are what they claim: a spelling computes its geometry's function, a near miss does not."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto

from tests.models.onnx_near_misses import NEAR_MISSES, UNUSUAL
from tests.models.onnx_spellings import SPELLINGS, STRETCH, Spelling, sample_input

# Reductions here are of 15 to 49 terms of order 1: float32 leaves about 1e-6, float16 about 3e-3 of the largest output.
TOLERANCE: dict[int, float] = {TensorProto.FLOAT: 5e-6, TensorProto.FLOAT16: 5e-3}


def run(model: onnx.ModelProto, inputs: dict[str, np.ndarray]) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(["y"], inputs)[0])


def error(found: np.ndarray, expected: np.ndarray) -> float:
    """Largest difference as a part of the largest expected value."""
    assert found.shape == expected.shape
    return float(np.abs(found - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("name", [*SPELLINGS, *STRETCH])
def test_spelling_computes_the_function_of_its_geometry(name: str) -> None:
    spelling: Spelling = {**SPELLINGS, **STRETCH}[name]
    inputs = sample_input(spelling)
    assert error(run(spelling.model(), inputs), spelling.evaluate(inputs["x"])) < TOLERANCE[spelling.element_type]


@pytest.mark.parametrize("name", [*NEAR_MISSES, *UNUSUAL])
def test_near_miss_computes_something_else(name: str) -> None:
    near_miss = {**NEAR_MISSES, **UNUSUAL}[name]
    inputs = sample_input(near_miss.looks_like)
    difference = error(run(near_miss.model(), inputs), near_miss.looks_like.evaluate(inputs["x"]))
    if near_miss.same_output:
        assert difference < TOLERANCE[TensorProto.FLOAT]
    else:
        assert difference > 1e-2
