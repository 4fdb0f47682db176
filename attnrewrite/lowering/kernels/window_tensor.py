"""FlashWindowAttention on CUDA's tensor cores: float16 and bfloat16 with sums, logits and softmax in float32.

A threadgroup computes some heads of one window, or of a tile of its queries; each warp 16 queries of one head. Logits
are the accumulators of query x key; bias, mask and region penalty are added there, and the softmax is taken there, by
shuffles within the four lanes that share a row. Packed in pairs the weights are, as they lie, the left operand of
weights x value: they never leave their registers.

Query, key and value lie in shared memory once. As soon as the products with the keys are formed, their memory, and that
of the queries, receives those of the next window, or the next tile of keys; as soon as those with the values are, the
values follow. So one window is fetched while another is computed, without memory for two.

    wait for query and key; logits; fetch the next query and key; softmax; wait for value; result; fetch the next value

Rows of staged tokens are an odd number of 16-byte words apart: eight rows of any column lie in different banks.
What sticks out of window and head is filled with zeros once; such keys have no weight.

Letters: N query and M key tokens per window, nW windows, nH heads, d and dv head_dim of query/key and of value; in a
fragment, lane 4 g + t has columns 2 t and 2 t + 1 of rows g and g + 8 (tensor_core.py).
Source: Dao et al., "FlashAttention", https://arxiv.org/abs/2205.14135, algorithm 1.
"""

from __future__ import annotations

import itertools

from tvm import tirx
from tvm.target import Target
from tvm.tirx.script.builder import ir as T

from attnrewrite.functions.spec import FlashWindowAttention
from attnrewrite.lowering.kernels.gpu_builder import (
    ACCUMULATOR,
    Expr,
    Flat,
    Frame,
    KernelBuilder,
    Limits,
    Operands,
    SharedTile,
    barrier,
    ceil_div,
    choose,
    every,
    fill,
    load,
    registers,
    store,
    when,
)
from attnrewrite.lowering.kernels.tensor_core import COLUMNS, STEP, TensorCore, as_bits, at
from attnrewrite.lowering.kernels.tensor_softmax import HALVES, START, RowSoftmax
from attnrewrite.lowering.kernels.window_gpu import ADDED, int_or_none, is_shared
from attnrewrite.lowering.kernels.window_gpu_pixels import Window
from attnrewrite.lowering.kernels.window_gpu_relative import RelativeProducts, RelativeTable
from attnrewrite.lowering.kernels.window_tensor_plan import TensorTiling, choose_run, tiling_of
from attnrewrite.lowering.kernels.window_tensor_staging import Staging, flat_pixel


