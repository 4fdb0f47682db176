"""Weights laid out for the register tiles that will read them, once, while compiling.

A matrix product with constant weights `[K, N]` reads them as `[ceil(N / columns), K, columns]`: the vectors of one tile
then follow each other in memory. `columns` is that of the register tile, so it depends on the target and the shape.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from tvm import IRModule, ir, relax, te, tirx
from tvm.relax.expr_functor import PyExprMutator, mutator

from attnrewrite.lowering.kernels.vector_math import VectorUnit
from attnrewrite.lowering.schedules.contraction import choose_tile

# Fewer columns than this are not worth a layout of their own.
MIN_COLUMNS = 4


def pack_weights(mod: IRModule, unit: VectorUnit) -> IRModule:
    """The module with every matrix product by a constant matrix reading packed weights."""
    return _Packer(mod, unit).run()


def packed(weights: np.ndarray, columns: int) -> np.ndarray:
    """`[K, N]` as `[ceil(N / columns), K, columns]`, padded with zeros; same dtype."""
    depth, width = weights.shape
    panels = -(-width // columns)
    padded = np.zeros((depth, panels * columns), weights.dtype)
    padded[:, :width] = weights
    return np.ascontiguousarray(padded.reshape(depth, panels, columns).transpose(1, 0, 2))


@mutator
class _Packer(PyExprMutator):  # type: ignore[misc]
    def __init__(self, mod: IRModule, unit: VectorUnit) -> None:
        super().__init__(mod)
        self._unit = unit
        self._packed: dict[tuple[Any, int], Any] = {}

    def run(self) -> IRModule:
        for name, func in self.builder_.get().functions.items():
            if isinstance(func, relax.Function):
                self.builder_.update_func(name, self.visit_expr(func))
        return self.builder_.get()

    def visit_call_(self, call: ir.Call) -> Any:
        call = self.visit_expr_post_order(call)
        if call.op != ir.Op.get("relax.matmul"):
            return call
        features, weights = call.args
        if not isinstance(weights, ir.GenericConst) or len(weights.ty.shape) != 2 or features.ty.shape is None:
            return call
        if str(weights.ty.dtype.dtype) not in ("float32", "float16") or len(features.ty.shape) < 2:
            return call
        width = int(weights.ty.shape[1])
        if width < MIN_COLUMNS:
            return call
        columns = choose_tile(_static_rows([*features.ty.shape][:-1]), width, self._unit).columns
        key = (weights, columns)
        if key not in self._packed:
            self._packed[key] = relax.const(packed(weights.value.numpy(), columns))
        return self.builder_.call_te(
            _packed_matmul, features, self._packed[key], width, primfunc_name_hint="packed_matmul"
        )


def _static_rows(extents: Sequence[Any]) -> int | None:
    rows = 1
    for extent in extents:
        if not isinstance(extent, tirx.IntImm):
            return None
        rows *= int(extent)
    return rows


def _packed_matmul(features: te.Tensor, weights: te.Tensor, width: int) -> te.Tensor:
    """out[..., n] = sum_k features[..., k] weights[n // columns, k, n % columns]."""
    columns = int(weights.shape[2])
    k = te.reduce_axis((tirx.IntImm("int64", 0), features.shape[-1]), "k")

    def element(*at: Any) -> Any:
        n = at[-1]
        product = features[(*at[:-1], k)] * weights[tirx.floordiv(n, columns), k, tirx.floormod(n, columns)]
        return te.sum(product, axis=k)

    return te.compute((*features.shape[:-1], tirx.IntImm("int64", width)), element, name="packed_matmul")
