"""Matrix products and convolutions on a GPU: tiles of both operands in shared memory, tiles of sums in registers.

A contraction (see products.py) is a matrix product of M rows, N columns and K reduction steps per batch entry,
whatever the operands' index expressions are: a convolution is one whose left or right side is read through its
window, so that nothing is unfolded in memory. A threadgroup computes one tile of `rows x columns`; both operands are
staged step by step (gpu_operands.py). Edges are guarded where the operands are staged and where results are stored.
The element-wise stage that follows is applied to the sums before they are stored (gpu_epilogue.py).

Sums are of single multiply-adds here, with operands staged in single precision: a thread has four neighbouring rows
and columns at a time, and reads them as vectors. By matrix units, where a device has them: gpu_matrices.py.
"""

from __future__ import annotations

import itertools
from typing import Any

from tvm import DataType, tirx
from tvm.tirx.script.builder import ir as T

from attnrewrite.lowering.kernels.gpu_builder import barrier, fill, load, registers, store, when
from attnrewrite.lowering.schedules import gpu_simdgroup, gpu_tensor_core
from attnrewrite.lowering.schedules.gpu_emit import (
    Bound,
    Device,
    Thread,
    below,
    bind_axes,
    ceil_div,
    count,
    keep,
    launch,
)
from attnrewrite.lowering.schedules.gpu_epilogue import Epilogue
from attnrewrite.lowering.schedules.gpu_matrices import operand_type
from attnrewrite.lowering.schedules.gpu_operands import StagedOperand, read_operand
from attnrewrite.lowering.schedules.gpu_tiles import Sizes, ThreadTile, Tile, choose, thread_tiles
from attnrewrite.lowering.schedules.gpu_vectors import LANES
from attnrewrite.lowering.schedules.loops import const
from attnrewrite.lowering.schedules.products import Contraction
from attnrewrite.lowering.schedules.stages import Axis, Expr, Stage, simplify

# Reduction steps staged at a time.
DEPTH = 16

# Fewer rows than this are better off as one reduction per output: there is nothing to share.
MIN_ROWS = 4


def worth_tiling(contraction: Contraction) -> bool:
    """Enough rows that a staged column is used several times."""
    rows = count(contraction.rows)
    return not isinstance(rows, int) or rows >= MIN_ROWS


def emit_contraction(contraction: Contraction, epilogue: Stage | None, device: Device) -> None:
    """One kernel launch: the product, and the element-wise stage that consumes it, if any."""
    batch, rows, columns = (count(axes) for axes in (contraction.batch, contraction.rows, contraction.columns))
    depth = count(contraction.stage.reduction)
    element_bytes = DataType(operand_type(contraction) or contraction.dtype).itemsize
    sizes = Sizes(_known(batch), _known(rows), _known(columns), _known(depth), element_bytes)
    tile, product = _choose(contraction, sizes, device)
    row_tiles, column_tiles = ceil_div(rows, tile.rows), ceil_div(columns, tile.columns)
    with launch(simplify(const(1) * batch * row_tiles * column_tiles), tile.launch_size) as thread:
        grid = [
            Axis(tirx.Var(n, "int64"), const(1) * e) for n, e in (("b", batch), ("i", row_tiles), ("j", column_tiles))
        ]
        batch_index, row_tile, column_tile = bind_axes(grid, thread.block).values()
        corner = bind_axes(contraction.batch, batch_index), keep(row_tile * tile.rows), keep(column_tile * tile.columns)
        stored = Epilogue(contraction, epilogue, device)
        product(contraction, stored, tile, thread, device).emit(*corner)


def _known(extent: Expr) -> int | None:
    return extent if isinstance(extent, int) else None


def _choose(contraction: Contraction, sizes: Sizes, device: Device) -> tuple[Tile, Any]:
    """The tile of a threadgroup, and the class whose statements compute it: of matrix units where there are any that
    suit the product.
    """
    if (tile := gpu_simdgroup.choose_tile(contraction, sizes, device)) is not None:
        return tile, gpu_simdgroup.SimdgroupProduct
    if (tile := gpu_tensor_core.choose_tile(contraction, sizes, device)) is not None:
        return tile, gpu_tensor_core.TensorCoreProduct
    return choose(thread_tiles(), sizes, device), _ThreadProduct


