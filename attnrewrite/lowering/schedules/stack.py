"""Small buffers of CPU kernels on the stack, from where LLVM moves them to registers.

TVM takes every buffer of scope `local`, and every one of 1 KB or more, from a workspace: a call to allocate it and one
to free it each time it comes into scope, and accumulators that are written to memory after every tile.
"""

from __future__ import annotations

import math
from typing import Any

import tvm
import tvm_ffi
from tvm import IRModule, tirx
from tvm.tirx.compilation_pipeline import get_tir_pipeline, register_tir_pipeline

PIPELINE = "attnrewrite.cpu"

# A buffer of at most so many bytes lies on the stack. The threads of macOS have 512 KB of it.
STACK_BYTES = 16 * 1024


def _pipeline() -> tuple[Any, Any, Any]:
    """TVM's default pipeline, with its buffers placed last: the passes before drop the annotation."""
    default, finalize_host, finalize_device = get_tir_pipeline("default")

    @tvm.transform.module_pass(opt_level=0)  # type: ignore[untyped-decorator]
    def lower(mod: IRModule, _: Any) -> IRModule:
        mod = default(mod)
        for name, func in mod.functions.items():
            if isinstance(func, tirx.PrimFunc):
                mod[name] = func.with_body(tvm_ffi.structural_map(func.body, (tirx.AllocBuffer, _placed), order="post"))
        return mod

    return lower, finalize_host, finalize_device


def _placed(node: Any) -> Any:
    extents = node.buffer.shape
    if not all(isinstance(extent, tirx.IntImm) for extent in extents):
        return node
    size = math.prod(map(int, extents)) * node.buffer.dtype.itemsize
    if size > STACK_BYTES:
        return node
    return tirx.AllocBuffer(node.buffer, {"disable_lower_builtin": tirx.IntImm("bool", 1)})


register_tir_pipeline(PIPELINE, _pipeline)
