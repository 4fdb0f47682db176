"""Which stages are matrix products, and with which register tile each is computed.

A stage `out = sum a * b` is read as a product: *rows* are the output axes only `a` has, *columns* those only `b` has
(the innermost output axis among them, so that lanes run along columns), *batch* those both have. A tile is `rows x
columns` accumulators; each step of the reduction broadcasts one element of `a` per row and reads one vector of `b` per
column vector.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import tvm_ffi
from tvm import ir, tirx

from attnrewrite.lowering import narrow
from attnrewrite.lowering.choices import Product
from attnrewrite.lowering.kernels.vector_math import VectorUnit
from attnrewrite.lowering.schedules.loops import const
from attnrewrite.lowering.schedules.stages import (
    Axis,
    Expr,
    Stage,
    loads_of,
    simplify,
    static_size,
    variables,
)

# Of results: those that every schedule of products takes.
DTYPES = ("float32", "float16", "float64")


@dataclass(frozen=True)
class Tile:
    """rows x (vectors * lanes) accumulators."""

    rows: int
    vectors: int
    lanes: int

    @property
    def columns(self) -> int:
        return self.vectors * self.lanes


@dataclass(frozen=True)
class Contraction:
    """A stage read as a matrix product; `left` varies along rows, `right` along columns."""

    stage: Stage
    left: Expr
    right: Expr
    batch: tuple[Axis, ...]
    rows: tuple[Axis, ...]
    columns: tuple[Axis, ...]
    split: Mapping[tirx.Var, Expr]  # the stage's own variables in terms of the axes above

    @property
    def dtype(self) -> str:
        """Of the accumulators: half-precision products are summed in single precision."""
        dtype = str(self.stage.buffer.dtype)
        return "float32" if dtype in ("float16", "bfloat16") else dtype

    @property
    def packed_columns(self) -> int | None:
        """Columns per panel where `right` is packed `[panels, reduction, columns]`."""
        loads = loads_of(self.right)
        if len(loads) != 1 or len(self.columns) != 1 or len(loads[0].source.shape) != 3:
            return None
        lane = loads[0].indices[-1]
        if isinstance(lane, tirx.FloorMod) and lane.a.same_as(self.columns[0].var) and isinstance(lane.b, tirx.IntImm):
            return int(lane.b)
        return None

    @property
    def product(self) -> Product | None:
        """Its sizes, where all of them are known."""
        sizes = [static_size(axes) for axes in (self.batch, self.rows, self.columns, self.stage.reduction)]
        batch, rows, columns, depth = sizes
        if batch is None or rows is None or columns is None or depth is None:
            return None
        dtype = str(loads_of(self.right)[0].source.dtype)
        return Product(batch, rows, columns, depth, dtype, self.packed_columns is not None)


def narrowed(unit: VectorUnit, columns: int | None) -> VectorUnit:
    """With lanes for no more than twice the columns."""
    lanes = unit.lanes
    while columns is not None and lanes > 4 and lanes >= 2 * columns:
        lanes //= 2
    return VectorUnit(lanes, unit.accumulators)


def choose_tile(rows: int | None, columns: int | None, unit: VectorUnit, vectors: int | None = None) -> Tile:
    """The register tile that wastes least on the edges and on loads.

    vectors: of columns, where that is decided already.
    """
    return ranked_tiles(rows, columns, unit, vectors)[0]


def ranked_tiles(rows: int | None, columns: int | None, unit: VectorUnit, vectors: int | None = None) -> list[Tile]:
    """Every register tile there is, the most promising first."""
    ranked: list[tuple[float, Tile]] = []
    for width_in_vectors in range(1, 7) if vectors is None else [vectors]:
        width = width_in_vectors * unit.lanes
        if columns is not None and width_in_vectors > 1 and width - unit.lanes >= columns:
            break
        # Beside the sums, registers hold one step's vectors of columns and one broadcast element of a row.
        most = min(unit.accumulators, unit.registers - 1 - width_in_vectors) // width_in_vectors
        for height in range(1, min(most, rows or most) + 1):
            padded_rows = 1.0 if rows is None else -(-rows // height) * height / rows
            padded_columns = 1.0 if columns is None else -(-columns // width) * width / columns
            # Per multiply-add: 1 for the arithmetic, and what the loads of both operands delay it by. Elements of rows
            # are in the first-level cache; vectors of columns come from a panel in the second, once for every row tile.
            cost = padded_rows * padded_columns * (1.0 + 0.25 / width_in_vectors + 0.75 / height)
            ranked.append((round(cost, 9), Tile(height, width_in_vectors, unit.lanes)))
    return [tile for _, tile in sorted(ranked, key=lambda entry: entry[0])]


def match_contraction(stage: Stage, dtypes: Sequence[str] = DTYPES) -> Contraction | None:
    """The stage as a matrix product with a result of these types, or None where it is not one worth a register tile."""
    if stage.combine != "sum" or not stage.axes or str(stage.buffer.dtype) not in dtypes:
        return None
    operands = _factors(stage.value)
    if operands is None:
        return None
    inner = next((axis for axis in reversed(stage.axes) if axis.size != 1), stage.axes[-1])
    having = [o for o in operands if inner.var in variables(o)]
    if len(having) != 1:
        return None
    right = having[0]
    left = operands[0] if right is operands[1] else operands[1]
    return _classify(stage, left, right)


def _factors(value: Expr) -> list[Expr] | None:
    """The two factors of a product of two loads, or of a product of pairs."""
    if isinstance(value, tirx.Mul):
        return None if any(len(loads_of(o)) != 1 for o in (value.a, value.b)) else [value.a, value.b]
    return narrow.dot_operands(value)


def _classify(stage: Stage, left: Expr, right: Expr) -> Contraction | None:
    batch: list[Axis] = []
    rows: list[Axis] = []
    columns: list[Axis] = []
    split: dict[tirx.Var, Expr] = {}
    for axis in stage.axes:
        in_left, in_right = axis.var in variables(left), axis.var in variables(right)
        if in_left and in_right:
            group = _group_size(right, axis)
            if group is None:
                batch.append(axis)
                continue
            # A grouped convolution: output channel = group * size + channel within the group.
            outer = Axis(tirx.Var("group", "int64"), simplify(tirx.floordiv(axis.extent, group)))
            within = Axis(tirx.Var("channel", "int64"), const(group))
            split[axis.var] = outer.var * group + within.var
            right = _replace_quotient(right, axis.var, outer.var)
            batch.append(outer)
            rows.append(within)
        elif in_left:
            rows.append(axis)
        else:
            columns.append(axis)
    height, width = static_size(rows), static_size(columns)
    if not columns or (height == 1 and width is not None and width < 4):
        return None
    if height == 1 and batch and static_size(stage.reduction) is not None and not _is_packed(right, columns):
        return None  # no reuse of a panel: a depthwise convolution is better off as rows
    return Contraction(stage, left, right, tuple(batch), tuple(rows), tuple(columns), split)


def _is_packed(right: Expr, columns: Sequence[Axis]) -> bool:
    return len(columns) == 1 and any(
        isinstance(index, tirx.FloorMod) and index.a.same_as(columns[0].var)
        for load in loads_of(right)
        for index in load.indices
    )


def _group_size(value: Expr, axis: Axis) -> int | None:
    """g where the axis enters the expression only as `axis // g`, 1 < g <= extent; None otherwise."""
    sizes: list[int | None] = []

    def divided(node: tirx.FloorDiv) -> None:
        if node.a.same_as(axis.var):
            sizes.append(int(node.b) if isinstance(node.b, tirx.IntImm) else None)

    tvm_ffi.structural_walk(value, (tirx.FloorDiv, divided), order="post")
    uses = [0]

    def used(var: tirx.Var) -> None:
        uses[0] += var.same_as(axis.var)

    tvm_ffi.structural_walk(value, (ir.Var, used), order="post")
    if not sizes or len(sizes) != uses[0] or len(set(sizes)) != 1:
        return None
    return sizes[0]


def _replace_quotient(value: Expr, var: tirx.Var, quotient: tirx.Var) -> Expr:
    return tvm_ffi.structural_map(
        value, (tirx.FloorDiv, lambda node: quotient if node.a.same_as(var) else node), order="post"
    )
