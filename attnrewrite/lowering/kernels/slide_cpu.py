"""SlideAttention for CPUs: lanes are pixels of a row, keys and values are read where they lie, never expanded.

The last two spatial axes are rows and columns, all axes before them are planes. One task is a strip of rows of one plane
and head. It copies the strip's keys and values with their zero border (so no product below asks where the border is), and
then, for one tile of `rows` rows (dilation apart, so that they share neighbouring rows) by `lanes` columns:

    weights[j, p] = query[p] . key_j[p] * scale + bias[j]     rows x kernel rows sums in registers, for one kernel column
    weights[j, p] = exp2(weights[j, p] - max over j)          scale and bias carry the factor log2(e)
    out[c, p]     = sum_j weights[j, p] * value_j[c, p] / sum_j weights[j, p]     rows x channels sums in registers

The last tile of a row overlaps the one before it; a row shorter than a vector is one tile of which a part is stored. With
learned shift kernels key_j and value_j are small convolutions, computed where they are used. Letters as in docs/ops.md.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tvm.ir import Expr
from tvm.script import tirx as T
from tvm.target import Target
from tvm.tirx import PrimFunc

from attnrewrite.functions.spec import SlideAttention
from attnrewrite.lowering.kernels.vector_math import LOG2_E, VectorUnit, exp2_of_nonpositive, vector_unit
from attnrewrite.localattention.geometry import Sizes

# Rows of one tile at most: more would only lengthen the code.
_MAX_ROWS = 4
# The strip of a task is at least this many times as high as its halo, which neighbouring strips copy again.
_STRIP_PER_HALO = 4


@dataclass(frozen=True)
class _Plan:
    """Sizes of one kernel. Each of the spatial attributes has one entry per axis, at least two (rows and columns)."""

    map_axes: int
    feature_size: Sizes
    kernel_size: Sizes
    dilation: Sizes
    num_heads: int
    head_dim: int
    value_dim: int
    scale: float
    dtype: str
    lanes: int
    rows: int
    channels: int
    strip_tiles: int

    @property
    def height(self) -> int:
        return self.feature_size[-2]

    @property
    def width(self) -> int:
        return self.feature_size[-1]

    @property
    def planes(self) -> int:
        return math.prod(self.feature_size[:-2])

    @property
    def kernel_planes(self) -> int:
        return math.prod(self.kernel_size[:-2])

    @property
    def kernel_rows(self) -> int:
        return self.kernel_size[-2]

    @property
    def kernel_columns(self) -> int:
        return self.kernel_size[-1]

    @property
    def slots(self) -> int:
        return math.prod(self.kernel_size)

    @property
    def row_step(self) -> int:
        return self.dilation[-2]

    @property
    def column_step(self) -> int:
        return self.dilation[-1]

    @property
    def row_border(self) -> int:
        return self.kernel_rows // 2 * self.row_step

    @property
    def column_border(self) -> int:
        return self.kernel_columns // 2 * self.column_step

    @property
    def stored_lanes(self) -> int:
        """Columns of a tile that are pixels of the map."""
        return min(self.lanes, self.width)

    @property
    def column_tiles(self) -> int:
        return -(-self.width // self.lanes)

    @property
    def strip(self) -> int:
        """Rows of one task."""
        return self.strip_tiles * self.rows

    @property
    def strips(self) -> int:
        return -(-self.height // self.strip)

    @property
    def copied_rows(self) -> int:
        return self.strip + 2 * self.row_border

    @property
    def pitch(self) -> int:
        return max(self.width, self.lanes) + 2 * self.column_border

    def first_column(self, tile: Expr) -> Expr:
        return T.min(tile * self.lanes, max(self.width - self.lanes, 0))

    def first_row(self, tile: Expr) -> Expr:
        """Row of the strip the tile starts at; its other rows follow row_step apart."""
        span = self.rows * self.row_step
        return tile // self.row_step * span + tile % self.row_step

    def neighbour_plane(self, plane: Expr, slot: Expr) -> tuple[Expr, Expr]:
        """(plane that a kernel plane reads, whether it is a plane of the map)."""
        flat: Expr = T.int32(0)
        inside: Expr = T.bool(True)
        for axis, (extent, kernel, step) in enumerate(
            zip(self.feature_size[:-2], self.kernel_size[:-2], self.dilation[:-2], strict=True)
        ):
            position = plane // math.prod(self.feature_size[axis + 1 : -2]) % extent
            tap = slot // math.prod(self.kernel_size[axis + 1 : -2]) % kernel
            position = position + (tap - kernel // 2) * step
            inside = T.And(inside, T.And(position >= 0, position < extent))
            flat = flat * extent + position
        return flat, inside

    def tap(self, slot: Expr, kernel_row: Expr, kernel_column: Expr) -> list[Expr]:
        """Index of a tap along the axes that the map has."""
        kernel_planes = self.kernel_size[:-2]
        index = [
            slot // math.prod(kernel_planes[axis + 1 :]) % kernel for axis, kernel in enumerate(kernel_planes)
        ] + [kernel_row, kernel_column]
        return index[-self.map_axes :]


def of_channel(rows: Any, channel: Expr, *index: Expr) -> Expr:
    """rows[channel mod R, *index] as float32."""
    return T.cast(rows[(T.floormod(channel, rows.shape[0]), *index)], "float32")


def _plan(
    spec: SlideAttention, present: Collection[str], shapes: Mapping[str, Sequence[Any]], dtype: str, unit: VectorUnit
) -> _Plan:
    geometry = spec.geometry
    missing = max(0, 2 - len(geometry.feature_size))
    feature_size = (1,) * missing + geometry.feature_size
    kernel_size = (1,) * missing + geometry.kernel_size
    dilation = (1,) * missing + geometry.dilation
    value_dim = int(shapes["value"][1]) // spec.num_heads

    lanes = min(unit.lanes, max(4, 1 << (feature_size[-1] - 1).bit_length()))
    # A learned kernel keeps kernel_columns slots and their weighted sum for every row.
    learned = "key_kernel" in present or "value_kernel" in present
    sums_per_row = max(kernel_size[-2], kernel_size[-1] + 1 if learned else 1)
    rows = max(1, min(_MAX_ROWS, unit.accumulators // sums_per_row, feature_size[-2]))
    channels = max(1, min(value_dim, 16 // rows, unit.accumulators // rows))
    # Tiles of a strip come in groups of row_step, which interleave to cover row_step * rows rows without a gap.
    group = rows * dilation[-2]
    halo = (kernel_size[-2] - 1) * dilation[-2]
    groups = min(max(1, _STRIP_PER_HALO * halo // group), -(-feature_size[-2] // group))
    return _Plan(
        len(geometry.feature_size),
        feature_size,
        kernel_size,
        dilation,
        spec.num_heads,
        int(shapes["query"][1]) // spec.num_heads,
        value_dim,
        spec.scale * LOG2_E,
        dtype,
        lanes,
        rows,
        channels,
        groups * dilation[-2],
    )


# The stages below are inlined into the kernel. A `feature_map` is a view [B, C, planes, rows, columns]; a `strip` is the
# bordered copy [C of the head, kernel planes, rows, pitch] of a task.


@T.inline
def copy_strip(plan, strip, width, feature_map, image, first, plane, first_row):
    """Copies `width` channels of the strip's rows and their border as float32; zero outside the map."""
    for c, slot, row in T.grid(width, plan.kernel_planes, plan.copied_rows):
        y = T.meta_var(first_row + row - plan.row_border)
        source, inside = T.meta_var(plan.neighbour_plane(plane, slot))
        if T.And(inside, T.And(y >= 0, y < plan.height)):
            if plan.column_border > 0:
                for x in T.vectorized(plan.column_border):
                    strip[c, slot, row, x] = T.float32(0)
            for tile in range(plan.column_tiles):
                for lane in T.vectorized(plan.stored_lanes):
                    strip[c, slot, row, plan.column_border + plan.first_column(tile) + lane] = T.cast(
                        feature_map[image, first + c, source, y, plan.first_column(tile) + lane], "float32"
                    )
            if plan.pitch > plan.column_border + plan.width:
                for x in T.vectorized(plan.pitch - plan.column_border - plan.width):
                    strip[c, slot, row, plan.column_border + plan.width + x] = T.float32(0)
        else:
            for x in range(plan.pitch):
                strip[c, slot, row, x] = T.float32(0)


