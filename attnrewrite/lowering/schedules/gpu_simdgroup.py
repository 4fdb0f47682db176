"""Matrix products on Metal: simdgroup_matrix.

The 32 threads of a SIMD group hold matrices of 8 x 8 together; which thread holds which element is not specified, so
that matrices are read from threadgroup memory and written to it whole, transposed where they are asked to be.

Source: Apple, Metal Shading Language Specification, 2.4 and 6.7 (SIMD-group matrices).
"""

from __future__ import annotations

import itertools

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from attnrewrite.lowering.kernels.gpu_builder import ACCUMULATOR, SharedTile, barrier
from attnrewrite.lowering.schedules.gpu_emit import Bound, Device, Thread
from attnrewrite.lowering.schedules.gpu_epilogue import Epilogue
from attnrewrite.lowering.schedules.gpu_matrices import MatrixProduct, operand_type
from attnrewrite.lowering.schedules.gpu_tiles import SIMDGROUP, MatrixTile, Sizes, choose, matrix_tiles
from attnrewrite.lowering.schedules.products import Contraction
from attnrewrite.lowering.schedules.stages import Expr

SIDE = SIMDGROUP.rows


def choose_tile(contraction: Contraction, sizes: Sizes, device: Device) -> MatrixTile | None:
    """None where the device has no such instructions, or they do not suit the product."""
    if not device.has_simdgroup_matrix or operand_type(contraction) not in ("float32", "float16"):
        return None
    return choose(matrix_tiles(SIMDGROUP, device), sizes, device) if sizes.suits_matrices else None


class SimdgroupProduct(MatrixProduct):
    """By matrices that a SIMD group holds as a whole."""

    def __init__(
        self, contraction: Contraction, epilogue: Epilogue, tile: MatrixTile, thread: Thread, device: Device
    ) -> None:
        super().__init__(contraction, epilogue, tile, thread, device)
        self.sums = _Matrices(tile.matrices_y * tile.matrices_x, ACCUMULATOR)
        self.row_matrices = _Matrices(tile.matrices_y, self.dtype)
        self.column_matrices = _Matrices(tile.matrices_x, self.dtype)

    def accumulate(self, batch: Bound, first_row: Expr, first_column: Expr) -> None:
        self.sums.clear()
        with T.serial(self.chunks) as chunk:
            self.stage(batch, first_row, first_column, chunk)
            barrier()
            with T.serial(self.depth // SIDE) as step:
                self.multiply_add(step * SIDE)
            barrier()

    def multiply_add(self, step: Expr) -> None:
        """Sums of the SIMD group += its rows times its columns, over as many steps as a matrix has."""
        tile, left, right = self.tile, self.left, self.right
        for i in range(tile.matrices_y):
            self.row_matrices.load(i, left.tile, left.at(step, self.row_of(i)), transposed=not left.by_place)
        for j in range(tile.matrices_x):
            self.column_matrices.load(j, right.tile, right.at(step, self.column_of(j)), transposed=right.by_place)
        for i, j in itertools.product(range(tile.matrices_y), range(tile.matrices_x)):
            self.sums.multiply_add(i * tile.matrices_x + j, self.row_matrices, i, self.column_matrices, j)

    def hand_over(self, first: int) -> None:
        for i, j in itertools.product(range(self.rows_at_once), range(self.tile.matrices_x)):
            place = self.row_of(i), self.column_of(j)
            self.sums.store((first + i) * self.tile.matrices_x + j, self.results, place)

    def column_of(self, matrix: int) -> Expr:
        """Where in the tile a column of matrices of this SIMD group begins."""
        return (matrix * self.tile.groups_x + self.thread.y % self.tile.groups_x) * SIDE


class _Matrices:
    """Matrices that the threads of a SIMD group hold together; all of them take part in every operation."""

    def __init__(self, count: int, dtype: str) -> None:
        self.count, self.dtype = count, dtype
        self.buffer = T.alloc_buffer((count * SIDE * SIDE,), dtype, scope="metal.simdgroup")

    def clear(self) -> None:
        zero = tirx.const(0.0, self.dtype)
        for index in range(self.count):
            _call("make_filled_simdgroup_matrix", self.buffer.data, index, zero, SIDE, SIDE)

    def load(self, index: int, tile: SharedTile, at: tuple[Expr, Expr], *, transposed: bool) -> None:
        """Matrix `index` = the tile from (row, column) on."""
        self._move("simdgroup_load", index, tile, at, transposed)

    def store(self, index: int, tile: SharedTile, at: tuple[Expr, Expr]) -> None:
        self._move("simdgroup_store", index, tile, at, False)

    def _move(self, function: str, index: int, tile: SharedTile, at: tuple[Expr, Expr], transposed: bool) -> None:
        first = tirx.address_of(tile.load(*at))
        _call(function, self.buffer.data, index, first, tile.shape.stride, SIDE, SIDE, transposed)

    def multiply_add(self, index: int, left: _Matrices, i: int, right: _Matrices, j: int) -> None:
        own = self.buffer.data, index
        _call("simdgroup_multiply_accumulate", *own, left.buffer.data, i, right.buffer.data, j, *own)


def _call(function: str, *arguments: Expr) -> None:
    T.evaluate(tirx.call_intrin("void", f"tirx.{function}", *arguments))
