"""What the CUDA compiler makes of a scheduled function."""

from __future__ import annotations

import pytest
import tvm
from tvm import tirx

from attnrewrite.errors import CompilerError
from attnrewrite.lowering import limits
from attnrewrite.lowering.cuda_compiler import embedded_cubins
from attnrewrite.lowering.cuda_resources import KernelResources
from attnrewrite.lowering.targets import parse_target


def cuda_target(chip: str) -> tvm.target.Target:
    """chip: as in sm_90."""
    return tvm.target.Target(parse_target(f"cuda:{chip}").tvm)


def resources(function: tirx.PrimFunc, *chips: str) -> list[KernelResources]:
    """Of the kernels of a function made for the oldest of these chips, on each; skips where there is no compiler."""
    try:
        with embedded_cubins(chips) as embedded:
            tvm.tirx.build(tvm.IRModule({"run": function}), target=cuda_target(chips[0]), pipeline=limits.PIPELINE)
    except CompilerError as error:
        if "no CUDA compiler" in str(error):
            pytest.skip(str(error))
        raise
    return list(embedded.kernels)
