"""SlideAttention on CUDA's tensor cores: float16 and bfloat16 with sums, logits and softmax in float32.

A threadgroup computes a tile of queries of one head; each warp 2 x 8 of them, against a slice of the key map that holds
all their neighbourhoods, some rows of it at a time: logits, a softmax that runs on from the rows before, and the sum of
the values. Maps are channels-first, so every matrix lies in memory with the channels as rows:

    logits  = query^T x key      the keys' fragments are loaded transposed; the queries stay in registers throughout
    result^T = value x weights^T  the values' are not; the logits' fragments, packed, are weights^T as they lie

What a query has for a key besides their product follows from where the key lies in its neighbourhood: a table in shared
memory has the bias there, and -inf around it, so that keys of the slice which are no neighbours have no weight.

Where key and value of all rows do not fit into shared memory, they come in bands of rows.

A key or value that is infinite or NaN can make the results of all queries NaN whose slice it is in, though it is a
neighbour of some of them alone; so can a key whose product with a query is beyond float32.

Letters: d and dv head_dim of query/key and of value; in a fragment, lane 4 g + t has columns 2 t and 2 t + 1 of rows g
and g + 8 (tensor_core.py). Of a warp's queries rows g are the first row of the map, rows g + 8 the second.
Source: Dao et al., "FlashAttention", https://arxiv.org/abs/2205.14135, algorithm 1.
"""

from __future__ import annotations

import itertools

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
    choose,
    every,
    fill,
    from_lane,
    held,
    load,
    registers,
    spread,
    store,
    when,
)
from attnrewrite.lowering.kernels.slide_tensor_plan import SlideTensorTiling, Work, choose_tiling
from attnrewrite.lowering.kernels.slide_tensor_staging import SlideStaging
from attnrewrite.lowering.kernels.tensor_core import COLUMNS, STEP, TensorCore, as_bits, at
from attnrewrite.lowering.kernels.tensor_softmax import HALVES, RowSoftmax

_NO_KEY = float("-inf")


