"""Loops of matrix products and convolutions: a tile of accumulators stays in registers while the reduction runs.

products.py says what is a product and how large its tile is, blocking.py in which order the tiles are computed. The
right operand is read in place where its columns lie side by side in memory, as packed weights do; otherwise a panel of
it is copied next to the tile first, which is what im2col does, one tile at a time.

What follows in the same function element by element (bias, activation, residual) is applied to the tile on its way out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import tvm_ffi
from tvm import ir, tirx

from attnrewrite.lowering import narrow
from attnrewrite.lowering.choices import Choices
from attnrewrite.lowering.kernels.vector_math import VectorUnit
from attnrewrite.lowering.schedules.blocking import CACHE_BYTES, PIECES, Blocks, choose_blocks
from attnrewrite.lowering.schedules.loops import (
    Stmt,
    allocated,
    as_dtype,
    const,
    guarded,
    local,
    loop,
    nest,
    parallel,
    seq,
    store,
    unravel,
    unrolled,
    vectorized,
)
from attnrewrite.lowering.schedules.products import Contraction, Tile, choose_tile, narrowed
from attnrewrite.lowering.schedules.stages import (
    EXPENSIVE,
    Axis,
    Expr,
    Stage,
    calls,
    is_load,
    loads_of,
    product,
    reads,
    same,
    simplify,
    static_size,
    stride,
    substitute,
)

# With as many row tiles, copying a panel once is cheaper than reading its rows, which lie apart, again and again; if
# they lie a power of two apart, they push each other out of the cache.
FEW_TILES = 8


# Bytes of panels copied together.
COPIED_BYTES = 256 * 1024

# Bytes.
CACHE_LINE = 64


@dataclass(frozen=True)
class Stretch:
    """One of `count` consecutive pieces of the reduction, `depth` long."""

    index: Expr
    depth: int
    count: int


def lower_contraction(
    product_stage: Contraction, epilogue: Stage | None, unit: VectorUnit, tuned: Choices | None = None
) -> Stmt:
    """Loops of a matrix product and of the element-wise stage that consumes it, if any."""
    lowering = _Lowering(product_stage, epilogue, unit, tuned or Choices())
    return narrow.with_dot(lowering.lower()) if lowering.pairs else lowering.lower()


class _Lowering:
    """The loops of one contraction. Letters: M rows, N columns, K reduction."""

    def __init__(self, contraction: Contraction, epilogue: Stage | None, unit: VectorUnit, tuned: Choices) -> None:
        self.c = contraction
        self.epilogue = epilogue
        self.m = product(a.extent for a in contraction.rows)
        self.n = product(a.extent for a in contraction.columns)
        self.k = product(a.extent for a in contraction.stage.reduction)
        self.b = product(a.extent for a in contraction.batch)
        m, n = static_size(contraction.rows), static_size(contraction.columns)
        packed = contraction.packed_columns
        choice = tuned.of(contraction.product)
        if packed is not None:
            lanes = min(unit.lanes, packed)
            vectors = packed // lanes
            if choice is not None and choice.vectors != vectors:
                choice = None  # made for another layout of the weights
            rows = choice.rows if choice is not None else choose_tile(m, packed, unit, vectors).rows
            self.tile = Tile(rows, vectors, lanes)
        else:
            fitting = narrowed(unit, n)
            chosen = None if choice is None else Tile(choice.rows, choice.vectors, fitting.lanes)
            self.tile = chosen or choose_tile(m, n, fitting)
        self.rows_outside = None if choice is None else choice.rows_outside
        self.packed = packed is not None
        self.pairs = narrow.dot_operands(contraction.stage.value) is not None
        self.m_tiles = simplify(tirx.ceildiv(self.m, self.tile.rows))
        self.n_tiles = simplify(tirx.ceildiv(self.n, self.tile.columns))
        self.m_divides = m is not None and m % self.tile.rows == 0
        self.n_divides = n is not None and n % self.tile.columns == 0

    @property
    def in_place(self) -> bool:
        """Vectors of `right` are read where they are: packed already, or not often enough to be worth copying."""
        if self.packed:
            return True
        if isinstance(self.m_tiles, tirx.IntImm) and int(self.m_tiles) >= FEW_TILES:
            return False
        inner = self.c.columns[-1]
        return self.n_divides and len(self.c.columns) == 1 and stride(loads_of(self.c.right)[0], inner.var) == 1

    def lower(self) -> Stmt:
        work = simplify(self.b * self.m * self.n * self.k)
        if self.in_place:
            blocks = self.blocks() if self.rows_outside is None else None
            if blocks is not None:
                return self.lower_blocks(blocks, work)
            # Whichever operand is walked through again and again should be the one that stays in the cache.
            panel_bytes = simplify(self.n * self.k * 4)
            rows_outside = isinstance(panel_bytes, tirx.IntImm) and int(panel_bytes) <= CACHE_BYTES
            if self.rows_outside is not None:
                rows_outside = self.rows_outside
            tiles = [self.m_tiles, self.n_tiles] if rows_outside else [self.n_tiles, self.m_tiles]
            alone = isinstance(self.m_tiles, tirx.IntImm) and int(self.m_tiles) == 1
            take_turns = self.packed and not rows_outside and not alone

            def tile(p: Expr) -> Stmt:
                batch, outer, within = unravel(p, [self.b, *tiles])
                i, j = (outer, within) if rows_outside else (within, outer)
                return self.one_tile(self.batch_at(batch), i, j, None, i if take_turns else None)

            return parallel(simplify(self.b * self.m_tiles * self.n_tiles), tile, work)

        width, pieces = self.panels_at_once(), self.row_pieces()
        groups = simplify(tirx.ceildiv(self.n_tiles, width))
        per_piece = simplify(tirx.ceildiv(self.m_tiles, pieces))

        def piece(p: Expr) -> Stmt:
            batch, group, part = unravel(p, [self.b, groups, const(pieces)])
            where = self.batch_at(batch)
            panels = tirx.decl_buffer([const(width), self.k, const(self.tile.columns)], self.c.dtype, "panels")

            def row_tile(g: Expr, t: Expr) -> Stmt:
                i, j = part * per_piece + t, group * width + g
                inside = None if pieces == 1 else i < self.m_tiles
                if width > 1 and not (isinstance(self.n_tiles, tirx.IntImm) and int(self.n_tiles) % width == 0):
                    inside = j < self.n_tiles if inside is None else tirx.And(inside, j < self.n_tiles)
                return guarded(inside, self.one_tile(where, i, j, (panels, g)))

            tiles = loop(width, lambda g: loop(per_piece, lambda t: row_tile(g, t), name="i"), name="g")
            return allocated(panels, self.pack(where, group * width, panels), tiles)

        return parallel(simplify(self.b * groups * pieces), piece, work)

    def blocks(self) -> Blocks | None:
        m, n, k = (static_size(axes) for axes in (self.c.rows, self.c.columns, self.c.stage.reduction))
        if not self.packed or m is None or n is None or k is None:
            return None
        kept = self.epilogue.buffer if self.epilogue is not None else self.c.stage.buffer
        exact = str(kept.dtype) == self.c.dtype and (self.n_divides or self.n_tail_free)
        single = len(self.c.stage.reduction) == 1
        tile = self.tile.rows, self.tile.columns
        return choose_blocks(m, n, k, tile, may_cut_depth=exact and single)

    def lower_blocks(self, blocks: Blocks, work: Expr) -> Stmt:
        """A block of rows passes by every panel, one stretch of the depth after the other."""
        row_blocks = simplify(tirx.ceildiv(self.m_tiles, blocks.row_tiles))
        panels = simplify(tirx.ceildiv(self.n_tiles, blocks.panel_groups))
        stretches = int(self.k) // blocks.depth

        def block(p: Expr) -> Stmt:
            batch, row_block, group = unravel(p, [self.b, row_blocks, const(blocks.panel_groups)])
            where = self.batch_at(batch)

            def tile(stretch: Expr, panel: Expr, t: Expr) -> Stmt:
                i, j = row_block * blocks.row_tiles + t, group * panels + panel
                whole = simplify(self.m_tiles % blocks.row_tiles), simplify(self.n_tiles % blocks.panel_groups)
                inside = None if all(int(rest) == 0 for rest in whole) else tirx.And(i < self.m_tiles, j < self.n_tiles)
                part = Stretch(stretch, blocks.depth, stretches) if stretches > 1 else None
                return guarded(inside, self.one_tile(where, i, j, None, t, part))

            return loop(
                stretches,
                lambda s: loop(panels, lambda j: loop(blocks.row_tiles, lambda t: tile(s, j, t), name="t"), name="j"),
                name="s",
            )

        return parallel(simplify(self.b * row_blocks * blocks.panel_groups), block, work)

    def row_pieces(self) -> int:
        """Into how many pieces the rows are cut for the sake of threads; each packs its panel again."""
        columns, rows = simplify(self.b * self.n_tiles), self.m_tiles
        if not isinstance(columns, tirx.IntImm) or not isinstance(rows, tirx.IntImm):
            return 1
        wanted = max(1, PIECES // int(columns))
        return max(1, min(wanted, int(rows) // 8))

    def batch_at(self, flat: Expr) -> dict[tirx.Var, Expr]:
        return self.at(self.c.batch, flat)

    def at(self, axes: Sequence[Axis], flat: Expr) -> dict[tirx.Var, Expr]:
        return dict(zip((a.var for a in axes), unravel(flat, [a.extent for a in axes]), strict=True))

    def in_own_axes(self, value: Expr) -> Expr:
        return substitute(value, self.c.split)

    def reduction_offset(self, at: Sequence[Expr]) -> Expr:
        offset: Expr = const(0)
        for axis, i in zip(self.c.stage.reduction, at, strict=True):
            offset = offset * axis.extent + i
        return offset

    def panels_at_once(self) -> int:
        """How many panels to copy together: rows that lie far apart are a new page each, and worth reading on."""
        n_tiles, panel = self.n_tiles, simplify(self.k * self.tile.columns * 4)
        if not self.side_by_side or not isinstance(n_tiles, tirx.IntImm) or not isinstance(panel, tirx.IntImm):
            return 1
        return max(1, min(COPIED_BYTES // int(panel), int(n_tiles) // PIECES))

    @property
    def side_by_side(self) -> bool:
        """Elements of neighbouring columns are neighbours in memory, over all axes of the columns."""
        right = self.in_own_axes(self.c.right)
        if not is_load(right):
            return False
        inner = 1
        for axis in reversed([axis for axis in self.c.columns if axis.size != 1]):
            if axis.size is None or stride(right, axis.var) != inner:
                return False
            inner *= axis.size
        return True

    def pack(self, batch: Mapping[tirx.Var, Expr], first: Expr, panels: tirx.Buffer) -> Stmt:
        """panels[g, k, lane] = right[k, column lane of panel first + g]; columns beyond the last repeat it."""
        right, side_by_side, width = self.in_own_axes(self.c.right), self.side_by_side, int(panels.shape[0])
        inner = next((axis for axis in reversed(self.c.columns) if axis.size != 1), self.c.columns[-1])

        def row(at: Sequence[Expr], g: Expr) -> Stmt:
            reduction = dict(zip((a.var for a in self.c.stage.reduction), at, strict=True))
            start = (first + g) * self.tile.columns

            def element(lane: Expr, inside: bool) -> Stmt:
                column = start + lane if inside else tirx.min(start + lane, self.n - 1)
                # The address is the same where the innermost axis runs on past its end, and it has no divisions.
                flat = {**{axis.var: const(0) for axis in self.c.columns}, inner.var: column}
                where = {**batch, **reduction, **(flat if side_by_side else self.at(self.c.columns, column))}
                return store(
                    panels, as_dtype(substitute(right, where), self.c.dtype), [g, self.reduction_offset(at), lane]
                )

            one_by_one = loop(self.tile.columns, lambda lane: element(lane, self.n_divides and width == 1), name="l")
            if not side_by_side:
                return one_by_one
            vectors = self.vectors(lambda within: element(within, True))
            if self.n_divides and width == 1:
                return vectors
            return guarded(start + self.tile.columns <= self.n, vectors, one_by_one)

        return nest(self.c.stage.reduction, lambda at: loop(width, lambda g: row(at, g), name="g"))

    def one_tile(
        self,
        batch: Mapping[tirx.Var, Expr],
        i: Expr,
        j: Expr,
        panel: tuple[tirx.Buffer, Expr] | None,
        turn: Expr | None = None,
        stretch: Stretch | None = None,
    ) -> Stmt:
        """One register tile. panel: the copy of its columns, if there is one, as buffer and index. turn: which row tile
        this is of those that pass by its panel, or None where another panel comes next.
        """
        tile, dtype = self.tile, self.c.dtype
        # The stack's buffers move to registers because nothing addresses them by a loop variable.
        sums = [local([tile.columns], dtype, f"sums_{r}") for r in range(tile.rows)]
        row_vars = [[tirx.Var(f"{axis.var.name}_{r}", "int64") for axis in self.c.rows] for r in range(tile.rows)]
        bindings: list[Stmt] = []
        for r, names in enumerate(row_vars):
            flat = i * tile.rows + r
            if not self.m_divides:
                flat = tirx.min(flat, self.m - 1)
            places = unravel(flat, [a.extent for a in self.c.rows])
            bindings += [tirx.Bind(var, place) for var, place in zip(names, places, strict=True)]
        rows_at = [dict(zip((a.var for a in self.c.rows), names, strict=True)) for names in row_vars]
        left, right = self.in_own_axes(self.c.left), self.in_own_axes(self.c.right)

        def begin(r: int) -> Stmt:
            zero = self.vectors(lambda at: tirx.BufferStore(sums[r], _zero(dtype), [at]))
            if stretch is None:
                return zero
            return guarded(stretch.index > 0, self.partial_sums(batch, i, j, r, sums[r], save=False), zero)

        def step(at: Sequence[Expr]) -> Stmt:
            reduction = dict(zip((a.var for a in self.c.stage.reduction), at, strict=True))
            statements: list[Stmt] = [] if turn is None else [self.fetch_ahead(reduction, j, turn)]
            for r in range(tile.rows):
                of_row = substitute(left, {**batch, **reduction, **rows_at[r]})
                if self.pairs:
                    a = tirx.Var("a", "int32")
                    statements.append(tirx.Bind(a, of_row))
                    load = loads_of(right)[0]
                    statements += [
                        narrow.multiply_add(sums[r], v, a, load.source, [j, substitute(load.indices[1], reduction)])
                        for v in range(tile.vectors)
                    ]
                    continue
                a = tirx.Var("a", dtype)
                statements.append(tirx.Bind(a, as_dtype(of_row, dtype)))

                def multiply_add(within: Expr, row: tirx.Buffer = sums[r], a: tirx.Var = a) -> Stmt:
                    if panel is not None:
                        b = tirx.BufferLoad(panel[0], [panel[1], self.reduction_offset(at), within])
                    elif self.packed:
                        load = loads_of(right)[0]
                        b = tirx.BufferLoad(load.source, [j, substitute(load.indices[1], reduction), within])
                        b = as_dtype(b, dtype)
                    else:
                        column = {self.c.columns[0].var: j * tile.columns + within}
                        b = as_dtype(substitute(right, {**batch, **reduction, **column}), dtype)
                    return tirx.BufferStore(row, tirx.BufferLoad(row, [within]) + a * b, [within])

                statements.append(self.vectors(multiply_add))
            return seq(*statements)

        if stretch is None:
            products = _reduction_loops(self.c.stage.reduction, step)
            end = self.finish(batch, i, j, sums)
        else:
            products = loop(stretch.depth, lambda k: step([stretch.index * stretch.depth + k]), name="k")
            save = [self.partial_sums(batch, i, j, r, row, save=True) for r, row in enumerate(sums)]
            last = stretch.index == stretch.count - 1
            end = guarded(last, self.finish(batch, i, j, sums), seq(*save))
        return seq(*map(tirx.AllocBuffer, sums), *bindings, *map(begin, range(tile.rows)), products, end)

    def partial_sums(
        self, batch: Mapping[tirx.Var, Expr], i: Expr, j: Expr, r: int, row: tirx.Buffer, save: bool
    ) -> Stmt:
        """Row r of the tile between two stretches of the depth: into the output (save), or back from there."""
        output = self.epilogue.buffer if self.epilogue is not None else self.c.stage.buffer

        def element(at: Expr) -> Stmt:
            indices = self.output_indices(batch, i * self.tile.rows + r, j * self.tile.columns + at)
            if save:
                return tirx.BufferStore(output, tirx.BufferLoad(row, [at]), indices)
            return tirx.BufferStore(row, tirx.BufferLoad(output, indices), [at])

        def vector(v: Expr) -> Stmt:
            inside = None if self.n_divides else j * self.tile.columns + v * self.tile.lanes < self.n
            return guarded(inside, vectorized(self.tile.lanes, lambda lane: element(v * self.tile.lanes + lane)))

        return self.within_rows(i, r, unrolled(self.tile.vectors, vector))

    def within_rows(self, i: Expr, r: int, body: Stmt) -> Stmt:
        """What is done for row r of a tile, where the output has that row."""
        return guarded(None if self.m_divides else i * self.tile.rows + r < self.m, body)

    def output_indices(self, batch: Mapping[tirx.Var, Expr], row: Expr, column: Expr) -> list[Expr]:
        where = {**batch, **self.at(self.c.rows, row), **self.at(self.c.columns, column)}
        own = {**where, **{var: substitute(value, where) for var, value in self.c.split.items()}}
        return [simplify(own[axis.var]) for axis in self.c.stage.axes]

    def fetch_ahead(self, reduction: Mapping[tirx.Var, Expr], j: Expr, turn: Expr) -> Stmt:
        """Into the second-level cache: one line of what the next panel has at this depth. The first row tiles fetch all
        of it, while memory would idle; its own first row tile would wait for it.
        """
        load = loads_of(self.c.right)[0]
        lines = -(-self.tile.columns * load.source.dtype.itemsize // CACHE_LINE)
        column = tirx.min(turn, lines - 1) * (CACHE_LINE // load.source.dtype.itemsize)
        depth = substitute(load.indices[1], reduction)
        ahead = tirx.BufferLoad(load.source, [tirx.min(j + 1, load.source.shape[0] - 1), depth, simplify(column)])
        level_two = [tirx.const(0, "int32"), tirx.const(2, "int32"), tirx.const(1, "int32")]  # read, locality, data
        return tirx.Evaluate(tirx.call_llvm_intrin("void", "llvm.prefetch.p0", tirx.address_of(ahead), *level_two))

    def vectors(self, body: Callable[[Expr], Stmt]) -> Stmt:
        """`body(column within the tile)` for one row of the tile, a vector at a time, written out."""
        lanes = self.tile.lanes
        return unrolled(self.tile.vectors, lambda v: vectorized(lanes, lambda lane: body(v * lanes + lane)))

    def finish(self, batch: Mapping[tirx.Var, Expr], i: Expr, j: Expr, sums: Sequence[tirx.Buffer]) -> Stmt:
        """Store the tile: through the epilogue, and only what lies inside the output."""
        tile, stage = self.tile, self.c.stage
        heavy = self.epilogue is not None and bool(calls(self.epilogue.value) & EXPENSIVE)

        def element(source: tirx.Buffer, r: int, column: Expr, slot: Expr) -> Stmt:
            indices = self.output_indices(batch, i * tile.rows + r, column)
            result = as_dtype(tirx.BufferLoad(source, [slot]), str(stage.buffer.dtype))
            if self.epilogue is None:
                return store(stage.buffer, result, indices)
            return store(self.epilogue.buffer, _epilogue_value(self.epilogue, stage, indices, result), indices)

        def vector(source: tirx.Buffer, r: int, v: Expr) -> Stmt:
            first = j * tile.columns + v * tile.lanes
            slot = v * tile.lanes
            whole = vectorized(tile.lanes, lambda lane: element(source, r, first + lane, slot + lane))
            if self.n_divides:
                return whole
            if self.n_tail_free:
                return guarded(first < self.n, whole)
            one_by_one = loop(
                tile.lanes,
                lambda lane: guarded(first + lane < self.n, element(source, r, first + lane, slot + lane)),
                name="l",
            )
            return guarded(first + tile.lanes <= self.n, whole, one_by_one)

        def row(r: int) -> Stmt:
            if not heavy:
                return self.within_rows(i, r, unrolled(tile.vectors, lambda v: vector(sums[r], r, v)))
            # Written out, long epilogues would be most of the code. The accumulators themselves must not be addressed
            # by a loop variable, or they leave the registers for good.
            copy = local([tile.columns], self.c.dtype, "row")
            moved = self.vectors(lambda at: tirx.BufferStore(copy, tirx.BufferLoad(sums[r], [at]), [at]))
            body = allocated(copy, moved, loop(tile.vectors, lambda v: vector(copy, r, v), name="v"))
            return self.within_rows(i, r, body)

        return seq(*map(row, range(tile.rows)))

    @property
    def n_tail_free(self) -> bool:
        """A vector lies inside the output wholly or not at all."""
        n = static_size(self.c.columns)
        return n is not None and n % self.tile.lanes == 0


def _reduction_loops(axes: Sequence[Axis], step: Callable[[Sequence[Expr]], Stmt]) -> Stmt:
    """Serial loops without unrolling: the step is long enough."""

    def inner(depth: int, at: list[Expr]) -> Stmt:
        if depth == len(axes):
            return step(at)
        return loop(axes[depth].extent, lambda i: inner(depth + 1, [*at, i]), name=axes[depth].var.name)

    return inner(0, [])


def can_follow(epilogue: Stage, stage: Stage) -> bool:
    """The epilogue is element-wise over the contraction's output: same axes, each read of it at the same place."""
    if epilogue.reduction or len(epilogue.axes) != len(stage.axes) or not reads(epilogue.value, stage.buffer):
        return False
    # Not so where it broadcasts the output along an axis of extent 1.
    if not all(same(mine.extent, its.extent) for mine, its in zip(epilogue.axes, stage.axes, strict=True)):
        return False
    return all(
        all(
            index.same_as(var) or _both_unit(axis, index)
            for index, var, axis in zip(load.indices, epilogue.indices, stage.axes, strict=True)
        )
        for load in loads_of(epilogue.value)
        if load.source.same_as(stage.buffer)
    )


def _both_unit(axis: Axis, index: Expr) -> bool:
    return axis.size == 1 and isinstance(index, tirx.IntImm) and int(index) == 0


def _epilogue_value(epilogue: Stage, stage: Stage, indices: Sequence[Expr], result: Expr) -> Expr:
    def replaced(load: ir.TensorLoad) -> Expr:
        return result if load.source.same_as(stage.buffer) else load

    value = tvm_ffi.structural_map(epilogue.value, (ir.TensorLoad, replaced), order="post")
    return substitute(value, dict(zip(epilogue.indices, indices, strict=True)))


def _zero(dtype: str) -> Expr:
    return tirx.FloatImm(dtype, 0.0)
