"""FlashWindowAttention for CUDA and Metal: one threadgroup per window, head and tile of queries.

Keys stream through shared memory in tiles, the softmax is kept up as they come (running maximum and sum, float32), so
a window of any size fits and nothing of size N x N leaves the chip. Per tile of keys, a threadgroup

1. stages query and key (in chunks of channels) and forms its logits in registers, `queries x keys` of them per thread,
2. adds bias, mask and the region penalty, and exchanges the row maxima through shared memory,
3. puts the weights into shared memory and multiplies them with the staged value, `queries x channels` per thread.

The layout of a threadgroup is threads (x, y): x runs over keys, then over the value's channels; y over queries.

Letters: N tokens per window, nW windows, nH heads, d and dv head_dim of query/key and of value.
Source of the running softmax: Dao et al., "FlashAttention", https://arxiv.org/abs/2205.14135, algorithm 1.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tvm import DataType, tirx
from tvm.target import Target
from tvm.tirx.script.builder import ir as T

from attnrewrite.functions.spec import FlashWindowAttention
from attnrewrite.localattention.geometry import WindowGeometry
from attnrewrite.lowering.kernels.gpu_builder import (
    ACCUMULATOR,
    LOWEST,
    Expr,
    Frame,
    KernelBuilder,
    Limits,
    SharedTile,
    barrier,
    ceil_div,
    choose,
    every,
    fill,
    load,
    registers,
    spread,
    store,
    unflatten,
    when,
)

MAX_CHANNEL_CHUNK = 64


@dataclass(frozen=True)
class WindowTiling:
    """How one threadgroup divides a window.

    columns, rows: threads along x and y. queries, keys: of the logits tile, per thread.
    chunk: channels staged at a time, of query, key and value alike.
    """

    columns: int
    rows: int
    queries: int
    keys: int
    chunk: int

    @property
    def tile_queries(self) -> int:
        return self.rows * self.queries

    @property
    def tile_keys(self) -> int:
        return self.columns * self.keys

    @property
    def channels(self) -> int:
        """Channels of a value chunk per thread."""
        return ceil_div(self.chunk, self.columns)

    @property
    def staged_width(self) -> int:
        """Channels of a staged row: the chunk, up to a multiple of the thread columns."""
        return self.channels * self.columns

    def shared_bytes(self, operand_bytes: int) -> int:
        """Bytes of the staged query, of the staged key or value, and of the weights."""
        staged = (self.tile_queries + self.tile_keys) * (self.staged_width | 1) * operand_bytes
        return staged + self.tile_queries * (self.tile_keys | 1) * 4


def choose_tiling(tokens: int, head_dim: int, value_dim: int, operand_bytes: int, limits: Limits) -> WindowTiling:
    """The tiling with the least estimated time among those that keep to the limits.

    The estimate counts the multiply-adds of a thread and its loads from shared memory (a core has about a quarter as
    many load lanes as arithmetic lanes), tiles that stick out of the window included, and is divided by how well the
    independent operations of the resident threads hide latency.
    """
    chunk = min(max(head_dim, value_dim), MAX_CHANNEL_CHUNK)
    while WindowTiling(8, 8, 1, 1, chunk).shared_bytes(operand_bytes) > limits.shared_bytes:
        chunk //= 2

    def estimate(tiling: WindowTiling) -> float:
        query_tiles, key_tiles = ceil_div(tokens, tiling.tile_queries), ceil_div(tokens, tiling.tile_keys)
        q, k, c = tiling.queries, tiling.keys, tiling.channels
        logits = ceil_div(head_dim, chunk) * chunk * (q * k + 4 * (q + k))
        values = ceil_div(value_dim, chunk) * min(tiling.tile_keys, tokens) * (q * c + 4 * (q + c))
        exchange = 4 * q * tiling.columns + 12 * q * k + 150  # row maxima, exponentials, barriers
        threads = tiling.columns * tiling.rows
        resident = min(limits.resident_bytes // tiling.shared_bytes(operand_bytes) * threads, 1024)
        hidden = min(1.0, resident * min(q * k, 16) / 2048)
        return query_tiles * key_tiles * threads * (logits + values + exchange) / hidden

    candidates = []
    for columns, rows, queries, keys in itertools.product((8, 16), (8, 16), range(1, 9), range(1, 9)):
        tiling = WindowTiling(columns, rows, queries, keys, chunk)
        held = queries * (keys + tiling.channels * ceil_div(value_dim, chunk))
        fits = tiling.shared_bytes(operand_bytes) <= limits.shared_bytes and columns * rows <= limits.threads
        if fits and (held <= 96 or queries == keys == 1):
            candidates.append(tiling)
    return min(candidates, key=estimate)


class Window:
    """Index arithmetic of one window of the grid: which pixel, region and validity a token has."""

    def __init__(self, geometry: WindowGeometry, window: Expr) -> None:
        self.geometry = geometry
        self.axes = unflatten(window, geometry.grid)

    def _positions(self, token: Expr) -> list[Expr]:
        """Position of a token on the shifted, padded map, per axis."""
        size = self.geometry.window_size
        return [w * s + t for w, s, t in zip(self.axes, size, unflatten(token, size), strict=True)]

    def pixel(self, token: Expr) -> tuple[list[Expr], Expr | bool]:
        """Pixel coordinates a token reads and whether they lie on the map; the closed form of WindowGeometry.pixels."""
        geometry = self.geometry
        pixel, inside = [], []
        for axis, position in enumerate(self._positions(token)):
            extent, shift, padded = (
                s[axis] for s in (geometry.feature_size, geometry.shift_size, geometry.padded_size)
            )
            around = padded if geometry.shift_padded else extent
            if shift:
                position_shifted = position + shift
                moved = tirx.Select(position_shifted < around, position_shifted, position_shifted - around)
            else:
                moved = position
            pixel.append(moved)
            if padded != extent:
                inside.append(moved < extent if geometry.shift_padded else position < extent)
        return pixel, every(inside)

    def region(self, token: Expr) -> Expr:
        """int32 label of the token's region, as WindowGeometry.regions numbers them."""
        geometry = self.geometry
        label: Expr = tirx.const(0, "int32")
        for axis, position in enumerate(self._positions(token)):
            shift, padded = geometry.shift_size[axis], geometry.padded_size[axis]
            if shift:
                label = label * 2 + tirx.Select(position < padded - shift, 0, 1)
        return label


