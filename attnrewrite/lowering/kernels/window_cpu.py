"""FlashWindowAttention for CPUs: one window and head at a time, everything between gather and scatter in cache.

For every window and head the tokens are gathered with shift and padding absorbed, and then, for one tile of queries:

    logits[m, n] = key[m] . query[n] * scale + bias[n, m] + mask    lanes are queries, so that softmax is vertical
    logits       = exp2(logits - max over m)                        scale, bias and mask carry the factor log2(e)
    out[n]       = sum_m logits[m, n] * value[m] / sum_m logits[m, n]    lanes are channels, written into the map

Queries are padded to whole vectors, keys to whole register blocks; the padding is computed and ignored. Memory per thread
is bounded by one tile of queries against all keys of a window. Letters as in docs/ops.md, n a query and m a key.
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

from attnrewrite.functions.spec import FlashWindowAttention
from attnrewrite.lowering.kernels.vector_math import LOG2_E, VectorUnit, exp2_of_nonpositive, vector_unit
from attnrewrite.localattention.geometry import WindowGeometry, ceil_to_multiple

# A task is what one thread takes at a time. The transposed bias is made once per task, so a task is several windows of
# one head; but a map has to give at least this many tasks, or threads would idle.
_MIN_TASKS = 32
_MAX_WINDOWS_PER_TASK = 16


@dataclass(frozen=True)
class _Plan:
    """Sizes of one kernel. A tile is `vectors * lanes` queries; the register block of the logits is key_rows keys by one
    tile, that of the output query_rows queries by value_vectors vectors of value_lanes channels."""

    geometry: WindowGeometry
    num_heads: int
    head_dim: int
    value_dim: int
    scale: float
    mask_value: float | None
    dtype: str
    lanes: int
    vectors: int
    key_rows: int
    value_lanes: int
    value_vectors: int
    query_rows: int
    windows_per_task: int

    @property
    def tokens(self) -> int:
        return self.geometry.tokens_per_window

    @property
    def num_windows(self) -> int:
        return self.geometry.num_windows

    @property
    def tasks_per_head(self) -> int:
        return -(-self.num_windows // self.windows_per_task)

    @property
    def tile(self) -> int:
        return self.lanes * self.vectors

    @property
    def tiles(self) -> int:
        return -(-self.tokens // self.tile)

    @property
    def padded_keys(self) -> int:
        return ceil_to_multiple(self.tokens, self.key_rows)

    @property
    def value_blocks(self) -> int:
        return -(-self.value_dim // (self.value_lanes * self.value_vectors))

    @property
    def padded_value_dim(self) -> int:
        return self.value_blocks * self.value_vectors * self.value_lanes

    @property
    def whole_query_blocks(self) -> bool:
        """Every register block of the output holds query_rows queries of the window and of the map."""
        rows = self.tile if self.tiles > 1 else self.tokens
        return not self.geometry.is_padded and rows % self.query_rows == 0 and (
            self.tiles == 1 or self.tokens % self.tile % self.query_rows == 0
        )

    @property
    def can_cross_regions(self) -> bool:
        return self.mask_value is not None and any(self.geometry.shift_size)

    def pixel(self, window: Expr, token: Expr) -> Expr:
        """Flat pixel of a token, or -1: the closed form of `WindowGeometry.pixels`."""
        geometry = self.geometry
        flat, inside = None, None
        for axis, position in enumerate(self._positions(window, token)):
            extent, padded, shift = geometry.feature_size[axis], geometry.padded_size[axis], geometry.shift_size[axis]
            modulus = padded if geometry.shift_padded else extent
            index = T.Select(position >= modulus - shift, position - (modulus - shift), position + shift)
            if not shift:
                index = position
            if padded != extent:
                within = (index if geometry.shift_padded else position) < extent
                inside = within if inside is None else T.And(inside, within)
            flat = index if flat is None else flat * extent + index
        return flat if inside is None else T.Select(inside, flat, -1)

    def region(self, window: Expr, token: Expr) -> Expr:
        """Label of a token's region: the closed form of `WindowGeometry.regions`."""
        label = T.int32(0)
        for axis, position in enumerate(self._positions(window, token)):
            if shift := self.geometry.shift_size[axis]:
                first_wrapped = self.geometry.padded_size[axis] - shift
                label = label * 2 + T.Select(position >= first_wrapped, 1, 0)
        return label

    def has_two_regions(self, window: Expr) -> Expr:
        """The window is the last along a shifted axis, the only ones with tokens from both sides of the map."""
        shifted = [
            index == extent - 1
            for index, extent, shift in zip(
                unravel(window, self.geometry.grid), self.geometry.grid, self.geometry.shift_size, strict=True
            )
            if shift
        ]
        return any_of(shifted)

    def _positions(self, window: Expr, token: Expr) -> list[Expr]:
        """Position of a token along each axis of the padded map, before the shift."""
        window_size = self.geometry.window_size
        return [
            index * size + offset
            for index, size, offset in zip(
                unravel(window, self.geometry.grid), window_size, unravel(token, window_size), strict=True
            )
        ]


