"""Ways to run a model on NumPy arrays: what verification compares and what bench times."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Protocol

import ml_dtypes
import numpy as np
import onnx

from attnrewrite.verify.bfloat16 import is_bfloat16, write_in_float32

if TYPE_CHECKING:
    from attnrewrite.lowering.qemu import Emulator


class RunnerError(Exception):
    """The engine did not load or run the model; the message is the engine's own, on one line."""


class Runner(Protocol):
    """A loaded model: arrays by input name in, arrays by output name out."""

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]: ...


class OnnxRunner:
    """A model in ONNX Runtime on the CPU, with its graph optimisations on, as a user would have it.

    ONNX Runtime has few operators in bfloat16 there: such a model computes in float32, and so are its outputs.
    threads: intra-op threads; None leaves the choice to ONNX Runtime.
    """

    def __init__(self, model: Path, threads: int | None = None) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4  # what goes wrong is raised, and said by the caller
        if threads is not None:
            options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        try:
            with TemporaryDirectory() as folder:
                if is_bfloat16(onnx.load(model, load_external_data=False)):
                    write_in_float32(model, model := Path(folder) / "model.onnx")
                self._session = onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime raises a family of unrelated classes
            raise RunnerError(_one_line(error)) from error
        self.outputs: Sequence[str] = [output.name for output in self._session.get_outputs()]

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        try:
            results = self._session.run(None, {name: _known_to_numpy(array) for name, array in inputs.items()})
        except Exception as error:
            raise RunnerError(_one_line(error)) from error
        return {name: np.asarray(result) for name, result in zip(self.outputs, results, strict=True)}


class OpenVinoRunner:
    """A model in OpenVINO on the CPU, set to low latency, in float32 even where the CPU has something shorter.

    threads: None leaves the choice to OpenVINO, which must be installed.
    """

    def __init__(self, model: Path, threads: int | None = None) -> None:
        import openvino

        options: dict[str, object] = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
        if threads is not None:
            options["INFERENCE_NUM_THREADS"] = threads
        try:
            compiled = openvino.Core().compile_model(str(model), "CPU", options)
            self._outputs = [(port.any_name, port) for port in compiled.outputs]
            self._request = compiled.create_infer_request()
        except Exception as error:
            raise RunnerError(_one_line(error)) from error

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        try:
            results = self._request.infer(dict(inputs))
        except Exception as error:
            raise RunnerError(_one_line(error)) from error
        return {name: np.asarray(results[port]) for name, port in self._outputs}


class CompiledRunner:
    """An artifact directory on this machine, through attnrewrite.runtime."""

    def __init__(self, directory: Path, threads: int | None = None, cuda_graph: bool = True, device: int = 0) -> None:
        from attnrewrite import runtime

        self._threads = threads
        try:
            self._model = runtime.load(directory, cuda_graph, device)
        except Exception as error:  # whatever TVM's loader raises
            raise RunnerError(_one_line(error)) from error

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        try:
            return self._model.run(inputs, threads=self._threads)
        except Exception as error:
            raise RunnerError(_one_line(error)) from error


class EmulatedRunner:
    """An artifact for aarch64 Linux under qemu-user. Every run starts a Python there: seconds, not milliseconds."""

    def __init__(self, emulator: Emulator, directory: Path) -> None:
        self._emulator = emulator
        self._directory = directory

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        try:
            return self._emulator.run(self._directory, inputs)
        except Exception as error:
            raise RunnerError(_one_line(error)) from error


class MetalRunner:
    """A Metal artifact on this machine's CPU, every access to memory checked. A fault is an error, as on a GPU."""

    def __init__(self, directory: Path) -> None:
        from attnrewrite.emulator import EmulatedModel

        try:
            self._model = EmulatedModel(directory)
        except Exception as error:
            raise RunnerError(_one_line(error)) from error

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        try:
            outputs = self._model.run(inputs)
        except Exception as error:
            raise RunnerError(_one_line(error)) from error
        if self._model.findings:
            raise RunnerError(f"its kernels have faults: {'; '.join(self._model.findings)}")
        return outputs


def _known_to_numpy(array: np.ndarray) -> np.ndarray:
    """Widened where it is of bfloat16."""
    return array.astype(np.float32) if array.dtype == ml_dtypes.bfloat16 else array


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:297] + "..."
