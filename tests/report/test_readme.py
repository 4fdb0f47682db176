"""README.md of an artifact says the truth about each kind of directory."""

from __future__ import annotations

import shlex
from dataclasses import replace

import pytest

from attnrewrite.report import Report
from attnrewrite.report.readme import to_readme
from attnrewrite.runtime import Tensor

REPORT = Report("models/swin.onnx", (), (), 5, 3, target="metal", precision="fp32")
INPUTS = (Tensor("x", "float32", ("batch", 3, 224, 224)), Tensor("scale", "float32", ()))


def readme(report: Report = REPORT, inputs: tuple[Tensor, ...] = INPUTS, library: str | None = "model.dylib") -> str:
    return to_readme(report, inputs, (), library=library, tvm="0.27")


# target, precision, title, a sentence
KINDS = [
    ("metal", "fp32", "# swin.onnx for metal", "xattr -d com.apple.quarantine model.dylib"),
    ("metal:m2", "fp16", "# swin.onnx for metal:m2 (fp16)", "macOS compiles the kernels"),
    ("arm:apple-m1", "fp32", "# swin.onnx for arm:apple-m1", "64-bit ARM under macOS"),
    ("arm", "fp32", "# swin.onnx for arm", "64-bit ARM under Linux"),
    ("cuda:sm_90", "fp32", "# swin.onnx for cuda:sm_90", "NVIDIA GPU"),
]


@pytest.mark.parametrize(("target", "precision", "title", "sentence"), KINDS)
def test_what_the_device_needs(target, precision, title, sentence):
    library = "model.dylib" if "metal" in target or "apple" in target else "model.so"
    text = readme(replace(REPORT, target=target, precision=precision), library=library)
    assert text.startswith(f"{title}\n")
    assert sentence in text
    assert ("quarantine" in text) == (library == "model.dylib")
    assert "| `x` | float32 | batch x 3 x 224 x 224 |\n| `scale` | float32 | scalar |\n" in text


def test_a_directory_without_library():
    text = readme(replace(REPORT, target=None, precision=None), library=None)
    assert text.startswith("# swin.onnx rewritten\n")
    assert "ONNX Runtime, on any machine" in text


def test_a_model_that_came_from_memory_is_not_named_as_a_file():
    text = readme(replace(REPORT, model="graph"))
    assert "attnrewrite verify MODEL .\n" in text
    assert "`graph`" not in text


def test_odd_names_break_neither_the_table_nor_the_command():
    text = readme(inputs=(Tensor("/a b|`$x`'", "int64", (2,)),))
    assert "| `/a?b??$x?'` | int64 | 2 |" in text
    command = next(line for line in text.splitlines() if line.startswith("attnrewrite run"))
    assert shlex.split(command)[3:5] == ["--input", "/a b|`$x`'=_a_b_x_.npy"]
