"""Bad usage and bad input: exit code 2, one sentence that says what is wrong, no traceback, nothing written."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from tests import tiny

FOLDER = Path(__file__).parent


def missing(tmp_path: Path) -> Path:
    return tmp_path / "missing.onnx"


def directory(tmp_path: Path) -> Path:
    (tmp_path / "folder.onnx").mkdir()
    return tmp_path / "folder.onnx"


def not_onnx(tmp_path: Path) -> Path:
    (tmp_path / "cat.onnx").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(range(256)))
    return tmp_path / "cat.onnx"


def text(tmp_path: Path) -> Path:
    (tmp_path / "text.onnx").write_text("this is no model\n" * 10)
    return tmp_path / "text.onnx"


def empty(tmp_path: Path) -> Path:
    (tmp_path / "empty.onnx").write_bytes(b"")
    return tmp_path / "empty.onnx"


def truncated(tmp_path: Path) -> Path:
    whole = tiny.save(tmp_path / "cut.onnx", tiny.linear(channels=64)).read_bytes()
    (tmp_path / "cut.onnx").write_bytes(whole[: len(whole) // 2])
    return tmp_path / "cut.onnx"


def without_weights(tmp_path: Path) -> Path:
    path = tmp_path / "external.onnx"
    onnx.save(tiny.linear(channels=64), path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    (tmp_path / "weights.bin").unlink()
    return path


def with_cut_weights(tmp_path: Path) -> Path:
    path = tmp_path / "external.onnx"
    onnx.save(tiny.linear(channels=64), path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    (tmp_path / "weights.bin").write_bytes(b"short")
    return path


def exported_program(tmp_path: Path) -> Path:
    (tmp_path / "model.pt2").write_bytes(b"PK")
    return tmp_path / "model.pt2"


BAD_MODELS = {
    missing: "does not exist",
    directory: "is a directory, not an ONNX file",
    not_onnx: "is not an ONNX file, or it is truncated",
    text: "is not an ONNX file, or it is truncated",
    empty: "is not an ONNX file, or it is truncated",
    truncated: "truncated",
    without_weights: "weights.bin, which is missing",
    with_cut_weights: "weights.bin, which is truncated",
    exported_program: "is not a torch.export archive, or it is truncated",
}


def snapshot(folder: Path) -> dict[Path, bytes | None]:
    return {p: p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


@pytest.mark.parametrize("verb", ["inspect", "explain", "optimize", "verify", "bench"])
@pytest.mark.parametrize("make", BAD_MODELS, ids=lambda make: make.__name__)
def test_bad_model(command, tmp_path, verb, make):
    if verb == "bench" and make is directory:
        pytest.skip("bench takes a directory")
    model = make(tmp_path)
    options = {"optimize": ["--target", "cpu"], "verify": [model]}.get(verb, [])
    before = snapshot(tmp_path)
    done = command(verb, model, *options)
    assert done.code == 2
    assert BAD_MODELS[make] in done.stderr
    assert str(model) in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert snapshot(tmp_path) == before


BAD_OPTIONS = {
    "unknown target": (["--target", "tpu"], "unknown target 'tpu'"),
    "unknown chip": (["--target", "cuda:sm_1"], "unknown chip in target 'cuda:sm_1'"),
    "no target": ([], "--target is missing"),
    "unknown precision": (["--target", "cpu", "--precision", "fp8"], "unknown precision 'fp8'"),
    "unknown pass": (["--target", "cpu", "--passes", "fuse-everything"], "there is no pass named fuse-everything"),
    "unknown pass to print": (["--target", "cpu", "--print-after", "nothing"], "there is no pass 'nothing'"),
    "unknown option": (["--target", "cpu", "--fast"], "No such option"),
    "threads": (["--target", "cpu", "--threads", "0"], "'--threads'"),
    "bad JSON": (["--target", "cpu", "--tvm-target", "{"], "--tvm-target"),
    "JSON without target": (["--no-compile", "--tvm-target", "{}"], "name one with --target"),
    "tuning for another device": (["--target", "arm", "--tune", "5"], "goes with --target cpu only, got arm"),
    "tuning without a target": (["--no-compile", "--tune", "5"], "name a target with --target cpu"),
    "tuning without a library": (["--target", "cpu", "--no-compile", "--tune", "5"], "cannot go with --no-compile"),
    "tuning for ever": (["--target", "cpu", "--tune", "inf"], "takes a number of seconds, got inf"),
    "tuning for less than nothing": (["--target", "cpu", "--tune", "-1"], "--tune"),
    "shape without name": (["--target", "cpu", "--input-shape", "1x3x8x8"], "--input-shape takes NAME=1x3x224x224"),
    "shape of an unknown input": (["--target", "cpu", "--input-shape", "image=1x6x8"], "image"),
    "shape of another rank": (["--target", "cpu", "--input-shape", "x=1x6"], "x"),
    "shape of other extents": (["--target", "cpu", "--input-shape", "x=1x7x8"], "1x7x8"),
    "shape with a zero": (["--target", "cpu", "--input-shape", "x=0x6x8"], "positive extents"),
    "shape with a minus": (["--target", "cpu", "--input-shape", "x=-1x6x8"], "positive extents"),
    "shape given twice": (
        ["--target", "cpu", "--input-shape", "x=1x6x8", "--input-shape", "x=1x6x8"],
        "given twice for x",
    ),
}


@pytest.mark.parametrize("case", BAD_OPTIONS)
def test_bad_option(command, tmp_path, mlp, case):
    options, sentence = BAD_OPTIONS[case]
    before = snapshot(tmp_path)
    done = command("optimize", mlp, *options)
    assert done.code == 2
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr
    assert snapshot(tmp_path) == before


def test_output_that_is_the_input(command, mlp):
    before = mlp.read_bytes()
    done = command("optimize", mlp, "--target", "cpu", "-o", mlp)
    assert done.code == 2
    assert "would overwrite the input" in done.stderr
    assert mlp.read_bytes() == before


def test_output_that_holds_the_input(command, tmp_path, mlp):
    before = snapshot(tmp_path)
    done = command("optimize", mlp, "--target", "cpu", "-o", tmp_path)
    assert done.code == 2
    assert "would overwrite the input" in done.stderr
    assert snapshot(tmp_path) == before


def test_output_below_a_file(command, tmp_path, mlp):
    before = snapshot(tmp_path)
    done = command("optimize", mlp, "--target", "cpu", "-o", mlp / "out")
    assert done.code == 2
    assert "cannot write" in done.stderr
    assert snapshot(tmp_path) == before


def test_output_in_a_read_only_place(command, mlp):
    """/proc refuses new directories even to root."""
    if not Path("/proc/self").exists():
        pytest.skip("needs /proc")
    done = command("optimize", mlp, "--target", "cpu", "-o", "/proc/attnrewrite-out")
    assert done.code == 2
    assert "cannot write /proc/attnrewrite-out" in done.stderr


def test_output_directory_of_somebody_else(command, tmp_path, mlp):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "photo.jpg").write_text("precious")
    done = command("optimize", mlp, "--target", "cpu", "-o", tmp_path / "out")
    assert done.code == 2
    assert "it is not empty and holds no report.json" in done.stderr
    assert (tmp_path / "out" / "photo.jpg").read_text() == "precious"


@pytest.mark.parametrize("verb", ["run", "bench"])
def test_directory_that_is_no_artifact(command, tmp_path, verb):
    options = ["--input", "x=x.npy", "--output", tmp_path / "out"] if verb == "run" else []
    done = command(verb, tmp_path, *options)
    assert done.code == 2
    assert "holds no report.json" in done.stderr


def test_unknown_command(command):
    assert command("optimise").code == 2


def test_sentence_comes_without_a_traceback_from_the_real_command(process, tmp_path):
    done = process("inspect", tmp_path / "missing.onnx", "--json")
    assert done.code == 2
    assert done.stdout == ""
    assert done.stderr == f"attnrewrite: {tmp_path / 'missing.onnx'} does not exist\n"


ARRAYS = {
    "unknown input": ("y", np.zeros((1, 6, 8), np.float32), "the model has no input y; its inputs are x"),
    "another rank": ("x", np.zeros((6, 8), np.float32), "has shape 6x8, input x takes 1x6x8"),
    "other extents": ("x", np.zeros((1, 6, 9), np.float32), "has shape 1x6x9, input x takes 1x6x8"),
    "integers": ("x", np.zeros((1, 6, 8), np.int64), "has elements of int64, input x takes float32"),
}


@pytest.mark.parametrize("case", ARRAYS)
def test_arrays_that_do_not_fit(command, tmp_path, mlp, case):
    name, array, sentence = ARRAYS[case]
    out = tmp_path / "out"
    assert command("optimize", mlp, "--no-compile", "-o", out).code == 0
    np.save(tmp_path / "x.npy", array)
    done = command("run", out, "--input", f"{name}={tmp_path / 'x.npy'}", "--output", tmp_path / "results")
    assert done.code == 2
    assert sentence in done.stderr
    assert not (tmp_path / "results").exists()


def test_array_file_that_is_none(command, tmp_path, mlp):
    out = tmp_path / "out"
    assert command("optimize", mlp, "--no-compile", "-o", out).code == 0
    for text in ("x=missing.npy", f"x={mlp}", "x"):
        done = command("run", out, "--input", text, "--output", tmp_path / "results")
        assert done.code == 2
    assert not (tmp_path / "results").exists()
