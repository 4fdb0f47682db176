# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""What the CPU kernels have in common. A stage is TVMScript, inlined into the kernel that calls it."""

from __future__ import annotations

from tvm.ir import Expr
from tvm.script import tirx as T
from tvm.tirx import Shuffle

from attnrewrite.lowering.kernels.vector_math import exp2_of_nonpositive

# Bytes: what may be expected of the address of a part of a map.
UNALIGNED = 4


@T.inline
def exponentiate(weights, reciprocal, keys, vectors, lanes):
    """weights[m] = exp2(weights[m] - max over m) in place, reciprocal = 1 / their sum over m; all NaN if all are -inf.

    weights: float32 [at least keys, vectors, lanes]; reciprocal: float32 [vectors, lanes].
    """
    largest = T.alloc_buffer((vectors, lanes), "float32", scope="local")
    total = T.alloc_buffer((vectors, lanes), "float32", scope="local")
    for v in T.unroll(vectors):
        for lane in T.vectorized(lanes):
            largest[v, lane] = weights[0, v, lane]
            total[v, lane] = T.float32(0)
    for m in range(1, keys):
        for v in T.unroll(vectors):
            for lane in T.vectorized(lanes):
                largest[v, lane] = T.max(largest[v, lane], weights[m, v, lane])
    for m in range(keys):
        for v in T.unroll(vectors):
            weight = T.alloc_buffer((lanes,), "float32", scope="local")
            for lane in T.vectorized(lanes):
                weight[lane] = exp2_of_nonpositive(weights[m, v, lane] - largest[v, lane])
            for lane in T.vectorized(lanes):
                total[v, lane] = total[v, lane] + weight[lane]
            for lane in T.vectorized(lanes):
                weights[m, v, lane] = weight[lane]
    for v in T.unroll(vectors):
        for lane in T.vectorized(lanes):
            reciprocal[v, lane] = T.float32(1) / total[v, lane]


def picked(a: Expr, b: Expr, lanes: int, group: int, offset: int) -> Expr:
    """Half of the groups of two vectors, in 128-bit parts where groups are smaller than those.

    Groups of 1 or 2 elements: those of the lower (offset 0) or upper half of every part, of a and b in turn. Groups of
    4: every second one, from `offset` on, of a and then of b. Each is one instruction on x86 and on ARM.
    """
    if group < 4:
        first = [part + offset * 2 + i for part in range(0, lanes, 4) for i in range(0, 2, group)]
        indices = [i + e + side for i in first for side in (0, lanes) for e in range(group)]
    else:
        indices = [i + e for i in range(offset * group, 2 * lanes, 2 * group) for e in range(group)]
    return Shuffle([a, b], [T.int32(i) for i in indices])


@T.inline
def transpose_square(rows, lanes):
    """rows[-1] = the transpose of the square rows[0], by shuffles of registers.

    rows: float32 [log2(lanes) + 1, lanes, lanes], local; lanes 4, 8 or 16. Four rows and four columns at a time change
    places within the 128-bit parts of the vectors, then the parts themselves do.
    """
    for k in T.unroll(lanes // 2):
        a = T.meta_var(rows[0, 2 * k, T.Ramp(0, 1, lanes)])
        b = T.meta_var(rows[0, 2 * k + 1, T.Ramp(0, 1, lanes)])
        rows[1, 2 * k, T.Ramp(0, 1, lanes)] = picked(a, b, lanes, 1, 0)
        rows[1, 2 * k + 1, T.Ramp(0, 1, lanes)] = picked(a, b, lanes, 1, 1)
    for k in T.unroll(lanes // 4):
        for j in T.unroll(2):
            a = T.meta_var(rows[1, 4 * k + j, T.Ramp(0, 1, lanes)])
            b = T.meta_var(rows[1, 4 * k + 2 + j, T.Ramp(0, 1, lanes)])
            rows[2, 4 * k + 2 * j, T.Ramp(0, 1, lanes)] = picked(a, b, lanes, 2, 0)
            rows[2, 4 * k + 2 * j + 1, T.Ramp(0, 1, lanes)] = picked(a, b, lanes, 2, 1)
    if lanes > 4:
        for k in T.unroll(lanes // 8):
            for j in T.unroll(4):
                a = T.meta_var(rows[2, 8 * k + j, T.Ramp(0, 1, lanes)])
                b = T.meta_var(rows[2, 8 * k + 4 + j, T.Ramp(0, 1, lanes)])
                rows[3, 8 * k + j, T.Ramp(0, 1, lanes)] = picked(a, b, lanes, 4, 0)
                rows[3, 8 * k + 4 + j, T.Ramp(0, 1, lanes)] = picked(a, b, lanes, 4, 1)
    if lanes > 8:
        for j in T.unroll(8):
            a = T.meta_var(rows[3, j, T.Ramp(0, 1, lanes)])
            b = T.meta_var(rows[3, 8 + j, T.Ramp(0, 1, lanes)])
            rows[4, j, T.Ramp(0, 1, lanes)] = picked(a, b, lanes, 4, 0)
            rows[4, 8 + j, T.Ramp(0, 1, lanes)] = picked(a, b, lanes, 4, 1)