class _TensorKernel:
    """Emits the statements of one kernel; open only inside its frame."""

    def __init__(
        self, spec: FlashWindowAttention, frame: Frame, tiling: TensorTiling, run: Expr | int, cores: TensorCore
    ) -> None:
        self.spec, self.frame, self.tiling, self.cores = spec, frame, tiling, cores
        self.run: Expr = run if isinstance(run, int) else T.bind(run)
        self.goes_on = not isinstance(run, int) or run > 1
        groups = spec.num_heads // tiling.heads
        block = frame.z
        self.query_tile = tirx.const(0, "int32") if tiling.query_tiles == 1 else T.bind(block % tiling.query_tiles)
        block = block if tiling.query_tiles == 1 else block // tiling.query_tiles
        self.first_head = tirx.const(0, "int32") if groups == 1 else T.bind(block % groups * tiling.heads)
        self.first_unit = T.bind(block * self.run if groups == 1 else block // groups * self.run)
        self.first_query = self.query_tile * tiling.tile_queries
        several = tiling.heads > 1
        self.own_head = frame.thread_y // tiling.warps if several else tirx.const(0, "int32")
        self.own_row = (frame.thread_y % tiling.warps if several else frame.thread_y) * STEP
        self.head = self.first_head + self.own_head

        self.staging = Staging(spec, frame, tiling, cores, self.first_head)
        added = [name for name in ADDED if name in frame.operands]
        one_for_all = [name for name in added if is_shared(name, frame.operands[name].shape, {"image", "window"})]
        self.shared_terms = one_for_all if self.goes_on else []
        self.own_terms = [name for name in added if name not in self.shared_terms]
        count = tiling.tile_keys // COLUMNS * 4
        self.logits = cores.sums(count)
        self.softmax = RowSoftmax(frame, cores, self.logits, count)
        self.result = cores.sums(tiling.value_pitch // COLUMNS * 4)
        self.left, self.right = cores.words(4), cores.words(4)
        self.held = {
            name: registers(count // 2, "uint32") if self.is_narrow(name) else registers(count) for name in added
        }
        self.products = self.relative_products()

    def relative_products(self) -> RelativeProducts | None:
        """Of a tile of queries with the tables of relative positions."""
        operand, tiling = self.frame.operands.get("relative_position"), self.tiling
        if operand is None:
            return None
        table = RelativeTable(operand, self.head, tiling.head_pitch)
        sizes, tile = tiling.sizes, SharedTile(tiling.product_tile)
        return RelativeProducts(self.frame, table, sizes.relative, sizes.queries, tile)

    def is_narrow(self, name: str) -> bool:
        """Whether two elements of an operand fit into a register."""
        return str(self.frame.operands[name].dtype) == self.cores.dtype

    def emit(self) -> None:
        tiling = self.tiling
        if tiling.is_padded:
            self.staging.clear()
        steps: Expr = tiling.key_tiles
        if tiling.key_tiles == 1 and self.goes_on:
            steps = T.bind(tirx.min(self.run, self.frame.batch * self.spec.geometry.num_windows - self.first_unit))
        start = tirx.const(0, "int32")
        for fetch in (self.fetch_logits_operands, self.fetch_value):
            fetch(start)
            self.cores.commit()
        for name in self.shared_terms:
            self.hold(name, self.first_unit, start)
        if tiling.key_tiles > 1:
            self.start_rows()
        with T.serial(steps) as step:
            self.attend(step, steps)
        if tiling.key_tiles > 1:
            self.write_output(self.window_of(start), self.first_unit)

    def attend(self, step: Expr, steps: Expr) -> None:
        """One window, or one tile of its keys."""
        tiling, cores = self.tiling, self.cores
        several = tiling.key_tiles > 1 or self.goes_on
        if tiling.key_tiles == 1:
            self.start_rows()
        window, first_key = self.window_of(step), self.first_key(step)
        for name in self.own_terms:
            self.hold(name, self.unit(step), first_key)
        cores.wait(1)
        barrier()
        if self.products is not None:
            with when(True if tiling.key_tiles == 1 else step == 0):
                self.products.multiply(self.staging.queries(), self.first_query, self.spec.relative_scale)
        self.multiply_query_key()
        barrier()
        if several:
            with when(step + 1 < steps):
                self.fetch_logits_operands(step + 1, after_first=True)
        cores.commit()
        self.add_to_logits(window, first_key)
        self.update_softmax(first_key)
        cores.wait(1)
        barrier()
        self.multiply_weights_value()
        if several:
            barrier()
            with when(step + 1 < steps):
                self.fetch_value(step + 1)
        cores.commit()
        if tiling.key_tiles == 1:
            self.write_output(window, self.unit(step))

    # Where a step of the loop is.

    def unit(self, step: Expr) -> Expr:
        """The number of a window among those of all images."""
        return self.first_unit + step if self.tiling.key_tiles == 1 else self.first_unit

    def first_key(self, step: Expr) -> Expr:
        return tirx.const(0, "int32") if self.tiling.key_tiles == 1 else step * self.tiling.tile_keys

    def window_index(self, unit: Expr) -> Expr:
        return unit % self.spec.geometry.num_windows

    def window_of(self, step: Expr) -> Window:
        return Window(self.spec, self.window_index(self.unit(step)), self.head)

    def image(self, unit: Expr) -> Expr:
        return unit // self.spec.geometry.num_windows

    # Staging.

    def fetch_logits_operands(self, step: Expr, *, after_first: bool = False) -> None:
        """Begins to copy query and key of a step; queries that stay are there after the first."""
        staging, window, first_key = self.staging, self.window_of(step), self.first_key(step)
        image = self.image(self.unit(step))
        staging.locate(staging.key, window.key_pixel, image, first_key)
        if not (after_first and self.tiling.key_tiles > 1):
            if not staging.query_is_key:
                staging.locate(staging.query, window.query_source, image, self.first_query)
            staging.fetch(staging.query, self.first_query)
        staging.fetch(staging.key, first_key)

    def fetch_value(self, step: Expr) -> None:
        """Begins to copy the value of a step whose key was begun before."""
        staging, first_key = self.staging, self.first_key(step)
        if not staging.value_is_key:
            staging.locate(staging.value, self.window_of(step).key_pixel, self.image(self.unit(step)), first_key)
        staging.fetch(staging.value, first_key)

    # The four steps.

    def start_rows(self) -> None:
        self.softmax.start()
        fill(self.result, self.result.shape[0].value, 0.0)

    def multiply_query_key(self) -> None:
        """logits = query x key of the warp's 16 queries."""
        tiling, cores, staging, lane = self.tiling, self.cores, self.staging, self.frame.thread_x
        fill(self.logits, tiling.tile_keys // COLUMNS * 4, 0.0)
        first_column = self.own_head * tiling.head_pitch
        for channel in range(0, tiling.head_pitch, STEP):
            column = first_column + channel
            query = staging.pointer(staging.query, self.own_row + lane % 16, column + lane // 16 * 8)
            cores.load_matrices(at(self.left, 0), query, 4)
            for keys in range(0, tiling.tile_keys, STEP):
                row = keys + lane // 16 * 8 + lane % 8
                key = staging.pointer(staging.key, row, column + lane // 8 % 2 * 8)
                cores.load_matrices(at(self.right, 0), key, 4)
                self.multiply_two(self.logits, keys // COLUMNS, 2)

    def multiply_two(self, sums: tirx.Buffer, tile: int, count: int) -> None:
        """One or two neighbouring tiles of sums += left x right."""
        for i in range(count):
            self.cores.mma(at(sums, (tile + i) * 4), at(self.left, 0), at(self.right, 2 * i))

    def query_token(self, half: int) -> Expr:
        return self.first_query + self.own_row + self.frame.thread_x // 4 + half * 8

    def key_token(self, first_key: Expr, tile: int, column: int) -> Expr:
        return first_key + self.frame.thread_x % 4 * 2 + (tile * COLUMNS + column)

    def is_query(self, token: Expr) -> Expr | bool:
        return True if self.tiling.sizes.queries % self.tiling.tile_queries == 0 else token < self.tiling.sizes.queries

    def is_key(self, token: Expr, tile: int) -> Expr | bool:
        keys = self.tiling.sizes.keys
        first_tile_only = self.tiling.key_tiles == 1 and (tile + 1) * COLUMNS <= keys
        return True if first_tile_only or keys % self.tiling.tile_keys == 0 else token < keys

    def positions(self) -> list[tuple[int, int, int, int]]:
        """Number, tile, half and column of each logit that a lane holds."""
        tiles = range(self.tiling.tile_keys // COLUMNS)
        return [(n * 4 + h * 2 + c, n, h, c) for n, h, c in itertools.product(tiles, HALVES, (0, 1))]

    def hold(self, name: str, unit: Expr, first_key: Expr) -> None:
        """Reads a term of the logits into registers as it is, two elements to one where they are narrow; 0 outside."""
        cores, buffer = self.cores, self.frame.operands[name]
        in_pairs = self.is_narrow(name) and self.tiling.sizes.keys % 2 == 0 and int_or_none(buffer.shape[-1]) != 1
        flat = as_bits(buffer, 2) if in_pairs else Flat(buffer, 1)
        indices = {"image": self.image(unit), "window": self.window_index(unit), "head": self.head}

        def element(half: int, tile: int, column: int) -> Expr:
            """One element as float32, or two as a word."""
            query, key = self.query_token(half), self.key_token(first_key, tile, column)
            position: Expr = tirx.const(0, "int32")
            for axis, extent in zip(ADDED[name], buffer.shape, strict=True):
                if int_or_none(extent) != 1:
                    own = {**indices, "query": query, "key": key}[axis]
                    position = own if axis == "image" else position * int(extent) + own
            inside = every([self.is_query(query), self.is_key(key, tile)])
            if in_pairs:
                return choose(inside, load(flat, [position // 2]), tirx.const(0, "uint32"))
            return choose(inside, flat.load(position).astype(ACCUMULATOR), tirx.const(0.0, ACCUMULATOR))

        for number, tile, half, column in self.positions():
            if not self.is_narrow(name):
                store(self.held[name], [number], element(half, tile, column))
            elif column == 0:
                word = element(half, tile, 0)
                store(self.held[name], [number // 2], word if in_pairs else cores.pack(word, element(half, tile, 1)))

    def held_term(self, name: str, number: int) -> Expr:
        if not self.is_narrow(name):
            return self.held[name][number]
        word = load(self.held[name], [number // 2])
        return self.cores.high(word) if number % 2 else self.cores.low(word)

    def add_to_logits(self, window: Window, first_key: Expr) -> None:
        """Scales the logits and adds bias, mask and region penalty; those of keys past the window become the least."""
        spec = self.spec
        for number, tile, _, column in self.positions():
            value = self.logits[number] * tirx.const(spec.scale, ACCUMULATOR)
            for name in self.held:
                value = value + self.held_term(name, number)
            inside = self.is_key(self.key_token(first_key, tile, column), tile)
            store(self.logits, [number], choose(inside, value, tirx.const(START, ACCUMULATOR)))
        if self.products is not None:
            self.add_relative(self.products, first_key)
        if spec.mask_value is not None and any(any(g.shift_size) for _, g in spec.runs_of_heads()):
            with when(window.crosses_regions()):
                self.penalise(window, first_key, spec.mask_value)

    def add_relative(self, products: RelativeProducts, first_key: Expr) -> None:
        """Adds what queries have for the coordinates of the keys."""
        for tile, column in itertools.product(range(self.tiling.tile_keys // COLUMNS), (0, 1)):
            products.choose_key(self.key_token(first_key, tile, column))
            for half in HALVES:
                number, row = tile * 4 + half * 2 + column, self.own_row + self.frame.thread_x // 4 + half * 8
                is_query = self.is_query(self.query_token(half))
                relative = choose(is_query, products.of(row), tirx.const(0.0, ACCUMULATOR))
                store(self.logits, [number], self.logits[number] + relative)

    def penalise(self, window: Window, first_key: Expr, mask_value: float) -> None:
        """Adds mask_value to the logits of queries and keys in different regions."""
        own, other = registers(2, "int32"), registers(1, "int32")
        for half in HALVES:
            store(own, [half], window.region(self.query_token(half)))
        for tile, column in itertools.product(range(self.tiling.tile_keys // COLUMNS), (0, 1)):
            store(other, [0], window.region(self.key_token(first_key, tile, column)))
            for half in HALVES:
                number = tile * 4 + half * 2 + column
                value = self.logits[number] + tirx.const(mask_value, ACCUMULATOR)
                store(self.logits, [number], tirx.Select(own[half] != other[0], value, self.logits[number]))

    def update_softmax(self, first_key: Expr) -> None:
        """Turns logits into weights relative to the running maximum, and rescales what was summed before."""
        several = self.tiling.key_tiles > 1
        self.softmax.meet(rescale=several)
        if several:
            for number in range(self.result.shape[0].value):
                store(self.result, [number], self.result[number] * self.softmax.factor[number // 2 % 2])
        inside = [self.is_key(self.key_token(first_key, tile, c), tile) for _, tile, _, c in self.positions()]
        self.softmax.weigh(lambda number: inside[number])

    def multiply_weights_value(self) -> None:
        """result += weights x value; two neighbouring tiles of logits, packed, are one of the left operand."""
        tiling, cores, staging, lane = self.tiling, self.cores, self.staging, self.frame.thread_x
        tiles = tiling.value_pitch // COLUMNS
        for keys in range(0, tiling.tile_keys, STEP):
            for word in range(4):
                number = keys // COLUMNS * 4 + word * 2
                store(self.left, [word], cores.pack(self.logits[number], self.logits[number + 1]))
            for tile in range(0, tiles, 2):
                count = min(2, tiles - tile)
                column = self.own_head * tiling.value_pitch + tile * COLUMNS + lane // 16 * COLUMNS * (count - 1)
                value = staging.pointer(staging.value, keys + lane % 16, column)
                cores.load_matrices(at(self.right, 0), value, 2 * count, transposed=True)
                self.multiply_two(self.result, tile, count)

    # The output.

    def write_output(self, window: Window, unit: Expr) -> None:
        """output = result / total, where the total is the sum over the lanes' shares."""
        extents, image = self.frame.output.shape[1:-1], self.image(unit)
        rows = registers(2, "int32")
        self.softmax.finish()
        for half in HALVES:
            token = self.query_token(half)
            coordinates, on_map = window.query_pixel(token)
            inside = every([self.is_query(token), on_map])
            store(rows, [half], flat_pixel(image, (coordinates, inside), extents))
        if self.tiling.sizes.value_dim % COLUMNS == 0:
            self.write_rows(rows)
        else:
            self.write_pairs(rows)

    def weighted(self, tile: int, half: int) -> Expr:
        """A word of the output: two channels of one query."""
        first = tile * 4 + half * 2
        return self.cores.pack(*(self.result[first + c] * self.softmax.total[half] for c in (0, 1)))

    def write_rows(self, rows: tirx.Buffer) -> None:
        """Eight channels of one query per store: what a tile's row has in four lanes is brought into one of them."""
        tiles, lane, words = self.tiling.value_pitch // COLUMNS, self.frame.thread_x % 4, self.cores.words(4)
        pieces = [(half, tile) for half in HALVES for tile in range(tiles)]
        for start in range(0, len(pieces), 4):
            group = pieces[start : start + 4]
            for i, (half, tile) in enumerate(group):
                store(words, [i], self.weighted(tile, half))
            for i in range(len(group), 4):
                store(words, [i], tirx.const(0, "uint32"))
            self.cores.transpose_quad(at(words, 0))
            last_first_half = sum(half == 0 for half, _ in group)
            row = rows[0] if last_first_half == len(group) else rows[1]
            if 0 < last_first_half < len(group):
                row = tirx.Select(lane < last_first_half, rows[0], rows[1])
            tile = lane + start if start + 4 <= tiles else (lane + start) % tiles
            with when(every([row >= 0, True if len(group) == 4 else lane < len(group)])):
                self.store_words(row, tile * COLUMNS, words, 4)

    def write_pairs(self, rows: tirx.Buffer) -> None:
        """Two channels per store, where heads begin at any even channel."""
        word, channels = registers(1, "uint32"), self.tiling.sizes.value_dim
        for half, tile in itertools.product(HALVES, range(self.tiling.value_pitch // COLUMNS)):
            channel = tile * COLUMNS + self.frame.thread_x % 4 * 2
            store(word, [0], self.weighted(tile, half))
            with when(every([rows[half] >= 0, True if (tile + 1) * COLUMNS <= channels else channel < channels])):
                self.store_words(rows[half], channel, word, 1)

    def store_words(self, pixel: Expr, channel: Expr, words: tirx.Buffer, count: int) -> None:
        output, value_dim = self.frame.output, self.tiling.sizes.value_dim
        view = as_bits(output, 2)
        word = (pixel * int(output.shape[-1]) + self.head * value_dim + channel) // 2
        if count == 1:
            T.buffer_store(view, words[0], [word])
        else:
            T.buffer_store(view, load(words, [tirx.Ramp(0, 1, count)]), [tirx.Ramp(word, 1, count)])


def flash_window_attention(spec: FlashWindowAttention, operands: Operands, target: Target, name: str) -> tirx.PrimFunc:
    """The kernel as a scheduled PrimFunc, as `window_gpu.flash_window_attention` gives it, for operands it `takes`.

    They are of float16 or bfloat16; `dtypes` may say otherwise of bias and mask. Steps are even numbers. For a metal
    target the kernel calls functions that only the emulator has.
    """
    limits, windows, heads = Limits.of(target), spec.geometry.num_windows, spec.num_heads
    tiling = tiling_of(spec, operands.shapes, operands.dtype, target)
    assert tiling is not None

    def run(batch: Expr | int) -> Expr | int:
        return choose_run(tiling, windows, heads, batch, limits)

    def grid(batch: Expr) -> tuple[int, int, Expr]:
        return 1, 1, ceil_div(batch * windows, run(batch)) * (heads // tiling.heads) * tiling.query_tiles

    output_shape = [*spec.geometry.feature_size, heads * tiling.sizes.value_dim]
    builder = KernelBuilder()
    with builder.kernel(name, operands, [output_shape], grid, tiling.threads) as frame:
        _TensorKernel(spec, frame, tiling, run(frame.batch), TensorCore(target, operands.dtype)).emit()
    return builder.prim_func()