class _ThreadProduct:
    """The statements of one threadgroup; open only inside its launch."""

    def __init__(
        self, contraction: Contraction, epilogue: Epilogue, tile: ThreadTile, thread: Thread, device: Device
    ) -> None:
        self.contraction, self.epilogue, self.tile, self.thread = contraction, epilogue, tile, thread
        dtype = contraction.dtype
        left = read_operand(contraction, contraction.left, contraction.rows)
        right = read_operand(contraction, contraction.right, contraction.columns)
        self.left = StagedOperand(thread, left, DEPTH, tile.rows, dtype)
        self.right = StagedOperand(thread, right, DEPTH, tile.columns, dtype)
        self.sums = registers(tile.rows_per_thread * tile.columns_per_thread, dtype)
        self.row_values = registers(tile.rows_per_thread, dtype)
        self.column_values = registers(tile.columns_per_thread, dtype)

    def emit(self, batch: Bound, first_row: Expr, first_column: Expr) -> None:
        tile = self.tile
        fill(self.sums, tile.rows_per_thread * tile.columns_per_thread, 0.0)
        with T.serial(ceil_div(count(self.contraction.stage.reduction), DEPTH)) as chunk:
            self.left.stage(batch, first_row, chunk * DEPTH)
            self.right.stage(batch, first_column, chunk * DEPTH)
            barrier()
            with T.serial(DEPTH) as step:
                self.multiply_add(step)
            barrier()
        self.finish(batch, first_row, first_column)

    def multiply_add(self, step: Expr) -> None:
        tile, thread = self.tile, self.thread
        _load_places(self.left, self.row_values, step, thread.y, tile.threads_y)
        _load_places(self.right, self.column_values, step, thread.x, tile.threads_x)
        for i, j in itertools.product(range(tile.rows_per_thread), range(tile.columns_per_thread)):
            at = i * tile.columns_per_thread + j
            store(self.sums, [at], self.sums[at] + self.row_values[i] * self.column_values[j])

    def finish(self, batch: Bound, first_row: Expr, first_column: Expr) -> None:
        """Store the sums, through the epilogue, where they lie inside the output."""
        tile, contraction = self.tile, self.contraction
        rows, columns = count(contraction.rows), count(contraction.columns)
        lanes = self.epilogue.lanes if tile.columns_per_thread % LANES == 0 else 1
        for j in range(0, tile.columns_per_thread, lanes):
            column = keep(first_column + _place(self.thread.x, j, tile.columns_per_thread, tile.threads_x))
            with when(below(column, columns, tile.columns)):
                at = [bind_axes(contraction.columns, column + lane) for lane in range(lanes)]
                self.epilogue.fetch_columns(at)
                for i in range(tile.rows_per_thread):
                    row = keep(first_row + _place(self.thread.y, i, tile.rows_per_thread, tile.threads_y))
                    with when(below(row, rows, tile.rows)):
                        own = {**batch, **bind_axes(contraction.rows, row)}
                        first = i * tile.columns_per_thread + j
                        sums = [load(self.sums, [first + lane]) for lane in range(lanes)]
                        self.epilogue.store_row([{**own, **a} for a in at], sums)


def _load_places(staged: StagedOperand, target: tirx.Buffer, step: Expr, thread: Expr, threads: int) -> None:
    """target = one step of the tile at the places of this thread."""
    places = int(target.shape[0])
    lanes = min(places, LANES)
    for first in range(0, places, lanes):
        value = staged.tile.load(*staged.at(step, _place(thread, first, places, threads)), lanes)
        store(target, [first if lanes == 1 else tirx.Ramp(first, 1, lanes)], value)


def _place(thread: Expr, index: int, places: int, threads: int) -> Expr:
    """Where along its tile side a thread's `index`-th of `places` lies: four neighbours, then the next four."""
    lanes = min(places, LANES)
    return thread * lanes + (index // lanes * lanes * threads + index % lanes)
