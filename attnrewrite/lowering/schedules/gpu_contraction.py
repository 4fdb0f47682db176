"""Matrix products and convolutions on a GPU: tiles of both operands in shared memory, a tile of sums per thread.

A contraction (see products.py) is a matrix product of M rows, N columns and K reduction steps per batch entry,
whatever the operands' index expressions are: a convolution is one whose left or right side is read through its
window, so that nothing is unfolded in memory. A threadgroup computes one tile of `rows x columns`; both operands are
staged step by step, as single precision where the operands are half, four elements per load wherever four neighbours
in memory are neighbours in the product (gpu_vectors.py). A thread has four neighbouring rows and columns at a time,
and reads them as vectors. Edges are guarded where the operands are staged and where results are stored; staged
elements outside are zero. The element-wise stage that follows is applied to the sums before they are stored.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import tvm_ffi
from tvm import ir, tirx
from tvm.tirx.script.builder import ir as T

from attnrewrite.lowering.kernels.gpu_builder import (
    Flat,
    SharedTile,
    TileShape,
    barrier,
    choose,
    every,
    fill,
    load,
    registers,
    store,
    typed,
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
from attnrewrite.lowering.schedules.gpu_parts import IF_THEN_ELSE
from attnrewrite.lowering.schedules.gpu_vectors import LANES, address, runs_in_lanes
from attnrewrite.lowering.schedules.loops import const
from attnrewrite.lowering.schedules.products import Contraction
from attnrewrite.lowering.schedules.stages import (
    Axis,
    Expr,
    Stage,
    calls,
    is_load,
    loads_of,
    simplify,
    stride,
    substitute,
    substitute_loads,
    variables,
)

# Reduction steps staged at a time.
DEPTH = 16

# Fewer rows than this are better off as one reduction per output: there is nothing to share.
MIN_ROWS = 4

# Reading operands again for every tile may cost so many times what reading each of them once does.
MOST_TRAFFIC = 4

# Multiply-adds that a GPU does while it moves one element from the cache that tiles of one product share.
PER_ELEMENT = 16


@dataclass(frozen=True)
class Tile:
    """Threads along columns (x) and rows (y) of a threadgroup, and sums per thread: groups of up to four neighbours,
    the groups of one thread as far apart as those of all threads reach.
    """

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

    def moved(self, rows: int, columns: int) -> int:
        """Elements per reduction step that one product of these sizes reads."""
        return -(-columns // self.columns) * rows + -(-rows // self.rows) * columns


def choose_tile(batch: int | None, rows: int | None, columns: int | None, depth: int | None, *, device: Device) -> Tile:
    """The tile that finishes first: rounds of threadgroups times the arithmetic and the loads of a thread, and what
    reading operands again takes. It keeps to MOST_TRAFFIC wherever some tile does.

    Unknown extents (None) count as large.
    """
    m, n, k, images = rows or 4096, columns or 4096, depth or 1024, batch or 16

    def cost(tile: Tile) -> float:
        tiles = images * -(-m // tile.rows) * -(-n // tile.columns)
        at_a_time = device.concurrent * 256 // (tile.threads_x * tile.threads_y)
        r, c = tile.rows_per_thread, tile.columns_per_thread
        arithmetic = -(-tiles // at_a_time) * (r * c + r + c + 4) * at_a_time * tile.threads_x * tile.threads_y
        return arithmetic + PER_ELEMENT * images * tile.moved(m, n)

    def traffic(tile: Tile) -> float:
        return (k * tile.moved(m, n) + m * n) / (k * (m + n) + m * n)

    shapes = itertools.product((8, 16), (8, 16), (1, 2, 4, 8), (1, 2, 4, 8))
    tiles = [Tile(x, y, r, c) for x, y, r, c in shapes]
    frugal = [tile for tile in tiles if traffic(tile) <= MOST_TRAFFIC]
    return min(frugal or tiles, key=cost)


def worth_tiling(contraction: Contraction) -> bool:
    """Enough rows that a staged column is used several times."""
    rows = count(contraction.rows)
    return not isinstance(rows, int) or rows >= MIN_ROWS


def emit_contraction(contraction: Contraction, epilogue: Stage | None, device: Device) -> None:
    """One kernel launch: the product, and the element-wise stage that consumes it, if any."""
    extents = [count(axes) for axes in (contraction.batch, contraction.rows, contraction.columns)]
    batch, rows, columns = extents
    tile = choose_tile(*map(_known, (*extents, count(contraction.stage.reduction))), device=device)
    row_tiles, column_tiles = ceil_div(rows, tile.rows), ceil_div(columns, tile.columns)
    blocks = simplify(const(1) * batch * row_tiles * column_tiles)
    with launch(blocks, (tile.threads_x, tile.threads_y)) as thread:
        grid = [
            Axis(tirx.Var(n, "int64"), const(1) * e) for n, e in (("b", batch), ("i", row_tiles), ("j", column_tiles))
        ]
        at = list(bind_axes(grid, thread.block).values())
        _Product(contraction, epilogue, device, tile, thread).emit(*at)


def _known(extent: Expr) -> int | None:
    return extent if isinstance(extent, int) else None


@dataclass(frozen=True)
class _Operand:
    """One side of the product: `value` at a place along `axes` (rows or columns) and a step of the reduction.

    lanes: how many neighbours are loaded at once, along the axes or, with along_steps, along the reduction.
    """

    value: Expr
    axes: tuple[Axis, ...]
    tile: SharedTile
    extent: Expr
    along_steps: bool
    lanes: int


@dataclass(frozen=True)
class _Read:
    """What an epilogue reads, at `indices` in the axes of the product, and the registers of a run of columns for it."""

    source: tirx.Buffer
    indices: tuple[Expr, ...]
    held: tirx.Buffer
    of_columns: bool  # the same for all rows


class _Product:
    """The statements of one threadgroup; open only inside its launch."""

    def __init__(
        self, contraction: Contraction, epilogue: Stage | None, device: Device, tile: Tile, thread: Thread
    ) -> None:
        self.contraction, self.device, self.output = contraction, device, epilogue or contraction.stage
        self.tile, self.thread, self.dtype = tile, thread, contraction.dtype
        self.depth = count(contraction.stage.reduction)
        self.left = self.operand(contraction.left, contraction.rows, tile.rows)
        self.right = self.operand(contraction.right, contraction.columns, tile.columns)
        self.sums = registers(tile.rows_per_thread * tile.columns_per_thread, self.dtype)
        self.row_values = registers(tile.rows_per_thread, self.dtype)
        self.column_values = registers(tile.columns_per_thread, self.dtype)
        self.run = registers(LANES, self.dtype)
        self.results = registers(LANES, str(self.output.buffer.dtype))
        self.lane = tirx.Var("lane", "int64")
        self.epilogue, self.reads = self.read_ahead(epilogue)

    def operand(self, value: Expr, axes: tuple[Axis, ...], places: int) -> _Operand:
        contraction = self.contraction
        value = substitute(value, contraction.split)
        tile = SharedTile(TileShape(DEPTH, places, self.dtype), lanes=(1, 2, LANES))
        reduction = contraction.stage.reduction
        for along, along_steps in ((reduction, True), (axes, False)):
            if is_load(value) and places % LANES == 0 and runs_in_lanes(value.source, value.indices, along):
                return _Operand(value, axes, tile, count(axes), along_steps, LANES)
        return _Operand(value, axes, tile, count(axes), not _runs_along(value, axes, reduction), 1)

    def emit(self, batch_index: Expr, row_tile: Expr, column_tile: Expr) -> None:
        tile = self.tile
        batch = bind_axes(self.contraction.batch, batch_index)
        first_row, first_column = keep(row_tile * tile.rows), keep(column_tile * tile.columns)
        fill(self.sums, tile.rows_per_thread * tile.columns_per_thread, 0.0)
        with T.serial(ceil_div(self.depth, DEPTH)) as chunk:
            self.stage(self.left, batch, first_row, chunk * DEPTH)
            self.stage(self.right, batch, first_column, chunk * DEPTH)
            barrier()
            with T.serial(DEPTH) as step:
                self.multiply_add(step)
            barrier()
        self.finish(batch, first_row, first_column)

    def stage(self, operand: _Operand, batch: Bound, first: Expr, first_step: Expr) -> None:
        """tile[step, place] = the operand, dealt over all threads, neighbouring threads along its memory."""
        places, lanes = operand.tile.shape.columns, operand.lanes
        threads = self.thread.size[0] * self.thread.size[1]
        fast = DEPTH if operand.along_steps else places
        total = DEPTH * places // lanes
        with T.serial(-(-total // threads)) as round_:
            flat = keep(round_ * threads + self.thread.index)
            with when(below(flat, total, threads)):
                outer, inner = (
                    keep(tirx.floordiv(flat, fast // lanes)),
                    keep(tirx.floormod(flat, fast // lanes) * lanes),
                )
                step, place = (inner, outer) if operand.along_steps else (outer, inner)
                at = {
                    **batch,
                    **bind_axes(operand.axes, first + place),
                    **bind_axes(self.contraction.stage.reduction, first_step + step),
                }
                inside = every(
                    [below(first + place, operand.extent, places), below(first_step + step, self.depth, DEPTH)]
                )
                self.put_staged(operand, substitute(operand.value, at), inside, step, place)

    def put_staged(self, operand: _Operand, value: Expr, inside: Expr | bool, step: Expr, place: Expr) -> None:
        """The element at a place and step, or four from there on; zero where it is not inside."""
        tile, lanes, zero = operand.tile, operand.lanes, tirx.const(0.0, self.dtype)
        if lanes == 1:
            tile.store(step, place, choose(inside, as_type(value, self.dtype), zero))
            return
        run = typed(Flat(value.source, lanes).load(address(value.source, value.indices)), self.dtype, lanes)
        run = choose(inside, run, tirx.Broadcast(zero, lanes))
        if not operand.along_steps:
            tile.store(step, place, run, lanes)
            return
        store(self.run, [tirx.Ramp(0, 1, lanes)], run)
        for lane in range(lanes):
            tile.store(step + lane, place, load(self.run, [lane]))

    def multiply_add(self, step: Expr) -> None:
        tile, thread = self.tile, self.thread
        self.load_places(self.left, self.row_values, step, thread.y, tile.threads_y)
        self.load_places(self.right, self.column_values, step, thread.x, tile.threads_x)
        for i, j in itertools.product(range(tile.rows_per_thread), range(tile.columns_per_thread)):
            at = i * tile.columns_per_thread + j
            store(self.sums, [at], self.sums[at] + self.row_values[i] * self.column_values[j])

    def load_places(self, operand: _Operand, target: tirx.Buffer, step: Expr, thread: Expr, threads: int) -> None:
        """target = one step of the tile at the places of this thread."""
        places = int(target.shape[0])
        lanes = min(places, LANES)
        for first in range(0, places, lanes):
            value = operand.tile.load(step, _place(thread, first, places, threads), lanes)
            store(target, [first if lanes == 1 else tirx.Ramp(first, 1, lanes)], value)

    def finish(self, batch: Bound, first_row: Expr, first_column: Expr) -> None:
        """Store the sums, through the epilogue, where they lie inside the output."""
        tile, contraction, buffer = self.tile, self.contraction, self.output.buffer
        rows, columns = count(contraction.rows), count(contraction.columns)
        lanes = min(tile.columns_per_thread, LANES)
        if lanes < LANES or not runs_in_lanes(buffer, self.output_indices({}), contraction.columns):
            lanes = 1
        for j in range(0, tile.columns_per_thread, lanes):
            column = keep(first_column + _place(self.thread.x, j, tile.columns_per_thread, tile.threads_x))
            with when(below(column, columns, tile.columns)):
                at = [bind_axes(contraction.columns, column + lane) for lane in range(lanes)]
                self.fetch([read for read in self.reads if read.of_columns], at)
                for i in range(tile.rows_per_thread):
                    row = keep(first_row + _place(self.thread.y, i, tile.rows_per_thread, tile.threads_y))
                    with when(below(row, rows, tile.rows)):
                        own = {**batch, **bind_axes(contraction.rows, row)}
                        self.store_results([{**own, **a} for a in at], i * tile.columns_per_thread + j)

    def store_results(self, at: Sequence[Bound], first_sum: int) -> None:
        """The outputs of one row at neighbouring columns."""
        buffer, lanes = self.output.buffer, len(at)
        self.fetch([read for read in self.reads if not read.of_columns], at)
        if lanes == 1:
            put(self.device, buffer, self.output_indices(at[0]), self.result(at[0], 0, load(self.sums, [first_sum])))
            return
        for lane in range(lanes):
            put(self.device, self.results, [lane], self.result(at[lane], lane, load(self.sums, [first_sum + lane])))
        place = simplify(address(buffer, self.output_indices(at[0])))
        Flat(buffer, lanes).store(place, load(self.results, [tirx.Ramp(0, 1, lanes)]))

    def fetch(self, reads: Sequence[_Read], at: Sequence[Bound]) -> None:
        """What the epilogue reads at neighbouring columns, into registers."""
        for read in reads:
            places = [[substitute(index, bound) for index in read.indices] for bound in at]
            if len(at) == LANES and runs_in_lanes(read.source, read.indices, self.contraction.columns):
                run = Flat(read.source, LANES).load(simplify(address(read.source, places[0])))
                store(read.held, [tirx.Ramp(0, 1, LANES)], run)
            else:
                for lane, place in enumerate(places):
                    store(read.held, [lane], load(read.source, [simplify(index) for index in place]))

    def read_ahead(self, epilogue: Stage | None) -> tuple[Stage | None, list[_Read]]:
        """The epilogue with what it reads besides the sums in registers, per lane; as it is where it reads on
        condition, or where to read from memory.
        """
        if epilogue is None:
            return None, []
        conditional = IF_THEN_ELSE in calls(epilogue.value)
        if conditional or any(loads_of(index) for read in loads_of(epilogue.value) for index in read.indices):
            return epilogue, []
        reads: list[_Read] = []
        own = dict(zip(epilogue.indices, self.output_indices({}), strict=True))
        columns = {axis.var for axis in self.contraction.columns}

        def replaced(read: ir.TensorLoad) -> ir.TensorLoad:
            if read.source.same_as(self.contraction.stage.buffer):
                return read
            indices = tuple(substitute(index, own) for index in read.indices)
            of_columns = all(variables(index) <= columns for index in indices)
            held = registers(LANES, str(read.source.dtype))
            reads.append(_Read(read.source, indices, held, of_columns))
            return load(held, [self.lane])

        value = tvm_ffi.structural_map(epilogue.value, (ir.TensorLoad, replaced), order="post")
        return replace(epilogue, value=value), reads

    def output_indices(self, at: Bound) -> list[Expr]:
        """Where in the output the sum at a position of the product goes."""
        own = {**at, **{var: substitute(value, at) for var, value in self.contraction.split.items()}}
        return [own.get(axis.var, axis.var) for axis in self.contraction.stage.axes]

    def result(self, at: Bound, lane: int, sum_: Expr) -> Expr:
        """What is stored for a sum."""
        stage, epilogue = self.contraction.stage, self.epilogue
        if epilogue is None:
            return sum_
        computed = replace(stage, value=as_type(sum_, str(stage.buffer.dtype)), reduction=())
        value = substitute_loads(epilogue.value, computed)
        indices = dict(zip(epilogue.indices, self.output_indices(at), strict=True))
        return substitute(value, {**indices, self.lane: const(lane)})


def _place(thread: Expr, index: int, places: int, threads: int) -> Expr:
    """Where along its tile side a thread's `index`-th of `places` lies: four neighbours, then the next four."""
    lanes = min(places, LANES)
    return thread * lanes + (index // lanes * lanes * threads + index % lanes)


def _runs_along(value: Expr, axes: Sequence[Axis], reduction: Sequence[Axis]) -> bool:
    """The operand's memory runs along `axes` rather than along the reduction."""
    operand = loads_of(value)[0]
    if reduction and stride(operand, reduction[-1].var) == 1 and reduction[-1].size != 1:
        return any(axis.size != 1 and stride(operand, axis.var) == 1 for axis in axes[-1:])
    return True
