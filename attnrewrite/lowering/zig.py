"""zig, from its Python package: a C and C++ compiler, a linker and an archiver for every target, on every machine."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Sequence

from attnrewrite.errors import CompilerError, first_error


def run_zig(arguments: Sequence[str], failure: str) -> None:
    """Run `zig ARGUMENTS`.

    failure: what an error begins with, as in "linking model.so failed". Raises CompilerError with zig's own words, or
    with what to install where there is no zig.
    """
    if importlib.util.find_spec("ziglang") is None:
        raise CompilerError(f"{failure}: there is no zig (pip install ziglang)")
    run = subprocess.run([sys.executable, "-m", "ziglang", *arguments], capture_output=True, text=True, check=False)
    if run.returncode:
        raise CompilerError(f"{failure}: {first_error(run.stderr).rpartition('error: ')[2]}")
