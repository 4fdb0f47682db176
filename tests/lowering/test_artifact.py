"""Whole artifacts: compiled by the child process, loaded by the runtime, and what is said when either cannot."""

from __future__ import annotations

import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

import attnrewrite
from attnrewrite import runtime
from attnrewrite.errors import CompilerError, UserError
from attnrewrite.lowering import compile as lowering
from attnrewrite.lowering.compile import compile_model
from attnrewrite.lowering.qemu import Missing, find_emulator
from attnrewrite.lowering.targets import parse_target
from tests.lowering.compiling import artifact, model, node, normal, reference, relative_error, small_network

tvm = pytest.importorskip("tvm")


@pytest.fixture(scope="module")
def on_cpu(tmp_path_factory):
    directory = tmp_path_factory.mktemp("artifact") / "cpu"
    report = artifact(small_network("batch"), directory, "cpu", source_sha256="0" * 64)
    return directory, report


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_one_library_for_every_batch(on_cpu, batch):
    directory, _ = on_cpu
    x = normal(batch, 3, 13, 10)
    result = runtime.load(directory).run({"x": x}, threads=2)
    assert relative_error(result["y"], reference(small_network("batch"), x)) <= 1e-5


def test_large_outputs_belong_to_the_caller(tmp_path):
    """Two outputs of 1 MB, of which one is the input itself: no array shares memory, and later runs touch none."""
    graph = model([node("Relu", "x", "y")], {"x": ["batch", 512, 512]})
    graph.graph.output.append(onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["batch", 512, 512]))
    artifact(graph, tmp_path, "cpu")
    loaded = runtime.load(tmp_path)
    aligned = runtime.empty_aligned((1, 512, 512))
    aligned[...] = normal(1, 512, 512)
    before = aligned.copy()
    first = loaded.run({"x": aligned})
    second = loaded.run({"x": normal(2, 512, 512)})
    arrays = [aligned, *first.values(), *second.values()]
    assert not any(np.may_share_memory(a, b) for i, a in enumerate(arrays) for b in arrays[:i])
    np.testing.assert_array_equal(first["y"], np.maximum(before, 0))
    np.testing.assert_array_equal(first["x"], before)
    for output in first.values():
        output += 1
    del loaded
    np.testing.assert_array_equal(aligned, before)
    np.testing.assert_array_equal(second["y"], np.maximum(normal(2, 512, 512), 0))


def test_a_constant_output_is_the_callers_own_copy(tmp_path):
    graph = model([node("Identity", "w", "c"), node("Relu", "x", "y")], {"x": [2, 3]}, {"w": normal(600, 600)})
    graph.graph.output.append(onnx.helper.make_tensor_value_info("c", onnx.TensorProto.FLOAT, [600, 600]))
    artifact(graph, tmp_path, "cpu")
    loaded = runtime.load(tmp_path)
    for _ in range(2):
        constant = loaded.run({"x": normal(2, 3)})["c"]
        np.testing.assert_array_equal(constant, normal(600, 600))
        constant[...] = 0


def test_manifest_and_report_agree(on_cpu):
    directory, report = on_cpu
    manifest = json.loads((directory / "manifest.json").read_text())
    assert manifest["format"] == 1
    assert manifest["inputs"] == [{"name": "x", "dtype": "float32", "shape": ["batch", 3, 13, 10]}]
    assert manifest["outputs"] == [{"name": "y", "dtype": "float32", "shape": ["batch", 7, 5, 19]}]
    assert manifest["source_sha256"] == "0" * 64
    assert manifest["versions"]["apache-tvm"] == lowering.TVM_VERSION
    assert manifest["library"] == report.library
    assert (directory / report.library).stat().st_size == report.library_bytes
    assert sorted(p.name for p in directory.iterdir()) == ["manifest.json", "model.so", "source.onnx"]