class _SlideTensorKernel:
    """Emits the statements of one kernel; open only inside its frame."""

    def __init__(self, spec: SlideAttention, frame: Frame, tiling: SlideTensorTiling, cores: TensorCore) -> None:
        self.spec, self.frame, self.tiling, self.cores = spec, frame, tiling, cores
        self.image, self.head, self.lane = frame.z, frame.y, frame.thread_x
        rows, columns = tiling.rows, tiling.columns
        self.tiles = (frame.x // columns.tiles, frame.x % columns.tiles)
        starts = (held(rows.start(self.tiles[0])), held(columns.start(self.tiles[1])))
        self.staging = SlideStaging(frame, tiling, cores, starts, self.image, self.head)

        warp = (frame.thread_y // columns.warps, frame.thread_y % columns.warps)
        self.first_query = [
            held(axis.first_query(tile) + w * axis.queries)
            for axis, tile, w in zip((rows, columns), self.tiles, warp, strict=True)
        ]
        first_steps = [self.first_step(axis, self.first_query[axis], starts[axis]) for axis in (0, 1)]
        self.slice = [held(axis.slice(step)) for axis, step in zip((rows, columns), first_steps, strict=True)]
        # Where the lane's queries' neighbourhoods begin, in steps from where staging does: two rows, one column.
        self.first_row = [held(self.first_step(0, self.first_query[0] + half, starts[0])) for half in HALVES]
        self.first_column = held(self.first_step(1, self.first_query[1] + self.lane // 4, starts[1]))
        self.starts = starts

        count = tiling.key_tiles * 4
        self.asked = cores.words(tiling.head_steps * 4)
        self.logits = cores.sums(count)
        self.softmax = RowSoftmax(frame, cores, self.logits, count)
        self.result = cores.sums(tiling.value_steps * len(HALVES) * 4)
        self.words, self.weights = cores.words(4), cores.words(4)
        self.column_factor = registers(4)
        self.pair = registers(2)
        table = T.alloc_buffer((2 * tiling.table_floats,), ACCUMULATOR, scope="shared")
        self.table = {lanes: Flat(table, lanes) for lanes in (1, 2)}

    def first_step(self, axis: int, query: Expr, start: Expr) -> Expr:
        """Where the neighbourhood of a query begins, in steps from where staging does."""
        own = (self.tiling.rows, self.tiling.columns)[axis]
        return (own.reach.first_neighbour(own.pixel(self.tiles[axis], query)) - start) // own.reach.dilation

    def emit(self) -> None:
        tiling = self.tiling
        self.staging.clear()
        self.staging.fetch(tirx.const(0, "int32"))
        self.fill_table()
        self.load_queries()
        self.softmax.start()
        fill(self.result, tiling.value_steps * len(HALVES) * 4, 0.0)
        if tiling.bands == 1:
            self.attend_band(tirx.const(0, "int32"))
        else:
            with T.serial(tiling.bands, unroll=False) as band:
                self.attend_band(band)
                barrier()
                with when(band + 1 < tiling.bands):
                    self.staging.fetch(band + 1)
        with when(self.has_queries()):
            self.write_output()

    def attend_band(self, band: Expr) -> None:
        """What the warp has of the rows of a band, once they are there."""
        tiling = self.tiling
        self.cores.wait(0)
        barrier()
        begin, chunks = self.slice[0], tirx.const(tiling.chunks, "int32")
        if tiling.bands > 1:
            end = tirx.min(self.slice[0] + tiling.rows.taken, (band + 1) * tiling.band)
            begin = held(tirx.max(self.slice[0], band * tiling.band))
            chunks = held(tirx.max(end - begin, 0) // tiling.chunk)
        with when(self.has_queries()):
            if tiling.chunks == tiling.bands == 1:
                self.attend(begin, begin)
            else:
                with T.serial(chunks, unroll=False) as chunk:
                    row = held(begin + chunk * tiling.chunk)
                    self.attend(row, row - band * tiling.band)

    def attend(self, row: Expr, staged_row: Expr) -> None:
        """One chunk of the slice, from a row on; staged_row: the same within what is in shared memory."""
        first = held(staged_row * self.tiling.columns.staged + self.slice[1])
        self.multiply_query_key(first)
        self.add_to_logits(row)
        several = self.tiling.chunks > 1
        self.softmax.meet(rescale=several)
        if several:
            self.scale_result(self.softmax.factor)
        self.softmax.weigh()
        self.add_weighted_values(first)

    def has_queries(self) -> Expr | bool:
        """Whether the warp has one on the map."""
        axes = zip((self.tiling.rows, self.tiling.columns), self.tiles, self.first_query, strict=True)
        return every([axis.is_query(tile, first) if axis.idle else True for axis, tile, first in axes])

    # Before the keys.

    def fill_table(self) -> None:
        """table[row, column] of where a key lies: the bias of that slot, -inf where it is no neighbour. The second copy
        begins one element later, so that any two neighbours are at an even place of one of them.
        """
        tiling, bias = self.tiling, self.frame.operands.get("bias")
        rows, columns, width = tiling.rows, tiling.columns, tiling.table_columns
        kernel = self.spec.geometry.kernel_size
        with spread(self.frame, (rows.highest - rows.lowest) * width) as index:
            row, column = index // width + rows.lowest, index % width + columns.lowest
            own: Expr = tirx.const(0.0, ACCUMULATOR)
            if bias is not None:
                bias_row = 0 if int(bias.shape[0]) == 1 else self.head
                own = load(bias, [bias_row, row * kernel[1] + column]).astype(ACCUMULATOR)
            is_slot = tirx.all(row >= 0, row < kernel[0], column >= 0, column < kernel[1])
            entry = held(choose(is_slot, own, tirx.const(_NO_KEY, ACCUMULATOR)))
            self.table[1].store(index, entry)
            with when(index >= 1):
                self.table[1].store(index + (tiling.table_floats - 1), entry)

    def load_queries(self) -> None:
        """The queries' fragments, 16 x 16 of queries and channels each, from device memory."""
        query, tiling = self.frame.operands["query"], self.tiling
        height, width = self.spec.geometry.feature_size
        bits, head_dim = as_bits(query, 1), tiling.work.head_dim
        plane = held(self.image * int(query.shape[1]) + self.head * head_dim)
        x = tiling.columns.pixel(self.tiles[1], self.first_query[1] + self.lane // 4)
        pixels = [
            held(tiling.rows.pixel(self.tiles[0], self.first_query[0] + half) * width + x + plane * (height * width))
            for half in HALVES
        ]
        for step, eights, half in itertools.product(range(tiling.head_steps), (0, 1), HALVES):
            first = step * STEP + eights * 8
            if first >= head_dim:
                store(self.asked, [step * 4 + eights * 2 + half], tirx.const(0, "uint32"))
                continue

            def element(channel: Expr, half: int = half, all_are: bool = first + 8 <= head_dim) -> Expr:
                own = load(bits, [pixels[half] + channel * (height * width)])
                inside = True if all_are else channel < head_dim
                return choose(inside, own, tirx.const(0, "uint16")).astype("uint32")

            channel = first + self.lane % 4 * 2
            word = tirx.bitwise_or(element(channel), tirx.shift_left(element(channel + 1), tirx.const(16, "uint32")))
            store(self.asked, [step * 4 + eights * 2 + half], word)

    # The three steps of a chunk.

    def key_pairs(self) -> list[tuple[int, Expr]]:
        """For each two neighbouring tiles of the chunk's keys: the first's number, and where from the chunk's start on
        the lane's tile begins, which is the second for lanes from 16 on.
        """
        wide, staged = self.tiling.columns.taken // COLUMNS, self.tiling.columns.staged
        begins = [tile // wide * staged + tile % wide * COLUMNS for tile in range(self.tiling.key_tiles)]
        return [
            (tile, self.lane // 16 * (begins[tile + 1] - begins[tile]) + begins[tile])
            for tile in range(0, self.tiling.key_tiles, 2)
        ]

    def multiply_query_key(self, first: Expr) -> None:
        """logits = query x key of the warp's 16 queries."""
        cores = self.cores
        fill(self.logits, self.tiling.key_tiles * 4, 0.0)
        for step in range(self.tiling.head_steps):
            channel = self.lane % 16 + step * STEP
            for tile, begin in self.key_pairs():
                cores.load_matrices(at(self.words, 0), self.staging.key(channel, first + begin), 4, transposed=True)
                for i in (0, 1):
                    cores.mma(at(self.logits, (tile + i) * 4), at(self.asked, step * 4), at(self.words, 2 * i))

    def add_to_logits(self, row: Expr) -> None:
        """Scales the logits and adds what the table has; `row` is the first of the chunk."""
        tiling, cores = self.tiling, self.cores
        scale, width = tirx.const(self.spec.scale, ACCUMULATOR), tiling.table_columns
        wide = tiling.columns.taken // COLUMNS
        column = self.slice[1] + self.lane % 4 * 2 - self.first_column - tiling.columns.lowest
        own_copy = column % 2 * (tiling.table_floats // 2) + column // 2
        # In pairs: TVM loads two at once only from what it sees to be even.
        begins = [
            held((row - self.first_row[half] - tiling.rows.lowest) * (width // 2) + own_copy) * 2 for half in HALVES
        ]
        for tile, half in itertools.product(range(tiling.key_tiles), HALVES):
            entry = self.table[2].load(begins[half] + (tile // wide * width + tile % wide * COLUMNS))
            T.buffer_store(self.pair, entry, [tirx.Ramp(0, 1, 2)])
            for c in (0, 1):
                number = tile * 4 + half * 2 + c
                value = cores.fma(self.logits[number], scale, self.pair[c])
                key = (row + tile // wide, self.slice[1] + self.lane % 4 * 2 + (tile % wide * COLUMNS + c))
                store(self.logits, [number], choose(self.takes_part(key), value, tirx.const(_NO_KEY, ACCUMULATOR)))

    def takes_part(self, key: tuple[Expr, Expr]) -> Expr | bool:
        """False where a key, in steps from where staging begins, is off the map and the border is "exclude"."""
        found: list[Expr | bool] = []
        for axis, step, start in zip((self.tiling.rows, self.tiling.columns), key, self.starts, strict=True):
            if axis.reach.border == "exclude":
                found.append(axis.reach.source(start + step * axis.reach.dilation)[1])
        return every(found)

    def add_weighted_values(self, first: Expr) -> None:
        """result^T += value x weights^T; two neighbouring tiles of logits, packed, are two tiles of the right operand,
        one for each half of the queries.
        """
        cores = self.cores
        for tile, begin in self.key_pairs():
            for half, i in itertools.product(HALVES, (0, 1)):
                number = (tile + i) * 4 + half * 2
                store(self.weights, [half * 2 + i], cores.pack(self.logits[number], self.logits[number + 1]))
            for step in range(self.tiling.value_steps):
                channel = self.lane % 16 + step * STEP
                cores.load_matrices(at(self.words, 0), self.staging.value(channel, first + begin), 4)
                for half in HALVES:
                    sums = at(self.result, (step * 2 + half) * 4)
                    cores.mma(sums, at(self.words, 0), at(self.weights, half * 2))

    # The result: rows are channels, columns 2 t and 2 t + 1 neighbouring queries.

    def scale_result(self, factor: tirx.Buffer) -> None:
        """Multiplies each column by the factor of its query, which the four lanes of that query's row have."""
        for half, c in itertools.product(HALVES, (0, 1)):
            owner = self.lane % 4 * 8 + c * 4
            store(self.column_factor, [half * 2 + c], from_lane(factor[half], owner))
        for number in range(self.tiling.value_steps * len(HALVES) * 4):
            half, c = number // 4 % 2, number % 2
            store(self.result, [number], self.result[number] * self.column_factor[half * 2 + c])

    def write_output(self) -> None:
        """output = result / total."""
        tiling, cores, output = self.tiling, self.cores, self.frame.output
        height, width = self.spec.geometry.feature_size
        self.softmax.finish()
        self.scale_result(self.softmax.total)
        columns, value_dim = tiling.columns, tiling.work.value_dim
        # Pairs of neighbours are one word, where both are on the map or neither.
        in_pairs = width % 2 == 0 and columns.residues == 1
        view, word = as_bits(output, 2 if in_pairs else 1), registers(1, "uint32")
        plane = held(self.image * int(output.shape[1]) + self.head * value_dim)
        for half in HALVES:
            query = self.first_query[0] + half
            y = tiling.rows.pixel(self.tiles[0], query)
            with when(tiling.rows.is_query(self.tiles[0], query)):
                for c in (0,) if in_pairs else (0, 1):
                    at_column = self.first_query[1] + self.lane % 4 * 2 + c
                    with when(columns.is_query(self.tiles[1], at_column)):
                        first = held(plane * (height * width) + y * width + columns.pixel(self.tiles[1], at_column))
                        for step, eights in itertools.product(range(tiling.value_steps), (0, 1)):
                            begin = step * STEP + eights * 8
                            if begin >= value_dim:
                                continue
                            channel, number = begin + self.lane // 4, (step * 2 + half) * 4 + eights * 2
                            store(word, [0], cores.pack(self.result[number], self.result[number + 1]))
                            with when(True if begin + 8 <= value_dim else channel < value_dim):
                                place = first + channel * (height * width)
                                if in_pairs:
                                    store(view, [place // 2], word[0])
                                else:
                                    store(view, [place], (word[0] >> tirx.const(16 * c, "uint32")).astype("uint16"))


def slide_attention(spec: SlideAttention, operands: Operands, target: Target, name: str) -> tirx.PrimFunc:
    """The kernel as a scheduled PrimFunc, as `slide_gpu.slide_attention` gives it, for operands it `takes`.

    They are of float16 or bfloat16; `dtypes` may say otherwise of the bias. For a metal target the kernel calls
    functions that only the emulator has.
    """
    work = Work.of(spec, operands.shapes)
    tiling = choose_tiling(work, Limits.of(target))
    assert tiling is not None

    def grid(images: Expr) -> tuple[int, int, Expr]:
        return tiling.rows.tiles * tiling.columns.tiles, spec.num_heads, images

    builder, output_shape = KernelBuilder(), [spec.num_heads * work.value_dim, *spec.output_size]
    with builder.kernel(name, operands, [output_shape], grid, tiling.threads, channel_axis=1) as frame:
        _SlideTensorKernel(spec, frame, tiling, TensorCore(target, operands.dtype)).emit()
    return builder.prim_func()
