# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""What the CPU kernels have in common. A stage is TVMScript, inlined into the kernel that calls it."""

from __future__ import annotations

from tvm.script import tirx as T

from attnrewrite.lowering.kernels.vector_math import exp2_of_nonpositive


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
