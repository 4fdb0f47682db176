"""What the names of kept kernels depend on: all that takes part in compiling them, and nothing else."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("tvm")
pytest.importorskip("torch")

import attnrewrite
from attnrewrite.lowering.kernel_entry import compiler_digest, kernel_sources
from attnrewrite.operators.kernel import kernel_of
from tests.operators.test_schema import CASES, tensors

PACKAGE = Path(attnrewrite.__file__).parent

# Compiles the kernel for the CPU, and writes it for a GPU; then lists the modules that it took, but for those that come
# with the package of its spec.
COMPILING = """
import contextlib, json, sys
from pathlib import Path
import attnrewrite.functions
besides = set(sys.modules)
from attnrewrite.lowering import build, cuda_compiler, kernel_library
from attnrewrite.lowering.targets import parse_target

request = json.loads(sys.argv[1]) | {"name": "kernel"}
made = kernel_library.compile_kernels([request], parse_target("cpu"), Path(sys.argv[2]), contextlib.nullcontext)
assert not made["failed"], made
kernel_library.gpu_kernel(request, build.tvm_target(parse_target("cuda:sm_80")))
files = [sys.modules[name].__file__ for name in set(sys.modules) - besides if name.startswith("attnrewrite.")]
print(*(file for file in files if file and not file.endswith("__init__.py")), sep="\\n")
"""


def test_no_module_that_compiles_kernels_is_left_out(tmp_path: Path) -> None:
    kernel = kernel_of(CASES["k3"].spec, tensors(CASES["k3"]))
    assert kernel is not None
    command = [sys.executable, "-c", COMPILING, json.dumps(kernel.request()), str(tmp_path)]
    loaded = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert str(PACKAGE / "lowering/cuda_compiler.py") in loaded
    read = {str(PACKAGE.parent / path) for path in kernel_sources()}
    assert [file for file in loaded if file not in read] == []


@pytest.mark.parametrize(
    ("changed", "matters"),
    [
        ("lowering/targets.py", True),
        ("lowering/cuda_resources.py", True),
        ("lowering/kernels/window_gpu_pixels.py", True),
        ("lowering/schedules/stack.py", True),
        ("localattention/geometry.py", True),
        ("localattention/windows.py", False),
        ("report/html.py", False),
    ],
)
def test_a_change_gives_kernels_other_names(changed: str, matters: bool, tmp_path: Path) -> None:
    shutil.copytree(PACKAGE, tmp_path / "attnrewrite", ignore=shutil.ignore_patterns("__pycache__"))
    with (tmp_path / "attnrewrite" / changed).open("a", encoding="utf-8") as file:
        file.write("# changed\n")
    assert (compiler_digest(False, tmp_path) != compiler_digest(False)) == matters
