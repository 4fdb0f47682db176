"""The part of FlashWindowAttention's logits that depends on the query alone: decomposed relative position.

    term[n, m] = relative_scale * sum_a q[n] . R_a[n_a, m_a]

with n_a, m_a the positions of query and key along axis a of their windows (docs/ops.md).
"""

from __future__ import annotations

import math

from attnrewrite.dims import static
from attnrewrite.functions.body import BodyBuilder
from attnrewrite.graph import Value
from attnrewrite.localattention.geometry import Sizes


def relative_logits(b: BodyBuilder, q: Value, table: Value, scale: float, window: Sizes, key_window: Sizes) -> Value:
    """[G, nH, N, M] of an unscaled query [G, nH, N, d] and its table [nH or 1, R, d] (`relative_position`)."""
    rows, heads, tokens, _ = q.known_shape
    keys = math.prod(key_window)
    if static(table.known_shape[1]) != sum(w * k for w, k in zip(window, key_window, strict=True)):
        window, key_window = (static(tokens),), (keys,)
    if scale != 1.0:
        q = b.op("Mul", [q, b.scalar(scale, q)], q.known_shape)
    per_query = static(heads) * static(tokens)
    total: Value | None = None
    start = 0
    for axis, (extent, length) in enumerate(zip(window, key_window, strict=True)):
        part = b.slice(table, [1], [start], [start + extent * length]) if len(window) > 1 else table
        start += extent * length
        of_axis = _axis_logits(b, q, part, window, axis, length)
        if total is None:
            total = of_axis
            continue
        before = math.prod(key_window[:axis])
        columns = b.reshape(total, (rows, per_query, before, 1))
        total = b.op(
            "Add", [columns, b.reshape(of_axis, (rows, per_query, 1, length))], (rows, per_query, before, length)
        )
    assert total is not None
    return b.reshape(total, (rows, heads, tokens, keys))


def _axis_logits(b: BodyBuilder, q: Value, table: Value, window: Sizes, axis: int, length: int) -> Value:
    """[G, nH, N, kw_a]: q[n] . table[n_a, j] for the keys j along one axis; table [nH or 1, w_a * kw_a, d]."""
    rows, heads, tokens, channels = q.known_shape
    before, extent, behind = math.prod(window[:axis]), window[axis], math.prod(window[axis + 1 :])
    inner, shared = static(channels), static(table.known_shape[0])
    apart = b.reshape(q, (rows, static(heads) * before, extent, behind * inner))
    if shared == 1:  # one table for all heads: they are rows like the windows
        apart = b.transpose(apart, (2, 0, 1, 3))
        matrix = b.transpose(b.reshape(table, (extent, length, inner)), (0, 2, 1))
        product = b.op(
            "MatMul",
            [b.reshape(apart, (extent, rows * (static(heads) * before * behind), inner)), matrix],
            (extent, rows * (static(heads) * before * behind), length),
        )
        back = b.reshape(product, (extent, rows, static(heads) * before, behind * length))
        back = b.transpose(back, (1, 2, 0, 3))
        return b.reshape(back, (rows, heads, tokens, length))
    apart = b.reshape(apart, (rows, heads, before, extent, behind * inner))
    apart = b.transpose(apart, (1, 3, 0, 2, 4))
    count = rows * (before * behind)
    matrix = b.transpose(b.reshape(table, (heads, extent, length, inner)), (0, 1, 3, 2))
    product = b.op("MatMul", [b.reshape(apart, (heads, extent, count, inner)), matrix], (heads, extent, count, length))
    back = b.transpose(b.reshape(product, (heads, extent, rows, before, behind * length)), (2, 0, 3, 1, 4))
    return b.reshape(back, (rows, heads, tokens, length))