@T.inline
def gather_queries(plan, queries, feature_map, image, first, plane, first_row, column):
    """queries[c, i] = scaled query of row i of the tile. A row below the map repeats the last one; it is not stored."""
    for c in range(plan.head_dim):
        for i in T.unroll(plan.rows):
            for lane in T.vectorized(plan.stored_lanes):
                queries[c, i, lane] = T.cast(
                    feature_map[
                        image, first + c, plane, T.min(first_row + i * plan.row_step, plan.height - 1), column + lane
                    ],
                    "float32",
                ) * T.float32(plan.scale)


@T.inline
def score_shifted(plan, weights, queries, keys, row, column):
    """weights[i, j] = queries . keys shifted by slot j."""
    for slot in range(plan.kernel_planes):
        for kx in range(plan.kernel_columns):
            acc = T.alloc_buffer((plan.rows, plan.kernel_rows, plan.lanes), "float32", scope="local")
            for i in T.unroll(plan.rows):
                for ky in T.unroll(plan.kernel_rows):
                    for lane in T.vectorized(plan.lanes):
                        acc[i, ky, lane] = T.float32(0)
            for c in range(plan.head_dim):
                for r in T.unroll(plan.rows + plan.kernel_rows - 1):
                    for i in T.unroll(plan.rows):
                        if T.And(r - i >= 0, r - i < plan.kernel_rows):
                            for lane in T.vectorized(plan.lanes):
                                acc[i, r - i, lane] = (
                                    acc[i, r - i, lane]
                                    + queries[c, i, lane]
                                    * keys[c, slot, row + r * plan.row_step, column + kx * plan.column_step + lane]
                                )
            for i in T.unroll(plan.rows):
                for ky in T.unroll(plan.kernel_rows):
                    for lane in T.vectorized(plan.lanes):
                        weights[i, (slot * plan.kernel_rows + ky) * plan.kernel_columns + kx, lane] = acc[i, ky, lane]


