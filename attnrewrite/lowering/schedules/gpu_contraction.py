"""Matrix products and convolutions on a GPU: tiles of both operands in shared memory, a tile of sums per thread.

A contraction (see contraction.py) is a matrix product of M rows, N columns and K reduction steps per batch entry,
whatever the operands' index expressions are: a convolution is one whose left or right side is read through its
window, so that nothing is unfolded in memory. A threadgroup computes one tile of `rows x columns`, threads along x
taking neighbouring columns. Edges are guarded where the operands are staged and where results are stored; staged
elements outside are zero. The element-wise stage that follows is applied to the sums before they are stored.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from attnrewrite.lowering.kernels.gpu_builder import (
    SharedTile,
    TileShape,
    barrier,
    choose,
    every,
    fill,
    load,
    registers,
    store,
    when,
)
from attnrewrite.lowering.schedules.gpu_emit import (
    Bound,
    Device,
    Thread,
    as_type,
    below,
    bind_axes,
    ceil_div,
    count,
    keep,
    launch,
    put,
)
from attnrewrite.lowering.schedules.loops import const
from attnrewrite.lowering.schedules.products import Contraction
from attnrewrite.lowering.schedules.stages import (
    Axis,
    Expr,
    Stage,
    loads_of,
    simplify,
    stride,
    substitute,
    substitute_loads,
)

# Reduction steps staged at a time.
DEPTH = 16

# Fewer rows than this are better off as one reduction per output: there is nothing to share.
MIN_ROWS = 4


@dataclass(frozen=True)
class Tile:
    """Threads along columns (x) and rows (y) of a threadgroup, and sums per thread."""

    threads_x: int
    threads_y: int
    rows_per_thread: int
    columns_per_thread: int

    @property
    def rows(self) -> int:
        return self.threads_y * self.rows_per_thread

    @property
    def columns(self) -> int:
        return self.threads_x * self.columns_per_thread


def choose_tile(batch: int | None, rows: int | None, columns: int | None, device: Device) -> Tile:
    """The tile that finishes first: rounds of threadgroups times the arithmetic and the loads of a thread.

    Unknown extents (None) count as large.
    """

    def cost(tile: Tile) -> float:
        m, n = rows or 4096, columns or 4096
        tiles = (batch or 16) * -(-m // tile.rows) * -(-n // tile.columns)
        at_a_time = device.concurrent * 256 // (tile.threads_x * tile.threads_y)
        r, c = tile.rows_per_thread, tile.columns_per_thread
        return -(-tiles // at_a_time) * (r * c + 2 * (r + c)) * at_a_time * tile.threads_x * tile.threads_y

    shapes = itertools.product((8, 16), (8, 16), (1, 2, 4, 8), (1, 2, 4))
    return min((Tile(x, y, r, c) for x, y, r, c in shapes), key=cost)


def worth_tiling(contraction: Contraction) -> bool:
    """Enough rows that a staged column is used several times."""
    rows = count(contraction.rows)
    return not isinstance(rows, int) or rows >= MIN_ROWS


def emit_contraction(contraction: Contraction, epilogue: Stage | None, device: Device) -> None:
    """One kernel launch: the product, and the element-wise stage that consumes it, if any."""
    extents = [count(axes) for axes in (contraction.batch, contraction.rows, contraction.columns)]
    batch, rows, columns = extents
    tile = choose_tile(_if_known(batch), _if_known(rows), _if_known(columns), device)
    row_tiles, column_tiles = ceil_div(rows, tile.rows), ceil_div(columns, tile.columns)
    blocks = simplify(const(1) * batch * row_tiles * column_tiles)
    with launch(blocks, (tile.threads_x, tile.threads_y)) as thread:
        grid = [
            Axis(tirx.Var(n, "int64"), const(1) * e) for n, e in (("b", batch), ("i", row_tiles), ("j", column_tiles))
        ]
        at = list(bind_axes(grid, thread.block).values())
        _Product(contraction, epilogue, device, tile, thread).emit(*at)


def _if_known(extent: Expr) -> int | None:
    return extent if isinstance(extent, int) else None


class _Product:
    """The statements of one threadgroup; open only inside its launch."""

    def __init__(
        self, contraction: Contraction, epilogue: Stage | None, device: Device, tile: Tile, thread: Thread
    ) -> None:
        self.contraction, self.epilogue, self.device = contraction, epilogue, device
        self.tile, self.thread = tile, thread
        self.rows, self.columns = count(contraction.rows), count(contraction.columns)
        self.depth = count(contraction.stage.reduction)
        dtype = contraction.dtype
        left = TileShape(tile.rows, DEPTH, _operand_type(contraction.left, dtype))
        right = TileShape(DEPTH, tile.columns, _operand_type(contraction.right, dtype))
        self.left, self.right = SharedTile(left), SharedTile(right)
        self.sums = registers(tile.rows_per_thread * tile.columns_per_thread, dtype)
        self.row_values = registers(tile.rows_per_thread, dtype)
        self.column_values = registers(tile.columns_per_thread, dtype)

    def emit(self, batch_index: Expr, row_tile: Expr, column_tile: Expr) -> None:
        tile = self.tile
        batch = bind_axes(self.contraction.batch, batch_index)
        first_row, first_column = keep(row_tile * tile.rows), keep(column_tile * tile.columns)
        fill(self.sums, tile.rows_per_thread * tile.columns_per_thread, 0.0)
        with T.serial(ceil_div(self.depth, DEPTH)) as chunk:
            first_step = chunk * DEPTH
            self.stage_left(batch, first_row, first_step)
            self.stage_right(batch, first_column, first_step)
            barrier()
            with T.serial(DEPTH) as step:
                self.multiply_add(step)
            barrier()
        self.finish(batch, first_row, first_column)

    def stage_left(self, batch: Bound, first_row: Expr, first_step: Expr) -> None:
        contraction = self.contraction
        by_row = _runs_along(contraction.left, contraction.rows, contraction.stage.reduction)
        with self.deal(self.tile.rows, DEPTH, first_is_fast=by_row) as (row, step):
            value = self.element(contraction.left, batch, contraction.rows, first_row + row, first_step + step)
            inside = [below(first_row + row, self.rows, self.tile.rows), below(first_step + step, self.depth, DEPTH)]
            self.left.store(row, step, self.or_zero(every(inside), value, self.left.shape.dtype))

    def stage_right(self, batch: Bound, first_column: Expr, first_step: Expr) -> None:
        contraction = self.contraction
        by_step = not _runs_along(contraction.right, contraction.columns, contraction.stage.reduction)
        with self.deal(DEPTH, self.tile.columns, first_is_fast=by_step) as (step, column):
            value = self.element(
                contraction.right, batch, contraction.columns, first_column + column, first_step + step
            )
            inside = [
                below(first_column + column, self.columns, self.tile.columns),
                below(first_step + step, self.depth, DEPTH),
            ]
            self.right.store(step, column, self.or_zero(every(inside), value, self.right.shape.dtype))

    @contextmanager
    def deal(self, first: int, second: int, first_is_fast: bool) -> Iterator[tuple[Expr, Expr]]:
        """Positions of a first x second tile, dealt over all threads inside a loop; neighbours along the fast one."""
        threads = self.thread.size[0] * self.thread.size[1]
        total = first * second
        with T.serial(-(-total // threads)) as round_:
            flat = keep(round_ * threads + self.thread.index)
            with when(below(flat, total, threads)):
                fast = first if first_is_fast else second
                outer, inner = keep(tirx.floordiv(flat, fast)), keep(tirx.floormod(flat, fast))
                yield (inner, outer) if first_is_fast else (outer, inner)

    def element(self, value: Expr, batch: Bound, axes: Sequence[Axis], place: Expr, step: Expr) -> Expr:
        """An operand at a position along rows or columns and a step of the reduction."""
        contraction = self.contraction
        at = {**batch, **bind_axes(axes, place), **bind_axes(contraction.stage.reduction, step)}
        return substitute(substitute(value, contraction.split), at)

    def or_zero(self, inside: Expr | bool, value: Expr, dtype: str) -> Expr:
        return choose(inside, as_type(value, dtype), tirx.const(0.0, dtype))

    def multiply_add(self, step: Expr) -> None:
        tile, thread, dtype = self.tile, self.thread, self.contraction.dtype
        for i in range(tile.rows_per_thread):
            row = thread.y * tile.rows_per_thread + i
            store(self.row_values, [i], as_type(self.left.load(row, step), dtype))
        for j in range(tile.columns_per_thread):
            column = thread.x + tile.threads_x * j
            store(self.column_values, [j], as_type(self.right.load(step, column), dtype))
        for i, j in itertools.product(range(tile.rows_per_thread), range(tile.columns_per_thread)):
            at = i * tile.columns_per_thread + j
            store(self.sums, [at], self.sums[at] + self.row_values[i] * self.column_values[j])

    def finish(self, batch: Bound, first_row: Expr, first_column: Expr) -> None:
        """Store the sums, through the epilogue, where they lie inside the output."""
        tile, contraction = self.tile, self.contraction
        for i in range(tile.rows_per_thread):
            row = keep(first_row + self.thread.y * tile.rows_per_thread + i)
            with when(below(row, self.rows, tile.rows)):
                row_at = bind_axes(contraction.rows, row)
                for j in range(tile.columns_per_thread):
                    column = keep(first_column + self.thread.x + tile.threads_x * j)
                    with when(below(column, self.columns, tile.columns)):
                        column_at = bind_axes(contraction.columns, column)
                        at = i * tile.columns_per_thread + j
                        self.store_result({**batch, **row_at, **column_at}, load(self.sums, [at]))

    def store_result(self, at: Bound, result: Expr) -> None:
        contraction, epilogue = self.contraction, self.epilogue
        own = {**at, **{var: substitute(value, at) for var, value in contraction.split.items()}}
        stage = contraction.stage
        indices = [own[axis.var] for axis in stage.axes]
        if epilogue is None:
            put(self.device, stage.buffer, indices, result)
            return
        computed = replace(stage, value=as_type(result, str(stage.buffer.dtype)), reduction=())
        value = substitute_loads(epilogue.value, computed)
        value = substitute(value, dict(zip(epilogue.indices, indices, strict=True)))
        put(self.device, epilogue.buffer, indices, value)


def _operand_type(value: Expr, accumulator: str) -> str:
    """Staged operands keep their own type where it is a smaller float."""
    dtype = str(value.ty.dtype)
    return dtype if dtype == "float16" else accumulator


def _runs_along(value: Expr, axes: Sequence[Axis], reduction: Sequence[Axis]) -> bool:
    """The operand's memory runs along `axes` rather than along the reduction."""
    operand = loads_of(value)[0]
    if reduction and stride(operand, reduction[-1].var) == 1 and reduction[-1].size != 1:
        return any(axis.size != 1 and stride(operand, axis.var) == 1 for axis in axes[-1:])
    return True
