"""What the commands do on good input: exit codes, one JSON document, files that belong together."""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest

from attnrewrite.errors import CompilerError
from tests import tiny
from tests.models.onnx_spellings import SPELLINGS


def run_onnx(path: Path, x: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"x": x})[0])


def test_inspect_lists_every_softmax(command, attention):
    done = command("inspect", attention, "--json")
    assert done.code == 0
    assert done.json["model"] == str(attention)
    (site,) = done.json["sites"]
    assert site["node"] == "softmax"
    assert site["verdict"] == "leave"
    assert site["reason"]
    assert site["reason_node"]
    assert done.json["reparam"] == []
    assert done.json["nodes_before"] >= done.json["nodes_after"] > 0
    assert done.stderr == ""


def test_inspect_for_people(command, attention):
    done = command("inspect", attention)
    assert done.code == 0
    assert "1 attention site: 0 rewritten, 1 left" in done.stdout
    assert "nothing to rewrite" in done.stdout


def test_explain_says_what_stopped_the_match(command, attention):
    done = command("explain", attention)
    assert done.code == 0
    assert "softmax" in done.stdout
    assert "reason" in done.stdout
    assert command("explain", attention, "softmax", "--json").json["sites"][0]["node"] == "softmax"
    unknown = command("explain", attention, "nowhere")
    assert unknown.code == 2
    assert "has no site 'nowhere'; its sites are" in unknown.stderr


def test_explain_draws_what_a_query_reads(command, tmp_path):
    path = tiny.save(tmp_path / "windows.onnx", SPELLINGS["window-shifted"].model())
    done = command("explain", path)
    assert done.code == 0
    assert "a query in the middle: pixel (4, 6) of a 8x12 map reads the keys of 16 pixels" in done.stdout
    assert "Q # # #" in done.stdout
    (site,) = command("explain", path, "--json").json["sites"]
    assert site["readings"][0]["query"] == [4, 6]
    assert any("Q # # #" in line for line in site["readings"][0]["drawing"])


def test_explain_without_softmax(command, mlp):
    assert "has no softmax" in command("explain", mlp).stdout


def test_model_without_local_attention_comes_out_unchanged(command, tmp_path, attention):
    out = tmp_path / "out"
    done = command("optimize", attention, "--no-compile", "-o", out, "--json")
    assert done.code == 0
    document = done.json
    assert document["verification"]["passed"]
    assert document["verification"]["rewritten"]["max_error"] <= 1e-6
    assert [site["verdict"] for site in document["sites"]] == ["leave"]
    x = np.random.default_rng(0).standard_normal((1, 16, 8)).astype(np.float32)
    np.testing.assert_allclose(run_onnx(out / "model.onnx", x), run_onnx(attention, x), rtol=0, atol=1e-6)
    assert sorted(p.name for p in out.iterdir()) == ["README.md", "model.onnx", "report.html", "report.json"]
    on_disk = json.loads((out / "report.json").read_text())
    assert on_disk.items() >= document.items()
    assert on_disk["files"] == ["README.md", "model.onnx", "report.html"]


def test_output_goes_beside_the_model_by_default(command, attention):
    assert command("optimize", attention, "--target", "cuda:sm_90", "--no-compile", "--quiet").code == 0
    assert (attention.parent / "vit-cuda-sm_90" / "model.onnx").is_file()
    assert command("optimize", attention, "--no-compile", "--quiet").code == 0
    assert (attention.parent / "vit-rewritten" / "model.onnx").is_file()


def test_second_run_replaces_the_first(command, tmp_path, attention):
    out = tmp_path / "out"
    for _ in range(2):
        assert command("optimize", attention, "--no-compile", "-o", out).code == 0
        (out / "notes.txt").write_text("mine")
    assert (out / "notes.txt").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "vit.onnx"]


def test_quiet_prints_nothing(command, tmp_path, attention):
    done = command("optimize", attention, "--no-compile", "-o", tmp_path / "out", "--quiet")
    assert (done.code, done.stdout, done.stderr) == (0, "", "")


def test_graph_is_printed_on_standard_error(command, tmp_path, attention):
    done = command("optimize", attention, "--no-compile", "-o", tmp_path / "out", "--print-after", "all", "--json")
    assert done.json["sites"]
    assert "# after fuse-window-attention" in done.stderr
    assert "Softmax(" in done.stderr


