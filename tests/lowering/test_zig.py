"""What is said where zig fails, or is not there."""

from __future__ import annotations

import sys

import pytest

from attnrewrite.errors import CompilerError
from attnrewrite.lowering.zig import run_zig


def test_the_words_of_the_compiler(tmp_path):
    source = tmp_path / "broken.c"
    source.write_text("int f(void) { return missing; }\n")
    with pytest.raises(CompilerError, match=r"^compiling f failed: use of undeclared identifier 'missing'$"):
        run_zig(["cc", "-c", str(source), "-o", str(tmp_path / "broken.o")], "compiling f failed")


def test_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "ziglang", None)
    with pytest.raises(CompilerError, match=r"^linking model\.so failed: there is no zig \(pip install ziglang\)$"):
        run_zig(["version"], "linking model.so failed")
