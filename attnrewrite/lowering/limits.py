"""What one threadgroup (CUDA: block) of a kernel may use, checked on every kernel before it becomes source."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import tvm_ffi
from tvm import IRModule, tirx
from tvm.tirx.compilation_pipeline import get_tir_pipeline, register_tir_pipeline

from attnrewrite.errors import CompilerError

PIPELINE = "attnrewrite.gpu"

THREADS = 1024
# Bytes of threadgroup memory, and arguments that are buffers; CUDA's are larger and have no such count.
_SHARED_BYTES = {"metal": 32768, "cuda": 49152}
BUFFERS = {"metal": 31}


def check_limits(kernels: IRModule) -> IRModule:
    """The module of lowered kernels as it came. Raises CompilerError where one exceeds its device's limits."""
    for name, kernel in kernels.functions.items():
        kind = kernel.attrs["target"].kind.name
        if (threads := threads_of(kernel)) > THREADS:
            raise CompilerError(f"kernel {name.name_hint} has {threads} threads in a threadgroup; {kind} has {THREADS}")
        shared, limit = _shared_bytes(kernel), _SHARED_BYTES.get(kind)
        if limit is not None and shared > limit:
            raise CompilerError(
                f"kernel {name.name_hint} takes {shared} bytes of threadgroup memory; {kind} has {limit}"
            )
        buffers, most = _buffers(kernel), BUFFERS.get(kind)
        if most is not None and buffers > most:
            raise CompilerError(f"kernel {name.name_hint} takes {buffers} buffers; {kind} has {most}")
    return kernels


def threads_of(kernel: tirx.PrimFunc) -> int:
    """In a threadgroup."""
    extents: dict[str, int] = {}

    def note(node: Any) -> None:
        if node.attr_key == "thread_extent" and isinstance(node.value, tirx.IntImm):
            extents[str(node.node.thread_tag)] = int(node.value)

    tvm_ffi.structural_walk(kernel.body, (tirx.AttrStmt, note))
    return math.prod(extent for tag, extent in extents.items() if tag.startswith("threadIdx"))


def _shared_bytes(kernel: tirx.PrimFunc) -> int:
    sizes: list[int] = []

    def note(node: Any) -> None:
        if node.buffer.scope().startswith("shared"):
            sizes.append(math.prod(int(extent) for extent in node.buffer.shape) * node.buffer.dtype.itemsize)

    tvm_ffi.structural_walk(kernel.body, (tirx.AllocBuffer, note))
    return sum(-(-size // 16) * 16 for size in sizes)


def _buffers(kernel: tirx.PrimFunc) -> int:
    """Pointers, and one more for all scalars together."""
    pointers = sum(str(param.ty).startswith("T.handle") for param in kernel.params)
    return pointers + (pointers < len(kernel.params))


def _pipeline() -> tuple[Any, Callable[[], Any], Callable[[], Any]]:
    """TVM's default pipeline with the limits checked where kernels are final."""
    lower, finalize_host, finalize_device = get_tir_pipeline("default")

    def finalize_and_check() -> Callable[[IRModule], IRModule]:
        finalize = finalize_device()
        # Not a TVM pass: an error raised inside one comes out as an error of TVM's.
        return lambda kernels: check_limits(finalize(kernels))

    return lower, finalize_host, finalize_and_check


register_tir_pipeline(PIPELINE, _pipeline)