WRONG_INPUTS = {
    "missing": ({}, "input 'x' is missing; the model takes x: float32[batch, 3, 13, 10]"),
    "unknown": ({"x": normal(1, 3, 13, 10), "z": normal(1)}, "the model has no input 'z'"),
    "dtype": ({"x": np.zeros((1, 3, 13, 10))}, "input 'x' must be float32, got float64"),
    "rank": ({"x": normal(3, 13, 10)}, "input 'x' must have shape [batch, 3, 13, 10], got shape [3, 13, 10]"),
    "extent": ({"x": normal(1, 3, 13, 11)}, "input 'x' must have shape [batch, 3, 13, 10], got shape [1, 3, 13, 11]"),
    "empty": ({"x": normal(0, 3, 13, 10)}, "input 'x' must have shape"),
    "no tensor": ({"x": [1.0]}, "input 'x' must be a NumPy array or a DLPack tensor, got list"),
}


@pytest.mark.parametrize("kind", WRONG_INPUTS)
def test_wrong_inputs(on_cpu, kind):
    inputs, sentence = WRONG_INPUTS[kind]
    with pytest.raises(UserError) as raised:
        runtime.load(on_cpu[0]).run(inputs)
    assert str(raised.value).startswith(sentence)


def test_dlpack_and_strided_inputs(on_cpu):
    loaded = runtime.load(on_cpu[0])
    x = normal(1, 3, 13, 10)

    class Foreign:
        def __dlpack__(self, **options):
            return x.__dlpack__(**options)

        def __dlpack_device__(self):
            return x.__dlpack_device__()

    strided = np.asfortranarray(x)
    expected = loaded.run({"x": x})["y"]
    np.testing.assert_array_equal(loaded.run({"x": Foreign()})["y"], expected)
    np.testing.assert_array_equal(loaded.run({"x": strided})["y"], expected)


def test_thread_count_must_be_positive(on_cpu):
    with pytest.raises(UserError, match="at least 1, got 0"):
        runtime.load(on_cpu[0]).run({"x": normal(1, 3, 13, 10)}, threads=0)


def test_every_core_gets_a_thread(on_cpu):
    code = f"""
import numpy as np, os, tvm
from attnrewrite import runtime
model = runtime.load({str(on_cpu[0])!r})
model.run({{"x": np.ones((1, 3, 13, 10), np.float32)}})
print(tvm.get_global_func("runtime.NumThreads")() == len(os.sched_getaffinity(0)))
"""
    environment = {k: v for k, v in os.environ.items() if k != "TVM_NUM_THREADS"}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert run.stdout.strip() == "True", run.stderr


def test_runtime_imports_no_compiler(on_cpu):
    code = f"""
import sys
sys.modules.update({{name: None for name in ("onnx", "onnxruntime", "torch", "typer", "onnx_graphsurgeon", "ziglang")}})
import numpy as np
from attnrewrite import runtime
print(runtime.load({str(on_cpu[0])!r}).run({{"x": np.ones((1, 3, 13, 10), np.float32)}})["y"].shape)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout.strip() == "(1, 7, 5, 19)", run.stderr


def test_directories_that_hold_no_model(tmp_path):
    with pytest.raises(UserError, match="is no directory"):
        runtime.load(tmp_path / "nothing")
    with pytest.raises(UserError, match=r"holds no manifest\.json"):
        runtime.load(tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        runtime.load(tmp_path)
    (tmp_path / "manifest.json").write_text('{"format": 99}')
    with pytest.raises(UserError, match="not of format 1"):
        runtime.load(tmp_path)
    (tmp_path / "manifest.json").write_text('{"format": 1, "target": "cpu"}')
    with pytest.raises(UserError, match="damaged"):
        runtime.load(tmp_path)


def test_half_precision_keeps_the_interface(tmp_path):
    proto = small_network()
    report = artifact(proto, tmp_path, "cpu", precision="fp16")
    assert [t.dtype for t in (*report.inputs, *report.outputs)] == ["float32", "float32"]
    x = normal(1, 3, 13, 10)
    error = relative_error(runtime.load(tmp_path).run({"x": x})["y"], reference(proto, x))
    assert 1e-6 < error <= 2e-2  # logits of about 10 with 11 bits: 5e-3 each, twice in the exponent


def with_large_weights() -> onnx.ModelProto:
    """Of the small network's interface; one weight is used twice, and one is an output."""
    nodes = [
        node("MatMul", "x w", "a"),
        node("Relu", "a", "b"),
        node("Mul", "b k", "m"),
        node("Add", "m k", "y"),
        node("Identity", "k", "c"),
    ]
    graph = model(nodes[:-1], {"x": ["batch", 3, 13, 10]}, {"w": normal(10, 300), "k": normal(13, 300)})
    graph.graph.node.append(nodes[-1])
    graph.graph.output.append(onnx.helper.make_tensor_value_info("c", onnx.TensorProto.FLOAT, [13, 300]))
    return graph


