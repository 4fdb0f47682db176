"""Matrix products on CUDA's tensor cores: mma.m16n8k16 on operands of 16 bits, sums in float32.

Copies to shared memory are asynchronous where an operand has runs of at least two elements, and begin `stages - 1`
chunks of the reduction ahead of the one that is being multiplied; single elements are loaded before that chunk is
multiplied, and stored to shared memory after. Fragments and their layout: kernels/tensor_core.py.
"""

from __future__ import annotations

import itertools

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from attnrewrite.lowering.kernels.gpu_builder import TileShape, barrier, fill, load, when
from attnrewrite.lowering.kernels.tensor_core import (
    ELEMENT_TYPES,
    TensorCore,
    at,
    copies_asynchronously,
    has_tensor_cores,
)
from attnrewrite.lowering.schedules.gpu_emit import Bound, Device, Thread, keep
from attnrewrite.lowering.schedules.gpu_epilogue import Epilogue
from attnrewrite.lowering.schedules.gpu_matrices import STAGED_BYTES, MatrixProduct, operand_type
from attnrewrite.lowering.schedules.gpu_operands import StagedOperand
from attnrewrite.lowering.schedules.gpu_tiles import TENSOR_CORE, MatrixTile, Sizes, choose, matrix_tiles
from attnrewrite.lowering.schedules.products import Contraction
from attnrewrite.lowering.schedules.stages import Expr

# Tiles of each operand in shared memory; a thread can wait for all but its last two groups of copies. Where it waits
# for every copy as it makes it, the second one saves a barrier.
MOST_STAGES, STAGES_WITHOUT_COPIES = 4, 2

# Warps along the reduction of a product of few tiles, and the steps from which on it is worth to add their sums.
GROUPS_Z, MIN_DIVIDED = (1, 2, 4), 512

# Words that a thread holds of a fragment of the left and of the right operand, and sums of a matrix of them.
LEFT_WORDS, RIGHT_WORDS, SUMS = 4, 2, 4


def choose_tile(contraction: Contraction, sizes: Sizes, device: Device) -> MatrixTile | None:
    """None where the device has no tensor cores for the operands' type, or they do not suit the product."""
    dtype = operand_type(contraction)
    if dtype not in ELEMENT_TYPES or not has_tensor_cores(device.target, dtype) or not sizes.suits_matrices:
        return None
    groups_z = GROUPS_Z if sizes.depth is None or sizes.depth >= MIN_DIVIDED else (1,)
    tiles = [
        tile
        for tile in matrix_tiles(TENSOR_CORE, device, groups_z)
        # Fragments of the right operand are loaded in pairs; warps share a reduction only where tiles are too few.
        if tile.matrices_x % 2 == 0 and (tile.groups_z == 1 or sizes.tiles(tile) <= device.concurrent)
    ]
    return choose([tile for tile in tiles if _stages(tile, device) > 1], sizes, device)


