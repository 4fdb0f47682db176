# mypy: disable-error-code="no-untyped-def, untyped-decorator, valid-type"
"""FlashWindowAttention for CPUs: one window and head at a time, everything between gather and scatter in cache.

For every window and head the keys and values are gathered once, with shift and padding absorbed, and then, for one tile
of queries and one block of keys at a time:

    logits[m, n] = key[m] . query[n] * scale + bias[n, m] + ...     lanes are queries, so that softmax is vertical
    logits       = exp2(logits - largest[n])                        scale, bias and mask carry the factor log2(e)
    out[n]      += sum_m logits[m, n] * value[m]                    lanes are channels or queries

`largest` is that of all blocks so far; with a new block the sums of the earlier ones are scaled down to it, and in the
end divided by the sum of the weights. Queries are transposed in registers, padded to whole vectors; what is padded is
computed and ignored. Letters as in docs/ops.md, n a query, m a key.

The stages are in window_cpu_stages.py, what they read in which layout in window_cpu_operands.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import reduce
from typing import Any

from tvm.ir import Expr
from tvm.script import tirx as T
from tvm.target import Target
from tvm.tirx import PrimFunc, Var

from attnrewrite.functions.spec import FlashWindowAttention
from attnrewrite.lowering.kernels.cpu_stages import UNALIGNED
from attnrewrite.lowering.kernels.vector_math import vector_unit
from attnrewrite.lowering.kernels.window_cpu_operands import LAID_OUT
from attnrewrite.lowering.kernels.window_cpu_plan import WindowPlan, plan_windows
from attnrewrite.lowering.kernels.window_cpu_stages import (
    Place,
    Scratch,
    begin_tile,
    compute_logits,
    exponentiate,
    gather_queries,
    gather_tokens,
    invert_total,
    locate_tokens,
    remember_largest,
    rescale_total,
    score_positions,
    store_by_channel,
    store_square,
    transpose_positions,
    weigh_by_channel,
    weigh_by_query,
)


def initial_logit(
    plan: WindowPlan, bias: Any, mask: Any, positions: Any, place: Place, start: Expr
) -> Callable[[Expr, Expr, Expr], Expr]:
    """What the logits of key m and vector v of the queries from `start` on begin with: the sum of all added to them."""

    def initial(m: Expr, v: Expr, lane: Expr) -> Expr:
        vector = T.floordiv(start, plan.lanes) + v
        terms: list[Expr] = []
        if bias is not None:
            window = place.window if int(bias.shape[0]) > 1 else 0
            terms.append(bias[(window, place.head, *within(bias, vector, m, lane))])
        if mask is not None:
            terms.append(mask[(place.window, *within(mask, vector, m, lane))])
        if positions is not None:
            n = v * plan.lanes + lane
            terms += [positions[a, plan.key_coordinate(m, a), n] for a in range(len(plan.key_window))]
        return reduce(lambda a, b: a + b, terms) if terms else T.float32(0)

    def within(term: Any, vector: Expr, m: Expr, lane: Expr) -> tuple[Any, ...]:
        return (vector, m, lane) if int(term.shape[-1]) > 1 else (0, m, 0)

    return initial


@T.inline
def attend_tile(plan, scratch, query_map, output_map, bias, mask, place, start):
    """One tile of queries of one window and head, from the feature map into the feature map."""
    queries = T.meta_var(T.min(plan.tile, plan.tokens - start))
    initial = T.meta_var(initial_logit(plan, bias, mask, scratch.tile_positions, place, start))
    gather_queries(plan, scratch, query_map, place, start)
    if plan.has_positions:
        transpose_positions(plan, scratch, start)
    begin_tile(plan, scratch)
    for block in range(plan.key_blocks):
        first_key: T.let = block * plan.key_block
        count = T.meta_var(T.min(plan.key_block, plan.keys - first_key) if plan.key_blocks > 1 else plan.keys)
        if plan.key_blocks > 1:
            remember_largest(plan, scratch)
        if plan.can_cross_regions:
            if plan.has_two_regions(place.window):
                compute_logits(plan, scratch, first_key, count, start, initial, True)
            else:
                compute_logits(plan, scratch, first_key, count, start, initial, False)
        else:
            compute_logits(plan, scratch, first_key, count, start, initial, False)
        if plan.key_blocks > 1:
            rescale_total(plan, scratch)
        exponentiate(plan, scratch, count)
        if plan.key_blocks == 1:
            invert_total(plan, scratch)
        if plan.by_channel:
            weigh_by_channel(plan, scratch, output_map, place, start, first_key, count, queries)
        else:
            weigh_by_query(plan, scratch, first_key, count)
    if plan.key_blocks > 1:
        invert_total(plan, scratch)
    if plan.by_channel:
        if plan.key_blocks > 1:
            store_by_channel(plan, scratch, output_map, place, start, queries)
    else:
        for part in range(plan.value_dim // plan.lanes):
            store_square(plan, scratch, output_map, place, start, part, plan.lanes)
        if plan.value_dim % plan.lanes > 0:
            store_square(
                plan, scratch, output_map, place, start, plan.value_dim // plan.lanes, plan.value_dim % plan.lanes
            )


def flash_window_attention(
    spec: FlashWindowAttention,
    present: Collection[str],
    shapes: Mapping[str, Sequence[Any]],
    dtype: str,
    target: Target,
    name: str = "flash_window_attention",
    steps: Mapping[str, int] | None = None,
) -> PrimFunc:
    """The kernel for one site: parameters are the present operands in the op's order, then the output [B, *S, nH*dv].

    present: names of the operands given. shapes: shape of each of them, the batch an int or a TIR variable (which the
    kernel replaces by one of its own, read from the query); those of LAID_OUT in the layout of `lay_out` for the
    target's lanes, float32. dtype: float32 or float16, of all other operands and the output; sums are float32.
    target: an `llvm` target, for its vector unit. steps: of query, key and value, how many numbers one pixel
    lies behind another, for those that are parts of wider maps; they are passed as a vector of all the numbers from
    their first to their last.
    """
    plan = plan_windows(spec, present, shapes, dtype, vector_unit(target))
    rest = plan.rest()
    batch = shapes["query"][0]
    batch = batch if isinstance(batch, int) else Var("batch", "int64")
    geometry, axes = spec.geometry, len(spec.geometry.feature_size)
    query_channels, value_channels = spec.num_heads * plan.head_dim, spec.num_heads * plan.value_dim

    def optional_buffer(handle: Any, operand: str) -> Any:
        own = "float32" if operand in LAID_OUT else dtype
        return None if handle is None else T.match_buffer(handle, tuple(shapes[operand]), own)

    def map_of(handle: Any, operand: str, extents: Sequence[int], channels: int) -> Any:
        """The operand as it is passed: a map, or the numbers from its first to its last."""
        if operand in (steps or {}):
            return T.match_buffer(handle, (Var(f"{operand}_numbers", "int64"),), dtype, align=UNALIGNED)
        return T.match_buffer(handle, (batch, *extents, channels), dtype)

    def flat(feature_map: Any, operand: str, extents: Sequence[int], channels: int) -> Any:
        step = (steps or {}).get(operand)
        if step is None:
            return T.decl_buffer((batch, math.prod(extents), channels), dtype, data=feature_map.data)
        return T.decl_buffer((batch, math.prod(extents), step), dtype, data=feature_map.data, align=UNALIGNED)

    @T.jit
    def kernel(
        query: T.handle,
        key: T.handle,
        value: T.handle,
        bias: T.Optional(T.handle),
        mask: T.Optional(T.handle),
        key_padding: T.Optional(T.handle),
        value_padding: T.Optional(T.handle),
        relative_position: T.Optional(T.handle),
        output: T.handle,
    ):
        T.func_attr({"global_symbol": name, "tirx.noalias": True})
        query_map = T.meta_var(map_of(query, "query", geometry.feature_size, query_channels))
        key_map = T.meta_var(map_of(key, "key", geometry.key_size, query_channels))
        value_map = T.meta_var(map_of(value, "value", geometry.key_size, value_channels))
        logit_bias = T.meta_var(optional_buffer(bias, "bias"))
        logit_mask = T.meta_var(optional_buffer(mask, "mask"))
        padding_key = T.meta_var(optional_buffer(key_padding, "key_padding"))
        padding_value = T.meta_var(optional_buffer(value_padding, "value_padding"))
        positions_table = T.meta_var(optional_buffer(relative_position, "relative_position"))
        output_map = T.match_buffer(output, (batch, *geometry.feature_size, value_channels), dtype)
        q = T.meta_var(flat(query_map, "query", geometry.feature_size, query_channels))
        k = T.meta_var(flat(key_map, "key", geometry.key_size, query_channels))
        v = T.meta_var(flat(value_map, "value", geometry.key_size, value_channels))
        o = T.meta_var(flat(output_map, "output", geometry.feature_size, value_channels))
        for task in T.parallel(batch * plan.window_groups * plan.tile_groups * plan.num_heads):
            pixel = T.alloc_buffer((plan.located_tokens,), "int32")
            own_key_pixel = T.meta_var(pixel if geometry.keys is None else T.alloc_buffer((plan.keys,), "int32"))
            region = T.meta_var(T.alloc_buffer((plan.located_tokens,), "int32") if plan.can_cross_regions else None)
            keys = T.alloc_buffer((plan.key_rows_held, plan.head_dim), "float32")
            values = T.alloc_buffer((plan.keys, plan.padded_value_dim), "float32")
            queries = T.alloc_buffer((plan.query_rows_held, plan.tile), "float32")
            logits = T.alloc_buffer((plan.logit_rows, plan.tile), "float32")
            of_queries = T.alloc_buffer((3, plan.tile), "float32")
            attended = T.alloc_buffer(plan.attended_shape, "float32")
            positions = T.meta_var(
                T.alloc_buffer((axes, plan.located_tokens, plan.position_lanes), "float32")
                if plan.has_positions
                else None
            )
            tile_positions = T.meta_var(
                T.alloc_buffer((axes, plan.position_lanes, plan.tile), "float32") if plan.has_positions else None
            )
            largest = T.decl_buffer((plan.tile,), "float32", data=of_queries.data)
            total = T.decl_buffer((plan.tile,), "float32", data=of_queries.data, elem_offset=plan.tile)
            rescale = T.decl_buffer((plan.tile,), "float32", data=of_queries.data, elem_offset=2 * plan.tile)
            scratch = T.meta_var(
                Scratch(
                    pixel,
                    own_key_pixel,
                    region,
                    keys,
                    values,
                    queries,
                    logits,
                    largest,
                    total,
                    rescale,
                    attended,
                    positions,
                    tile_positions,
                )
            )
            head: T.let = T.cast(task % plan.num_heads, "int32")
            tile_group: T.let = T.cast(task // plan.num_heads % plan.tile_groups, "int32")
            group: T.let = T.cast(task // (plan.num_heads * plan.tile_groups) % plan.window_groups, "int32")
            image: T.let = task // (plan.num_heads * plan.tile_groups * plan.window_groups)
            for w in range(T.min(plan.windows_per_task, plan.num_windows - group * plan.windows_per_task)):
                window: T.let = group * plan.windows_per_task + w
                place = T.meta_var(Place(image, window, head, head * plan.head_dim, head * plan.value_dim))
                locate_tokens(plan, pixel, plan.pixel, window, geometry.window_size, plan.located_tokens)
                if geometry.keys is not None:
                    locate_tokens(plan, own_key_pixel, plan.key_pixel, window, plan.key_window, plan.keys)
                if plan.can_cross_regions:
                    locate_tokens(plan, region, plan.region, window, geometry.window_size, plan.located_tokens)
                gather_tokens(
                    plan, keys, plan.key_rows_held, own_key_pixel, k, padding_key, image, place.channel, plan.head_dim
                )
                gather_tokens(
                    plan, values, plan.keys, own_key_pixel, v, padding_value, image, place.value_channel, plan.value_dim
                )
                if plan.has_positions:
                    score_positions(plan, scratch, 0, positions_table, q, place)
                    if axes > 1:
                        score_positions(plan, scratch, 1, positions_table, q, place)
                    if axes > 2:
                        score_positions(plan, scratch, 2, positions_table, q, place)
                for t in range(T.min(plan.tiles_per_task, plan.tiles - tile_group * plan.tiles_per_task)):
                    start: T.let = (tile_group * plan.tiles_per_task + t) * plan.tile
                    attend_tile(plan, scratch, q, o, logit_bias, logit_mask, place, start)
                if rest is not None:  # noqa: SIM102 - decided here, the next one is part of the kernel
                    if tile_group == plan.tile_groups - 1:
                        attend_tile(rest, scratch, q, o, logit_bias, logit_mask, place, plan.tiles * plan.tile)

    absent = {operand: None for operand in FlashWindowAttention.operands[3:8] if operand not in present}
    return kernel.specialize(**absent)
