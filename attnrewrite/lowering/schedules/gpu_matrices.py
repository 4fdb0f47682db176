"""Matrix products by the matrix instructions of a SIMD group: what Metal's and CUDA's have in common.

Operands are staged in their own precision, in rows of steps or of places as in their own memory: an instruction's
operands are transposed when they are loaded from there. Sums are float32. They pass through the operands' memory, so
that each thread has runs of columns to apply the epilogue to and store.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from functools import reduce
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
from attnrewrite.lowering.kernels.tensor_core import TensorCore
from attnrewrite.lowering.schedules.gpu_emit import Bound, Device, Thread, below, bind_axes, ceil_div, count, keep
from attnrewrite.lowering.schedules.gpu_epilogue import Epilogue
from attnrewrite.lowering.schedules.gpu_operands import (
    Operand,
    StagedOperand,
    lanes_of_word,
    read_operand,
    staged_bytes,
)
from attnrewrite.lowering.schedules.gpu_tiles import MatrixTile
from attnrewrite.lowering.schedules.gpu_vectors import LANES
from attnrewrite.lowering.schedules.products import Contraction
from attnrewrite.lowering.schedules.stages import Expr

# Bytes of a place that are staged at a time.
STAGED_BYTES = 64


def operand_type(contraction: Contraction) -> str | None:
    """float16 or bfloat16 where both operands are that; otherwise float32, or None where one has another type."""
    found = {str(side.ty.dtype) for side in (contraction.left, contraction.right)}
    if contraction.dtype != ACCUMULATOR or not found <= {"float32", "float16", "bfloat16"}:
        return None
    return found.pop() if len(found) == 1 else ACCUMULATOR


class MatrixProduct:
    """The statements of one threadgroup; open only inside its launch. A subclass multiplies (`accumulate`) and writes
    matrices of sums to shared memory (`hand_over`).

    stages: how many tiles of each operand there are in shared memory. copies: by which they are copied asynchronously.
    """

    def __init__(
        self,
        contraction: Contraction,
        epilogue: Epilogue,
        tile: MatrixTile,
        thread: Thread,
        device: Device,
        *,
        stages: int = 1,
        copies: TensorCore | None = None,
    ) -> None:
        self.contraction, self.epilogue, self.tile, self.thread = contraction, epilogue, tile, thread
        self.dtype = operand_type(contraction) or ACCUMULATOR
        word = lanes_of_word(self.dtype)
        self.steps = STAGED_BYTES // 16 * word
        self.depth = self.steps * tile.groups_z
        self.chunks = ceil_div(count(contraction.stage.reduction), self.depth)
        left = read_operand(contraction, contraction.left, contraction.rows, word)
        right = read_operand(contraction, contraction.right, contraction.columns, word)
        left_bytes = stages * staged_bytes(left, self.depth, tile.rows, self.dtype)
        operand_bytes = left_bytes + stages * staged_bytes(right, self.depth, tile.columns, self.dtype)
        self.rows_at_once = self._rows_at_once(max(operand_bytes, device.limits.shared_bytes // 2))
        self.height = self.rows_at_once * tile.groups_y * tile.unit.rows
        results = TileShape(self.height * tile.groups_z, tile.columns)
        self.memory = SharedMemory(max(operand_bytes, results.size_bytes))

        def staged(operand: Operand, places: int, first_byte: int) -> StagedOperand:
            size = (self.depth, places, self.dtype)
            memory = self.memory
            return StagedOperand(
                thread,
                operand,
                *size,
                by_place=True,
                memory=memory,
                first_byte=first_byte,
                stages=stages,
                copies=copies,
            )

        self.left, self.right = staged(left, tile.rows, 0), staged(right, tile.columns, left_bytes)
        self.results = SharedTile(results, self.memory, lanes=(1, 2, LANES))
        self.run = registers(LANES)

    def accumulate(self, batch: Bound, first_row: Expr, first_column: Expr) -> None:
        """Sums = the product's tile; the last thing it does is a barrier."""
        raise NotImplementedError

    def hand_over(self, first: int) -> None:
        """Writes `rows_at_once` rows of matrices of every SIMD group, from `first` on, to `results`: `height` rows of
        them for all groups along rows, and as many once more for each of the next groups along the steps.
        """
        raise NotImplementedError

    def emit(self, batch: Bound, first_row: Expr, first_column: Expr) -> None:
        self.accumulate(batch, first_row, first_column)
        self.finish(batch, first_row, first_column)

    def stage(self, batch: Bound, first_row: Expr, first_column: Expr, chunk: Expr, stage: Expr | int = 0) -> None:
        """Begins to copy both operands' tiles of a chunk of the reduction."""
        self.left.stage(batch, first_row, chunk * self.depth, stage)
        self.right.stage(batch, first_column, chunk * self.depth, stage)

    def row_of(self, matrix: int) -> Expr:
        """Where in the tile a row of matrices of this SIMD group begins."""
        tile = self.tile
        return (matrix * tile.groups_y + self.thread.y // tile.groups_x % tile.groups_y) * tile.unit.rows

    @property
    def group_z(self) -> Expr:
        """This SIMD group's place along the steps."""
        return self.thread.y // (self.tile.groups_x * self.tile.groups_y)

    def _rows_at_once(self, most_bytes: int) -> int:
        """Rows of matrices of each SIMD group whose sums fit into so much memory."""
        tile = self.tile
        row_bytes = TileShape(tile.groups_z * tile.groups_y * tile.unit.rows, tile.columns).size_bytes
        return max(n for n in range(1, tile.matrices_y + 1) if tile.matrices_y % n == 0 and n * row_bytes <= most_bytes)

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
            row = first_row + first * tile.groups_y * tile.unit.rows
            for lane in range(0, LANES, lanes):
                with when(inside[lane]):
                    if lanes < LANES:
                        self.epilogue.fetch_columns(at[lane : lane + 1])
                    self.store_rows(batch, row, own_column + lane, at[lane : lane + lanes])

    def store_rows(self, batch: Bound, first_row: Expr, column: Expr, at: Sequence[Bound]) -> None:
        """What was handed over, at this thread's neighbouring columns."""
        tile, contraction = self.tile, self.contraction
        height, rows = self.height, count(contraction.rows)
        threads = prod(tile.launch_size) // (tile.columns // LANES)
        with T.serial(ceil_div(height, threads)) as round_:
            own_row = keep(round_ * threads + self.thread.index // (tile.columns // LANES))
            row = keep(first_row + own_row)
            with when(every([below(own_row, height, threads), below(row, rows, tile.rows)])):
                own = {**batch, **bind_axes(contraction.rows, row)}
                lanes = len(at)
                planes = [self.results.load(own_row + z * height, column, lanes) for z in range(tile.groups_z)]
                store(self.run, [0 if lanes == 1 else tirx.Ramp(0, 1, lanes)], reduce(operator.add, planes))
                self.epilogue.store_row([{**own, **a} for a in at], [load(self.run, [lane]) for lane in range(lanes)])
