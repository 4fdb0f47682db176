"""The command finds loops in the machine code of a real kernel, and adds up what a warp issues."""

from __future__ import annotations

import pytest

pytest.importorskip("tvm")

from attnrewrite.errors import CompilerError
from attnrewrite.lowering.cuda_compiler import find_compiler
from benchmarks import cuda_sass


@pytest.fixture
def tools() -> None:
    try:
        find_compiler()
        cuda_sass.find_disassembler()
    except (CompilerError, SystemExit) as error:
        pytest.skip(str(error))


def test_names_say_tokens_and_channels() -> None:
    (model,) = cuda_sass.rows(["windows-16x32"], "float16").values()
    shapes = {i.name: [d.dim_value for d in i.type.tensor_type.shape.dim] for i in model.graph.input}
    assert shapes["query"] == [4096, 4, 4, 128]
    assert shapes["bias"] == [1, 4, 16, 16]


@pytest.mark.usefixtures("tools")
def test_a_warp_issues_the_multiply_adds_of_its_windows(capsys: pytest.CaptureFixture[str]) -> None:
    cuda_sass.main(["windows-16x16"])
    listed = capsys.readouterr().out
    assert "windows-16x16, flash_window_attention" in listed
    loops = [line.split(" | ") for line in listed.splitlines() if line.startswith("| · · ")]
    assert loops
    assert all(int(cells[3]) > 0 for cells in loops)


def test_without_a_disassembler_a_sentence_says_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_sass.shutil, "which", lambda _: None)
    monkeypatch.setattr(cuda_sass.sys, "path", [])
    monkeypatch.setattr(cuda_sass, "toolkits", list)
    with pytest.raises(SystemExit, match="no nvdisasm found"):
        cuda_sass.find_disassembler()
