# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""Stages of the window kernel for CPUs: TVMScript, inlined into the kernel (window_cpu.py).

A `feature_map` is a flat view [B, pixels, channels]; scratch is a `Scratch`, place a `Place`, plan a `WindowPlan`.
"""

from __future__ import annotations

import math
from functools import reduce
from typing import Any, NamedTuple

from tvm.ir import Expr
from tvm.script import tirx as T

from attnrewrite.lowering.kernels.cpu_stages import transpose_square
from attnrewrite.lowering.kernels.vector_math import exp2_of_nonpositive
from attnrewrite.lowering.kernels.window_cpu_plan import flat_index

# Softmax starts from here instead of -inf, so that a block of excluded keys has differences, and weights of zero.
LOWEST = -3.4028234663852886e38


class Place(NamedTuple):
    """The window and head at hand: first channel of the head in queries and keys, and in values and output."""

    image: Expr
    window: Expr
    head: Expr
    channel: Expr
    value_channel: Expr


class Scratch(NamedTuple):
    """Buffers of one task, all float32 but `pixel`, `key_pixel` and `region`: int32, by token.

    keys [M, d], values [M, dv]; of one tile of queries: queries [channels, tile], logits [keys of a block, tile], and
    per query largest, total, rescale. attended: sums of a tile (`WindowPlan.attended_shape`). positions: products with
    the tables of relative positions, [axes, N, key coordinates], and those of one tile, transposed.
    """

    pixel: Any
    key_pixel: Any
    region: Any
    keys: Any
    values: Any
    queries: Any
    logits: Any
    largest: Any
    total: Any
    rescale: Any
    attended: Any
    positions: Any
    tile_positions: Any


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
def locate_tokens(plan, target, locate, window, sizes, held):
    """target[token] = locate(window, coordinates of the token), row-major; -1 from the last token up to `held`."""
    for at in T.grid(*sizes):
        coordinates = T.meta_var(at if len(sizes) > 1 else [at])
        target[flat_index(coordinates, sizes)] = locate(window, coordinates)
    for n in range(held - math.prod(sizes)):
        target[math.prod(sizes) + n] = -1


@T.inline
def gather_tokens(plan, target, rows, key_pixel, feature_map, padding, image, first, width):
    """target[m, :width] = the key or value of token m; a token outside the map is `padding`, or zero without one.

    Rows beyond the last token, which fill a register block, repeat it: so they raise no maximum.
    """
    for m in range(rows):
        at = T.meta_var(key_pixel[plan.valid_key(m)])
        if plan.reads_pixel(at):
            copy_channels(target, m, feature_map, image, at, first, width, plan.lanes)
        else:
            for c in range(width):
                if padding is None:
                    target[m, c] = T.float32(0)
                else:
                    target[m, c] = T.cast(padding[first + c], "float32")


@T.inline
def gather_queries(plan, scratch, feature_map, place, start):
    """queries[lanes + c, n] = scaled channel c of query start + n; one that the map does not have is any other.

    Squares of lanes x lanes are read and transposed; the last one of the last head begins in the head before, and
    so fills rows in front of it, or rows that are there already.
    """
    for block in range(plan.vectors):
        if plan.can_transpose:
            for part in range(plan.channel_blocks):
                origin: T.let = T.min(place.channel + part * plan.lanes, plan.num_heads * plan.head_dim - plan.lanes)
                rows = T.alloc_buffer((plan.lanes.bit_length(), plan.lanes, plan.lanes), "float32", scope="local")
                for i in T.unroll(plan.lanes):
                    at = T.meta_var(T.max(scratch.pixel[start + block * plan.lanes + i], 0))
                    for lane in T.vectorized(plan.lanes):
                        query = T.meta_var(feature_map[place.image, at, origin + lane])
                        rows[0, i, lane] = T.cast(query, "float32") * T.float32(plan.scale)
                transpose_square(rows, plan.lanes)
                for i in T.unroll(plan.lanes):
                    for lane in T.vectorized(plan.lanes):
                        scratch.queries[plan.lanes + origin - place.channel + i, block * plan.lanes + lane] = rows[
                            plan.lanes.bit_length() - 1, i, lane
                        ]
        else:
            for i, c in T.grid(plan.lanes, plan.head_dim):
                at = T.meta_var(T.max(scratch.pixel[start + block * plan.lanes + i], 0))
                query = T.meta_var(feature_map[place.image, at, place.channel + c])
                scratch.queries[plan.lanes + c, block * plan.lanes + i] = T.cast(query, "float32") * T.float32(
                    plan.scale
                )


@T.inline
def score_positions(plan, scratch, axis, table, feature_map, place):
    """positions[a, n, k] = query n . the table's row for its coordinate and key coordinate k, for one axis a.

    Queries that share a coordinate share a matrix: each is a product of some of those queries and one matrix.
    """
    size = T.meta_var(plan.geometry.window_size[axis])
    sharing = T.meta_var(plan.tokens // size)
    vectors = T.meta_var(plan.position_lanes // plan.lanes)
    height = T.meta_var(plan.position_rows(sharing))
    for coordinate, block in T.grid(size, T.ceildiv(sharing, height)):
        acc = T.alloc_buffer((height, vectors, plan.lanes), "float32", scope="local")
        for i in T.unroll(height):
            for v in T.unroll(vectors):
                for lane in T.vectorized(plan.lanes):
                    acc[i, v, lane] = T.float32(0)
        for c in range(plan.head_dim):
            for i in T.unroll(height):
                n = T.meta_var(plan.token_at(axis, coordinate, T.min(block * height + i, sharing - 1)))
                query = T.meta_var(feature_map[place.image, T.max(scratch.pixel[n], 0), place.channel + c])
                row = T.meta_var(sum(plan.geometry.window_size[:axis]) + coordinate)
                for v in T.unroll(vectors):
                    for lane in T.vectorized(plan.lanes):
                        acc[i, v, lane] = (
                            acc[i, v, lane]
                            + T.cast(query, "float32")
                            * table[place.head if int(table.shape[0]) > 1 else 0, row, c, v * plan.lanes + lane]
                        )
        for i in T.unroll(height):
            n = T.meta_var(plan.token_at(axis, coordinate, T.min(block * height + i, sharing - 1)))
            for v in T.unroll(vectors):
                for lane in T.vectorized(plan.lanes):
                    scratch.positions[axis, n, v * plan.lanes + lane] = acc[i, v, lane]


@T.inline
def transpose_positions(plan, scratch, start):
    """tile_positions[a, k, n] = positions[a, start + n, k]."""
    for axis, part, block in T.grid(len(plan.key_window), plan.position_lanes // plan.lanes, plan.vectors):
        rows = T.alloc_buffer((plan.lanes.bit_length(), plan.lanes, plan.lanes), "float32", scope="local")
        for i in T.unroll(plan.lanes):
            for lane in T.vectorized(plan.lanes):
                rows[0, i, lane] = scratch.positions[axis, start + block * plan.lanes + i, part * plan.lanes + lane]
        transpose_square(rows, plan.lanes)
        for i in T.unroll(plan.lanes):
            for lane in T.vectorized(plan.lanes):
                scratch.tile_positions[axis, part * plan.lanes + i, block * plan.lanes + lane] = rows[
                    plan.lanes.bit_length() - 1, i, lane
                ]


@T.inline
def compute_logits(plan, scratch, first_key, count, start, initial, across_regions):
    """logits[m, n] = keys[first_key + m] . queries[:, n] + initial(m, vector and lane of n); raises `largest` to it.

    across_regions: whether mask_value is added where query and key are of different regions.
    """
    for block in range(T.ceildiv(count, plan.key_rows)):
        acc = T.alloc_buffer((plan.key_rows, plan.vectors, plan.lanes), "float32", scope="local")
        for j in T.unroll(plan.key_rows):
            m = T.meta_var(plan.valid_key(first_key + block * plan.key_rows + j))
            for v in T.unroll(plan.vectors):
                for lane in T.vectorized(plan.lanes):
                    acc[j, v, lane] = initial(m, v, lane)
        for c in range(plan.head_dim):
            for j in T.unroll(plan.key_rows):
                m = T.meta_var(first_key + block * plan.key_rows + j)
                for v in T.unroll(plan.vectors):
                    for lane in T.vectorized(plan.lanes):
                        acc[j, v, lane] = (
                            acc[j, v, lane]
                            + scratch.keys[m, c] * scratch.queries[plan.lanes + c, v * plan.lanes + lane]
                        )
        if across_regions:
            for j in T.unroll(plan.key_rows):
                m = T.meta_var(plan.valid_key(first_key + block * plan.key_rows + j))
                for v in T.unroll(plan.vectors):
                    for lane in T.vectorized(plan.lanes):
                        acc[j, v, lane] = acc[j, v, lane] + T.Select(
                            scratch.region[m] == scratch.region[start + v * plan.lanes + lane],
                            T.float32(0),
                            T.float32(plan.mask_value),
                        )
        for v in T.unroll(plan.vectors):
            for lane in T.vectorized(plan.lanes):
                scratch.largest[v * plan.lanes + lane] = reduce(
                    T.max, [acc[j, v, lane] for j in range(plan.key_rows)], scratch.largest[v * plan.lanes + lane]
                )
        for j in T.unroll(plan.key_rows):
            for v in T.unroll(plan.vectors):
                for lane in T.vectorized(plan.lanes):
                    scratch.logits[block * plan.key_rows + j, v * plan.lanes + lane] = acc[j, v, lane]


@T.inline
def exponentiate(plan, scratch, count):
    """logits = exp2(logits - largest), added up in `total`."""
    largest = T.alloc_buffer((plan.vectors, plan.lanes), "float32", scope="local")
    total = T.alloc_buffer((plan.vectors, plan.lanes), "float32", scope="local")
    for v in T.unroll(plan.vectors):
        for lane in T.vectorized(plan.lanes):
            largest[v, lane] = scratch.largest[v * plan.lanes + lane]
            total[v, lane] = scratch.total[v * plan.lanes + lane]
    for m in range(count):
        for v in T.unroll(plan.vectors):
            weight = T.alloc_buffer((plan.lanes,), "float32", scope="local")
            for lane in T.vectorized(plan.lanes):
                weight[lane] = exp2_of_nonpositive(scratch.logits[m, v * plan.lanes + lane] - largest[v, lane])
            for lane in T.vectorized(plan.lanes):
                total[v, lane] = total[v, lane] + weight[lane]
            for lane in T.vectorized(plan.lanes):
                scratch.logits[m, v * plan.lanes + lane] = weight[lane]
    for v in T.unroll(plan.vectors):
        for lane in T.vectorized(plan.lanes):
            scratch.total[v * plan.lanes + lane] = total[v, lane]


@T.inline
def begin_tile(plan, scratch):
    """No key seen yet."""
    for v in range(plan.vectors):
        for lane in T.vectorized(plan.lanes):
            scratch.largest[v * plan.lanes + lane] = T.float32(LOWEST)
            scratch.total[v * plan.lanes + lane] = T.float32(0)
    if plan.key_blocks > 1:
        rows, columns = T.meta_var(plan.attended_shape)
        for i, j in T.grid(rows, columns):
            scratch.attended[i, j] = T.float32(0)


@T.inline
def remember_largest(plan, scratch):
    for v in range(plan.vectors):
        for lane in T.vectorized(plan.lanes):
            scratch.rescale[v * plan.lanes + lane] = scratch.largest[v * plan.lanes + lane]


@T.inline
def rescale_total(plan, scratch):
    """rescale = what earlier weights are to be multiplied with, now that the largest logit is known to be larger."""
    for v in range(plan.vectors):
        for lane in T.vectorized(plan.lanes):
            scratch.rescale[v * plan.lanes + lane] = exp2_of_nonpositive(
                scratch.rescale[v * plan.lanes + lane] - scratch.largest[v * plan.lanes + lane]
            )
        for lane in T.vectorized(plan.lanes):
            scratch.total[v * plan.lanes + lane] = (
                scratch.total[v * plan.lanes + lane] * scratch.rescale[v * plan.lanes + lane]
            )


@T.inline
def invert_total(plan, scratch):
    """total = 1 / total; inf where all keys are excluded, which makes NaN of the sums."""
    for v in range(plan.vectors):
        for lane in T.vectorized(plan.lanes):
            scratch.total[v * plan.lanes + lane] = T.float32(1) / scratch.total[v * plan.lanes + lane]


@T.inline
def store_vector(plan, output, place, at, vector, acc, i, v, factor):
    """Channels vector * value_lanes onwards of one query, as far as the head has them."""
    c = T.meta_var(place.value_channel + vector * plan.value_lanes)
    if (vector + 1) * plan.value_lanes <= plan.value_dim:
        for lane in T.vectorized(plan.value_lanes):
            output[place.image, at, c + lane] = T.cast(acc[i, v, lane] * factor, plan.dtype)
    if plan.value_dim % plan.value_lanes > 0:  # noqa: SIM102 - decided here, the next one once the loop is unrolled
        if vector == plan.value_dim // plan.value_lanes:
            for lane in T.vectorized(plan.value_dim % plan.value_lanes):
                output[place.image, at, c + lane] = T.cast(acc[i, v, lane] * factor, plan.dtype)


@T.inline
def weigh_by_channel(plan, scratch, output, place, start, first_key, count, queries):
    """attended[n] = attended[n] * rescale[n] + sum_m logits[m, n] * values[first_key + m], lanes along channels.

    Where there is one block of keys only, the result goes into the output at once.
    """
    for block in range(T.ceildiv(queries, plan.query_rows)):
        for part in T.unroll(plan.value_blocks):
            acc = T.alloc_buffer((plan.query_rows, plan.value_vectors, plan.value_lanes), "float32", scope="local")
            for i in T.unroll(plan.query_rows):
                n = T.meta_var(block * plan.query_rows + i)
                for v in T.unroll(plan.value_vectors):
                    c = T.meta_var((part * plan.value_vectors + v) * plan.value_lanes)
                    for lane in T.vectorized(plan.value_lanes):
                        if plan.key_blocks == 1:
                            acc[i, v, lane] = T.float32(0)
                        else:
                            acc[i, v, lane] = scratch.attended[n, c + lane] * scratch.rescale[n]
            for m in range(count):
                for i in T.unroll(plan.query_rows):
                    for v in T.unroll(plan.value_vectors):
                        c = T.meta_var((part * plan.value_vectors + v) * plan.value_lanes)
                        for lane in T.vectorized(plan.value_lanes):
                            acc[i, v, lane] = (
                                acc[i, v, lane]
                                + scratch.logits[m, block * plan.query_rows + i]
                                * scratch.values[first_key + m, c + lane]
                            )
            for i in T.unroll(plan.query_rows):
                n = T.meta_var(block * plan.query_rows + i)
                if plan.key_blocks == 1:
                    if plan.writes_pixel(scratch.pixel[start + n], plan.query_rows):
                        for v in T.unroll(plan.value_vectors):
                            vector = T.meta_var(part * plan.value_vectors + v)
                            store_vector(
                                plan, output, place, scratch.pixel[start + n], vector, acc, i, v, scratch.total[n]
                            )
                else:
                    for v in T.unroll(plan.value_vectors):
                        c = T.meta_var((part * plan.value_vectors + v) * plan.value_lanes)
                        for lane in T.vectorized(plan.value_lanes):
                            scratch.attended[n, c + lane] = acc[i, v, lane]


@T.inline
def weigh_by_query(plan, scratch, first_key, count):
    """The same transposed: attended[c, n], lanes along queries."""
    for block in range(T.ceildiv(plan.value_dim, plan.value_rows)):
        acc = T.alloc_buffer((plan.value_rows, plan.vectors, plan.lanes), "float32", scope="local")
        for i in T.unroll(plan.value_rows):
            c = T.meta_var(block * plan.value_rows + i)
            for v in T.unroll(plan.vectors):
                n = T.meta_var(v * plan.lanes)
                for lane in T.vectorized(plan.lanes):
                    if plan.key_blocks == 1:
                        acc[i, v, lane] = T.float32(0)
                    else:
                        acc[i, v, lane] = scratch.attended[c, n + lane] * scratch.rescale[n + lane]
        for m in range(count):
            for i in T.unroll(plan.value_rows):
                c = T.meta_var(block * plan.value_rows + i)
                for v in T.unroll(plan.vectors):
                    for lane in T.vectorized(plan.lanes):
                        acc[i, v, lane] = (
                            acc[i, v, lane]
                            + scratch.values[first_key + m, c] * scratch.logits[m, v * plan.lanes + lane]
                        )
        for i in T.unroll(plan.value_rows):
            c = T.meta_var(block * plan.value_rows + i)
            for v in T.unroll(plan.vectors):
                for lane in T.vectorized(plan.lanes):
                    scratch.attended[c, v * plan.lanes + lane] = acc[i, v, lane]


@T.inline
def store_by_channel(plan, scratch, output, place, start, queries):
    """output[pixel[start + n]] = attended[n] * total[n], which is the inverse by now."""
    for n in range(queries):
        if plan.writes_pixel(scratch.pixel[start + n], 1):
            for v in T.unroll(-(-plan.value_dim // plan.value_lanes)):
                row = T.alloc_buffer((1, 1, plan.value_lanes), "float32", scope="local")
                for lane in T.vectorized(plan.value_lanes):
                    row[0, 0, lane] = scratch.attended[n, v * plan.value_lanes + lane]
                store_vector(plan, output, place, scratch.pixel[start + n], v, row, 0, 0, scratch.total[n])


@T.inline
def store_square(plan, scratch, output, place, start, part, width):
    """The same of `width` channels of attended[c, n], from channel part * lanes on; squares are transposed."""
    for block in range(plan.vectors):
        rows = T.alloc_buffer((plan.lanes.bit_length(), plan.lanes, plan.lanes), "float32", scope="local")
        for i in T.unroll(plan.lanes):
            for lane in T.vectorized(plan.lanes):
                column = T.meta_var(block * plan.lanes + lane)
                rows[0, i, lane] = scratch.attended[part * plan.lanes + i, column] * scratch.total[column]
        transpose_square(rows, plan.lanes)
        for i in T.unroll(plan.lanes):
            n = T.meta_var(start + block * plan.lanes + i)
            if plan.writes_pixel(scratch.pixel[n], plan.lanes):
                for lane in T.vectorized(width):
                    output[place.image, scratch.pixel[n], place.value_channel + part * plan.lanes + lane] = T.cast(
                        rows[plan.lanes.bit_length() - 1, i, lane], plan.dtype
                    )