class _WindowKernel:
    """Emits the statements of one kernel; open only inside its frame."""

    def __init__(self, spec: FlashWindowAttention, frame: Frame, tiling: WindowTiling, head_dim: int, value_dim: int):
        self.spec, self.frame, self.tiling = spec, frame, tiling
        self.head_dim, self.value_dim = head_dim, value_dim
        self.tokens = spec.geometry.tokens_per_window
        self.query_tiles = ceil_div(self.tokens, tiling.tile_queries)
        self.key_tiles = ceil_div(self.tokens, tiling.tile_keys)
        window_index, query_tile = frame.block, tirx.const(0, "int32")
        if self.query_tiles > 1:
            window_index, query_tile = frame.block // self.query_tiles, frame.block % self.query_tiles
        self.window_index = window_index
        self.window = Window(spec.geometry, window_index)
        self.first_query = query_tile * tiling.tile_queries

        operand_type = frame.output.dtype
        value_chunks = ceil_div(value_dim, tiling.chunk)
        self.staged_query = SharedTile(tiling.tile_queries, tiling.staged_width, operand_type)
        self.staged = SharedTile(tiling.tile_keys, tiling.staged_width, operand_type)
        self.weights = SharedTile(tiling.tile_queries, tiling.tile_keys)
        self.logits = registers(tiling.queries * tiling.keys)
        self.result = registers(tiling.queries * tiling.channels * value_chunks)
        self.maximum, self.total, self.rescale = (registers(tiling.queries) for _ in range(3))
        self.left = registers(tiling.queries)
        self.right = registers(max(tiling.keys, tiling.channels))

    def emit(self) -> None:
        fill(self.maximum, self.tiling.queries, LOWEST)
        fill(self.total, self.tiling.queries, 0.0)
        fill(self.result, self.result.shape[0].value, 0.0)
        resident_query = self.head_dim <= self.tiling.chunk  # one chunk: staged once for all tiles of keys
        if resident_query:
            self.stage(self.staged_query, "query", self.first_query, self.tiling.tile_queries, self.head_dim, 0)
        with T.serial(self.key_tiles) as key_tile:
            first_key = key_tile * self.tiling.tile_keys
            self.multiply_query_key(first_key, resident_query)
            self.add_bias_and_mask(first_key)
            self.update_softmax(first_key)
            self.multiply_weights_value(first_key)
        self.write_output()

    def stage(self, tile: SharedTile, operand: str, first: Expr, rows: int, head_dim: int, chunk_start: Expr) -> None:
        """tile[r, c] = operand of token `first + r`, channel `chunk_start + c` of this head.

        Tokens outside the map read key_padding or value_padding; what lies outside window and head is zero.
        """
        frame, width = self.frame, self.tiling.staged_width
        buffer, padding = frame.operands[operand], frame.operands.get(f"{operand}_padding")
        zero = tirx.const(0.0, tile.dtype)
        with spread(frame, rows * width) as index:
            row, column = index // width, index % width
            token = T.bind(first + row)
            channel = chunk_start + column
            pixel, on_map = self.window.pixel(token)
            position = frame.head * head_dim + channel
            outside = zero if padding is None else load(padding, [position])
            value = choose(on_map, load(buffer, [frame.batch, *pixel, position]), outside)
            in_window = True if self.tokens % rows == 0 else token < self.tokens
            in_head = True if head_dim % width == 0 else channel < head_dim
            tile.store(row, column, choose(every([in_window, in_head]), value, zero))

    def multiply_query_key(self, first_key: Expr, resident_query: bool) -> None:
        """logits[i, j] = sum over channels of query i and key j; ends with the logits in registers, no barrier."""
        tiling = self.tiling
        fill(self.logits, tiling.queries * tiling.keys, 0.0)
        chunks = ceil_div(self.head_dim, tiling.chunk)
        with T.serial(chunks) as chunk:
            start = chunk * tiling.chunk
            if not resident_query:
                self.stage(self.staged_query, "query", self.first_query, tiling.tile_queries, self.head_dim, start)
            self.stage(self.staged, "key", first_key, tiling.tile_keys, self.head_dim, start)
            barrier()
            with T.serial(min(tiling.chunk, self.head_dim)) as channel:
                self.load_left(self.staged_query, channel)
                for j in range(tiling.keys):
                    key_row = self.frame.thread_x + tiling.columns * j
                    store(self.right, [j], self.staged.load(key_row, channel).astype(ACCUMULATOR))
                self.multiply_add(self.logits, 0, tiling.keys)
            barrier()

    def load_left(self, tile: SharedTile, column: Expr) -> None:
        for i in range(self.tiling.queries):
            row = self.frame.thread_y * self.tiling.queries + i
            store(self.left, [i], tile.load(row, column).astype(ACCUMULATOR))

    def multiply_add(self, accumulator: tirx.Buffer, offset: int, count: int) -> None:
        """accumulator[offset + i*count + j] += left[i] * right[j]."""
        for i, j in itertools.product(range(self.tiling.queries), range(count)):
            at = offset + i * count + j
            store(accumulator, [at], accumulator[at] + self.left[i] * self.right[j])

    def query_token(self, i: int) -> Expr:
        return self.first_query + self.frame.thread_y * self.tiling.queries + i

    def key_token(self, first_key: Expr, j: int) -> Expr:
        return first_key + self.frame.thread_x + self.tiling.columns * j

    def in_window(self, token: Expr, tile: int) -> Expr | bool:
        return True if self.tokens % tile == 0 else token < self.tokens

    def add_bias_and_mask(self, first_key: Expr) -> None:
        """Scales the logits and adds bias, mask and region penalty; keys past the window become LOWEST."""
        spec, tiling, operands = self.spec, self.tiling, self.frame.operands
        zero = tirx.const(0.0, ACCUMULATOR)
        penalised = spec.mask_value is not None and any(spec.geometry.shift_size)
        if penalised:
            # In registers rather than in bound variables: the latter keep TVM's region analysis busy for seconds.
            query_regions, key_region = registers(tiling.queries, "int32"), registers(1, "int32")
            for i in range(tiling.queries):
                store(query_regions, [i], self.window.region(self.query_token(i)))
        for j in range(tiling.keys):
            key = self.key_token(first_key, j)
            if penalised:
                store(key_region, [0], self.window.region(key))
            key_inside = self.in_window(key, tiling.tile_keys)
            for i in range(tiling.queries):
                query, at = self.query_token(i), i * tiling.keys + j
                both_inside = every([self.in_window(query, tiling.tile_queries), key_inside])
                value = self.logits[at] * tirx.const(spec.scale, ACCUMULATOR)
                if (bias := operands.get("bias")) is not None:
                    index = [self.shared_or_own(bias), self.frame.head, query, key]
                    value = value + choose(both_inside, load(bias, index).astype(ACCUMULATOR), zero)
                if (mask := operands.get("mask")) is not None:
                    index = [self.shared_or_own(mask), query, key]
                    value = value + choose(both_inside, load(mask, index).astype(ACCUMULATOR), zero)
                if penalised:
                    penalty = tirx.const(spec.mask_value, ACCUMULATOR)
                    value = value + tirx.Select(query_regions[i] != key_region[0], penalty, zero)
                store(self.logits, [at], choose(key_inside, value, tirx.const(LOWEST, ACCUMULATOR)))

    def shared_or_own(self, per_window: tirx.Buffer) -> Expr:
        """First index of an operand that has one entry for all windows, or one for each."""
        return tirx.const(0, "int32") if per_window.shape[0].value == 1 else self.window_index

    def update_softmax(self, first_key: Expr) -> None:
        """Turns logits into weights relative to the running maximum, and rescales what was summed before."""
        tiling = self.tiling
        rows = [self.frame.thread_y * tiling.queries + i for i in range(tiling.queries)]
        keys = range(tiling.keys)
        self.exchange(
            rows, [_fold(tirx.max, [self.logits[i * tiling.keys + j] for j in keys]) for i in range(len(rows))]
        )
        for i, row in enumerate(rows):
            store(self.rescale, [i], self.maximum[i])
            with T.serial(tiling.columns) as column:
                store(self.maximum, [i], tirx.max(self.maximum[i], self.weights.load(row, column)))
            store(self.rescale, [i], tirx.exp(self.rescale[i] - self.maximum[i]))
            store(self.total, [i], self.total[i] * self.rescale[i])
        for at in range(self.result.shape[0].value):
            query = at // tiling.channels % tiling.queries
            store(self.result, [at], self.result[at] * self.rescale[query])
        barrier()  # all have read the maxima; the same memory now takes the weights
        for i, j in itertools.product(range(tiling.queries), keys):
            weight = tirx.exp(self.logits[i * tiling.keys + j] - self.maximum[i])
            inside = self.in_window(self.key_token(first_key, j), tiling.tile_keys)
            weight = weight if inside is True else tirx.Select(inside, weight, tirx.const(0.0, ACCUMULATOR))
            store(self.logits, [i * tiling.keys + j], weight)
            store(self.total, [i], self.total[i] + self.logits[i * tiling.keys + j])
            column = self.frame.thread_x + tiling.columns * j
            self.weights.store(rows[i], column, self.logits[i * tiling.keys + j])

    def exchange(self, rows: list[Expr], values: list[Expr]) -> None:
        """Publishes one value per query and thread column in `weights`, and waits for the others."""
        for row, value in zip(rows, values, strict=True):
            self.weights.store(row, self.frame.thread_x, value)
        barrier()

    def multiply_weights_value(self, first_key: Expr) -> None:
        """result += weights x value, a chunk of channels at a time; ends with a barrier."""
        tiling = self.tiling
        for chunk in range(ceil_div(self.value_dim, tiling.chunk)):
            start = chunk * tiling.chunk
            self.stage(self.staged, "value", first_key, tiling.tile_keys, self.value_dim, start)
            barrier()
            with T.serial(min(tiling.tile_keys, self.tokens)) as key:
                self.load_left(self.weights, key)
                for j in range(tiling.channels):
                    column = self.frame.thread_x + tiling.columns * j
                    store(self.right, [j], self.staged.load(key, column).astype(ACCUMULATOR))
                self.multiply_add(self.result, chunk * tiling.queries * tiling.channels, tiling.channels)
            barrier()

    def write_output(self) -> None:
        """output = result / total, where the total is the sum over the thread columns' shares."""
        frame, tiling = self.frame, self.tiling
        rows = [frame.thread_y * tiling.queries + i for i in range(tiling.queries)]
        self.exchange(rows, [self.total[i] for i in range(tiling.queries)])
        for i, row in enumerate(rows):
            store(self.total, [i], tirx.const(0.0, ACCUMULATOR))
            with T.serial(tiling.columns) as column:
                store(self.total, [i], self.total[i] + self.weights.load(row, column))
            query = T.bind(self.query_token(i))
            pixel, on_map = self.window.pixel(query)
            with when(every([self.in_window(query, tiling.tile_queries), on_map])):
                for chunk, j in itertools.product(
                    range(ceil_div(self.value_dim, tiling.chunk)), range(tiling.channels)
                ):
                    column = frame.thread_x + tiling.columns * j
                    channel = chunk * tiling.chunk + column
                    in_chunk = True if tiling.chunk % tiling.columns == 0 else column < tiling.chunk
                    in_head = True if self.value_dim % tiling.chunk == 0 else channel < self.value_dim
                    at = (chunk * tiling.queries + i) * tiling.channels + j
                    with when(every([in_chunk, in_head])):
                        value = (self.result[at] / self.total[i]).astype(frame.output.dtype)
                        store(frame.output, [frame.batch, *pixel, frame.head * self.value_dim + channel], value)


