"""Libraries of single kernels, from the side that calls them: what they are named after, and how they are loaded."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Callable
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

from attnrewrite.lowering.compile import versions
from attnrewrite.lowering.remembered import cpu_model

# Of the function in each library.
ENTRY = "attend"

# Of the package's modules, and the one that kernels are compiled by.
_ROOT = Path(__file__).resolve().parents[2]
_COMPILED_BY = "attnrewrite.lowering.kernel_library"

_IMPORT = re.compile(r"^[ \t]*from (attnrewrite[\w.]*) import (\([^)]*\)|[^\n#]*)", re.MULTILINE)


@cache
def compiler_digest(for_cpu: bool = True, root: Path = _ROOT) -> str:
    """Changes with the package's sources of kernels, TVM's version, and for CPUs with the model and its features."""
    machine = [platform.machine(), *([cpu_model(), _cpu_features()] if for_cpu else [])]
    digest = sha256(repr([sorted(versions().items()), *machine]).encode())
    for _, text in sorted(kernel_sources(root).items()):
        digest.update(text)
    return digest.hexdigest()


def kernel_sources(root: Path = _ROOT) -> dict[str, bytes]:
    """What a kernel's machine code may depend on, besides TVM, by path below `root`: every module that its compiler
    imports, and that these import, wherever the statement stands.
    """
    sources: dict[str, bytes] = {}
    found = [_COMPILED_BY]
    while found:
        path = _path(root, found.pop())
        if path in sources or not (root / path).is_file():
            continue
        sources[path] = (root / path).read_bytes()
        for package, names in _IMPORT.findall(sources[path].decode()):
            modules = [f"{package}.{name}" for name in re.findall(r"\w+", names)]
            found += [module if (root / _path(root, module)).is_file() else package for module in modules]
    return sources


def _path(root: Path, module: str) -> str:
    path = module.replace(".", "/")
    return f"{path}/__init__.py" if (root / path).is_dir() else f"{path}.py"


def _cpu_features() -> str:
    """As the system lists them; a container may hide some that the CPU's name promises."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def load_kernel(library: Path, entry: str, on_gpu: bool = False) -> Callable[..., Any]:
    """A library's function, which takes tensors that speak DLPack. on_gpu: whether it launches CUDA kernels."""
    from attnrewrite.runtime import load_cuda, size_thread_pool

    if on_gpu:
        load_cuda()
    import tvm  # noqa: F401 - its runtime is what the library finds its threads in
    import tvm_ffi

    # Between two kernels the caller's own threads need the cores that TVM's would spin on.
    os.environ.setdefault("TVM_THREAD_POOL_SPIN_COUNT", "0")
    size_thread_pool()
    return tvm_ffi.load_module(str(library))[entry]
