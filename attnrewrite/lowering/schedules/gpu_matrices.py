"""Matrix products by the matrix instructions of a SIMD group: simdgroup_matrix on Metal.

The 32 threads of a SIMD group hold matrices of 8 x 8 together; which thread holds which element is not specified, so
that matrices are read from shared memory and written to it, whole. Operands are staged in their own precision, in
rows of steps or of places as in their own memory: matrices are transposed when they are loaded. Sums are float32. They
pass through the operands' memory, so that each thread has runs of columns to apply the epilogue to and store.

Source: Apple, Metal Shading Language Specification, 2.4 and 6.7 (SIMD-group matrices).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from math import prod

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from attnrewrite.lowering.kernels.gpu_builder import (
    ACCUMULATOR,
    SharedMemory,
    SharedTile,
    TileShape,
    barrier,
    every,
    load,
    registers,
    store,
    when,
)
from attnrewrite.lowering.schedules.gpu_emit import Bound, Device, Thread, below, bind_axes, ceil_div, count, keep
from attnrewrite.lowering.schedules.gpu_epilogue import Epilogue
from attnrewrite.lowering.schedules.gpu_operands import (
    Operand,
    StagedOperand,
    lanes_of_word,
    read_operand,
    staged_bytes,
)
from attnrewrite.lowering.schedules.gpu_tiles import MATRIX, MatrixTile, Sizes, choose, matrix_tiles
from attnrewrite.lowering.schedules.gpu_vectors import LANES
from attnrewrite.lowering.schedules.products import Contraction
from attnrewrite.lowering.schedules.stages import Expr

# Bytes of a place that are staged at a time.
STAGED_BYTES = 64

DTYPES = ("float32", "float16")


def takes(contraction: Contraction, sizes: Sizes, device: Device) -> bool:
    """Whether the device has matrix instructions for this product, and its sizes are worth them."""
    return device.has_simdgroup_matrix and sizes.suits_matrices and _operand_type(contraction) in DTYPES


def choose_tile(sizes: Sizes, device: Device) -> MatrixTile:
    return choose(matrix_tiles(device), sizes, device)


def _operand_type(contraction: Contraction) -> str | None:
    """Half precision where both operands are that; None where they are neither float32 nor float16."""
    found = {str(side.ty.dtype) for side in (contraction.left, contraction.right)}
    if contraction.dtype != ACCUMULATOR or not found <= set(DTYPES):
        return None
    return "float16" if found == {"float16"} else "float32"


class MatrixProduct:
    """The statements of one threadgroup; open only inside its launch."""

    def __init__(
        self, contraction: Contraction, epilogue: Epilogue, tile: MatrixTile, thread: Thread, device: Device
    ) -> None:
        self.contraction, self.epilogue, self.tile, self.thread = contraction, epilogue, tile, thread
        dtype = _operand_type(contraction)
        assert dtype is not None
        word = lanes_of_word(dtype)
        self.depth = STAGED_BYTES // 16 * word
        left = read_operand(contraction, contraction.left, contraction.rows, word)
        right = read_operand(contraction, contraction.right, contraction.columns, word)
        left_bytes = staged_bytes(left, self.depth, tile.rows, dtype)
        operand_bytes = left_bytes + staged_bytes(right, self.depth, tile.columns, dtype)
        self.rows_at_once = self._rows_at_once(max(operand_bytes, device.limits.shared_bytes // 2))
        results = TileShape(self.rows_at_once * tile.groups_y * MATRIX, tile.columns)
        memory = SharedMemory(max(operand_bytes, results.size_bytes))

        def staged(operand: Operand, places: int, first_byte: int) -> StagedOperand:
            return StagedOperand(
                operand, self.depth, places, dtype, by_place=True, memory=memory, first_byte=first_byte
            )

        self.left, self.right = staged(left, tile.rows, 0), staged(right, tile.columns, left_bytes)
        self.results = SharedTile(results, memory, lanes=(1, LANES))
        self.sums = _Matrices(tile.matrices_y * tile.matrices_x, ACCUMULATOR)
        self.row_matrices, self.column_matrices = _Matrices(tile.matrices_y, dtype), _Matrices(tile.matrices_x, dtype)
        self.run = registers(LANES)

    def _rows_at_once(self, most_bytes: int) -> int:
        """Rows of matrices of each SIMD group whose sums fit into so much memory."""
        tile = self.tile
        row_bytes = TileShape(tile.groups_y * MATRIX, tile.columns).size_bytes
        return max(n for n in range(1, tile.matrices_y + 1) if tile.matrices_y % n == 0 and n * row_bytes <= most_bytes)

    def emit(self, batch: Bound, first_row: Expr, first_column: Expr) -> None:
        self.sums.clear()
        with T.serial(ceil_div(count(self.contraction.stage.reduction), self.depth)) as chunk:
            self.left.stage(self.thread, batch, first_row, chunk * self.depth)
            self.right.stage(self.thread, batch, first_column, chunk * self.depth)
            barrier()
            with T.serial(self.depth // MATRIX) as step:
                self.multiply_add(step * MATRIX)
            barrier()
        self.finish(batch, first_row, first_column)

    def multiply_add(self, step: Expr) -> None:
        """Sums of the SIMD group += its rows times its columns, over MATRIX steps."""
        tile, left, right = self.tile, self.left, self.right
        for i in range(tile.matrices_y):
            self.row_matrices.load(i, left.tile, left.at(step, self.row_of(i)), transposed=not left.by_place)
        for j in range(tile.matrices_x):
            self.column_matrices.load(j, right.tile, right.at(step, self.column_of(j)), transposed=right.by_place)
        for i, j in itertools.product(range(tile.matrices_y), range(tile.matrices_x)):
            self.sums.multiply_add(i * tile.matrices_x + j, self.row_matrices, i, self.column_matrices, j)

    def hand_over(self, first: int) -> None:
        """Writes the sums of rows of matrices from `first` on to shared memory."""
        for i, j in itertools.product(range(self.rows_at_once), range(self.tile.matrices_x)):
            place = self.row_of(i), self.column_of(j)
            self.sums.store((first + i) * self.tile.matrices_x + j, self.results, place)

    def row_of(self, matrix: int) -> Expr:
        """Where in the tile a row of matrices of this SIMD group begins."""
        return (matrix * self.tile.groups_y + self.thread.y // self.tile.groups_x) * MATRIX

    def column_of(self, matrix: int) -> Expr:
        return (matrix * self.tile.groups_x + self.thread.y % self.tile.groups_x) * MATRIX

    def finish(self, batch: Bound, first_row: Expr, first_column: Expr) -> None:
        """Stores the sums where they lie inside the output. Every thread has one run of columns."""
        tile, contraction, lanes = self.tile, self.contraction, self.epilogue.lanes
        runs = tile.columns // LANES
        own_column = keep(self.thread.index % runs * LANES)
        columns = [first_column + (own_column + lane) for lane in range(LANES)]
        at = [bind_axes(contraction.columns, column) for column in columns]
        inside = [below(column, count(contraction.columns), tile.columns) for column in columns]
        if lanes == LANES:
            with when(inside[0]):
                self.epilogue.fetch_columns(at)
        for first in range(0, tile.matrices_y, self.rows_at_once):
            if first:
                barrier()
            self.hand_over(first)
            barrier()
            row = first_row + first * tile.groups_y * MATRIX
            for lane in range(0, LANES, lanes):
                with when(inside[lane]):
                    if lanes < LANES:
                        self.epilogue.fetch_columns(at[lane : lane + 1])
                    self.store_rows(batch, row, own_column + lane, at[lane : lane + lanes])

    def store_rows(self, batch: Bound, first_row: Expr, column: Expr, at: Sequence[Bound]) -> None:
        """What was handed over, at this thread's neighbouring columns."""
        tile, contraction = self.tile, self.contraction
        height, rows = self.results.shape.rows, count(contraction.rows)
        threads = prod(tile.launch_size) // (tile.columns // LANES)
        with T.serial(ceil_div(height, threads)) as round_:
            own_row = keep(round_ * threads + self.thread.index // (tile.columns // LANES))
            row = keep(first_row + own_row)
            with when(every([below(own_row, height, threads), below(row, rows, tile.rows)])):
                own = {**batch, **bind_axes(contraction.rows, row)}
                lanes = len(at)
                store(
                    self.run, [0 if lanes == 1 else tirx.Ramp(0, 1, lanes)], self.results.load(own_row, column, lanes)
                )
                self.epilogue.store_row([{**own, **a} for a in at], [load(self.run, [lane]) for lane in range(lanes)])


class _Matrices:
    """Matrices that the threads of a SIMD group hold together; all of them take part in every operation."""

    def __init__(self, count: int, dtype: str) -> None:
        self.count, self.dtype = count, dtype
        self.buffer = T.alloc_buffer((count * MATRIX * MATRIX,), dtype, scope="metal.simdgroup")

    def clear(self) -> None:
        zero = tirx.const(0.0, self.dtype)
        for index in range(self.count):
            _call("make_filled_simdgroup_matrix", self.buffer.data, index, zero, MATRIX, MATRIX)

    def load(self, index: int, tile: SharedTile, at: tuple[Expr, Expr], *, transposed: bool) -> None:
        """Matrix `index` = the tile from (row, column) on."""
        self._move("simdgroup_load", index, tile, at, transposed)

    def store(self, index: int, tile: SharedTile, at: tuple[Expr, Expr]) -> None:
        self._move("simdgroup_store", index, tile, at, False)

    def _move(self, function: str, index: int, tile: SharedTile, at: tuple[Expr, Expr], transposed: bool) -> None:
        first = tirx.address_of(tile.load(*at))
        _call(function, self.buffer.data, index, first, tile.shape.stride, MATRIX, MATRIX, transposed)

    def multiply_add(self, index: int, left: _Matrices, i: int, right: _Matrices, j: int) -> None:
        own = self.buffer.data, index
        _call("simdgroup_multiply_accumulate", *own, left.buffer.data, i, right.buffer.data, j, *own)


def _call(function: str, *arguments: Expr) -> None:
    T.evaluate(tirx.call_intrin("void", f"tirx.{function}", *arguments))
