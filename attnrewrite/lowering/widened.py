"""Operators on bfloat16 tensors of GPUs, computed in float32.

    y = op(x, ...)    ->    y = bfloat16(op(float32(x), ...))

bfloat16 has eight bits for a number: a mean, an exponential or a difference that is rounded to them in between is off
by more than the result's own rounding. So tensors are narrow in memory alone, as TVM's kernels for float16 have it with
norms. Products and convolutions, whose operands are multiplied as they are and summed in float32 by the schedules, and
operators that only move numbers stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm import ir, te, tirx, topi

NARROW, WIDE = "bfloat16", "float32"

_PRODUCTS = ("matmul", "nn.conv1d", "nn.conv2d", "nn.conv3d", "nn.conv1d_transpose", "nn.conv2d_transpose")
_MOVEMENT = (
    "astype", "broadcast_to", "concat", "dynamic_strided_slice", "expand_dims", "flatten", "flip", "full", "full_like",
    "gather_elements", "gather_nd", "index_tensor", "layout_transform", "nn.batch_flatten", "nn.pad",
    "nn.pixel_shuffle", "ones", "ones_like", "permute_dims", "repeat", "reshape", "scatter_elements", "scatter_nd",
    "slice_scatter", "split", "squeeze", "stack", "strided_slice", "take", "tile", "tril", "triu", "where", "zeros",
    "zeros_like",
)  # fmt: skip
_AS_THEY_ARE = frozenset(f"relax.{name}" for name in (*_PRODUCTS, *_MOVEMENT))

Legalize = Callable[[Any, Any], Any]


def legalizations() -> dict[str, Legalize]:
    """By operator, for TVM's LegalizeOps: its own, with what they compute of bfloat16 tensors in float32."""
    names = (name for name in ir.Op.list_op_names() if name.startswith("relax.") and name not in _AS_THEY_ARE)
    own = {name: ir.Op.get(name).get_attr("FLegalize") for name in names}
    return {name: _widened(legalize) for name, legalize in own.items() if legalize is not None}


def _widened(legalize: Legalize) -> Legalize:
    def legalized(builder: Any, call: Any) -> Any:
        return legalize(_Builder(builder), call)

    return legalized


class _Builder:
    """A block builder whose tensor expressions are of widened tensors."""

    def __init__(self, builder: Any) -> None:
        self._builder = builder

    def __getattr__(self, name: str) -> Any:
        return getattr(self._builder, name)

    def call_te(self, function: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        def computed(*given: Any, **named_given: Any) -> Any:
            if not any(map(_is_narrow, (*given, *named_given.values()))):
                return function(*given, **named_given)
            wide = function(*map(_wide, given), **{name: _wide(value) for name, value in named_given.items()})
            return [_narrow(tensor) for tensor in wide] if isinstance(wide, list | tuple | ir.Array) else _narrow(wide)

        named.setdefault("primfunc_name_hint", getattr(function, "__name__", "computed"))
        return self._builder.call_te(computed, *arguments, **named)


def _is_narrow(value: Any) -> bool:
    if isinstance(value, list | tuple | ir.Array):
        return any(map(_is_narrow, value))
    if isinstance(value, te.Tensor):
        return str(value.dtype) == NARROW
    return isinstance(value, tirx.FloatImm) and str(value.ty.dtype) == NARROW


def _wide(value: Any) -> Any:
    if not _is_narrow(value):
        return value
    if isinstance(value, list | tuple | ir.Array):
        return [_wide(part) for part in value]
    return topi.cast(value, WIDE) if isinstance(value, te.Tensor) else tirx.FloatImm(WIDE, value.value)


def _narrow(value: Any) -> Any:
    return topi.cast(value, NARROW) if str(value.dtype) == WIDE else value
