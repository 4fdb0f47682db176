"""torch.export archives on the command line and in Python: read, rewritten, verified."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

import attnrewrite
from attnrewrite import passes
from attnrewrite.errors import UserError
from attnrewrite.frontend.fx.read import read
from attnrewrite.frontend.fx.write import write
from attnrewrite.pipeline import Pipeline
from examples.models.unfold_attention import UnfoldAttention


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.nn.Module]:
    model = UnfoldAttention(8, num_heads=2, kernel_size=3).eval()
    batch = torch.export.Dim("batch", min=1, max=8)
    program = torch.export.export(model, (torch.randn(2, 8, 7, 6),), dynamic_shapes=({0: batch},))
    path = tmp_path_factory.mktemp("archive") / "unfold.pt2"
    torch.export.save(program, path)
    return path, model


def test_commands(command, archive, tmp_path):
    path, model = archive
    sites = command("inspect", path, "--json").json["sites"]
    assert [(s["kind"], s["verdict"], s["kernel_size"]) for s in sites] == [("neighborhood", "rewrite", [3, 3])]
    done = command("optimize", path, "--no-compile", "-o", tmp_path / "out", "--json")
    assert done.json["model"] == str(path)
    x = np.random.default_rng(0).standard_normal((5, 8, 7, 6)).astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    command("run", tmp_path / "out", "--input", f"x={tmp_path / 'x.npy'}", "--output", tmp_path / "ys")
    (found,) = [np.load(f) for f in (tmp_path / "ys").glob("*.npy")]
    with torch.no_grad():
        np.testing.assert_allclose(found, model(torch.from_numpy(x)).numpy(), atol=1e-5)


def test_in_python(archive, tmp_path):
    path, _ = archive
    result = attnrewrite.optimize(path)
    assert [s.verdict for s in result.report.sites] == ["rewrite"]
    assert result.verification is not None
    with pytest.raises(UserError, match=r"missing\.pt2 does not exist"):
        attnrewrite.inspect(tmp_path / "missing.pt2")


def test_another_model_is_told_from_the_rewritten_one(command, archive, tmp_path):
    path, _ = archive
    other = UnfoldAttention(8, num_heads=2, kernel_size=3).eval()
    torch.export.save(torch.export.export(other, (torch.randn(2, 8, 7, 6),)), tmp_path / "other.pt2")
    assert command("verify", tmp_path / "other.pt2", path).code == 1


def test_a_rewritten_archive_keeps_its_ops(command, tmp_path):
    """What was rewritten in torch goes on from there: the file holds the node, which no pass has to find again."""
    model = UnfoldAttention(8, num_heads=2, kernel_size=3).eval()
    graph = read(torch.export.export(model, (torch.randn(2, 8, 7, 6),)))
    assert Pipeline(passes.ALL).run(graph).modified
    torch.export.save(write(graph), tmp_path / "rewritten.pt2")
    done = command("optimize", tmp_path / "rewritten.pt2", "--no-compile", "-o", tmp_path / "out", "--json")
    assert done.code == 0 and done.json["sites"] == []
    ops = [n for n in onnx.load(tmp_path / "out" / "model.onnx").graph.node if n.domain == "attnrewrite"]
    assert [n.op_type for n in ops] == ["SlideAttention"]
