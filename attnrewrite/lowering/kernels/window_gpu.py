"""FlashWindowAttention for CUDA and Metal: one threadgroup per tile of queries, head, and run of windows.

Keys stream through shared memory in tiles, the softmax is kept up as they come (running maximum and sum, float32), so
a window of any size fits and nothing of size N x M leaves the chip. A window of up to some 64 tokens is one tile: its
query, key and value are read once, and bias and mask stay in registers over a run of windows (window_gpu_plan.py).
Per tile of keys, a threadgroup

1. stages query, key and value, up to 16 bytes per load,
2. forms the logits in registers, `queries x keys` of them per thread, four channels at a time,
3. adds bias, mask and the region penalty, and finds the row maxima by shuffles between the threads of a row,
4. puts the weights where the keys were and multiplies them with the value, `queries x channels` per thread.

The layout of a threadgroup is threads (x, y): x runs over keys, then over the value's channels; y over queries.

Letters: N query and M key tokens per window, nW windows, nH heads, d and dv head_dim of query/key and of value.
Source of the running softmax: Dao et al., "FlashAttention", https://arxiv.org/abs/2205.14135, algorithm 1.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

from tvm import tirx
from tvm.target import Target
from tvm.tirx.script.builder import ir as T

from attnrewrite.functions.spec import FlashWindowAttention
from attnrewrite.lowering.kernels.gpu_builder import (
    ACCUMULATOR,
    LOWEST,
    Expr,
    Flat,
    Frame,
    KernelBuilder,
    Limits,
    Operands,
    SharedMemory,
    SharedTile,
    barrier,
    ceil_div,
    choose,
    combine_lanes,
    every,
    fill,
    lanes_of,
    load,
    registers,
    spread,
    store,
    typed,
    when,
)
from attnrewrite.lowering.kernels.tensor_core import exponential
from attnrewrite.lowering.kernels.window_gpu_pixels import Pixel, Window
from attnrewrite.lowering.kernels.window_gpu_plan import Run, Sizes, WindowTiling, choose_run, choose_tiling
from attnrewrite.lowering.kernels.window_gpu_relative import STEP, RelativeProducts, RelativeTable

# What is added to the logits, and the axes of each; an axis of extent 1 stands for all its indices.
ADDED = {
    "bias": ("window", "head", "query", "key"),
    "mask": ("window", "query", "key"),
    "logit_bias": ("image", "window", "head", "query", "key"),
}


def is_shared(operand: str, shape: Sequence[Any], axes: set[str]) -> bool:
    """Whether an operand of the logits is the same along these axes."""
    return all(int_or_none(e) == 1 for e, axis in zip(shape, ADDED[operand], strict=True) if axis in axes)


class _WindowKernel:
    """Emits the statements of one kernel; open only inside its frame."""

    def __init__(
        self, spec: FlashWindowAttention, frame: Frame, tiling: WindowTiling, run: Run, exp: Callable[[Expr], Expr]
    ) -> None:
        self.spec, self.frame, self.tiling, self.run, self.exp = spec, frame, tiling, run, exp
        self.sizes, self.head = tiling.sizes, frame.y
        self.query_tile = tirx.const(0, "int32") if tiling.query_tiles == 1 else T.bind(frame.x % tiling.query_tiles)
        self.first_query = self.query_tile * tiling.tile_queries

        dtype = str(frame.output.dtype)
        first_query, first_key, first_weight, first_value, end = tiling.first_bytes(dtype)
        memory = SharedMemory(end)
        runs = {self.staged_run(operand) for operand in ("query", "key", "value")}
        staged = sorted({lanes_of(dtype, run) for run in runs} | {1, STEP})
        self.tiles = {
            "query": SharedTile(tiling.query_tile(dtype), memory, first_query, staged),
            "key": SharedTile(tiling.key_tile(dtype), memory, first_key, staged),
            "value": SharedTile(tiling.value_tile(dtype), memory, first_value, sorted({*staged, tiling.lanes})),
        }
        self.weights = SharedTile(tiling.weight_tile, memory, first_weight, (1, STEP))
        self.logits = registers(tiling.queries * tiling.keys)
        self.held = registers(tiling.queries * tiling.keys) if run.shared else None
        self.result = registers(tiling.queries * tiling.channels * tiling.value_chunks)
        self.maximum, self.total, self.rescale = (registers(tiling.queries) for _ in range(3))
        self.left = registers(tiling.queries * STEP)
        self.right = registers(STEP * max(tiling.keys, tiling.channels))

        self.own_queries, self.own_keys = spec.geometry.tokens_per_window, spec.geometry.keys_per_window
        self.table = self.products = self.relative = None
        if "relative_position" in frame.operands:
            self.table = RelativeTable(frame.operands["relative_position"], self.head, tiling.query_tile(dtype).columns)
        if self.table is not None and tiling.keeps_products:
            # In memory of its own: TVM would see its writes as writes to the query tile.
            tile = SharedTile(tiling.product_tile)
            self.products = RelativeProducts(frame, self.table, self.sizes.relative, self.own_queries, tile)
        elif self.table is not None:
            self.relative = registers(tiling.queries * tiling.keys)

    def emit(self) -> None:
        """Goes through the run; the last one of the map, or of the batch, may be shorter."""
        run, windows = self.run, self.spec.geometry.num_windows
        block = self.frame.x if self.tiling.query_tiles == 1 else self.frame.x // self.tiling.query_tiles
        images = run.images if isinstance(run.images, int) else T.bind(run.images)
        first_window, first_image = block * run.windows, self.frame.z * images
        if self.held is not None:
            self.hold_shared(first_window, first_image)
        if not run.shared:
            self.attend(block, self.frame.z)
            return
        own_windows = run.windows if windows % run.windows == 0 else tirx.min(run.windows, windows - first_window)
        with T.serial(own_windows) as window, T.serial(tirx.min(images, self.frame.batch - first_image)) as image:
            self.attend(T.bind(first_window + window), T.bind(first_image + image))
            barrier()  # all are done with the weights and the value

    def attend(self, window_index: Expr, image: Expr) -> None:
        """One tile of queries of one window."""
        tiling = self.tiling
        self.window_index, self.image = window_index, image
        self.window = Window(self.spec, window_index, self.head)
        fill(self.maximum, tiling.queries, LOWEST)
        fill(self.total, tiling.queries, 0.0)
        fill(self.result, self.result.shape[0].value, 0.0)
        if tiling.resident_query:
            self.stage_query(0)
        if self.products is not None:
            barrier()
            self.products.multiply(self.tiles["query"], self.first_query, self.spec.relative_scale)
        if tiling.key_tiles == 1:
            self.attend_tile(tirx.const(0, "int32"))
        else:
            with T.serial(tiling.key_tiles) as key_tile:
                self.attend_tile(key_tile * tiling.tile_keys)
                barrier()
        self.write_output()

    def attend_tile(self, first_key: Expr) -> None:
        """One tile of keys."""
        self.stage("value", self.window.key_pixel, first_key, self.sizes.keys, 0)
        self.multiply_query_key(first_key)
        self.add_to_logits(first_key)
        self.update_softmax(first_key)
        self.multiply_weights_value(first_key)

    # Staging.

    def channels_of(self, operand: str) -> int:
        return self.sizes.value_dim if operand == "value" else self.sizes.head_dim

    def staged_run(self, operand: str) -> int:
        """What the start of every pixel, head and chunk of an operand is a multiple of, in elements."""
        step = int(self.frame.operands[operand].shape[-1])
        return math.gcd(step, self.channels_of(operand), self.tiling.chunk)

    def stage_query(self, chunk_start: Expr | int) -> None:
        self.stage("query", self.window.query_source, self.first_query, self.sizes.queries, chunk_start)

    def stage(
        self, operand: str, pixel_of: Callable[[Expr], Pixel], first: Expr, tokens: int, chunk_start: Expr | int
    ) -> None:
        """tile[r, c] = operand of token `first + r`, channel `chunk_start + c` of this head.

        Tokens outside the map read key_padding or value_padding, those behind the window's own extra_query, extra_key
        or extra_value; what lies outside window and head is zero.
        """
        frame, tile, head_dim = self.frame, self.tiles[operand], self.channels_of(operand)
        lanes = lanes_of(str(frame.output.dtype), self.staged_run(operand))
        buffer, padding = frame.operands[operand], frame.operands.get(f"{operand}_padding")
        extra = frame.operands.get(f"extra_{operand}")
        beside = None if extra is None else Flat(extra, lanes)
        own = self.own_queries if operand == "query" else self.own_keys
        source = Flat(buffer, lanes)
        outside_source = None if padding is None else Flat(padding, lanes)
        extents = [int(e) for e in buffer.shape[1:]]
        rows, width = tile.shape.rows, ceil_div(tile.shape.columns, lanes)
        with spread(frame, rows * width) as index:
            row, column = index // width, index % width * lanes
            token, channel = T.bind(first + row), chunk_start + column
            pixel, on_map = pixel_of(token)
            position = self.head * head_dim + channel
            outside = source.zero if outside_source is None else outside_source.load(position)
            flat = self.image
            for at, extent in zip(pixel, extents, strict=False):
                flat = flat * extent + at
            value = choose(on_map, source.load(flat * extents[-1] + position), outside)
            if extra is not None and beside is not None:
                channels = int(extra.shape[-1])
                first_extra = self.first_extra(extra.shape) * channels + position
                value = choose(token < own, value, beside.load(first_extra + (token - own) * channels))
            in_window = True if tokens % rows == 0 else token < tokens
            whole = head_dim % tile.shape.columns == 0 and tile.shape.columns <= self.tiling.chunk
            in_head = True if whole else channel < head_dim
            tile.store(row, column, choose(every([in_window, in_head]), value, source.zero), lanes)

    def first_extra(self, shape: Sequence[Any]) -> Expr:
        """The first extra token of this window in an operand [B or 1, nW or 1, T, C], counted in tokens."""
        windows, tokens = int(shape[1]), int(shape[2])
        image: Expr = 0 if int_or_none(shape[0]) == 1 else self.image
        return (image if windows == 1 else image * windows + self.window_index) * tokens

    # The four steps.

    def multiply_query_key(self, first_key: Expr) -> None:
        """logits[i, j] = sum over channels of query i and key j; ends in registers, with the tiles free."""
        tiling = self.tiling
        fill(self.logits, tiling.queries * tiling.keys, 0.0)
        if self.relative is not None:
            fill(self.relative, tiling.queries * tiling.keys, 0.0)
        with T.serial(tiling.chunks) as chunk:
            start = chunk * tiling.chunk
            if not tiling.resident_query:
                self.stage_query(start)
            self.stage("key", self.window.key_pixel, first_key, self.sizes.keys, start)
            barrier()
            with T.serial(tiling.query_tile(ACCUMULATOR).columns // STEP) as step:
                self.load_left(self.tiles["query"], step * STEP)
                for j in range(tiling.keys):
                    key_row = self.frame.thread_x + tiling.columns * j
                    self.load_step(self.right, j * STEP, self.tiles["key"], key_row, step * STEP)
                for i, j in itertools.product(range(tiling.queries), range(tiling.keys)):
                    self.multiply_add(
                        self.logits, i * tiling.keys + j, i, [self.right[j * STEP + lane] for lane in range(STEP)]
                    )
                if self.relative is not None:
                    self.multiply_relative(first_key, start + step * STEP)
            barrier()

    def multiply_relative(self, first_key: Expr, channel: Expr) -> None:
        """relative[i, j] += four channels of query i and of the rows that the table has for it and key j."""
        assert self.table is not None and self.relative is not None
        for i, j in itertools.product(range(self.tiling.queries), range(self.tiling.keys)):
            query, key = self.query_token(i), self.key_token(first_key, j)
            for axis in self.sizes.relative:
                self.table.load(self.right, axis.row(query, key), channel, self.is_own(query, key))
                row = [self.right[lane] for lane in range(STEP)]
                self.multiply_add(self.relative, i * self.tiling.keys + j, i, row)

    def load_left(self, tile: SharedTile, column: Expr) -> None:
        """left[i, ...] = four columns of the tile in row i of this thread."""
        for i in range(self.tiling.queries):
            self.load_step(self.left, i * STEP, tile, self.query_row(i), column)

    def load_step(self, target: tirx.Buffer, at: int, tile: SharedTile, row: Expr, column: Expr) -> None:
        value = typed(tile.load(row, column, STEP), ACCUMULATOR, STEP)
        store(target, [tirx.Ramp(at, 1, STEP)], value)

    def multiply_add(self, accumulator: tirx.Buffer, at: int, i: int, right: Sequence[Expr]) -> None:
        """accumulator[at] += left[i, ...] . right."""
        total = accumulator[at]
        for lane, value in enumerate(right):
            total = total + self.left[i * STEP + lane] * value
        store(accumulator, [at], total)

    def query_row(self, i: int) -> Expr:
        return self.frame.thread_y * self.tiling.queries + i

    def query_token(self, i: int) -> Expr:
        return self.first_query + self.query_row(i)

    def key_token(self, first_key: Expr, j: int) -> Expr:
        return first_key + self.frame.thread_x + self.tiling.columns * j

    def is_query(self, token: Expr) -> Expr | bool:
        return True if self.sizes.queries % self.tiling.tile_queries == 0 else token < self.sizes.queries

    def is_key(self, token: Expr) -> Expr | bool:
        return True if self.sizes.keys % self.tiling.tile_keys == 0 else token < self.sizes.keys

    def is_own(self, query: Expr, key: Expr) -> Expr | bool:
        """Whether both are tokens of the window itself."""
        tiling, sizes = self.tiling, self.sizes
        all_queries = self.own_queries == sizes.queries and sizes.queries % tiling.tile_queries == 0
        all_keys = self.own_keys == sizes.keys and sizes.keys % tiling.tile_keys == 0
        return every([all_queries or query < self.own_queries, all_keys or key < self.own_keys])

    def unless_extra(self, query: Expr, key: Expr) -> list[Expr]:
        """What keeps extra tokens out; they are of no region."""
        kept = [query < self.own_queries] if self.own_queries < self.sizes.queries else []
        return [*kept, key < self.own_keys] if self.own_keys < self.sizes.keys else kept

    def added(self, operand: str, image: Expr, window: Expr, query: Expr, key: Expr) -> Expr:
        """An element of bias, mask or logit_bias; 0 outside of the window."""
        buffer = self.frame.operands[operand]
        at = {"image": image, "window": window, "head": self.head, "query": query, "key": key}
        axes = zip(buffer.shape, ADDED[operand], strict=True)
        index = [0 if int_or_none(extent) == 1 else at[axis] for extent, axis in axes]
        inside = every([self.is_query(query), self.is_key(key)])
        return choose(inside, load(buffer, index).astype(ACCUMULATOR), tirx.const(0.0, ACCUMULATOR))

    def hold_shared(self, window: Expr, image: Expr) -> None:
        """What all windows of the run add to their logits, kept in the layout of the logits."""
        for i, j in itertools.product(range(self.tiling.queries), range(self.tiling.keys)):
            query, key = self.query_token(i), self.key_token(tirx.const(0, "int32"), j)
            terms = [self.added(operand, image, window, query, key) for operand in self.run.shared]
            store(self.held, [i * self.tiling.keys + j], functools.reduce(lambda a, b: a + b, terms))

    def add_to_logits(self, first_key: Expr) -> None:
        """Scales the logits and adds all terms of theirs; keys past the window become LOWEST."""
        spec, tiling = self.spec, self.tiling
        zero, lowest = tirx.const(0.0, ACCUMULATOR), tirx.const(LOWEST, ACCUMULATOR)
        apart = [name for name in ADDED if name in self.frame.operands and name not in self.run.shared]
        shifted = any(any(geometry.shift_size) for _, geometry in spec.runs_of_heads())
        penalised = spec.mask_value is not None and shifted
        if penalised:
            # In registers rather than in bound variables: the latter keep TVM's region analysis busy for seconds.
            query_regions, key_region = registers(tiling.queries, "int32"), registers(1, "int32")
            for i in range(tiling.queries):
                store(query_regions, [i], self.window.region(self.query_token(i)))
        for j in range(tiling.keys):
            key = self.key_token(first_key, j)
            if penalised:
                store(key_region, [0], self.window.region(key))
            if self.products is not None:
                self.products.choose_key(key)
            for i in range(tiling.queries):
                at = i * tiling.keys + j
                value = self.logits[at] * tirx.const(spec.scale, ACCUMULATOR)
                if self.held is not None:
                    value = value + self.held[at]
                query = self.query_token(i)
                for operand in apart:
                    value = value + self.added(operand, self.image, self.window_index, query, key)
                if self.products is not None:
                    value = value + choose(self.is_own(query, key), self.products.of(self.query_row(i)), zero)
                if self.relative is not None:
                    value = value + self.relative[at] * tirx.const(spec.relative_scale, ACCUMULATOR)
                if penalised:
                    crosses = every([query_regions[i] != key_region[0], *self.unless_extra(query, key)])
                    value = value + tirx.Select(crosses, tirx.const(spec.mask_value, ACCUMULATOR), zero)
                store(self.logits, [at], choose(self.is_key(key), value, lowest))

    def update_softmax(self, first_key: Expr) -> None:
        """Turns logits into weights relative to the running maximum, and rescales what was summed before."""
        tiling, keys = self.tiling, range(self.tiling.keys)
        for i in range(tiling.queries):
            store(self.rescale, [i], self.maximum[i])
            largest = functools.reduce(tirx.max, [self.logits[i * tiling.keys + j] for j in keys], self.maximum[i])
            combine_lanes(self.frame, largest, tirx.max, self.maximum, i)
        if tiling.key_tiles > 1:
            for i in range(tiling.queries):
                store(self.rescale, [i], self.exp(self.rescale[i] - self.maximum[i]))
                store(self.total, [i], self.total[i] * self.rescale[i])
            for at in range(self.result.shape[0].value):
                query = at // tiling.channels % tiling.queries
                store(self.result, [at], self.result[at] * self.rescale[query])
        for i, j in itertools.product(range(tiling.queries), keys):
            at = i * tiling.keys + j
            weight = self.exp(self.logits[at] - self.maximum[i])
            inside = self.is_key(self.key_token(first_key, j))
            weight = weight if inside is True else tirx.Select(inside, weight, tirx.const(0.0, ACCUMULATOR))
            store(self.logits, [at], weight)
            store(self.total, [i], self.total[i] + self.logits[at])
            self.weights.store(self.query_row(i), self.frame.thread_x + tiling.columns * j, self.logits[at])

    def multiply_weights_value(self, first_key: Expr) -> None:
        """result += weights x value, a chunk of channels at a time; the first of them is staged already."""
        tiling = self.tiling
        for chunk in range(tiling.value_chunks):
            if chunk:
                barrier()
                self.stage("value", self.window.key_pixel, first_key, self.sizes.keys, chunk * tiling.chunk)
            barrier()
            with T.serial(ceil_div(min(tiling.tile_keys, self.sizes.keys), STEP)) as step:
                self.load_left(self.weights, step * STEP)
                for group in range(tiling.channels // tiling.lanes):
                    self.multiply_channels(step * STEP, chunk, group)

    def multiply_channels(self, first_key: Expr, chunk: int, group: int) -> None:
        """Four keys' share in the sums of `lanes` neighbouring channels."""
        tiling, lanes = self.tiling, self.tiling.lanes
        for key in range(STEP):
            value = self.tiles["value"].load(first_key + key, self.channel(group), lanes)
            at = key * lanes if lanes == 1 else tirx.Ramp(key * lanes, 1, lanes)
            store(self.right, [at], typed(value, ACCUMULATOR, lanes))
        for i, lane in itertools.product(range(tiling.queries), range(lanes)):
            at = (chunk * tiling.queries + i) * tiling.channels + group * lanes + lane
            self.multiply_add(self.result, at, i, [self.right[key * lanes + lane] for key in range(STEP)])

    def channel(self, group: int) -> Expr:
        """First channel within the chunk of a group of `lanes`; neighbouring threads have neighbouring ones."""
        return (self.frame.thread_x + self.tiling.columns * group) * self.tiling.lanes

    def write_output(self) -> None:
        """output = result / total, where the total is the sum over the thread columns' shares.

        A query is divided for once: dividing takes some ten instructions, and its result is rounded once more here.
        """
        frame, tiling, head_dim = self.frame, self.tiling, self.sizes.value_dim
        lanes = math.gcd(tiling.lanes, self.staged_run("value"))
        extents = [int(e) for e in frame.output.shape[1:]]
        for i in range(tiling.queries):
            combine_lanes(frame, self.total[i], lambda a, b: a + b, self.total, i)
            store(self.total, [i], tirx.const(1.0, ACCUMULATOR) / self.total[i])
        output = Flat(frame.output, lanes)
        beside = Flat(frame.outputs[1], lanes) if len(frame.outputs) > 1 else None
        for i in range(tiling.queries):
            query = T.bind(self.query_token(i))
            pixel, on_map = self.window.query_pixel(query)
            flat = self.image
            for at, extent in zip(pixel, extents, strict=False):
                flat = flat * extent + at
            own = self.is_query(query) if beside is None else query < self.own_queries
            with when(every([own, on_map])):
                self.write_row(i, output, T.bind(flat * extents[-1] + self.head * head_dim), lanes)
            if beside is not None:
                row = self.first_extra(frame.outputs[1].shape) + query - self.own_queries
                with when(tirx.all(query >= self.own_queries, query < self.sizes.queries)):
                    self.write_row(i, beside, T.bind(row * extents[-1] + self.head * head_dim), lanes)

    def write_row(self, i: int, output: Flat, row: Expr, lanes: int) -> None:
        """The result of the thread's query i, from element `row` on."""
        tiling, head_dim = self.tiling, self.sizes.value_dim
        parts = itertools.product(
            range(tiling.value_chunks), range(tiling.channels // tiling.lanes), range(0, tiling.lanes, lanes)
        )
        for chunk, group, part in parts:
            column = self.channel(group) + part
            channel = chunk * tiling.chunk + column
            width = tiling.channels * tiling.columns
            in_chunk = True if tiling.value_chunks == 1 or width == tiling.chunk else column < tiling.chunk
            in_head = True if head_dim % width == 0 and width <= tiling.chunk else channel < head_dim
            first = (chunk * tiling.queries + i) * tiling.channels + group * tiling.lanes + part
            own = first if lanes == 1 else tirx.Ramp(first, 1, lanes)
            share = self.total[i] if lanes == 1 else tirx.Broadcast(self.total[i], lanes)
            with when(every([in_chunk, in_head])):
                result = typed(load(self.result, [own]) * share, str(self.frame.output.dtype), lanes)
                output.store(row + channel, result)


def int_or_none(extent: Any) -> int | None:
    """A buffer's extent where it is a number."""
    return int(extent) if isinstance(extent, int | tirx.IntImm) else None


def flash_window_attention(spec: FlashWindowAttention, operands: Operands, target: Target, name: str) -> tirx.PrimFunc:
    """The kernel as a scheduled PrimFunc; parameters are the operands, then the outputs.

    operands: of float32 or float16; `dtypes` may say otherwise of terms of the logits. Logits, softmax and sums are
    float32 whatever spec.softmax_dtype says, which is never less exact. Parts of wider maps begin at multiples of the
    widest access, up to a word, of which steps and heads are multiples.
    """
    by_name = operands.shapes
    limits, windows, heads = Limits.of(target), spec.geometry.num_windows, spec.num_heads
    sizes = Sizes.of(spec, by_name, operands.dtype)
    tiling = choose_tiling(sizes, limits)
    added = [operand for operand in ADDED if operand in by_name]
    in_windows, in_images = (
        [operand for operand in added if is_shared(operand, by_name[operand], axes)]
        for axes in ({"image", "window"}, {"image"})
    )

    def run(batch: Expr | int) -> Run:
        return choose_run(tiling, windows, heads, batch, in_windows, in_images, limits)

    def grid(batch: Expr) -> tuple[int, int, Expr]:
        own = run(batch)
        return ceil_div(windows, own.windows) * tiling.query_tiles, heads, ceil_div(batch, own.images)

    output_shapes = [(*spec.geometry.feature_size, heads * sizes.value_dim)]
    if "extra_query" in by_name:
        output_shapes.append((windows, int(by_name["extra_query"][2]), heads * sizes.value_dim))
    builder = KernelBuilder()
    with builder.kernel(name, operands, output_shapes, grid, (tiling.columns, tiling.rows)) as frame:
        _WindowKernel(spec, frame, tiling, run(frame.batch), exponential(target)).emit()
    return builder.prim_func()