@pytest.fixture(scope="module")
def weights_beside(tmp_path_factory):
    directory = tmp_path_factory.mktemp("beside")
    return directory, artifact(with_large_weights(), directory, "cpu", separate_weights=0)


def test_weights_beside_the_library(weights_beside):
    directory, report = weights_beside
    assert report.weights_file == "weights.bin"
    assert [weight.offset % runtime.ALIGNMENT for weight in report.weights] == [0] * len(report.weights)
    assert report.weights_bytes == (directory / "weights.bin").stat().st_size >= 4 * (10 + 13) * 300
    assert runtime.read_manifest(directory).weights == report.weights
    assert report.library_bytes < 60_000
    loaded = runtime.load(directory)
    for batch in (1, 2):
        x = normal(batch, 3, 13, 10)
        results = loaded.run({"x": x})
        assert relative_error(results["y"], reference(with_large_weights(), x)) <= 1e-5
        np.testing.assert_array_equal(results["c"], normal(13, 300))
        results["c"][...] = 0  # the caller's own: neither the next run nor the file may notice
    assert normal(13, 300).tobytes() in (directory / "weights.bin").read_bytes()


def test_fewer_weights_than_asked_for_stay_inside(tmp_path):
    report = artifact(with_large_weights(), tmp_path, "cpu", separate_weights=4 * (10 + 13) * 320 + 1)
    assert (report.weights, report.weights_file, report.beside) == ((), None, ())
    x = normal(1, 3, 13, 10)
    found = runtime.load(tmp_path).run({"x": x})["y"]
    assert relative_error(found, reference(with_large_weights(), x)) <= 1e-5


def test_weights_that_are_not_all_there(weights_beside, tmp_path):
    directory = Path(shutil.copytree(weights_beside[0], tmp_path / "copy"))
    content = (directory / "weights.bin").read_bytes()
    for left in (len(content) - 1, 0):
        (directory / "weights.bin").write_bytes(content[:left])
        with pytest.raises(UserError, match=rf"weights\.bin is truncated: {left} bytes, {len(content)} expected"):
            runtime.load(directory)
    (directory / "weights.bin").unlink()
    with pytest.raises(UserError, match=r"copy holds no weights\.bin, which its manifest names"):
        runtime.load(directory)


