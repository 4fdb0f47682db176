"""One run of a kernel or of a model on the emulated device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tvm
from tvm import relax, tirx

from attnrewrite.emulator.device import Launch, metal_device, metal_target
from attnrewrite.lowering import build, limits


@dataclass(frozen=True)
class Run:
    """launches and findings are empty where nothing was recorded; see `metal_device`."""

    outputs: tuple[np.ndarray, ...]
    launches: tuple[Launch, ...]
    findings: tuple[str, ...]


def run_function(
    function: tirx.PrimFunc,
    operands: Sequence[np.ndarray],
    outputs: Sequence[tuple[Sequence[int], str]],
    *,
    recording: bool = True,
    order: int = 0,
) -> Run:
    """A scheduled function, for `metal_target()`, on its operands.

    outputs: shape and dtype of the parameters that follow the operands, which the function writes.
    """
    with metal_device(recording=recording, order=order) as device:
        library = tvm.tirx.build(tvm.IRModule({"run": function}), target=metal_target(), pipeline=limits.PIPELINE)
        results = [tvm.runtime.empty(tuple(shape), dtype, tvm.metal()) for shape, dtype in outputs]
        library["run"](*_to_device(operands), *results)
        return Run(tuple(result.numpy() for result in results), device.launches, device.findings)


def run_model(module: tvm.IRModule, inputs: Sequence[np.ndarray], *, recording: bool = True, order: int = 0) -> Run:
    """A Relax module as the compiler builds it for Metal, on its inputs."""
    with metal_device(recording=recording, order=order) as device:
        executable = build.build(module, metal_target()).executable
        machine = relax.VirtualMachine(executable, [tvm.metal(), tvm.cpu()])
        if recording:
            device.watch(machine)
        arrays = _to_device(inputs)
        device.clear()
        result = machine[build.ENTRY](*arrays)
        outputs = [result] if hasattr(result, "numpy") else list(result)
        return Run(tuple(output.numpy() for output in outputs), device.launches, device.findings)


def _to_device(arrays: Sequence[np.ndarray]) -> list[Any]:
    return [tvm.runtime.tensor(array, tvm.metal()) for array in arrays]
