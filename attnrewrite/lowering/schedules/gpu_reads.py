"""What an expression reads at neighbouring points, in registers: by one load where they are neighbours in memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import tvm_ffi
from tvm import ir, tirx

from attnrewrite.lowering.kernels.gpu_builder import Flat, load, registers, store
from attnrewrite.lowering.schedules.gpu_emit import Bound
from attnrewrite.lowering.schedules.gpu_parts import IF_THEN_ELSE
from attnrewrite.lowering.schedules.gpu_vectors import LANES, address, runs_in_lanes
from attnrewrite.lowering.schedules.stages import Axis, Expr, calls, loads_of, simplify, substitute, variables


@dataclass(frozen=True, eq=False)
class Read:
    """A load of an expression, and the registers that take its place.

    in_lanes: LANES points that follow each other, from a multiple of LANES on, are so in memory. uniform: all points
    read the same. axes: the variables that it depends on.
    """

    source: tirx.Buffer
    indices: tuple[Expr, ...]
    held: tirx.Buffer
    in_lanes: bool
    uniform: bool
    axes: frozenset[tirx.Var]


class ReadAhead:
    """An expression whose loads read registers that `fetch` fills; open only inside a launch.

    value: the expression, for the point `lane` (a variable) of those fetched; as it was where it loads on condition, or
    from where memory says, with no `reads`. along: the axes that the points follow each other on.
    besides: a buffer whose loads are left alone.
    """

    def __init__(self, value: Expr, along: Sequence[Axis], besides: tirx.Buffer | None = None) -> None:
        self.lane, self.reads = tirx.Var("lane", "int64"), list[Read]()

        def replaced(read: ir.TensorLoad) -> ir.TensorLoad:
            if besides is not None and read.source.same_as(besides):
                return read
            vectors, uniform = runs_in_lanes(read.source, read.indices, along), _uniform(read, along)
            held = registers(1 if uniform else LANES, str(read.source.dtype))
            self.reads.append(Read(read.source, tuple(read.indices), held, vectors, uniform, _variables(read)))
            return load(held, [0 if uniform else self.lane])

        self.value = value
        if _unconditional(value, besides):
            self.value = tvm_ffi.structural_map(value, (ir.TensorLoad, replaced), order="post")

    def fetch(self, reads: Sequence[Read], at: Sequence[Bound]) -> None:
        """Loads these at neighbouring points: LANES of them, or fewer that are loaded one by one."""
        for read in reads:
            points = at[:1] if read.uniform else at
            places = [[substitute(index, bound) for index in read.indices] for bound in points]
            if len(points) == LANES and read.in_lanes:
                run = Flat(read.source, LANES).load(simplify(address(read.source, places[0])))
                store(read.held, [tirx.Ramp(0, 1, LANES)], run)
            else:
                for lane, place in enumerate(places):
                    store(read.held, [lane], load(read.source, [simplify(index) for index in place]))


def in_lanes(value: Expr, along: Sequence[Axis]) -> bool:
    """Whether every load of the expression is one of LANES neighbours, or of the same element for all of them."""
    loads = loads_of(value)
    return _unconditional(value, None) and all(
        _uniform(read, along) or runs_in_lanes(read.source, read.indices, along) for read in loads
    )


def _unconditional(value: Expr, besides: tirx.Buffer | None) -> bool:
    """It loads whatever memory holds, from places that do not depend on that."""
    own = [read for read in loads_of(value) if besides is None or not read.source.same_as(besides)]
    return IF_THEN_ELSE not in calls(value) and not any(loads_of(index) for read in own for index in read.indices)


def _uniform(read: ir.TensorLoad, along: Sequence[Axis]) -> bool:
    return not _variables(read) & {axis.var for axis in along}


def _variables(read: ir.TensorLoad) -> frozenset[tirx.Var]:
    return frozenset(var for index in read.indices for var in variables(index))
