"""Libraries of single kernels, from the side that calls them: what they are named after, and how they are loaded."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

from attnrewrite.lowering.compile import versions
from attnrewrite.lowering.remembered import cpu_model

# Of the function in each library.
ENTRY = "attend"

# What a kernel's machine code depends on, besides TVM: files and folders of the package.
_SOURCES = (
    "functions/spec.py",
    "localattention/geometry.py",
    "lowering/build.py",
    "lowering/cuda_compiler.py",
    "lowering/kernel_library.py",
    "lowering/kernels",
    "lowering/limits.py",
    "lowering/schedules/stack.py",
)


@cache
def compiler_digest(for_cpu: bool = True) -> str:
    """Changes with the package's sources of kernels, TVM's version, and for CPUs with the model and its features."""
    package = Path(__file__).resolve().parents[1]
    machine = [platform.machine(), *([cpu_model(), _cpu_features()] if for_cpu else [])]
    digest = sha256(repr([sorted(versions().items()), *machine]).encode())
    for source in _SOURCES:
        path = package / source
        for file in sorted(path.glob("*.py")) if path.is_dir() else [path]:
            digest.update(file.read_bytes())
    return digest.hexdigest()


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