def _stages(tile: MatrixTile, device: Device) -> int:
    """How many tiles of both operands fit into shared memory, whichever way they lie there."""
    steps = STAGED_BYTES // 2 * tile.groups_z
    sides = ((TileShape(steps, n, "float16"), TileShape(n, steps, "float16")) for n in (tile.rows, tile.columns))
    size = sum(max(shape.size_bytes for shape in shapes) for shapes in sides)
    most = MOST_STAGES if copies_asynchronously(device.target) else STAGES_WITHOUT_COPIES
    return min(most, device.limits.shared_bytes // size)


class TensorCoreProduct(MatrixProduct):
    """By fragments of matrices in each thread's registers."""

    def __init__(
        self, contraction: Contraction, epilogue: Epilogue, tile: MatrixTile, thread: Thread, device: Device
    ) -> None:
        self.stages, dtype = _stages(tile, device), operand_type(contraction)
        self.core = TensorCore(device.intrinsics, str(dtype))
        super().__init__(contraction, epilogue, tile, thread, device, stages=self.stages, copies=self.core)
        self.core.whole(self.memory.buffer)
        self.sums = self.core.sums(SUMS * tile.matrices_y * tile.matrices_x)
        self.left_words = self.core.words(LEFT_WORDS * tile.matrices_y)
        self.right_words = self.core.words(RIGHT_WORDS * tile.matrices_x)

    def accumulate(self, batch: Bound, first_row: Expr, first_column: Expr) -> None:
        tile, ahead = self.tile, self.stages - 1
        fill(self.sums, SUMS * tile.matrices_y * tile.matrices_x, 0.0)
        for chunk in range(ahead):
            with when(tirx.IntImm("int32", chunk) < self.chunks):
                self.stage(batch, first_row, first_column, tirx.IntImm("int32", chunk), chunk)
            self.core.commit()
        with T.serial(self.chunks) as chunk:
            self.core.wait(ahead - 1)
            barrier()  # this chunk is here, and the one before it is done with
            coming = keep(chunk + ahead)
            with when(coming < self.chunks):
                self.fetch(batch, first_row, first_column, coming)
            self.core.commit()
            with T.serial(self.steps // TENSOR_CORE.steps) as step:
                self.multiply_add(self.group_z * self.steps + step * TENSOR_CORE.steps, chunk % self.stages)
            with when(coming < self.chunks):
                self.left.put_fetched(coming % self.stages)
                self.right.put_fetched(coming % self.stages)
        self.core.wait(0)
        barrier()

    def fetch(self, batch: Bound, first_row: Expr, first_column: Expr, chunk: Expr) -> None:
        """Begins to copy both operands' tiles of a chunk; the loads of one do not wait for stores of the other."""
        stage = chunk % self.stages
        self.left.fetch(batch, first_row, chunk * self.depth, stage)
        self.right.fetch(batch, first_column, chunk * self.depth, stage)

    def multiply_add(self, step: Expr, stage: Expr) -> None:
        """Sums of the warp += its rows times its columns, over the steps of one instruction."""
        tile = self.tile
        for i in range(tile.matrices_y):
            # Matrices of 8 x 8: two along the rows, then two along the steps.
            self.load_words(self.left_words, LEFT_WORDS * i, self.left, step, stage, self.row_of(i), rows_first=True)
        for j in range(0, tile.matrices_x, 2):
            # Two along the steps, for each of two fragments.
            first = RIGHT_WORDS * j
            self.load_words(self.right_words, first, self.right, step, stage, self.column_of(j), rows_first=False)
        for i, j in itertools.product(range(tile.matrices_y), range(tile.matrices_x)):
            sums = at(self.sums, SUMS * (i * tile.matrices_x + j))
            self.core.mma(sums, at(self.left_words, LEFT_WORDS * i), at(self.right_words, RIGHT_WORDS * j))

    def load_words(
        self,
        words: tirx.Buffer,
        first: int,
        operand: StagedOperand,
        step: Expr,
        stage: Expr,
        place: Expr,
        *,
        rows_first: bool,
    ) -> None:
        """Four matrices of 16 places by 16 steps in all. rows_first: matrices 0 and 1 are neighbours along places."""
        lane = self.thread.x
        row, low, high = lane % 8, lane // 8 % 2 * 8, lane // 16 * 8
        of_place, of_step = (low, high) if rows_first else (high, low)
        inner = (
            (place + of_place + row, step + of_step) if operand.by_place else (place + of_place, step + of_step + row)
        )
        pointer = tirx.address_of(operand.tile.load(*operand.at(inner[1], inner[0], stage)))
        # A register has neighbours along the reduction, whichever operand it is of.
        self.core.load_matrices(at(words, first), pointer, 4, transposed=not operand.by_place)

    def hand_over(self, first: int) -> None:
        tile, lane = self.tile, self.thread.x
        for i, j in itertools.product(range(self.rows_at_once), range(tile.matrices_x)):
            for half in range(2):
                index = SUMS * ((first + i) * tile.matrices_x + j) + 2 * half
                row, column = self.row_of(i) + lane // 4 + 8 * half, self.column_of(j) + lane % 4 * 2
                row = row + self.group_z * self.height
                self.results.store(row, column, load(self.sums, [tirx.Ramp(index, 1, 2)]), 2)

    def column_of(self, matrix: int) -> Expr:
        """Where in the tile a column of matrices of this warp begins: pairs of them are neighbours."""
        pair = (matrix // 2 * self.tile.groups_x + self.thread.y % self.tile.groups_x) * 2 + matrix % 2
        return pair * TENSOR_CORE.columns
