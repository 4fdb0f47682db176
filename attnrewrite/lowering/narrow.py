"""Products by weights (linear layers, convolutions) with operands of 16 bits: what `--precision` means on a CPU.

    fp16    y = x fp16(W)            half the memory; multiplied and summed in float32
    bf16    y = bf16(x) . bf16(W)    summed in float32 too, by instructions that take two products at once

Only these operands are narrow. What passes between layers, biases, norms, softmax and every sum stay float32, so
nothing overflows that did not before: bfloat16 has the exponents of float32, and weights beyond the range of float16
become its largest number. Sums in float16 would be faster on ARM, but 768 or 3072 products of normal numbers summed
there are off by 7e-3 or 1.2e-2 of the largest result, where float16 weights alone cost 2e-4; and they overflow.

bfloat16 values travel as their bits, because TVM widens its own bfloat16 wherever it meets arithmetic: features
`uint16 [..., K]`, weights `int32 [K / 2, N]` with the rows 2k and 2k + 1 in the low and high half of a word.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from tvm import ir, te, tirx
from tvm.script import tirx as T
from tvm.target import Target, codegen

from attnrewrite.errors import UserError

# Stands for a[0] * b[0] + a[1] * b[1] on words of two bfloat16 values; schedules write the instruction.
DOT = "attnrewrite_dot_bf16"

# TVM has no type for bfloat16 vectors in LLVM, so the instruction hides in a function that LLVM inlines.
DOT_LLVM = """
declare <16 x float> @llvm.x86.avx512bf16.dpbf16ps.512(<16 x float>, <32 x bfloat>, <32 x bfloat>)
define <16 x float> @attnrewrite_dot_bf16(<16 x float> %sum, <16 x i32> %a, <16 x i32> %b) {
  %left = bitcast <16 x i32> %a to <32 x bfloat>
  %right = bitcast <16 x i32> %b to <32 x bfloat>
  %result = call <16 x float> @llvm.x86.avx512bf16.dpbf16ps.512(
      <16 x float> %sum, <32 x bfloat> %left, <32 x bfloat> %right)
  ret <16 x float> %result
}
"""
DOT_LANES = 16

_INFINITY = 0x7F800000
_NAN = 0x7FC0


def check_bf16(target: Target) -> None:
    """Raises UserError unless the target multiplies bfloat16 values."""
    if target.kind.name != "llvm" or not codegen.target_has_features("avx512bf16", target):
        raise UserError("precision bf16 needs an x86 CPU with AVX512-BF16, which the target does not have")


def to_bf16(values: np.ndarray) -> np.ndarray:
    """The bits of the nearest bfloat16 values, ties to even; uint16, same shape as the float32 values."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32).astype(np.uint64)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(_NAN), rounded)


def paired_weights(weights: np.ndarray) -> np.ndarray:
    """float32 `[K, N]`, K even, as int32 `[K / 2, N]`."""
    bits = to_bf16(weights).astype(np.uint32)
    return (bits[0::2] | (bits[1::2] << 16)).view(np.int32)


def narrowed(features: te.Tensor) -> te.Tensor:
    """float32 as the bits of bfloat16, element by element."""

    def element(*at: Any) -> Any:
        bits = T.reinterpret("uint32", features(*at))
        rounded = T.shift_right(bits + T.uint32(0x7FFF) + T.bitwise_and(T.shift_right(bits, 16), 1), 16)
        is_nan = T.bitwise_and(bits, T.uint32(0x7FFFFFFF)) > T.uint32(_INFINITY)
        return T.cast(T.Select(is_nan, T.uint32(_NAN), rounded), "uint16")

    return te.compute(features.shape, element, name="narrow")


def product(features: te.Tensor, at: Sequence[Any], pair: Any, weights: Any) -> Any:
    """The two channels 2 pair and 2 pair + 1 of narrowed features at a place, times a word of paired weights."""
    low, high = (T.cast(features(*at, 2 * pair + half), "int32") for half in (0, 1))
    return T.call_pure_extern("float32", DOT, T.bitwise_or(low, T.shift_left(high, 16)), weights)


def dot_operands(value: Any) -> list[Any] | None:
    """The two words of a product of pairs; None for anything else."""
    if not isinstance(value, ir.Call) or not isinstance(value.op, ir.Op) or value.op.name != "tirx.call_pure_extern":
        return None
    name, *operands = value.args
    return operands if isinstance(name, ir.StringImm) and name.value == DOT else None


def multiply_add(sums: tirx.Buffer, vector: int, word: Any, panel: tirx.Buffer, at: Sequence[Any]) -> Any:
    """sums[vector] += word . panel[*at, vector], on whole vectors."""
    lanes = tirx.Ramp(tirx.IntImm("int64", vector * DOT_LANES), tirx.IntImm("int64", 1), DOT_LANES)
    total = T.call_pure_extern(
        f"float32x{DOT_LANES}",
        DOT,
        tirx.BufferLoad(sums, [lanes]),
        tirx.Broadcast(word, DOT_LANES),
        tirx.BufferLoad(panel, [*at, lanes]),
    )
    return tirx.BufferStore(sums, total, [lanes])


def with_dot(body: Any) -> Any:
    """The statement with the instruction at hand."""
    return tirx.AttrStmt(tirx.IntImm("int32", 0), "pragma_import_llvm", ir.StringImm(DOT_LLVM), body)