def unravel(flat: Expr, sizes: Sequence[int]) -> list[Expr]:
    """Row-major coordinates of a flat index; the first axis is not reduced, so an index past the end stays past it."""
    coordinates: list[Expr] = []
    for axis, size in enumerate(sizes):
        rest = math.prod(sizes[axis + 1 :])
        index = T.floordiv(flat, rest) if rest > 1 else flat
        coordinates.append(T.floormod(index, size) if axis else index)
    return coordinates


def any_of(conditions: list[Expr]) -> Expr:
    result = conditions[0]
    for condition in conditions[1:]:
        result = T.Or(result, condition)
    return result


def _plan(spec: FlashWindowAttention, shapes: Mapping[str, Sequence[Any]], dtype: str, unit: VectorUnit) -> _Plan:
    geometry, heads = spec.geometry, spec.num_heads
    tokens = geometry.tokens_per_window
    head_dim = int(shapes["query"][-1]) // heads
    value_dim = int(shapes["value"][-1]) // heads
    vectors, key_rows = _logit_block(tokens, unit)
    value_lanes = min(unit.lanes, max(4, 1 << (value_dim - 1).bit_length()))
    value_vectors = -(-value_dim // value_lanes)
    value_vectors = -(-value_vectors // -(-value_vectors // 4))
    query_rows = _output_rows(tokens, vectors * unit.lanes, unit.accumulators // value_vectors)
    windows_per_task = max(1, min(_MAX_WINDOWS_PER_TASK, heads * geometry.num_windows // _MIN_TASKS))
    return _Plan(
        geometry,
        heads,
        head_dim,
        value_dim,
        spec.scale * LOG2_E,
        None if spec.mask_value is None else spec.mask_value * LOG2_E,
        dtype,
        unit.lanes,
        vectors,
        key_rows,
        value_lanes,
        value_vectors,
        query_rows,
        windows_per_task,
    )


def _logit_block(tokens: int, unit: VectorUnit) -> tuple[int, int]:
    """(vectors of queries, keys) of the register block that wastes least on padding and on loads."""

    def cost(vectors: int, key_rows: int) -> float:
        work = ceil_to_multiple(tokens, vectors * unit.lanes) * ceil_to_multiple(tokens, key_rows)
        loads_per_product = 1 / vectors + 1 / key_rows
        exposed_latency = max(0, 8 - vectors * key_rows) / 8
        return work * (1 + 0.25 * loads_per_product + exposed_latency)

    blocks = [(v, k) for v in range(1, 7) for k in range(1, unit.accumulators // v + 1)]
    return min(blocks, key=lambda block: cost(*block))


def _output_rows(tokens: int, tile: int, limit: int) -> int:
    """Queries per register block of the output: few padded ones, and no block reaches past its tile."""
    last_tile = tokens - (tokens - 1) // tile * tile

    def cost(rows: int) -> float:
        computed = (tokens - last_tile) // tile * ceil_to_multiple(tile, rows) + ceil_to_multiple(last_tile, rows)
        return computed * (1 + 0.5 / rows)

    fits = [
        rows
        for rows in range(1, max(limit, 1) + 1)
        if ceil_to_multiple(last_tile, rows) <= tile and (tokens <= tile or tile % rows == 0)
    ]
    return min(fits, key=cost)


# The stages below are inlined into the kernel. A `feature_map` is a flat view [B, pixels, channels].


@T.inline
def copy_channels(target, row, feature_map, batch, pixel, first, width, lanes):
    """target[row, :width] = feature_map[batch, pixel, first : first + width], as float32."""
    for block in range(width // lanes):
        for lane in T.vectorized(lanes):
            target[row, block * lanes + lane] = T.cast(
                feature_map[batch, pixel, first + block * lanes + lane], "float32"
            )
    if width % lanes > 0:
        for lane in T.vectorized(width % lanes):
            target[row, width - width % lanes + lane] = T.cast(
                feature_map[batch, pixel, first + width - width % lanes + lane], "float32"
            )


@T.inline
def fill(target, rows, width, lanes):
    """target[:rows, :width] = 0; width is a multiple of lanes."""
    for row in range(rows):
        for block in range(width // lanes):
            for lane in T.vectorized(lanes):
                target[row, block * lanes + lane] = T.float32(0)


@T.inline
def locate_tokens(plan, window, pixel):
    """pixel[n] = flat pixel of token n of the window, -1 outside the map."""
    for block in range(-(-plan.tokens // plan.lanes)):
        for lane in T.vectorized(plan.lanes):
            pixel[block * plan.lanes + lane] = plan.pixel(window, block * plan.lanes + lane)


@T.inline
def gather_tokens(plan, target, feature_map, padding, batch, pixel, first, width):
    """target[m, :width] = the key or value of token m; a token outside the map is `padding`, or zero without one."""
    for m in range(plan.tokens):
        if not plan.geometry.is_padded:
            copy_channels(target, m, feature_map, batch, pixel[m], first, width, plan.lanes)
        else:
            if pixel[m] >= 0:
                copy_channels(target, m, feature_map, batch, pixel[m], first, width, plan.lanes)
            else:
                for c in range(width):
                    if padding is None:
                        target[m, c] = T.float32(0)
                    else:
                        target[m, c] = T.cast(padding[first + c], "float32")


@T.inline
def gather_queries(plan, target, feature_map, batch, pixel, first, start):
    """target[c, n] = scaled query of token start + n; tokens outside the map and past the window stay zero."""
    for n in range(T.min(plan.tile, plan.tokens - start)):
        if not plan.geometry.is_padded:
            for c in range(plan.head_dim):
                target[c, n] = T.cast(feature_map[batch, pixel[start + n], first + c], "float32") * T.float32(plan.scale)
        else:
            if pixel[start + n] >= 0:
                for c in range(plan.head_dim):
                    target[c, n] = T.cast(feature_map[batch, pixel[start + n], first + c], "float32") * T.float32(
                        plan.scale
                    )
            else:
                for c in range(plan.head_dim):
                    target[c, n] = T.float32(0)


@T.inline
def transpose_terms(plan, target, term, window, head, start):
    """target[m, n] = term(window, head, start + n, m) * log2(e) for the queries of one tile."""
    for n in range(T.min(plan.tile, plan.tokens - start)):
        for m in range(plan.tokens):
            target[m, n] = term(window, head, start + n, m) * T.float32(LOG2_E)


@T.inline
def compute_logits(plan, logits, keys, queries, terms):
    """logits[m, n] = keys[m] . queries[:, n] + terms[m, n], a register block of keys by one tile of queries at a time."""
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
                            acc[j, v, lane]
                            + keys[block * plan.key_rows + j, c] * queries[c, v * plan.lanes + lane]
                        )
        for j in T.unroll(plan.key_rows):
            for v in T.unroll(plan.vectors):
                for lane in T.vectorized(plan.lanes):
                    logits[block * plan.key_rows + j, v * plan.lanes + lane] = acc[j, v, lane]


@T.inline
def penalise_regions(plan, logits, window, start):
    """Adds mask_value where query and key are of different regions."""
    region = T.alloc_buffer((ceil_to_multiple(plan.tokens, plan.lanes),), "int32")
    of_query = T.alloc_buffer((plan.tile,), "int32")
    for block in range(-(-plan.tokens // plan.lanes)):
        for lane in T.vectorized(plan.lanes):
            region[block * plan.lanes + lane] = plan.region(window, block * plan.lanes + lane)
    for v in range(plan.vectors):
        for lane in T.vectorized(plan.lanes):
            of_query[v * plan.lanes + lane] = plan.region(window, start + v * plan.lanes + lane)
    for m in range(plan.tokens):
        for v in T.unroll(plan.vectors):
            for lane in T.vectorized(plan.lanes):
                logits[m, v * plan.lanes + lane] = logits[m, v * plan.lanes + lane] + T.Select(
                    region[m] == of_query[v * plan.lanes + lane], T.float32(0), T.float32(plan.mask_value)
                )


@T.inline
def exponentiate(plan, logits, reciprocal):
    """logits = exp2(logits - max over the keys) in place; reciprocal[n] = 1 / their sum."""
    largest = T.alloc_buffer((plan.vectors, plan.lanes), "float32", scope="local")
    total = T.alloc_buffer((plan.vectors, plan.lanes), "float32", scope="local")
    for v in T.unroll(plan.vectors):
        for lane in T.vectorized(plan.lanes):
            largest[v, lane] = logits[0, v * plan.lanes + lane]
            total[v, lane] = T.float32(0)
    for m in range(1, plan.tokens):
        for v in T.unroll(plan.vectors):
            for lane in T.vectorized(plan.lanes):
                largest[v, lane] = T.max(largest[v, lane], logits[m, v * plan.lanes + lane])
    for m in range(plan.tokens):
        for v in T.unroll(plan.vectors):
            weight = T.alloc_buffer((plan.lanes,), "float32", scope="local")
            for lane in T.vectorized(plan.lanes):
                weight[lane] = exp2_of_nonpositive(logits[m, v * plan.lanes + lane] - largest[v, lane])
            for lane in T.vectorized(plan.lanes):
                total[v, lane] = total[v, lane] + weight[lane]
            for lane in T.vectorized(plan.lanes):
                logits[m, v * plan.lanes + lane] = weight[lane]
    for v in T.unroll(plan.vectors):
        for lane in T.vectorized(plan.lanes):
            reciprocal[v * plan.lanes + lane] = T.float32(1) / total[v, lane]


@T.inline
def store_channels(plan, output, batch, pixel, first, start, block, part, i, acc, reciprocal):
    """Row i of a register block into the map: whole vectors, and the part of a last one that the head has channels for."""
    for v in T.unroll(plan.value_vectors):
        if (part * plan.value_vectors + v + 1) * plan.value_lanes <= plan.value_dim:
            for lane in T.vectorized(plan.value_lanes):
                output[
                    batch,
                    pixel[start + block * plan.query_rows + i],
                    first + (part * plan.value_vectors + v) * plan.value_lanes + lane,
                ] = T.cast(acc[i, v, lane] * reciprocal[block * plan.query_rows + i], plan.dtype)
        if plan.value_dim % plan.value_lanes > 0:
            if part * plan.value_vectors + v == plan.value_dim // plan.value_lanes:
                for lane in T.vectorized(plan.value_dim % plan.value_lanes):
                    output[
                        batch,
                        pixel[start + block * plan.query_rows + i],
                        first + (part * plan.value_vectors + v) * plan.value_lanes + lane,
                    ] = T.cast(acc[i, v, lane] * reciprocal[block * plan.query_rows + i], plan.dtype)


@T.inline
def weigh_values(plan, output, weights, reciprocal, values, batch, pixel, first, start):
    """output[pixel[start + n]] = sum_m weights[m, n] * values[m] * reciprocal[n] for the queries of the map."""
    for block in range((T.min(plan.tile, plan.tokens - start) + plan.query_rows - 1) // plan.query_rows):
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
                if plan.whole_query_blocks:
                    store_channels(plan, output, batch, pixel, first, start, block, part, i, acc, reciprocal)
                else:
                    if start + block * plan.query_rows + i < plan.tokens:
                        if pixel[start + block * plan.query_rows + i] >= 0:
                            store_channels(plan, output, batch, pixel, first, start, block, part, i, acc, reciprocal)


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
    plan = _plan(spec, shapes, dtype, vector_unit(target))
    batch = shapes["query"][0]
    batch = batch if isinstance(batch, int) else T.var("int64", "batch")
    spatial = spec.geometry.feature_size
    pixels = math.prod(spatial)
    query_channels, value_channels = spec.num_heads * plan.head_dim, spec.num_heads * plan.value_dim
    has_bias, has_mask = "bias" in present, "mask" in present
    has_terms = has_bias or has_mask
    bias_varies = has_bias and shapes["bias"][0] != 1
    terms_vary = has_mask or bias_varies
    tokens = plan.tokens
    padded_tokens = ceil_to_multiple(tokens, plan.lanes)

    def term_of(bias_buffer: Any, mask_buffer: Any) -> Any:
        def term(window: Expr, head: Expr, n: Expr, m: Expr) -> Expr:
            terms = []
            if has_bias:
                terms.append(T.cast(bias_buffer[window if bias_varies else 0, head, n, m], "float32"))
            if has_mask:
                terms.append(T.cast(mask_buffer[window, n, m], "float32"))
            return sum(terms[1:], terms[0])

        return term

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
        bias_buffer = T.meta_var(optional_buffer(bias, "bias"))
        mask_buffer = T.meta_var(optional_buffer(mask, "mask"))
        padding_key = T.meta_var(optional_buffer(key_padding, "key_padding"))
        padding_value = T.meta_var(optional_buffer(value_padding, "value_padding"))
        output_map = T.match_buffer(output, (batch, *spatial, value_channels), dtype)
        q = flat(query_map, query_channels)
        k = flat(key_map, query_channels)
        v = flat(value_map, value_channels)
        o = flat(output_map, value_channels)
        term = T.meta_var(term_of(bias_buffer, mask_buffer))
        for task in T.parallel(batch * plan.tasks_per_head * plan.num_heads):
            keys = T.alloc_buffer((plan.padded_keys, plan.head_dim), "float32")
            values = T.alloc_buffer((tokens, plan.padded_value_dim), "float32")
            queries = T.alloc_buffer((plan.head_dim, plan.tile), "float32")
            logits = T.alloc_buffer((plan.padded_keys, plan.tile), "float32")
            reciprocal = T.alloc_buffer((plan.tile,), "float32")
            pixel = T.alloc_buffer((padded_tokens,), "int32")
            terms = T.meta_var(
                T.alloc_buffer((plan.padded_keys, plan.tile), "float32") if has_terms else None
            )
            head: T.let = T.cast(task % plan.num_heads, "int32")
            first_window: T.let = T.cast(task // plan.num_heads % plan.tasks_per_head * plan.windows_per_task, "int32")
            image: T.let = task // (plan.num_heads * plan.tasks_per_head)
            fill(queries, plan.head_dim, plan.tile, plan.lanes)
            for t in range(plan.tiles):
                if has_terms and not terms_vary:
                    transpose_terms(plan, terms, term, 0, head, t * plan.tile)
                for w in range(T.min(plan.windows_per_task, plan.num_windows - first_window)):
                    window: T.let = first_window + w
                    locate_tokens(plan, window, pixel)
                    gather_queries(plan, queries, q, image, pixel, head * plan.head_dim, t * plan.tile)
                    gather_tokens(plan, keys, k, padding_key, image, pixel, head * plan.head_dim, plan.head_dim)
                    gather_tokens(plan, values, v, padding_value, image, pixel, head * plan.value_dim, plan.value_dim)
                    if terms_vary:
                        transpose_terms(plan, terms, term, window, head, t * plan.tile)
                    compute_logits(plan, logits, keys, queries, terms)
                    if plan.can_cross_regions:
                        if plan.has_two_regions(window):
                            penalise_regions(plan, logits, window, t * plan.tile)
                    exponentiate(plan, logits, reciprocal)
                    weigh_values(
                        plan, o, logits, reciprocal, values, image, pixel, head * plan.value_dim, t * plan.tile
                    )

    absent = {operand: None for operand in FlashWindowAttention.operands[3:] if operand not in present}
    return kernel.specialize(**absent)