def test_passes_are_selected_and_timed(command, tmp_path, attention):
    out = tmp_path / "out"
    options = ["--no-compile", "--passes", "fuse-window-attention", "--time-passes", "--json"]
    done = command("optimize", attention, "-o", out, *options)
    assert "fuse-window-attention" in done.stderr
    assert "unfold-to-slide-attention" not in done.stderr


def test_symbolic_axes_are_specialised(command, tmp_path):
    model = tiny.save(tmp_path / "model.onnx", tiny.global_attention(batch="batch"))
    out = tmp_path / "out"
    assert command("optimize", model, "--no-compile", "-o", out, "--input-shape", "x=4x16x8").code == 0
    (value,) = onnx.load(out / "model.onnx").graph.input
    assert [d.dim_value for d in value.type.tensor_type.shape.dim] == [4, 16, 8]


def test_wrong_rewriting_is_exit_1_and_writes_nothing(command, tmp_path, mlp, monkeypatch):
    import attnrewrite.frontend.onnx as frontend

    monkeypatch.setattr(frontend, "copy_model", lambda path, copy: tiny.save(copy, tiny.linear(factor=2.0)))
    done = command("optimize", mlp, "--no-compile", "-o", tmp_path / "out", "--json")
    assert done.code == 1
    assert done.json["verification"]["passed"] is False
    assert "verification failed: the rewritten model differs at output y" in done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["mlp.onnx"]


def test_unproved_op_is_exit_1_though_the_numbers_agree(command, tmp_path, mlp, monkeypatch):
    import attnrewrite.verify.exact as exact

    check = exact.Check("local_3", "softmax", False, "output pixel 5 reads key pixel 6 in the original, 7 now")
    monkeypatch.setattr(exact, "verify_exact", lambda original, rewritten: [check])
    done = command("verify", mlp, mlp, "--json")
    assert done.code == 1
    assert done.json["rewritten"]["passed"] is True
    assert "local_3 is not proved equal to the original: output pixel 5 reads key pixel 6" in done.stderr
    assert command("optimize", mlp, "--no-compile", "-o", tmp_path / "out").code == 1
    assert not (tmp_path / "out").exists()


def test_compiler_failure_is_exit_3_and_delivers_the_rest(command, tmp_path, mlp, monkeypatch):
    import attnrewrite.lowering.compile as lowering

    def broken(*arguments: object, **options: object) -> None:
        raise CompilerError("no linker was found")

    monkeypatch.setattr(lowering, "compile_model", broken)
    out = tmp_path / "out"
    done = command("optimize", mlp, "--target", "cpu", "-o", out, "--json")
    assert done.code == 3
    assert "no linker was found" in done.stderr
    assert done.json["compile"] == {"target": "cpu", "error": "no linker was found"}
    assert sorted(p.name for p in out.iterdir()) == ["README.md", "model.onnx", "report.html", "report.json"]


