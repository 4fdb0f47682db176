"""Models in bfloat16: kernels run in the emulator with tensor cores, and compiled by nvcc.

What passes between kernels has eight bits; within a kernel nothing is rounded, so its result is off by one rounding.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest

tvm = pytest.importorskip("tvm")

from attnrewrite.emulator import metal_target, run_model  # noqa: E402
from attnrewrite.errors import CompilerError  # noqa: E402
from attnrewrite.frontend import onnx as frontend  # noqa: E402
from attnrewrite.lowering import build, importer  # noqa: E402
from attnrewrite.lowering.cuda_compiler import embedded_cubins  # noqa: E402
from attnrewrite.lowering.precision import halved, to_half  # noqa: E402
from attnrewrite.lowering.schedules import gpu_emit  # noqa: E402
from attnrewrite.lowering.split_linear import split_linear  # noqa: E402
from attnrewrite.lowering.targets import parse_target  # noqa: E402
from attnrewrite.pipeline import PASSES, Pipeline  # noqa: E402
from tests import tiny  # noqa: E402
from tests.cuda.compiling import cuda_target  # noqa: E402
from tests.lowering.compiling import normal, reference, relative_error, small_network  # noqa: E402
from tests.metal import test_schedules  # noqa: E402
from tests.models.build import exported, references  # noqa: E402

ROUNDED_ONCE = 2.0**-8 * 1.001
# Of some dozens of kernels, whose roundings add up as a random walk.
MODEL = 2e-2


@pytest.fixture
def tensor_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """The emulator takes the place of a CUDA device, within Metal's limits."""
    device = replace(gpu_emit.Device.of(metal_target()), target=cuda_target("sm_80"))
    monkeypatch.setattr(gpu_emit.Device, "of", lambda target: device)


@pytest.mark.usefixtures("tensor_cores")
@pytest.mark.parametrize(
    "name",
    [
        "matmul-bias-residual",
        "conv-padded",
        "conv-depthwise",
        "softmax",
        "softmax-too-long-for-shared-memory",
        "layer-norm",
        "mean-of-pixels",
    ],
)
def test_a_kernel_rounds_its_result_alone(name: str) -> None:
    test_schedules.compare(name, "bfloat16", ROUNDED_ONCE)


def in_bfloat16(model: onnx.ModelProto) -> onnx.ModelProto:
    to_half(model, "bf16")
    split_linear(model)
    return model


def emulated(model: onnx.ModelProto, *arrays: np.ndarray) -> np.ndarray:
    """The first output of a model, its operators as those of a Metal artifact."""
    run = run_model(importer.import_onnx(in_bfloat16(model), parse_target("metal"), metal_target()), arrays)
    assert run.findings == ()
    return run.outputs[0]


def network() -> onnx.ModelProto:
    """A convolution, norm, linear layer with GELU and softmax of logits that are no larger than in models."""
    model = small_network()
    (weight,) = (tensor for tensor in model.graph.initializer if tensor.name == "w1")
    weight.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(weight) / 4, "w1"))
    return model


@pytest.mark.usefixtures("tensor_cores")
def test_a_network_of_all_kinds_of_layers() -> None:
    x = normal(1, 3, 13, 10)
    found = emulated(network(), x)
    assert found.dtype == np.float32
    assert 1e-4 < relative_error(found, reference(network(), x)) <= MODEL


@pytest.mark.usefixtures("tensor_cores")
def test_a_model_that_is_bfloat16_in_its_file() -> None:
    model, x = (
        tiny.linear(tokens=16, channels=32, dtype=ml_dtypes.bfloat16),
        normal(1, 16, 32, dtype=ml_dtypes.bfloat16),
    )
    (weight, bias) = map(onnx.numpy_helper.to_array, model.graph.initializer)
    expected = x.astype(np.float64) @ weight.astype(np.float64) + bias.astype(np.float64)
    run = run_model(importer.import_onnx(model, parse_target("metal"), metal_target()), [x])
    assert run.outputs[0].dtype == ml_dtypes.bfloat16
    assert relative_error(run.outputs[0], expected) <= ROUNDED_ONCE


def rewritten(name: str, folder: Path) -> onnx.ModelProto:
    path = folder / "rewritten.onnx"
    frontend.write(Pipeline(list(PASSES.values())).run(frontend.read(exported(name, "dynamo"))).graph, path)
    return importer.load_onnx(path, parse_target("cuda:sm_80"))


@pytest.mark.slow
@pytest.mark.usefixtures("tensor_cores")
@pytest.mark.parametrize("name", ["small_swin", "small_slide", "resnet"])
def test_model_computes_what_pytorch_does(name: str, tmp_path: Path) -> None:
    (expected,) = (given := references(exported(name, "dynamo"))[0]).outputs.values()
    found = emulated(rewritten(name, tmp_path), *given.inputs.values())
    assert relative_error(found, expected) <= MODEL


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("small_slide", "resnet")]


@pytest.mark.parametrize("name", ["network", *SLOW])
def test_it_compiles_for_gpus_without_spills(name: str, tmp_path: Path) -> None:
    model = network() if name == "network" else rewritten(name, tmp_path)
    target = parse_target("cuda:sm_80+sm_90")
    tvm_target = build.tvm_target(target)
    try:
        with embedded_cubins(target.architectures) as cubins:
            build.build(importer.import_onnx(in_bfloat16(model), target, tvm_target), tvm_target)
    except CompilerError as error:
        pytest.skip(str(error))
    assert {kernel.arch for kernel in cubins.kernels} == set(target.architectures)
    assert [kernel for kernel in cubins.kernels if kernel.spills] == []


def test_numbers_beyond_its_range() -> None:
    """A float32 beyond bfloat16's largest number would be rounded to infinity."""
    given: Any = np.array([3.4e38, -3.4e38, np.inf, 1.0], np.float32)
    largest = float(ml_dtypes.finfo(ml_dtypes.bfloat16).max)
    assert halved(given, ml_dtypes.bfloat16).astype(float).tolist() == [largest, -largest, np.inf, 1.0]
