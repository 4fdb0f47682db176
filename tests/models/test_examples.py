"""The example scripts run as a reader would run them, and do what they say."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import onnx
import pytest

pytest.importorskip("torch")

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(script: str, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(EXAMPLES / script), *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300, check=False)


def test_custom_pass_is_short() -> None:
    assert len((EXAMPLES / "custom_pass.py").read_text().splitlines()) < 40


def test_export_then_pipeline_then_custom_pass(tmp_path: Path) -> None:
    export = run(
        "export_slide_transformer.py", "--small", "--height", "48", "--width", "80", "-o", "s.onnx", cwd=tmp_path
    )
    assert export.returncode == 0, export.stderr
    assert (
        export.stdout == f"s.onnx: input x 1x3x48x80, opset 18, {(tmp_path / 's.onnx').stat().st_size / 1e6:.1f} MB\n"
    )

    pipeline = run("pipeline.py", "s.onnx", "rewritten.onnx", cwd=tmp_path)
    assert pipeline.returncode == 0, pipeline.stderr
    sites = [line for line in pipeline.stdout.splitlines() if line.startswith("site")]
    assert [line.split(":")[1].strip() for line in sites] == ["neighborhood, rewrite"] * 2 + ["window, rewrite"] * 2
    assert float(pipeline.stdout.split()[-5]) < 1e-5

    custom = run("custom_pass.py", "s.onnx", "merged.onnx", cwd=tmp_path)
    assert custom.returncode == 0, custom.stderr
    before, after = (onnx.load(tmp_path / name).graph.node for name in ("rewritten.onnx", "merged.onnx"))
    assert custom.stdout == f"4 pairs merged, {len(after)} nodes left\n"  # the four corners of a patch merging
    assert len(after) == len(before) - 2  # of which two share their rows


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        ["export_swin.py", "--small", "--height", "60", "--width", "88", "--fp16"],
        ["export_swin.py", "--timm", "--exporter", "torchscript", "--dynamic-batch"],
        ["export_unfold.py", "--kernel-size", "5", "--dilation", "2", "--relative-bias", "--opset", "20"],
        ["export_slide_transformer.py", "--small", "--height", "48", "--width", "80", "--shared-shift"],
    ],
    ids=" ".join,
)
def test_export_options(arguments: list[str], tmp_path: Path) -> None:
    done = run(*arguments, "-o", "out/model.onnx", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    onnx.checker.check_model(tmp_path / "out" / "model.onnx")


def test_an_opset_the_exporter_cannot_write_ends_with_one_sentence(tmp_path: Path) -> None:
    done = run("export_unfold.py", "--opset", "11", "-o", "model.onnx", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr == "model.onnx: the dynamo exporter writes opset 18 to 23, got opset=11\n"
    assert not list(tmp_path.iterdir())
