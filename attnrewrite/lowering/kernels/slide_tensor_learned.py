"""SlideAttention with learned shift kernels on CUDA's tensor cores: float16 and bfloat16, sums and softmax in float32.

For one head, with taps t of the neighbourhood, slots j and channels c, both halves of the op are products of matrices:

    logits[q, j] = sum over (t, c) of  (Q[c, q] K[c, q + t])  Wk[c, j, t]
    F[q, (t, c)] = sum over j of  P[q, j]  Wv[c, j, t]
    output[c, q] = sum over t of  F[q, (t, c)] V[c, q + t]

A warp has four rows of eight queries. The left operand of the logits are products of queries with the keys that a tap
moves there, two channels at a time, rounded to the operands' type; a key is read once for all rows of queries that have
it for a neighbour. Logits are accumulators, the softmax is taken there, and the weights, packed in pairs, are the left
operand of F as they lie; its float32 elements are multiplied by the value and added up. A key's bias is one more tap,
at which every key is 1; that of the value is where the output's sums begin.

A threadgroup goes through chunks of channels: key, then value, staged in turn in the same shared memory, with kernels
that stay there if they fit (slide_tensor_learned_staging.py). The query is multiplied by a power of two near the scale,
so that its product with a key leaves float16 only where query x scale x key does.

In a fragment, lane 4 g + t has rows g and g + 8, and columns 2 t and 2 t + 1 (tensor_core.py).
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterator, Sequence

import ml_dtypes
import numpy as np
from tvm import tirx
from tvm.target import Target
from tvm.tirx.script.builder import ir as T

from attnrewrite.functions.spec import SlideAttention
from attnrewrite.lowering.kernels.gpu_builder import (
    ACCUMULATOR,
    Expr,
    Flat,
    Frame,
    KernelBuilder,
    Limits,
    Operands,
    barrier,
    ceil_div,
    choose,
    every,
    fill,
    registers,
    store,
    when,
)
from attnrewrite.lowering.kernels.slide_tensor_learned_plan import (
    FRAGMENTS,
    QUARTERS,
    ROWS,
    LearnedTiling,
    Table,
    choose_run,
    tiling_of,
)
from attnrewrite.lowering.kernels.slide_tensor_learned_staging import Place, Run, Staging
from attnrewrite.lowering.kernels.tensor_core import COLUMNS, STEP, TensorCore, at
from attnrewrite.lowering.kernels.tensor_softmax import HALVES, START, RowSoftmax
from attnrewrite.lowering.kernels.window_gpu import int_or_none

# Columns of taps that are written out; more are a loop of the kernel.
_UNROLLED = 3
_NUMPY_TYPES = {"float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


class _LearnedKernel:
    """Emits the statements of one kernel; open only inside its frame."""

    def __init__(self, spec: SlideAttention, frame: Frame, tiling: LearnedTiling, run: int, cores: TensorCore) -> None:
        self.spec, self.frame, self.tiling, self.run, self.cores = spec, frame, tiling, run, cores
        self.factor = 2.0 ** min(0, math.floor(math.log2(abs(spec.scale))))
        self.staging = Staging(frame, tiling, cores, self.both(1.0) & 0xFFFF)
        rows, columns = tiling.reaches
        groups, tiles = spec.num_heads // tiling.heads, (rows.tiles, columns.tiles)
        block = frame.z
        column = T.bind(block % columns.tiles * columns.tile)
        row = T.bind(block // columns.tiles % rows.tiles * rows.tile)
        self.tile = (row, column)
        block = block // math.prod(tiles)
        self.first_head = T.bind(block % groups * tiling.heads)
        self.first_image = T.bind(block // groups * run)
        _, bands, across = tiling.warps
        warp, lane = frame.thread_y, frame.thread_x
        self.own_head = T.bind(warp // (bands * across))
        own_row = T.bind(warp // across % bands * ROWS)
        own_column = T.bind(warp % across * COLUMNS + lane // 4)
        self.query_row, self.query_column = T.bind(row + own_row), T.bind(column + own_column)
        # Where tap (0, 0) of the lane's first query lies in what is staged.
        position = (own_row + rows.front) * columns.halo + own_column + columns.front
        self.first_neighbour = T.bind(self.staging.pixel(self.own_head, lane % QUARTERS, position))

        self.queries = cores.words(ROWS * tiling.words)
        self.neighbours = cores.words(len(self.offsets) * tiling.words)
        self.left, self.right = cores.words(4), cores.words(ceil_div(tiling.slot_tiles, 2) * 4)
        self.logits = [cores.sums(tiling.slot_tiles * 4) for _ in range(FRAGMENTS)]
        self.softmax = [RowSoftmax(frame, cores, logits, tiling.slot_tiles * 4) for logits in self.logits]
        self.weights = [cores.words(ceil_div(tiling.slot_tiles, 2) * 4) for _ in range(FRAGMENTS)]
        self.products = cores.sums(8)
        self.values = registers(len(self.offsets) * tiling.words * 2)
        self.result = [cores.sums(tiling.chunk // COLUMNS * 4) for _ in range(FRAGMENTS)]

    def both(self, value: float) -> int:
        """A word of twice a number, as bits."""
        return int(np.array([value] * 2, _NUMPY_TYPES[self.cores.dtype]).view(np.uint32)[0])

    # Rows of the staged map that a lane reads for its four queries.

    @property
    def taps(self) -> tuple[int, ...]:
        return self.spec.geometry.kernel_size

    @property
    def row_step(self) -> int:
        return self.tiling.reaches[0].dilation

    @property
    def offsets(self) -> list[int]:
        """Rows below tap 0 of the first query, each once."""
        return sorted({row + tap * self.row_step for row, tap in itertools.product(range(ROWS), range(self.taps[0]))})

    def emit(self) -> None:
        tiling = self.tiling
        steps: Expr = 1
        if self.run > 1:
            steps = T.bind(tirx.min(self.run, self.frame.batch - self.first_image))
        if tiling.resident:
            for operand, own in (("key", tiling.key), ("value", tiling.value)):
                for chunk in range(tiling.chunks(own)):
                    self.staging.stage_parameters(operand, self.first_head, chunk)
        with T.serial(steps, unroll=False) as step:
            self.attend(T.bind(self.first_image + step) if self.run > 1 else self.first_image)

    def attend(self, image: Expr) -> None:
        """The tile, of some heads of one image."""
        tiling, place = self.tiling, Place(image, self.first_head, self.tile)
        for logits in self.logits:
            fill(logits, tiling.slot_tiles * 4, 0.0)
        with self.chunks("key", place) as chunk:
            self.load_queries(image, chunk)
            barrier()
            self.multiply_keys(chunk)
            barrier()
        for fragment in range(FRAGMENTS):
            self.weigh(fragment)
        with self.chunks("value", place) as chunk:
            barrier()
            self.multiply_values(chunk)
            barrier()
            self.write(image, chunk)

    @contextlib.contextmanager
    def chunks(self, operand: str, place: Place) -> Iterator[Expr]:
        """Each chunk of key or value, which is on its way to shared memory."""
        own = self.tiling.key if operand == "key" else self.tiling.value
        # Compilers that unroll it run out of registers.
        with T.serial(self.tiling.chunks(own), unroll=False) as chunk:
            self.staging.stage_map(operand, place, chunk)
            if not self.tiling.resident:
                self.staging.stage_parameters(operand, self.first_head, chunk)
            yield chunk

    # Queries and the output, in device memory.

    def plane(self, operand: tirx.Buffer, channels: int, image: Expr, chunk: Expr) -> tuple[Expr, Expr]:
        """A lane's first channel of a chunk: within its head, and among those of all images."""
        channel = T.bind(chunk * self.tiling.chunk + self.frame.thread_x % QUARTERS * 2)
        head = self.first_head + self.own_head
        return channel, T.bind(image * int(operand.shape[1]) + head * channels + channel)

    def on_map(self, row: int) -> Expr | bool:
        """Whether there is the lane's query `row`."""
        stands = zip((self.query_row + row, self.query_column), self.tiling.reaches, strict=True)
        return every([True if r.extent % r.tile == 0 else at < r.extent for at, r in stands])

    def pixel(self, row: int) -> Expr:
        width = self.spec.geometry.feature_size[1]
        return (self.query_row + row) * width + self.query_column

    def exists(self, channel: Expr, more: int, channels: int) -> Expr | bool:
        return True if channels % self.tiling.chunk == 0 else channel + more < channels

    def load_queries(self, image: Expr, chunk: Expr) -> None:
        """The lane's channels of its queries, times a power of two; zeros where there are none."""
        tiling, cores, buffer = self.tiling, self.cores, self.frame.operands["query"]
        channels, pixels = tiling.key.channels, math.prod(self.spec.geometry.feature_size)
        source, read = Run(buffer, 1), registers(2 * tiling.words, "uint32")
        channel, plane = self.plane(buffer, channels, image, chunk)
        for row in range(ROWS):
            first = T.bind(plane * pixels + self.pixel(row))
            fill(read, 2 * tiling.words, 0)
            with when(self.on_map(row)):
                for number in range(2 * tiling.words):
                    more = number // 2 * COLUMNS + number % 2
                    with when(self.exists(channel, more, channels)):
                        source.load(first + more * pixels, read, number)
            for word in range(tiling.words):
                value = cores.firsts(read[2 * word], read[2 * word + 1])
                if self.factor != 1.0:
                    value = cores.multiply(value, tirx.const(self.both(self.factor), "uint32"))
                store(self.queries, [row * tiling.words + word], value)

    def write(self, image: Expr, chunk: Expr) -> None:
        """output = result / total."""
        output, channels = self.frame.output, self.tiling.value.channels
        target, pixels = Flat(output, 1), math.prod(self.spec.geometry.feature_size)
        channel, plane = self.plane(output, channels, image, chunk)
        for row in range(ROWS):
            fragment, half = divmod(row, 2)
            first = T.bind(plane * pixels + self.pixel(row))
            with when(self.on_map(row)):
                for word, side in itertools.product(range(self.tiling.words), (0, 1)):
                    more = word * COLUMNS + side
                    result = self.result[fragment][word * 4 + half * 2 + side] * self.softmax[fragment].total[half]
                    with when(self.exists(channel, more, channels)):
                        target.store(first + more * pixels, result.astype(output.dtype))

    # What was staged.

    def load_neighbours(self, column: Expr) -> None:
        """The pixels at one column of taps, of all rows of queries."""
        tiling = self.tiling
        step, across = tiling.halo[1], column * tiling.reaches[1].dilation
        for number, offset in enumerate(self.offsets):
            pixel = self.first_neighbour + (offset * step + across) * (tiling.chunk // QUARTERS)
            self.staging.load(pixel, self.neighbours, number * tiling.words)

    def neighbour(self, row: int, tap: int) -> int:
        """Which of them the query `row` has at a row of taps."""
        return self.offsets.index(row + tap * self.row_step)

    @contextlib.contextmanager
    def each_column(self) -> Iterator[Sequence[Expr]]:
        """Columns of taps: numbers, or one in a loop of the kernel."""
        if self.taps[1] <= _UNROLLED:
            yield range(self.taps[1])
            return
        with T.serial(self.taps[1], unroll=False) as column:
            yield [column]

    def slot_rows(
        self, operand: str, chunk: Expr, slots: Sequence[Expr], channel: Expr
    ) -> tuple[list[Expr], list[Expr]]:
        """Elements at which these slots, which may be past the last, begin in the kernels, and in the biases."""
        tiling, staging = self.tiling, self.staging
        own = tiling.key if operand == "key" else tiling.value

        def begin(table: Table | None, first: Expr) -> list[Expr]:
            if table is None:
                return []
            copy = 0 if table.copies == 1 else self.own_head * table.rows_of_copy
            rows = [copy + tirx.min(slot, table.slots) * table.rows for slot in slots]
            return [T.bind(first + row * table.tile.stride + channel) for row in rows]

        return (
            begin(tiling.kernels(own), staging.kernels_at(operand, chunk)),
            begin(tiling.biases(own), staging.biases_at(operand, chunk)),
        )

    # The three steps.

    def multiply_keys(self, chunk: Expr) -> None:
        """Adds a chunk of channels to the logits."""
        tiling, lane = self.tiling, self.frame.thread_x
        firsts = [tile * COLUMNS + lane // 16 * COLUMNS + lane % 8 for tile in range(0, tiling.slot_tiles, 2)]
        kernel, bias = self.slot_rows("key", chunk, firsts, lane // 8 % 2 * 8)
        stride = tiling.kernels(tiling.key).tile.stride
        words, steps = tiling.words, range(tiling.chunk // STEP)
        with self.each_column() as columns:
            for column in columns:
                self.load_neighbours(column)
                for tap, step in itertools.product(range(self.taps[0]), steps):
                    along = (tap * self.taps[1] + column) * stride
                    self.load_slots([first + along + step * STEP for first in kernel])
                    for fragment in range(FRAGMENTS):
                        for word, (side, half) in enumerate(itertools.product((0, 1), HALVES)):
                            row, own = fragment * 2 + half, step * 2 + side
                            key = self.neighbours[self.neighbour(row, tap) * words + own]
                            product = self.cores.multiply(self.queries[row * words + own], key)
                            store(self.left, [word], product)
                        self.add_logits(fragment)
        for step in steps if bias else ():
            self.load_slots([first + step * STEP for first in bias])
            for fragment in range(FRAGMENTS):
                for word, (side, half) in enumerate(itertools.product((0, 1), HALVES)):
                    store(self.left, [word], self.queries[(fragment * 2 + half) * words + step * 2 + side])
                self.add_logits(fragment)

    def load_slots(self, firsts: Sequence[Expr]) -> None:
        """right = 16 channels of the parameters of all slots."""
        for number, first in enumerate(firsts):
            count = min(2, self.tiling.slot_tiles - 2 * number) * 2
            self.cores.load_matrices(at(self.right, number * 4), at(self.staging.memory, first), count)

    def add_logits(self, fragment: int) -> None:
        for tile in range(self.tiling.slot_tiles):
            self.cores.mma(at(self.logits[fragment], tile * 4), at(self.left, 0), at(self.right, tile * 2))

    def weigh(self, fragment: int) -> None:
        """Turns logits into weights, packed as a left operand."""
        tiling, logits, softmax = self.tiling, self.logits[fragment], self.softmax[fragment]
        count = tiling.slot_tiles * 4
        scale = tirx.const(self.spec.scale / self.factor, ACCUMULATOR)
        for number in range(count):
            value = logits[number] * scale
            if "bias" in self.frame.operands:
                value = value + self.bias(fragment * 2 + number // 2 % 2, number)
            store(logits, [number], choose(self.is_slot(number), value, tirx.const(START, ACCUMULATOR)))
        softmax.start()
        softmax.meet(rescale=False)
        softmax.weigh(self.is_slot)
        softmax.finish()
        for word in range(int(self.weights[fragment].shape[0])):
            pairs = [logits[word * 2 + side] for side in (0, 1)] if word * 2 < count else []
            store(self.weights[fragment], [word], self.cores.pack(*pairs) if pairs else tirx.const(0, "uint32"))

    def slot(self, number: int) -> Expr:
        return self.frame.thread_x % QUARTERS * 2 + (number // 4 * COLUMNS + number % 2)

    def is_slot(self, number: int) -> Expr | bool:
        """Whether a logit's number stands for a slot."""
        slots = self.tiling.slots
        return True if (number // 4 + 1) * COLUMNS <= slots else self.slot(number) < slots

    def bias(self, row: int, number: int) -> Expr:
        """Of the query `row` and the slot that a logit stands for."""
        buffer = self.frame.operands["bias"]
        line: Expr = 0 if int(buffer.shape[0]) == 1 else self.first_head + self.own_head
        inside = self.is_slot(number)
        if len(buffer.shape) == 3:
            line, inside = line * int(buffer.shape[1]) + self.pixel(row), every([inside, self.on_map(row)])
        value = Flat(buffer, 1).load(line * self.tiling.slots + self.slot(number)).astype(ACCUMULATOR)
        return choose(inside, value, tirx.const(0.0, ACCUMULATOR))

    def multiply_values(self, chunk: Expr) -> None:
        """result = the sums of a chunk of channels, with weights that do not add up to 1."""
        tiling, lane = self.tiling, self.frame.thread_x
        firsts = [step * STEP + lane % 16 for step in range(ceil_div(tiling.slot_tiles, 2))]
        kernel, bias = self.slot_rows("value", chunk, firsts, lane // 16 * 8)
        stride, steps = tiling.kernels(tiling.value).tile.stride, range(tiling.chunk // STEP)
        for result in self.result:
            fill(result, tiling.chunk // COLUMNS * 4, 0.0)
        for step in steps if bias else ():
            self.load_channels([first + step * STEP for first in bias])
            for fragment in range(FRAGMENTS):
                self.multiply_weights(fragment, self.result[fragment], step * 8)
        with self.each_column() as columns:
            for column in columns:
                self.load_neighbours(column)
                for number in range(int(self.neighbours.shape[0])):
                    word = self.neighbours[number]
                    store(self.values, [number * 2], self.cores.low(word))
                    store(self.values, [number * 2 + 1], self.cores.high(word))
                for tap, step in itertools.product(range(self.taps[0]), steps):
                    along = (tap * self.taps[1] + column) * stride
                    self.load_channels([first + along + step * STEP for first in kernel])
                    for fragment in range(FRAGMENTS):
                        fill(self.products, 8, 0.0)
                        self.multiply_weights(fragment, self.products, 0)
                        self.add_products(fragment, tap, step)

    def load_channels(self, firsts: Sequence[Expr]) -> None:
        """right = the parameters of all slots for 16 channels."""
        for number, first in enumerate(firsts):
            self.cores.load_matrices(at(self.right, number * 4), at(self.staging.memory, first), 4, transposed=True)

    def multiply_weights(self, fragment: int, sums: tirx.Buffer, first: int) -> None:
        """Adds weights x right to two tiles of sums."""
        weights = self.weights[fragment]
        for number, tile in itertools.product(range(int(weights.shape[0]) // 4), (0, 1)):
            self.cores.mma(at(sums, first + tile * 4), at(weights, number * 4), at(self.right, number * 4 + tile * 2))

    def add_products(self, fragment: int, tap: int, step: int) -> None:
        """Adds to 16 channels of the result what a tap has for them, times the value there."""
        result = self.result[fragment]
        for tile, half, side in itertools.product((0, 1), HALVES, (0, 1)):
            word = self.neighbour(fragment * 2 + half, tap) * self.tiling.words + step * 2 + tile
            number, own = (step * 2 + tile) * 4 + half * 2 + side, tile * 4 + half * 2 + side
            total = self.cores.fma(self.products[own], self.values[word * 2 + side], result[number])
            store(result, [number], total)


def slide_attention(spec: SlideAttention, operands: Operands, target: Target, name: str) -> tirx.PrimFunc:
    """The kernel as a scheduled PrimFunc, as `slide_gpu.slide_attention` gives it, for operands it `takes`.

    They are of float16 or bfloat16; `dtypes` may say otherwise of bias. For a metal target the kernel calls functions
    that only the emulator has.
    """
    limits, heads = Limits.of(target), spec.num_heads
    tiling = tiling_of(spec, operands.shapes, limits)
    assert tiling is not None
    run = choose_run(tiling, heads, int_or_none(operands.shapes["value"][0]), limits)

    def grid(batch: Expr) -> tuple[int, int, Expr]:
        return 1, 1, ceil_div(batch, run) * (heads // tiling.heads) * math.prod(r.tiles for r in tiling.reaches)

    output_shape = [heads * tiling.value.channels, *spec.geometry.feature_size]
    builder = KernelBuilder()
    with builder.kernel(name, operands, [output_shape], grid, tiling.threads, channel_axis=1) as frame:
        _LearnedKernel(spec, frame, tiling, run, TensorCore(target, operands.dtype)).emit()
    return builder.prim_func()