def test_interrupt_leaves_nothing(command, tmp_path, mlp, monkeypatch):
    import attnrewrite.lowering.compile as lowering

    def interrupted(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(lowering, "compile_model", interrupted)
    done = command("optimize", mlp, "--target", "cpu", "-o", tmp_path / "deep" / "out")
    assert done.code == 130
    assert [p.name for p in tmp_path.iterdir()] == ["mlp.onnx"]


def test_verify_passes_and_fails(command, tmp_path, mlp):
    assert command("verify", mlp, mlp, "--trials", 4).code == 0
    wrong = tiny.save(tmp_path / "wrong.onnx", tiny.linear(shift_by=1))
    done = command("verify", mlp, wrong, "--json")
    assert done.code == 1
    assert done.json["passed"] is False
    assert "differs at output y" in done.stderr
    assert "DIFFERS" in command("verify", mlp, wrong).stdout


def test_run_writes_one_file_per_output(command, tmp_path, mlp):
    out, results = tmp_path / "out", tmp_path / "results"
    assert command("optimize", mlp, "--no-compile", "-o", out).code == 0
    x = np.random.default_rng(0).standard_normal((1, 6, 8))
    np.save(tmp_path / "x.npy", x)
    for _ in range(2):
        done = command("run", out, "--input", f"x={tmp_path / 'x.npy'}", "--output", results, "--threads", 1)
        assert done.code == 0
        assert done.stdout == ""
    assert sorted(p.name for p in results.iterdir()) == ["outputs.json", "y.npy"]
    expected = run_onnx(mlp, x.astype(np.float32))
    np.testing.assert_allclose(np.load(results / "y.npy"), expected, rtol=0, atol=1e-6)


def test_run_rounds_to_bfloat16_what_files_hold_as_float32(command, tmp_path):
    model = tiny.save(tmp_path / "model.onnx", tiny.linear(dtype=ml_dtypes.bfloat16))
    assert command("optimize", model, "--no-compile", "-o", tmp_path / "out").code == 0
    np.save(tmp_path / "x.npy", x := np.random.default_rng(0).standard_normal((1, 6, 8)).astype(np.float32))
    done = command("run", tmp_path / "out", "--input", f"x={tmp_path / 'x.npy'}", "--output", tmp_path / "results")
    assert done.code == 0
    weight = onnx.numpy_helper.to_array(onnx.load(model).graph.initializer[0]).astype(np.float64)
    expected = x.astype(ml_dtypes.bfloat16).astype(np.float64) @ weight
    np.testing.assert_allclose(np.load(tmp_path / "results" / "y.npy"), expected, rtol=0, atol=1e-5)


def test_bench_times_the_peers(command, tmp_path, mlp, monkeypatch):
    import attnrewrite.bench as timing

    monkeypatch.setattr(timing, "BLOCK_SECONDS", 0.0)
    out = tmp_path / "out"
    assert command("optimize", mlp, "--no-compile", "-o", out).code == 0
    done = command("bench", out, "--json", "--threads", 1)
    assert done.code == 0
    assert [t["name"] for t in done.json["timings"]] == ["original", "rewritten"]
    assert done.json["speedup"]["rewritten"] > 0
    assert "x the original's speed" in command("bench", out, "--threads", 1).stdout
    assert [t["name"] for t in command("bench", out, "--against", "onnxruntime", "--json").json["timings"]] == [
        "rewritten"
    ]
    assert command("bench", out, "--against", "tensorrt").code == 2


def test_bench_says_that_openvino_is_missing(command, tmp_path, mlp, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    out = tmp_path / "out"
    assert command("optimize", mlp, "--no-compile", "-o", out).code == 0
    done = command("bench", out, "--against", "openvino")
    assert done.code == 2
    assert "pip install openvino" in done.stderr


def test_bench_times_openvino(command, tmp_path, mlp, monkeypatch):
    pytest.importorskip("openvino")
    import attnrewrite.bench as timing

    monkeypatch.setattr(timing, "BLOCK_SECONDS", 0.0)
    out = tmp_path / "out"
    assert command("optimize", mlp, "--no-compile", "-o", out).code == 0
    done = command("bench", out, "--against", "original,openvino", "--threads", 1, "--json")
    assert done.json["speedup"]["openvino"] > 0


def test_bench_wants_the_original_unchanged(command, tmp_path, mlp):
    out = tmp_path / "out"
    assert command("optimize", mlp, "--no-compile", "-o", out).code == 0
    tiny.save(mlp, tiny.linear(factor=3.0))
    done = command("bench", out)
    assert done.code == 2
    assert "is not there any more or has changed" in done.stderr


def test_targets(command):
    names = [target["name"] for target in command("targets", "--json").json["targets"]]
    assert {"cpu", "arm", "metal", "cuda", "cuda:sm_90", "arm:cortex-a76"} <= set(names)
    assert "cuda:sm_90" in command("targets").stdout


@pytest.mark.parametrize("verb", ["inspect", "explain", "optimize", "verify", "run", "bench", "targets"])
def test_help(command, verb):
    done = command(verb, "--help")
    assert done.code == 0
    assert f"{verb} [OPTIONS]" in done.stdout


def test_debug_shows_the_traceback(command, tmp_path, monkeypatch):
    monkeypatch.setenv("ATTNREWRITE_DEBUG", "1")
    done = command("inspect", tmp_path / "missing.onnx")
    assert done.code == 2
    assert "Traceback" in done.stderr