def _fold(function: Any, values: Sequence[Expr]) -> Expr:
    result = values[0]
    for value in values[1:]:
        result = function(result, value)
    return result


def flash_window_attention(
    spec: FlashWindowAttention,
    present: Sequence[str],
    shapes: Sequence[Sequence[Any]],
    dtype: str,
    target: Target,
    name: str,
) -> tirx.PrimFunc:
    """The kernel as a scheduled PrimFunc; parameters are the present operands in the op's order, then the output.

    present: names of the operands given. shapes: theirs, the batch an int or a symbolic variable (one variable of the
    kernel's own then stands for it, matched from the query). dtype: float32 or float16, of all operands and the output;
    logits, softmax and sums are float32 whatever spec.softmax_dtype says, which is never less exact.
    """
    geometry = spec.geometry
    by_name = dict(zip(present, shapes, strict=True))
    head_dim, value_dim = (int(by_name[operand][-1]) // spec.num_heads for operand in ("query", "value"))
    tokens = geometry.tokens_per_window
    tiling = choose_tiling(tokens, head_dim, value_dim, DataType(dtype).itemsize, Limits.of(target))
    grid = (math.prod(geometry.grid) * ceil_div(tokens, tiling.tile_queries), spec.num_heads)
    output_shape = [*geometry.feature_size, spec.num_heads * value_dim]
    builder = KernelBuilder()
    with builder.kernel(name, present, shapes, output_shape, dtype, grid, (tiling.columns, tiling.rows)) as frame:
        _WindowKernel(spec, frame, tiling, head_dim, value_dim).emit()
    return builder.prim_func()
