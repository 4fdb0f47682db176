"""What lies in shared memory of the tensor-core kernel of SlideAttention with learned kernels, and how it comes there.

A map lies pixel by pixel, its channels dealt over the four lanes of a fragment's row: lane t has channels 2 t and
2 t + 1 of every eight, side by side, so that it reads all it needs of a pixel at once. Parameters lie in rows of
channels, one for each tap of each slot, as `ldmatrix` reads them. Both are stored channel by channel in device memory.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from attnrewrite.lowering.kernels.gpu_builder import (
    WORD_BYTES,
    Expr,
    Flat,
    Frame,
    ceil_div,
    every,
    fill,
    registers,
    spread,
    store,
    unflatten,
    when,
)
from attnrewrite.lowering.kernels.slide_tensor_learned_plan import (
    QUARTERS,
    LearnedTiling,
    Parameters,
    Table,
)
from attnrewrite.lowering.kernels.tensor_core import COLUMNS, ELEMENT_BYTES, TensorCore, as_bits

# Elements of one store, and words.
_OCTET = WORD_BYTES // ELEMENT_BYTES
_WORDS = _OCTET // 2
# Words of a map, at one or two pixels each, that a thread reads before it stores any of them.
_READ_AHEAD = 32


@dataclass(frozen=True)
class Place:
    """Where a threadgroup works. tile: its first row and column of queries."""

    image: Expr
    first_head: Expr
    tile: tuple[Expr, Expr]


class Staging:
    """The shared memory of a threadgroup; emits what fills it and gives what is read there."""

    def __init__(self, frame: Frame, tiling: LearnedTiling, cores: TensorCore, one: int) -> None:
        """one: the number 1 as bits."""
        self._frame, self._tiling, self._cores, self._one = frame, tiling, cores, one
        self.memory = cores.shared(tiling.shared_elements)
        words = tiling.shared_elements // 2
        self._words = {n: Flat(self.memory, n, "uint32", words) for n in {tiling.words, _WORDS}}
        self._packed = cores.words(_WORDS)

    # Maps.

    def stage_map(self, operand: str, place: Place, chunk: Expr) -> None:
        """A chunk of the channels of key or value: the tile and its halo, zeros beyond the map.

        A thread begins to read several runs of pixels before it stores the first, so that it waits once for all.
        """
        frame, tiling, lanes = self._frame, self._tiling, self._tiling.reaches[1].lanes
        (rows, columns), threads = tiling.halo, math.prod(self._frame.threads)
        source = Run(frame.operands[operand], lanes)
        count = 2 * tiling.words * source.words
        runs = tiling.heads * QUARTERS * rows * columns // lanes
        own = ceil_div(runs, threads)
        turns = ceil_div(own * count, _READ_AHEAD)
        read = [registers(count, "uint32") for _ in range(ceil_div(own, turns))]
        with T.serial(turns, unroll=False) as turn:
            begun = []
            for number, words in enumerate(read):
                index = T.bind((turn * len(read) + number) * threads + frame.thread)
                own_run = True if runs % (turns * len(read) * threads) == 0 else index < runs
                head, row, run, quarter = unflatten(index, (tiling.heads, rows, columns // lanes, QUARTERS))
                fill(words, count, 0)
                with when(own_run):
                    self._read(source, operand, place, chunk, (head, row, run * lanes, quarter), words)
                begun.append((own_run, self.pixel(head, quarter, row * columns + run * lanes), words))
            for own_run, pixel, words in begun:
                with when(own_run):
                    self._deal(words, lanes, pixel)

    def _read(
        self, source: Run, operand: str, place: Place, chunk: Expr, staged: tuple[Expr, ...], target: tirx.Buffer
    ) -> None:
        """A quarter of the channels of a run of pixels that are on the map. staged: its head, row, column, quarter."""
        tiling, own, (head, row, column, quarter) = self._tiling, self._parameters(operand), staged
        _, channels_of_all, height, width = self._frame.operands[operand].shape
        height, width = int(height), int(width)
        tile = zip(tiling.reaches, place.tile, (row, column), strict=True)
        at, inside = zip(*(r.source(r.first_staged(start) + along) for r, start, along in tile), strict=True)
        first = T.bind(chunk * tiling.chunk + quarter * 2)
        plane = place.image * int(channels_of_all) + (place.first_head + head) * own.channels + first
        start = T.bind((plane * height + at[0]) * width + at[1])
        with when(every(inside)):
            for number in range(2 * tiling.words):
                channel = number // 2 * COLUMNS + number % 2
                with when(True if own.channels % tiling.chunk == 0 else first + channel < own.channels):
                    source.load(start + channel * (height * width), target, number * source.words)

    def _deal(self, read: tirx.Buffer, lanes: int, first: Expr) -> None:
        """Stores what was read of a run, pixel by pixel. first: where its first pixel goes."""
        tiling, words = self._tiling, ceil_div(lanes, 2)
        for pixel in range(lanes):
            pair = self._cores.seconds if pixel % 2 else self._cores.firsts
            for word in range(tiling.words):
                low, high = (read[(2 * word + side) * words + pixel // 2] for side in (0, 1))
                store(self._packed, [word], pair(low, high))
            self._store(first + pixel * (tiling.chunk // QUARTERS), tiling.words)

    def pixel(self, head: Expr, quarter: Expr, position: Expr) -> Expr:
        """The element at which a lane's channels of a staged pixel begin."""
        tiling = self._tiling
        return (head * QUARTERS + quarter) * tiling.plane + position * (tiling.chunk // QUARTERS)

    def load(self, pixel: Expr, target: tirx.Buffer, first: int) -> None:
        """A lane's channels of a pixel into words of `target`."""
        words = self._tiling.words
        T.buffer_store(target, self._words[words].load(pixel // 2), [tirx.Ramp(first, 1, words)])

    # Parameters.

    def kernels_at(self, operand: str, chunk: Expr) -> Expr:
        """The element at which the kernels of a chunk of key or value begin."""
        tiling = self._tiling
        if not tiling.resident:
            return tiling.map_elements
        before = tiling.parameter_elements(tiling.key) * tiling.chunks(tiling.key) if operand == "value" else 0
        return tiling.map_elements + before + chunk * tiling.parameter_elements(self._parameters(operand))

    def biases_at(self, operand: str, chunk: Expr) -> Expr:
        return self.kernels_at(operand, chunk) + self._tiling.kernels(self._parameters(operand)).elements

    def stage_parameters(self, operand: str, first_head: Expr, chunk: Expr) -> None:
        """Kernels and biases of a chunk of key or value, of all heads of the threadgroup."""
        tiling, own = self._tiling, self._parameters(operand)
        self._stage_table(tiling.kernels(own), self.kernels_at(operand, chunk), f"{operand}_kernel", first_head, chunk)
        if (biases := tiling.biases(own)) is not None:
            self._stage_table(biases, self.biases_at(operand, chunk), f"{operand}_bias", first_head, chunk)

    def _stage_table(self, table: Table, first: Expr, name: str, first_head: Expr, chunk: Expr) -> None:
        """Eight channels of a row at a time."""
        channels = self._parameters(name.partition("_")[0]).channels
        buffer, tile, given = self._frame.operands.get(name), table.tile, table.slots * table.rows
        read = registers(_OCTET, "uint32")
        with spread(self._frame, tile.rows * table.chunk // _OCTET) as index:
            at, octet = index % tile.rows, index // tile.rows * _OCTET
            copy, row = (0, at) if table.copies == 1 else (at // table.rows_of_copy, at % table.rows_of_copy)
            channel = T.bind(chunk * table.chunk + octet)
            fill(read, _OCTET, 0)
            if buffer is None:
                # Slot j is tap j: a one in each of the rows j slots + j.
                with when(tirx.all(row < given, row % (table.slots + 1) == 0)):
                    fill(read, _OCTET, self._one)
            else:
                of_all_heads = int(buffer.shape[0]) == channels
                line = channel if of_all_heads else (first_head + copy) * channels + channel
                source, start = Run(buffer, 1), T.bind(line * given + row)
                with when(row < given):
                    for more in range(_OCTET):
                        with when(True if channels % table.chunk == 0 else channel + more < channels):
                            source.load(start + more * given, read, more)
            for word in range(_WORDS):
                store(self._packed, [word], self._cores.firsts(read[2 * word], read[2 * word + 1]))
            self._store(first + at * tile.stride + octet, _WORDS)

    def _parameters(self, operand: str) -> Parameters:
        return self._tiling.key if operand == "key" else self._tiling.value

    def _store(self, element: Expr, words: int) -> None:
        value = tirx.BufferLoad(self._packed, [tirx.Ramp(0, 1, words)])
        self._words[words].store(element // 2, value)


class Run:
    """Neighbouring elements of a buffer (1, 2 or 4) as words: two elements to one, or a single one."""

    def __init__(self, buffer: tirx.Buffer, lanes: int) -> None:
        self.words, self._per_word = max(lanes // 2, 1), min(lanes, 2)
        self._view = Flat(as_bits(buffer, self._per_word), self.words)

    def load(self, first: Expr, target: tirx.Buffer, at: int) -> None:
        """Into `words` words of `target`, from the word `at` on."""
        words = self._view.load(first // self._per_word)
        words = words if self._per_word == 2 else words.astype("uint32")
        T.buffer_store(target, words, [at if self.words == 1 else tirx.Ramp(at, 1, self.words)])
