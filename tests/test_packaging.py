"""What setuptools is told must be what is there."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_every_package_is_listed():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = {".".join(p.parent.relative_to(ROOT).parts) for p in (ROOT / "attnrewrite").rglob("__init__.py")}
    found |= {
        ".".join(("attnrewrite", *p.parent.relative_to(ROOT).parts)) for p in (ROOT / "passes").rglob("__init__.py")
    }
    assert set(listed) == found
    assert listed == sorted(listed)


def test_every_data_file_is_packaged():
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    packaged = {
        path
        for package, globs in patterns.items()
        for glob in globs
        for path in ROOT.joinpath(*package.split(".")).glob(glob)
    }
    found = {
        path for path in (ROOT / "attnrewrite").rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")
    }
    assert found == {path for path in packaged if path.is_file()}


def test_import_loads_nothing_heavy():
    heavy = {"tvm", "onnx", "onnxruntime", "numpy", "torch", "typer"}
    code = f"import attnrewrite, sys; dir(attnrewrite); print(sorted({heavy!r} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_library_imports_without_torch():
    code = (
        "import sys; sys.modules['torch'] = None; import attnrewrite;"
        "[getattr(attnrewrite, name) for name in attnrewrite.__all__]; import attnrewrite.cli"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