@T.inline
def convolve(plan, acc, strip, c, kernel, bias, channel, first_slot, row, column):
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
                for lane in T.vectorized(plan.lanes):
                    acc[j, i, lane] = (
                        acc[j, i, lane]
                        + of_channel(kernel, channel, first_slot + j, *plan.tap(slot, ky, kx))
                        * strip[c, slot, row + (i + ky) * plan.row_step, column + kx * plan.column_step + lane]
                    )


@T.inline
def score_convolved(plan, weights, queries, keys, kernel, bias, first, row, column):
    """weights[i, j] = queries . (keys under learned kernel j)."""
    for i, j in T.grid(plan.rows, plan.slots):
        for lane in T.vectorized(plan.lanes):
            weights[i, j, lane] = T.float32(0)
    for c, block in T.grid(plan.head_dim, plan.slots // plan.kernel_columns):
        acc = T.alloc_buffer((plan.kernel_columns, plan.rows, plan.lanes), "float32", scope="local")
        convolve(plan, acc, keys, c, kernel, bias, first + c, block * plan.kernel_columns, row, column)
        for j in T.unroll(plan.kernel_columns):
            for i in T.unroll(plan.rows):
                for lane in T.vectorized(plan.lanes):
                    weights[i, block * plan.kernel_columns + j, lane] = (
                        weights[i, block * plan.kernel_columns + j, lane] + queries[c, i, lane] * acc[j, i, lane]
                    )


@T.inline
def add_logit_terms(plan, weights, queries, key_bias, bias, head, first):
    """weights[i, j] += bias[head, j] * log2(e) + queries . key_bias[:, j]; either may be None."""
    for i, j in T.grid(plan.rows, plan.slots):
        acc = T.alloc_buffer((plan.lanes,), "float32", scope="local")
        for lane in T.vectorized(plan.lanes):
            acc[lane] = weights[i, j, lane]
        if bias is not None:
            for lane in T.vectorized(plan.lanes):
                acc[lane] = acc[lane] + T.cast(bias[head, j], "float32") * T.float32(LOG2_E)
        if key_bias is not None:
            for c in range(plan.head_dim):
                for lane in T.vectorized(plan.lanes):
                    acc[lane] = acc[lane] + queries[c, i, lane] * of_channel(key_bias, first + c, j)
        for lane in T.vectorized(plan.lanes):
            weights[i, j, lane] = acc[lane]


@T.inline
def exponentiate(plan, weights, reciprocal):
    """weights = exp2(weights - max over the slots) in place; reciprocal[i] = 1 / their sum."""
    largest = T.alloc_buffer((plan.rows, plan.lanes), "float32", scope="local")
    total = T.alloc_buffer((plan.rows, plan.lanes), "float32", scope="local")
    for i in T.unroll(plan.rows):
        for lane in T.vectorized(plan.lanes):
            largest[i, lane] = weights[i, 0, lane]
            total[i, lane] = T.float32(0)
    for j in range(1, plan.slots):
        for i in T.unroll(plan.rows):
            for lane in T.vectorized(plan.lanes):
                largest[i, lane] = T.max(largest[i, lane], weights[i, j, lane])
    for j in range(plan.slots):
        for i in T.unroll(plan.rows):
            weight = T.alloc_buffer((plan.lanes,), "float32", scope="local")
            for lane in T.vectorized(plan.lanes):
                weight[lane] = exp2_of_nonpositive(weights[i, j, lane] - largest[i, lane])
            for lane in T.vectorized(plan.lanes):
                total[i, lane] = total[i, lane] + weight[lane]
            for lane in T.vectorized(plan.lanes):
                weights[i, j, lane] = weight[lane]
    for i in T.unroll(plan.rows):
        for lane in T.vectorized(plan.lanes):
            reciprocal[i, lane] = T.float32(1) / total[i, lane]


@T.inline
def store_row(plan, output, image, channel, plane, y, column, acc, i, c, reciprocal):
    """One row of a tile into the map."""
    if y < plan.height:
        for lane in T.vectorized(plan.stored_lanes):
            output[image, channel, plane, y, column + lane] = T.cast(acc[i, c, lane] * reciprocal[i, lane], plan.dtype)


@T.inline
def weigh_shifted(plan, output, weights, reciprocal, values, bias, image, first, plane, first_row, row, column):
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
                            acc[i, c, lane] = acc[i, c, lane] + weights[i, j, lane] * of_channel(
                                bias, first + c0 + c, j
                            )
        for slot, kx in T.grid(plan.kernel_planes, plan.kernel_columns):
            for r in T.unroll(plan.rows + plan.kernel_rows - 1):
                for c in T.unroll(plan.channels):
                    for i in T.unroll(plan.rows):
                        if T.And(r - i >= 0, r - i < plan.kernel_rows):
                            for lane in T.vectorized(plan.lanes):
                                acc[i, c, lane] = (
                                    acc[i, c, lane]
                                    + weights[i, (slot * plan.kernel_rows + r - i) * plan.kernel_columns + kx, lane]
                                    * values[
                                        c0 + c, slot, row + r * plan.row_step, column + kx * plan.column_step + lane
                                    ]
                                )
        for i in T.unroll(plan.rows):
            for c in T.unroll(plan.channels):
                y = T.meta_var(first_row + i * plan.row_step)
                store_row(plan, output, image, first + c0 + c, plane, y, column, acc, i, c, reciprocal)


@T.inline
def weigh_convolved(plan, output, weights, reciprocal, values, kernel, bias, image, first, plane, first_row, row, column):
    """output = sum_j weights[j] * (values under learned kernel j) * reciprocal, one channel at a time."""
    for c in range(plan.value_dim):
        acc = T.alloc_buffer((plan.rows, 1, plan.lanes), "float32", scope="local")
        for i in T.unroll(plan.rows):
            for lane in T.vectorized(plan.lanes):
                acc[i, 0, lane] = T.float32(0)
        for block in range(plan.slots // plan.kernel_columns):
            slots = T.alloc_buffer((plan.kernel_columns, plan.rows, plan.lanes), "float32", scope="local")
            convolve(plan, slots, values, c, kernel, bias, first + c, block * plan.kernel_columns, row, column)
            for j in T.unroll(plan.kernel_columns):
                for i in T.unroll(plan.rows):
                    for lane in T.vectorized(plan.lanes):
                        acc[i, 0, lane] = (
                            acc[i, 0, lane] + weights[i, block * plan.kernel_columns + j, lane] * slots[j, i, lane]
                        )
        for i in T.unroll(plan.rows):
            y = T.meta_var(first_row + i * plan.row_step)
            store_row(plan, output, image, first + c, plane, y, column, acc, i, 0, reciprocal)


def slide_attention(
    spec: SlideAttention,
    present: Collection[str],
    shapes: Mapping[str, Sequence[Any]],
    dtype: str,
    target: Target,
    name: str = "slide_attention",
) -> PrimFunc:
    """The kernel for one site: parameters are the present operands in the op's order, then the output [B, nH*dv, *S].

    present: names of the operands given. shapes: shape of each of them, the batch an int or a TIR variable (which the
    kernel replaces by one of its own, read from the query). dtype: float32 or float16, of all operands and the output;
    sums are float32. target: an `llvm` target, for its vector unit.
    """
    plan = _plan(spec, present, shapes, dtype, vector_unit(target))
    batch = shapes["query"][0]
    batch = batch if isinstance(batch, int) else T.var("int64", "batch")
    spatial, slots = spec.geometry.feature_size, plan.slots
    query_channels, value_channels = spec.num_heads * plan.head_dim, spec.num_heads * plan.value_dim
    has_key_kernel, has_value_kernel = "key_kernel" in present, "value_kernel" in present
    has_logit_terms = "bias" in present or ("key_bias" in present and not has_key_kernel)

    def optional_buffer(handle: Any, operand: str) -> Any:
        return None if handle is None else T.match_buffer(handle, tuple(shapes[operand]), dtype)

    def planes(feature_map: Any, channels: int) -> Any:
        return T.decl_buffer((batch, channels, plan.planes, plan.height, plan.width), dtype, data=feature_map.data)

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
        query_map = T.match_buffer(query, (batch, query_channels, *spatial), dtype)
        key_map = T.match_buffer(key, (batch, query_channels, *spatial), dtype)
        value_map = T.match_buffer(value, (batch, value_channels, *spatial), dtype)
        logit_bias = T.meta_var(optional_buffer(bias, "bias"))
        kernel_of_keys = T.meta_var(optional_buffer(key_kernel, "key_kernel"))
        bias_of_keys = T.meta_var(optional_buffer(key_bias, "key_bias"))
        kernel_of_values = T.meta_var(optional_buffer(value_kernel, "value_kernel"))
        bias_of_values = T.meta_var(optional_buffer(value_bias, "value_bias"))
        output_map = T.match_buffer(output, (batch, value_channels, *spatial), dtype)
        q = planes(query_map, query_channels)
        k = planes(key_map, query_channels)
        v = planes(value_map, value_channels)
        o = planes(output_map, value_channels)
        for task in T.parallel(batch * plan.num_heads * plan.planes * plan.strips):
            keys = T.alloc_buffer((plan.head_dim, plan.kernel_planes, plan.copied_rows, plan.pitch), "float32")
            values = T.alloc_buffer((plan.value_dim, plan.kernel_planes, plan.copied_rows, plan.pitch), "float32")
            queries = T.alloc_buffer((plan.head_dim, plan.rows, plan.lanes), "float32")
            weights = T.alloc_buffer((plan.rows, slots, plan.lanes), "float32")
            reciprocal = T.alloc_buffer((plan.rows, plan.lanes), "float32")
            strip_row: T.let = T.cast(task % plan.strips, "int32") * plan.strip
            plane: T.let = T.cast(task // plan.strips % plan.planes, "int32")
            head: T.let = T.cast(task // (plan.strips * plan.planes) % plan.num_heads, "int32")
            image: T.let = task // (plan.strips * plan.planes * plan.num_heads)
            query_channel: T.let = head * plan.head_dim
            value_channel: T.let = head * plan.value_dim
            copy_strip(plan, keys, plan.head_dim, k, image, query_channel, plane, strip_row)
            copy_strip(plan, values, plan.value_dim, v, image, value_channel, plane, strip_row)
            for c, i in T.grid(plan.head_dim, plan.rows):
                for lane in T.vectorized(plan.lanes):
                    queries[c, i, lane] = T.float32(0)
            for t, column_tile in T.grid(plan.strip_tiles, plan.column_tiles):
                row: T.let = plan.first_row(t)
                column: T.let = plan.first_column(column_tile)
                first_row: T.let = strip_row + row
                if first_row < plan.height:
                    gather_queries(plan, queries, q, image, query_channel, plane, first_row, column)
                    if has_key_kernel:
                        score_convolved(
                            plan, weights, queries, keys, kernel_of_keys, bias_of_keys, query_channel, row, column
                        )
                    else:
                        score_shifted(plan, weights, queries, keys, row, column)
                    if has_logit_terms:
                        add_logit_terms(
                            plan,
                            weights,
                            queries,
                            None if has_key_kernel else bias_of_keys,
                            logit_bias,
                            head,
                            query_channel,
                        )
                    exponentiate(plan, weights, reciprocal)
                    if has_value_kernel:
                        weigh_convolved(
                            plan,
                            o,
                            weights,
                            reciprocal,
                            values,
                            kernel_of_values,
                            bias_of_values,
                            image,
                            value_channel,
                            plane,
                            first_row,
                            row,
                            column,
                        )
                    else:
                        weigh_shifted(
                            plan,
                            o,
                            weights,
                            reciprocal,
                            values,
                            bias_of_values,
                            image,
                            value_channel,
                            plane,
                            first_row,
                            row,
                            column,
                        )

    absent = {operand: None for operand in SlideAttention.operands[3:] if operand not in present}
    return kernel.specialize(**absent)
