"""Operands of the window kernel for CPUs as it reads them: what is added to the logits lies with its queries in lanes.

The kernel starts the sums of its logits, which are in the exponent's base 2, from these operands, so they are
transposed, padded to whole vectors and multiplied by log2(e): once, while compiling, where they are constants. What
one vector of queries reads for all keys lies side by side, so that it streams from the caches further away.

    bias               [1 or nW, nH, N, M]  ->  float32 [1 or nW, nH, ceil(N / lanes), M, lanes]
    mask               [nW, N, M]           ->  float32 [nW, ceil(N / lanes), M, lanes]
    mask               [nW, 1, M]           ->  float32 [nW, 1, M, 1]
    relative_position  [1 or nH, R, d]      ->  float32 [1 or nH, sum of w_a, d, lanes * ceil(max kw_a / lanes)]

The other operands are read as they are. Letters as in docs/ops.md.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from attnrewrite.functions.spec import FlashWindowAttention
from attnrewrite.localattention.geometry import ceil_to_multiple
from attnrewrite.lowering.kernels.vector_math import LOG2_E

LAID_OUT = ("bias", "mask", "relative_position")


def lay_out(name: str, operand: np.ndarray, spec: FlashWindowAttention, lanes: int) -> np.ndarray:
    """The operand in the kernel's layout, for vectors of `lanes`; of LAID_OUT, others come back as they are."""
    if name == "relative_position":
        return _relative_position(operand.astype(np.float64), spec, lanes)
    if name not in LAID_OUT:
        return operand
    *outer, queries, keys = operand.shape
    width = _vector(queries, lanes)
    padded = np.pad(operand.astype(np.float64), [(0, 0)] * len(outer) + [(0, -queries % width), (0, 0)])
    vectors = padded.reshape(*outer, -1, width, keys).swapaxes(-1, -2)
    scaled = vectors * LOG2_E
    # The lowest number there is masks as well; a row of nothing else is a mean of all values, not of none.
    lowest = np.finfo(np.float32).min
    return np.ascontiguousarray(np.where(np.isfinite(scaled), np.clip(scaled, lowest, -lowest), scaled), np.float32)


def lay_out_computed(operand: Any, lanes: int, emit: Callable[[Any], Any]) -> Any:
    """The same of a bias or mask that is a Relax expression; `emit` binds an intermediate result."""
    from tvm import relax

    *outer, queries, keys = map(int, operand.ty.shape)
    width = _vector(queries, lanes)
    value = emit(relax.op.multiply(emit(relax.op.astype(operand, "float32")), relax.const(LOG2_E, "float32")))
    if queries % width:
        value = emit(relax.op.nn.pad(value, [0] * (2 * len(outer) + 1) + [-queries % width, 0, 0]))
    value = emit(relax.op.reshape(value, [*outer, -(-queries // width), width, keys]))
    axes = len(outer)
    return emit(relax.op.permute_dims(value, [*range(axes), axes, axes + 2, axes + 1]))


def _vector(queries: int, lanes: int) -> int:
    """Queries side by side; what is the same for all of them is read as one number."""
    return 1 if queries == 1 else lanes


def is_decomposed(spec: FlashWindowAttention, rows: int) -> bool:
    """Whether a table of relative positions with so many rows is one table per axis."""
    window, keys = spec.geometry.window_size, spec.geometry.keys
    return rows == sum(w * k for w, k in zip(window, window if keys is None else keys.window_size, strict=True))


def _relative_position(table: np.ndarray, spec: FlashWindowAttention, lanes: int) -> np.ndarray:
    """Every query coordinate has a matrix [d, key coordinates], the axes one after the other."""
    window = spec.geometry.window_size
    key_window = window if spec.geometry.keys is None else spec.geometry.keys.window_size
    heads, _, channels = table.shape
    laid_out = np.zeros((heads, sum(window), channels, ceil_to_multiple(max(key_window), lanes)), np.float32)
    row, first = 0, 0
    for extent, length in zip(window, key_window, strict=True):
        own = table[:, row : row + extent * length].reshape(heads, extent, length, channels)
        laid_out[:, first : first + extent, :, :length] = own.swapaxes(2, 3) * (spec.relative_scale * LOG2_E)
        row, first = row + extent * length, first + extent
    return laid_out
