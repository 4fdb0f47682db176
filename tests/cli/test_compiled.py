"""One small model through the whole command: compiled for this machine's CPU, verified, run, timed."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from typer.testing import CliRunner

import attnrewrite
from attnrewrite.cli import app
from attnrewrite.testing import assert_equivalent
from tests import tiny


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(model, artifact directory), the batch symbolic."""
    folder = tmp_path_factory.mktemp("compiled")
    model = tiny.save(folder / "vit.onnx", tiny.global_attention(batch="batch"))
    done = CliRunner().invoke(app, ["optimize", str(model), "--target", "cpu", "--threads", "1", "--quiet"])
    assert done.exit_code == 0, done.stderr
    return model, folder / "vit-cpu"


def test_directory_holds_what_the_contract_says(built):
    model, directory = built
    names = {p.name for p in directory.iterdir()}
    assert {"model.onnx", "manifest.json", "report.json", "report.html", "README.md"} < names
    manifest = json.loads((directory / "manifest.json").read_text())
    report = json.loads((directory / "report.json").read_text())
    assert manifest["library"] in names
    assert set(report["files"]) == names - {"report.json"}
    assert manifest["source_sha256"] == report["source_sha256"]
    assert manifest["threads"] == 1
    assert report["compile"]["library"] == manifest["library"]
    assert report["compile"]["bytes"] == (directory / manifest["library"]).stat().st_size
    assert report["verification"]["compiled"]["passed"]
    assert sorted(p.name for p in model.parent.iterdir()) == ["vit-cpu", "vit.onnx"]


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_library_computes_what_the_model_does_at_any_batch(command, built, tmp_path, batch):
    model, directory = built
    x = np.random.default_rng(batch).standard_normal((batch, 16, 8)).astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    done = command("run", directory, "--input", f"x={tmp_path / 'x.npy'}", "--output", tmp_path / "out", "--threads", 1)
    assert done.code == 0
    found = np.load(tmp_path / "out" / "y.npy")
    session = onnxruntime.InferenceSession(str(model), providers=["CPUExecutionProvider"])
    expected = session.run(None, {"x": x})[0]
    assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()
    np.testing.assert_array_equal(attnrewrite.load(directory).run({"x": x}, threads=1)["y"], found)


def test_verify_compares_the_library_too(command, built):
    model, directory = built
    done = command("verify", model, directory, "--json", "--threads", 1)
    assert done.code == 0
    assert {c["candidate"] for c in done.json["comparisons"]} == {"rewritten", "compiled"}
    assert_equivalent(model, directory, threads=1)


def test_library_of_another_model_fails(command, built, tmp_path):
    _, directory = built
    other = tiny.save(tmp_path / "other.onnx", tiny.global_attention(batch="batch", seed=4))
    assert command("verify", other, directory).code == 1
    with pytest.raises(AssertionError, match="the models are not equivalent"):
        assert_equivalent(other, directory, threads=1)


def test_damaged_library_fails_verification_and_does_not_run(command, built, tmp_path):
    model, directory = built
    damaged = tmp_path / "damaged"
    shutil.copytree(directory, damaged)
    library = damaged / json.loads((damaged / "manifest.json").read_text())["library"]
    library.write_bytes(library.read_bytes()[:100])
    assert command("verify", model, damaged).code == 1
    np.save(tmp_path / "x.npy", np.zeros((1, 16, 8), np.float32))
    done = command("run", damaged, "--input", f"x={tmp_path / 'x.npy'}", "--output", tmp_path / "out")
    assert done.code == 2
    assert not (tmp_path / "out").exists()


def test_a_device_that_is_not_there(command, built, tmp_path):
    np.save(tmp_path / "x.npy", np.zeros((1, 16, 8), np.float32))
    done = command("run", built[1], "--input", f"x={tmp_path / 'x.npy'}", "--output", tmp_path / "out", "--device", 1)
    assert done.code == 2
    assert "compiled for cpu, where there is no device 1" in done.stderr
    done = command("bench", built[1], "--device", 1)
    assert done.code == 2
    assert "compiled for cpu, where there is no device 1" in done.stderr


def test_bench_times_the_library(command, built, monkeypatch):
    import attnrewrite.bench as timing

    monkeypatch.setattr(timing, "BLOCK_SECONDS", 0.0)
    done = command("bench", built[1], "--threads", 1, "--json")
    assert [t["name"] for t in done.json["timings"]] == ["original", "rewritten", "compiled"]
    assert done.json["speedup"]["compiled"] > 0


def test_the_commands_of_the_readme_run(command, built, tmp_path, monkeypatch):
    import attnrewrite.bench as timing

    monkeypatch.setattr(timing, "BLOCK_SECONDS", 0.0)
    model, directory = built
    shutil.copytree(directory, tmp_path / directory.name)
    shutil.copy(model, tmp_path)
    monkeypatch.chdir(tmp_path / directory.name)
    np.save("x.npy", np.zeros((1, 16, 8), np.float32))
    install, *lines = Path("README.md").read_text().partition("```sh\n")[2].partition("```")[0].splitlines()
    assert install.startswith("pip install .")
    assert [shlex.split(line)[:2] for line in lines] == [["attnrewrite", c] for c in ("run", "verify", "bench")]
    for line in lines:
        assert command(*shlex.split(line)[1:]).code == 0
    assert np.load(tmp_path / "outputs" / "y.npy").shape == (1, 16, 8)


def test_an_artifact_for_apps_says_that_it_does_not_run_here(command, tmp_path, monkeypatch):
    import attnrewrite.bench as timing

    monkeypatch.setattr(timing, "BLOCK_SECONDS", 0.0)
    model = tiny.save(tmp_path / "vit.onnx", tiny.global_attention())
    assert command("optimize", model, "--target", "metal:ios", "--precision", "fp16", "--quiet").code == 0
    directory = tmp_path / "vit-metal-ios"
    report = json.loads((directory / "report.json").read_text())
    assert {"model.a", "model.h", "module.modulemap", "Example.swift", "README.md"} < set(report["files"])
    assert json.loads((directory / "manifest.json").read_text())["precision"] == "fp16"
    assert "int vit_run(void);" in (directory / "model.h").read_text()
    readme = (directory / "README.md").read_text()
    assert readme.startswith("# vit.onnx for metal:ios (fp16)\n")
    assert "## Put it into an app" in readme
    assert "attnrewrite run" not in readme
    sentence = "model.a is compiled for metal:ios: it is linked into an app for that device and does not run here"
    assert sentence in command("verify", model, directory).stdout.replace("\n", " ")
    assert sentence in command("bench", directory).stderr
    np.save(tmp_path / "x.npy", np.zeros((1, 16, 8), np.float32))
    done = command("run", directory, "--input", f"x={tmp_path / 'x.npy'}", "--output", tmp_path / "out")
    assert done.code == 2
    assert sentence in done.stderr.replace("\n", " ")
