# mypy: disable-error-code="no-untyped-def, untyped-decorator, valid-type"
"""SlideAttention for CPUs: lanes are pixels of a row, keys and values are read where they lie, never expanded.

The last two spatial axes are rows and columns, the axes before them planes. One task is a strip of rows of one plane
and head. It copies the strip's keys and values with their zero border, so that no product asks where the border is, and
then, for one tile of `rows` rows (dilation apart, so that they share neighbours) by `lanes` columns:

    weights[j, p] = query[p] . key_j[p] * scale + bias[j]     rows x kernel rows sums in registers, per kernel column
    weights[j, p] = exp2(weights[j, p] - max over j)          scale and bias carry the factor log2(e)
    out[c, p]     = sum_j weights[j, p] * value_j[c, p] / sum_j weights[j, p]     rows x channels sums in registers

The last tile of a row overlaps the one before it; a row shorter than a vector is one tile, stored in part. With learned
shift kernels key_j and value_j are small convolutions, computed where they are used. Letters as in docs/ops.md.

Stages are TVMScript, inlined into the kernel. A `feature_map` is a view [B, C, planes, rows, columns]; a `strip` is the
bordered copy [channels of the head, kernel planes, rows, columns] of a task.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

from tvm.ir import Expr
from tvm.script import tirx as T
from tvm.target import Target
from tvm.tirx import PrimFunc, Var

from attnrewrite.functions.spec import SlideAttention
from attnrewrite.lowering.kernels.cpu_stages import UNALIGNED, exponentiate
from attnrewrite.lowering.kernels.slide_cpu_plan import plan_slide
from attnrewrite.lowering.kernels.vector_math import LOG2_E, vector_unit


class Tile(NamedTuple):
    """Where a tile lies: its image, plane, first row and column in the map; `row` and `column` count from the strip's.

    In the strip's copy all lies one border further down and right: a pixel's first slot stands at its own coordinates.
    """

    image: Expr
    plane: Expr
    map_row: Expr
    map_column: Expr
    row: Expr
    column: Expr


def of_channel(rows: Any, channel: Expr, *index: Expr) -> Expr:
    """rows[channel mod R, *index] as float32."""
    return T.cast(rows[(T.floormod(channel, rows.shape[0]), *index)], "float32")


@T.inline
def copy_strip(plan, strip, channels, feature_map, image, first, plane, first_row, first_column):
    """Copies `channels` channels of the strip and their border as float32; zero outside the map."""
    for c, slot, row in T.grid(channels, plan.kernel_planes, plan.copied_rows):
        y = T.meta_var(first_row + row - plan.row_border)
        source, inside = T.meta_var(plan.neighbour_plane(plane, slot))
        begin, end = T.meta_var(plan.columns_in_map(first_column))
        to_strip = T.meta_var(plan.column_border - first_column)
        if T.And(inside, T.And(y >= 0, y < plan.height)):
            for x in range(begin + to_strip):
                strip[c, slot, row, x] = T.float32(0)
            for vector in range(T.ceildiv(end - begin, plan.stored_lanes)):
                x = T.meta_var(T.min(begin + vector * plan.stored_lanes, end - plan.stored_lanes))
                for lane in T.vectorized(plan.stored_lanes):
                    pixel = T.meta_var(feature_map[image, first + c, source, y, x + lane])
                    strip[c, slot, row, x + to_strip + lane] = T.cast(pixel, "float32")
            for x in range(plan.copied_columns - (end + to_strip)):
                strip[c, slot, row, end + to_strip + x] = T.float32(0)
        else:
            for x in range(plan.copied_columns):
                strip[c, slot, row, x] = T.float32(0)


@T.inline
def gather_queries(plan, tile, queries, feature_map, first):
    """queries[c, i] = scaled query of row i of the tile. A row below the map repeats the last one; it is not stored."""
    for c in range(plan.head_dim):
        for i in T.unroll(plan.rows):
            y = T.meta_var(T.min(tile.map_row + i * plan.row_step, plan.height - 1))
            for lane in T.vectorized(plan.stored_lanes):
                query = T.meta_var(feature_map[tile.image, first + c, tile.plane, y, tile.map_column + lane])
                queries[c, i, lane] = T.cast(query, "float32") * T.float32(plan.scale)


@T.inline
def score_shifted(plan, tile, weights, queries, keys):
    """weights[j, i] = queries . keys shifted by slot j; the last block of kernel rows overlaps the one before it."""
    for slot, kx, block in T.grid(plan.kernel_planes, plan.kernel_columns, -(-plan.kernel_rows // plan.scored_rows)):
        acc = T.alloc_buffer((plan.rows, plan.scored_rows, plan.lanes), "float32", scope="local")
        ky0: T.let = T.min(block * plan.scored_rows, plan.kernel_rows - plan.scored_rows)
        y = T.meta_var(tile.row + ky0 * plan.row_step)
        for i in T.unroll(plan.rows):
            for ky in T.unroll(plan.scored_rows):
                for lane in T.vectorized(plan.lanes):
                    acc[i, ky, lane] = T.float32(0)
        for c in range(plan.head_dim):
            for r in T.unroll(plan.rows + plan.scored_rows - 1):
                for i in T.unroll(plan.rows):
                    if T.And(r - i >= 0, r - i < plan.scored_rows):
                        for lane in T.vectorized(plan.lanes):
                            acc[i, r - i, lane] = (
                                acc[i, r - i, lane]
                                + queries[c, i, lane]
                                * keys[c, slot, y + r * plan.row_step, tile.column + kx * plan.column_step + lane]
                            )
        for i in T.unroll(plan.rows):
            for ky in T.unroll(plan.scored_rows):
                for lane in T.vectorized(plan.lanes):
                    weights[(slot * plan.kernel_rows + ky0 + ky) * plan.kernel_columns + kx, i, lane] = acc[i, ky, lane]


@T.inline
def convolve(plan, tile, acc, strip, c, kernel, bias, channel, first_slot):
    """acc[j, i] = slot first_slot + j of the learned kernels at row i of the tile, plus its bias."""
    for j in T.unroll(plan.kernel_columns):
        for i in T.unroll(plan.rows):
            for lane in T.vectorized(plan.lanes):
                if bias is None:
                    acc[j, i, lane] = T.float32(0)
                else:
                    acc[j, i, lane] = of_channel(bias, channel, first_slot + j)
    for slot, ky, kx in T.grid(plan.kernel_planes, plan.kernel_rows, plan.kernel_columns):
        for j in T.unroll(plan.kernel_columns):
            for i in T.unroll(plan.rows):
                y = T.meta_var(tile.row + (i + ky) * plan.row_step)
                for lane in T.vectorized(plan.lanes):
                    acc[j, i, lane] = (
                        acc[j, i, lane]
                        + of_channel(kernel, channel, first_slot + j, *plan.tap(slot, ky, kx))
                        * strip[c, slot, y, tile.column + kx * plan.column_step + lane]
                    )


@T.inline
def score_convolved(plan, tile, weights, queries, keys, kernel, bias, first):
    """weights[j, i] = queries . (keys under learned kernel j)."""
    for j, i in T.grid(plan.slots, plan.rows):
        for lane in T.vectorized(plan.lanes):
            weights[j, i, lane] = T.float32(0)
    for c, block in T.grid(plan.head_dim, plan.slots // plan.kernel_columns):
        acc = T.alloc_buffer((plan.kernel_columns, plan.rows, plan.lanes), "float32", scope="local")
        convolve(plan, tile, acc, keys, c, kernel, bias, first + c, block * plan.kernel_columns)
        for j in T.unroll(plan.kernel_columns):
            for i in T.unroll(plan.rows):
                for lane in T.vectorized(plan.lanes):
                    weights[block * plan.kernel_columns + j, i, lane] = (
                        weights[block * plan.kernel_columns + j, i, lane] + queries[c, i, lane] * acc[j, i, lane]
                    )


@T.inline
def add_key_bias(plan, weights, queries, bias, first):
    """weights[j, i] += queries . bias[:, j], if there is one."""
    if bias is not None:
        for j in range(plan.slots):
            acc = T.alloc_buffer((plan.rows, plan.lanes), "float32", scope="local")
            for i in T.unroll(plan.rows):
                for lane in T.vectorized(plan.lanes):
                    acc[i, lane] = weights[j, i, lane]
            for c in range(plan.head_dim):
                for i in T.unroll(plan.rows):
                    for lane in T.vectorized(plan.lanes):
                        acc[i, lane] = acc[i, lane] + queries[c, i, lane] * of_channel(bias, first + c, j)
            for i in T.unroll(plan.rows):
                for lane in T.vectorized(plan.lanes):
                    weights[j, i, lane] = acc[i, lane]


@T.inline
def add_bias(plan, weights, bias, head):
    """weights[j, i] += bias[head, j] * log2(e), if there is one."""
    if bias is not None:
        for j, i in T.grid(plan.slots, plan.rows):
            for lane in T.vectorized(plan.lanes):
                weights[j, i, lane] = weights[j, i, lane] + T.cast(bias[head, j], "float32") * T.float32(LOG2_E)


@T.inline
def store_rows(plan, tile, output, channel, acc, c, reciprocal):
    """Channel c of a register block into the map, as far down as there is one."""
    for i in T.unroll(plan.rows):
        y = T.meta_var(tile.map_row + i * plan.row_step)
        if y < plan.height:
            for lane in T.vectorized(plan.stored_lanes):
                output[tile.image, channel, tile.plane, y, tile.map_column + lane] = T.cast(
                    acc[i, c, lane] * reciprocal[i, lane], plan.dtype
                )


@T.inline
def weigh_shifted(plan, tile, output, weights, reciprocal, values, bias, first):
    """output = sum_j weights[j] * (values shifted by slot j + bias[j]) * reciprocal, `channels` channels at a time."""
    for block in range(-(-plan.value_dim // plan.channels)):
        c0 = T.meta_var(T.min(block * plan.channels, plan.value_dim - plan.channels))
        acc = T.alloc_buffer((plan.rows, plan.channels, plan.lanes), "float32", scope="local")
        for i in T.unroll(plan.rows):
            for c in T.unroll(plan.channels):
                for lane in T.vectorized(plan.lanes):
                    acc[i, c, lane] = T.float32(0)
        if bias is not None:
            for j in range(plan.slots):
                for i in T.unroll(plan.rows):
                    for c in T.unroll(plan.channels):
                        for lane in T.vectorized(plan.lanes):
                            acc[i, c, lane] = acc[i, c, lane] + weights[j, i, lane] * of_channel(
                                bias, first + c0 + c, j
                            )
        for slot, kx in T.grid(plan.kernel_planes, plan.kernel_columns):
            for r in T.unroll(plan.rows + plan.kernel_rows - 1):
                y = T.meta_var(tile.row + r * plan.row_step)
                for c in T.unroll(plan.channels):
                    for i in T.unroll(plan.rows):
                        if T.And(r - i >= 0, r - i < plan.kernel_rows):
                            for lane in T.vectorized(plan.lanes):
                                acc[i, c, lane] = (
                                    acc[i, c, lane]
                                    + weights[(slot * plan.kernel_rows + r - i) * plan.kernel_columns + kx, i, lane]
                                    * values[c0 + c, slot, y, tile.column + kx * plan.column_step + lane]
                                )
        for c in T.unroll(plan.channels):
            store_rows(plan, tile, output, first + c0 + c, acc, c, reciprocal)


@T.inline
def weigh_convolved(plan, tile, output, weights, reciprocal, values, kernel, bias, first):
    """output = sum_j weights[j] * (values under learned kernel j) * reciprocal, one channel at a time."""
    for c in range(plan.value_dim):
        acc = T.alloc_buffer((plan.rows, 1, plan.lanes), "float32", scope="local")
        for i in T.unroll(plan.rows):
            for lane in T.vectorized(plan.lanes):
                acc[i, 0, lane] = T.float32(0)
        for block in range(plan.slots // plan.kernel_columns):
            slots = T.alloc_buffer((plan.kernel_columns, plan.rows, plan.lanes), "float32", scope="local")
            convolve(plan, tile, slots, values, c, kernel, bias, first + c, block * plan.kernel_columns)
            for j in T.unroll(plan.kernel_columns):
                for i in T.unroll(plan.rows):
                    for lane in T.vectorized(plan.lanes):
                        acc[i, 0, lane] = (
                            acc[i, 0, lane] + weights[block * plan.kernel_columns + j, i, lane] * slots[j, i, lane]
                        )
        store_rows(plan, tile, output, first + c, acc, 0, reciprocal)


def slide_attention(
    spec: SlideAttention,
    present: Collection[str],
    shapes: Mapping[str, Sequence[Any]],
    dtype: str,
    target: Target,
    name: str = "slide_attention",
    steps: Mapping[str, int] | None = None,
) -> PrimFunc:
    """The kernel for one site: parameters are the present operands in the op's order, then the output [B, nH*dv, *S].

    present: names of the operands given. shapes: shape of each of them, the batch an int or a TIR variable (which the
    kernel replaces by one of its own, read from the query). dtype: float32 or float16, of all operands and the output;
    sums are float32. target: an `llvm` target, for its vector unit. steps: of query, key and value, how many channels
    one image lies behind another, for those that are parts of wider maps; they are passed as a vector of all the
    numbers from their first to their last.
    """
    plan = plan_slide(spec, present, shapes, dtype, vector_unit(target))
    batch = shapes["query"][0]
    batch = batch if isinstance(batch, int) else Var("batch", "int64")
    spatial = spec.geometry.feature_size
    query_channels, value_channels = spec.num_heads * plan.head_dim, spec.num_heads * plan.value_dim

    def optional_buffer(handle: Any, operand: str) -> Any:
        return None if handle is None else T.match_buffer(handle, tuple(shapes[operand]), dtype)

    def map_of(handle: Any, operand: str, channels: int) -> Any:
        """The operand as it is passed: a map, or the numbers from its first to its last."""
        if operand in (steps or {}):
            return T.match_buffer(handle, (Var(f"{operand}_numbers", "int64"),), dtype, align=UNALIGNED)
        return T.match_buffer(handle, (batch, channels, *spatial), dtype)

    def planes(feature_map: Any, operand: str, channels: int) -> Any:
        size = (plan.planes, plan.height, plan.width)
        step = (steps or {}).get(operand)
        if step is None:
            return T.decl_buffer((batch, channels, *size), dtype, data=feature_map.data)
        return T.decl_buffer((batch, step, *size), dtype, data=feature_map.data, align=UNALIGNED)

    @T.jit
    def kernel(
        query: T.handle,
        key: T.handle,
        value: T.handle,
        bias: T.Optional(T.handle),
        key_kernel: T.Optional(T.handle),
        key_bias: T.Optional(T.handle),
        value_kernel: T.Optional(T.handle),
        value_bias: T.Optional(T.handle),
        output: T.handle,
    ):
        T.func_attr({"global_symbol": name, "tirx.noalias": True})
        query_map = T.meta_var(map_of(query, "query", query_channels))
        key_map = T.meta_var(map_of(key, "key", query_channels))
        value_map = T.meta_var(map_of(value, "value", value_channels))
        logit_bias = T.meta_var(optional_buffer(bias, "bias"))
        kernel_of_keys = T.meta_var(optional_buffer(key_kernel, "key_kernel"))
        bias_of_keys = T.meta_var(optional_buffer(key_bias, "key_bias"))
        kernel_of_values = T.meta_var(optional_buffer(value_kernel, "value_kernel"))
        bias_of_values = T.meta_var(optional_buffer(value_bias, "value_bias"))
        output_map = T.match_buffer(output, (batch, value_channels, *spatial), dtype)
        q = T.meta_var(planes(query_map, "query", query_channels))
        k = T.meta_var(planes(key_map, "key", query_channels))
        v = T.meta_var(planes(value_map, "value", value_channels))
        o = T.meta_var(planes(output_map, "output", value_channels))
        for task in T.parallel(batch * plan.num_heads * plan.planes * plan.strips):
            keys = T.alloc_buffer((plan.head_dim, plan.kernel_planes, plan.copied_rows, plan.copied_columns), "float32")
            values = T.alloc_buffer(
                (plan.value_dim, plan.kernel_planes, plan.copied_rows, plan.copied_columns), "float32"
            )
            queries = T.alloc_buffer((plan.head_dim, plan.rows, plan.lanes), "float32")
            weights = T.alloc_buffer((plan.slots, plan.rows, plan.lanes), "float32")
            reciprocal = T.alloc_buffer((plan.rows, plan.lanes), "float32")
            strip_row, strip_column = T.meta_var(plan.strip_origin(T.cast(task % plan.strips, "int32")))
            plane: T.let = T.cast(task // plan.strips % plan.planes, "int32")
            head: T.let = T.cast(task // (plan.strips * plan.planes) % plan.num_heads, "int32")
            image: T.let = task // (plan.strips * plan.planes * plan.num_heads)
            query_channel: T.let = head * plan.head_dim
            value_channel: T.let = head * plan.value_dim
            copy_strip(plan, keys, plan.head_dim, k, image, query_channel, plane, strip_row, strip_column)
            copy_strip(plan, values, plan.value_dim, v, image, value_channel, plane, strip_row, strip_column)
            for c, i in T.grid(plan.head_dim, plan.rows):
                for lane in T.vectorized(plan.lanes):
                    queries[c, i, lane] = T.float32(0)
            for t, column_tile in T.grid(plan.strip_tiles, plan.column_tiles):
                row: T.let = plan.first_row(t)
                column: T.let = plan.first_column(column_tile)
                map_row: T.let = strip_row + row
                tile = T.meta_var(Tile(image, plane, map_row, strip_column + column, row, column))
                if map_row < plan.height:
                    gather_queries(plan, tile, queries, q, query_channel)
                    if kernel_of_keys is None:
                        score_shifted(plan, tile, weights, queries, keys)
                        add_key_bias(plan, weights, queries, bias_of_keys, query_channel)
                    else:
                        score_convolved(plan, tile, weights, queries, keys, kernel_of_keys, bias_of_keys, query_channel)
                    add_bias(plan, weights, logit_bias, head)
                    exponentiate(weights, reciprocal, plan.slots, plan.rows, plan.lanes)
                    if kernel_of_values is None:
                        weigh_shifted(plan, tile, o, weights, reciprocal, values, bias_of_values, value_channel)
                    else:
                        weigh_convolved(
                            plan,
                            tile,
                            o,
                            weights,
                            reciprocal,
                            values,
                            kernel_of_values,
                            bias_of_values,
                            value_channel,
                        )

    absent = {operand: None for operand in SlideAttention.operands[3:8] if operand not in present}
    return kernel.specialize(**absent)
