# mypy: disable-error-code="no-untyped-def, untyped-decorator, valid-type"
"""FlashWindowAttention for CPUs: one window and head at a time, everything between gather and scatter in cache.

For every window and head the tokens are gathered with shift and padding absorbed, and then, for one tile of queries:

    logits[m, n] = key[m] . query[n] * scale + bias[n, m] + mask    lanes are queries, so that softmax is vertical
    logits       = exp2(logits - max over m)                        scale, bias and mask carry the factor log2(e)
    out[n]       = sum_m logits[m, n] * value[m] / sum_m logits[m, n]    lanes are channels, written into the map

Queries are padded to whole vectors, keys to whole register blocks; the padding is computed and ignored. Memory per
thread is bounded by one tile of queries against all keys of a window. Letters as in docs/ops.md, n a query, m a key.

Stages are TVMScript, inlined into the kernel; a `feature_map` is a flat view [B, pixels, channels].
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from tvm.ir import Expr
from tvm.script import tirx as T
from tvm.target import Target
from tvm.tirx import PrimFunc, Var

from attnrewrite.functions.spec import FlashWindowAttention
from attnrewrite.lowering.kernels.cpu_stages import exponentiate
from attnrewrite.lowering.kernels.vector_math import LOG2_E, vector_unit
from attnrewrite.lowering.kernels.window_cpu_plan import plan_windows


@T.inline
def copy_channels(target, row, feature_map, image, pixel, first, width, lanes):
    """target[row, :width] = feature_map[image, pixel, first : first + width], as float32."""
    for block in range(width // lanes):
        for lane in T.vectorized(lanes):
            target[row, block * lanes + lane] = T.cast(
                feature_map[image, pixel, first + block * lanes + lane], "float32"
            )
    if width % lanes > 0:
        for lane in T.vectorized(width % lanes):
            target[row, width // lanes * lanes + lane] = T.cast(
                feature_map[image, pixel, first + width // lanes * lanes + lane], "float32"
            )


@T.inline
def locate_tokens(plan, pixel, window):
    """pixel[n] = flat pixel of token n of the window, -1 where it has none."""
    for block in range(plan.tiles * plan.vectors):
        for lane in T.vectorized(plan.lanes):
            pixel[block * plan.lanes + lane] = plan.pixel(window, block * plan.lanes + lane)


@T.inline
def gather_tokens(plan, target, feature_map, padding, image, pixel, first, width):
    """target[m, :width] = the key or value of token m; a token outside the map is `padding`, or zero without one."""
    for m in range(plan.tokens):
        if plan.reads_pixel(pixel[m]):
            copy_channels(target, m, feature_map, image, pixel[m], first, width, plan.lanes)
        else:
            for c in range(width):
                if padding is None:
                    target[m, c] = T.float32(0)
                else:
                    target[m, c] = T.cast(padding[first + c], "float32")


@T.inline
def gather_queries(plan, target, feature_map, image, pixel, first, start):
    """target[c, n] = scaled query of token start + n; where the map has none, whatever stood there stays."""
    for n in range(T.min(plan.tile, plan.tokens - start)):
        if plan.reads_pixel(pixel[start + n]):
            for c in range(plan.head_dim):
                query = T.meta_var(feature_map[image, pixel[start + n], first + c])
                target[c, n] = T.cast(query, "float32") * T.float32(plan.scale)


def additive_term(bias: Any, mask: Any, window: Expr, head: Expr, n: Expr, m: Expr) -> Expr:
    """What a logit gets added, as float32."""
    of_bias = None if bias is None else T.cast(bias[window if varies(bias) else 0, head, n, m], "float32")
    of_mask = None if mask is None else T.cast(mask[window, n, m], "float32")
    if of_bias is None or of_mask is None:
        return of_mask if of_bias is None else of_bias
    return of_bias + of_mask


def varies(term: Any) -> bool:
    """An additive term differs from window to window; one that is absent does not."""
    return term is not None and int(term.shape[0]) > 1


@T.inline
def transpose_terms(plan, target, bias, mask, window, head, start):
    """target[m, n] = (bias[n, m] + mask[n, m]) * log2(e) for the queries of one tile; one of the two may be None."""
    for n in range(T.min(plan.tile, plan.tokens - start)):
        for m in range(plan.tokens):
            target[m, n] = additive_term(bias, mask, window, head, start + n, m) * T.float32(LOG2_E)


@T.inline
def compute_logits(plan, logits, keys, queries, terms):
    """logits[m, n] = keys[m] . queries[:, n] + terms[m, n], key_rows keys by one tile of queries at a time."""
    for block in range(plan.padded_keys // plan.key_rows):
        acc = T.alloc_buffer((plan.key_rows, plan.vectors, plan.lanes), "float32", scope="local")
        for j in T.unroll(plan.key_rows):
            for v in T.unroll(plan.vectors):
                for lane in T.vectorized(plan.lanes):
                    if terms is None:
                        acc[j, v, lane] = T.float32(0)
                    else:
                        acc[j, v, lane] = terms[block * plan.key_rows + j, v * plan.lanes + lane]
        for c in range(plan.head_dim):
            for j in T.unroll(plan.key_rows):
                for v in T.unroll(plan.vectors):
                    for lane in T.vectorized(plan.lanes):
                        acc[j, v, lane] = (
                            acc[j, v, lane] + keys[block * plan.key_rows + j, c] * queries[c, v * plan.lanes + lane]
                        )
        for j in T.unroll(plan.key_rows):
            for v in T.unroll(plan.vectors):
                for lane in T.vectorized(plan.lanes):
                    logits[block * plan.key_rows + j, v, lane] = acc[j, v, lane]


@T.inline
def penalise_regions(plan, logits, window, start):
    """Adds mask_value where query and key are of different regions."""
    region = T.alloc_buffer((plan.tiles * plan.tile,), "int32")
    for block in range(plan.tiles * plan.vectors):
        for lane in T.vectorized(plan.lanes):
            region[block * plan.lanes + lane] = plan.region(window, block * plan.lanes + lane)
    for m in range(plan.tokens):
        for v in T.unroll(plan.vectors):
            for lane in T.vectorized(plan.lanes):
                logits[m, v, lane] = logits[m, v, lane] + T.Select(
                    region[m] == region[start + v * plan.lanes + lane], T.float32(0), T.float32(plan.mask_value)
                )


@T.inline
def store_channels(plan, output, image, pixel, first, acc, i, part, factor):
    """Row i of a register block into the map: whole vectors, and of a last one the channels that the head has."""
    for v in T.unroll(plan.value_vectors):
        vector = T.meta_var(part * plan.value_vectors + v)
        if (vector + 1) * plan.value_lanes <= plan.value_dim:
            for lane in T.vectorized(plan.value_lanes):
                output[image, pixel, first + vector * plan.value_lanes + lane] = T.cast(
                    acc[i, v, lane] * factor, plan.dtype
                )
        if plan.value_dim % plan.value_lanes > 0:  # noqa: SIM102 - decided here, the next one once the loop is unrolled
            if vector == plan.value_dim // plan.value_lanes:
                for lane in T.vectorized(plan.value_dim % plan.value_lanes):
                    output[image, pixel, first + vector * plan.value_lanes + lane] = T.cast(
                        acc[i, v, lane] * factor, plan.dtype
                    )


@T.inline
def weigh_values(plan, output, weights, reciprocal, values, image, pixel, first, start):
    """output[pixel[start + n]] = sum_m weights[m, n] * values[m] * reciprocal[n] for the queries of one tile."""
    for block in range(T.ceildiv(T.min(plan.tile, plan.tokens - start), plan.query_rows)):
        for part in T.unroll(plan.value_blocks):
            acc = T.alloc_buffer((plan.query_rows, plan.value_vectors, plan.value_lanes), "float32", scope="local")
            for i in T.unroll(plan.query_rows):
                for v in T.unroll(plan.value_vectors):
                    for lane in T.vectorized(plan.value_lanes):
                        acc[i, v, lane] = T.float32(0)
            for m in range(plan.tokens):
                for i in T.unroll(plan.query_rows):
                    for v in T.unroll(plan.value_vectors):
                        for lane in T.vectorized(plan.value_lanes):
                            acc[i, v, lane] = (
                                acc[i, v, lane]
                                + weights[m, block * plan.query_rows + i]
                                * values[m, (part * plan.value_vectors + v) * plan.value_lanes + lane]
                            )
            for i in T.unroll(plan.query_rows):
                n = T.meta_var(block * plan.query_rows + i)
                if plan.writes_pixel(pixel[start + n]):
                    store_channels(plan, output, image, pixel[start + n], first, acc, i, part, reciprocal[n])


def flash_window_attention(
    spec: FlashWindowAttention,
    present: Collection[str],
    shapes: Mapping[str, Sequence[Any]],
    dtype: str,
    target: Target,
    name: str = "flash_window_attention",
) -> PrimFunc:
    """The kernel for one site: parameters are the present operands in the op's order, then the output [B, *S, nH*dv].

    present: names of the operands given. shapes: shape of each of them, the batch an int or a TIR variable (which the
    kernel replaces by one of its own, read from the query). dtype: float32 or float16, of all operands and the output;
    sums are float32. target: an `llvm` target, for its vector unit.
    """
    plan = plan_windows(spec, shapes, dtype, vector_unit(target))
    batch = shapes["query"][0]
    batch = batch if isinstance(batch, int) else Var("batch", "int64")
    spatial = spec.geometry.feature_size
    pixels = math.prod(spatial)
    query_channels, value_channels = spec.num_heads * plan.head_dim, spec.num_heads * plan.value_dim

    def optional_buffer(handle: Any, operand: str) -> Any:
        return None if handle is None else T.match_buffer(handle, tuple(shapes[operand]), dtype)

    def flat(feature_map: Any, channels: int) -> Any:
        return T.decl_buffer((batch, pixels, channels), dtype, data=feature_map.data)

    @T.jit
    def kernel(
        query: T.handle,
        key: T.handle,
        value: T.handle,
        bias: T.Optional(T.handle),
        mask: T.Optional(T.handle),
        key_padding: T.Optional(T.handle),
        value_padding: T.Optional(T.handle),
        output: T.handle,
    ):
        T.func_attr({"global_symbol": name, "tirx.noalias": True})
        query_map = T.match_buffer(query, (batch, *spatial, query_channels), dtype)
        key_map = T.match_buffer(key, (batch, *spatial, query_channels), dtype)
        value_map = T.match_buffer(value, (batch, *spatial, value_channels), dtype)
        logit_bias = T.meta_var(optional_buffer(bias, "bias"))
        logit_mask = T.meta_var(optional_buffer(mask, "mask"))
        padding_key = T.meta_var(optional_buffer(key_padding, "key_padding"))
        padding_value = T.meta_var(optional_buffer(value_padding, "value_padding"))
        output_map = T.match_buffer(output, (batch, *spatial, value_channels), dtype)
        q = flat(query_map, query_channels)
        k = flat(key_map, query_channels)
        v = flat(value_map, value_channels)
        o = flat(output_map, value_channels)
        has_terms = T.meta_var(logit_bias is not None or logit_mask is not None)
        terms_vary = T.meta_var(varies(logit_bias) or varies(logit_mask))
        for task in T.parallel(batch * plan.tasks_per_head * plan.num_heads):
            keys = T.alloc_buffer((plan.padded_keys, plan.head_dim), "float32")
            values = T.alloc_buffer((plan.tokens, plan.padded_value_dim), "float32")
            queries = T.alloc_buffer((plan.head_dim, plan.tile), "float32")
            logits = T.alloc_buffer((plan.padded_keys, plan.vectors, plan.lanes), "float32")
            reciprocal = T.alloc_buffer((plan.vectors, plan.lanes), "float32")
            pixel = T.alloc_buffer((plan.tiles * plan.tile,), "int32")
            terms = T.meta_var(T.alloc_buffer((plan.padded_keys, plan.tile), "float32") if has_terms else None)
            weights = T.decl_buffer((plan.padded_keys, plan.tile), "float32", data=logits.data)
            factor = T.decl_buffer((plan.tile,), "float32", data=reciprocal.data)
            head: T.let = T.cast(task % plan.num_heads, "int32")
            first_window: T.let = T.cast(task // plan.num_heads % plan.tasks_per_head * plan.windows_per_task, "int32")
            image: T.let = task // (plan.num_heads * plan.tasks_per_head)
            query_channel: T.let = head * plan.head_dim
            value_channel: T.let = head * plan.value_dim
            for t in range(plan.tiles):
                start: T.let = t * plan.tile
                if has_terms and not terms_vary:
                    transpose_terms(plan, terms, logit_bias, logit_mask, 0, head, start)
                for w in range(T.min(plan.windows_per_task, plan.num_windows - first_window)):
                    window: T.let = first_window + w
                    locate_tokens(plan, pixel, window)
                    gather_queries(plan, queries, q, image, pixel, query_channel, start)
                    gather_tokens(plan, keys, k, padding_key, image, pixel, query_channel, plan.head_dim)
                    gather_tokens(plan, values, v, padding_value, image, pixel, value_channel, plan.value_dim)
                    if terms_vary:
                        transpose_terms(plan, terms, logit_bias, logit_mask, window, head, start)
                    compute_logits(plan, logits, keys, queries, terms)
                    if plan.can_cross_regions:  # noqa: SIM102 - decided here, the next one is part of the kernel
                        if plan.has_two_regions(window):
                            penalise_regions(plan, logits, window, start)
                    exponentiate(logits, reciprocal, plan.tokens, plan.vectors, plan.lanes)
                    weigh_values(plan, o, weights, factor, values, image, pixel, value_channel, start)

    absent = {operand: None for operand in FlashWindowAttention.operands[3:7] if operand not in present}
    return kernel.specialize(**absent)
