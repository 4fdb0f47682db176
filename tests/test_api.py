"""The Python interface does what the command line does, on values."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

import attnrewrite
from attnrewrite import passes
from attnrewrite.errors import UserError, VerificationError
from attnrewrite.testing import assert_equivalent
from tests import tiny


@pytest.fixture
def x() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((1, 16, 8)).astype(np.float32)


def test_optimize_a_model_in_memory(tmp_path, x):
    original = tiny.global_attention()
    before = original.SerializeToString()
    result = attnrewrite.optimize(original, threads=1)
    assert original.SerializeToString() == before
    assert result.report.model == "graph"
    assert [site.verdict for site in result.report.sites] == ["leave"]
    assert result.verification is not None
    assert result.verification.passed
    assert isinstance(result.model, onnx.ModelProto)
    assert_equivalent(original, result, threads=1)
    (output,) = result.run({"x": x}).values()
    assert output.shape == (1, 16, 8)
    saved = result.save(tmp_path / "out")
    assert sorted(p.name for p in saved.iterdir()) == ["README.md", "model.onnx", "report.html", "report.json"]
    assert_equivalent(original, saved, threads=1)


def test_optimize_a_file_and_refuse_to_overwrite_it(tmp_path):
    path = tiny.save(tmp_path / "out" / "model.onnx", tiny.global_attention())
    result = attnrewrite.optimize(path, verify=False)
    assert result.verification is None
    with pytest.raises(UserError, match="would overwrite the input"):
        result.save(path.parent)


def test_files_go_with_the_result(tmp_path):
    result = attnrewrite.optimize(tiny.linear(), threads=1)
    directory = result.directory
    assert directory.is_dir()
    del result
    assert not directory.exists()


def test_inputs_that_do_not_fit(x):
    result = attnrewrite.optimize(tiny.global_attention(), threads=1)
    with pytest.raises(UserError, match="does not run on these inputs"):
        result.run({"x": x[:, :5]})


@pytest.mark.parametrize(
    "chosen",
    [
        ["fuse-window-attention"],
        [passes.fuse_window_attention],
        attnrewrite.Pipeline([passes.fuse_window_attention]),
    ],
    ids=["name", "pass", "pipeline"],
)
def test_passes_are_given_by_name_or_by_value(chosen):
    report = attnrewrite.inspect(tiny.global_attention(), passes=chosen)
    assert list(report.passes) == ["fuse-window-attention"]


def test_graph_after_each_pass():
    seen: dict[str, str] = {}

    def on_pass(name, graph):
        seen[name] = str(graph)

    attnrewrite.optimize(tiny.global_attention(), verify=False, on_pass=on_pass)
    assert list(seen) == [p.name for p in passes.ALL]
    assert all("Softmax(" in text for text in seen.values())


def test_progress_is_told():
    said: list[str] = []
    attnrewrite.optimize(tiny.linear(), threads=1, progress=said.append)
    assert said[0] == "reading model.onnx"
    assert len(set(said)) == len(said)
    assert said[-1] == "verifying"


def test_wrong_rewriting_raises(monkeypatch):
    import attnrewrite.frontend.onnx as frontend

    monkeypatch.setattr(frontend, "copy_model", lambda path, copy: tiny.save(copy, tiny.linear(factor=2.0)))
    with pytest.raises(VerificationError, match="the rewritten model differs at output y"):
        attnrewrite.optimize(tiny.linear(), threads=1)


@pytest.mark.parametrize("model", [None, 3, b"bytes"])
def test_what_is_no_model(model):
    with pytest.raises(UserError, match=r"a model is a path or an onnx\.ModelProto, got"):
        attnrewrite.inspect(model)


def test_explain_names_sites():
    (site,) = attnrewrite.explain(tiny.global_attention(), "softmax")
    assert site.reason
    with pytest.raises(UserError, match="has no site 'other'"):
        attnrewrite.explain(tiny.global_attention(), "other")


def test_names_of_the_package():
    assert set(attnrewrite.__all__) <= set(dir(attnrewrite))
    with pytest.raises(AttributeError, match="has no attribute 'optimise'"):
        _ = attnrewrite.optimise
