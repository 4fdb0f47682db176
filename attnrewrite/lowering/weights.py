"""Weights beside the library: lifted out of the module, they become arguments that the loader maps from a file.

A library's own constants are held four times while it loads (the file, the bytes handed to the loader, its tensors, the
virtual machine's); a mapped file once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tvm
from tvm import IRModule, ir, relax
from tvm.relax.expr_functor import PyExprMutator, mutator

from attnrewrite.runtime import ALIGNMENT, Weight

WEIGHTS_NAME = "weights.bin"  # for an app, whose bundle may hold those of several models: NAME_weights.bin

# Bytes from which one constant is worth an argument, which is checked in every run.
_LEAST = 1 << 12


def lift_weights(mod: IRModule, entry: str, least: int) -> tuple[IRModule, list[tvm.runtime.Tensor]]:
    """The module with its large constants as further parameters of `entry`, and their values in that order.

    least: bytes of such constants from which they are lifted; with fewer the module comes back as it is.
    """
    lifter = _Lifter()
    function = lifter.visit_expr(mod[entry])
    values = [value for value, _ in lifter.lifted]
    if not values or sum(map(_bytes, values)) < least:
        return mod, []
    lifted = IRModule(mod.functions, attrs=mod.attrs)
    parameters = [*function.params, *(parameter for _, parameter in lifter.lifted)]
    lifted[entry] = relax.Function(
        parameters, function.body, function.ret_ty, is_pure=function.is_pure, attrs=function.attrs
    )
    return lifted, values


def write_weights(values: Sequence[tvm.runtime.Tensor], path: Path) -> tuple[Weight, ...]:
    """Write the values one after the other, each at a multiple of `ALIGNMENT` bytes, and say where they are."""
    written = []
    with path.open("wb") as file:
        for value in values:
            file.write(bytes(-file.tell() % ALIGNMENT))
            written.append(Weight(str(value.dtype), tuple(map(int, value.shape)), file.tell()))
            file.write(value.numpy().data)
    return tuple(written)


@mutator
class _Lifter(PyExprMutator):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__()
        self.lifted: list[tuple[Any, relax.Var]] = []

    def visit_generic_const_(self, constant: ir.GenericConst) -> Any:
        if not isinstance(constant.value, tvm.runtime.Tensor) or _bytes(constant.value) < _LEAST:
            return constant
        for value, parameter in self.lifted:
            if value.same_as(constant.value):
                return parameter
        parameter = relax.Var(f"weight{len(self.lifted)}", constant.ty)
        self.lifted.append((constant.value, parameter))
        return parameter


def _bytes(value: tvm.runtime.Tensor) -> int:
    return math.prod(map(int, value.shape)) * int(value.dtype.itemsize)
