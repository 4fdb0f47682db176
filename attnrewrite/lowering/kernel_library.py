"""Single kernels as shared libraries, for callers that have their tensors already: the operators of PyTorch.

Imported by the compiling process alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tvm
from tvm import IRModule, tirx

from attnrewrite.errors import last_line
from attnrewrite.functions.spec import SPECS, FlashWindowAttention
from attnrewrite.lowering import build, limits
from attnrewrite.lowering.kernel_entry import ENTRY
from attnrewrite.lowering.kernels import slide_cpu, window_cpu
from attnrewrite.lowering.kernels.gpu import attention_kernel
from attnrewrite.lowering.kernels.vector_math import vector_unit
from attnrewrite.lowering.kernels.window_cpu_operands import LAID_OUT, lay_out
from attnrewrite.lowering.schedules.stack import PIPELINE
from attnrewrite.lowering.targets import Target


def compile_kernels(
    requests: Sequence[Mapping[str, Any]], target: Target, directory: Path, timed: Any
) -> dict[str, Any]:
    """A library NAME.so in the directory for every kernel that can be compiled.

    requests: name, op (its type), attributes, shapes (of the operands, without the batch where they have one: its place
    is null), dtypes and steps of each kernel. Returns the lanes of the vectors that operands are laid out for, and the
    sentences of the kernels that failed, by name.
    """
    tvm_target = build.tvm_target(target)
    on_cpu = target.device == "cpu"
    lanes = vector_unit(tvm_target).lanes if on_cpu else 1
    failed: dict[str, str] = {}
    for request in requests:
        with timed(request["name"]):
            try:
                kernel = _cpu_kernel(request, tvm_target, lanes) if on_cpu else gpu_kernel(request, tvm_target)
                library = directory / f"{request['name']}.so"
                with build.device_compiler(target) as finish, tvm.transform.PassContext(opt_level=3):
                    pipeline = PIPELINE if on_cpu else limits.PIPELINE
                    executable = tvm.compile(IRModule({ENTRY: kernel}), tvm_target, tir_pipeline=pipeline)
                    build.export(executable, target, library)
                    finish(library)
            except Exception as error:
                failed[request["name"]] = last_line(error)
    return {"lanes": lanes, "failed": failed}


def gpu_kernel(request: Mapping[str, Any], target: Any) -> Any:
    """What `compile_kernels` compiles of a request for a GPU."""
    batch = tirx.Var("batch", "int64")
    shapes = {n: tuple(batch if e is None else e for e in shape) for n, shape in request["shapes"].items()}
    spec = SPECS[request["op"]].from_attributes(request["attributes"])
    return attention_kernel(spec, shapes, request["dtypes"], target, ENTRY, request["steps"])


def _cpu_kernel(request: Mapping[str, Any], target: Any, lanes: int) -> Any:
    spec = SPECS[request["op"]].from_attributes(request["attributes"])
    shapes: dict[str, tuple[Any, ...]] = {}
    for name, shape in request["shapes"].items():
        shapes[name] = tuple("batch" if extent is None else extent for extent in shape)
    present = tuple(shapes)
    if isinstance(spec, FlashWindowAttention):
        laid_out = {n: lay_out(n, np.zeros(shapes[n], np.float32), spec, lanes).shape for n in present if n in LAID_OUT}
        return window_cpu.flash_window_attention(
            spec, present, shapes | laid_out, "float32", target, ENTRY, request["steps"]
        )
    return slide_cpu.slide_attention(spec, present, shapes, "float32", target, ENTRY, request["steps"])
