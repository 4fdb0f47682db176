"""Weights laid out for the register tiles that will read them, once, while compiling.

A matrix product with constant weights `[K, N]` reads them as `[ceil(N / columns), K, columns]`: the vectors of one tile
then follow each other in memory. `columns` is that of the register tile, so it depends on the target and the shape.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import tvm_ffi
from tvm import IRModule, ir, relax, te, tirx
from tvm.relax import transform
from tvm.relax.expr_functor import PyExprMutator, mutator

from attnrewrite.lowering import narrow
from attnrewrite.lowering.choices import Choices, Product
from attnrewrite.lowering.kernels.vector_math import VectorUnit
from attnrewrite.lowering.precision import halved
from attnrewrite.lowering.schedules.products import choose_tile
from attnrewrite.lowering.schedules.stages import same

# What follows a product element by element may be fused with it; TVM would not see that of a product of pairs.
_FUSABLE = {"op_pattern": 4}

# Fewer columns than this are not worth a layout of their own.
MIN_COLUMNS = 4


def pack_weights(mod: IRModule, unit: VectorUnit, tuned: Choices | None = None, precision: str = "fp32") -> IRModule:
    """The module with every matrix product by a constant matrix reading packed weights.

    precision: of these products (lowering/narrow.py); fp32 leaves them as they are.
    """
    result = _Packer(mod, unit, tuned or Choices(), precision).run()
    # Products that read the same features narrow them once.
    return transform.EliminateCommonSubexpr()(result) if precision == "bf16" else result


def repacked(func: tirx.PrimFunc, width: int, columns: int) -> tirx.PrimFunc:
    """The function reading its weights, of `width` columns in all, packed `columns` to a panel."""
    packed_params: dict[Any, tuple[tirx.Buffer, int]] = {}

    def find(load: ir.TensorLoad) -> None:
        at = _panels_of(load)
        if at is not None and any(load.source.same_as(param) for param in func.params):
            shape = [*load.source.shape]
            shape[at], shape[-1] = tirx.IntImm("int64", -(-width // columns)), tirx.IntImm("int64", columns)
            packed_params[load.source] = tirx.decl_buffer(shape, load.source.dtype, load.source.name, layout=None), at

    tvm_ffi.structural_walk(func.body, (ir.TensorLoad, find), order="post")

    def replaced(load: ir.TensorLoad) -> ir.TensorLoad:
        if load.source not in packed_params:
            return load
        buffer, at = packed_params[load.source]
        column = load.indices[-1].a
        indices = [*load.indices]
        indices[at], indices[-1] = tirx.floordiv(column, columns), tirx.floormod(column, columns)
        return tirx.BufferLoad(buffer, indices)

    body = tvm_ffi.structural_map(func.body, (ir.TensorLoad, replaced), order="post")
    params = [packed_params[p][0] if p in packed_params else p for p in func.params]
    return tirx.PrimFunc(params, body, func.ret_type).with_attrs(dict(func.attrs))


def _panels_of(load: ir.TensorLoad) -> int | None:
    """The axis of panels of a load `[.., n // columns, .., n % columns]`; None for others."""
    lane = load.indices[-1] if load.indices else None
    if not isinstance(lane, tirx.FloorMod):
        return None
    for axis, index in enumerate(load.indices):
        if isinstance(index, tirx.FloorDiv) and index.a.same_as(lane.a) and same(index.b, lane.b):
            return axis
    return None


def packed(weights: np.ndarray, columns: int) -> np.ndarray:
    """`[K, N]` as `[ceil(N / columns), K, columns]`, padded with zeros; same dtype."""
    depth, width = weights.shape
    panels = -(-width // columns)
    padded = np.zeros((depth, panels * columns), weights.dtype)
    padded[:, :width] = weights
    return np.ascontiguousarray(padded.reshape(depth, panels, columns).transpose(1, 0, 2))


@dataclass(frozen=True)
class Steps:
    """Of a 2-D convolution: strides and dilation of both axes."""

    row_stride: int
    column_stride: int
    row_dilation: int
    column_dilation: int

    def extents(self, height: Any, width: Any, kernel: Sequence[int]) -> list[Any]:
        """Of the output, over a padded map."""
        return [
            tirx.floordiv(padded - (size - 1) * dilation - 1, stride) + 1
            for padded, size, stride, dilation in (
                (height, kernel[0], self.row_stride, self.row_dilation),
                (width, kernel[1], self.column_stride, self.column_dilation),
            )
        ]

    def pixel(self, y: Any, x: Any, i: Any, j: Any) -> tuple[Any, Any]:
        """Of the padded map: what element (i, j) of the kernel meets for pixel (y, x) of the output."""
        return y * self.row_stride + i * self.row_dilation, x * self.column_stride + j * self.column_dilation


@mutator
class _Packer(PyExprMutator):  # type: ignore[misc]
    def __init__(self, mod: IRModule, unit: VectorUnit, tuned: Choices, precision: str) -> None:
        super().__init__(mod)
        self._unit = unit
        self._tuned = tuned
        self._precision = precision
        self._packed: dict[tuple[Any, int], Any] = {}

    def run(self) -> IRModule:
        for name, func in self.builder_.get().functions.items():
            if isinstance(func, relax.Function):
                self.builder_.update_func(name, self.visit_expr(func))
        return self.builder_.get()

    def visit_call_(self, call: ir.Call) -> Any:
        call = self.visit_expr_post_order(call)
        if call.op == ir.Op.get("relax.nn.conv2d") and call.attrs.data_layout == "NHWC":
            return self._convolution(call)
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
        pairs = self._in_pairs(weights)
        if pairs:
            features = self._narrowed(features)
        panels = self._panels(weights, [*features.ty.shape][:-1], width)
        return self.builder_.call_te(
            _packed_matmul, features, panels, width, pairs, primfunc_name_hint="packed_matmul", primfunc_attrs=_FUSABLE
        )

    def _in_pairs(self, weights: Any) -> bool:
        """The product is one of bfloat16 pairs: no pair reaches over the end of the channels, `[..., C, N]`."""
        single = str(weights.ty.dtype.dtype) == "float32"
        return self._precision == "bf16" and single and int(weights.ty.shape[-2]) % 2 == 0

    def _narrowed(self, features: Any) -> Any:
        return self.builder_.emit_te(narrow.narrowed, features, primfunc_name_hint="narrow")

    def _panels(self, weights: Any, rows: Sequence[Any], width: int) -> Any:
        """Constant weights `[*K, width]` packed for a product with so many rows; once for all its users."""
        number, depth = _static_rows(rows), math.prod(int(extent) for extent in weights.ty.shape) // width
        dtype = str(weights.ty.dtype.dtype)
        choice = self._tuned.of(None if number is None else Product(1, number, width, depth, dtype, packed=True))
        vectors = choose_tile(number, width, self._unit).vectors if choice is None else choice.vectors
        columns = vectors * self._unit.lanes
        key = (weights, columns)
        if key not in self._packed:
            matrix = weights.value.numpy().reshape(-1, width)
            if self._in_pairs(weights):
                matrix = narrow.paired_weights(matrix)
            elif self._precision == "fp16":
                matrix = halved(matrix)
            self._packed[key] = relax.const(packed(matrix, columns))
        return self._packed[key]

    def _convolution(self, call: ir.Call) -> Any:
        """A channels-last convolution: a matrix product over patches that are read in place, of a padded map."""
        (data, weights), attributes = call.args, call.attrs
        top, left, bottom, right = (int(v) for v in attributes.padding)
        if top or left or bottom or right:
            data = self.builder_.emit(relax.op.nn.pad(data, [0, 0, top, bottom, left, right, 0, 0]))
        steps = Steps(*(int(v) for v in (*attributes.strides, *attributes.dilation)))
        if int(attributes.groups) > 1:
            depthwise = partial(_depthwise, steps=steps)
            return self.builder_.call_te(depthwise, data, weights, primfunc_name_hint="depthwise_conv2d")
        size, width = [int(v) for v in weights.ty.shape][:2], int(weights.ty.shape[3])
        panels = self._panels(weights, [*call.ty.shape][:-1], width)
        pairs = self._in_pairs(weights)
        if pairs:
            data = self._narrowed(data)
        convolution = partial(_packed_convolution, size=size, width=width, steps=steps, pairs=pairs)
        return self.builder_.call_te(
            convolution, data, panels, primfunc_name_hint="packed_conv2d", primfunc_attrs=_FUSABLE
        )


def _static_rows(extents: Sequence[Any]) -> int | None:
    rows = 1
    for extent in extents:
        if not isinstance(extent, tirx.IntImm):
            return None
        rows *= int(extent)
    return rows


def _packed_matmul(features: te.Tensor, weights: te.Tensor, width: int, pairs: bool) -> te.Tensor:
    """out[..., n] = sum_k features[..., k] weights[n // columns, k, n % columns]; pairs: of two channels in each k."""
    columns = int(weights.shape[2])
    k = te.reduce_axis((tirx.IntImm("int64", 0), weights.shape[1]), "k")

    def element(*at: Any) -> Any:
        n = at[-1]
        return te.sum(
            _product(features, at[:-1], k, weights[tirx.floordiv(n, columns), k, tirx.floormod(n, columns)], pairs),
            axis=k,
        )

    return te.compute((*features.shape[:-1], tirx.IntImm("int64", width)), element, name="packed_matmul")


def _product(features: te.Tensor, at: Sequence[Any], channel: Any, weight: Any, pairs: bool) -> Any:
    if pairs:
        return narrow.product(features, at, channel, weight)
    feature = features[(*at, channel)]
    # Weights may be narrower than what they are multiplied by.
    return feature * (weight if weight.dtype == feature.dtype else weight.astype(feature.dtype))


def _packed_convolution(
    data: te.Tensor, weights: te.Tensor, size: Sequence[int], width: int, steps: Steps, pairs: bool
) -> te.Tensor:
    """out[b, y, x, n] = sum over i, j, c of data[b, y s + i d, x s + j d, c] w[i, j, c, n], w packed over (i, j, c)."""
    batch, height, across, channels = data.shape
    (rows, in_row), columns = size, int(weights.shape[2])
    shape = (batch, *steps.extents(height, across, size), tirx.IntImm("int64", width))
    channels = int(channels) // 2 if pairs else int(channels)
    i, j, c = _reduced(rows, "i"), _reduced(in_row, "j"), _reduced(channels, "c")

    def element(b: Any, y: Any, x: Any, n: Any) -> Any:
        weight = weights[tirx.floordiv(n, columns), (i * in_row + j) * channels + c, tirx.floormod(n, columns)]
        return te.sum(_product(data, (b, *steps.pixel(y, x, i, j)), c, weight, pairs), axis=[i, j, c])

    return te.compute(shape, element, name="packed_conv2d")


def _reduced(extent: int, name: str) -> Any:
    return te.reduce_axis((tirx.IntImm("int64", 0), tirx.IntImm("int64", extent)), name)


def _depthwise(data: te.Tensor, weights: te.Tensor, steps: Steps) -> te.Tensor:
    """out[b, y, x, c] = sum over (i, j) of data[b, y s + i d, x s + j d, c] weights[i, j, 0, c]."""
    batch, height, width, channels = data.shape
    size = [int(extent) for extent in weights.shape[:2]]
    shape = (batch, *steps.extents(height, width, size), channels)
    i, j = _reduced(size[0], "i"), _reduced(size[1], "j")

    def element(b: Any, y: Any, x: Any, c: Any) -> Any:
        return te.sum(data[(b, *steps.pixel(y, x, i, j), c)] * weights[i, j, 0, c], axis=[i, j])

    return te.compute(shape, element, name="depthwise_conv2d")
