"""A compiled artifact for Metal is run from its own files: its source, its byte code, its host code."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner, Result

pytest.importorskip("tvm")

import attnrewrite
import attnrewrite.lowering.compile as lowering
from attnrewrite.cli import app
from attnrewrite.emulator import EmulatedModel
from attnrewrite.errors import CompilerError, UserError
from tests import tiny
from tests.lowering.compiling import model, node, normal
from tests.models.onnx_spellings import SPELLINGS
from tests.running import error, run


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("original") / "model.onnx", SPELLINGS["window-shifted"].model())


@pytest.fixture(scope="module")
def artifact(original: Path) -> Path:
    directory = original.with_name("model-metal")
    attnrewrite.optimize(original, target="metal", verify=False).save(directory)
    return directory


def verify(original: Path, directory: Path) -> Result:
    return CliRunner().invoke(app, ["verify", str(original), str(directory), "--emulate", "--json"])


def test_verify_runs_the_library(original: Path, artifact: Path) -> None:
    done = verify(original, artifact)
    assert done.exit_code == 0, done.stderr
    comparisons = json.loads(done.stdout)["comparisons"]
    assert sum(comparison["candidate"] == "compiled" for comparison in comparisons) == 3


def test_without_the_option_it_is_not_run(original: Path, artifact: Path) -> None:
    done = CliRunner().invoke(app, ["verify", str(original), str(artifact), "--json"])
    (note,) = json.loads(done.stdout)["notes"]
    assert "the library for metal was not run" in note and "--emulate" in note


def changed(artifact: Path, directory: Path, before: bytes, after: bytes) -> Path:
    """The artifact with some bytes of its library in place of others, wherever these stand."""
    shutil.copytree(artifact, directory)
    library = directory / "model.dylib"
    data = library.read_bytes()
    assert len(before) == len(after) and before in data
    library.write_bytes(data.replace(before, after))
    return directory


def test_it_is_the_librarys_own_source_that_runs(original: Path, artifact: Path, tmp_path: Path) -> None:
    done = verify(original, changed(artifact, tmp_path / "changed", b" = exp(", b" = tan("))
    assert done.exit_code == 1
    assert "the compiled model" in done.stderr


def test_a_fault_in_a_kernel_fails(original: Path, artifact: Path, tmp_path: Path) -> None:
    done = verify(original, changed(artifact, tmp_path / "changed", b"(int)blockIdx.x", b"blockIdx.x+9999"))
    assert done.exit_code == 1
    assert "its kernels have faults: kernel " in done.stderr
    assert "outside its" in done.stderr


def test_model_in_python(original: Path, artifact: Path) -> None:
    model = EmulatedModel(artifact)
    x = np.random.default_rng(3).standard_normal(model.inputs[0].shape).astype(np.float32)
    (found,), (expected,) = (outputs.values() for outputs in (model.run({"x": x}), run(original, {"x": x})))
    assert error(found, expected) < 1e-5
    assert model.findings == ()


def test_weights_beside_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lowering, "SEPARATE_WEIGHTS", 0)
    linear = model([node("MatMul", "x w", "y")], {"x": [2, 40]}, {"w": normal(40, 300)})
    original = tiny.save(tmp_path / "linear.onnx", linear)
    directory = attnrewrite.optimize(original, target="metal", verify=False).save(tmp_path / "beside")
    assert json.loads((directory / "manifest.json").read_text())["weights_file"] == "weights.bin"
    assert "weights.bin" in json.loads((directory / "report.json").read_text())["files"]
    assert verify(original, directory).exit_code == 0
    (directory / "weights.bin").write_bytes(bytes((directory / "weights.bin").stat().st_size))
    assert verify(original, directory).exit_code == 1


def test_a_library_without_its_host_code(artifact: Path, tmp_path: Path) -> None:
    shutil.copytree(artifact, tmp_path / "copy")
    (tmp_path / "copy" / "host.ll.gz").unlink()
    with pytest.raises(UserError, match=r"model\.dylib cannot be emulated without host\.ll\.gz beside it"):
        EmulatedModel(tmp_path / "copy")


def test_a_library_with_damaged_host_code(artifact: Path, tmp_path: Path) -> None:
    host = Path(shutil.copytree(artifact, tmp_path / "copy")) / "host.ll.gz"
    code = host.read_bytes()
    for damaged in (
        code[: len(code) // 2],
        b"no gzip",
        code[:500] + bytes(b ^ 0xFF for b in code[500:600]) + code[600:],
    ):
        host.write_bytes(damaged)
        with pytest.raises(UserError, match=r"model\.dylib or host\.ll\.gz beside it is damaged"):
            EmulatedModel(tmp_path / "copy")


def test_a_cache_that_cannot_be_written(artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("ATTNREWRITE_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(CompilerError, match="ATTNREWRITE_CACHE names another directory"):
        EmulatedModel(artifact)


def test_a_damaged_library(artifact: Path, tmp_path: Path) -> None:
    shutil.copytree(artifact, tmp_path / "copy")
    library = tmp_path / "copy" / "model.dylib"
    library.write_bytes(library.read_bytes()[:5000])
    with pytest.raises(UserError, match=r"model\.dylib is no library of attnrewrite's for Metal, or is damaged"):
        EmulatedModel(tmp_path / "copy")


def test_emulate_wants_a_library_for_metal(original: Path, tmp_path: Path) -> None:
    done = verify(original, original)
    assert done.exit_code == 2
    assert "--emulate takes an output of optimize for metal" in done.stderr
    attnrewrite.optimize(original, verify=False).save(tmp_path / "rewritten")
    done = verify(original, tmp_path / "rewritten")
    assert done.exit_code == 2
    assert "--emulate runs dynamic libraries for metal" in done.stderr