@pytest.mark.parametrize("target", ["arm", "arm:cortex-a76"])
def test_arm_library_is_aarch64_elf(tmp_path, target):
    artifact(small_network(), tmp_path, target)
    header = (tmp_path / "model.so").read_bytes()[:20]
    assert header[:5] == b"\x7fELF\x02"
    assert struct.unpack("<H", header[18:20]) == (183,)  # EM_AARCH64
    with pytest.raises(UserError, match=r"compiled for arm.* cannot be loaded on this machine"):
        runtime.load(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("separate_weights", [0, None], ids=["weights beside", "weights inside"])
def test_arm_library_runs_under_qemu(tmp_path, separate_weights):
    emulator = find_emulator()
    if isinstance(emulator, Missing):
        pytest.skip(emulator.reason)
    proto = with_large_weights() if separate_weights == 0 else small_network("batch")
    report = artifact(proto, tmp_path, "arm", separate_weights=separate_weights)
    assert bool(report.weights) == (separate_weights == 0)
    x = normal(2, 3, 13, 10)
    assert relative_error(emulator.run(tmp_path, {"x": x})["y"], reference(proto, x)) <= 1e-5


@pytest.mark.slow
def test_onnxruntime_runs_under_qemu():
    emulator = find_emulator()
    if isinstance(emulator, Missing):
        pytest.skip(emulator.reason)
    version = onnxruntime.__version__
    asked = "import onnxruntime, platform; print(onnxruntime.__version__, platform.machine())"
    folder = emulator.onnxruntime(version)
    printed = emulator.python(["-c", asked], what="asking", path=[folder], processor="neoverse-n1")
    assert printed.split() == [version, "aarch64"]
    with pytest.raises(CompilerError, match="asking failed under qemu: ZeroDivisionError"):
        emulator.python(["-c", "1 / 0"], what="asking")


@pytest.mark.parametrize("target", ["metal:m2", "arm:apple-m1"])
def test_apple_library_is_a_signed_arm64_dylib(tmp_path, target):
    report = artifact(small_network("batch"), tmp_path, target)
    data = (tmp_path / report.library).read_bytes()
    magic, cpu, _, kind, commands, _ = struct.unpack("<6I", data[:24])
    assert (report.library, magic, cpu, kind) == ("model.dylib", 0xFEEDFACF, 0x0100000C, 6)
    at, found = 32, {}
    for _ in range(commands):
        command, size = struct.unpack("<2I", data[at : at + 8])
        found[command] = data[at : at + size]
        at += size
    assert 0x1D in found  # LC_CODE_SIGNATURE: Apple's chips load nothing unsigned
    assert b"@rpath/model.dylib" in found[0xD]  # LC_ID_DYLIB
    assert (b"metal_stdlib" in data) == (target == "metal:m2")


def test_crash_of_the_compiler_is_one_sentence(tmp_path, monkeypatch):
    path = tmp_path / "model.onnx"
    onnx.save(small_network(), path)
    crash = "import os, sys; print('the last words', file=sys.stderr, flush=True); os.kill(os.getpid(), 11)"
    monkeypatch.setattr(sys, "executable", _executable(tmp_path, crash))
    with pytest.raises(CompilerError) as raised:
        compile_model(path, parse_target("cpu"), tmp_path)
    assert str(raised.value) == f"the compiler crashed ({signal.SIGSEGV.name}) while compiling model.onnx for cpu"
    assert raised.value.__notes__ == ["the last words"]
    assert not (tmp_path / "manifest.json").exists()
    assert not list(tmp_path.glob(".compile-*"))


def _executable(folder: Path, code: str) -> str:
    """Something to stand for the Python interpreter: whatever it is asked, it runs `code`."""
    path = folder / "python"
    path.write_text(f'#!/bin/sh\nexec {sys.executable} -c "{code}"\n')
    path.chmod(0o755)
    return str(path)


def test_operator_without_converter_is_named(tmp_path):
    nodes = [node("Frobnicate", "x", "y", domain="other")]
    with pytest.raises(CompilerError, match=r"no converter for other\.Frobnicate"):
        artifact(model(nodes, {"x": [1, 2]}), tmp_path, "cpu")


def test_other_tvm_version_is_refused(monkeypatch):
    monkeypatch.setattr(lowering, "TVM_VERSION", "9.9")
    with pytest.raises(CompilerError, match=r"compiling needs apache-tvm 9\.9, found .*pip install apache-tvm==9\.9"):
        lowering.check_tvm_version()


def test_unknown_precision(tmp_path):
    with pytest.raises(UserError, match="unknown precision 'int3'; known are fp32, fp16"):
        artifact(small_network(), tmp_path, "cpu", precision="int3")


def test_cuda_is_loaded_from_where_pip_puts_it(monkeypatch, tmp_path):
    """Also where TVM was imported before, and could not load its part for CUDA then."""
    library = tmp_path / "nvidia" / "cu13" / "lib" / "libcudart.so.13"
    library.parent.mkdir(parents=True)
    library.touch()
    loaded = []

    def load(path):
        loaded.append(Path(path).name)
        if loaded == ["libtvm_runtime_cuda.so"]:
            raise OSError("libcudart.so.13: cannot open shared object file")

    monkeypatch.setattr("ctypes.CDLL", load)
    monkeypatch.setattr("sys.path", [str(tmp_path / "nothing"), str(tmp_path)])
    assert runtime.load_cuda() is None
    assert loaded == ["libtvm_runtime_cuda.so", "libcudart.so.13", "libtvm_runtime_cuda.so"]
    assert runtime.load_cuda() is None
    assert loaded[3:] == ["libtvm_runtime_cuda.so"]


def test_what_is_missing_for_cuda_is_said(monkeypatch, on_cpu, tmp_path):
    def load(path):
        raise OSError("libcudart.so.13: cannot open shared object file")

    monkeypatch.setattr("ctypes.CDLL", load)
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    missing = runtime.load_cuda()
    assert "(libcudart.so.13: cannot open shared object file)" in missing
    assert "pip install nvidia-cuda-runtime" in missing
    shutil.copytree(on_cpu[0], tmp_path / "model")
    manifest = json.loads((tmp_path / "model" / runtime.MANIFEST_NAME).read_text())
    (tmp_path / "model" / runtime.MANIFEST_NAME).write_text(json.dumps(manifest | {"device": "cuda"}))
    with pytest.raises(UserError, match="no cuda device: TVM's part for CUDA cannot be loaded"):
        runtime.load(tmp_path / "model")


class FakeGpus:
    """CUDA devices whose memory is this machine's, and CUDA's functions that say which is current."""

    def __init__(self, monkeypatch, number=2):
        self.current, self.made_current = 0, []
        absent = types.SimpleNamespace(exist=False)
        monkeypatch.setattr(tvm, "device", lambda kind, n: tvm.cpu(n) if n < number else absent)
        monkeypatch.setattr("ctypes.CDLL", lambda path: self)

    def cudaGetDevice(self, found):
        found._obj.value = self.current

    def cudaSetDevice(self, device):
        self.current = getattr(device, "value", device)
        self.made_current.append(self.current)


@pytest.fixture
def for_cuda(on_cpu, tmp_path):
    """An artifact for CUDA by its manifest; its library is a CPU's."""
    shutil.copytree(on_cpu[0], tmp_path / "model")
    manifest = json.loads((tmp_path / "model" / runtime.MANIFEST_NAME).read_text())
    changed = manifest | {"device": "cuda", "target": "cuda:sm_80"}
    (tmp_path / "model" / runtime.MANIFEST_NAME).write_text(json.dumps(changed))
    return tmp_path / "model"


def test_a_model_runs_on_the_gpu_that_is_asked_for(monkeypatch, for_cuda, on_cpu):
    """With it as the current one, and that of before afterwards: TVM captures graphs for the current device."""
    gpus = FakeGpus(monkeypatch)
    x = {"x": normal(2, 3, 13, 10)}
    expected = runtime.load(on_cpu[0]).run(x)
    model = runtime.load(for_cuda, device=1)
    found = model.run(x)
    assert all(np.array_equal(found[name], expected[name]) for name in expected)
    assert gpus.made_current == [1, 0]
    outputs = model.run_on_device(*(tvm.runtime.tensor(x[tensor.name], tvm.cpu(1)) for tensor in model.inputs))
    assert [output.device for output in outputs] == [tvm.cpu(1)] * len(outputs)


def test_what_gpus_there_are_is_said(monkeypatch, for_cuda, on_cpu):
    FakeGpus(monkeypatch)
    sentence = "compiled for cuda:sm_80, and this machine has no cuda device 2: it has 2, numbered from 0"
    for load in (runtime.load, attnrewrite.load):
        with pytest.raises(UserError, match=sentence):
            load(for_cuda, device=2)
    with pytest.raises(UserError, match="compiled for cpu, where there is no device 1 to choose"):
        runtime.load(on_cpu[0], device=1)
